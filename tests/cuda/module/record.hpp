// SPDX-License-Identifier: MIT
#pragma once

#include <string>

#include "../draw.hpp"

/// What cases of modules record.
namespace cases {

/// Output and all gradients of a module. The gradients of routing tokens are sums of inner products:
/// `of_routing_tokens` is Kind::amplified where a score has several of them, as one that multiplies queries or keys
/// beside the output has. Those of a relative position bias are sums of what adds up to 0 over a row.
template <Kind of_routing_tokens = Kind::rounded, typename Module, typename T, typename P, typename... Inputs>
void record_module(Recorder<P>& record, Draw<T, P>& draw, const Module& of, const Inputs&... inputs) {
    const auto saved = of.forward(inputs...);
    record("inference", of(inputs...));
    record("out", saved.out);
    auto gradients = of.make_gradients();
    const auto d = of.backward(saved, draw.values(saved.out.shape()), gradients);
    if constexpr (requires { d.d_context; }) {
        record("d_x", d.d_x);
        record("d_context", d.d_context);
    } else {
        record("d_tokens", d);
    }
    Module::each_parameter(
        [&](const std::string& name, auto& gradient) {
            record("gradient of " + name, gradient,
                   name.ends_with("routing_token")                             ? of_routing_tokens
                   : name.find("relative_attention_bias") != std::string::npos ? Kind::amplified
                                                                               : Kind::rounded);
        },
        "", gradients);
}

}  // namespace cases
