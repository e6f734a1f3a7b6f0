// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include <colt5/cpu/nan_row.hpp>
#include <colt5/cpu/parallel.hpp>
#include <colt5/cpu/simd.hpp>
#include <colt5/op/coordinate_descent.hpp>

namespace colt5 {

namespace cpu {

/// One row of logits, −∞ where masked, which adds nothing to any sum of exponentials.
template <typename T>
struct DescentRow {
    DescentRow(TokensView<const T> logits, Mask mask, Index row, DescentK k_of_sample, const CoordinateDescent& descent)
        : length(logits.extent(2)),
          valid(length),
          logit(logits.data() + row * length),
          wanted(k_of_sample(row / logits.extent(1))),
          k(wanted) {
        if (mask) {
            T* const masked = thread_scratch<T, struct MaskedLogits>(length);
            const bool* const real = mask[row / logits.extent(1)].data();
            valid = 0;
            for (Index i = 0; i < length; ++i) {
                masked[i] = real[i] ? logit[i] : -infinity;
                valid += real[i] ? 1 : 0;
            }
            logit = masked;
        }
        if (descent.limit_k) k = std::min(k, static_cast<double>(valid));
    }
    T largest() const { return largest_or_nan(logit, length); }
    static constexpr T infinity = std::numeric_limits<T>::infinity();
    Index length, valid;
    const T* logit;
    double wanted, k;
};

/// Sums f(offset, width) over a row: in T within a block of 512 entries, in double over the blocks.
template <typename T, typename F>
double sum_over_row(Index length, F&& f) {
    constexpr Index block = 512;
    double total = 0;
    for (Index first = 0; first < length; first += block) {
        Batch<T> sum(T(0));
        for_each_batch<T>(std::min(block, length - first), [&](Index j, Index width) {
            const Batch<T> value = f(first + j, width);
            sum += width < lanes<T> ? pad(value, width, T(0)) : value;
        });
        total += static_cast<double>(reduce_add(sum));
    }
    return total;
}

/// What one pass over a row finds below and above a threshold.
struct ThresholdSums {
    double exponentials;  // Σ exp((min(s, τ) − shift) / ε)
    double saturated;     // number of s > τ
};

template <typename T>
ThresholdSums threshold_sums(const DescentRow<T>& row, T threshold, T shift, double eps) {
    const Batch<T> tau(threshold), top(shift), inverse_eps(static_cast<T>(1 / eps)), one(T(1)), zero(T(0));
    double saturated = 0;
    constexpr Index block = 512;
    double exponentials = 0;
    for (Index first = 0; first < row.length; first += block) {
        Batch<T> sum(T(0)), count(T(0));
        for_each_batch<T>(std::min(block, row.length - first), [&](Index j, Index width) {
            Batch<T> s = load(row.logit + first + j, width);
            if (width < lanes<T>) s = pad(s, width, -row.infinity);
            sum += cpu::exp((xsimd::min(s, tau) - top) * inverse_eps);
            count += xsimd::select(s > tau, one, zero);
        });
        exponentials += static_cast<double>(reduce_add(sum));
        saturated += static_cast<double>(reduce_add(count));
    }
    return {exponentials, saturated};
}

/// The iterations of one row; fills τ_0 … τ_T and the counts.
template <typename T>
void descend(const DescentRow<T>& row, T largest, const CoordinateDescent& descent, T* threshold, T* saturated) {
    const int steps = descent.n_iters;
    int t = 1;
    threshold[0] = T(0);
    if (descent.start == DescentStart::minus_logits) {
        threshold[0] = row.infinity;
        saturated[0] = T(0);
        threshold[1] =
            static_cast<T>(descent.step_eps(1) * (std::log(static_cast<double>(row.valid)) - std::log(row.k)));
        t = 2;
    }
    double exact = static_cast<double>(threshold[t - 1]);  // τ_{t−1} before its rounding; of the first step, after it
    for (; t <= steps; ++t) {
        const double eps = descent.step_eps(t);
        const T shift = std::min(largest, threshold[t - 1]);  // the largest of min(s, τ)
        const ThresholdSums sums = threshold_sums(row, threshold[t - 1], shift, eps);
        saturated[t - 1] = static_cast<T>(sums.saturated);
        double exponentials = sums.exponentials;
        if (descent.start == DescentStart::minus_logits)  // saturated logits count with τ_{t−1} before its rounding
            exponentials += sums.saturated * std::expm1((exact - static_cast<double>(threshold[t - 1])) / eps);
        const double next = static_cast<double>(shift) + eps * (std::log(exponentials) - std::log(row.k));
        threshold[t] = static_cast<T>(next);
        const bool repeats =
            descent.start == DescentStart::minus_logits ? next == exact : threshold[t] == threshold[t - 1];
        exact = next;
        if (repeats && descent.step_eps(t + 1) == eps && descent.step_eps(steps) == eps) {
            std::fill(threshold + t + 1, threshold + steps + 1, threshold[t]);  // every later step repeats this one
            std::fill(saturated + t, saturated + steps, saturated[t - 1]);
            break;
        }
    }
}

/// τ with Σ min(1, exp((s − τ) / ε)) = k: starts at the ⌈k⌉-th largest logit and alternates between counting the
/// saturated logits and solving for τ with that count; −∞ when k is not less than the number of logits above −∞.
template <typename T>
T solve_threshold(const DescentRow<T>& row, double eps) {
    const auto candidates =
        std::count_if(row.logit, row.logit + row.length, [&](T logit) { return logit > -row.infinity; });
    if (row.k >= static_cast<double>(candidates)) return -row.infinity;
    T* const sorted = thread_scratch<T, struct SortedLogits>(row.length);
    std::copy_n(row.logit, row.length, sorted);
    const auto rank = static_cast<Index>(std::ceil(row.k)) - 1;
    std::nth_element(sorted, sorted + rank, sorted + row.length, std::greater<>());
    T threshold = std::min(sorted[rank], std::numeric_limits<T>::max());
    for (int i = 0; i < 100; ++i) {
        const ThresholdSums sums = threshold_sums(row, threshold, threshold, eps);
        const double below = sums.exponentials - sums.saturated;  // Σ over s <= τ of exp((s − τ) / ε)
        const auto next =
            static_cast<T>(static_cast<double>(threshold) + eps * std::log(below / (row.k - sums.saturated)));
        if (next == threshold || !(row.k > sums.saturated)) break;
        threshold = next;
    }
    return threshold;
}

}  // namespace cpu

template <typename T>
void coordinate_descent_kernel(const Cpu& policy, TokensView<T> scores, TokensView<T> threshold,
                               TokensView<T> saturated, TokensView<const T> logits, Mask mask, DescentK k,
                               const CoordinateDescent& descent) {
    using Batch = cpu::Batch<T>;
    const Index routes = logits.extent(1);
    parallel_for(policy, logits.extent(0) * routes, [&](Index i) {
        const cpu::DescentRow<T> row(logits, mask, i, k, descent);
        T *const y = scores[i / routes][i % routes].data(), *const tau = threshold[i / routes][i % routes].data();
        T* const count = saturated[i / routes][i % routes].data();
        const Index steps = saturated.extent(2);
        const T largest = row.largest();
        if (std::isnan(largest)) {
            cpu::fill_nan_row(y, row.length, mask ? mask[i / routes].data() : nullptr);
            std::fill_n(tau, steps + 1, largest);
            std::fill_n(count, steps, largest);
            return;
        }
        if (largest == -row.infinity || row.k <= 0) {  // every token is masked or has logit −∞; or none is wanted
            std::fill_n(y, row.length, T(0));
            std::fill_n(tau, steps + 1, largest == -row.infinity ? T(0) : row.infinity);
            std::fill_n(count, steps, T(0));
            return;
        }
        if (descent.iterate_to_convergence) {
            count[0] = T(0);
            tau[0] = tau[1] = cpu::solve_threshold(row, descent.eps);
        } else {
            cpu::descend(row, largest, descent, tau, count);
        }
        const Batch last(tau[steps]), inverse_eps(static_cast<T>(1 / descent.step_eps(static_cast<int>(steps) + 1)));
        const Batch none(-row.infinity), zero(T(0));
        cpu::for_each_batch<T>(row.length, [&](Index j, Index width) {
            const Batch s = cpu::load(row.logit + j, width);
            const Batch e = cpu::exp(xsimd::min(s - last, zero) * inverse_eps);
            cpu::store(y + j, xsimd::select(s == none, zero, e), width);
        });
    });
}

template <typename T>
void coordinate_descent_vjp_kernel(const Cpu& policy, TokensView<T> d_logits, MatrixView<T> d_k,
                                   TokensView<const T> d_scores, TokensView<const T> scores,
                                   TokensView<const T> threshold, TokensView<const T> saturated,
                                   TokensView<const T> logits, Mask mask, DescentK k,
                                   const CoordinateDescent& descent) {
    using Batch = cpu::Batch<T>;
    using cpu::load;
    struct Step {  // coefficient · exp((s − τ_t) / ε_t) where s ≤ τ_{t−1}
        T before, after, inverse_eps;
        double coefficient;
    };
    const Index routes = logits.extent(1);
    parallel_for(policy, logits.extent(0) * routes, [&](Index i) {
        const Index b = i / routes, r = i % routes;
        const cpu::DescentRow<T> row(logits, mask, i, k, descent);
        const T *const tau = threshold[b][r].data(), *const count = saturated[b][r].data();
        const T *const y = scores[b][r].data(), *const g = d_scores[b][r].data();
        T* const ds = d_logits[b][r].data();
        const auto steps = static_cast<int>(saturated.extent(2));
        if (std::isnan(tau[steps])) {
            cpu::fill_nan_row(ds, row.length, mask ? mask[b].data() : nullptr);
            d_k(b, r) = tau[steps];
            return;
        }
        double k_gradient = 0;
        const Batch last(tau[steps]), inverse_eps(static_cast<T>(1 / descent.step_eps(steps + 1)));
        const Batch none(-row.infinity), zero(T(0));
        const auto below = [&](Index j, Index width) {  // ĝ
            const Batch s = load(row.logit + j, width);
            const Batch gradient = load(g + j, width) * load(y + j, width) * inverse_eps;
            return xsimd::select(s <= last && s > none, gradient, zero);
        };
        double alpha = cpu::sum_over_row<T>(row.length, below);

        Step* const step = cpu::thread_scratch<Step, struct Steps>(steps);
        Index distinct = 0;
        if (descent.iterate_to_convergence) {
            const double sum = cpu::sum_over_row<T>(row.length, [&](Index j, Index width) {
                return xsimd::select(load(row.logit + j, width) <= last, load(y + j, width), zero);
            });
            if (sum > 0) {
                k_gradient = descent.eps * alpha / sum;
                step[distinct++] = {tau[1], tau[1], static_cast<T>(1 / descent.eps), alpha / sum};
            }
        } else {
            for (int t = steps; t >= 1 && alpha != 0; --t) {
                const double eps = descent.step_eps(t);
                k_gradient += eps * alpha / row.k;
                if (t == 1 && descent.start == DescentStart::minus_logits) break;
                const Step now{tau[t - 1], tau[t], static_cast<T>(1 / eps), alpha / row.k};
                const bool repeats = distinct > 0 && step[distinct - 1].before == now.before &&
                                     step[distinct - 1].after == now.after &&
                                     step[distinct - 1].inverse_eps == now.inverse_eps;
                if (repeats)
                    step[distinct - 1].coefficient += now.coefficient;
                else
                    step[distinct++] = now;
                if (count[t - 1] == T(0)) break;  // where the exponential may overflow
                alpha *= static_cast<double>(count[t - 1]) / row.k *
                         std::exp((static_cast<double>(tau[t - 1]) - static_cast<double>(tau[t])) / eps);
            }
        }
        d_k(b, r) = row.k < row.wanted ? T(0) : static_cast<T>(k_gradient);
        cpu::for_each_batch<T>(row.length, [&](Index j, Index width) {
            const Batch s = load(row.logit + j, width);
            Batch sum = below(j, width);
            for (Index t = 0; t < distinct; ++t) {
                const Batch e = cpu::exp((s - Batch(step[t].after)) * Batch(step[t].inverse_eps));
                sum -= xsimd::select(s <= Batch(step[t].before), Batch(static_cast<T>(step[t].coefficient)) * e, zero);
            }
            cpu::store(ds + j, sum, width);
        });
    });
}

}  // namespace colt5
