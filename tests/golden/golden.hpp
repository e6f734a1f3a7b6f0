// SPDX-License-Identifier: MIT
#pragma once

#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <limits>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <colt5/colt5.hpp>
#include <colt5/io/safetensors.hpp>

// Compares with what the reference computed: files of inputs (in.*), parameters (param.*), outputs (out.*) and
// gradients (grad.*) of sum(output * in.cotangent). A file's metadata have become a configuration by configure.py.
namespace golden {

using colt5::Index;

/// Largest errors, relative to the largest entry of a tensor. In the files, gradients are rounded to float.
template <typename Scalar>
inline constexpr double output_tolerance = std::same_as<Scalar, double> ? 1e-9 : 2e-5;
template <typename Scalar>
inline constexpr double gradient_tolerance = std::same_as<Scalar, double> ? 1e-6 : 2e-5;

/// A golden file that remembers which of its tensors have been used.
class File {
public:
    explicit File(const char* path) : file_(path) {}

    bool contains(const std::string& name) const { return file_.contains(name); }
    const std::vector<Index>& shape(const std::string& name) const { return file_.entry(name).shape; }

    /// A tensor of `Rank` dimensions.
    template <typename T, std::size_t Rank>
    auto tensor(const colt5::Cpu& policy, const std::string& name) {
        const std::vector<Index>& stored = shape(name);
        INFO(name);
        REQUIRE(stored.size() == Rank);
        return [&]<std::size_t... I>(std::index_sequence<I...>) {
            colt5::Tensor<T, colt5::Cpu, (static_cast<void>(I), colt5::dynamic)...> result(policy, {stored[I]...});
            fill(name, result);
            return result;
        }
        (std::make_index_sequence<Rank>{});
    }

    /// Absent if the file has none: every token is real.
    colt5::Tensor<bool, colt5::Cpu, colt5::dynamic, colt5::dynamic> mask(const colt5::Cpu& policy,
                                                                         const std::string& name) {
        if (!contains(name)) return {};
        return tensor<bool, 2>(policy, name);
    }

    /// Throws FileError when the number of elements is another one.
    template <typename Result>
    void fill(const std::string& name, Result& tensor) {
        used_.insert(name);
        file_.read_into(name, std::span(tensor.data(), static_cast<std::size_t>(tensor.size())));
    }

    /// Compares a tensor with the one of the file.
    template <colt5::Viewable V>
    void expect_close(const std::string& name, const V& actual, double tolerance) {
        used_.insert(name);
        INFO(name);
        REQUIRE(std::vector<Index>(actual.shape().begin(), actual.shape().end()) == shape(name));
        const std::vector<double> expected = file_.read<double>(name);
        double largest = 0, worst = 0;
        for (std::size_t i = 0; i < expected.size(); ++i) {
            const double error = std::abs(static_cast<double>(actual.const_view().data()[i]) - expected[i]);
            largest = std::max(largest, std::abs(expected[i]));
            worst = std::max(worst, std::isnan(error) ? std::numeric_limits<double>::infinity() : error);
        }
        CAPTURE(largest);
        CHECK(worst <= tolerance * largest);
    }

    /// Nothing in a file may go without a test.
    void expect_all_used() const {
        for (const auto& entry : file_.entries()) {
            INFO(entry.first << " has not been looked at");
            CHECK(used_.contains(entry.first));
        }
    }

private:
    colt5::SafetensorsFile file_;
    std::set<std::string> used_;
};

/// Calls `check` with a double and with a float.
template <typename Check>
void in_both_precisions(const Check& check) {
    SUBCASE("double") {
        check(double{});
    }
    SUBCASE("float") {
        check(float{});
    }
}

/// The same scores and gradients for logits (rows, n), which are taken as rows of a batch.
inline void check_coordinate_descent(const char* path, const colt5::CoordinateDescent& descent, double k) {
    in_both_precisions([&]<typename Scalar>(Scalar) {
        File file(path);
        const colt5::Cpu policy{1};
        const auto s = file.tensor<Scalar, 2>(policy, "in.s");
        const auto cotangent = file.tensor<Scalar, 2>(policy, "in.cotangent");
        const auto mask = file.mask(policy, "in.mask");

        const Index rows = s.extent(0), n = s.extent(1);
        const auto one_route = [&](const auto& tensor) { return tensor.view().reshape(std::array{rows, Index{1}, n}); };
        const auto one_row = [&](const auto& tensor) { return tensor.view().reshape(std::array{rows, n}); };
        const auto pass = coordinate_descent_forward(policy, descent, k, one_route(s), mask);
        const auto d = coordinate_descent_vjp(policy, descent, k, pass, one_route(cotangent), one_route(s), mask);
        file.expect_close("out.scores", one_row(pass.scores), output_tolerance<Scalar>);
        file.expect_close("grad.s", one_row(d.d_logits), gradient_tolerance<Scalar>);
        if (file.contains("grad.k"))
            file.expect_close("grad.k", d.d_k.view().reshape(std::array{rows}), gradient_tolerance<Scalar>);
        file.expect_all_used();
    });
}

/// Calls f(name, router) in the order in which a call of the module routes.
template <typename Module, typename F>
void each_router(Module& module, const std::string& prefix, const F& f) {
    if constexpr (requires { module.conditional_attn; }) {
        each_router(module.conditional_attn, prefix + "conditional_attn.", f);
        each_router(module.conditional_ff, prefix + "conditional_ff.", f);
    } else if constexpr (requires { module.router; }) {
        f(prefix + "router", module.router);
    } else {
        f(prefix + "q_router", module.q_router);
        f(prefix + "kv_router", module.kv_router);
    }
}

/// Hands each router the noise that the reference's drew. Returns what holds it.
template <typename Scalar, typename Module>
auto give_noise(const colt5::Cpu& policy, File& file, Module& module) {
    std::vector<colt5::TokensTensor<Scalar, colt5::Cpu>> noise;
    each_router(module, "", [&](const std::string& name, auto& router) {
        if constexpr (requires { router.noise; }) {
            // Cross attention with few queries, or a short context, does not route them: no gradient, no noise.
            if (!file.contains("grad.param." + name + ".routing_token")) return;
            noise.push_back(file.tensor<Scalar, 3>(policy, "in.gumbel_" + std::to_string(noise.size())));
            router.noise = router.noise.given(noise.back().const_view());
        }
    });
    return noise;
}

/// The same outputs and gradients, with and without keeping what backward reads.
template <template <typename> typename Module>
void check_module(const char* path) {
    in_both_precisions([&]<typename Scalar>(Scalar) {
        File file(path);
        const colt5::Cpu policy{1};
        Module<Scalar> module{policy, colt5::Seed{0}};
        Module<Scalar>::each_parameter(
            [&](const std::string& name, auto& value) {
                INFO(name);
                REQUIRE(std::vector<Index>(value.shape().begin(), value.shape().end()) == file.shape("param." + name));
                file.fill("param." + name, value);
            },
            "", module);
        const auto x = file.tensor<Scalar, 3>(policy, "in.x");
        const auto mask = file.mask(policy, "in.mask");
        const auto noise = give_noise<Scalar>(policy, file, module);
        const auto cotangent = file.tensor<Scalar, 3>(policy, "in.cotangent");
        auto gradients = module.make_gradients();

        const auto call = [&](const auto&... arguments) {
            const auto y = module(arguments...);
            file.expect_close("out.y", y, output_tolerance<Scalar>);
            const auto pass = module.forward(arguments...);
            CHECK(to_host(policy, pass.out) == to_host(policy, y));
            return module.backward(pass, cotangent, gradients);
        };
        if constexpr (requires { module(x, x, mask, mask); }) {
            const auto context = file.tensor<Scalar, 3>(policy, "in.context");
            const auto context_mask = file.mask(policy, "in.context_mask");
            const auto d = call(x, context, mask, context_mask);
            file.expect_close("grad.x", d.d_x, gradient_tolerance<Scalar>);
            file.expect_close("grad.context", d.d_context, gradient_tolerance<Scalar>);
        } else {
            file.expect_close("grad.x", call(x, mask), gradient_tolerance<Scalar>);
        }
        Module<Scalar>::each_parameter(
            [&](const std::string& name, const auto& gradient) {
                if (file.contains("grad.param." + name)) {
                    file.expect_close("grad.param." + name, gradient, gradient_tolerance<Scalar>);
                } else {  // nothing depends on this parameter, such as a routing token when there is nothing to route
                    INFO(name);
                    const auto values = to_host(policy, gradient);
                    CHECK(std::count(values.begin(), values.end(), Scalar(0)) == gradient.size());
                }
            },
            "", gradients);
        file.expect_all_used();
    });
}

}  // namespace golden
