// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <string>
#include <string_view>
#include <utility>

#include <colt5/expr/expr.hpp>
#include <colt5/op/route_blocks.hpp>
#include <colt5/op/swap_first_axes.hpp>
#include <colt5/op/zero.hpp>
#include <colt5/router/router.hpp>

namespace colt5 {

/// Routes in blocks of the sequence, each by `Inner`, a router in its own right: every block of block_size tokens gives
/// its share of the tokens that are asked for, so that no part of a sequence is left out (route_block_size of
/// colt5-attention 0.11). A last block may be shorter; together the blocks give exactly as many tokens as are asked
/// for, see RouteBlocks. Scores of a shorter last block are those of the k of a whole block, of which its share is
/// chosen.
///
/// Where the length is no multiple of block_size, the tokens are copied with padding behind them. With a mask, a
/// block's share is by the tokens up to the last real one of its sample, and at most so many are chosen: padding behind
/// them changes nothing. This holds for routers whose `route` and `forward` have a last parameter `picks`, a number of
/// tokens for each sample, as those of the library do. For others, and for those that say that padding counts, shares
/// are by the padded length.
///
/// Routing tokens that a call gives to each sample (b, r, d) are those of all its blocks.
template <typename Inner, Index block_size, typename Scalar, typename P>
class BlockRouter {
    static_assert(block_size >= 1, "colt5: route_block_size must be at least 1");
    static_assert(!has_unused_picks<Inner>, "colt5: a causal router has blocks of its own: route_block_size must be 0");
    using Logit = accumulate_t<Scalar>;

public:
    static constexpr bool picks_repeat = Inner::picks_repeat;
    using Gradients = typename Inner::Gradients;

    Inner inner;

    BlockRouter(const P& policy, SeedSequence& seeds) : inner(policy, seeds) {}

    struct Activations {
        Routing<Logit, P> routing;
        RouterActivations<Inner, Scalar, P> inner;
        TokensTensor<Logit, P> logits;  // (b, r, n), if `inner` has logits
        BlockShares<P> shares;          // with a mask
    };

    Routing<Logit, P> route(const P& policy, TokensView<const Scalar> x, Mask mask, Index num_tokens,
                            TokensView<const Scalar> routing_tokens = {}) const {
        const RouteBlocks blocks = blocks_of(x, mask, num_tokens);
        const BlockShares<P> shares = shares_of(policy, blocks, mask);
        const Blocked in(policy, x, mask, blocks);
        const auto of_blocks = for_each_block(policy, blocks, x, routing_tokens);
        if constexpr (takes_shares)
            return merged(policy, blocks, shares, x,
                          inner.route(policy, in.x, in.mask, blocks.picks_of_block(), of_blocks.const_view(),
                                      shares.picks.const_view()));
        else if constexpr (takes_tokens)
            return merged(policy, blocks, shares, x,
                          inner.route(policy, in.x, in.mask, blocks.picks_of_block(), of_blocks.const_view()));
        else
            return merged(policy, blocks, shares, x, inner.route(policy, in.x, in.mask, blocks.picks_of_block()));
    }

    Activations forward(const P& policy, TokensView<const Scalar> x, Mask mask, Index num_tokens,
                        TokensView<const Scalar> routing_tokens = {}) const {
        const RouteBlocks blocks = blocks_of(x, mask, num_tokens);
        BlockShares<P> shares = shares_of(policy, blocks, mask);
        const Blocked in(policy, x, mask, blocks);
        const auto of_blocks = for_each_block(policy, blocks, x, routing_tokens);
        auto saved = [&] {
            if constexpr (takes_shares)
                return inner.forward(policy, in.x, in.mask, blocks.picks_of_block(), of_blocks.const_view(),
                                     shares.picks.const_view());
            else if constexpr (takes_tokens)
                return inner.forward(policy, in.x, in.mask, blocks.picks_of_block(), of_blocks.const_view());
            else
                return inner.forward(policy, in.x, in.mask, blocks.picks_of_block());
        }();
        auto routing = merged(policy, blocks, shares, x, saved.routing);
        TokensTensor<Logit, P> logits;
        if constexpr (requires { saved.logits.const_view(); })
            logits = merge_block_rows(policy, blocks, x.extent(0), saved.logits);
        return {std::move(routing), std::move(saved), std::move(logits), std::move(shares)};
    }

    void backward(const P& policy, const Activations& saved, TokensView<const Logit> d_scores,
                  TokensView<const Scalar> x, Mask mask, TokensView<Scalar> d_x, Gradients& gradients,
                  TokensView<const Scalar> routing_tokens = {}, TokensView<Logit> d_routing_tokens = {}) const {
        expect_shape("d_x", d_x.shape(), x.shape());
        const RouteBlocks blocks = blocks_of(x, mask, d_scores.extent(2));
        const Blocked in(policy, x, mask, blocks);
        const auto d_block_scores = split_blocks(policy, blocks, d_scores, saved.shares.lengths.const_view());
        const auto to = [&](TokensView<Scalar> d_blocks) {
            if constexpr (takes_tokens)
                if (routing_tokens) {
                    expect_shape("d_routing_tokens", d_routing_tokens.shape(), routing_tokens.shape());
                    const auto of_blocks = for_each_block(policy, blocks, x, routing_tokens);
                    TokensTensor<Logit, P> d_of_blocks(policy, of_blocks.shape());
                    set_zero(policy, d_of_blocks);
                    inner.backward(policy, saved.inner, d_block_scores.const_view(), in.x, in.mask, d_blocks, gradients,
                                   of_blocks.const_view(), d_of_blocks.view());
                    return add_sums_of_blocks(policy, blocks, d_routing_tokens, d_of_blocks);
                }
            inner.backward(policy, saved.inner, d_block_scores.const_view(), in.x, in.mask, d_blocks, gradients);
        };
        if (!in.padded) return to(d_x.reshape(in.x.shape()));
        TokensTensor<Scalar, P> d_padded(policy, in.padded.shape());
        set_zero(policy, d_padded);
        to(d_padded.view().reshape(in.x.shape()));
        for (Index b = 0; b < x.extent(0); ++b)
            assign(policy, d_x[b], d_x[b] + d_padded.const_view()[b].range(0, blocks.length));
    }

    void expect_parameters(std::string_view prefix = "") const requires requires(const Inner& router) {
        router.expect_parameters("");
    }
    { inner.expect_parameters(prefix); }

    template <typename F, typename... R>
    static void each_parameter(F&& f, const std::string& prefix, R&... routers) {
        Inner::each_parameter(f, prefix, inner_of(routers)...);
    }

private:
    static constexpr bool padding_counts = [] {
        if constexpr (requires { Inner::padding_counts; })
            return Inner::padding_counts;
        else
            return false;
    }();
    /// From outside.
    static constexpr bool takes_tokens =
        requires(const Inner& router, const P& policy, TokensView<const Scalar> x, Mask mask) {
        router.route(policy, x, mask, Index{1}, x);
    };
    static constexpr bool takes_shares =
        !padding_counts && requires(const Inner& router, const P& policy, TokensView<const Scalar> x, Mask mask,
                                    VectorView<const TokenIndex> picks) {
        router.route(policy, x, mask, Index{1}, x, picks);
    };

    static RouteBlocks blocks_of(TokensView<const Scalar> x, Mask mask, Index num_tokens) {
        const Index length = x.extent(1);
        return {length, std::clamp(length, Index{1}, block_size), std::min(num_tokens, length),
                takes_shares && static_cast<bool>(mask)};
    }

    /// Tokens (b · blocks, block_size, d) and their mask, which is absent where all are real.
    struct Blocked {
        TokensTensor<Scalar, P> padded;                          // (b, blocks · size, d), where it differs from x
        Tensor<bool, P, dynamic, dynamic, dynamic> padded_mask;  // (b, blocks · size, 1)
        TokensView<const Scalar> x;
        Mask mask;

        Blocked(const P& policy, TokensView<const Scalar> tokens, Mask real, const RouteBlocks& blocks)
            : x(tokens), mask(real) {
            const Index batch = tokens.extent(0), length = blocks.count() * blocks.size, d = tokens.extent(2);
            const std::array<Index, 2> rows{batch * blocks.count(), blocks.size};
            if (length != blocks.length) {
                padded = {policy, {batch, length, d}};
                padded_mask = {policy, {batch, length, 1}};
                pad_sequences(policy, padded.view(), tokens, blocks.length);
                const auto real_column =
                    real ? real.reshape(std::array<Index, 3>{batch, blocks.length, 1}) : TokensView<const bool>();
                pad_sequences(policy, padded_mask.view(), real_column, blocks.length);
                x = padded.const_view();
                mask = padded_mask.const_view().reshape(rows);
            } else if (real) {
                mask = real.reshape(rows);
            }
            x = x.reshape(std::array<Index, 3>{rows[0], rows[1], d});
        }
    };

    /// Routing tokens (b, r, d) as those of each block, (b · blocks, r, d).
    static TokensTensor<Scalar, P> for_each_block(const P& policy, const RouteBlocks& blocks,
                                                  TokensView<const Scalar> x, TokensView<const Scalar> tokens) {
        if (!tokens) return {};
        expect_value(takes_tokens, "routing_tokens", "absent: the router of the blocks takes none", "given");
        expect_shape("routing_tokens", tokens.shape(), {x.extent(0), dynamic, x.extent(2)});
        const Index batch = tokens.extent(0), count = blocks.count(), size = tokens.extent(1) * tokens.extent(2);
        TokensTensor<Scalar, P> repeated(policy, {batch * count, tokens.extent(1), tokens.extent(2)});
        for (Index b = 0; b < batch; ++b) {
            auto of_sample = repeated.view().range(b * count, count).reshape(std::array{count, size});
            assign(policy, of_sample, row(tokens[b].reshape(std::array{size})));
        }
        return repeated;
    }
    /// Its vector-Jacobian product, added to d_tokens (b, r, d).
    static void add_sums_of_blocks(const P& policy, const RouteBlocks& blocks, TokensView<Logit> d_tokens,
                                   const TokensTensor<Logit, P>& d_of_blocks) {
        const Index batch = d_tokens.extent(0), size = d_tokens.extent(1) * d_tokens.extent(2), count = blocks.count();
        const auto by_number =
            swap_middle_axes(policy, d_of_blocks.const_view().reshape(std::array{batch, count, size, Index{1}}));
        TokensTensor<Logit, P> sums(policy, d_tokens.shape());
        assign(policy, sums.view().reshape(std::array{batch * size, Index{1}}),
               row_sum(by_number.const_view().reshape(std::array{batch * size, count})));
        assign(policy, d_tokens, d_tokens + sums);
    }
    static BlockShares<P> shares_of(const P& policy, const RouteBlocks& blocks, Mask mask) {
        return blocks.by_real_tokens ? block_shares(policy, blocks, mask) : BlockShares<P>();
    }
    static Routing<Logit, P> merged(const P& policy, const RouteBlocks& blocks, const BlockShares<P>& shares,
                                    TokensView<const Scalar> x, const Routing<Logit, P>& routing) {
        auto [indices, scores] =
            merge_blocks(policy, blocks, x.extent(0), routing.indices, routing.scores, shares.lengths.const_view());
        return {std::move(indices), std::move(scores)};
    }
    template <typename R>
    static auto& inner_of(R& router) {
        if constexpr (requires { router.inner; })
            return router.inner;
        else
            return router;
    }
};

/// The router that routes each block, of a BlockRouter; of others, the router itself.
template <typename R>
const R& router_of_blocks(const R& router) {
    return router;
}
template <typename Inner, Index block_size, typename Scalar, typename P>
const Inner& router_of_blocks(const BlockRouter<Inner, block_size, Scalar, P>& router) {
    return router.inner;
}

}  // namespace colt5
