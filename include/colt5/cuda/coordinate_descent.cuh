// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <limits>

#include <colt5/cuda/grid_team.cuh>
#include <colt5/cuda/masked_row.cuh>
#include <colt5/cuda/top_k.cuh>
#include <colt5/cuda/zero.cuh>
#include <colt5/op/coordinate_descent.hpp>

namespace colt5 {

namespace cuda {

/// exp(x) for x ≤ 0. In float, the error is at most 2 + 1.2 |x| ULP of the result. The threshold gets ε times the
/// relative error of a sum of such terms. In `descend` a sum is at least 1, and its relative error about 1e-7. In
/// `solve_threshold` the sums approach k − (number of saturated logits), which is small for some fractional k. Then all
/// terms are small, and the relative error is theirs, which grows slowly: about 1e-6 for terms of 1e-3.
__device__ inline float exp_of_term(float x) {
    return __expf(x);
}
__device__ inline double exp_of_term(double x) {
    return ::exp(x);
}

/// The next threshold, the number of logits above the previous one, and what the threshold has lost by rounding (0 if
/// nobody asks). Threads read it at once, hence the alignment.
template <typename T>
struct alignas(4 * sizeof(T)) ThresholdStep {
    T threshold, saturated, rest;
};

/// Reads the row once and returns then({Σ over s ≤ τ of exp((s − shift) / ε), number of s > τ}).
template <typename Team, typename T, typename Then>
__device__ ThresholdStep<T> threshold_step(MaskedRow<Team, T>& row, T threshold, T shift, T inverse_eps, Then&& then) {
    T below = 0;
    unsigned above = 0;
    const auto count = static_cast<int>(row.team.count);
#pragma unroll 4
    for (int i = static_cast<int>(threadIdx.x); i < count; i += Team::threads) {
        const T s = row[i], e = exp_of_term((::min(s, threshold) - shift) * inverse_eps);
        below += s > threshold ? T(0) : e;
        above += s > threshold ? 1 : 0;
    }
    return row.team.combine(below, above, 0, Plus(), then);
}

/// Runs the iterations of one row. Writes τ_0 … τ_T, and the number of saturated logits of each iteration. Returns τ_T,
/// and in `eps` the ε of the scores. `has_rest` is whether descent.start is minus_logits: then saturated logits count
/// with τ before its rounding.
template <bool has_rest, typename Team, typename T>
__device__ T descend(MaskedRow<Team, T>& row, double k, const CoordinateDescent& descent, T* threshold, T* saturated,
                     double& eps) {
    const bool writes = threadIdx.x == 0 && row.team.rank() == 0;
    const double inverse_k = 1 / k;
    eps = descent.first_eps();
    T tau = 0;
    int t = 1;
    if constexpr (has_rest) {
        tau = static_cast<T>(eps * ::log(row.valid * inverse_k));
        if (writes) {
            threshold[0] = row.infinity;
            threshold[1] = tau;
            saturated[0] = 0;
        }
        eps = descent.next_eps(eps);
        t = 2;
    } else if (writes) {
        threshold[0] = tau;
    }
    T inverse_eps = static_cast<T>(1 / eps);
    bool eps_is_last = false;  // all later iterations have the same ε
    T rest = 0;                // of τ_{t−1}
    for (; t <= descent.n_iters; ++t) {
        const T shift = ::min(row.largest, tau);  // the largest of min(s, τ)
        const auto step = threshold_step(row, tau, shift, inverse_eps, [&](const Partial& sums) {
            double exponentials = sums.value + sums.count;
            if constexpr (has_rest) exponentials += sums.count * ::expm1(static_cast<double>(rest) / eps);
            const T log_ratio = ::log(static_cast<T>(exponentials * inverse_k));
            const double next = static_cast<double>(shift) + eps * static_cast<double>(log_ratio);
            ThresholdStep<T> result{static_cast<T>(next), static_cast<T>(sums.count), T(0)};
            if constexpr (has_rest) result.rest = static_cast<T>(next - static_cast<double>(result.threshold));
            return result;
        });
        const bool repeats = step.threshold == tau && step.rest == rest;
        tau = step.threshold;
        rest = step.rest;
        if (writes) {
            threshold[t] = tau;
            saturated[t - 1] = step.saturated;
        }
        if (!eps_is_last) {
            const double next_eps = descent.next_eps(eps);
            eps_is_last = next_eps == eps;
            eps = next_eps;
            inverse_eps = static_cast<T>(1 / eps);
        }
        if (repeats && eps_is_last) {  // all later iterations would repeat this one
            if (row.team.rank() == 0)
                for (int later = t + static_cast<int>(threadIdx.x); later < descent.n_iters; later += Team::threads) {
                    threshold[later + 1] = tau;
                    saturated[later] = step.saturated;
                }
            break;
        }
    }
    return tau;
}

/// τ with Σ min(1, exp((s − τ) / ε)) = k: starts at the ⌈k⌉-th largest logit and alternates between counting the
/// saturated logits and solving for τ with that count; −∞ when k is not less than the number of logits above −∞.
template <typename Team, typename T>
__device__ T solve_threshold(MaskedRow<Team, T>& row, Index length, double k, double eps) {
    if (k >= row.valid) return -row.infinity;
    using Key = typename Rank<T>::Key;
    const auto selection = select_smallest<Key>(row.team, Rank<T>::bits, length, static_cast<Index>(::ceil(k)),
                                                [&](Index i) { return Key{Rank<T>::of(row[i])}; });
    T least = row.infinity;  // the ⌈k⌉-th largest logit: select_smallest may stop before the last digits
    unsigned candidates = 0;
    for (Index i = threadIdx.x; i < row.team.count; i += Team::threads) {
        if (selection(Key{Rank<T>::of(row[i])})) least = ::min(least, row[i]);
        candidates += row[i] > -row.infinity ? 1 : 0;
    }
    const Partial all = row.team.combine(least, candidates, row.infinity, Smaller());
    if (k >= all.count) return -row.infinity;
    T threshold = ::min(static_cast<T>(all.value), std::numeric_limits<T>::max());
    const T inverse_eps = static_cast<T>(1 / eps);
    for (int i = 0; i < 100; ++i) {
        const auto step = threshold_step(row, threshold, threshold, inverse_eps, [&](const Partial& sums) {
            const T log_ratio = ::log(static_cast<T>(sums.value / (k - sums.count)));
            return ThresholdStep<T>{
                static_cast<T>(static_cast<double>(threshold) + eps * static_cast<double>(log_ratio)),
                static_cast<T>(sums.count), T(0)};
        });
        // From the second step on τ decreases. Once rounding makes it increase, it has converged.
        if (step.threshold == threshold || !(k > static_cast<double>(step.saturated)) ||
            (i > 0 && step.threshold > threshold))
            break;
        threshold = step.threshold;
    }
    return threshold;
}

template <typename Team, typename T>
__global__ void __launch_bounds__(Team::threads)
    coordinate_descent(TeamBarrier barrier, RowSplit split, T* scores, T* thresholds, T* saturated, const T* logits,
                       const bool* mask, Index routes, int steps, DescentK k_of_sample, CoordinateDescent descent) {
    MaskedRow<Team, T> row(barrier, split, logits, mask, routes);
    auto& team = row.team;
    T* const y = scores + team.row * split.length + team.begin;
    T *const tau = thresholds + team.row * (steps + 1), *const count = saturated + team.row * steps;
    if (row.has_nan()) {
        for (Index i = threadIdx.x; i < team.count; i += Team::threads) y[i] = nan_if<T>(row.is_real(i));
        if (team.rank() == 0)
            for (int t = static_cast<int>(threadIdx.x); t <= steps; t += Team::threads) {
                tau[t] = nan_if<T>(true);
                if (t < steps) count[t] = nan_if<T>(true);
            }
        return;
    }
    double k = k_of_sample(quotient(team.row, routes));
    if (row.largest == -row.infinity || k <= 0) {  // no real token, or all logits are −∞; or none is wanted
        for (Index i = threadIdx.x; i < team.count; i += Team::threads) y[i] = 0;
        if (team.rank() == 0)
            for (int t = static_cast<int>(threadIdx.x); t <= steps; t += Team::threads) {
                tau[t] = row.largest == -row.infinity ? T(0) : row.infinity;
                if (t < steps) count[t] = 0;
            }
        return;
    }
    if (descent.limit_k) k = ::min(k, row.valid);
    double eps = descent.eps;
    T last;
    if (descent.iterate_to_convergence) {
        last = solve_threshold(row, split.length, k, eps);
        if (threadIdx.x == 0 && team.rank() == 0) {
            tau[0] = tau[1] = last;
            count[0] = 0;
        }
    } else {
        last = descent.start == DescentStart::minus_logits ? descend<true>(row, k, descent, tau, count, eps)
                                                           : descend<false>(row, k, descent, tau, count, eps);
    }
    const T inverse_eps = static_cast<T>(1 / eps);
    for (Index i = threadIdx.x; i < team.count; i += Team::threads) {
        const T s = row[i];
        y[i] = s == -row.infinity ? T(0) : ::exp(::min(s - last, T(0)) * inverse_eps);
    }
}

}  // namespace cuda

/// One team of blocks for each row. It keeps the row in shared memory if it fits, and exchanges a sum and a count in
/// each iteration.
template <typename T>
void coordinate_descent_kernel(const Cuda& policy, TokensView<T> scores, TokensView<T> threshold,
                               TokensView<T> saturated, TokensView<const T> logits, Mask mask, DescentK k,
                               const CoordinateDescent& descent) {
    if (logits.size() == 0) {
        zero_kernel(policy, VectorView<T>(threshold.data(), {threshold.size()}));
        return zero_kernel(policy, VectorView<T>(saturated.data(), {saturated.size()}));
    }
    cuda::launch_teams<T>(policy, "coordinate_descent", cuda::coordinate_descent<cuda::ClusterTeam, T>,
                          cuda::coordinate_descent<cuda::GridTeam, T>, logits.extent(0) * logits.extent(1),
                          logits.extent(2), scores.data(), threshold.data(), saturated.data(), logits.data(),
                          mask.data(), logits.extent(1), static_cast<int>(saturated.extent(2)), k, descent);
}

}  // namespace colt5
