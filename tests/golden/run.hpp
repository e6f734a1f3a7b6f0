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
    } else if constexpr (requires { module.layers; }) {
        for (std::size_t i = 0; i < module.layers.size(); ++i) {
            const std::string layer = prefix + "transformer.layers." + std::to_string(i);
            each_router(module.layers[i].attention, layer + ".0.", f);
            each_router(module.layers[i].feed_forward, layer + ".1.", f);
        }
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

/// What a part of a module hands to the next one: recorded, or replaced by what `variation` has.
template <Policy P, typename Result>
void hand_on(const P& policy, Arrays& results, const Variation& variation, const std::string& name, Result& tensor) {
    if (variation.middle != nullptr)
        fill_with_array(policy, tensor, variation.middle->at(name), name, variation);
    else
        results[name] = array_of(policy, tensor);
}
/// A copy that is handed on.
template <Policy P, colt5::Viewable V>
auto handed_on(const P& policy, Arrays& results, const Variation& variation, const std::string& name, const V& view) {
    auto copy = tensor_like(policy, view);
    assign(policy, copy, view);
    hand_on(policy, results, variation, name, copy);
    return copy;
}

/// The indices that the routers of some Activations chose.
template <Policy P, typename Activations>
void record_routing(const P& policy, Arrays& results, const Activations& saved, const std::string& prefix = "") {
    saved.each_routing([&](const std::string& router, const auto& routing) {
        results["routing." + prefix + router] = array_of(policy, routing.indices);
    });
}

/// Forward and backward passes of a block, half by half: see Variation. Returns the gradient of x.
template <typename Block, Policy P, typename X, typename D>
auto run_halves(const P& policy, Arrays& results, const Variation& variation, const Block& block, const X& x,
                colt5::Mask mask, const D& cotangent, typename Block::Gradients& gradients) {
    using colt5::Residual;
    const auto attn = block.conditional_attn.forward(x, mask, {}, Residual::tokens);
    const auto middle = handed_on(policy, results, variation, "middle.out", attn.out);
    const auto ff = block.conditional_ff.forward(middle, mask, {}, Residual::tokens);
    results["out.y"] = array_of(policy, ff.out);
    record_routing(policy, results, attn, "conditional_attn.");
    record_routing(policy, results, ff, "conditional_ff.");
    auto d_middle = block.conditional_ff.backward(ff, cotangent, gradients.conditional_ff);
    hand_on(policy, results, variation, "middle.grad", d_middle);
    return block.conditional_attn.backward(attn, d_middle, gradients.conditional_attn);
}

/// The same of the layers of a ViT. Returns the gradient of the images.
template <typename ViT, Policy P, typename X, typename D>
auto run_layers(const P& policy, Arrays& results, const Variation& variation, const ViT& vit, const X& images,
                const D& cotangent, typename ViT::Gradients& gradients) {
    using Tokens = colt5::TokensTensor<typename ViT::Out::value_type, P>;
    using colt5::Residual;
    const auto embedded = vit.embed(images);
    const auto& grid = embedded.grid;
    const auto name_of = [](std::size_t layer, int half) {
        return "middle." + std::to_string(layer) + "." + std::to_string(half) + ".";
    };
    std::vector<Tokens> inputs;  // of all halves
    std::vector<typename ViT::Activations::Layer> saved;
    for (std::size_t i = 0; i < vit.layers.size(); ++i) {
        const auto& x = i == 0 ? embedded.tokens : saved.back().feed_forward.out;
        inputs.push_back(handed_on(policy, results, variation, name_of(i, 0) + "out", ViT::sequences(x, grid)));
        auto attention =
            vit.layers[i].attention.forward(inputs.back(), ViT::sequences(embedded.mask, grid), {}, Residual::tokens);
        inputs.push_back(handed_on(policy, results, variation, name_of(i, 1) + "out", ViT::maps(attention.out, grid)));
        auto ff = vit.layers[i].feed_forward.forward(inputs.back(), embedded.mask.const_view(), {}, Residual::tokens);
        saved.push_back({std::move(attention), std::move(ff)});
        const std::string layer = "transformer.layers." + std::to_string(i);
        record_routing(policy, results, saved.back().attention, layer + ".0.");
        record_routing(policy, results, saved.back().feed_forward, layer + ".1.");
    }
    const auto head = vit.linear_head.forward(policy, saved.back().feed_forward.out, grid);
    results["out.y"] = array_of(policy, head.out);
    Tokens d = vit.linear_head.backward(policy, head, cotangent, grid, gradients.linear_head);
    for (std::size_t i = vit.layers.size(); i-- > 0;) {
        d = handed_on(policy, results, variation, name_of(i, 1) + "grad", ViT::maps(d, grid));
        d = vit.layers[i].feed_forward.backward(saved[i].feed_forward, d, gradients.layers[i].feed_forward);
        d = handed_on(policy, results, variation, name_of(i, 0) + "grad", ViT::sequences(d, grid));
        d = vit.layers[i].attention.backward(saved[i].attention, d, gradients.layers[i].attention);
    }
    return vit.embed_gradients(embedded, d, gradients);
}

/// Outputs and gradients under the names of the file; also `out.y, inference` of a call that keeps nothing for
/// backward, `routing.` with the name of each router, the indices that it chose, and what lies between the halves of a
/// block that was run in halves, unless it was given.
template <typename Module, Policy P>
Arrays run_module(const P& policy, File& file, const Variation& variation = {}) {
    using Scalar = typename Module::Out::value_type;
    Module module{policy, colt5::Seed{0}};
    constexpr bool of_images = requires {
        typename Module::Images;
    };  // (b, channels, h, w)
    constexpr std::size_t rank = of_images ? 4 : Module::Out::rank;
    const auto of_file = [&]<std::size_t Rank = Module::Out::rank>(const std::string& name) {
        return tensor_of<Scalar, Rank>(policy, file.use(name), name, variation);
    };
    Module::each_parameter(
        [&](const std::string& name, auto& value) {
            fill_with_array(policy, value, file.use("param." + name), "param." + name, variation);
        },
        "", module);
    const auto x = of_file.template operator()<rank>("in.x");
    const auto mask = mask_of<rank - 1>(policy, file, "in.mask");
    const auto noise = give_noise(policy, file, module);
    const auto cotangent = of_file("in.cotangent");
    auto gradients = module.make_gradients();

    Arrays results;
    const auto call = [&](const auto&... arguments) {
        results["out.y, inference"] = array_of(policy, module(arguments...));
        const auto saved = module.forward(arguments...);
        results["out.y"] = array_of(policy, saved.out);
        record_routing(policy, results, saved);
        return module.backward(saved, cotangent, gradients);
    };
    if constexpr (of_images) {
        if (variation.in_halves) {
            results["out.y, inference"] = array_of(policy, module(x));
            results["grad.x"] =
                array_of(policy, run_layers(policy, results, variation, module, x, cotangent, gradients));
        } else {
            results["grad.x"] = array_of(policy, call(x));
        }
    } else if constexpr (requires { module(x, x, mask, mask); }) {
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
