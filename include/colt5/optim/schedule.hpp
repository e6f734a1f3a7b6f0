// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <numbers>

#include <colt5/core/view.hpp>

namespace colt5 {

struct WarmupCosine {
    double peak = 1e-3;  // the largest learning rate, reached after `warmup` steps
    Index warmup = 0;
    Index total = 1;   // steps, warm-up included
    double floor = 0;  // the learning rate from step `total` on
};

/// The learning rate of step 0, 1, …: linear from peak / warmup to peak, then half a cosine down to the floor.
///
///     optimizer.set_learning_rate(warmup_cosine(step, {.peak = 3e-4, .warmup = 100, .total = 2000}));
///
/// Throws ValueError unless 0 <= warmup < total, the step is not negative, and peak and floor are in [0, 1e6].
inline double warmup_cosine(Index step, const WarmupCosine& schedule) {
    expect_value(schedule.warmup >= 0, "warmup", ">= 0", schedule.warmup);
    expect_value(schedule.warmup < schedule.total, "total", "more than warmup", schedule.total);
    expect_value(step >= 0, "step", ">= 0", step);
    expect_value(schedule.peak >= 0 && schedule.peak <= 1e6, "peak", "in [0, 1e6]", schedule.peak);
    expect_value(schedule.floor >= 0 && schedule.floor <= 1e6, "floor", "in [0, 1e6]", schedule.floor);
    if (step < schedule.warmup)
        return schedule.peak * static_cast<double>(step + 1) / static_cast<double>(schedule.warmup);
    const double progress =
        static_cast<double>(step - schedule.warmup) / static_cast<double>(schedule.total - schedule.warmup);
    const double cosine = 0.5 * (1 + std::cos(std::numbers::pi * std::min(progress, 1.0)));
    return schedule.floor + (schedule.peak - schedule.floor) * cosine;
}

struct WarmupInverseSqrt {
    double peak = 1e-2;  // the largest learning rate
    Index warmup = 10000;
    bool linear = true;  // during the warm-up it rises linearly; false: it is `peak` then, too, as in T5
};

/// The learning rate of step 0, 1, …: during the warm-up, linear from peak / warmup to peak (or `peak`, if `linear` is
/// false); then it falls as one over the square root of the step, without an end. With t = step + 1:
///
///     t < warmup:  peak · t / warmup        t ≥ warmup:  peak · √(warmup / t)
///
///     optimizer.set_learning_rate(warmup_inverse_sqrt(step, {.peak = 1e-2, .warmup = 10000}));
///
/// Throws ValueError unless warmup >= 1, the step is not negative, and the peak is in [0, 1e6].
inline double warmup_inverse_sqrt(Index step, const WarmupInverseSqrt& schedule) {
    expect_value(schedule.warmup >= 1, "warmup", ">= 1", schedule.warmup);
    expect_value(step >= 0, "step", ">= 0", step);
    expect_value(schedule.peak >= 0 && schedule.peak <= 1e6, "peak", "in [0, 1e6]", schedule.peak);
    const auto done = static_cast<double>(step) + 1, warmup = static_cast<double>(schedule.warmup);
    if (done < warmup) return schedule.linear ? schedule.peak * done / warmup : schedule.peak;
    return schedule.peak * std::sqrt(warmup / done);
}

}  // namespace colt5
