// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <cstddef>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <colt5/core/random.hpp>
#include <colt5/core/tensor.hpp>
#include <colt5/op/coordinate_descent.hpp>
#include <colt5/op/topk.hpp>

#include "file.hpp"

/// Computes what is in a golden file, for a policy whose kernels and modules are included before this file.
namespace golden {

using colt5::Policy;

/// Fills a tensor with an array of the same shape.
template <Policy P, typename Result>
void fill_with_array(const P& policy, Result& tensor, const Array& from, const std::string& name = {},
                     const Variation& variation = {}) {
    if (std::vector<Index>(tensor.shape().begin(), tensor.shape().end()) != from.shape)
        throw std::runtime_error("a golden file has another shape than " + colt5::shape_string(tensor.shape()));
    fill_with(policy, tensor, [&](std::size_t i) {
        return variation.number ? variation.number(name, i, from.values[i]) : from.values[i];
    });
}

template <typename T, std::size_t Rank, Policy P>
auto tensor_of(const P& policy, const Array& from, const std::string& name = {}, const Variation& variation = {}) {
    if (from.shape.size() != Rank) throw std::runtime_error("a tensor of a golden file has another rank");
    return [&]<std::size_t... I>(std::index_sequence<I...>) {
        colt5::Tensor<T, P, (static_cast<void>(I), colt5::dynamic)...> result(policy, {from.shape[I]...});
        fill_with_array(policy, result, from, name, variation);
        return result;
    }
    (std::make_index_sequence<Rank>{});
}

/// Of tokens (b, n), or of maps. Absent if the file has none: every token is real.
template <std::size_t Rank = 2, Policy P>
auto mask_of(const P& policy, File& file, const std::string& name) {
    using Result = decltype(tensor_of<bool, Rank>(policy, file.use(name)));
    return file.contains(name) ? tensor_of<bool, Rank>(policy, file.use(name)) : Result();
}

template <Policy P, colt5::Viewable V>
Array array_of(const P& policy, const V& tensor) {
    Array array{{tensor.shape().begin(), tensor.shape().end()}, {}};
    for (const auto& value : to_host(policy, tensor)) array.values.push_back(static_cast<double>(value));
    return array;
}

/// Scores and gradients for logits (rows, n), which are taken as rows of a batch.
template <typename Logit, Policy P>
Arrays run_coordinate_descent(const P& policy, File& file, const colt5::CoordinateDescent& descent, double k) {
    const auto s = tensor_of<Logit, 2>(policy, file.use("in.s"));
    const auto cotangent = tensor_of<Logit, 2>(policy, file.use("in.cotangent"));
    const auto mask = mask_of(policy, file, "in.mask");

    const Index rows = s.extent(0), n = s.extent(1);
    const auto one_route = [&](const auto& tensor) { return tensor.view().reshape(std::array{rows, Index{1}, n}); };
    const auto one_row = [&](const auto& tensor) { return tensor.view().reshape(std::array{rows, n}); };
    const auto saved = coordinate_descent_forward(policy, descent, k, one_route(s), mask);
    const auto d = coordinate_descent_vjp(policy, descent, k, saved, one_route(cotangent), one_route(s), mask);
    Arrays results;
    results["out.scores"] = array_of(policy, one_row(saved.scores));
    results["grad.s"] = array_of(policy, one_row(d.d_logits));
    if (file.contains("grad.k")) results["grad.k"] = array_of(policy, d.d_k.view().reshape(std::array{rows}));
    return results;
}

/// What topk gives for rows (rows, n), and the gradient of its values.
template <typename T, Policy P>
Arrays run_topk(const P& policy, File& file, Index k, const colt5::TopkOptions& options) {
    const auto x = tensor_of<T, 2>(policy, file.use("in.x"));
    const auto cotangent = tensor_of<T, 2>(policy, file.use("in.cotangent"));
    const auto one_route = [&](const auto& tensor) {
        return tensor.view().reshape(std::array{tensor.extent(0), Index{1}, tensor.extent(1)});
    };
    const auto one_row = [&](const auto& tensor) {
        return array_of(policy, tensor.view().reshape(std::array{tensor.extent(0), tensor.extent(2)}));
    };
    const auto result = topk(policy, one_route(x), k, options);
    Arrays results;
    results["out.values"] = one_row(result.values);
    results["out.indices"] = one_row(result.indices);
    results["out.coor_descent_values"] = one_row(result.coor_descent_values);
    results["out.gates"] = one_row(result.gates);
    results["grad.x"] = one_row(topk_vjp(policy, result, one_route(cotangent), one_route(x), k, options));
    return results;
}

/// Calls f(name, router) in the order in which a call of the module routes.
template <typename Module, typename F>
void each_router(Module& module, const std::string& prefix, const F& f) {
    if constexpr (requires { module.conditional_attn; }) {
        each_router(module.conditional_attn, prefix + "conditional_attn.", f);
        each_router(module.conditional_ff, prefix + "conditional_ff.", f);
    } else if constexpr (requires { module.attention; }) {
        each_router(module.attention, prefix, f);
    } else if constexpr (requires { module.router; }) {
        f(prefix + "router", module.router);
    } else {
        f(prefix + "q_router", module.q_router);
        f(prefix + "kv_router", module.kv_router);
    }
}

/// Hands each router the noise that the reference's drew. Returns what holds it.
template <Policy P, typename Module>
auto give_noise(const P& policy, File& file, Module& module) {
    using Logit = colt5::accumulate_t<typename Module::Out::value_type>;
    std::vector<colt5::TokensTensor<Logit, P>> noise;
    each_router(module, "", [&](const std::string& name, auto& router) {
        if constexpr (requires { router.noise; }) {
            // Cross attention with few queries, or a short context, does not route them: no gradient, no noise.
            if (!file.contains("grad.param." + name + ".routing_token")) return;
            noise.push_back(tensor_of<Logit, 3>(policy, file.use("in.gumbel_" + std::to_string(noise.size()))));
            router.noise = router.noise.given(noise.back().const_view());
        }
    });
    return noise;
}

/// Forward and backward passes of a block, half by half: see Variation. Returns the gradient of x.
template <typename Block, Policy P, typename X, typename D>
auto run_halves(const P& policy, Arrays& results, const Variation& variation, const Block& block, const X& x,
                colt5::Mask mask, const D& cotangent, typename Block::Gradients& gradients) {
    using Scalar = typename Block::Out::value_type;
    using colt5::Residual;
    const auto given = [&](const std::string& name, auto& tensor) {
        if (variation.middle != nullptr)
            fill_with_array(policy, tensor, variation.middle->at(name), name, variation);
        else
            results[name] = array_of(policy, tensor);
    };
    const auto attn = block.conditional_attn.forward(x, mask, {}, Residual::tokens);
    colt5::TokensTensor<Scalar, P> middle(policy, x.shape());
    assign(policy, middle, attn.out);
    given("middle.out", middle);
    const auto ff = block.conditional_ff.forward(middle, mask, {}, Residual::tokens);
    results["out.y"] = array_of(policy, ff.out);
    attn.each_routing([&](const std::string& router, const auto& routing) {
        results["routing.conditional_attn." + router] = array_of(policy, routing.indices);
    });
    ff.each_routing([&](const std::string& router, const auto& routing) {
        results["routing.conditional_ff." + router] = array_of(policy, routing.indices);
    });
    auto d_middle = block.conditional_ff.backward(ff, cotangent, gradients.conditional_ff);
    given("middle.grad", d_middle);
    return block.conditional_attn.backward(attn, d_middle, gradients.conditional_attn);
}

/// Outputs and gradients under the names of the file; also `out.y, inference` of a call that keeps nothing for
/// backward, `routing.` with the name of each router, the indices that it chose, and what lies between the halves of a
/// block that was run in halves, unless it was given.
template <typename Module, Policy P>
Arrays run_module(const P& policy, File& file, const Variation& variation = {}) {
    using Scalar = typename Module::Out::value_type;
    Module module{policy, colt5::Seed{0}};
    constexpr std::size_t rank = Module::Out::rank;
    const auto of_file = [&](const std::string& name) {
        return tensor_of<Scalar, rank>(policy, file.use(name), name, variation);
    };
    Module::each_parameter(
        [&](const std::string& name, auto& value) {
            fill_with_array(policy, value, file.use("param." + name), "param." + name, variation);
        },
        "", module);
    const auto x = of_file("in.x");
    const auto mask = mask_of<rank - 1>(policy, file, "in.mask");
    const auto noise = give_noise(policy, file, module);
    const auto cotangent = of_file("in.cotangent");
    auto gradients = module.make_gradients();

    Arrays results;
    const auto call = [&](const auto&... arguments) {
        results["out.y, inference"] = array_of(policy, module(arguments...));
        const auto saved = module.forward(arguments...);
        results["out.y"] = array_of(policy, saved.out);
        saved.each_routing([&](const std::string& router, const auto& routing) {
            results["routing." + router] = array_of(policy, routing.indices);
        });
        return module.backward(saved, cotangent, gradients);
    };
    if constexpr (requires { module(x, x, mask, mask); }) {
        const auto context = of_file("in.context");
        const auto context_mask = mask_of(policy, file, "in.context_mask");
        const auto d = call(x, context, mask, context_mask);
        results["grad.x"] = array_of(policy, d.d_x);
        results["grad.context"] = array_of(policy, d.d_context);
    } else if constexpr (requires { module.conditional_attn; }) {
        if (variation.in_halves) {
            results["out.y, inference"] = array_of(policy, module(x, mask));
            results["grad.x"] = array_of(
                policy, run_halves(policy, results, variation, module, x, mask.const_view(), cotangent, gradients));
        } else {
            results["grad.x"] = array_of(policy, call(x, mask));
        }
    } else {
        results["grad.x"] = array_of(policy, call(x, mask));
    }
    Module::each_parameter([&](const std::string& name,
                               const auto& gradient) { results["grad.param." + name] = array_of(policy, gradient); },
                           "", gradients);
    return results;
}

/// A golden file as a computation on a policy.
template <Policy P>
struct Runner {
    std::string name, path;
    bool by_cosine;  // its routers normalize tokens and routing tokens
    Arrays (*run)(const P& policy, File& file, const Variation& variation);
};

}  // namespace golden
