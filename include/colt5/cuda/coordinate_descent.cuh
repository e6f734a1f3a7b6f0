// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <limits>

#include <colt5/cuda/masked_row.cuh>
#include <colt5/cuda/radix_select.cuh>
#include <colt5/cuda/row_team.cuh>
#include <colt5/op/coordinate_descent.hpp>

namespace colt5 {

namespace cuda {

/// exp for x ≤ 0, to an absolute error of about 1e-7 in float: what is added to a sum that is not smaller than 1.
__device__ inline float exp_of_term(float x) {
    return __expf(x);
}
__device__ inline double exp_of_term(double x) {
    return ::exp(x);
}

/// What a pass over a row finds: the next threshold, and the number of logits above the one before.
template <typename T>
struct ThresholdStep {
    T threshold, saturated;
};

/// then(Σ over s ≤ τ of exp((s − shift) / ε), number of s > τ)
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

/// The iterations of one row; fills τ_0 … τ_T and the counts. Returns τ_T, and in `eps` that of the scores.
template <typename Team, typename T>
__device__ T descend(MaskedRow<Team, T>& row, double k, const CoordinateDescent& descent, T* threshold, T* saturated,
                     double& eps) {
    const bool writes = threadIdx.x == 0 && row.team.rank() == 0;
    const double inverse_k = 1 / k;
    eps = descent.first_eps();
    T tau = 0;
    int t = 1;
    if (descent.start == DescentStart::minus_logits) {
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
    bool eps_is_last = false;  // all later steps have the same
    for (; t <= descent.n_iters; ++t) {
        const T before = tau, shift = ::min(row.largest, tau);  // the largest of min(s, τ)
        const auto step = threshold_step(row, tau, shift, inverse_eps, [&](const Partial& sums) {
            const T log_ratio = ::log(static_cast<T>((sums.first + sums.second) * inverse_k));
            return ThresholdStep<T>{static_cast<T>(static_cast<double>(shift) + eps * static_cast<double>(log_ratio)),
                                    static_cast<T>(sums.second)};
        });
        tau = step.threshold;
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
        if (tau == before && eps_is_last) {  // every later step repeats this one
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
/// saturated logits and solving for τ with that count; −∞ when k is not less than the number of finite logits.
template <typename Team, typename T>
__device__ T solve_threshold(MaskedRow<Team, T>& row, Index length, double k, double eps) {
    if (k >= row.valid) return -row.infinity;
    using Key = typename Rank<T>::Key;
    const auto selection = select_smallest<Key>(row.team, Rank<T>::bits, length, static_cast<Index>(::ceil(k)),
                                                [&](Index i) { return Key{Rank<T>::of(row[i])}; });
    T least = row.infinity;  // of the selected: the last digits may not have been needed
    for (Index i = threadIdx.x; i < row.team.count; i += Team::threads)
        if (selection(Key{Rank<T>::of(row[i])})) least = ::min(least, row[i]);
    T threshold = static_cast<T>(row.team.combine(least, 0u, row.infinity, Smaller()).first);
    if (threshold == -row.infinity) return threshold;
    threshold = ::min(threshold, std::numeric_limits<T>::max());
    const T inverse_eps = static_cast<T>(1 / eps);
    for (int i = 0; i < 100; ++i) {
        const auto [next, above] = threshold_step(row, threshold, threshold, inverse_eps, [&](const Partial& sums) {
            const T log_ratio = ::log(static_cast<T>(sums.first / (k - sums.second)));
            return ThresholdStep<T>{
                static_cast<T>(static_cast<double>(threshold) + eps * static_cast<double>(log_ratio)),
                static_cast<T>(sums.second)};
        });
        // From the second step on τ falls, until rounding lets it rise again.
        if (next == threshold || !(k > static_cast<double>(above)) || (i > 0 && next > threshold)) break;
        threshold = next;
    }
    return threshold;
}

template <typename Team, typename T>
__global__ void __launch_bounds__(Team::threads)
    coordinate_descent(Meeting meeting, RowPart part, T* scores, T* thresholds, T* saturated, const T* logits,
                       const bool* mask, Index routes, int steps, double k, CoordinateDescent descent) {
    MaskedRow<Team, T> row(meeting, part, logits, mask, routes);
    auto& team = row.team;
    T* const y = scores + team.row * part.length + team.begin;
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
    if (row.largest == -row.infinity) {  // no token, or none that could be chosen
        for (Index i = threadIdx.x; i < team.count; i += Team::threads) y[i] = 0;
        if (team.rank() == 0)
            for (int t = static_cast<int>(threadIdx.x); t <= steps; t += Team::threads) {
                tau[t] = 0;
                if (t < steps) count[t] = 0;
            }
        return;
    }
    if (descent.limit_k) k = ::min(k, row.valid);
    double eps = descent.eps;
    T last;
    if (descent.iterate_to_convergence) {
        last = solve_threshold(row, part.length, k, eps);
        if (threadIdx.x == 0 && team.rank() == 0) {
            tau[0] = tau[1] = last;
            count[0] = 0;
        }
    } else {
        last = descend(row, k, descent, tau, count, eps);
    }
    const T inverse_eps = static_cast<T>(1 / eps);
    for (Index i = threadIdx.x; i < team.count; i += Team::threads) {
        const T s = row[i];
        y[i] = s == -row.infinity ? T(0) : ::exp(::min(s - last, T(0)) * inverse_eps);
    }
}

/// coefficient · exp((s − τ_t) / ε_t) where s ≤ τ_{t−1}
template <typename T>
struct DescentStep {
    T before, after, inverse_eps, coefficient;
};

/// What the vector-Jacobian product of one row reads.
template <typename T>
struct DescentVjpRow {
    const T *logit, *score, *d_score;
    const bool* real;  // or null
    T last, inverse_eps;

    /// A real logit is NaN.
    __device__ bool has_nan() const { return last != last; }
    __device__ T s(Index i) const { return !real || real[i] ? logit[i] : -std::numeric_limits<T>::infinity(); }
    /// ĝ
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
    T inverse_eps;  // of the scores

    __device__ DescentVjpRow<T> row(Index row) const {
        return {logits + row * length,
                scores + row * length,
                d_scores + row * length,
                mask ? mask + row / routes * length : nullptr,
                thresholds[row * (steps + 1) + steps],
                inverse_eps};
    }
};

/// How many steps there are, and what all together take from logits that are below each of their thresholds, where all
/// have the same ε: coefficient · exp((s − after) / ε) for s ≤ before.
template <typename T>
struct DescentSteps {
    int distinct;
    DescentStep<T> together;
};

/// Writes the steps of one row from the last to the first, those that repeat the one after them added to it, and leaves
/// out those that take nothing. One warp does it, each lane a step at a time. Returns their number, and dk.
template <typename T>
__device__ int collect_steps(DescentStep<T>* steps, double& k_gradient, double alpha, double k, const T* tau,
                             const T* saturated, int count, const CoordinateDescent& descent) {
    constexpr unsigned all_lanes = 0xffffffffu;
    const int lane = static_cast<int>(threadIdx.x);
    const double inverse_k = 1 / k;
    int distinct = 0;
    double open = 0;  // of the last step so far, to which more may be added
    for (int last = count; last > 0 && alpha != 0; last -= warp_size) {
        const int t = last - lane;
        double eps = 1, product = 1;
        T inverse_eps = 0;
        bool repeats = false;
        if (t > 0) {
            eps = descent.step_eps(t);
            inverse_eps = static_cast<T>(1 / eps);
            const double before = tau[t - 1], after = tau[t], above = saturated[t - 1];
            // without saturated logits the exponential may overflow
            product = above == 0 ? 0 : above * inverse_k * ::exp((before - after) / eps);
            repeats = t < count && before == after && tau[t] == tau[t + 1] && descent.step_eps(t + 1) == eps;
        }
        for (int offset = 1; offset < warp_size; offset *= 2) {
            const double other = __shfl_up_sync(all_lanes, product, offset);
            if (lane >= offset) product *= other;
        }
        const double factor = __shfl_up_sync(all_lanes, product, 1);
        const double mine = t > 0 ? (lane == 0 ? alpha : alpha * factor) * inverse_k : 0;  // α_t / k
        alpha *= __shfl_sync(all_lanes, product, warp_size - 1);
        k_gradient += warp_sum(eps * mine);

        const bool takes = mine != 0 && !(t == 1 && descent.start == DescentStart::minus_logits);
        const unsigned taking = __ballot_sync(all_lanes, takes);
        const unsigned starts = __ballot_sync(all_lanes, takes && !repeats), up_to_here = all_lanes >> (31 - lane);
        const int first = 31 - __clz(static_cast<int>(starts & up_to_here));  // of the sum; −1: before lane 0
        double sum = takes ? mine : 0;
        for (int offset = 1; offset < warp_size; offset *= 2) {
            const double other = __shfl_up_sync(all_lanes, sum, offset);
            if (lane - offset >= ::max(first, 0)) sum += other;
        }
        if (first < 0) sum += open;
        const bool ends = takes && (lane == warp_size - 1 || ((starts | ~taking) >> (lane + 1) & 1) != 0);
        const int place = distinct + __popc(starts & up_to_here) - 1;
        if (ends) steps[place] = {tau[t - 1], tau[t], inverse_eps, static_cast<T>(sum)};
        distinct += __popc(starts);
        open = __shfl_sync(all_lanes, sum, warp_size - 1);
    }
    return distinct;
}

/// The steps of a row as one, for logits that are below all their thresholds.
template <typename T>
__device__ DescentStep<T> all_together(const DescentStep<T>* steps, int distinct, bool same_eps) {
    constexpr T infinity = std::numeric_limits<T>::infinity();
    if (distinct == 0 || !same_eps) return {-infinity, T(0), T(1), T(0)};
    const auto smaller = [](T a, T b) { return a < b ? a : b; };
    T before = infinity, after = infinity;
    for (int t = static_cast<int>(threadIdx.x); t < distinct; t += warp_size) {
        before = smaller(before, steps[t].before);
        after = smaller(after, steps[t].after);
    }
    before = warp_reduce(before, smaller);
    after = warp_reduce(after, smaller);
    double sum = 0;
    for (int t = static_cast<int>(threadIdx.x); t < distinct; t += warp_size)
        sum += static_cast<double>(steps[t].coefficient * ::exp((after - steps[t].after) * steps[t].inverse_eps));
    return {before, after, steps[0].inverse_eps, static_cast<T>(warp_sum(sum))};
}

/// The steps of one row, and dk: by one warp, once the team knows Σ ĝ.
template <typename Team, typename T>
__global__ void __launch_bounds__(Team::threads)
    descent_vjp_steps(Meeting meeting, RowPart part, DescentStep<T>* all_steps, DescentSteps<T>* steps_of_row, T* d_k,
                      DescentVjp<T> vjp, double wanted, CoordinateDescent descent) {
    Team team(meeting, part);
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
        descent.iterate_to_convergence ? team.combine(unsaturated_of_thread, 0, 0, Plus()).first : 0;
    if (team.rank() != 0 || threadIdx.x >= warp_size) return;
    if (values.has_nan()) {
        if (threadIdx.x == 0) {
            d_k[team.row] = nan_if<T>(true);
            steps_of_row[team.row] = {};
        }
        return;
    }

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

/// A team of blocks a row, which keeps it on chip and exchanges one sum in each step.
template <typename T>
void coordinate_descent_kernel(const Cuda& policy, TokensView<T> scores, TokensView<T> threshold,
                               TokensView<T> saturated, TokensView<const T> logits, Mask mask, double k,
                               const CoordinateDescent& descent) {
    cuda::launch_teams<T>(policy, "coordinate_descent", cuda::coordinate_descent<cuda::ClusterTeam, T>,
                          cuda::coordinate_descent<cuda::GridTeam, T>, logits.extent(0) * logits.extent(1),
                          logits.extent(2), scores.data(), threshold.data(), saturated.data(), logits.data(),
                          mask.data(), logits.extent(1), static_cast<int>(saturated.extent(2)), k, descent);
}

template <typename T>
void coordinate_descent_vjp_kernel(const Cuda& policy, TokensView<T> d_logits, MatrixView<T> d_k,
                                   TokensView<const T> d_scores, TokensView<const T> scores,
                                   TokensView<const T> threshold, TokensView<const T> saturated,
                                   TokensView<const T> logits, Mask mask, double wanted,
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
