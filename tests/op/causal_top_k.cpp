// SPDX-License-Identifier: MIT
#include <colt5/op/causal_top_k.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include <colt5/colt5.hpp>

#include "support/tensors.hpp"

using namespace colt5;
using namespace support;

namespace {

/// The choice in one row, token by token, from its definition.
struct Chosen {
    Index token;
    double score, slope;
};
std::vector<Chosen> by_definition(const CausalTopK& how, const std::vector<double>& s, const std::vector<bool>& real,
                                  Index num_tokens) {
    const auto length = static_cast<Index>(s.size());
    std::vector<Chosen> chosen;
    double budget = how.burst > 0 ? how.burst : std::max(1.0, 2 * how.rate * static_cast<double>(how.block_size));
    const double most = budget;
    for (Index begin = 0, end = 1; begin < length; begin = end, end = begin + std::min(begin, how.block_size)) {
        std::vector<double> history;
        for (Index i = std::max(Index{0}, begin - how.block_size); i < begin; ++i)
            if (real[static_cast<std::size_t>(i)]) history.push_back(s[static_cast<std::size_t>(i)]);
        std::sort(history.begin(), history.end(), std::greater<>());
        const auto m = static_cast<double>(history.size());
        double threshold = -INFINITY, price = INFINITY;
        if (!history.empty()) {
            threshold = history[static_cast<std::size_t>(std::ceil(how.rate * m)) - 1];
            const double k = std::min(m, how.rate * m * how.fetch_k_ratio);
            double low = -history.front() - 100, high = -history.back();  // of the price, by bisection
            for (int step = 0; step < 200; ++step) {
                const double middle = (low + high) / 2;
                double sum = 0;
                for (const double of : history) sum += std::min(1.0, std::exp((of + middle) / how.eps));
                (sum < k ? low : high) = middle;
            }
            price = high;
        }
        double left = std::floor(budget), taken = 0, tokens = 0;
        for (Index i = begin; i < std::min(end, length); ++i) {
            const double logit = s[static_cast<std::size_t>(i)];
            if (!real[static_cast<std::size_t>(i)]) continue;
            ++tokens;
            if (logit < threshold || taken >= left || static_cast<Index>(chosen.size()) >= num_tokens) continue;
            ++taken;
            const double score = std::min(1.0, std::exp((logit + price) / how.eps));
            const bool below_one = logit + price < -1e-9;  // not at the kink, which bisection does not hit exactly
            chosen.push_back({i, score, below_one ? score / how.eps : 0});
        }
        budget = std::min(most, budget - taken + how.rate * tokens);
    }
    return chosen;
}

template <typename T>
std::vector<T> row_of(const T* first, Index count) {
    return {first, first + count};
}

constexpr std::array<CausalTopK, 6> settings{{
    {.rate = 0.25, .block_size = 4},
    {.rate = 0.125, .block_size = 16, .fetch_k_ratio = 2, .eps = 0.3},
    {.rate = 1, .block_size = 8},
    {.rate = 0.5, .burst = 1, .block_size = 1},
    {.rate = 0.0625, .burst = 3, .block_size = 64, .fetch_k_ratio = 1.5, .eps = 2},
    {.rate = 0.75, .burst = 40, .block_size = 32, .fetch_k_ratio = 4},
}};

}  // namespace

TEST_CASE("CausalBlocks: blocks of 1, 1, 2, 4 and so on, then of one size, behind their history") {
    const CausalBlocks blocks{21, 8};
    const std::vector<Index> ends{1, 2, 4, 8, 16, 21}, histories{0, 0, 0, 0, 0, 8};
    REQUIRE(blocks.count() == static_cast<Index>(ends.size()));
    for (Index j = 0; j < blocks.count(); ++j) {
        CHECK(blocks.begin(j) == (j == 0 ? 0 : ends[static_cast<std::size_t>(j) - 1]));
        CHECK(blocks.end(j) == ends[static_cast<std::size_t>(j)]);
        CHECK(blocks.history(j) == histories[static_cast<std::size_t>(j)]);
    }
    for (const Index size : {1, 2, 32})
        for (Index length = 0; length < 100; ++length) {
            const CausalBlocks some{length, size};
            Index at = 0;
            for (Index j = 0; j < some.count(); ++j) {
                CHECK(some.begin(j) == at);
                CHECK(some.end(j) > at);
                at = some.end(j);
            }
            CHECK(at == length);
        }
}

TEST_CASE("causal_top_k: by its definition, with ties, masks and a limit") {
    const Cpu policy(2);
    for (const auto& how : settings)
        for (const Index length : {0, 1, 2, 3, 7, 16, 61, 130, 200})
            for (const Index limit : {Index{1}, Index{9}, Index{1000}}) {
                CAPTURE(how.block_size);
                CAPTURE(length);
                CAPTURE(limit);
                auto logits = normal<double>(policy, std::array<Index, 3>{2, 3, length}, 7, 2);
                for (Index i = 0; i < logits.size(); i += 2) logits.data()[i] = std::round(logits.data()[i]);
                const auto some = random_mask(policy, std::array<Index, 2>{2, length}, 1);
                for (const Mask mask : {Mask(), some.const_view()}) {
                    const auto picks = causal_top_k(policy, how, logits, mask, limit);
                    const Index count = picks.indices.extent(2);
                    CHECK(count == std::min(limit, how.capacity(length)));
                    for (Index b = 0; b < 2; ++b)
                        for (Index r = 0; r < 3; ++r) {
                            std::vector<bool> real(static_cast<std::size_t>(length), true);
                            if (mask) real.assign(mask[b].data(), mask[b].data() + length);
                            const auto expected =
                                by_definition(how, row_of(logits.const_view()[b][r].data(), length), real, limit);
                            REQUIRE(static_cast<Index>(expected.size()) <= count);
                            std::vector<bool> seen(static_cast<std::size_t>(length), false);
                            for (Index i = 0; i < count; ++i) {
                                const auto token = picks.indices.const_view()(b, r, i);
                                const bool live = i < static_cast<Index>(expected.size());
                                const Chosen of = live ? expected[static_cast<std::size_t>(i)] : Chosen{token, 0, 0};
                                CHECK(picks.live.const_view()(b, r, i) == live);
                                REQUIRE(token == of.token);
                                CHECK(picks.scores.const_view()(b, r, i) == doctest::Approx(of.score).epsilon(1e-10));
                                CHECK(picks.slopes.const_view()(b, r, i) == doctest::Approx(of.slope).epsilon(1e-10));
                                CHECK(!seen[static_cast<std::size_t>(token)]);
                                seen[static_cast<std::size_t>(token)] = true;
                            }
                        }
                }
            }
}

TEST_CASE_TEMPLATE("causal_top_k: the future changes nothing, and no prefix exceeds its capacity", T, float, double) {
    const Cpu policy(2);
    constexpr Index length = 300;
    for (const auto& how : settings) {
        CAPTURE(how.block_size);
        const auto logits = normal<T>(policy, std::array<Index, 3>{1, 1, length}, 3, 2);
        const auto all = causal_top_k(policy, how, logits, {}, length);
        Index live = 0;
        for (Index prefix = 1; prefix <= length; ++prefix) {
            CAPTURE(prefix);
            auto changed = copy_of(policy, logits);
            for (Index i = prefix; i < length; ++i) changed.data()[i] = T(5) - 2 * logits.data()[i];
            HostTensor<T, 3> shorter(policy, {1, 1, prefix});
            std::copy_n(logits.data(), prefix, shorter.data());
            while (live < all.live.size() && all.live.data()[live] && all.indices.data()[live] < prefix) ++live;
            CHECK(live <= how.capacity(prefix));
            for (const auto& other :
                 {causal_top_k(policy, how, changed, {}, length), causal_top_k(policy, how, shorter, {}, length)}) {
                REQUIRE(other.indices.size() >= live);
                for (Index i = 0; i < live; ++i) {
                    CHECK(other.live.data()[i]);
                    CHECK(other.indices.data()[i] == all.indices.data()[i]);
                    CHECK(other.scores.data()[i] == all.scores.data()[i]);
                    CHECK(other.slopes.data()[i] == all.slopes.data()[i]);
                }
                const bool more = live < other.live.size() && other.live.data()[live];
                CHECK((!more || other.indices.data()[live] >= prefix));
            }
        }
    }
}

TEST_CASE("causal_top_k: chooses about rate · n tokens, with any number of threads the same") {
    for (const double rate : {1.0 / 16, 0.125, 0.5}) {
        CAPTURE(rate);
        const CausalTopK how{.rate = rate};
        const Cpu policy(2), alone(1);
        const auto logits = normal<float>(policy, std::array<Index, 3>{2, 1, 20000}, 5);
        const auto picks = causal_top_k(policy, how, logits, {}, 20000);
        const auto live =
            static_cast<double>(std::count(picks.live.data(), picks.live.data() + picks.live.size(), true));
        CHECK(live == doctest::Approx(rate * 40000).epsilon(0.06));
        const auto again = causal_top_k(alone, how, logits, {}, 20000);
        CHECK(same_bits(again.indices, picks.indices));
        CHECK(same_bits(again.scores, picks.scores));
    }
}

TEST_CASE_TEMPLATE("causal_top_k: NaN is the largest logit, and is a price where it is in the history", T, float,
                   double) {
    const Cpu policy(1);
    const CausalTopK how{.rate = 0.25, .block_size = 4};
    auto logits = normal<T>(policy, std::array<Index, 3>{1, 1, 16}, 2);
    logits.data()[5] = std::numeric_limits<T>::quiet_NaN();
    const auto picks = causal_top_k(policy, how, logits, {}, 16);
    bool found = false;
    for (Index i = 0; i < picks.indices.size(); ++i) {
        if (!picks.live.data()[i]) continue;
        const Index token = picks.indices.data()[i];
        found = found || token == 5;
        CHECK(std::isnan(picks.scores.data()[i]) == (token == 5 || (token >= 8 && token < 12)));
    }
    CHECK(found);
    // Infinite logits are numbers like others.
    logits.data()[5] = std::numeric_limits<T>::infinity();
    logits.data()[6] = -std::numeric_limits<T>::infinity();
    for (const Index i : {0, 1, 2, 3}) {
        const auto some = causal_top_k(policy, how, logits, {}, 16);
        CHECK(some.scores.data()[i] >= 0);
        CHECK(some.scores.data()[i] <= 1);
    }
}

TEST_CASE_TEMPLATE("causal_top_k: infinite logits have scores that are numbers", T, float, double) {
    const Cpu policy(1);
    constexpr T infinity = std::numeric_limits<T>::infinity();
    TokensTensor<T, Cpu> logits(policy, {1, 1, 16});
    const auto score_of = [&](const CausalTopK& how, Index token) {
        const auto picks = causal_top_k(policy, how, logits, {}, 16);
        for (Index i = 0; i < picks.scores.size(); ++i) {
            CHECK(!std::isnan(picks.scores.data()[i]));
            if (picks.live.data()[i] && picks.indices.data()[i] == token) return picks.scores.data()[i];
        }
        return T(-1);
    };
    SUBCASE("the first token has no history: score 1") {
        fill(policy, logits, -1);
        logits.data()[0] = -infinity;
        CHECK(score_of({.rate = 1, .block_size = 16}, 0) == 1);
    }
    SUBCASE("an infinite logit after another one in the history") {
        fill(policy, logits, 0);
        logits.data()[3] = logits.data()[8] = infinity;
        for (const Index token : {3, 8}) CHECK(score_of({.rate = 1.0 / 16}, token) == 1);
    }
    SUBCASE("minus infinity") {
        fill(policy, logits, -infinity);
        logits.data()[0] = 0;
        CHECK(score_of({.rate = 1, .block_size = 16}, 0) == 1);
    }
}

TEST_CASE_TEMPLATE("causal_top_k: a history whose k-th logit is far above the others", T, float, double) {
    const Cpu policy(1);
    for (const T gap : {T(20), T(60), T(1000)}) {  // e^-gap is less than the rounding of 1
        CAPTURE(gap);
        TokensTensor<T, Cpu> logits(policy, {1, 1, 8});
        fill(policy, logits, 0);
        logits.data()[0] = gap;
        logits.data()[4] = gap + 5;
        logits.data()[6] = gap;
        // k is 1 in the block [4, 8): the price is −gap, up to rounding
        const auto picks = causal_top_k(policy, {.rate = 0.25, .block_size = 4}, logits, {}, 8);
        for (Index pick = 0; pick < 3; ++pick) {
            CHECK(picks.live.data()[pick]);
            CHECK(picks.indices.data()[pick] == std::array<TokenIndex, 3>{0, 4, 6}[static_cast<std::size_t>(pick)]);
            CHECK(picks.scores.data()[pick] == doctest::Approx(1));
        }
        CHECK(!picks.live.data()[3]);
    }
}

TEST_CASE("causal_top_k: straight_through gives live picks 1, and keeps the slopes") {
    const Cpu policy(1);
    const auto logits = normal<double>(policy, std::array<Index, 3>{2, 1, 90}, 4);
    CausalTopK how{.rate = 0.125, .block_size = 16};
    const auto soft = causal_top_k(policy, how, logits, {}, 90);
    how.straight_through = true;
    const auto straight = causal_top_k(policy, how, logits, {}, 90);
    CHECK(same_bits(soft.indices, straight.indices));
    CHECK(same_bits(soft.slopes, straight.slopes));
    for (Index i = 0; i < soft.live.size(); ++i) CHECK(straight.scores.data()[i] == (soft.live.data()[i] ? 1 : 0));
}

TEST_CASE("causal_top_k: the capacity of the longest sequences, and the least rate") {
    constexpr Index longest = (Index{1} << 31) - 1;
    CHECK(CausalTopK{.rate = 1}.capacity(longest) == longest);
    CHECK(CausalTopK{.rate = 1, .burst = 1e6, .block_size = 1024}.capacity(longest) == longest);
    CHECK(CausalTopK{.rate = 0.5, .burst = 3}.capacity(longest) == longest / 2 + 3);
    CHECK(CausalTopK{.rate = 0.5, .burst = 3}.capacity(4) == 4);
    const Cpu policy(1);
    const auto logits = normal<double>(policy, std::array<Index, 3>{1, 1, 40}, 4);
    const CausalTopK how{.rate = CausalTopK::least_rate};
    CHECK(causal_top_k(policy, how, logits, {}, 40).indices.size() == how.capacity(40));
}

TEST_CASE("causal_top_k: what it does not take") {
    const Cpu policy(1);
    const auto logits = normal<double>(policy, std::array<Index, 3>{2, 1, 9}, 4);
    const auto mask = random_mask(policy, std::array<Index, 2>{2, 8}, 1);
    const CausalTopK how{.rate = 0.5};
    CHECK_THROWS_WITH_AS(causal_top_k(policy, how, logits, mask.const_view(), 3),
                         "colt5: `mask` must have shape (2, 9), but has (2, 8)", ShapeError);
    CHECK_THROWS_AS(causal_top_k(policy, how, logits, {}, 0), ValueError);
    for (const CausalTopK& bad : {CausalTopK{.rate = 0}, CausalTopK{.rate = 1e-10}, CausalTopK{.rate = 1.5},
                                  CausalTopK{.rate = 0.5, .burst = 0.5}, CausalTopK{.rate = 0.5, .block_size = 3},
                                  CausalTopK{.rate = 0.5, .block_size = 2048},
                                  CausalTopK{.rate = 0.5, .fetch_k_ratio = 0.5}, CausalTopK{.rate = 0.5, .eps = 0}})
        CHECK_THROWS_AS(causal_top_k(policy, bad, logits, {}, 3), ValueError);
}
