// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include <colt5/module/conditional_routed_transformer_block.hpp>
#include <colt5/module/encoder_decoder.hpp>
#include <colt5/module/stack.hpp>

#include "../draw.hpp"
#include "stack.hpp"

/// Cases of module/multi_query_attention.hpp, module/decoder_layer.hpp and module/encoder_decoder.hpp.
namespace cases {

/// Parameters of the setting's precision.
template <typename Module, typename P>
Module rounded_module(const P& policy, const Setting& setting, Module module) {
    Module::each_parameter(
        [&](const std::string&, auto& parameter) {
            const auto values = to_host(policy, parameter);
            fill_with(policy, parameter,
                      [&](std::size_t i) { return rounded(setting.precision, static_cast<double>(values[i])); });
        },
        "", module);
    return module;
}

template <typename T, typename P>
Results multi_query_attention_case(const P& policy, const Setting& setting) {
    using Module = MultiQueryAttention<T, P>;
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    SeedSequence seeds(Seed{setting.seed});
    const Index batch = draw.size(1, 4), length = draw.length(300), keys = draw.length(800), dim = 8 * draw.size(1, 12);
    const Index heads = draw.size(1, 8), dim_head = draw.dim_head();
    const auto attention = rounded_module(policy, setting, Module(policy, seeds, dim, heads, dim_head));
    const auto x = draw.tokens(std::array{batch, length, dim}), context = draw.tokens(std::array{batch, keys, dim});
    const auto mask = draw.optional_mask(batch, keys);
    const auto saved = attention.forward(policy, x, context, mask.const_view());
    record("out", saved.out);
    auto gradients = zeros_like_parameters(policy, attention);
    auto d_context = draw.values(context.shape());
    record(
        "d_x",
        attention.backward(policy, saved, draw.values(x.shape()), x, context, mask.const_view(), d_context, gradients),
        Kind::amplified);
    record("d_context", d_context, Kind::amplified);
    Module::each_parameter([&](const std::string& name, const auto& g) { record(name, g, Kind::amplified); }, "",
                           gradients);
    return record.results;
}

template <typename T, typename P>
Results decoder_layer_case(const P& policy, const Setting& setting) {
    using Layer = DecoderLayer<T, P>;
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    SeedSequence seeds(Seed{setting.seed});
    const Index batch = draw.size(1, 4), length = draw.length(300), keys = draw.length(500);
    const DecoderConfig config{.dim = 8 * draw.size(2, 12),
                               .heads = draw.size(1, 6),
                               .dim_head = 8 * draw.size(1, 8),
                               .dim_hidden = 16 * draw.size(1, 10),
                               .dropout = draw.chance(0.5) ? 0 : 0.2};
    const auto layer = rounded_module(policy, setting, Layer(policy, seeds, config));
    const auto x = draw.tokens(std::array{batch, length, config.dim});
    const auto context = draw.tokens(std::array{batch, keys, config.dim});
    const auto mask = draw.optional_mask(batch, keys);
    const auto saved = layer.forward(policy, x, context, mask.const_view(), true);
    record("out", saved.out, Kind::amplified);
    auto gradients = zeros_like_parameters(policy, layer);
    auto d_context = draw.values(context.shape());
    const auto d_out = draw.values(x.shape());
    record("d_x", layer.backward(policy, saved, d_out, x, context, mask.const_view(), d_context, gradients),
           Kind::amplified);
    record("d_context", d_context, Kind::amplified);
    Layer::each_parameter([&](const std::string& name, const auto& g) { record(name, g, Kind::amplified); }, "",
                          gradients);
    return record.results;
}

/// What a training step and evaluation give is the same, and the same again, bit for bit; the parts are for other
/// cases.
template <typename T, typename P>
Results encoder_decoder_case(const P& policy, const Setting& setting) {
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    using Model = EncoderDecoder<Stack<ConditionalRoutedTransformerBlock<stacked_config, T, P>, 2>, 2>;
    const Index vocabulary = draw.size(2, 300), batch = draw.size(1, 3), from = draw.length(500), to = draw.length(60);
    const DecoderConfig config{.dim = stacked_config.dim, .heads = 4, .dim_head = 16, .dim_hidden = 64, .dropout = 0.2};
    const Model model(policy, vocabulary, config, Seed{setting.seed}),
        again(policy, vocabulary, config, Seed{setting.seed});
    const auto ids = draw.indices(batch, from, vocabulary), previous = draw.indices(batch, to, vocabulary);
    const auto targets = draw.indices(batch, to, vocabulary);
    const auto mask = draw.optional_mask(batch, from);
    const auto d_losses = draw.sums(targets.shape());
    const auto step = [&](const Model& of, auto& gradients) {
        return of.add_gradients(ids, previous, targets, d_losses, gradients, mask.const_view());
    };
    auto gradients = model.make_gradients(), of_again = model.make_gradients();
    record.holds("the same losses", same_bits(policy, step(model, gradients), step(again, of_again)));
    bool parameters = true;
    Model::each_parameter(
        [&](const std::string&, const auto& a, const auto& b) { parameters = parameters && same_bits(policy, a, b); },
        "", gradients, of_again);
    record.holds("the same gradients", parameters);
    without_noise(model, [&] {
        const auto losses = model.losses(model.encode(ids, mask.const_view()), mask.const_view(), previous, targets);
        record.holds("evaluation", same_bits(policy, losses, step(model, gradients)));
    });
    // Decoded in chunks of random sizes: the same logits, in double and float bit for bit.
    const auto context = model.encode(ids, mask.const_view());
    const auto whole = model.logits(context, mask.const_view(), previous);
    const auto expected = to_host(policy, whole);
    const auto all = to_host(policy, previous);
    auto cache = model.make_cache(context, mask.const_view(), to);
    bool same = true;
    double error = 0, norm = 0;
    while (cache.lengths() != std::vector<Index>(static_cast<std::size_t>(batch), to)) {
        const auto past = cache.lengths();
        const Index width = draw.size(1, 20);
        std::vector<Index> counts;
        for (const Index length : past) counts.push_back(std::min(draw.chance(0.8) ? width : Index{0}, to - length));
        const auto at = [&](Index b, Index i) {  // the i-th new token of sequence b, or any for padding
            return static_cast<std::size_t>(b * to + std::min(past[static_cast<std::size_t>(b)] + i, to - 1));
        };
        MatrixTensor<TokenIndex, P> next(policy, {batch, width});
        fill_with(policy, next,
                  [&](std::size_t i) { return all[at(static_cast<Index>(i) / width, static_cast<Index>(i) % width)]; });
        const auto logits = to_host(policy, model.decode(cache, next, counts));
        for (Index b = 0; b < batch; ++b)
            for (Index i = 0; i < counts[static_cast<std::size_t>(b)]; ++i)
                for (Index v = 0; v < vocabulary; ++v) {
                    const auto wanted = static_cast<double>(
                        expected[at(b, i) * static_cast<std::size_t>(vocabulary) + static_cast<std::size_t>(v)]);
                    const auto got =
                        static_cast<double>(logits[static_cast<std::size_t>((b * width + i) * vocabulary + v)]);
                    same = same && got == wanted;
                    error += (got - wanted) * (got - wanted);
                    norm += wanted * wanted;
                }
    }
    const bool is_exact = setting.precision == Precision::fp64 || setting.precision == Precision::fp32;
    record.holds("decode = forward", !is_exact || same);
    record.holds("decode is close to forward", std::isfinite(error) && std::sqrt(error) <= 0.05 * std::sqrt(norm));
    record.holds("bytes of the cache", cache.bytes() == model.cache_bytes(batch, from, to));
    return record.results;
}

}  // namespace cases
