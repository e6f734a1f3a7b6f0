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

namespace detail {
template <Policy P>
auto add_squares(const P& policy, double scale, double& squares) {
    return EachTensor{
        [&policy, scale, &squares](const auto& gradient) { squares += sum_of_squares(policy, gradient, scale); }};
}
template <Policy P>
auto multiply_by(const P& policy, double factor) {
    return EachTensor{[&policy, factor](auto& gradient) { scale(policy, gradient, factor); }};
}
template <Policy P>
auto clear(const P& policy) {
    return EachTensor{[&policy](auto& gradient) { set_zero(policy, gradient); }};
}
}  // namespace detail

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
        const auto add = detail::add_squares(policy, scale, squares);
        Of::each_parameter(add, "", gradients);
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
    const auto multiply_all = [&](double by) {
        const auto multiply = detail::multiply_by(policy, by);
        Of::each_parameter(multiply, "", gradients);
    };
    constexpr auto least = static_cast<double>(scale_of_large<float>);
    if (factor > 0 && factor < least) {  // too small a factor for float, while the products are not
        multiply_all(least);
        factor /= least;
    }
    multiply_all(factor);
    return norm;
}

/// Sets all gradients to zero, before the backward passes that accumulate into them.
template <typename Module = void, Policy P, typename Gradients>
void zero_gradients(const P& policy, Gradients& gradients) {
    using Of = module_of_t<Module, Gradients>;
    expect_gradients<Of>(gradients);
    const auto clear = detail::clear(policy);
    Of::each_parameter(clear, "", gradients);
}

}  // namespace colt5
