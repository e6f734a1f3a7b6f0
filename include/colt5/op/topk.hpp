// SPDX-License-Identifier: MIT
#pragma once

#include <concepts>
#include <type_traits>
#include <utility>

#include <colt5/expr/expr.hpp>
#include <colt5/op/coordinate_descent.hpp>
#include <colt5/op/gather.hpp>
#include <colt5/op/top_k.hpp>

namespace colt5 {

/// Settings of topk, under the reference's names and with its defaults.
struct TopkOptions {
    double coor_descent_k_ratio = 9.0 / 8;  ///< the descent asks for this many times k
    int n_iters = 20;
    double eps = 0.1;
    double eps_init = 0;  ///< first ε of ε-scaling; 0: none
    double eps_decay = 1;

    CoordinateDescent descent() const {
        return {.n_iters = n_iters,
                .eps = eps,
                .eps_init = eps_init,
                .eps_decay = eps_decay,
                .start = DescentStart::minus_logits,
                .limit_k = true};
    }
};

/// What topk gives, each (b, r, min(k, n)), and what its vector-Jacobian product reads besides.
template <typename T, Policy P>
struct Topk {
    TokensTensor<T, P> values;  // the k largest of each row, in descending order
    Tensor<TokenIndex, P, dynamic, dynamic, dynamic> indices;
    TokensTensor<T, P> coor_descent_values;  // scores of the descent
    TokensTensor<T, P> gates;                // 1, with the gradient of the scores
    CoordinateDescentActivations<T, P> descent;
};

/// Differentiable top-k: the choice of top_k, with gates that are 1 and have the gradient of a soft top-k by coordinate
/// descent. The gradient of values = x · gates reaches the numbers that were not chosen, too.
///
///     x (b, r, n), mask (b, n) or absent  →  values, indices, coor_descent_values and gates (b, r, min(k, n))
///
/// Masked numbers are chosen only when fewer than k are real; then values, scores and gates are 0. Throws ValueError
/// for a number out of its range.
template <Policy P, Viewable X>
auto topk(const P& policy, const X& x, Index k, const TopkOptions& options = {}, Mask mask = {}) {
    using T = typename X::value_type;
    static_assert(std::floating_point<T>, "colt5: topk takes float or double");
    expect_value(options.coor_descent_k_ratio >= 1, "coor_descent_k_ratio", ">= 1", options.coor_descent_k_ratio);
    const auto numbers = TokensView<const T>(x);
    Topk<T, P> result;
    result.indices = top_k(policy, numbers, mask, k);
    result.descent = coordinate_descent_forward(policy, options.descent(),
                                                static_cast<double>(k) * options.coor_descent_k_ratio, numbers, mask);
    result.values = pick_scores<T>(policy, numbers, result.indices, mask);
    result.coor_descent_values = pick_scores<T>(policy, result.descent.scores.const_view(), result.indices, mask);
    result.gates = pick_scores<T>(policy, {}, result.indices, mask);
    return result;
}

/// Vector-Jacobian product of topk, with the k and the options of the call:
///
///     d_x = place(d_values) + (d scores / d x)ᵀ place(d_values · values + d_gates + d_coor_descent_values)
///
/// where place puts the chosen numbers' gradients where they came from. d_gates and d_coor_descent_values may be
/// absent. Returns d_x (b, r, n).
template <Policy P, typename T, Viewable D, Viewable X>
auto topk_vjp(const P& policy, const Topk<T, P>& saved, const D& d_values, const X& x, Index k,
              const TopkOptions& options = {}, Mask mask = {}, TokensView<const std::type_identity_t<T>> d_gates = {},
              TokensView<const std::type_identity_t<T>> d_coor_descent_values = {}) {
    const auto numbers = TokensView<const T>(x);
    expect_shape("d_values", d_values.shape(), saved.values.shape());
    auto d_scores = tensor_like(policy, saved.values);
    assign(policy, d_scores, d_values * saved.values);
    for (const auto& [name, more] : {std::pair{"d_gates", d_gates}, {"d_coor_descent_values", d_coor_descent_values}}) {
        if (!more) continue;
        expect_shape(name, more.shape(), saved.values.shape());
        assign(policy, d_scores, d_scores + more);
    }
    const auto d_all = place_scores(policy, d_scores, saved.indices, mask, numbers.extent(2));
    auto d_x = coordinate_descent_vjp(policy, options.descent(), static_cast<double>(k) * options.coor_descent_k_ratio,
                                      saved.descent, d_all, numbers, mask)
                   .d_logits;
    assign(policy, d_x, d_x + place_scores(policy, d_values, saved.indices, mask, numbers.extent(2)));
    return d_x;
}

}  // namespace colt5
