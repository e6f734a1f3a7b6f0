// SPDX-License-Identifier: MIT
#pragma once

#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include <colt5/colt5.hpp>

#include "support/tensors.hpp"

/// What is tested of every module that decodes.
namespace support {

using colt5::Mask, colt5::TokensTensor;

/// Tokens [first, first + count) of each sequence, of sequences that have them.
template <typename T>
TokensTensor<T, Cpu> tokens_of(const Cpu& policy, const TokensTensor<T, Cpu>& x, const std::vector<Index>& first,
                               const std::vector<Index>& count, Index width) {
    TokensTensor<T, Cpu> part(policy, {x.extent(0), width, x.extent(2)});
    colt5::fill(policy, part, NAN);  // what padding holds counts for nothing
    for (Index b = 0; b < x.extent(0); ++b) {
        const auto at = static_cast<std::size_t>(b);
        std::copy_n(x.const_view()[b].data() + first[at] * x.extent(2), count[at] * x.extent(2), part.view()[b].data());
    }
    return part;
}

/// Decodes sequences of these lengths and returns the outputs, zeros behind them. chunk(step, b) are the tokens of a
/// call.
template <typename M, typename Chunk>
auto decoded(const M& module, typename M::DecodeCache& cache, const typename M::Out& x,
             const std::vector<Index>& lengths, const Chunk& chunk) {
    const Cpu& policy = module.policy();
    auto out = filled<typename M::Out::value_type>(policy, x.shape(), 0);
    for (int step = 0; cache.lengths() != lengths; ++step) {
        const std::vector<Index> past = cache.lengths();
        std::vector<Index> counts(past.size());
        for (std::size_t b = 0; b < past.size(); ++b)
            counts[b] = std::min(chunk(step, static_cast<Index>(b)), lengths[b] - past[b]);
        const Index width = *std::max_element(counts.begin(), counts.end());
        const bool ragged = std::any_of(counts.begin(), counts.end(), [&](Index count) { return count != width; });
        const auto tokens = tokens_of(policy, x, past, counts, width + (ragged ? step % 2 : 0));
        const auto y = ragged ? module.decode(cache, tokens, counts) : module.decode(cache, tokens);
        for (std::size_t b = 0; b < past.size(); ++b)
            std::copy_n(y.const_view()[static_cast<Index>(b)].data(), counts[b] * x.extent(2),
                        out.view()[static_cast<Index>(b)].data() + past[b] * x.extent(2));
    }
    return out;
}

/// The same outputs from the module itself: each sequence alone.
template <typename M>
auto computed_whole(const M& module, const typename M::Out& x, const std::vector<Index>& lengths) {
    const Cpu& policy = module.policy();
    auto out = filled<typename M::Out::value_type>(policy, x.shape(), 0);
    for (Index b = 0; b < x.extent(0); ++b) {
        const Index length = lengths[static_cast<std::size_t>(b)];
        typename M::Out alone(policy, {1, length, x.extent(2)});
        std::copy_n(x.const_view()[b].data(), alone.size(), alone.data());
        const auto y = module(alone);
        std::copy_n(y.data(), y.size(), out.view()[b].data());
    }
    return out;
}

/// The same bits, or with a BLAS, whose bits depend on the number of rows, the same numbers up to rounding.
template <colt5::Viewable A, colt5::Viewable B>
bool same_outputs(const A& a, const B& b) {
    return colt5::cpu::uses_blas ? relative_error(a, b) <= 1e-5 : same_bits(a, b);
}

/// decode against the module, for chunks of several sizes, sequences of different lengths, and a batch against each
/// sequence alone; the bytes of a cache; errors.
template <typename M>
void check_decode(Index length) {
    const Cpu policy(2, Cpu::usual_plan, colt5::Allocations::together);
    const M module(policy, colt5::Seed{3});
    const auto x = normal<typename M::Out::value_type>(policy, std::array<Index, 3>{3, length, M::model_dim}, 5);
    const std::vector<Index> lengths{length, length / 3, length - 7};
    const auto expected = computed_whole(module, x, lengths);
    for (const Index size : {1, 3, 16, 100, 0, -1}) {
        CAPTURE(size);
        if (size == 1 && length > 500) continue;
        auto cache = module.make_cache(3, length);
        const auto chunk = [&](int step, Index b) {
            if (size > 0) return size;
            // mixed: all sequences alike, or each as it likes
            return size == 0 ? Index{1} + step * step % 29 : Index{(step + 7 * b) * step % 31};
        };
        CHECK(same_outputs(decoded(module, cache, x, lengths, chunk), expected));
    }
    {  // a prompt and its continuation, token by token, on a policy with other chunks and another number of threads
        const Cpu other(1, {64, true});
        const M same(other, colt5::Seed{3});
        CHECK(same_outputs(computed_whole(same, x, lengths), expected));
        auto cache = same.make_cache(3, length);
        const auto chunk = [&](int step, Index) { return step == 0 ? length * 2 / 3 : Index{1 + step % 2}; };
        CHECK(same_outputs(decoded(same, cache, x, lengths, chunk), expected));
    }
    // bytes
    const auto before = policy.workspace()->statistics().in_use;
    auto cache = module.make_cache(3, length);
    std::size_t allocated = 0;
    M::DecodeState::each_tensor(
        [&](const std::string&, const auto& tensor) {
            const auto bytes = static_cast<std::size_t>(tensor.size()) * sizeof(*tensor.data());
            allocated += std::max(std::size_t{256}, colt5::round_up(bytes, std::size_t{256}));
        },
        "", cache.state);
    CHECK(policy.workspace()->statistics().in_use - before == allocated);
    CHECK(cache.bytes() == M::cache_bytes(3, length));
    // errors change nothing
    const std::vector<Index> some{5, 0, 2};
    const auto first = tokens_of(policy, x, {0, 0, 0}, some, 5);
    auto other = module.make_cache(3, length);
    const auto y = module.decode(cache, first, some);
    CHECK(same_bits(module.decode(other, first, some), y));
    const auto bad = [&](const std::string& message, const auto& tokens, const std::vector<Index>& counts) {
        CHECK_THROWS_WITH_AS(module.decode(cache, tokens, counts), message.c_str(), colt5::ValueError);
    };
    const auto all = filled<typename M::Out::value_type>(policy, x.shape(), 0);
    bad("colt5: `length of sequence[2]` must be at most " + std::to_string(length) +
            ", for which the cache was made, but is " + std::to_string(length + 2),
        all, {length - 5, length, length});
    bad("colt5: `lengths` must be one number a sequence, 3, but is 2", all, {1, 1});
    bad("colt5: `lengths[1]` must be between 0 and the 5 tokens that are given, but is 6", first, {5, 6, 1});
    CHECK_THROWS_AS(module.decode(cache, sequence(x, 0)), colt5::ShapeError);
    CHECK(cache.lengths() == some);
    CHECK(same_bits(module.decode(cache, first, some), module.decode(other, first, some)));
    CHECK_THROWS_WITH_AS(module.make_cache(0, 1), "colt5: `batch` must be >= 1, but is 0", colt5::ValueError);
    CHECK_THROWS_WITH_AS(module.make_cache(1, 0), "colt5: `max_length` must be >= 1, but is 0", colt5::ValueError);
}

}  // namespace support
