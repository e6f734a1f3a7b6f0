// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>

#include <colt5/core/parameters.hpp>
#include <colt5/core/policy.hpp>
#include <colt5/core/view.hpp>
#include <colt5/expr/assign.hpp>
#include <colt5/expr/expr.hpp>

namespace colt5 {

class Cpu;  // <colt5/cpu.hpp>

struct MovingAverageOptions {
    double decay = 0.999;
    /// The decay of update t = 0, 1, … is at most (1 + t) / (10 + t): early averages follow the parameters.
    bool warms_up = true;
};

/// The exponential moving average (EMA) of a module's parameters, which is often better than the last parameters:
///
///     average += (1 − decay) (parameter − average)        in float, in double for double; at first, the parameters
///
///     MovingAverage average(policy, model);
///     … optimizer.step(model, gradients); average.update(model);
///     average.swap_in(model);    // evaluates with the average,
///     average.swap_out(model);   // and goes on training with the same bits as before
///
/// Buffers and the state of noise stay those of the module. To save and restore it, see <colt5/io/training.hpp>.
template <typename Module, Policy P = Cpu>
class MovingAverage {
    static_assert(TrainableModule<Module>,
                  "colt5: MovingAverage needs a module with a static each_parameter(f, prefix, m...) and with "
                  "make_gradients() (see TrainableModule)");

public:
    /// Parameters of 16 bits in float, as in gradients.
    using Average = decltype(std::declval<const Module&>().make_gradients());

    struct State {
        std::uint64_t updates;
        Average average;
    };

    /// Throws ValueError unless the decay is in [0, 1).
    MovingAverage(const P& policy, const Module& module, const MovingAverageOptions& options = {})
        : policy_(policy), options_(options), state_{0, module.make_gradients()} {
        expect_value(options.decay >= 0 && options.decay < 1, "decay", "in [0, 1)", options.decay);
        copy(state_.average, module);
    }

    /// Call it after a step of the optimizer. Throws ValueError while the average is swapped in.
    void update(const Module& module) {
        expect_swapped(false);
        expect_like<Module>("module", state_.average, module);
        const auto t = static_cast<double>(state_.updates);
        const double decay = options_.warms_up ? std::min(options_.decay, (1 + t) / (10 + t)) : options_.decay;
        Module::each_parameter(EachTensor{[&]<typename A>(A& average, const auto& parameter) {
                                   using Sum = typename A::value_type;
                                   assign(policy_, average,
                                          average + static_cast<Sum>(1 - decay) * (cast<Sum>(parameter) - average));
                               }},
                               "", state_.average, module);
        ++state_.updates;
    }

    /// Keeps a copy of the module's parameters, and sets them to their average, rounded to their type. Throws
    /// ValueError when it is swapped in already.
    void swap_in(Module& module) {
        expect_swapped(false);
        expect_like<Module>("module", state_.average, module);
        if (!has_copy_) parameters_ = module.make_gradients();
        has_copy_ = true;
        copy(parameters_, module);
        copy(module, state_.average);
        swapped_ = true;
    }
    /// Restores the module's parameters, bit for bit. Throws ValueError unless the average is swapped in.
    void swap_out(Module& module) {
        expect_swapped(true);
        expect_like<Module>("module", parameters_, module);
        copy(module, parameters_);
        swapped_ = false;
    }
    bool is_swapped_in() const { return swapped_; }

    State& state() { return state_; }
    const State& state() const { return state_; }

    /// Throws ValueError unless is_swapped_in() is `expected`.
    void expect_swapped(bool expected) const {
        expect_value(swapped_ == expected, "average", expected ? "swapped in" : "swapped out",
                     swapped_ ? "swapped in" : "swapped out");
    }

private:
    template <typename To, typename From>
    void copy(To& to, const From& from) const {
        Module::each_parameter(EachTensor{[&]<typename Value>(Value& value, const auto& other) {
                                   assign(policy_, value, cast<accumulate_t<typename Value::value_type>>(other));
                               }},
                               "", to, from);
    }

    P policy_;
    MovingAverageOptions options_;
    State state_;
    Average parameters_;  // of the module, while the average is swapped in
    bool swapped_ = false, has_copy_ = false;
};

}  // namespace colt5
