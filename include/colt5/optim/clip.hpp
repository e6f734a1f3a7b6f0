// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <string>

#include <colt5/core/norm.hpp>
#include <colt5/core/parameters.hpp>
#include <colt5/core/policy.hpp>
#include <colt5/core/view.hpp>
#include <colt5/op/global_norm.hpp>
#include <colt5/op/zero.hpp>

namespace colt5 {

// Gradients of a module know whose they are: gradient_norm(policy, gradients). Those of a type without a member
// `Module` need its name: gradient_norm<Model>(policy, gradients). All of these throw ValueError, before anything has
// changed, for gradients that are empty.

/// The Euclidean norm of all gradients of a module taken as one vector. Computed in double; the same bits for any
/// number of threads.
template <typename Module = void, Policy P, typename Gradients>
double gradient_norm(const P& policy, const Gradients& gradients) {
    using Of = module_of_t<Module, Gradients>;
    expect_gradients<Of>(gradients);
    return scaled_norm<double>([&](double scale) {
        double squares = 0;
        Of::each_parameter(
            [&](const std::string&, const auto& gradient) { squares += sum_of_squares(policy, gradient, scale); }, "",
            gradients);
        return squares;
    });
}

/// Scales the gradients so that their norm is at most `max_norm`, and returns the norm that they had before. As
/// torch.nn.utils.clip_grad_norm_, the factor is max_norm / (norm + 1e-6), applied if below 1. Gradients with a norm
/// that is not finite stay as they are: test the returned norm and leave the step out.
///
/// Throws ValueError when `max_norm` is negative.
template <typename Module = void, Policy P, typename Gradients>
double clip_gradient_norm(const P& policy, Gradients& gradients, double max_norm) {
    using Of = module_of_t<Module, Gradients>;
    expect_value(max_norm >= 0, "max_norm", ">= 0", max_norm);
    const double norm = gradient_norm<Of>(policy, gradients);
    double factor = max_norm / (norm + 1e-6);
    if (!std::isfinite(norm) || factor >= 1) return norm;
    const auto multiply = [&](double by) {
        Of::each_parameter([&](const std::string&, auto& gradient) { scale(policy, gradient, by); }, "", gradients);
    };
    constexpr auto least = static_cast<double>(scale_of_large<float>);
    if (factor > 0 && factor < least) {  // too small a factor for float, while the products are not
        multiply(least);
        factor /= least;
    }
    multiply(factor);
    return norm;
}

/// Sets all gradients to zero, before the backward passes that accumulate into them.
template <typename Module = void, Policy P, typename Gradients>
void zero_gradients(const P& policy, Gradients& gradients) {
    using Of = module_of_t<Module, Gradients>;
    expect_gradients<Of>(gradients);
    Of::each_parameter([&](const std::string&, auto& gradient) { set_zero(policy, gradient); }, "", gradients);
}

}  // namespace colt5
