// SPDX-License-Identifier: MIT
#pragma once

#include <string>

#include <colt5/core/random.hpp>
#include <colt5/core/tensor.hpp>
#include <colt5/cpu/policy.hpp>

/// The least that the library's optimizers and files ask of a module: two parameters with state_dict names.
template <typename T = float>
struct TinyModule {
    colt5::MatrixTensor<T, colt5::Cpu> weight;  // (rows, columns)
    colt5::VectorTensor<T, colt5::Cpu> gamma;   // (columns)

    struct Gradients {
        using Module = TinyModule;
        colt5::MatrixTensor<colt5::accumulate_t<T>, colt5::Cpu> weight;
        colt5::VectorTensor<colt5::accumulate_t<T>, colt5::Cpu> gamma;
    };

    TinyModule(const colt5::Cpu& where, colt5::Index rows, colt5::Index columns)
        : weight(where, {rows, columns}), gamma(where, {columns}), policy(where) {
        colt5::fill_normal(policy, weight, colt5::Random(colt5::Seed{1}, 0));
        colt5::fill_normal(policy, gamma, colt5::Random(colt5::Seed{1}, 1));
    }

    Gradients make_gradients() const {
        Gradients gradients{{policy, weight.shape()}, {policy, gamma.shape()}};
        colt5::fill(policy, gradients.weight, 0);
        colt5::fill(policy, gradients.gamma, 0);
        return gradients;
    }

    template <typename Visit, typename... Objects>
    static void each_parameter(Visit&& visit, const std::string& prefix, Objects&... objects) {
        visit(prefix + "to_q.weight", objects.weight...);
        visit(prefix + "norm.gamma", objects.gamma...);
    }

    colt5::Cpu policy;
};
