// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include <colt5/cpu/top_k.hpp>

#include "support/tensors.hpp"

using namespace colt5;
using namespace support;

namespace {

template <typename T>
std::vector<TokenIndex> naive(const TokensTensor<T, Cpu>& logits, const HostTensor<bool, 2>& mask, Index k) {
    const auto [batch, routes, length] = logits.shape();
    std::vector<TokenIndex> picks;
    for (Index b = 0; b < batch; ++b)
        for (Index r = 0; r < routes; ++r) {
            std::vector<TokenIndex> order(static_cast<std::size_t>(length));
            std::iota(order.begin(), order.end(), 0);
            std::stable_sort(order.begin(), order.end(), [&](TokenIndex i, TokenIndex j) {
                if (mask && mask.view()(b, i) != mask.view()(b, j)) return bool{mask.view()(b, i)};
                if (mask && !mask.view()(b, i)) return false;
                const T s = logits.view()(b, r, i), other = logits.view()(b, r, j);
                if (std::isnan(s) || std::isnan(other)) return std::isnan(s) && !std::isnan(other);
                return s > other;
            });
            picks.insert(picks.end(), order.begin(), order.begin() + std::min(k, length));
        }
    return picks;
}

template <typename T>
std::vector<TokenIndex> picks_of(const Cpu& policy, std::vector<T> row, Index k) {
    const auto length = static_cast<Index>(row.size());
    return to_host(policy, top_k(policy, from_host<HostTensor<T, 3>>(policy, {1, 1, length}, row), Mask{}, k));
}

}  // namespace

TEST_CASE_TEMPLATE("top_k: agrees with a stable sort", T, float, double) {
    const Cpu policy(2);
    for (const auto& [batch, routes, length] :
         {std::array<Index, 3>{1, 1, 1}, {2, 1, 7}, {3, 2, 64}, {1, 1, 1000}, {2, 3, 333}, {2, 1, 0}, {0, 1, 5}}) {
        auto logits = normal<T>(policy, std::array{batch, routes, length}, 0);
        auto ties = copy_of(policy, logits);
        for (Index i = 0; i < ties.size(); ++i) ties.data()[i] = std::round(ties.data()[i]);  // −0 and 0 among them
        HostTensor<bool, 2> no_mask, mask = random_mask(policy, std::array{batch, length}, 1, 0.5);
        if (batch > 1) std::fill_n(mask.data() + length, length, false);  // a sequence of padding only
        for (const Index k : {Index{1}, Index{5}, length / 2 + 1, length + 1, 2 * length + 3}) {
            CAPTURE(k);
            for (const auto* const l : {&logits, &ties}) {
                CHECK(to_host(policy, top_k(policy, *l, Mask{}, k)) == naive(*l, no_mask, k));
                CHECK(to_host(policy, top_k(policy, *l, Mask(mask), k)) == naive(*l, mask, k));
            }
            CHECK(top_k(policy, logits, Mask{}, k).shape() == std::array{batch, routes, std::min(k, length)});
        }
    }
}

TEST_CASE_TEMPLATE("top_k: ties go to the lower index; zeros of both signs are equal", T, float, double) {
    const Cpu policy(1);
    CHECK(picks_of<T>(policy, {2, 3, 3, 1, 3}, 2) == std::vector<TokenIndex>{1, 2});
    CHECK(picks_of<T>(policy, {T(-0.0), T(0), T(-0.0), T(0)}, 3) == std::vector<TokenIndex>{0, 1, 2});
}

TEST_CASE_TEMPLATE("top_k: infinities and NaN of either sign; masked tokens last even so", T, float, double) {
    const Cpu policy(1);
    const T infinity = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
    const T smallest = std::numeric_limits<T>::denorm_min(), lowest = std::numeric_limits<T>::lowest();
    CHECK(picks_of<T>(policy, {1, -infinity, infinity, -1, lowest}, 5) == std::vector<TokenIndex>{2, 0, 3, 4, 1});
    CHECK(picks_of<T>(policy, {-smallest, 0, smallest}, 3) == std::vector<TokenIndex>{2, 1, 0});
    CHECK(picks_of<T>(policy, {1, nan, infinity, -nan, nan}, 5) == std::vector<TokenIndex>{1, 3, 4, 2, 0});

    const auto logits = from_host<HostTensor<T, 3>>(policy, {1, 1, 4}, std::vector<T>{nan, -infinity, infinity, 1});
    HostTensor<bool, 2> mask(policy, {1, 4});
    fill_with(policy, mask, [](std::size_t i) { return i % 2 == 1; });
    CHECK(to_host(policy, top_k(policy, logits, Mask(mask), 4)) == std::vector<TokenIndex>{3, 1, 0, 2});
}

TEST_CASE("top_k: the same with 1 and 2 threads, and for each sequence alone") {
    const Cpu one(1), two(2);
    auto logits = normal<float>(one, std::array<Index, 3>{3, 2, 999}, 0, 3);
    for (Index i = 0; i < logits.size(); ++i) logits.data()[i] = std::round(logits.data()[i]);
    const auto mask = random_mask(one, std::array<Index, 2>{3, 999}, 0);
    const auto picks = top_k(one, logits, Mask(mask), 100);
    CHECK(same_bits(top_k(two, logits, Mask(mask), 100), picks));
    for (Index b = 0; b < 3; ++b)
        CHECK(same_bits(top_k(two, sequence(logits, b), sequence(mask, b), 100), sequence(picks, b)));
}

TEST_CASE("top_k: errors name the argument") {
    const Cpu policy(1);
    const auto logits = normal<float>(policy, std::array<Index, 3>{2, 1, 5}, 0);
    const auto mask = random_mask(policy, std::array<Index, 2>{2, 4}, 0);
    CHECK_THROWS_WITH_AS(top_k(policy, logits, Mask{}, 0), "colt5: `k` must be >= 1, but is 0", ValueError);
    CHECK_THROWS_WITH_AS(top_k(policy, logits, Mask(mask), 1), "colt5: `mask` must have shape (2, 5), but has (2, 4)",
                         ShapeError);
}
