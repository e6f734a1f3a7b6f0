// SPDX-License-Identifier: MIT
#pragma once

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include <colt5/colt5.hpp>

#include "support/tensors.hpp"

/// What the tests of the modules share.
namespace support {

/// A block with few of everything, whose router has gradients.
constexpr colt5::TransformerBlockConfig small_block(double dropout = 0,
                                                    colt5::RouterType type = colt5::RouterType::coor_descent) {
    return {.dim = 6,
            .num_heavy_attn_tokens_q = 3,
            .num_heavy_attn_tokens_kv = 4,
            .num_heavy_ff_tokens = 5,
            .light_dim_head = 4,
            .light_heads = 2,
            .light_window_size = 4,
            .heavy_dim_head = 4,
            .heavy_heads = 2,
            .router_straight_through = false,
            .router_type = type,
            .router_kwargs = {.coor_descent = {.score_scale = 0.4, .iterate_to_convergence = true}},
            .dropout = dropout};
}

using colt5::Mask, colt5::TokensTensor, colt5::TokensView;

/// Largest difference, relative to the largest expected entry, or to 1e-3 where a gradient is zero up to rounding.
template <colt5::Viewable A, colt5::Viewable E>
double gradient_error(const A& actual, const E& expected) {
    const auto e = expected.const_view();
    double scale = 1e-3;
    for (Index i = 0; i < e.size(); ++i) scale = std::max(scale, std::abs(e.data()[i]));
    double difference = actual.shape() == expected.shape() ? 0 : INFINITY;
    for (Index i = 0; i < e.size(); ++i) {
        const double d = std::abs(actual.const_view().data()[i] - e.data()[i]);
        difference = std::isfinite(d) ? std::max(difference, d) : INFINITY;
    }
    return difference / scale;
}

inline constexpr double gradient_tolerance = 2e-6;  // of central differences with a step of 1e-5

/// The state of what draws noise in a module: seeds, and how many calls were made.
template <typename Module>
std::vector<std::uint64_t> noise_state(const Module& module) {
    std::vector<std::uint64_t> numbers;
    colt5::each_state<Module>([&](const std::string&, std::uint64_t number) { numbers.push_back(number); }, "", module);
    return numbers;
}

/// Every parameter's gradient against finite differences of `loss()`.
template <typename Module, typename Gradients, typename Loss>
void check_parameter_gradients(const Cpu& policy, Module& module, Gradients& gradients, Loss&& loss) {
    Module::each_parameter(
        [&](const std::string& name, auto& value, const auto& gradient) {
            CAPTURE(name);
            CHECK(gradient_error(gradient, finite_differences(policy, value, loss)) <= gradient_tolerance);
        },
        "", module, gradients);
}

/// Backward against finite differences of Σ d_out ∘ module(tokens), for the tokens and every parameter; parameter
/// gradients accumulate; inference gives what training gives, bit for bit.
template <typename Module, typename Tokens, typename SomeMask, typename... Counts>
void check_gradients_of(Module& module, Tokens& tokens, SomeMask mask, const Counts&... counts) {
    const Cpu& policy = module.policy();
    const auto d_out = normal<double>(policy, tokens.shape(), 99);
    const auto saved = module.forward(tokens, mask, counts...);
    CHECK(same_bits(saved.out, module(tokens, mask, counts...)));
    auto gradients = module.make_gradients();
    const auto d_tokens = module.backward(saved, d_out, gradients);
    const auto loss = [&] { return inner(d_out, module(tokens, mask, counts...)); };
    CHECK(gradient_error(d_tokens, finite_differences(policy, tokens, loss)) <= gradient_tolerance);
    check_parameter_gradients(policy, module, gradients, loss);

    module.backward(saved, d_out, gradients);
    auto once = module.make_gradients();
    module.backward(saved, d_out, once);
    Module::each_parameter(
        [&](const std::string& name, const auto& twice, const auto& gradient) {
            CAPTURE(name);
            double difference = 0, scale = 1e-3;
            for (Index i = 0; i < twice.size(); ++i) {
                difference = std::max(difference, std::abs(twice.data()[i] - 2 * gradient.data()[i]));
                scale = std::max(scale, std::abs(gradient.data()[i]));
            }
            CHECK(difference <= 1e-12 * scale);
        },
        "", gradients, once);
}

template <typename Module, typename... Counts>
void check_gradients(Module& module, TokensTensor<double, Cpu>& tokens, Mask mask, const Counts&... counts) {
    check_gradients_of(module, tokens, mask, counts...);
}

/// Euclidean norm of the gradient of one parameter.
template <typename Module, typename Gradients>
double gradient_norm(const Gradients& gradients, const std::string& parameter) {
    double norm = -1;
    Module::each_parameter(
        [&](const std::string& name, const auto& gradient) {
            if (name == parameter) norm = std::sqrt(inner(gradient, gradient));
        },
        "", gradients);
    return norm;
}

template <typename T>
bool all_finite(const T& tensor) {
    const auto view = tensor.const_view();
    return std::all_of(view.data(), view.data() + view.size(), [](auto x) { return std::isfinite(x); });
}
template <typename T>
bool all_zero(const T& tensor) {
    const auto view = tensor.const_view();
    return std::all_of(view.data(), view.data() + view.size(), [](auto x) { return x == 0; });
}

/// A mask (b, n) whose b-th sequence has lengths[b] real tokens, padded at the end.
inline HostTensor<bool, 2> mask_of_lengths(const Cpu& policy, const std::vector<Index>& lengths, Index longest) {
    HostTensor<bool, 2> mask(policy, {static_cast<Index>(lengths.size()), longest});
    for (Index b = 0; b < mask.extent(0); ++b)
        for (Index i = 0; i < longest; ++i) mask.view()(b, i) = i < lengths[static_cast<std::size_t>(b)];
    return mask;
}

/// The first `length` tokens of a batch, or the batch followed by tokens of other numbers up to `length`.
template <typename T>
TokensTensor<T, Cpu> resized(const Cpu& policy, const TokensTensor<T, Cpu>& tokens, Index length,
                             std::uint64_t stream = 1234) {
    auto out = normal<T>(policy, std::array<Index, 3>{tokens.extent(0), length, tokens.extent(2)}, stream);
    for (Index b = 0; b < tokens.extent(0); ++b)
        std::copy_n(tokens.const_view()[b].data(), std::min(length, tokens.extent(1)) * tokens.extent(2),
                    out.view()[b].data());
    return out;
}

// The pieces of the modules as plain loops over one token.

using Row = std::vector<double>;

inline Row row_of(const TokensTensor<double, Cpu>& x, Index b, Index i) {
    const double* const first = x.const_view()[b][i].data();
    return Row(first, first + x.extent(2));
}
inline Row evaluate(const colt5::Linear<double, Cpu>& linear, const Row& x) {
    Row y(static_cast<std::size_t>(linear.weight.extent(0)));
    for (std::size_t o = 0; o < y.size(); ++o) {
        y[o] = linear.bias ? linear.bias.data()[o] : 0;
        for (std::size_t i = 0; i < x.size(); ++i) y[o] += linear.weight.data()[o * x.size() + i] * x[i];
    }
    return y;
}
inline Row evaluate(const colt5::RMSNorm<double, Cpu>& norm, Row x) {
    double square = 0;
    for (const double v : x) square += v * v;
    for (std::size_t i = 0; i < x.size(); ++i)
        x[i] *= std::sqrt(static_cast<double>(x.size())) / std::max(std::sqrt(square), 1e-12) * norm.gamma.data()[i];
    return x;
}
inline Row evaluate(const colt5::LayerNorm<double, Cpu>& norm, Row x) {
    double mean = 0, variance = 0;
    for (const double v : x) mean += v / static_cast<double>(x.size());
    for (const double v : x) variance += (v - mean) * (v - mean) / static_cast<double>(x.size());
    for (std::size_t i = 0; i < x.size(); ++i)
        x[i] = (x[i] - mean) / std::sqrt(variance + 1e-5) * norm.weight.data()[i] + norm.bias.data()[i];
    return x;
}
inline Row evaluate(const colt5::FeedForward<double, Cpu>& ff, const Row& x) {
    Row h = evaluate(ff.hidden, evaluate(ff.norm, x));
    for (double& v : h) v = 0.5 * v * (1 + std::erf(v / std::sqrt(2.0)));
    return evaluate(ff.project, h);
}

/// Attention of one head by its definition: q over the given keys and values, whose scales multiply the values.
inline Row attend(const Row& q, const std::vector<Row>& keys, const std::vector<Row>& values, const Row& scales) {
    Row out(q.size(), 0.0), weight(keys.size());
    double sum = 0;
    for (std::size_t j = 0; j < keys.size(); ++j) {
        double dot = 0;
        for (std::size_t e = 0; e < q.size(); ++e) dot += q[e] * keys[j][e];
        sum += weight[j] = std::exp(dot / std::sqrt(static_cast<double>(q.size())));
    }
    for (std::size_t j = 0; j < keys.size(); ++j)
        for (std::size_t e = 0; e < q.size(); ++e) out[e] += weight[j] / sum * scales[j] * values[j][e];
    return out;
}
inline Row part(const Row& x, Index first, Index count) {
    return Row(x.begin() + first, x.begin() + first + count);
}

/// Gradients of cross attention by finite differences: padding in x and context or none, queries routed or not.
template <typename Module>
void check_cross_gradients(const Cpu& policy, Module& module, Index dim) {
    auto x = normal<double>(policy, std::array<Index, 3>{2, 7, dim}, 0, 0.7);
    auto context = normal<double>(policy, std::array<Index, 3>{2, 9, dim}, 1, 0.7);
    const auto some = mask_of_lengths(policy, {7, 2}, 7), some_context = mask_of_lengths(policy, {0, 6}, 9);
    for (const bool masked : {false, true})
        for (const colt5::CrossAttentionCounts counts :
             {colt5::CrossAttentionCounts{}, colt5::CrossAttentionCounts{.num_tokens_q = 7, .num_tokens_kv = 9}}) {
            const Mask mask = masked ? some.const_view() : Mask(),
                       context_mask = masked ? some_context.const_view() : Mask();
            const auto d_out = normal<double>(policy, x.shape(), 99);
            const auto saved = module.forward(x, context, mask, context_mask, counts);
            CHECK(same_bits(saved.out, module(x, context, mask, context_mask, counts)));
            auto gradients = module.make_gradients();
            const auto d = module.backward(saved, d_out, gradients);
            const auto loss = [&] { return inner(d_out, module(x, context, mask, context_mask, counts)); };
            CHECK(gradient_error(d.d_x, finite_differences(policy, x, loss)) <= gradient_tolerance);
            CHECK(gradient_error(d.d_context, finite_differences(policy, context, loss)) <= gradient_tolerance);
            check_parameter_gradients(policy, module, gradients, loss);
        }
}

}  // namespace support
