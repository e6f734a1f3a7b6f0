// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <string>
#include <type_traits>
#include <utility>

#include <colt5/core/parameters.hpp>
#include <colt5/core/random.hpp>
#include <colt5/expr/expr.hpp>
#include <colt5/op/layer_norm.hpp>
#include <colt5/op/linear.hpp>
#include <colt5/op/relative_position_bias.hpp>
#include <colt5/op/rms_norm.hpp>
#include <colt5/op/zero.hpp>

namespace colt5 {

/// Parameters and gradients
///
/// A module's parameters are public members. `each_parameter` gives them the names of the reference's state_dict. Its
/// Gradients have the same members, so that `Module::each_parameter(f, prefix, m...)` can visit any number of modules
/// and Gradients side by side and calls f(prefix + name, tensor...). Backward passes add to the gradients of
/// parameters, which are float where the module is bfloat16 or float16, and assign those of inputs.

namespace detail {
template <Policy P>
auto make_zeros(const P& policy) {
    return EachTensor{[&policy]<typename Zero>(const auto& value, Zero& zero) {
        zero = Zero(policy, value.shape());
        set_zero(policy, zero);
    }};
}
}  // namespace detail

/// Gradients of a module, or anything else with its parameters' shapes, filled with zeros.
template <typename Module, Policy P>
typename Module::Gradients zeros_like_parameters(const P& policy, const Module& module) {
    typename Module::Gradients zeros;
    const auto make = detail::make_zeros(policy);
    Module::each_parameter(make, "", module, zeros);
    return zeros;
}

/// to = from, parameters and state. Either is a module, or something of its structure, such as the float Gradients of a
/// module of 16 bits; name the module if `from` is none: copy_parameters<Block>(policy, block, averages). Throws before
/// anything has changed if their shapes differ.
template <typename Module = void, Policy P, typename To, typename From>
void copy_parameters(const P& policy, To& to, const From& from) {
    using Of = std::conditional_t<std::is_void_v<Module>, From, Module>;
    expect_like<Of>("to", from, to);
    const auto copy = [&]<typename Value>(const std::string&, Value& value, const auto& other) {
        assign(policy, value, cast<accumulate_t<typename Value::value_type>>(other));
    };
    Of::each_parameter(
        StateVisitor{copy, [](const std::string&, auto& number, const auto& other) { number = other; }, copy}, "", to,
        from);
}

/// Another module with the same parameters and state, such as for a moving average of them.
template <typename Module, Policy P>
Module clone(const P& policy, const Module& module) {
    Module copy(policy);
    copy_parameters(policy, copy, module);
    return copy;
}

/// Number of parameters of a module.
template <typename Module>
Index count_parameters(const Module& of) {
    Index count = 0;
    Module::each_parameter(EachTensor{[&](const auto& value) { count += value.size(); }}, "", of);
    return count;
}

namespace detail {
/// Whether a · b is at least 1 and at most 2^40: no size that is made of it overflows.
constexpr bool is_width(Index a, Index b) {
    return a >= 1 && b >= 1 && a <= (Index{1} << 40) / b;
}

/// heads · dim_head. Throws ValueError when it is no width.
inline Index expect_heads(Index heads, Index dim_head) {
    expect_value(heads >= 1, "heads", ">= 1", heads);
    expect_value(dim_head >= 1, "dim_head", ">= 1", dim_head);
    expect_value(is_width(heads, dim_head), "heads", "at most 2^40 / dim_head", heads);
    return heads * dim_head;
}
}  // namespace detail

/// y = x · weightᵀ + bias, initialized as torch.nn.Linear.
template <typename Scalar, Policy P>
struct Linear {
    using Gradients = Linear<accumulate_t<Scalar>, P>;
    MatrixTensor<Scalar, P> weight;  // (out, in)
    VectorTensor<Scalar, P> bias;    // (out), or empty

    Linear() = default;
    Linear(const P& policy, SeedSequence& seeds, Index in, Index out, bool with_bias) : weight(policy, {out, in}) {
        fill_linear_uniform(policy, weight, seeds.next(), in);
        if (!with_bias) return;
        bias = {policy, {out}};
        fill_linear_uniform(policy, bias, seeds.next(), in);
    }

    template <Viewable Y, Viewable X>
    void operator()(const P& policy, const Y& y, const X& x, TokensView<const Scalar> add = {}) const {
        linear(policy, y, x, weight, bias.const_view(), add);
    }
    template <Viewable X>
    auto operator()(const P& policy, const X& x) const {
        return linear(policy, x, weight, bias.const_view());
    }
    /// An x that is handed over, with std::move or as a temporary, gives its memory to the result.
    template <Viewable D, typename X>
    auto backward(const P& policy, const D& d_y, X&& x, Gradients& gradients) const {
        return linear_vjp(policy, d_y, std::forward<X>(x), weight, gradients.weight.view(), gradients.bias.view());
    }

    template <typename F, typename... M>
    static void each_parameter(F&& f, const std::string& prefix, M&... m) {
        f(name_for<F>(prefix, "weight"), m.weight...);
        if (first_of(m...).bias) f(name_for<F>(prefix, "bias"), m.bias...);
    }
};

/// x / max(‖x‖, 1e-12) · √d · gamma
template <typename Scalar, Policy P>
struct RMSNorm {
    using Gradients = RMSNorm<accumulate_t<Scalar>, P>;
    template <typename T>
    using Parameters = RMSNormParameters<T>;
    VectorTensor<Scalar, P> gamma;  // (d)

    RMSNorm() = default;
    RMSNorm(const P& policy, Index dim) : gamma(policy, {dim}) { fill(policy, gamma, 1); }

    /// As operations take them that contain a norm.
    Parameters<const Scalar> parameters() const { return {gamma.const_view()}; }
    Parameters<Scalar> parameters() { return {gamma.view()}; }

    template <Viewable X>
    auto operator()(const P& policy, const X& x) const {
        return rms_norm(policy, x, gamma);
    }
    template <Viewable DX, Viewable D, Viewable X>
    void backward(const P& policy, const DX& d_x, const D& d_y, const X& x, Gradients& gradients) const {
        rms_norm_vjp(policy, d_x, d_y, x, gamma, gradients.gamma.view());
    }
    template <Viewable D, Viewable X>
    auto backward(const P& policy, const D& d_y, const X& x, Gradients& gradients) const {
        return rms_norm_vjp(policy, d_y, x, gamma, gradients.gamma.view());
    }

    template <typename F, typename... M>
    static void each_parameter(F&& f, const std::string& prefix, M&... m) {
        f(name_for<F>(prefix, "gamma"), m.gamma...);
    }
};

/// T5's table of a bias of the logits by relative position (see op/relative_position_bias.hpp), under its name there
/// and initialized as there: normal, with deviation 1 / √dim.
template <typename Scalar, Policy P>
struct RelativeAttentionBias {
    using Gradients = RelativeAttentionBias<accumulate_t<Scalar>, P>;
    MatrixTensor<Scalar, P> weight;  // (num_buckets, h)

    RelativeAttentionBias() = default;
    RelativeAttentionBias(const P& policy, SeedSequence& seeds, const RelativePositionBuckets& buckets, Index heads,
                          Index dim)
        : weight(policy, {buckets.num_buckets, heads}) {
        fill_normal(policy, weight, seeds.next(), 1.0 / std::sqrt(static_cast<double>(dim)));
    }

    template <typename F, typename... M>
    static void each_parameter(F&& f, const std::string& prefix, M&... m) {
        f(name_for<F>(prefix, "weight"), m.weight...);
    }
};

/// (x − μ) / √(σ² + 1e-5) · weight + bias
template <typename Scalar, Policy P>
struct LayerNorm {
    using Gradients = LayerNorm<accumulate_t<Scalar>, P>;
    template <typename T>
    using Parameters = LayerNormParameters<T>;
    VectorTensor<Scalar, P> weight, bias;  // (d)

    LayerNorm() = default;
    LayerNorm(const P& policy, Index dim) : weight(policy, {dim}), bias(policy, {dim}) {
        fill(policy, weight, 1);
        fill(policy, bias, 0);
    }

    Parameters<const Scalar> parameters() const { return {weight.const_view(), bias.const_view()}; }
    Parameters<Scalar> parameters() { return {weight.view(), bias.view()}; }

    template <Viewable X>
    auto operator()(const P& policy, const X& x) const {
        return layer_norm(policy, x, weight, bias);
    }
    template <Viewable DX, Viewable D, Viewable X>
    void backward(const P& policy, const DX& d_x, const D& d_y, const X& x, Gradients& gradients) const {
        layer_norm_vjp(policy, d_x, d_y, x, weight, gradients.weight.view(), gradients.bias.view());
    }
    template <Viewable D, Viewable X>
    auto backward(const P& policy, const D& d_y, const X& x, Gradients& gradients) const {
        return layer_norm_vjp(policy, d_y, x, weight, gradients.weight.view(), gradients.bias.view());
    }

    template <typename F, typename... M>
    static void each_parameter(F&& f, const std::string& prefix, M&... m) {
        f(name_for<F>(prefix, "weight"), m.weight...);
        f(name_for<F>(prefix, "bias"), m.bias...);
    }
};

}  // namespace colt5
