// SPDX-License-Identifier: MIT
#pragma once

#include <limits>

#include <colt5/cuda/grid_team.cuh>
#include <colt5/cuda/kernel.cuh>
#include <colt5/cuda/masked_row.cuh>
#include <colt5/cuda/zero.cuh>
#include <colt5/op/coordinate_descent.hpp>

namespace colt5 {

namespace cuda {

/// One iteration's term in the gradient of a logit s: −coefficient · exp((s − after) / ε) if s ≤ before, where before
/// is τ_{t−1} and after is τ_t.
template <typename T>
struct DescentStep {
    T before, after, inverse_eps, coefficient;
};

/// The operands of the vector-Jacobian product in one row.
template <typename T>
struct DescentVjpRow {
    const T *logit, *score, *d_score;
    const bool* real;  // or null
    T last, inverse_eps;

    /// Whether a real logit is NaN.
    __device__ bool has_nan() const { return last != last; }
    __device__ T s(Index i) const { return !real || real[i] ? logit[i] : -std::numeric_limits<T>::infinity(); }
    /// ĝ = d_score · score / ε, the gradient with τ held constant; 0 for saturated logits.
    __device__ T below(Index i, T s) const {
        return s <= last && s > -std::numeric_limits<T>::infinity() ? d_score[i] * score[i] * inverse_eps : T(0);
    }
};

template <typename T>
struct DescentVjp {
    const T *d_scores, *scores, *thresholds, *saturated, *logits;
    const bool* mask;
    Index routes, length;
    int steps;
    T inverse_eps;  // 1 / ε of the scores

    __device__ DescentVjpRow<T> row(Index row) const {
        return {logits + row * length,
                scores + row * length,
                d_scores + row * length,
                RowMask(mask, row, routes, length).data(),
                thresholds[row * (steps + 1) + steps],
                inverse_eps};
    }
};

/// The number of a row's distinct steps, and all of them as one step: `together` gives the same sum for logits
/// s ≤ together.before, to which every step applies. If steps differ in ε, together.before is −∞, and the steps are
/// summed one by one.
template <typename T>
struct DescentSteps {
    int distinct;
    DescentStep<T> together;
};

/// Writes the steps of one row, from the last iteration to the first, and returns their number; k_gradient becomes dk.
/// Iterations that repeat the one after them are added to its step; those with coefficient 0 are left out. One warp
/// calls it; each lane has one of 32 iterations at a time.
template <typename T>
__device__ int collect_steps(DescentStep<T>* steps, double& k_gradient, double alpha, double k, const T* tau,
                             const T* saturated, int count, const CoordinateDescent& descent) {
    constexpr unsigned all_lanes = 0xffffffffu;
    const int lane = static_cast<int>(threadIdx.x);
    const double inverse_k = 1 / k;
    int distinct = 0;
    double open = 0;  // the coefficient so far of the last step, which may continue with the next iterations
    for (int last = count; last > 0 && alpha != 0; last -= warp_size) {
        const int t = last - lane;
        double eps = 1, product = 1;
        T inverse_eps = 0;
        bool repeats = false;
        if (t > 0) {
            eps = descent.step_eps(t);
            inverse_eps = static_cast<T>(1 / eps);
            const double before = tau[t - 1], after = tau[t], above = saturated[t - 1];
            // if no logit is saturated, the exponential may overflow
            product = above == 0 ? 0 : above * inverse_k * ::exp((before - after) / eps);
            repeats = t < count && before == after && tau[t] == tau[t + 1] && descent.step_eps(t + 1) == eps;
        }
        product = warp_inclusive_scan(product, [](double a, double b) { return a * b; });
        const double factor = __shfl_up_sync(all_lanes, product, 1);
        const double mine = t > 0 ? (lane == 0 ? alpha : alpha * factor) * inverse_k : 0;  // α_t / k
        alpha *= __shfl_sync(all_lanes, product, warp_size - 1);
        k_gradient += warp_sum(eps * mine);

        const bool takes = mine != 0 && !(t == 1 && descent.start == DescentStart::minus_logits);
        const unsigned taking = __ballot_sync(all_lanes, takes);
        const unsigned starts = __ballot_sync(all_lanes, takes && !repeats), up_to_here = all_lanes >> (31 - lane);
        const int first =
            31 - __clz(static_cast<int>(starts & up_to_here));  // the lane where the step starts; −1: earlier
        double sum = takes ? mine : 0;
        for (int offset = 1; offset < warp_size; offset *= 2) {
            const double other = __shfl_up_sync(all_lanes, sum, offset);
            if (lane - offset >= ::max(first, 0)) sum += other;
        }
        if (first < 0) sum += open;
        const bool ends = takes && (lane == warp_size - 1 || ((starts | ~taking) >> (lane + 1) & 1) != 0);
        const int place = distinct + __popc(starts & up_to_here) - 1;
        if (ends) steps[place] = {tau[t - 1], tau[t], inverse_eps, static_cast<T>(sum)};
        __syncwarp();  // a step that continues with the next 32 iterations is written again, by another lane
        distinct += __popc(starts);
        open = __shfl_sync(all_lanes, sum, warp_size - 1);
    }
    return distinct;
}

/// The steps of a row as one: see DescentSteps::together.
template <typename T>
__device__ DescentStep<T> all_together(const DescentStep<T>* steps, int distinct, bool same_eps) {
    constexpr T infinity = std::numeric_limits<T>::infinity();
    if (distinct == 0 || !same_eps) return {-infinity, T(0), T(1), T(0)};
    T before = infinity, after = infinity;
    for (int t = static_cast<int>(threadIdx.x); t < distinct; t += warp_size) {
        before = Smaller()(before, steps[t].before);
        after = Smaller()(after, steps[t].after);
    }
    before = warp_reduce(before, Smaller());
    after = warp_reduce(after, Smaller());
    double sum = 0;
    for (int t = static_cast<int>(threadIdx.x); t < distinct; t += warp_size)
        sum += static_cast<double>(steps[t].coefficient * ::exp((after - steps[t].after) * steps[t].inverse_eps));
    return {before, after, steps[0].inverse_eps, static_cast<T>(warp_sum(sum))};
}

/// Computes the steps of one row, and dk. The team sums ĝ, then one warp computes the rest.
template <typename Team, typename T>
__global__ void __launch_bounds__(Team::threads)
    descent_vjp_steps(TeamBarrier barrier, RowSplit split, DescentStep<T>* all_steps, DescentSteps<T>* steps_of_row,
                      T* d_k, DescentVjp<T> vjp, DescentK k_of_sample, CoordinateDescent descent) {
    Team team(barrier, split);
    const auto values = vjp.row(team.row);
    T alpha_of_thread = 0, unsaturated_of_thread = 0;
    unsigned valid_of_thread = 0;
    for (Index i = team.begin + threadIdx.x; i < team.begin + team.count; i += Team::threads) {
        const T s = values.s(i);
        alpha_of_thread += values.below(i, s);
        if (descent.iterate_to_convergence) unsaturated_of_thread += s <= values.last ? values.score[i] : T(0);
        valid_of_thread += !values.real || values.real[i] ? 1 : 0;
    }
    const auto [alpha, valid] = team.combine(alpha_of_thread, valid_of_thread, 0, Plus());
    const double unsaturated =
        descent.iterate_to_convergence ? team.combine(unsaturated_of_thread, 0, 0, Plus()).value : 0;
    if (team.rank() != 0 || threadIdx.x >= warp_size) return;
    if (values.has_nan()) {
        if (threadIdx.x == 0) {
            d_k[team.row] = nan_if<T>(true);
            steps_of_row[team.row] = {};
        }
        return;
    }

    const double wanted = k_of_sample(quotient(team.row, vjp.routes));
    const double k = descent.limit_k ? ::min(wanted, valid) : wanted;
    const T* const tau = vjp.thresholds + team.row * (vjp.steps + 1);
    const T* const saturated = vjp.saturated + team.row * vjp.steps;
    DescentStep<T>* const step = all_steps + team.row * vjp.steps;
    int distinct = 0;
    double k_gradient = 0;
    if (descent.iterate_to_convergence) {
        if (unsaturated > 0) {
            k_gradient = descent.eps * alpha / unsaturated;
            step[0] = {tau[1], tau[1], static_cast<T>(1 / descent.eps), static_cast<T>(alpha / unsaturated)};
            distinct = 1;
        }
    } else {
        distinct = collect_steps(step, k_gradient, alpha, k, tau, saturated, vjp.steps, descent);
    }
    __syncwarp();
    const bool same_eps = descent.step_eps(vjp.steps) == descent.step_eps(1);
    const auto together = all_together(step, distinct, same_eps);
    if (threadIdx.x != 0) return;
    d_k[team.row] = k < wanted ? T(0) : static_cast<T>(k_gradient);
    steps_of_row[team.row] = {distinct, together};
}

inline constexpr int descent_vjp_threads = 256;  // one logit each

template <typename T>
__global__ void descent_vjp_logits(T* d_logits, const DescentStep<T>* all_steps, const DescentSteps<T>* steps_of_row,
                                   DescentVjp<T> vjp) {
    const RowBlock at(divide_up(vjp.length, descent_vjp_threads));
    const Index row = at.row, i = static_cast<Index>(at.block) * descent_vjp_threads + threadIdx.x;
    if (i >= vjp.length) return;
    const auto values = vjp.row(row);
    const DescentStep<T>* const steps = all_steps + row * vjp.steps;
    const auto [distinct, together] = steps_of_row[row];
    if (values.has_nan()) {
        d_logits[row * vjp.length + i] = nan_if<T>(!values.real || values.real[i]);
        return;
    }
    const T s = values.s(i);
    T sum = values.below(i, s);
    if (s <= together.before)
        sum -= together.coefficient * ::exp((s - together.after) * together.inverse_eps);
    else
        for (int t = 0; t < distinct; ++t) {
            const DescentStep<T> step = steps[t];
            if (s <= step.before) sum -= step.coefficient * ::exp((s - step.after) * step.inverse_eps);
        }
    d_logits[row * vjp.length + i] = sum;
}

}  // namespace cuda

template <typename T>
void coordinate_descent_vjp_kernel(const Cuda& policy, TokensView<T> d_logits, MatrixView<T> d_k,
                                   TokensView<const T> d_scores, TokensView<const T> scores,
                                   TokensView<const T> threshold, TokensView<const T> saturated,
                                   TokensView<const T> logits, Mask mask, DescentK wanted,
                                   const CoordinateDescent& descent) {
    const Index routes = logits.extent(1), length = logits.extent(2), rows = logits.extent(0) * routes;
    const auto steps = static_cast<int>(saturated.extent(2));
    const cuda::DescentVjp<T> vjp{d_scores.data(),
                                  scores.data(),
                                  threshold.data(),
                                  saturated.data(),
                                  logits.data(),
                                  mask.data(),
                                  routes,
                                  length,
                                  steps,
                                  static_cast<T>(1 / descent.step_eps(steps + 1))};
    if (length == 0) return zero_kernel(policy, VectorView<T>(d_k.data(), {rows}));
    VectorTensor<cuda::DescentStep<T>, Cuda> all_steps(policy, {rows * steps});
    VectorTensor<cuda::DescentSteps<T>, Cuda> steps_of_row(policy, {rows});
    cuda::launch_teams<T>(policy, "descent_vjp_steps", cuda::descent_vjp_steps<cuda::ClusterTeam, T>,
                          cuda::descent_vjp_steps<cuda::GridTeam, T>, rows, length, all_steps.data(),
                          steps_of_row.data(), d_k.data(), vjp, wanted, descent);
    constexpr int threads = cuda::descent_vjp_threads;
    cuda::launch(policy, "descent_vjp_logits", cuda::descent_vjp_logits<T>,
                 cuda::grid_of_rows(rows, divide_up(length, threads)), threads, 0, d_logits.data(), all_steps.data(),
                 steps_of_row.data(), vjp);
}

}  // namespace colt5
