// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <functional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <colt5/core/parameters.hpp>
#include <colt5/core/policy.hpp>
#include <colt5/core/view.hpp>
#include <colt5/expr/assign.hpp>
#include <colt5/op/adamw.hpp>

namespace colt5 {

class Cpu;  // <colt5/cpu.hpp>

/// The defaults are those of torch.optim.AdamW.
struct AdamWOptions {
    double lr = 1e-3;
    std::array<double, 2> betas{0.9, 0.999};
    double eps = 1e-8;
    double weight_decay = 1e-2;
    /// Which parameters decay, by name; without it, all do.
    std::function<bool(std::string_view name)> decays = {};
};

/// The usual choice of what decays: parameters of two or more dimensions, such as the weights of linear layers and
/// routing tokens (r, d). Not those of one dimension, such as biases and the gains of norms, and nothing whose name
/// contains one of the words `without`.
///
///     AdamW optimizer(policy, model, {.weight_decay = 0.1, .decays = decays_matrices(model)});
template <typename Module>
std::function<bool(std::string_view)> decays_matrices(const Module& module, const std::vector<std::string>& without = {
                                                                                "embedding", "bias", "null"}) {
    std::set<std::string, std::less<>> names;
    Module::each_parameter(
        [&]<typename Parameter>(const std::string& name, const Parameter&) {
            const auto occurs = [&](const std::string& word) { return name.find(word) != std::string::npos; };
            if (Parameter::rank >= 2 && std::none_of(without.begin(), without.end(), occurs)) names.insert(name);
        },
        "", module);
    return [names = std::move(names)](std::string_view name) { return names.contains(name); };
}

namespace detail {
template <Policy P>
auto make_masters(const P& policy) {
    return EachTensor{[&policy]<typename T, typename Master>(const T& parameter, Master& master) {
        if constexpr (HalfPrecision<typename T::value_type>) {
            master = Master(policy, parameter.shape());
            assign(policy, master, parameter);
        }
    }};
}
/// Appends AdamWCoefficients::keep of each parameter.
inline auto add_keep(const AdamWOptions& options, std::vector<double>& keep) {
    return [&](const std::string& name, const auto&) {
        const bool decays = !options.decays || options.decays(name);
        keep.push_back(decays ? 1 - options.lr * options.weight_decay : 1);
    };
}
/// Updates each parameter, with the next number of `keep`.
template <Policy P>
auto update(const P& policy, AdamWCoefficients& coefficients, const double*& keep) {
    return EachTensor{[&](auto& parameter, const auto& gradient, auto& mean, auto& square, auto& master) {
        coefficients.keep = *keep++;
        adamw_update(policy, parameter, master.view().reshape(std::array{master.size()}), gradient, mean, square,
                     coefficients);
    }};
}
}  // namespace detail

/// AdamW: Adam with decoupled weight decay (Loshchilov & Hutter, ICLR 2019). In step t = 1, 2, …, with gradient g:
///
///     p *= 1 − lr · weight_decay
///     mean   = beta1 · mean   + (1 − beta1) g
///     square = beta2 · square + (1 − beta2) g²
///     p −= lr · (mean / (1 − beta1ᵗ)) / (√(square / (1 − beta2ᵗ)) + eps)
///
///     AdamW optimizer(policy, block, {.lr = 3e-4, .decays = [](auto name) { return !name.ends_with("gamma"); }});
///     optimizer.step(block, gradients);
///
/// Parameters of bfloat16 or float16 are trained in float: the optimizer keeps such a master copy, made when it is
/// constructed, and every step rounds it into the module. A parameter that is written between steps, such as by
/// load_parameters, no longer is the rounding of its master, which takes over the new value in the next step.
///
/// The results do not depend on the number of threads. To save and restore the state, see <colt5/io/adamw.hpp>.
template <typename Module, Policy P = Cpu>
class AdamW {
    static_assert(TrainableModule<Module>,
                  "colt5: AdamW needs a module with a static each_parameter(f, prefix, m...) and with make_gradients() "
                  "(see TrainableModule)");

public:
    using Gradients = decltype(std::declval<const Module&>().make_gradients());

    /// The number of steps so far, running means of the gradient and of its square, and the master copy.
    struct State {
        std::uint64_t steps;
        Gradients mean, square;
        Gradients master;  ///< empty where the module's parameter is float or double
    };

    /// `module` serves for the shapes of its parameters, and for the master copy of those of 16 bits. Throws ValueError
    /// for an option out of its range.
    AdamW(const P& policy, const Module& module, AdamWOptions options = {})
        : policy_(policy),
          options_(std::move(options)),
          state_{0, module.make_gradients(), module.make_gradients(), {}} {
        const auto [beta1, beta2] = options_.betas;
        expect_learning_rate(options_.lr);
        expect_value(beta1 >= 0 && beta1 < 1, "betas[0]", "in [0, 1)", beta1);
        expect_value(beta2 >= 0 && beta2 < 1, "betas[1]", "in [0, 1)", beta2);
        expect_value(options_.eps >= 0, "eps", ">= 0", options_.eps);
        expect_value(options_.eps <= most, "eps", "at most 1e6", options_.eps);
        expect_value(options_.weight_decay >= 0, "weight_decay", ">= 0", options_.weight_decay);
        expect_value(options_.weight_decay <= most, "weight_decay", "at most 1e6", options_.weight_decay);
        const auto make = detail::make_masters(policy);
        Module::each_parameter(make, "", module, state_.master);
    }

    const AdamWOptions& options() const { return options_; }
    double learning_rate() const { return options_.lr; }
    /// For a schedule: takes effect in the next step. Throws ValueError unless it is in [0, 1e6].
    void set_learning_rate(double lr) {
        expect_learning_rate(lr);
        options_.lr = lr;
    }

    /// Updates every parameter of `module`; `gradients` stay as they are (see zero_gradients). Throws ShapeError, or
    /// ValueError for gradients that are empty, before anything has changed.
    template <typename Given>
    void step(Module& module, const Given& gradients) {
        static_assert(std::same_as<Given, Gradients>,
                      "colt5: `gradients` must be those that make_gradients() of the optimizer's module returns");
        expect_like<Module>("module", state_.mean, module);
        expect_like<Module>("gradients", module, gradients);
        std::vector<double> keep;
        const auto add = detail::add_keep(options_, keep);
        Module::each_parameter(add, "", module);

        const auto [beta1, beta2] = options_.betas;
        const auto t = static_cast<double>(state_.steps + 1);
        AdamWCoefficients coefficients{.keep = 1,
                                       .beta1 = beta1,
                                       .beta2 = beta2,
                                       .step_size = options_.lr / (1 - std::pow(beta1, t)),
                                       .square_bias = std::sqrt(1 - std::pow(beta2, t)),
                                       .eps = options_.eps};
        const double* next_keep = keep.data();
        const auto update = detail::update(policy_, coefficients, next_keep);
        Module::each_parameter(update, "", module, gradients, state_.mean, state_.square, state_.master);
        ++state_.steps;
    }

    /// Whether there is a master copy of anything.
    bool keeps_master() const {
        bool keeps = false;
        Module::each_parameter(EachTensor{[&](const auto& master) { keeps = keeps || master; }}, "", state_.master);
        return keeps;
    }

    State& state() { return state_; }
    const State& state() const { return state_; }

private:
    static constexpr double most = 1e6;
    static void expect_learning_rate(double lr) {
        expect_value(lr >= 0, "lr", ">= 0", lr);
        expect_value(lr <= most, "lr", "at most 1e6", lr);
    }

    P policy_;
    AdamWOptions options_;
    State state_;
};

}  // namespace colt5
