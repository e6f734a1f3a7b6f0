// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <concepts>
#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

#include <colt5/core/tensor.hpp>
#include <colt5/op/causal_top_k.hpp>
#include <colt5/op/zero.hpp>

namespace colt5 {

template <typename P>
void causal_top_k_next_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `causal_top_k_next` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}

/// What causal_top_k knows of the tokens so far of a row, besides their last logits.
struct CausalProgress {
    std::int64_t length;  ///< tokens so far
    std::int64_t budget;  ///< in units of 2⁻³² tokens; above `burst` only until the next block begins
    std::int64_t picks;   ///< how many tokens may still be chosen
    std::int64_t left;    ///< how many of them in the current block

    static constexpr Index size = 4;  // members

    COLT5_HOST_DEVICE static CausalProgress load(const std::int64_t* from) {
        return {from[0], from[1], from[2], from[3]};
    }
    COLT5_HOST_DEVICE void store(std::int64_t* to) const {
        to[0] = length;
        to[1] = budget;
        to[2] = picks;
        to[3] = left;
    }

    /// Whether the next token is the first of a block of CausalBlocks.
    COLT5_HOST_DEVICE bool begins_block(Index block_size) const {
        return length < block_size ? (length & (length - 1)) == 0 : length % block_size == 0;
    }
    /// How many tokens the current block still has.
    COLT5_HOST_DEVICE Index rest_of_block(Index block_size) const {
        if (length >= block_size) return block_size - length % block_size;
        Index end = 1;
        while (end <= length) end *= 2;
        return end - length;
    }
    /// Limits the budget to `burst`, and sets how many tokens of the block may be chosen.
    COLT5_HOST_DEVICE void begin_block(const CausalTopK& how) {
        if (budget > how.burst_in_units()) budget = how.burst_in_units();
        left = budget / CausalTopK::one < picks ? budget / CausalTopK::one : picks;
    }
    /// Adds `tokens` tokens of the current block, of which `taken` are chosen.
    COLT5_HOST_DEVICE void advance(const CausalTopK& how, Index tokens, Index taken) {
        length += tokens;
        budget += tokens * how.rate_in_units() - taken * CausalTopK::one;
        picks -= taken;
        left -= taken;
    }
};

/// What causal_top_k_next keeps of each row between calls. It takes bytes(b, r, block_size) for sequences of any
/// length.
template <typename T, Policy P>
struct CausalTopKState {
    Tensor<T, P, dynamic, dynamic, dynamic> history;              // (b, r, block_size): the logit of token i is at
                                                                  // i mod block_size
    Tensor<T, P, dynamic, dynamic, dynamic> block;                // (b, r, 2), of the current block: the threshold of
                                                                  // candidates, and the price −τ of scores (see
                                                                  // causal_top_k)
    Tensor<std::int64_t, P, dynamic, dynamic, dynamic> progress;  // (b, r, 4): CausalProgress
    CausalTopK how{};                                             // what it was made for
    Index num_tokens = 0;
    std::array<std::uint64_t, 6> settings{};  // the same as numbers for files; see each_tensor

    CausalTopKState() = default;
    /// For empty sequences, in each of which at most most_tokens tokens will be chosen.
    CausalTopKState(const P& policy, const CausalTopK& top_k, Index batch, Index routes, Index most_tokens)
        : history(zeros(policy, {batch, routes, top_k.block_size})),
          block(zeros(policy, {batch, routes, 2})),
          how(top_k),
          num_tokens(most_tokens) {
        expect_value(num_tokens >= 1, "num_tokens", ">= 1", num_tokens);
        expect_value(how.is_valid(), "how", "within the limits of CausalTopK", "something else");
        const auto in_units = [](double x) {
            return static_cast<std::uint64_t>(x * static_cast<double>(CausalTopK::one));
        };
        settings = {static_cast<std::uint64_t>(num_tokens),
                    static_cast<std::uint64_t>(how.rate_in_units()),
                    static_cast<std::uint64_t>(how.burst_in_units()),
                    in_units(how.fetch_k_ratio),
                    in_units(how.eps),
                    how.straight_through ? 1u : 0u};
        std::vector<std::int64_t> numbers(static_cast<std::size_t>(batch * routes * CausalProgress::size));
        for (Index row = 0; row < batch * routes; ++row)
            CausalProgress{0, how.burst_in_units(), num_tokens, 0}.store(numbers.data() + row * CausalProgress::size);
        progress = from_host<decltype(progress)>(policy, {batch, routes, CausalProgress::size}, numbers);
    }

    /// b · r · ((block_size + 2) · sizeof(T) + 32)
    static constexpr Index bytes(Index batch, Index routes, Index block_size) {
        return batch * routes *
               ((block_size + 2) * static_cast<Index>(sizeof(T)) +
                CausalProgress::size * static_cast<Index>(sizeof(std::int64_t)));
    }

    /// Visitors with a function `state` get the settings, too; rate, burst, fetch_k_ratio and eps in units of 2⁻³².
    template <typename F, typename... States>
    static void each_tensor(F&& f, const std::string& prefix, States&... states) {
        f(prefix + "history", states.history...);
        f(prefix + "block", states.block...);
        f(prefix + "progress", states.progress...);
        if constexpr (requires { f.state(prefix, states.settings[0]...); }) {
            constexpr std::array names{"num_tokens", "rate", "burst", "fetch_k_ratio", "eps", "straight_through"};
            for (std::size_t i = 0; i < names.size(); ++i) f.state(prefix + names[i], states.settings[i]...);
        }
    }

private:
    static auto zeros(const P& policy, const std::array<Index, 3>& shape) {
        Tensor<T, P, dynamic, dynamic, dynamic> tensor(policy, shape);
        set_zero(policy, tensor);
        return tensor;
    }
};

/// Token number `unused`, from 0, of those that are not among the `count` sorted tokens of `chosen`. Picks that are
/// not live have these indices.
COLT5_HOST_DEVICE inline TokenIndex unchosen_token(const TokenIndex* chosen, Index count, Index unused) {
    auto token = static_cast<TokenIndex>(unused);
    for (Index i = 0; i < count && chosen[i] <= token; ++i) ++token;
    return token;
}

/// The picks of a chunk of tokens: as CausalPicks, with `indices` in the chunk and `positions` in the sequence. Picks
/// that are not live are other tokens of the chunk, with score 0.
template <typename T, Policy P>
struct NextCausalPicks {
    Tensor<TokenIndex, P, dynamic, dynamic, dynamic> indices;    // (b, r, k)
    Tensor<TokenIndex, P, dynamic, dynamic, dynamic> positions;  // (b, r, k)
    Tensor<T, P, dynamic, dynamic, dynamic> scores;              // (b, r, k)
    Tensor<bool, P, dynamic, dynamic, dynamic> live;             // (b, r, k)
};

/// causal_top_k for the next m tokens of sequences whose earlier tokens `state` knows: chunk by chunk, it chooses the
/// tokens that causal_top_k chooses in the whole sequence, with the same scores, bit for bit.
///
///     logits (b, r, m), mask (b, m) or absent  →  k picks a row, chosen tokens first, in the order of the sequence
///
/// The mask is true for the first tokens of a row and false for the rest, which do not belong to the sequence: so
/// sequences may go on by different numbers of tokens. On the CPU, k is the largest number of tokens that a row
/// chooses; on a GPU, the most that a row can choose of m tokens.
///
/// Throws ShapeError if the state was made for other rows or another block_size, ValueError if it was made for another
/// num_tokens or other settings.
template <Policy P, typename T, Viewable L>
NextCausalPicks<T, P> causal_top_k_next(const P& policy, const CausalTopK& how, CausalTopKState<T, P>& state,
                                        const L& logits, Mask mask, Index num_tokens) {
    static_assert(std::same_as<std::remove_const_t<typename L::value_type>, T>,
                  "colt5: `logits` must have the scalar type of `state`");
    const auto [batch, routes, length] = logits.shape();
    if (mask) expect_shape("mask", mask.shape(), {batch, length});
    expect_value(num_tokens >= 1, "num_tokens", ">= 1", num_tokens);
    expect_length("logits", length);
    expect_shape("state.history", state.history.shape(), {batch, routes, how.block_size});
    expect_shape("state.block", state.block.shape(), {batch, routes, 2});
    expect_shape("state.progress", state.progress.shape(), {batch, routes, CausalProgress::size});
    if (num_tokens != state.num_tokens)
        expect_value(false, "num_tokens", detail::concat({"that of the state, ", std::to_string(state.num_tokens)}),
                     num_tokens);
    expect_value(how == state.how, "how", "that of the state", "another");
    constexpr Index most = std::numeric_limits<TokenIndex>::max();  // the longest sequence
    const std::array<Index, 3> picks{
        batch, routes, std::min({length, num_tokens, how.capacity(std::min(length + how.block_size, most))})};
    NextCausalPicks<T, P> next{{policy, picks}, {policy, picks}, {policy, picks}, {policy, picks}};
    causal_top_k_next_kernel(policy, how, &next, state.history.view(), state.block.view(), state.progress.view(),
                             logits.const_view(), mask);
    return next;
}

}  // namespace colt5
