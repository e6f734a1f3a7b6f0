// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <cmath>
#include <cstddef>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <colt5/module/cache.hpp>
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
///     const auto context = model.encode(ids, mask);                    // (b, m, d)
///     auto cache = model.make_cache(context, mask, max_length);
///     const auto logits = model.decode(cache, previous);               // (b, 1, V), then with the next tokens
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

    /// Throws ValueError when the dim of the decoder is not that of the encoder.
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
        return head.logits(policy_, decoded(context, mask, previous), embedding.weight.const_view());
    }
    /// Cross-entropy: previous and targets (b, n)  →  (b, n)
    template <Viewable Previous, Viewable Targets>
    auto losses(const Out& context, Mask mask, const Previous& previous, const Targets& targets) const {
        return head.losses(policy_, decoded(context, mask, previous), targets.const_view(),
                           embedding.weight.const_view());
    }

    /// What decode keeps, see module/cache.hpp: of each layer of the decoder, and the mask of the context.
    struct DecodeState {
        std::array<typename Layer::DecodeState, depth> decoder;
        Tensor<bool, P, dynamic, dynamic> mask;  // (b, m)

        template <typename F, typename... States>
        static void each_tensor(F&& f, const std::string& prefix, States&... states) {
            for (std::size_t i = 0; i < depth; ++i)
                Layer::DecodeState::each_tensor(f, prefix + name_of_layer(i), states.decoder[i]...);
            f(prefix + "mask", states.mask...);
        }
    };
    using DecodeCache = Cache<EncoderDecoder>;

    /// A cache to decode sequences of up to max_length tokens with, for the context (b, m, d) that `encode` returned
    /// and the mask it was given. The keys and values of the context are computed here, once.
    DecodeCache make_cache(const Out& context, Mask mask, Index max_length) const {
        expect_shape("context", context.shape(), {dynamic, dynamic, embedding.weight.extent(1)});
        if (mask) expect_shape("mask", mask.shape(), {context.extent(0), context.extent(1)});
        return {*this, context.extent(0), max_length, context, mask};
    }
    /// One to load a saved cache into: for contexts of which all tokens are masked.
    DecodeCache make_cache(Index batch, Index context_length, Index max_length) const {
        return {*this, batch, max_length, context_length};
    }
    /// What either takes: depth times decode_bytes of a layer, and b · m for the mask.
    Index cache_bytes(Index batch, Index context_length, Index max_length) const {
        return static_cast<Index>(depth) * decoder[0].decode_bytes(batch, context_length, max_length) +
               batch * context_length;
    }
    /// Of the next ids (b, n) of the sequences of a cache: their logits (b, n, V), as for whole sequences. The first
    /// lengths[b] ids of sequence b are its next ones, the others padding in [0, V); without lengths, all n are. On the
    /// CPU the bits are those of `logits`, or with a BLAS the numbers up to rounding; on a GPU as in `decode` of
    /// ModuleBase.
    ///
    /// Throws ShapeError for a cache of other shapes, ValueError when a sequence gets more than max_length
    /// tokens or an id is not in [0, V), with the cache as it was.
    template <Viewable Previous>
    auto decode(DecodeCache& cache, const Previous& previous, std::span<const Index> lengths = {}) const {
        expect_shape("previous", previous.shape(), {cache.batch(), dynamic});
        DecodeState& state = cache.state;
        for (std::size_t i = 0; i < depth; ++i)
            decoder[i].expect_state("cache." + name_of_layer(i), state.decoder[i], cache.batch(), state.mask.extent(1),
                                    cache.max_length());
        Out x = embedding(policy_, previous);  // (b, n, d)
        const auto& next = cache.next(policy_, x.extent(1), lengths);
        return cache.go_on(next, [&] {
            const typename Layer::NextPositions at(policy_, next, x.extent(1));
            for (std::size_t i = 0; i < depth; ++i)
                x = decoder[i].decode_next(policy_, state.decoder[i], at, x, state.mask);
            return head.logits(policy_, x, embedding.weight.const_view());
        });
    }
    DecodeState make_decode_state(Index batch, Index max_length, Index context_length) const {
        DecodeState state{{}, {policy_, {batch, context_length}}};
        for (std::size_t i = 0; i < depth; ++i)
            state.decoder[i] = decoder[i].make_decode_state(policy_, batch, context_length, max_length);
        fill(policy_, state.mask, 0);
        return state;
    }
    DecodeState make_decode_state(Index batch, Index max_length, const Out& context, Mask mask) const {
        DecodeState state = make_decode_state(batch, max_length, context.extent(1));
        for (std::size_t i = 0; i < depth; ++i)
            state.decoder[i].cross_kv = decoder[i].cross_attn.to_kv(policy_, context);
        if (mask)
            assign(policy_, state.mask, mask);
        else
            fill(policy_, state.mask, 1);
        return state;
    }

    /// Forward and backward of a training step: returns the losses (b, n), and adds the gradients of
    /// Σ d_losses ∘ losses. Throws before anything is touched, calls of noise included, when an argument or a parameter
    /// does not fit or, on the CPU, an id or a target is not in its range.
    template <Viewable Ids, Viewable Previous, Viewable Targets, Viewable D>
    MatrixTensor<Sum, P> add_gradients(const Ids& ids, const Previous& previous, const Targets& targets,
                                       const D& d_losses, Gradients& gradients, Mask mask = {},
                                       const Counts& counts = {}) const {
        expect_like<EncoderDecoder>("gradients", *this, gradients);
        expect_shape("targets", targets.shape(),
                     previous.shape());  // before anything counts a call, as routers with noise and dropout do
        expect_shape("d_losses", d_losses.shape(), previous.shape());
        expect_shape("previous", previous.shape(), {ids.extent(0), dynamic});
        const auto [vocabulary, dim] = embedding.weight.shape();
        detail::flat_ids<P>(previous, vocabulary, "previous");
        detail::expect_targets<P>(targets, vocabulary);
        expect_shape("encoder_norm.gamma", encoder_norm.gamma.shape(), {dim});
        for (std::size_t i = 0; i < depth; ++i) decoder[i].expect_parameters(name_of_layer(i), dim);
        head.expect_parameters("head.", dim);
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
        Embedding<Scalar, P>::each_parameter(f, name_for<F>(prefix, "embedding."), m.embedding...);
        Encoder::each_parameter(f, name_for<F>(prefix, "encoder."), m.encoder...);
        RMSNorm<Scalar, P>::each_parameter(f, name_for<F>(prefix, "encoder_norm."), m.encoder_norm...);
        for (std::size_t i = 0; i < depth; ++i)
            Layer::each_parameter(f, name_for<F>(prefix, name_of_layer(i)), m.decoder[i]...);
        Head<Scalar, P>::each_parameter(f, name_for<F>(prefix, "head."), m.head...);
    }

private:
    static std::string name_of_layer(std::size_t i) { return "decoder." + std::to_string(i) + "."; }

    template <std::size_t... i>
    EncoderDecoder(const P& policy, Index vocabulary, const DecoderConfig& config, Seeds& seeds,
                   std::index_sequence<i...>)
        : embedding(policy, seeds, vocabulary, config.dim, 1 / std::sqrt(static_cast<double>(config.dim))),
          encoder(policy, seeds),
          encoder_norm(policy, config.dim),
          decoder{(static_cast<void>(i), Layer(policy, seeds, config))...},
          head(policy, config.dim),
          policy_(policy) {
        if constexpr (requires { Encoder::model_dim; })
            expect_value(config.dim == Encoder::model_dim, "dim",
                         detail::concat({"that of the encoder, ", std::to_string(Encoder::model_dim)}), config.dim);
    }

    template <Viewable Previous>
    Out decoded(const Out& context, Mask mask, const Previous& previous) const {
        Out x = embedding(policy_, previous);  // (b, n, d)
        for (const Layer& layer : decoder) x = std::move(layer.forward(policy_, x, context, mask, false).out);
        return x;
    }

    P policy_;
};

}  // namespace colt5
