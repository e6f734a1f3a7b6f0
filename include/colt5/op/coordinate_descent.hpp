// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <vector>

#include <colt5/core/tensor.hpp>
#include <colt5/op/divisor.hpp>
#include <colt5/op/gather.hpp>

namespace colt5 {

template <typename P>
void coordinate_descent_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `coordinate_descent` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}
template <typename P>
void coordinate_descent_vjp_kernel(const P&, ...) {
    static_assert(
        has_kernel<P>,
        "colt5: no `coordinate_descent_vjp` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}

/// Where the descent begins.
enum class DescentStart {
    zero,          ///< at b = −relu(s), that is τ₀ = 0: colt5-attention 0.2.3
    minus_logits,  ///< at b = −s: later versions. The first step then gives τ₁ = ε₁ (log n_v − log k), without a
                   ///< gradient for the logits; τ₀ is stored as ∞
};

/// Soft top-k by coordinate descent (Wright 2015; Qian et al. 2022; CoLT5, Ainslie et al. 2023, section 3.1): scores in
/// [0, 1] that sum to about k: 1 at or above the threshold τ, exp((s − τ) / ε) below it.
///
/// The reference keeps a number a and a vector b per row. Because b = −relu(s + a), the sum s + b is min(s, −a): the
/// whole state is the threshold τ = −a. For one row with n_v real logits, step t is
///
///     Z = Σ_i exp(min(s_i, τ_{t−1}) / ε_t),   τ_t = ε_t (log Z − log k)
///
/// (with DescentStart::minus_logits, Z = n_v in step 1), and the scores are exp(min(s − τ_T, 0) / ε_{T+1}); masked
/// tokens and logits of −∞ score 0, and without a real token all do. A logit of +∞ is above every threshold: it scores
/// 1 and has no gradient. A NaN among the real logits of a row makes the scores and gradients of all its real tokens
/// NaN. Otherwise, where the k of a sample is 0 or less (see DescentK), all scores are 0, τ is ∞, and nothing has a
/// gradient.
struct CoordinateDescent {
    int n_iters = 50;
    /// Lower bound of ε, in [1e-6, 1e6]; the last ε is larger if n_iters steps of eps_decay do not reach it.
    double eps = 1;
    double eps_init = 0;   ///< the first ε is max(eps_init, eps)
    double eps_decay = 1;  ///< ε_{t+1} = max(ε_t · eps_decay, eps)
    DescentStart start = DescentStart::zero;
    /// Takes k to be at most the number of real tokens of the row; where that is less than k, k has no gradient.
    bool limit_k = false;
    /// Instead of n_iters steps, solves Σ scores = k for τ and differentiates the solution implicitly. A fixed number
    /// of steps leaves τ unconverged, and the router without a gradient, when the logits spread widely (standard
    /// deviation ≫ ε).
    bool iterate_to_convergence = false;

    void check() const {
        expect_value(n_iters >= 1, "n_iters", ">= 1", n_iters);
        expect_divisor("eps", eps);
        expect_value(eps_init >= 0 && eps_init <= largest_divisor, "eps_init", "in [0, 1e6]", eps_init);
        expect_value(eps_decay > 0 && eps_decay <= 1, "eps_decay", "in (0, 1]", eps_decay);
    }
    /// ε of step t = 1 … n_iters + 1, the last one being that of the scores.
    COLT5_HOST_DEVICE double step_eps(int t) const {
        if (iterate_to_convergence) return eps;
        double current = first_eps();
        for (int i = 1; i < t; ++i) {
            const double next = next_eps(current);
            if (next == current) break;
            current = next;
        }
        return current;
    }
    COLT5_HOST_DEVICE double first_eps() const { return eps_init > eps ? eps_init : eps; }
    COLT5_HOST_DEVICE double next_eps(double current) const {
        const double decayed = current * eps_decay;
        return decayed > eps ? decayed : eps;
    }
    Index steps() const { return iterate_to_convergence ? 1 : n_iters; }
};

/// The scores, and what else the vector-Jacobian product reads: 2T + 1 numbers a row, T = steps(). Of a converged
/// solution, T is 1, τ_0 = τ_1 is the solution and the count is 0.
template <typename Logit, Policy P>
struct CoordinateDescentActivations {
    Tensor<Logit, P, dynamic, dynamic, dynamic> scores;     // (b, r, n)
    Tensor<Logit, P, dynamic, dynamic, dynamic> threshold;  // (b, r, T + 1): τ_0 … τ_T
    Tensor<Logit, P, dynamic, dynamic, dynamic> saturated;  // (b, r, T): number of logits above τ_{t−1}
};

template <typename Logit, Policy P>
struct CoordinateDescentGradients {
    Tensor<Logit, P, dynamic, dynamic, dynamic> d_logits;  // (b, r, n)
    Tensor<Logit, P, dynamic, dynamic> d_k;                // (b, r)
};

/// The k of a descent: `all` for all samples, or with `of_sample` factor · of_sample[b], at most `most`. Then `all` is
/// an upper bound, and the only number that is checked.
struct DescentK {
    double all;
    const TokenIndex* of_sample = nullptr;
    double factor = 1;
    double most = 1e30;

    DescentK(double k) : all(k) {}  // NOLINT: converts
    DescentK(const SampleCount& count, double times)
        : all(static_cast<double>(count.all) * times), of_sample(count.of_sample), factor(times) {}
    /// All become at most this.
    void limit(double to) {
        most = to;
        all = std::min(all, to);
    }
    COLT5_HOST_DEVICE double operator()(Index sample) const {
        if (of_sample == nullptr) return all;
        const double k = static_cast<double>(of_sample[sample]) * factor;
        return k < most ? k : most;
    }
};

namespace detail {
inline void expect_k(double k) {
    expect_value(k > 0, "k", "> 0", k);
    expect_value(k >= 1e-6 && k <= 1e30, "k", "in [1e-6, 1e30]", k);
}
}  // namespace detail

/// logits (b, r, n), mask (b, n) or absent  →  scores (b, r, n).  Throws ValueError for a number out of its range: k
/// must be in [1e-6, 1e30].
template <Policy P, Viewable L>
auto coordinate_descent_forward(const P& policy, const CoordinateDescent& descent, DescentK k, const L& logits,
                                Mask mask) {
    const auto [batch, routes, length] = logits.shape();
    descent.check();
    detail::expect_k(k.all);
    if (mask) expect_shape("mask", mask.shape(), {batch, length});
    CoordinateDescentActivations<typename L::value_type, P> saved{{policy, logits.shape()},
                                                                  {policy, {batch, routes, descent.steps() + 1}},
                                                                  {policy, {batch, routes, descent.steps()}}};
    coordinate_descent_kernel(policy, saved.scores.view(), saved.threshold.view(), saved.saturated.view(),
                              logits.const_view(), mask, k, descent);
    return saved;
}

/// Vector-Jacobian product. With g = d_scores, y the scores, ĝ_i = [s_i ≤ τ_T] g_i y_i / ε_{T+1} and α_T = Σ ĝ:
///
///     α_{t−1} = α_t · saturated_t · exp((τ_{t−1} − τ_t) / ε_t) / k
///     ds_i = ĝ_i − Σ_t [s_i ≤ τ_{t−1}] (α_t / k) exp((s_i − τ_t) / ε_t),    dk = (1 / k) Σ_t ε_t α_t
///
/// With DescentStart::minus_logits the sum of ds_i begins at t = 2.
///
/// And for the converged solution, with Y = Σ [s_i ≤ τ] y_i:  ds_i = ĝ_i − [s_i ≤ τ] α y_i / Y,  dk = ε α / Y.
/// Throws ShapeError unless the saved activations are of these logits and of as many steps.
template <Policy P, typename Logit, Viewable D, Viewable L>
auto coordinate_descent_vjp(const P& policy, const CoordinateDescent& descent, DescentK k,
                            const CoordinateDescentActivations<Logit, P>& saved, const D& d_scores, const L& logits,
                            Mask mask) {
    const auto [batch, routes, length] = logits.shape();
    descent.check();
    detail::expect_k(k.all);
    static_assert(same_scalar<decltype(saved.scores), D, L>,
                  "colt5: `d_scores` and `logits` must have the scalar type of `saved`");
    expect_shape("logits", logits.shape(), saved.scores.shape());
    expect_shape("saved.threshold", saved.threshold.shape(), {batch, routes, descent.steps() + 1});
    expect_shape("saved.saturated", saved.saturated.shape(), {batch, routes, descent.steps()});
    expect_shape("d_scores", d_scores.shape(), logits.shape());
    if (mask) expect_shape("mask", mask.shape(), {batch, length});
    CoordinateDescentGradients<Logit, P> d{{policy, logits.shape()}, {policy, {batch, routes}}};
    coordinate_descent_vjp_kernel(policy, d.d_logits.view(), d.d_k.view(), d_scores.const_view(),
                                  saved.scores.const_view(), saved.threshold.const_view(), saved.saturated.const_view(),
                                  logits.const_view(), mask, k, descent);
    return d;
}

}  // namespace colt5
