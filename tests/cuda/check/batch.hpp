// SPDX-License-Identifier: MIT
#pragma once

#include <doctest/doctest.h>

#include <colt5/cuda.cuh>

#include <array>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "../device.hpp"
#include "numbers.hpp"

/// A batch is what its samples are alone, bit for bit: outputs, and gradients of inputs. Gradients of parameters are
/// sums over the batch, in float or better.
namespace cases {

using colt5::cuda::check;

/// Sample b of a tensor (b, …), as a batch of one in memory of its own.
template <typename V>
auto sample_of(const Cuda& policy, const V& batch, Index b) {
    const auto view = batch.const_view().range(b, 1);
    auto sample = tensor_like(policy, view);
    check(cudaMemcpyAsync(sample.data(), view.data(),
                          static_cast<std::size_t>(view.size()) * sizeof(typename V::value_type),
                          cudaMemcpyDeviceToDevice, policy.stream()),
          "cudaMemcpyAsync");
    return sample;
}

template <typename A, typename B>
void check_sample(const Cuda& policy, const char* what, const A& batch, const B& sample, Index b) {
    INFO(what);
    CHECK(same_bits(policy, batch.const_view().range(b, 1), sample));
}

template <typename Module, typename D, typename... Inputs>
void check_module_alone(const Cuda& policy, const Module& module, const D& d_out, const Inputs&... inputs) {
    auto gradients = module.make_gradients();
    using Results = std::vector<std::pair<const char*, typename Module::Out>>;
    const auto run = [&](Results& results, const auto& d, const auto&... of) {
        results.emplace_back("inference", module(of...));
        auto saved = module.forward(of...);
        auto d_inputs = module.backward(saved, d, gradients);
        results.emplace_back("out", std::move(saved.out));
        if constexpr (requires { d_inputs.d_context; }) {
            results.emplace_back("gradient of the tokens", std::move(d_inputs.d_x));
            results.emplace_back("gradient of the context", std::move(d_inputs.d_context));
        } else {
            results.emplace_back("gradient of the tokens", std::move(d_inputs));
        }
    };
    Results batch;
    run(batch, d_out, inputs...);
    for (Index b = 0; b < d_out.extent(0); ++b) {
        CAPTURE(b);
        Results alone;
        run(alone, sample_of(policy, d_out, b), sample_of(policy, inputs, b)...);
        for (std::size_t i = 0; i < batch.size(); ++i)
            check_sample(policy, batch[i].first, batch[i].second, alone[i].second, b);
    }
}

/// Modules with all routers, of short and long sequences, with and without masks, for more and for fewer tokens than
/// they route.
template <typename T>
void check_modules_alone(Precision precision) {
    constexpr Index batch = 3;
    const Cuda policy = cuda_policy(precision, Cuda::Options().memory_plan);
    std::uint64_t seed = 0;
    const auto with_self_attention = [&]<typename Module>(std::type_identity<Module>, const char* name, Index length,
                                                          bool masked) {
        CAPTURE(std::string(name));
        Draw<T, Cuda> draw(policy, {precision, ++seed});
        const auto module = draw.template made<Module>();
        const auto x = draw.values(std::array{batch, length, Index{48}}), d_out = draw.values(x.shape());
        const auto mask = draw.mask(batch, length);
        without_noise(module, [&] {
            if (masked)
                check_module_alone(policy, module, d_out, x, mask);
            else
                check_module_alone(policy, module, d_out, x);
        });
    };
    const auto with_context = [&]<CrossAttentionConfig config>(Index length, bool masked) {
        using Module = ConditionalRoutedCrossAttention<config, T, Cuda>;
        Draw<T, Cuda> draw(policy, {precision, ++seed});
        const auto module = draw.template made<Module>();
        const auto x = draw.values(std::array{batch, length, Index{48}}), d_out = draw.values(x.shape());
        const auto context = draw.values(std::array{batch, 2 * length + 1, Index{48}});
        const auto mask = draw.mask(batch, length), context_mask = draw.mask(batch, 2 * length + 1);
        if (masked)
            check_module_alone(policy, module, d_out, x, context, mask, context_mask);
        else
            check_module_alone(policy, module, d_out, x, context);
    };
    const auto with_maps = [&]<ImageAttentionConfig config>(Index height, bool masked) {
        using Module = ConditionalRoutedImageAttention<config, T, Cuda>;
        Draw<T, Cuda> draw(policy, {precision, ++seed});
        const auto module = draw.template made<Module>();
        const Index width = 23;
        const auto maps = draw.values(config.channel_first ? std::array{batch, Index{48}, height, width}
                                                           : std::array{batch, height, width, Index{48}});
        const auto d_out = draw.values(maps.shape());
        const auto mask = map_mask(policy, draw.mask(batch, height * width), height);
        if (masked)
            check_module_alone(policy, module, d_out, maps, mask);
        else
            check_module_alone(policy, module, d_out, maps);
    };
    for (const Index height : {1, 9, 150}) {
        if (sanitized() && height > 9) continue;
        CAPTURE(height);
        for (const bool masked : {false, true}) {
            with_maps.template operator()<over_map>(height, masked);
            if (height == 150) continue;
            with_maps.template operator()<over_map_of_channels>(height, masked);
            with_maps.template operator()<per_window>(height, masked);
        }
    }
    for (const Index length : {1, 7, 18, 100, 700, 2050, 5000}) {
        if (sanitized() && length > 100) continue;
        CAPTURE(length);
        for (const bool masked : {false, true}) {
            CAPTURE(masked);
            const auto check = [&]<auto config>(const char* router) {
                using Block = ConditionalRoutedTransformerBlock<config, T, Cuda>;
                with_self_attention(std::type_identity<Block>(), router, length, masked);
            };
            check.template operator()<by_descent>("block, coordinate descent");
            check.template operator()<by_softmax>("block, cumulative softmax");
            check.template operator()<by_sinkhorn>("block, Sinkhorn");
            with_self_attention(std::type_identity<ConditionalRoutedAttention<attention_with_null_tokens, T, Cuda>>(),
                                "attention with null tokens", length, masked);
            with_self_attention(std::type_identity<ConditionalRoutedAttention<attention_with_rotary, T, Cuda>>(),
                                "attention with rotary embeddings", length, masked);
            with_self_attention(std::type_identity<ConditionalRoutedAttention<heavy_attention_alone, T, Cuda>>(),
                                "heavy attention alone", length, masked);
            with_self_attention(std::type_identity<ConditionalRoutedFeedForward<gated_config, T, Cuda>>(),
                                "gated feedforward", length, masked);
            with_self_attention(std::type_identity<ExpertChoice<T, Cuda>>(), "expert choice", length, masked);
            with_self_attention(std::type_identity<MixtureOfAttention<T, Cuda>>(), "mixture of attention", length,
                                masked);
            with_self_attention(std::type_identity<RoutedTwice<T, Cuda>>(), "a routed module as the heavy branch",
                                length, masked);
            with_context.template operator()<cross_config>(length, masked);
            if (length != 18 && length != 700) continue;
            check.template operator()<of_paper>("block, the paper's form");
            check.template operator()<by_descent_in_blocks>("block in blocks, coordinate descent");
            check.template operator()<by_softmax_in_blocks>("block in blocks, cumulative softmax");
            check.template operator()<by_sinkhorn_in_blocks>("block in blocks, Sinkhorn");
            const auto check_attention = [&]<AttentionConfig config>(const char* name) {
                with_self_attention(std::type_identity<ConditionalRoutedAttention<config, T, Cuda>>(), name, length,
                                    masked);
            };
            check_attention.template operator()<attention_with_bias>("attention with a relative position bias");
            check_attention.template operator()<attention_with_query_routes>("routes of queries, coordinate descent");
            check_attention.template operator()<query_routes_by_softmax>("routes of queries, cumulative softmax");
            check_attention.template operator()<query_routes_by_sinkhorn>("routes of queries, Sinkhorn");
            check_attention.template operator()<query_routes_with_bias>("routes of queries with a bias");
            with_context.template operator()<cross_with_query_routes>(length, masked);
            with_context.template operator()<cross_with_bias>(length, masked);
            with_context.template operator()<cross_with_null_tokens>(length, masked);
            with_context.template operator()<cross_conditioned>(length, masked);
            with_context.template operator()<cross_in_blocks>(length, masked);
            with_context.template operator()<cross_conditioned_in_blocks>(length, masked);
        }
    }
}

/// Gradients of parameters for many times the same sample: a sum in 16 bits would stand still.
template <typename T>
void check_sums_over_batch(Precision precision) {
    constexpr Index batch = 1000;
    const Cuda policy = cuda_policy(precision, Cuda::Options().memory_plan);
    Draw<T, Cuda> draw(policy, {precision, 1});
    const auto repeated = [&](const auto& sample) {
        const auto values = to_host(policy, sample);
        TokensTensor<T, Cuda> tensor(policy, {batch, sample.extent(1), sample.extent(2)});
        fill_with(policy, tensor, [&](std::size_t i) { return values[i % values.size()]; });
        return tensor;
    };
    const auto check_module = [&](const auto& module, const char* name) {
        CAPTURE(std::string(name));
        const auto x = draw.values(std::array{Index{1}, Index{40}, Index{48}}), d_out = draw.values(x.shape());
        using Module = std::remove_cvref_t<decltype(module)>;
        auto alone = module.make_gradients(), of_batch = module.make_gradients();
        const auto add_gradients = [&](auto& gradients, const auto& tokens, const auto& d) {
            static_cast<void>(module.backward(module.forward(tokens), d, gradients));
        };
        add_gradients(alone, x, d_out);
        add_gradients(of_batch, repeated(x), repeated(d_out));
        Module::each_parameter(
            [&](const std::string& parameter, const auto& sum, const auto& one) {
                CAPTURE(parameter);
                CHECK(largest_error(numbers(policy, sum), numbers(policy, one), 1.0 / batch) < 1e-3);
            },
            "", of_batch, alone);
    };
    check_module(draw.template made<ConditionalRoutedAutoregressiveAttention<autoregressive, T, Cuda>>(),
                 "autoregressive attention");
    check_module(draw.template made<ConditionalRoutedAutoregressiveAttention<autoregressive_of_routes, T, Cuda>>(),
                 "autoregressive attention with routes");
    check_module(draw.template made<ConditionalRoutedAttention<attention_with_null_tokens, T, Cuda>>(),
                 "attention with null tokens");
    check_module(draw.template made<ConditionalRoutedAttention<attention_with_bias, T, Cuda>>(),
                 "attention with a relative position bias");
    check_module(draw.template made<ConditionalRoutedFeedForward<gated_config, T, Cuda>>(), "gated feedforward");
}

/// Products of the shapes that modules have, of as few and as many rows as there are tokens.
template <typename T>
void check_products_alone(Precision precision) {
    constexpr Index batch = 3;
    const Cuda policy = cuda_policy(precision, Cuda::Options().memory_plan);
    std::uint64_t seed = 0;
    for (const auto& [in, out] : std::array<std::array<Index, 2>, 8>{
             {{512, 1536}, {512, 2048}, {2048, 512}, {512, 256}, {256, 512}, {48, 96}, {7, 5}, {640, 1}}})
        for (const Index length : {1, 13, 128, 1000, 2100, 4100})
            for (const Index routes : {1, 2}) {
                if (sanitized() && length * in * out > 10'000'000) continue;
                if (batch * routes * length * (in + out) > 13'000'000) continue;  // the host compares them
                CAPTURE(in);
                CAPTURE(out);
                CAPTURE(length);
                CAPTURE(routes);
                Draw<T, Cuda> draw(policy, {precision, ++seed});
                // Few numbers that come again and again: to draw so many would take long.
                const auto repeated = [&](const auto& shape) {
                    Tensor<T, Cuda, dynamic, dynamic, dynamic, dynamic> tensor(policy, shape);
                    const auto some = to_host(policy, draw.values(std::array{Index{1009}}));
                    fill_with(policy, tensor, [&](std::size_t i) { return some[(i + i / 5003) % some.size()]; });
                    return tensor;
                };
                const auto weight = draw.values(std::array{routes * out, in});
                const auto bias = draw.values(std::array{routes * out});
                const auto x = repeated(std::array{batch, routes, length, in});
                const auto d_y = repeated(std::array{batch, routes, length, out});
                auto d_weight = draw.sums(std::array{routes * out, in});
                auto d_bias = draw.sums(std::array{routes * out});
                const auto y = routed_linear(policy, x, weight, bias.const_view());
                const auto d_x = routed_linear_vjp(policy, d_y, x, weight, d_weight.view(), d_bias.view());
                for (Index b = 0; b < batch; ++b) {
                    const auto x_alone = sample_of(policy, x, b), d_y_alone = sample_of(policy, d_y, b);
                    check_sample(policy, "y", y, routed_linear(policy, x_alone, weight, bias.const_view()), b);
                    check_sample(policy, "d_x", d_x,
                                 routed_linear_vjp(policy, d_y_alone, x_alone, weight, d_weight.view(), d_bias.view()),
                                 b);
                }
            }
}

}  // namespace cases
