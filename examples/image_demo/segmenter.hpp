// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <cstddef>
#include <string>
#include <utility>
#include <vector>

#include <colt5/colt5.hpp>

#include "photos.hpp"

namespace image_demo {

using colt5::Index;

inline constexpr Index dim = 32, depth = 2;
inline constexpr colt5::RouterKwargs router{
    .coor_descent = {.score_scale = 0.1767766952966369, .iterate_to_convergence = true}};
inline constexpr colt5::ImageAttentionConfig attention_config{.dim = dim,
                                                              .num_heavy_tokens_q = 2048,
                                                              .num_heavy_tokens_kv = 512,
                                                              .light_dim_head = 16,
                                                              .light_heads = 1,
                                                              .light_window_size = 8,
                                                              .heavy_dim_head = 16,
                                                              .heavy_heads = 4,
                                                              .router_kwargs = router};
inline constexpr colt5::FeedForwardConfig feed_forward_config{
    .dim = dim, .num_heavy_tokens = 4096, .light_ff_mult = 0.5, .heavy_ff_mult = 4, .router_kwargs = router};

/// Which photo each pixel is of: every pixel is a token, 65,536 of an image. A linear map of its color, two layers of
/// routed image attention and routed feedforward, a norm and a linear map.
class Segmenter {
public:
    using Attention = colt5::ConditionalRoutedImageAttention<attention_config, float, colt5::Cpu>;
    using FeedForward = colt5::ConditionalRoutedFeedForward<feed_forward_config, float, colt5::Cpu>;
    using Linear = colt5::Linear<float, colt5::Cpu>;
    using LayerNorm = colt5::LayerNorm<float, colt5::Cpu>;
    using Tokens = colt5::TokensTensor<float, colt5::Cpu>;

    struct Layer {
        Attention attention;
        FeedForward feed_forward;
    };
    Linear embedding;
    std::vector<Layer> layers;
    LayerNorm norm;
    Linear head;

    struct Gradients {
        using Module = Segmenter;
        struct Layer {
            Attention::Gradients attention;
            FeedForward::Gradients feed_forward;
        };
        Linear embedding;
        std::array<Layer, static_cast<std::size_t>(depth)> layers;
        LayerNorm norm;
        Linear head;
    };
    struct Activations {
        Tokens out;        // logits (1, n, classes)
        Tokens colors, x;  // (1, n, 3), (1, n, dim)
        std::vector<std::pair<Attention::Activations, FeedForward::Activations>> layers;
        Tokens normed;
    };

    explicit Segmenter(const colt5::Cpu& policy, colt5::SeedSequence seeds)
        : embedding(policy, seeds, 3, dim, true),
          norm(policy, dim),
          head(policy, seeds, dim, classes, true),
          policy_(policy) {
        for (Index i = 0; i < depth; ++i) layers.push_back({Attention(policy, seeds), FeedForward(policy, seeds)});
    }

    auto make_gradients() const { return colt5::zeros_like_parameters(policy_, *this); }

    /// colors (1, side · side, 3)
    Activations forward(Tokens colors) const {
        Activations saved;
        saved.colors = std::move(colors);
        saved.x = embedding(policy_, saved.colors);
        const Tokens* x = &saved.x;
        saved.layers.reserve(layers.size());
        for (const Layer& layer : layers) {
            auto attention = layer.attention.forward(as_map(*x), {}, {}, colt5::Residual::tokens);
            const auto attended = attention.out.const_view().reshape(x->shape());
            auto ff = layer.feed_forward.forward(attended, {}, {}, colt5::Residual::tokens);
            saved.layers.emplace_back(std::move(attention), std::move(ff));
            x = &saved.layers.back().second.out;
        }
        saved.normed = norm(policy_, *x);
        saved.out = head(policy_, saved.normed);
        return saved;
    }

    void backward(Activations saved, const Tokens& d_out, Gradients& gradients) const {
        const auto d_normed = head.backward(policy_, d_out, saved.normed, gradients.head);
        auto d_x = colt5::tensor_like(policy_, d_normed);
        norm.backward(policy_, d_x.view(), d_normed, saved.layers.back().second.out, gradients.norm);
        for (std::size_t i = layers.size(); i-- > 0;) {
            auto& [attention, ff] = saved.layers[i];
            d_x = layers[i].feed_forward.backward(std::move(ff), d_x, gradients.layers[i].feed_forward);
            const auto d_maps =
                layers[i].attention.backward(std::move(attention), as_map(d_x), gradients.layers[i].attention);
            assign(policy_, d_x, d_maps.const_view().reshape(d_x.shape()));
        }
        embedding.backward(policy_, d_x, saved.colors, gradients.embedding);
    }

    template <typename F, typename... M>
    static void each_parameter(F&& f, const std::string& prefix, M&... m) {
        Linear::each_parameter(f, prefix + "embedding.", m.embedding...);
        for (std::size_t i = 0; i < static_cast<std::size_t>(depth); ++i) {
            const std::string layer = prefix + "layers." + std::to_string(i);
            Attention::each_parameter(f, layer + ".attention.", m.layers[i].attention...);
            FeedForward::each_parameter(f, layer + ".feed_forward.", m.layers[i].feed_forward...);
        }
        LayerNorm::each_parameter(f, prefix + "norm.", m.norm...);
        Linear::each_parameter(f, prefix + "head.", m.head...);
    }

private:
    static colt5::MapView<const float> as_map(const Tokens& tokens) {
        return tokens.const_view().reshape(std::array<Index, 4>{1, side, side, dim});
    }

    colt5::Cpu policy_;
};

}  // namespace image_demo
