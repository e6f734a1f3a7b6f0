// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <string>
#include <type_traits>
#include <utility>

#include <colt5/module/conditional_routed_attention.hpp>
#include <colt5/op/windows.hpp>

namespace colt5 {

/// Conditional attention over feature maps of any height and width. Tokens attend lightly within their own window of
/// light_window_size × light_window_size tokens; the routed queries of a map attend to its routed keys and values:
///
///     out_yx = light(window of x_yx)_yx + score_q,yx · heavy(x_q, x_kv, score_kv)_yx [(y, x) chosen as a query]
///
/// With RoutingScope::window each window is a sequence of its own: num_heavy_tokens_q of its tokens attend to
/// num_heavy_tokens_kv of them, as in colt5-attention 0.11.
///
/// At the right and at the bottom maps are padded to whole windows. Padding and masked tokens are never attended to and
/// get no heavy output. Where fewer tokens are real than are asked for, masked ones are chosen, too, with score 0. With
/// route_block_size padding counts in the shares of the blocks. `attention` does the work, on sequences of windows: see
/// WindowGrid. What routers chose are tokens of these sequences; Activations::position says where they are.
template <ImageAttentionConfig config, typename Scalar, Policy P,
          template <RouterConfig, typename, typename> class RouterTemplate = ConfiguredRouter>
class ConditionalRoutedImageAttention
    : public ModuleBase<ConditionalRoutedImageAttention<config, Scalar, P, RouterTemplate>, P> {
    using Base = ModuleBase<ConditionalRoutedImageAttention, P>;
    friend Base;
    static_assert(config.light_window_size >= 2 && config.light_window_size <= 1 << 15,
                  "colt5: ImageAttentionConfig.light_window_size must be at least 2 and at most 2^15");

public:
    using Maps = std::conditional_t<config.channel_first, View<const Scalar, dynamic, config.dim, dynamic, dynamic>,
                                    View<const Scalar, dynamic, dynamic, dynamic, config.dim>>;
    using Out = MapTensor<Scalar, P>;
    using Attention =
        ConditionalRoutedAttention<AttentionConfig{
                                       .dim = config.dim,
                                       .num_heavy_tokens_q = config.num_heavy_tokens_q,
                                       .num_heavy_tokens_kv = config.num_heavy_tokens_kv,
                                       .num_routed_kv = config.num_routed_kv,
                                       .num_routed_q = config.num_routed_q,
                                       .light_dim_head = config.light_dim_head,
                                       .light_heads = config.light_heads,
                                       .light_window_size = config.light_window_size* config.light_window_size,
                                       .heavy_dim_head = config.heavy_dim_head,
                                       .heavy_heads = config.heavy_heads,
                                       .router_straight_through = config.router_straight_through,
                                       .router_type = config.router_type,
                                       .router_kwargs = config.router_kwargs,
                                       .use_null_kv = config.use_null_kv,
                                       .use_null_q_tokens = config.use_null_q_tokens,
                                       .masked_tokens_get_null_q = config.masked_tokens_get_null_q,
                                       .multiply_keys_by_score = config.multiply_keys_by_score,
                                       .multiply_queries_by_score = config.multiply_queries_by_score,
                                       .light_in_windows = true},
                                   Scalar, P, RouterTemplate>;

    Attention attention;

    struct Gradients {
        using Module = ConditionalRoutedImageAttention;
        typename Attention::Gradients attention;
    };

    /// What backward reads.
    struct Activations {
        Out out;  // as the maps
        WindowGrid grid;
        TokensTensor<Scalar, P> tokens;          // (b, grid.tokens(), d)
        Tensor<bool, P, dynamic, dynamic> mask;  // (b, grid.tokens()), if there is a mask or padding
        typename Attention::Activations attention;

        /// Calls f(prefix + the router's name, Routing) for each router. Rows are maps, or windows if they are routed.
        template <typename F>
        void each_routing(F&& f, const std::string& prefix = "") const {
            attention.each_routing(f, prefix);
        }
        /// Calls f(prefix + the router's name, RouterView) for each router.
        template <typename F>
        void each_router(F&& f, const std::string& prefix = "") const {
            attention.each_router(f, prefix);
        }
        /// The place in its map of the token that has `index` in `row` of a routing.
        MapPosition position(Index row, Index index) const {
            if (config.routing_scope == RoutingScope::window) index += row % grid.windows() * grid.side * grid.side;
            return grid.position(index);
        }
    };

    /// What is routed, of a view of tokens (b, n, …) of windows: maps as they are, or single windows.
    template <typename V>
    static V sequences(const V& tokens, const WindowGrid& grid) {
        if (config.routing_scope == RoutingScope::map || !tokens) return tokens;
        auto shape = tokens.shape();
        shape[0] *= grid.windows();
        shape[1] = grid.side * grid.side;
        return V::unchecked(tokens.data(), shape);
    }
    explicit ConditionalRoutedImageAttention(const P& policy, Seeds seeds = {})
        : Base(policy), attention(policy, seeds) {}

    /// maps (b, h, w, d), or (b, d, h, w) if channel_first; mask (b, h, w) or absent  →  as the maps, plus the maps if
    /// `residual` says so. Saves nothing. `out` may hold the tensor to return, which is then written to.
    template <Viewable X>
    Out operator()(const X& maps, Argument<MapMask, P> mask = {}, AttentionCounts counts = {},
                   Residual residual = Residual::none, Out out = {}) const {
        return compute<false>(maps, mask, counts, residual, std::move(out));
    }

    /// The same, with what backward reads.
    template <Viewable X>
    Activations forward(const X& maps, Argument<MapMask, P> mask = {}, AttentionCounts counts = {},
                        Residual residual = Residual::none, Out out = {}) const {
        return compute<true>(maps, mask, counts, residual, std::move(out));
    }

    /// Throws ShapeError, which names the parameter, when one does not fit the configuration.
    void expect_parameters() const { attention.expect_parameters(); }

    template <typename F, typename... M>
    static void each_parameter(F&& f, const std::string& prefix, M&... m) {
        Attention::each_parameter(f, prefix, m.attention...);
    }

private:
    /// Maps of the tokens that `attention` has computed.
    static Out maps_of(const P& policy, const TokensTensor<Scalar, P>& tokens, Index batch, const WindowGrid& grid,
                       Out maps) {
        const auto of_maps = tokens.const_view().reshape(std::array{batch, grid.tokens(), config.dim});
        return from_windows(policy, of_maps, grid, config.channel_first, std::move(maps));
    }

    /// Returns the output or, with `save`, the Activations.
    template <bool save, typename X>
    auto compute(const X& given, MapMask mask, const AttentionCounts& counts, Residual residual, Out into) const {
        const auto maps = expect<Maps, P>("maps", given);
        if (into) expect_shape("out", into.shape(), maps.shape());
        expect_value(mask || mask.size() == 0, "mask", "a view of data", "null");
        const WindowGrid grid = window_grid("maps", maps, config.light_window_size, config.channel_first);
        const Index batch = maps.extent(0);
        if (mask) expect_shape("mask", mask.shape(), {batch, grid.height, grid.width});
        detail::token_count("num_heavy_tokens_q", counts.num_heavy_tokens_q, config.num_heavy_tokens_q);
        detail::token_count("num_heavy_tokens_kv", counts.num_heavy_tokens_kv, config.num_heavy_tokens_kv);
        expect_parameters();
        const P& policy = this->policy();
        auto tokens = to_windows(policy, maps, grid, config.channel_first);  // (b, n, d)
        auto real = window_mask(policy, mask, batch, grid);                  // (b, n)
        const auto x = sequences(tokens.const_view(), grid);
        const Mask real_of_x = sequences(Mask(real.const_view()), grid);
        if constexpr (save) {
            auto saved = attention.forward(x, real_of_x, counts, residual);
            auto out = maps_of(policy, saved.out, batch, grid, std::move(into));
            saved.out = {};
            return Activations{std::move(out), grid, std::move(tokens), std::move(real), std::move(saved)};
        } else {
            return maps_of(policy, attention(x, real_of_x, counts, residual), batch, grid, std::move(into));
        }
    }

    template <Viewable D>
    void expect_backward(const Activations& saved, const D& d_out, const Gradients& gradients,
                         const Out& into = {}) const {
        attention.expect_saved(saved.attention);
        expect_parameters();
        if (!attention.fits(gradients.attention))
            expect_like<ConditionalRoutedImageAttention>("gradients", *this, gradients);
        expect<Maps, P>("d_out", d_out);
        const auto shape = detail::map_shape(saved.tokens.extent(0), saved.grid, config.dim, config.channel_first);
        expect_shape("d_out", d_out.shape(), shape);
        if (into) expect_shape("d_maps", into.shape(), shape);
    }

    /// Returns d_maps.
    template <typename SomeActivations, Viewable D>
    Out compute_gradients(SomeActivations& saved, const D& d_out, Gradients& gradients, Out given = {}) const {
        const P& policy = this->policy();
        detail::release(saved.out);
        const auto d = to_windows(policy, d_out, saved.grid, config.channel_first);  // (b, n, d)
        const auto d_tokens = attention.backward(detail::forward_part(saved.attention),
                                                 sequences(d.const_view(), saved.grid), gradients.attention);
        return maps_of(policy, d_tokens, saved.tokens.extent(0), saved.grid, std::move(given));
    }
};

}  // namespace colt5
