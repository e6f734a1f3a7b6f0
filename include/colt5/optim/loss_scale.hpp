// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>

#include <colt5/core/parameters.hpp>
#include <colt5/core/policy.hpp>
#include <colt5/core/view.hpp>
#include <colt5/op/global_norm.hpp>
#include <colt5/optim/clip.hpp>

namespace colt5 {

/// The defaults are those of torch.amp.GradScaler, except the bounds.
struct LossScaleOptions {
    double initial = 65536;
    double growth = 2;     ///< factor after `growth_interval` steps with finite gradients in a row
    double backoff = 0.5;  ///< factor after a step whose gradients are not finite
    std::uint64_t growth_interval = 2000;
    double least = 1, most = 16777216;  ///< bounds of the scale
};

/// Dynamic loss scaling, for float16, in which gradients below 3e-8 are 0. The gradient of the loss is multiplied by a
/// scale, as large as the range of float16 allows, and the gradients of the parameters, in float, are divided by it.
///
///     LossScale loss_scale;
///     assign(policy, d_losses, loss_scale.scale() / number_of_tokens);   // instead of 1 / number_of_tokens
///     …                                                                  // backward
///     if (loss_scale.unscale(policy, gradients)) {                       // otherwise the step is skipped
///         clip_gradient_norm(policy, gradients, 1.0);
///         optimizer.step(model, gradients);
///     }
///
/// A power of two as the scale changes no bit of gradients that are in the normal range without it. To save and restore
/// it, see <colt5/io/training.hpp>.
class LossScale {
public:
    struct State {
        double scale;
        std::uint64_t finite_steps;  ///< in a row, since the scale last changed
        std::uint64_t skipped;       ///< steps skipped so far
    };

    /// Throws ValueError for options out of their range.
    explicit LossScale(const LossScaleOptions& options = {}) : options_(options), state_{options.initial, 0, 0} {
        expect_value(options.least > 0 && std::isfinite(options.least), "least", "positive and finite", options.least);
        expect_value(options.most >= options.least && options.most <= 0x1p100, "most", "in [least, 2^100]",
                     options.most);
        expect_value(options.initial >= options.least && options.initial <= options.most, "initial", "in [least, most]",
                     options.initial);
        expect_value(options.growth >= 1 && options.growth <= 1e6, "growth", "in [1, 1e6]", options.growth);
        expect_value(options.backoff > 0 && options.backoff <= 1, "backoff", "in (0, 1]", options.backoff);
        expect_value(options.growth_interval >= 1, "growth_interval", ">= 1", options.growth_interval);
    }

    double scale() const { return state_.scale; }

    /// If all gradients are finite, divides them by the scale and returns true. Otherwise returns false: skip the
    /// optimizer's step. Either way adapts the scale for the next step. Gradients of a type without a member `Module`
    /// need its name: unscale<Model>(policy, gradients).
    template <typename Module = void, Policy P, typename Gradients>
    bool unscale(const P& policy, Gradients& gradients) {
        using Of = module_of_t<Module, Gradients>;
        const bool finite = std::isfinite(gradient_norm<Of>(policy, gradients));
        if (finite) {
            const auto divide = detail::multiply_by(policy, 1 / state_.scale);
            Of::each_parameter(divide, "", gradients);
            if (++state_.finite_steps >= options_.growth_interval) change_by(options_.growth);
        } else {
            ++state_.skipped;
            change_by(options_.backoff);
        }
        return finite;
    }

    const LossScaleOptions& options() const { return options_; }
    State& state() { return state_; }
    const State& state() const { return state_; }

private:
    void change_by(double factor) {
        state_.scale = std::clamp(state_.scale * factor, options_.least, options_.most);
        state_.finite_steps = 0;
    }

    LossScaleOptions options_;
    State state_;
};

}  // namespace colt5
