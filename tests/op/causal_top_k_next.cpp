// SPDX-License-Identifier: MIT
#include <colt5/op/causal_top_k_next.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <functional>
#include <vector>

#include <colt5/colt5.hpp>

#include "support/tensors.hpp"

using namespace colt5;
using namespace support;

namespace {

constexpr std::array<CausalTopK, 6> settings{{
    {.rate = 0.25, .block_size = 4},
    {.rate = 0.125, .block_size = 16, .fetch_k_ratio = 2, .eps = 0.3},
    {.rate = 1, .block_size = 8},
    {.rate = 0.5, .burst = 1, .block_size = 1},
    {.rate = 0.0625, .burst = 3, .block_size = 64, .fetch_k_ratio = 1.5, .eps = 2},
    {.rate = 0.75, .burst = 40, .block_size = 32, .fetch_k_ratio = 4},
}};

template <typename T>
struct Pick {
    Index token;
    T score;
    bool operator==(const Pick&) const = default;
};
template <typename T>
using Rows = std::vector<std::vector<Pick<T>>>;  // of each row

template <typename T>
Rows<T> chosen_of_all(const Cpu& policy, const CausalTopK& how, const HostTensor<T, 3>& logits, Mask mask,
                      Index limit) {
    const auto picks = causal_top_k(policy, how, logits, mask, limit);
    Rows<T> rows(static_cast<std::size_t>(logits.extent(0) * logits.extent(1)));
    for (std::size_t row = 0; row < rows.size(); ++row)
        for (Index i = 0; i < picks.indices.extent(2); ++i) {
            const Index at = static_cast<Index>(row) * picks.indices.extent(2) + i;
            if (picks.live.data()[at]) rows[row].push_back({picks.indices.data()[at], picks.scores.data()[at]});
        }
    return rows;
}

/// Sequences of these lengths, chunk by chunk.
template <typename T>
Rows<T> chosen_in_chunks(const Cpu& policy, const CausalTopK& how, const HostTensor<T, 3>& logits,
                         const std::vector<Index>& lengths, Index limit, const std::function<Index(int)>& chunk) {
    const auto [batch, routes, all] = logits.shape();
    CausalTopKState<T, Cpu> state(policy, how, batch, routes, limit);
    Rows<T> rows(static_cast<std::size_t>(batch * routes));
    const Index longest = all, sequences = batch, each = routes;
    int step = 0;
    for (Index first = 0, count; first < longest; first += count, ++step) {
        count = std::min(chunk(step), longest - first);
        HostTensor<T, 3> part(policy, {sequences, each, count});
        HostTensor<bool, 2> real(policy, {sequences, count});
        for (Index b = 0; b < sequences; ++b)
            for (Index i = 0; i < count; ++i) {
                real.view()(b, i) = first + i < lengths[static_cast<std::size_t>(b)];
                for (Index r = 0; r < each; ++r) part.view()(b, r, i) = logits.const_view()(b, r, first + i);
            }
        const auto next = causal_top_k_next(policy, how, state, part, real.const_view(), limit);
        const Index picks = next.indices.extent(2);
        bool narrow = picks == 0;
        for (std::size_t row = 0; row < rows.size(); ++row) {
            std::vector<bool> seen(static_cast<std::size_t>(count), false);
            for (Index i = 0; i < picks; ++i) {
                const Index at = static_cast<Index>(row) * picks + i, token = next.indices.data()[at];
                REQUIRE((token >= 0 && token < count));
                CHECK(!seen[static_cast<std::size_t>(token)]);
                seen[static_cast<std::size_t>(token)] = true;
                const Index before = std::min(first, lengths[row / static_cast<std::size_t>(each)]);
                CHECK(next.positions.data()[at] == before + token);
                if (next.live.data()[at]) {
                    rows[row].push_back({next.positions.data()[at], next.scores.data()[at]});
                    narrow = narrow || i + 1 == picks;
                } else {
                    CHECK(next.scores.data()[at] == 0);
                }
            }
        }
        CHECK(narrow);  // no more picks than the row with the most needs
    }
    return rows;
}

}  // namespace

TEST_CASE_TEMPLATE("causal_top_k_next: chunk by chunk the tokens and scores that causal_top_k chooses, bit for bit", T,
                   float, double) {
    const Cpu policy(2);
    for (const auto& how : settings)
        for (const Index length : {1, 2, 3, 16, 61, 300})
            for (const Index limit : {Index{1}, Index{9}, Index{1000}})
                for (const Index size : {1, 3, 64, 300, 0}) {  // 0: mixed
                    CAPTURE(how.block_size);
                    CAPTURE(length);
                    CAPTURE(limit);
                    CAPTURE(size);
                    auto logits = normal<T>(policy, std::array<Index, 3>{3, 2, length}, 7, 2);
                    for (Index i = 0; i < logits.size(); i += 2) logits.data()[i] = std::round(logits.data()[i]);
                    logits.data()[0] = std::numeric_limits<T>::quiet_NaN();
                    const std::vector<Index> lengths{length, length / 2, 0};
                    HostTensor<bool, 2> real(policy, {3, length});
                    for (Index b = 0; b < 3; ++b)
                        for (Index i = 0; i < length; ++i) real.view()(b, i) = i < lengths[static_cast<std::size_t>(b)];
                    const auto chunk = [&](int step) { return size > 0 ? size : Index{1} + step * step % 23; };
                    const auto expected = chosen_of_all<T>(policy, how, logits, real.const_view(), limit);
                    const auto actual = chosen_in_chunks<T>(policy, how, logits, lengths, limit, chunk);
                    for (std::size_t row = 0; row < expected.size(); ++row) {
                        REQUIRE(actual[row].size() == expected[row].size());
                        for (std::size_t i = 0; i < expected[row].size(); ++i) {
                            CHECK(actual[row][i].token == expected[row][i].token);
                            CHECK(std::memcmp(&actual[row][i].score, &expected[row][i].score, sizeof(T)) == 0);
                        }
                    }
                }
}

TEST_CASE("causal_top_k_next: the state takes the bytes that it says") {
    const Cpu policy(1);
    const CausalTopK how{.rate = 0.25, .block_size = 16};
    CausalTopKState<float, Cpu> state(policy, how, 3, 2, 100);
    Index bytes = 0;
    CausalTopKState<float, Cpu>::each_tensor(
        [&](const std::string&, const auto& tensor) {
            bytes += tensor.size() * static_cast<Index>(sizeof(*tensor.data()));
        },
        "", state);
    CHECK(bytes == 3 * 2 * ((16 + 2) * 4 + 32));
    CHECK(CausalTopKState<float, Cpu>::bytes(3, 2, 16) == bytes);
}

TEST_CASE("causal_top_k_next: errors") {
    const Cpu policy(1);
    const CausalTopK how{.rate = 0.25, .block_size = 16};
    CausalTopKState<float, Cpu> state(policy, how, 3, 2, 100);
    const auto logits = normal<float>(policy, std::array<Index, 3>{2, 2, 5}, 0);
    CHECK_THROWS_WITH_AS(causal_top_k_next(policy, how, state, logits, {}, 100),
                         "colt5: `state.history` must have shape (2, 2, 16), but has (3, 2, 16)", ShapeError);
    CHECK_THROWS_WITH_AS((CausalTopKState<float, Cpu>(policy, how, 3, 2, 0)),
                         "colt5: `num_tokens` must be >= 1, but is 0", ValueError);
    const auto fitting = normal<float>(policy, std::array<Index, 3>{3, 2, 5}, 0);
    CHECK_THROWS_WITH_AS(causal_top_k_next(policy, how, state, fitting, {}, 1),
                         "colt5: `num_tokens` must be that of the state, 100, but is 1", ValueError);
    CHECK_THROWS_WITH_AS(causal_top_k_next(policy, {.rate = 0.5, .block_size = 16}, state, fitting, {}, 100),
                         "colt5: `how` must be that of the state, but is another", ValueError);
}
