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

/// Σ over s ≤ τ of exp((s − shift) / ε), and the number of s > τ.
template <typename Team, typename T>
__device__ Partial threshold_sums(MaskedRow<Team, T>& row, T threshold, T shift, T inverse_eps) {
    T below = 0;
    unsigned above = 0;
    for (Index i = threadIdx.x; i < row.team.count; i += team_threads) {
        const T s = row[i];
        if (s > threshold)
            ++above;
        else
            below += exp((s - shift) * inverse_eps);
    }
    const Partial mine{block_sum(static_cast<double>(below)), static_cast<double>(block_sum(above))};
    return row.team.combine(mine, PartialPlus());
}

/// The iterations of one row; fills τ_0 … τ_T and the counts. Returns τ_T, and in `eps` that of the scores.
template <typename Team, typename T>
__device__ T descend(MaskedRow<Team, T>& row, double k, const CoordinateDescent& descent, T* threshold, T* saturated,
                     double& eps) {
    const bool writes = threadIdx.x == 0 && row.team.rank() == 0;
    const double log_k = log(k);
    eps = max(descent.eps_init, descent.eps);
    T tau = 0;
    int t = 1;
    if (descent.start == DescentStart::minus_logits) {
        tau = static_cast<T>(eps * (log(row.valid) - log_k));
        if (writes) {
            threshold[0] = row.infinity;
            threshold[1] = tau;
            saturated[0] = 0;
        }
        eps = max(eps * descent.eps_decay, descent.eps);
        t = 2;
    } else if (writes) {
        threshold[0] = tau;
    }
    for (; t <= descent.n_iters; ++t) {
        const T before = tau, shift = min(row.largest, tau);  // the largest of min(s, τ)
        const Partial sums = threshold_sums(row, tau, shift, static_cast<T>(1 / eps));
        tau = static_cast<T>(static_cast<double>(shift) + eps * (log(sums.first + sums.second) - log_k));
        if (writes) {
            threshold[t] = tau;
            saturated[t - 1] = static_cast<T>(sums.second);
        }
        const double next_eps = max(eps * descent.eps_decay, descent.eps);
        if (tau == before && next_eps == eps) {  // every later step repeats this one
            if (row.team.rank() == 0)
                for (int later = t + static_cast<int>(threadIdx.x); later < descent.n_iters; later += team_threads) {
                    threshold[later + 1] = tau;
                    saturated[later] = static_cast<T>(sums.second);
                }
            break;
        }
        eps = next_eps;
    }
    return tau;
}

/// τ with Σ min(1, exp((s − τ) / ε)) = k: starts near the ⌈k⌉-th largest logit, where fewer than k are larger, and
/// alternates between counting the saturated logits and solving for τ with that count; −∞ when k is not less than the
/// number of finite logits.
template <typename Team, typename T>
__device__ T solve_threshold(MaskedRow<Team, T>& row, Index length, double k, double eps) {
    if (k >= row.valid) return -row.infinity;
    using Key = typename Rank<T>::Key;
    const auto selection = select_smallest<Key>(row.team, Rank<T>::bits, length, static_cast<Index>(ceil(k)),
                                                [&](Index i) { return Key{Rank<T>::of(row[i])}; });
    T threshold = Rank<T>::logit(selection.prefix << selection.shift);
    if (threshold == -row.infinity) return threshold;
    for (int i = 0; i < 100; ++i) {
        const Partial sums = threshold_sums(row, threshold, threshold, static_cast<T>(1 / eps));
        const auto next = static_cast<T>(static_cast<double>(threshold) + eps * log(sums.first / (k - sums.second)));
        if (next == threshold || !(k > sums.second)) break;
        threshold = next;
    }
    return threshold;
}

template <typename Team, typename T>
__global__ void __launch_bounds__(team_threads)
    coordinate_descent(Meeting meeting, RowPart part, T* scores, T* thresholds, T* saturated, const T* logits,
                       const bool* mask, Index routes, int steps, double k, CoordinateDescent descent) {
    extern __shared__ double dynamic_shared[];
    MaskedRow<Team, T> row(meeting, part, dynamic_shared, logits, mask, routes);
    auto& team = row.team;
    T* const y = scores + team.row * part.length + team.begin;
    T *const tau = thresholds + team.row * (steps + 1), *const count = saturated + team.row * steps;
    if (row.largest == -row.infinity) {  // no token, or none that could be chosen
        for (Index i = threadIdx.x; i < team.count; i += team_threads) y[i] = 0;
        if (team.rank() == 0)
            for (int t = static_cast<int>(threadIdx.x); t <= steps; t += team_threads) {
                tau[t] = 0;
                if (t < steps) count[t] = 0;
            }
        return;
    }
    if (descent.limit_k) k = min(k, row.valid);
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
    for (Index i = threadIdx.x; i < team.count; i += team_threads) {
        const T s = row[i];
        y[i] = s == -row.infinity ? T(0) : exp(min(s - last, T(0)) * inverse_eps);
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

/// Sums over one chunk of a row.
struct DescentSums {
    double alpha, unsaturated, valid;  // Σ ĝ, Σ of the scores where s ≤ τ, number of real tokens
};
inline constexpr int descent_chunk = 4096;

template <typename T>
__global__ void descent_vjp_sums(DescentSums* sums, DescentVjp<T> vjp) {
    const auto row = vjp.row(blockIdx.y);
    const Index begin = static_cast<Index>(blockIdx.x) * descent_chunk, end = min(vjp.length, begin + descent_chunk);
    T alpha = 0, unsaturated = 0;
    unsigned valid = 0;
    for (Index i = begin + threadIdx.x; i < end; i += blockDim.x) {
        const T s = row.s(i);
        alpha += row.below(i, s);
        unsaturated += s <= row.last ? row.score[i] : T(0);
        valid += !row.real || row.real[i] ? 1 : 0;
    }
    const DescentSums total{block_sum(static_cast<double>(alpha)), block_sum(static_cast<double>(unsaturated)),
                            static_cast<double>(block_sum(valid))};
    if (threadIdx.x == 0) sums[static_cast<Index>(blockIdx.y) * gridDim.x + blockIdx.x] = total;
}

/// What one step of the descent multiplies α by, on the way back, and its ε.
struct DescentFactor {
    double eps, factor;
};

/// The steps of one row, from the last, and dk. One block a row.
template <typename T>
__global__ void descent_vjp_steps(DescentStep<T>* all_steps, int* distinct_steps, T* d_k, DescentFactor* all_factors,
                                  const DescentSums* sums, Index chunks, DescentVjp<T> vjp, double wanted,
                                  CoordinateDescent descent) {
    const Index row = blockIdx.x;
    DescentSums total{0, 0, 0};
    for (Index i = threadIdx.x; i < chunks; i += blockDim.x) {
        const DescentSums& of_chunk = sums[row * chunks + i];
        total.alpha += of_chunk.alpha;
        total.unsaturated += of_chunk.unsaturated;
        total.valid += of_chunk.valid;
    }
    total = {block_sum(total.alpha), block_sum(total.unsaturated), block_sum(total.valid)};
    const double k = descent.limit_k ? min(wanted, total.valid) : wanted;
    const T *const tau = vjp.thresholds + row * (vjp.steps + 1), *const saturated = vjp.saturated + row * vjp.steps;
    DescentStep<T>* const step = all_steps + row * vjp.steps;
    DescentFactor* const factors = all_factors + row * vjp.steps;
    if (!descent.iterate_to_convergence) {
        if (threadIdx.x == 0) {
            double eps = max(descent.eps_init, descent.eps);
            for (int t = 0; t < vjp.steps; ++t) {
                factors[t].eps = eps;
                eps = max(eps * descent.eps_decay, descent.eps);
            }
        }
        __syncthreads();
        for (int t = static_cast<int>(threadIdx.x); t < vjp.steps; t += static_cast<int>(blockDim.x))
            factors[t].factor = static_cast<double>(saturated[t]) / k *
                                exp((static_cast<double>(tau[t]) - static_cast<double>(tau[t + 1])) / factors[t].eps);
        __syncthreads();
    }
    if (threadIdx.x != 0) return;

    int distinct = 0;
    double k_gradient = 0, alpha = total.alpha;
    if (descent.iterate_to_convergence) {
        if (total.unsaturated > 0) {
            k_gradient = descent.eps * alpha / total.unsaturated;
            step[distinct++] = {tau[1], tau[1], static_cast<T>(1 / descent.eps),
                                static_cast<T>(alpha / total.unsaturated)};
        }
    } else {
        double coefficient = 0;
        for (int t = vjp.steps; t >= 1 && alpha != 0; --t) {
            const auto [eps, factor] = factors[t - 1];
            k_gradient += eps * alpha / k;
            if (t == 1 && descent.start == DescentStart::minus_logits) break;
            const DescentStep<T> now{tau[t - 1], tau[t], static_cast<T>(1 / eps), T(0)};
            const bool repeats = distinct > 0 && step[distinct - 1].before == now.before &&
                                 step[distinct - 1].after == now.after &&
                                 step[distinct - 1].inverse_eps == now.inverse_eps;
            if (!repeats) {
                step[distinct++] = now;
                coefficient = 0;
            }
            coefficient += alpha / k;
            step[distinct - 1].coefficient = static_cast<T>(coefficient);
            if (saturated[t - 1] == T(0)) break;  // where the exponential may overflow
            alpha *= factor;
        }
    }
    distinct_steps[row] = distinct;
    d_k[row] = k < wanted ? T(0) : static_cast<T>(k_gradient);
}

template <typename T>
__global__ void descent_vjp_logits(T* d_logits, const DescentStep<T>* all_steps, const int* distinct_steps,
                                   DescentVjp<T> vjp) {
    const Index row = blockIdx.y;
    const auto values = vjp.row(row);
    const DescentStep<T>* const steps = all_steps + row * vjp.steps;
    const int distinct = distinct_steps[row];
    for (Index i = global_thread(); i < vjp.length; i += all_threads()) {
        const T s = values.s(i);
        T sum = values.below(i, s);
        for (int t = 0; t < distinct; ++t) {
            const DescentStep<T> step = steps[t];
            if (s <= step.before) sum -= step.coefficient * exp((s - step.after) * step.inverse_eps);
        }
        d_logits[row * vjp.length + i] = sum;
    }
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
    const Index chunks = cuda::divide_up(length, cuda::descent_chunk);
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
    VectorTensor<cuda::DescentSums, Cuda> sums(policy, {rows * chunks});
    VectorTensor<cuda::DescentStep<T>, Cuda> all_steps(policy, {rows * steps});
    VectorTensor<cuda::DescentFactor, Cuda> factors(policy, {rows * steps});
    VectorTensor<int, Cuda> distinct_steps(policy, {rows});
    constexpr int threads = 256;
    cuda::launch(policy, "descent_vjp_sums", cuda::descent_vjp_sums<T>, cuda::grid(chunks, rows), threads, 0,
                 sums.data(), vjp);
    cuda::launch(policy, "descent_vjp_steps", cuda::descent_vjp_steps<T>, cuda::grid(rows), threads, 0,
                 all_steps.data(), distinct_steps.data(), d_k.data(), factors.data(), sums.data(), chunks, vjp, wanted,
                 descent);
    cuda::launch(policy, "descent_vjp_logits", cuda::descent_vjp_logits<T>,
                 cuda::grid(cuda::divide_up(length, threads), rows), threads, 0, d_logits.data(), all_steps.data(),
                 distinct_steps.data(), vjp);
}

}  // namespace colt5
