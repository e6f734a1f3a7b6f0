// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <concepts>
#include <string>
#include <vector>

#include <colt5/module/ragged.hpp>
#include <colt5/module/stack.hpp>

#include "block.hpp"
#include "cross_attention.hpp"

/// Cases of sequences of different lengths.
namespace cases {

/// From 0 to `most` tokens each, some of which are as many as the one before has, or another one.
template <typename T, typename P>
std::vector<Index> ragged_lengths(Draw<T, P>& draw, Index batch, Index most) {
    std::vector<Index> lengths;
    for (Index b = 0; b < batch; ++b) {
        const Index other = draw.chance(0.2) ? 0 : draw.length(most);
        const Index before = draw.size(0, std::max<Index>(b - 1, 0));
        lengths.push_back(b > 0 && draw.chance(0.2)   ? lengths.back()
                          : b > 0 && draw.chance(0.4) ? lengths[static_cast<std::size_t>(before)]
                                                      : other);
    }
    return lengths;
}

/// Packed tokens (total, d) as padded ones (b, longest, d); what is in the padding is not read.
template <typename P, typename V>
auto padded_tokens(const P& policy, const V& packed, const std::vector<Index>& lengths, Index longest) {
    using T = typename V::value_type;
    const auto values = to_host(policy, packed);
    const Index d = packed.extent(1);
    TokensTensor<T, P> padded(policy, {static_cast<Index>(lengths.size()), longest, d});
    Index first = 0, b = 0;
    std::vector<T> all(static_cast<std::size_t>(padded.size()), static_cast<T>(NAN));
    for (const Index length : lengths) {
        std::copy_n(values.begin() + first * d, length * d, all.begin() + b++ * longest * d);
        first += length;
    }
    upload(policy, padded.data(), all.data(), all.size() * sizeof(T));
    return padded;
}

/// Whether padded tokens are packed ones with zeros behind each sequence.
template <typename P, typename V, typename Packed>
bool is_padded_with_zeros(const P& policy, const V& padded, const Packed& packed, const std::vector<Index>& lengths) {
    using T = typename V::value_type;
    const auto values = to_host(policy, packed);
    const Index d = packed.extent(1), row = padded.extent(1) * d;
    std::vector<T> all(static_cast<std::size_t>(padded.size()), static_cast<T>(0.0f));
    Index first = 0, b = 0;
    for (const Index length : lengths) {
        std::copy_n(values.begin() + first * d, length * d, all.begin() + b++ * row);
        first += length;
    }
    const auto actual = to_host(policy, padded);
    return std::equal(actual.begin(), actual.end(), all.begin(),
                      [](T x, T y) { return static_cast<double>(x) == static_cast<double>(y); });
}

/// Sequence i of packed tokens, as a batch of one.
template <typename V>
auto packed_sequence(const V& packed, const std::vector<Index>& offsets, std::size_t i) {
    using T = typename V::value_type;
    const Index length = offsets[i + 1] - offsets[i];
    return TokensView<const T>(packed.const_view().range(offsets[i], length).data(), {1, length, packed.extent(1)});
}

/// Packed, and padded, and each sequence alone. Its numbers are recorded if they are to be the same on either side.
template <Kind of_routing_tokens = Kind::rounded, typename Module, typename T, typename P>
void ragged_module_case(Recorder<P>& record, Draw<T, P>& draw, const Module& of, bool with_numbers = true) {
    const P& policy = record.policy;
    const auto lengths = ragged_lengths(draw, draw.size(1, 6), 500);
    const auto offsets = cumulative_lengths(lengths);
    const auto x = draw.tokens(std::array{offsets.back(), Index{48}}), d_out = draw.values(x.shape());
    const Ragged ragged(of);
    const auto counts = [](Index length) {
        const Index part = TokenRatio{0.2}(length);
        if constexpr (std::same_as<typename Module::Counts, AttentionCounts>)
            return AttentionCounts{part, 2 * part};
        else if constexpr (std::same_as<typename Module::Counts, TransformerBlockCounts>)
            return TransformerBlockCounts{part, 2 * part, part};
        else
            return RoutedCounts{part};
    };
    const auto saved = ragged.forward(x, offsets, counts);
    auto gradients = of.make_gradients(), others = of.make_gradients();
    const auto d_x = ragged.backward(saved, d_out, gradients);
    record.holds("inference is the same", same_bits(policy, ragged(x, offsets, counts), saved.out));
    if (with_numbers) {
        record("out", saved.out);
        record("d_tokens", d_x);
        Module::each_parameter(
            [&](const std::string& name, const auto& gradient) {
                record("gradient of " + name, gradient,
                       name.ends_with("routing_token")                             ? of_routing_tokens
                       : name.find("relative_attention_bias") != std::string::npos ? Kind::amplified
                                                                                   : Kind::rounded);
            },
            "", gradients);
    }

    bool outs = true, gradients_of_tokens = true;
    for (std::size_t i = 0; i < lengths.size(); ++i) {
        if (lengths[i] == 0) continue;
        const auto alone = of.forward(packed_sequence(x, offsets, i), {}, counts(lengths[i]));
        outs = outs && same_bits(policy, alone.out, packed_sequence(saved.out, offsets, i));
        gradients_of_tokens =
            gradients_of_tokens && same_bits(policy, of.backward(alone, packed_sequence(d_out, offsets, i), others),
                                             packed_sequence(d_x, offsets, i));
    }
    record.holds("out is that of each sequence alone", outs);
    record.holds("d_tokens is that of each sequence alone", gradients_of_tokens);

    const Index longest = 501;
    const auto padded = padded_tokens(policy, x, lengths, longest);
    const auto saved_padded = ragged.forward(padded, lengths, counts);
    record.holds("out of padded tokens is the same",
                 is_padded_with_zeros(policy, saved_padded.out, saved.out, lengths));
    const auto d_padded = padded_tokens(policy, d_out, lengths, longest);
    record.holds("d_tokens of padded tokens is the same",
                 is_padded_with_zeros(policy, ragged.backward(saved_padded, d_padded, others), d_x, lengths));
}

template <TransformerBlockConfig config, typename T, typename P>
Results ragged_case(const P& policy, const Setting& setting) {
    using Block = ConditionalRoutedTransformerBlock<config, T, P>;
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    if (setting.seed % 2 == 0)
        ragged_module_case(record, draw, draw.template made<typename Block::Attention>());
    else
        ragged_module_case(record, draw, draw.template made<typename Block::FeedForward>());
    return record.results;
}

template <AttentionConfig config, typename T, typename P>
Results ragged_attention_case(const P& policy, const Setting& setting) {
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    ragged_module_case<Kind::amplified>(record, draw, draw.template made<ConditionalRoutedAttention<config, T, P>>());
    return record.results;
}

/// As blocks, it routes by what was computed before.
template <typename T, typename P>
Results ragged_stack_case(const P& policy, const Setting& setting) {
    using Blocks = Stack<ConditionalRoutedTransformerBlock<by_descent_of_one_route, T, P>, 2>;
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    ragged_module_case(record, draw, draw.template made<Blocks>(),
                       setting.precision == Precision::fp64 || setting.precision == Precision::fp32);
    return record.results;
}

template <CrossAttentionConfig config, typename T, typename P>
Results ragged_cross_case(const P& policy, const Setting& setting) {
    using Module = ConditionalRoutedCrossAttention<config, T, P>;
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    const Module cross = draw.template made<Module>();
    const Index batch = draw.size(1, 5);
    const auto lengths = ragged_lengths(draw, batch, 200), context_lengths = ragged_lengths(draw, batch, 900);
    const auto offsets = cumulative_lengths(lengths), context_offsets = cumulative_lengths(context_lengths);
    const auto x = draw.tokens(std::array{offsets.back(), config.dim}), d_out = draw.values(x.shape());
    const auto context = draw.tokens(std::array{context_offsets.back(), config.dim});
    const CountsByLength<CrossAttentionCounts> counts{TokenRatio{0.3}, TokenRatio{0.2}};
    const Ragged ragged(cross);
    const auto saved = ragged.forward(x, offsets, context, context_offsets, counts);
    auto gradients = cross.make_gradients(), others = cross.make_gradients();
    const auto d = ragged.backward(saved, d_out, gradients);
    record("out", saved.out);
    record("d_x", d.d_x);
    record("d_context", d.d_context);
    Module::each_parameter(
        [&](const std::string& name, const auto& gradient) {
            record("gradient of " + name, gradient,
                   config.multiply_keys_by_score && name.ends_with("routing_token") ? Kind::amplified : Kind::rounded);
        },
        "", gradients);

    bool outs = true, gradients_of_inputs = true;
    for (std::size_t i = 0; i < lengths.size(); ++i) {
        if (lengths[i] == 0) continue;
        const auto alone = cross.forward(packed_sequence(x, offsets, i), packed_sequence(context, context_offsets, i),
                                         {}, {}, counts(lengths[i], context_lengths[i]));
        outs = outs && same_bits(policy, alone.out, packed_sequence(saved.out, offsets, i));
        const auto d_alone = cross.backward(alone, packed_sequence(d_out, offsets, i), others);
        gradients_of_inputs = gradients_of_inputs &&
                              same_bits(policy, d_alone.d_x, packed_sequence(d.d_x, offsets, i)) &&
                              same_bits(policy, d_alone.d_context, packed_sequence(d.d_context, context_offsets, i));
    }
    record.holds("out is that of each sequence alone", outs);
    record.holds("the gradients are those of each sequence alone", gradients_of_inputs);
    return record.results;
}

}  // namespace cases
