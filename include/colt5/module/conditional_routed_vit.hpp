// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <cstddef>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <colt5/module/conditional_routed_feed_forward.hpp>
#include <colt5/module/conditional_routed_image_attention.hpp>
#include <colt5/op/map_tokens.hpp>
#include <colt5/op/norm_linear.hpp>

namespace colt5 {

/// Images as tokens, one for each patch of side × side pixels:  norm(projection(pixel_norm(pixels of the patch)))
///
///     images (b, channels, h, w)  →  (b, h / side · w / side, dim), patches row by row
template <typename Scalar, Policy P>
struct PatchEmbedding {
    LayerNorm<Scalar, P> pixel_norm;  // 1
    Linear<Scalar, P> projection;     // 2: side² · channels → dim
    LayerNorm<Scalar, P> norm;        // 3
    Index side;

    struct Gradients {
        LayerNorm<accumulate_t<Scalar>, P> pixel_norm;
        Linear<accumulate_t<Scalar>, P> projection;
        LayerNorm<accumulate_t<Scalar>, P> norm;
    };
    struct Activations {
        WindowGrid pixels;  // its windows are the patches
        TokensTensor<Scalar, P> patches, projected, out;
    };

    PatchEmbedding(const P& policy, SeedSequence& seeds, Index channels, Index side_, Index dim)
        : pixel_norm(policy, channels * side_ * side_),
          projection(policy, seeds, channels * side_ * side_, dim, true),
          norm(policy, dim),
          side(side_) {}

    template <Viewable X>
    Activations forward(const P& policy, const X& images) const {
        const WindowGrid pixels = window_grid("images", images, side, true);
        auto patches = to_windows(policy, images, pixels, true);  // (b, h · w, channels)
        auto projected = norm_linear(policy, pixels_of_patches(patches, pixels), pixel_norm.parameters(),
                                     projection.weight, projection.bias.const_view());  // (b, n, dim)
        auto out = norm(policy, projected);                                             // (b, n, dim)
        return {pixels, std::move(patches), std::move(projected), std::move(out)};
    }

    /// Returns d_images; adds the gradients of the parameters to `gradients`.
    template <Viewable D>
    MapTensor<Scalar, P> backward(const P& policy, const Activations& saved, const D& d_out,
                                  Gradients& gradients) const {
        auto d_projected = tensor_like(policy, saved.projected);
        norm.backward(policy, d_projected.view(), d_out, saved.projected, gradients.norm);
        auto d_patches = tensor_like(policy, saved.patches);
        const auto d_pixels = d_patches.view().reshape(pixels_of_patches(saved.patches, saved.pixels).shape());
        norm_linear_vjp(policy, d_pixels, d_projected, pixels_of_patches(saved.patches, saved.pixels),
                        pixel_norm.parameters(), projection.weight, gradients.pixel_norm.parameters(),
                        gradients.projection.weight.view(), gradients.projection.bias.view());
        return from_windows(policy, d_patches, saved.pixels, true);
    }

    template <typename F, typename... M>
    static void each_parameter(F&& f, const std::string& prefix, M&... m) {
        constexpr bool members = NamesMembers<F>;
        LayerNorm<Scalar, P>::each_parameter(f, name_for<F>(prefix, members ? "pixel_norm." : "1."), m.pixel_norm...);
        Linear<Scalar, P>::each_parameter(f, name_for<F>(prefix, members ? "projection." : "2."), m.projection...);
        LayerNorm<Scalar, P>::each_parameter(f, name_for<F>(prefix, members ? "norm." : "3."), m.norm...);
    }

private:
    /// (b, n, side² · channels)
    static auto pixels_of_patches(const TokensTensor<Scalar, P>& patches, const WindowGrid& pixels) {
        const Index batch = patches.extent(0), n = pixels.windows();
        return patches.const_view().reshape(std::array{batch, n, pixels.side * pixels.side * patches.extent(2)});
    }
};

/// Classes of maps:  projection(norm(mean over the tokens of a map))
template <typename Scalar, Policy P>
struct MapClassifier {
    LayerNorm<Scalar, P> norm;     // 1
    Linear<Scalar, P> projection;  // 2: dim → classes

    struct Gradients {
        LayerNorm<accumulate_t<Scalar>, P> norm;
        Linear<accumulate_t<Scalar>, P> projection;
    };
    struct Activations {
        MatrixTensor<Scalar, P> out;   // (b, classes)
        TokensTensor<Scalar, P> mean;  // (b, 1, dim)
    };

    MapClassifier(const P& policy, SeedSequence& seeds, Index dim, Index classes)
        : norm(policy, dim), projection(policy, seeds, dim, classes, true) {}

    /// Throws ShapeError when a parameter does not fit tokens of `dim` numbers. The message names the parameter, with
    /// `prefix` before its name.
    void expect_parameters(std::string_view prefix, Index dim) const {
        detail::expect_norm(prefix, norm, dim);
        expect_shape(prefix, "projection.weight", projection.weight.shape(), {projection.weight.extent(0), dim});
        expect_shape(prefix, "projection.bias", projection.bias.shape(), {projection.weight.extent(0)});
    }

    /// tokens (b, grid.tokens(), dim)
    template <Viewable X>
    Activations forward(const P& policy, const X& tokens, const WindowGrid& grid) const {
        auto mean = map_mean(policy, tokens, grid);  // (b, 1, dim)
        MatrixTensor<Scalar, P> out(policy, {mean.extent(0), projection.weight.extent(0)});
        norm_linear(policy, mean, norm.parameters(),
                    std::array{Projection<Scalar>{one_token(out.view()), projection.weight.const_view(),
                                                  projection.bias.const_view()}});
        return {std::move(out), std::move(mean)};
    }

    /// Returns d_tokens (b, grid.tokens(), dim); adds the gradients of the parameters to `gradients`.
    template <Viewable D>
    TokensTensor<Scalar, P> backward(const P& policy, const Activations& saved, const D& d_out, const WindowGrid& grid,
                                     Gradients& gradients) const {
        auto d_mean = tensor_like(policy, saved.mean);
        norm_linear_vjp(policy, d_mean.view(), one_token(d_out.const_view()), saved.mean, norm.parameters(),
                        projection.weight, gradients.norm.parameters(), gradients.projection.weight.view(),
                        gradients.projection.bias.view());
        return map_mean_vjp(policy, d_mean, grid);
    }

    template <typename F, typename... M>
    static void each_parameter(F&& f, const std::string& prefix, M&... m) {
        constexpr bool members = NamesMembers<F>;
        LayerNorm<Scalar, P>::each_parameter(f, name_for<F>(prefix, members ? "norm." : "1."), m.norm...);
        Linear<Scalar, P>::each_parameter(f, name_for<F>(prefix, members ? "projection." : "2."), m.projection...);
    }

private:
    /// (b, classes) → (b, 1, classes)
    template <typename T>
    static auto one_token(const MatrixView<T>& x) {
        return x.reshape(std::array{x.extent(0), Index{1}, x.extent(1)});
    }
};

/// An image classifier of conditionally routed layers:
///
///     x = PatchEmbedding(images) + the places of the patches;  of each layer  x = attention(x) + x;  x = ff(x) + x;
///     MapClassifier(x)
///
/// The attention is that of ConditionalRoutedImageAttention, the feedforward routes over the map. Tokens stay in the
/// order of the attention's windows (see WindowGrid) from the embedding to the classifier.
template <ViTConfig config, typename Scalar, Policy P,
          template <RouterConfig, typename, typename> class RouterTemplate = ConfiguredRouter>
class ConditionalRoutedViT : public ModuleBase<ConditionalRoutedViT<config, Scalar, P, RouterTemplate>, P> {
    using Base = ModuleBase<ConditionalRoutedViT, P>;
    friend Base;
    static_assert(config.patch_size >= 1, "colt5: ViTConfig.patch_size must be at least 1");
    static_assert(config.channels >= 1, "colt5: ViTConfig.channels must be at least 1");
    static_assert(config.num_classes >= 1, "colt5: ViTConfig.num_classes must be at least 1");
    static_assert(config.depth >= 1, "colt5: ViTConfig.depth must be at least 1");
    static_assert(config.dim >= 8 && config.dim % 4 == 0, "colt5: ViTConfig.dim must be a multiple of 4, at least 8");
    static constexpr auto depth = static_cast<std::size_t>(config.depth);

public:
    using Images = View<const Scalar, dynamic, config.channels, dynamic, dynamic>;
    using Out = MatrixTensor<Scalar, P>;
    using ImageAttention =
        ConditionalRoutedImageAttention<ImageAttentionConfig{.dim = config.dim,
                                                             .num_heavy_tokens_q = config.attn_num_heavy_tokens_q,
                                                             .num_heavy_tokens_kv = config.attn_num_heavy_tokens_kv,
                                                             .num_routed_kv = config.attn_num_routed_kv,
                                                             .num_routed_q = config.attn_num_routed_q,
                                                             .light_dim_head = config.attn_light_dim_head,
                                                             .light_heads = config.attn_light_heads,
                                                             .light_window_size = config.attn_light_window_size,
                                                             .heavy_dim_head = config.attn_heavy_dim_head,
                                                             .heavy_heads = config.attn_heavy_heads,
                                                             .router_straight_through = config.router_straight_through,
                                                             .router_type = config.router_type,
                                                             .router_kwargs = config.router_kwargs,
                                                             .routing_scope = config.routing_scope,
                                                             .use_null_kv = config.use_null_kv,
                                                             .use_null_q_tokens = config.use_null_q_tokens},
                                        Scalar, P, RouterTemplate>;
    using Attention = typename ImageAttention::Attention;
    using FeedForward =
        ConditionalRoutedFeedForward<FeedForwardConfig{.dim = config.dim,
                                                       .num_heavy_tokens = config.ff_num_heavy_tokens,
                                                       .light_ff_mult = config.ff_light_mult,
                                                       .heavy_ff_mult = config.ff_heavy_mult,
                                                       .router_straight_through = config.router_straight_through,
                                                       .router_type = config.router_type,
                                                       .router_kwargs = config.router_kwargs},
                                     Scalar, P, RouterTemplate>;
    struct Layer {
        Attention attention;
        FeedForward feed_forward;
    };

    PatchEmbedding<Scalar, P> to_patch_embedding;
    std::vector<Layer> layers;
    MapClassifier<Scalar, P> linear_head;

    struct Gradients {
        struct Layer {
            typename Attention::Gradients attention;
            typename FeedForward::Gradients feed_forward;
        };
        using Module = ConditionalRoutedViT;
        typename PatchEmbedding<Scalar, P>::Gradients to_patch_embedding;
        std::array<Layer, depth> layers;
        typename MapClassifier<Scalar, P>::Gradients linear_head;
    };

    /// What backward reads.
    struct Activations {
        struct Layer {
            typename Attention::Activations attention;  // its `out` is attention(x) + x
            typename FeedForward::Activations feed_forward;
        };
        Out out;          // (b, classes)
        WindowGrid grid;  // of the patches
        typename PatchEmbedding<Scalar, P>::Activations embedding;
        TokensTensor<Scalar, P> tokens;          // (b, grid.tokens(), dim), of the first layer
        Tensor<bool, P, dynamic, dynamic> mask;  // (b, grid.tokens()), if there is padding
        std::vector<Layer> layers;
        typename MapClassifier<Scalar, P>::Activations head;

        /// Calls f(prefix + the router's name, Routing) for each router.
        template <typename F>
        void each_routing(F&& f, const std::string& prefix = "") const {
            for (std::size_t i = 0; i < layers.size(); ++i) {
                layers[i].attention.each_routing(f, prefix + name_of_layer(i) + "0.");
                layers[i].feed_forward.each_routing(f, prefix + name_of_layer(i) + "1.");
            }
        }
        /// Calls f(prefix + the router's name, RouterView) for each router.
        template <typename F>
        void each_router(F&& f, const std::string& prefix = "") const {
            for (std::size_t i = 0; i < layers.size(); ++i) {
                layers[i].attention.each_router(f, prefix + name_of_layer(i) + "0.");
                layers[i].feed_forward.each_router(f, prefix + name_of_layer(i) + "1.");
            }
        }
    };

    explicit ConditionalRoutedViT(const P& policy, Seeds seeds = {})
        : Base(policy),
          to_patch_embedding(policy, seeds, config.channels, config.patch_size, config.dim),
          layers(make_layers(policy, seeds)),
          linear_head(policy, seeds, config.dim, config.num_classes) {}

    /// images (b, channels, h, w), h and w multiples of the patch  →  logits of the classes (b, classes). Saves
    /// nothing.
    template <Viewable X>
    Out operator()(const X& images) const {
        const P& policy = this->policy();
        auto [grid, embedding, x, mask] = embed(images);
        embedding = {};
        for (const Layer& layer : layers) {
            auto attended = layer.attention(sequences(x, grid), sequences(mask, grid), {}, Residual::tokens);
            x = layer.feed_forward(maps(attended, grid), mask.const_view(), {}, Residual::tokens);
        }
        return std::move(linear_head.forward(policy, x, grid).out);
    }

    /// The same, with what backward reads.
    template <Viewable X>
    Activations forward(const X& images) const {
        const P& policy = this->policy();
        auto [grid, embedding, tokens, mask] = embed(images);
        expect_parameters();  // of all layers, before the first one counts a call
        std::vector<typename Activations::Layer> saved;
        saved.reserve(layers.size());
        for (const Layer& layer : layers) {
            const auto& x = saved.empty() ? tokens : saved.back().feed_forward.out;  // (b, n, dim)
            auto attention = layer.attention.forward(sequences(x, grid), sequences(mask, grid), {}, Residual::tokens);
            auto ff = layer.feed_forward.forward(maps(attention.out, grid), mask.const_view(), {}, Residual::tokens);
            saved.push_back({std::move(attention), std::move(ff)});
        }
        auto head = linear_head.forward(policy, saved.back().feed_forward.out, grid);
        auto out = std::move(head.out);  // (b, classes)
        return {std::move(out),   grid,           std::move(embedding), std::move(tokens), std::move(mask),
                std::move(saved), std::move(head)};
    }

    /// Throws ShapeError, which names the parameter, when one of a layer or of linear_head does not fit the
    /// configuration.
    void expect_parameters() const {
        for (const Layer& layer : layers) {
            layer.attention.expect_parameters();
            layer.feed_forward.expect_parameters();
        }
        linear_head.expect_parameters("linear_head.", config.dim);
    }

    // The steps of forward and backward around the layers.

    /// Tokens of a layer as its attention and as its feedforward take them.
    template <Viewable V>
    static auto sequences(const V& tokens, const WindowGrid& grid) {
        return ImageAttention::sequences(tokens.const_view(), grid);
    }
    static auto maps(const TokensTensor<Scalar, P>& tokens, const WindowGrid& grid) {
        return tokens.const_view().reshape(
            std::array{tokens.size() / (grid.tokens() * config.dim), grid.tokens(), config.dim});
    }

    /// What the layers take.
    struct Embedded {
        WindowGrid grid;
        typename PatchEmbedding<Scalar, P>::Activations embedding;
        TokensTensor<Scalar, P> tokens;          // (b, grid.tokens(), dim)
        Tensor<bool, P, dynamic, dynamic> mask;  // (b, grid.tokens()), if there is padding
    };
    template <typename X>
    Embedded embed(const X& given) const {
        const auto images = expect<Images, P>("images", given);
        const Index batch = images.extent(0), side = config.patch_size;
        expect_value(images.extent(2) >= 1 && images.extent(2) % side == 0, "height of the images",
                     "a multiple of patch_size", images.extent(2));
        expect_value(images.extent(3) >= 1 && images.extent(3) % side == 0, "width of the images",
                     "a multiple of patch_size", images.extent(3));
        const P& policy = this->policy();
        auto embedding = to_patch_embedding.forward(policy, images);
        const Index height = embedding.pixels.rows(), width = embedding.pixels.columns();
        auto as_maps = embedding.out.const_view().reshape(std::array{batch, height, width, config.dim});
        const WindowGrid grid = window_grid("images", as_maps, config.attn_light_window_size);
        auto tokens = to_windows(policy, as_maps, grid);  // (b, n, dim)
        embedding.out = {};
        add_sincos_positions(policy, tokens.view(), grid);
        return {grid, std::move(embedding), std::move(tokens), window_mask(policy, {}, batch, grid)};
    }
    /// The gradient of the images from that of the tokens.
    template <typename SomeActivations>
    MapTensor<Scalar, P> embed_gradients(const SomeActivations& saved, const TokensTensor<Scalar, P>& d_tokens,
                                         Gradients& gradients) const {
        const auto d_maps = from_windows(this->policy(), maps(d_tokens, saved.grid), saved.grid);  // (b, h, w, dim)
        return to_patch_embedding.backward(this->policy(), saved.embedding,
                                           d_maps.const_view().reshape(saved.embedding.projected.shape()),
                                           gradients.to_patch_embedding);
    }

    template <typename F, typename... M>
    static void each_parameter(F&& f, const std::string& prefix, M&... m) {
        PatchEmbedding<Scalar, P>::each_parameter(f, name_for<F>(prefix, "to_patch_embedding."),
                                                  m.to_patch_embedding...);
        for (std::size_t i = 0; i < depth; ++i) {
            Attention::each_parameter(f, name_for<F>(prefix, name_of_layer(i), "0."), m.layers[i].attention...);
            FeedForward::each_parameter(f, name_for<F>(prefix, name_of_layer(i), "1."), m.layers[i].feed_forward...);
        }
        MapClassifier<Scalar, P>::each_parameter(f, name_for<F>(prefix, "linear_head."), m.linear_head...);
    }

private:
    static std::string name_of_layer(std::size_t i) { return "transformer.layers." + std::to_string(i) + "."; }

    static std::vector<Layer> make_layers(const P& policy, Seeds& seeds) {
        std::vector<Layer> layers;
        layers.reserve(depth);
        for (std::size_t i = 0; i < depth; ++i)
            layers.push_back({Attention(policy, seeds), FeedForward(policy, seeds)});
        return layers;
    }

    template <Viewable D>
    void expect_backward(const Activations& saved, const D& d_out, const Gradients& gradients) const {
        expect_value(saved.layers.size() == layers.size(), "saved", "what forward returned",
                     "used up: it was handed to backward, or moved from");
        for (std::size_t i = 0; i < layers.size(); ++i) {
            layers[i].attention.expect_saved(saved.layers[i].attention);
            layers[i].feed_forward.expect_saved(saved.layers[i].feed_forward);
        }
        if (!is_like<ConditionalRoutedViT>(*this, gradients))
            expect_like<ConditionalRoutedViT>("gradients", *this, gradients);
        expect<MatrixView<const Scalar>, P>("d_out", d_out);
        expect_shape("d_out", d_out.shape(), {saved.tokens.extent(0), config.num_classes});
    }

    /// Returns d_images.
    template <typename SomeActivations, Viewable D>
    MapTensor<Scalar, P> compute_gradients(SomeActivations& saved, const D& d_out, Gradients& gradients) const {
        const P& policy = this->policy();
        const WindowGrid& grid = saved.grid;
        detail::release(saved.out);
        auto d_x = linear_head.backward(policy, saved.head, d_out, grid, gradients.linear_head);  // (b, n, dim)
        for (std::size_t i = layers.size(); i-- > 0;) {
            auto& of_layer = saved.layers[i];
            d_x = layers[i].feed_forward.backward(detail::forward_part(of_layer.feed_forward), maps(d_x, grid),
                                                  gradients.layers[i].feed_forward);
            d_x = layers[i].attention.backward(detail::forward_part(of_layer.attention), sequences(d_x, grid),
                                               gradients.layers[i].attention);
        }
        return embed_gradients(saved, d_x, gradients);
    }
};

}  // namespace colt5
