// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <cmath>
#include <cstddef>
#include <string>
#include <utility>
#include <vector>

#include <colt5/module/decoder_layer.hpp>
#include <colt5/module/embedding.hpp>
#include <colt5/module/head.hpp>
#include <colt5/module/module.hpp>

namespace colt5 {

/// The model of the CoLT5 paper: an encoder whose blocks route, for long inputs, and a decoder of DecoderLayers, for
/// short outputs. `Encoder` is a Stack of blocks, or any module (b, m, d) → (b, m, d). Encoder, decoder and head share
/// one Embedding; the encoder's output is normed.
///
///     EncoderDecoder<Stack<Block, 12>, 12> model(policy, 32128, {.dim = 768});
///     const auto losses = model.add_gradients(ids, previous, targets, d_losses, gradients, mask);
///
/// ids (b, m) are the input, with a mask (b, m) or none; targets (b, n) are the output. previous (b, n) is the input of
/// the decoder: a start token, then the targets without the last. A negative target has no loss, such as for padding;
/// ids and previous are in [0, V) at padding, too.
template <typename Encoder, std::size_t depth>
class EncoderDecoder {
    static_assert(depth >= 1, "colt5: the depth of an EncoderDecoder must be at least 1");

public:
    using Out = typename Encoder::Out;
    using Scalar = typename Out::value_type;
    using P = typename Out::PolicyType;
    using Counts = typename Encoder::Counts;
    using Layer = DecoderLayer<Scalar, P>;
    using Sum = accumulate_t<Scalar>;

    Embedding<Scalar, P> embedding;
    Encoder encoder;
    RMSNorm<Scalar, P> encoder_norm;
    std::array<Layer, depth> decoder;
    Head<Scalar, P> head;

    struct Gradients {
        using Module = EncoderDecoder;
        typename Embedding<Scalar, P>::Gradients embedding;
        typename Encoder::Gradients encoder;
        RMSNorm<Sum, P> encoder_norm;
        std::array<typename Layer::Gradients, depth> decoder;
        typename Head<Scalar, P>::Gradients head;
    };

    EncoderDecoder(const P& policy, Index vocabulary, const DecoderConfig& config, Seeds seeds = {})
        : EncoderDecoder(policy, vocabulary, config, seeds, std::make_index_sequence<depth>()) {}

    const P& policy() const { return policy_; }
    Gradients make_gradients() const { return zeros_like_parameters(policy_, *this); }

    /// The context of the decoder: ids (b, m)  →  (b, m, d). This and the next two are for evaluation, without dropout.
    template <Viewable Ids>
    Out encode(const Ids& ids, Mask mask = {}, const Counts& counts = {}) const {
        return encoder_norm(policy_, encoder(embedding(policy_, ids), mask, counts));
    }
    /// Of the next tokens: previous (b, n)  →  (b, n, V)
    template <Viewable Previous>
    auto logits(const Out& context, Mask mask, const Previous& previous) const {
        return head.logits(policy_, decode(context, mask, previous), embedding.weight.const_view());
    }
    /// Cross-entropy: previous and targets (b, n)  →  (b, n)
    template <Viewable Previous, Viewable Targets>
    auto losses(const Out& context, Mask mask, const Previous& previous, const Targets& targets) const {
        return head.losses(policy_, decode(context, mask, previous), targets.const_view(),
                           embedding.weight.const_view());
    }

    /// Forward and backward of a training step: returns the losses (b, n), and adds the gradients of
    /// Σ d_losses ∘ losses.
    template <Viewable Ids, Viewable Previous, Viewable Targets, Viewable D>
    MatrixTensor<Sum, P> add_gradients(const Ids& ids, const Previous& previous, const Targets& targets,
                                       const D& d_losses, Gradients& gradients, Mask mask = {},
                                       const Counts& counts = {}) const {
        expect_like<EncoderDecoder>("gradients", *this, gradients);
        const Out tokens = embedding(policy_, ids);  // (b, m, d)
        auto encoded = encoder.forward(tokens, mask, counts);
        const Out encoder_out = std::move(encoded.out);
        const Out context = encoder_norm(policy_, encoder_out);  // (b, m, d)
        const Out x = embedding(policy_, previous);              // (b, n, d)
        std::vector<typename Layer::Activations> saved;
        for (const Layer& layer : decoder)
            saved.push_back(layer.forward(policy_, saved.empty() ? x : saved.back().out, context, mask, true));

        auto result = head.backward(policy_, d_losses, saved.back().out, targets.const_view(), gradients.head,
                                    embedding.weight.const_view(), gradients.embedding.weight.view());
        Out d_x = std::move(result.d_x), d_context = tensor_like(policy_, context);
        set_zero(policy_, d_context);
        for (std::size_t i = depth; i-- > 0; saved.pop_back())
            d_x = decoder[i].backward(policy_, saved[i], d_x, i > 0 ? saved[i - 1].out : x, context, mask, d_context,
                                      gradients.decoder[i]);
        embedding.backward(policy_, d_x, previous, gradients.embedding);
        const Out d_encoder_out = encoder_norm.backward(policy_, d_context, encoder_out, gradients.encoder_norm);
        const Out d_tokens = encoder.backward(std::move(encoded), d_encoder_out, gradients.encoder);
        embedding.backward(policy_, d_tokens, ids, gradients.embedding);
        return std::move(result.losses);
    }

    template <typename F, typename... M>
    static void each_parameter(F&& f, const std::string& prefix, M&... m) {
        Embedding<Scalar, P>::each_parameter(f, prefix + "embedding.", m.embedding...);
        Encoder::each_parameter(f, prefix + "encoder.", m.encoder...);
        RMSNorm<Scalar, P>::each_parameter(f, prefix + "encoder_norm.", m.encoder_norm...);
        for (std::size_t i = 0; i < depth; ++i)
            Layer::each_parameter(f, prefix + "decoder." + std::to_string(i) + ".", m.decoder[i]...);
        Head<Scalar, P>::each_parameter(f, prefix + "head.", m.head...);
    }

private:
    template <std::size_t... i>
    EncoderDecoder(const P& policy, Index vocabulary, const DecoderConfig& config, Seeds& seeds,
                   std::index_sequence<i...>)
        : embedding(policy, seeds, vocabulary, config.dim, 1 / std::sqrt(static_cast<double>(config.dim))),
          encoder(policy, seeds),
          encoder_norm(policy, config.dim),
          decoder{(static_cast<void>(i), Layer(policy, seeds, config))...},
          head(policy, config.dim),
          policy_(policy) {}

    template <Viewable Previous>
    Out decode(const Out& context, Mask mask, const Previous& previous) const {
        Out x = embedding(policy_, previous);  // (b, n, d)
        for (const Layer& layer : decoder) x = std::move(layer.forward(policy_, x, context, mask, false).out);
        return x;
    }

    P policy_;
};

}  // namespace colt5
