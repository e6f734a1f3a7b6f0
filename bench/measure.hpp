// SPDX-License-Identifier: MIT
#pragma once

#include <malloc.h>

#include <chrono>
#include <fstream>
#include <functional>
#include <iostream>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include <colt5/colt5.hpp>
#include <colt5/io/parameters.hpp>

/// What the programs of this folder share. Each times one operation or module on the commands of cpu.py;
/// reference_cpu.py answers the same commands with the PyTorch package.
///
///     PROGRAM INPUTS.safetensors THREADS [NUMBER...]
///
/// Weights are the tensors `module.NAME` of the file, the input is `x` and the gradient of the output `d_out`.
/// Commands on the standard input, where MODE is `forward` or `forward_backward`:
///
///     first MODE FILE     makes one call, writes its result to FILE (float32, row-major) and answers with the seconds
///                         of the call and the most memory that it took beyond weights and inputs, in MiB
///     time MODE COUNT     answers with the seconds of one call, the mean of COUNT
namespace bench {

using colt5::Cpu;
using colt5::dynamic;
using colt5::Index;
using Tokens = colt5::TokensTensor<float, Cpu>;

/// A call hands its result to `keep` while it still holds it: the output, or the gradient of the input.
using Keep = std::function<void(std::span<const float>)>;
using Call = std::function<void(bool backward, const Keep& keep)>;

class Inputs {
public:
    Inputs(int argc, char** argv)
        : policy(argc > 2 ? std::stoi(argv[2]) : throw std::invalid_argument("two arguments are needed")),
          file_(argv[1]) {
        for (int i = 3; i < argc; ++i) numbers_.push_back(std::stod(argv[i]));
    }

    double number(std::size_t i) const { return numbers_.at(i); }

    /// A tensor of the file; empty if it has none of that name.
    template <Index... Extents>
    colt5::Tensor<float, Cpu, Extents...> tensor(const std::string& name) const {
        using Result = colt5::Tensor<float, Cpu, Extents...>;
        if (!file_.contains(name)) return {};
        typename Result::Shape shape{};
        std::copy_n(file_.entry(name).shape.begin(), shape.size(), shape.begin());
        Result result(policy, shape);
        file_.read_into(name, std::span(result.data(), static_cast<std::size_t>(result.size())));
        return result;
    }
    Tokens tokens(const std::string& name) const { return tensor<dynamic, dynamic, dynamic>(name); }

    template <typename Module>
    void load(Module& module) const {
        colt5::load_parameters(policy, file_, module, {.prefix = "module"});
    }

    const Cpu policy;

private:
    colt5::SafetensorsFile file_;
    std::vector<double> numbers_;
};

/// For the first two dimensions of x: what the peer is given, too.
inline auto all_true_mask(const Cpu& policy, Index batch, Index length) {
    colt5::Tensor<bool, Cpu, dynamic, dynamic> mask(policy, {batch, length});
    std::fill_n(mask.data(), mask.size(), true);
    return mask;
}

template <typename T>
std::span<const float> values(const T& tensor) {
    return {tensor.data(), static_cast<std::size_t>(tensor.size())};
}

/// A field of /proc/self/status in MiB.
inline double memory_mib(const std::string& field) {
    std::ifstream status("/proc/self/status");
    for (std::string line; std::getline(status, line);)
        if (line.starts_with(field + ":")) return std::stod(line.substr(field.size() + 1)) / 1024;
    throw std::runtime_error("/proc/self/status has no " + field);
}

/// Hands free memory back to the system and lets the peak of this process start anew.
inline void forget_memory(const Cpu& policy) {
    policy.workspace()->release_unused();
    malloc_trim(0);
    std::ofstream("/proc/self/clear_refs") << 5;
}

/// Answers commands until the standard input ends.
inline int serve(const Cpu& policy, const Call& call) {
    using Clock = std::chrono::steady_clock;
    const auto seconds_since = [](Clock::time_point begin) {
        return std::chrono::duration<double>(Clock::now() - begin).count();
    };
    forget_memory(policy);
    const double before = memory_mib("VmRSS");
#if defined(EIGEN_USE_BLAS)
    std::cout << "ready OpenBLAS" << std::endl;
#else
    std::cout << "ready Eigen" << std::endl;
#endif
    for (std::string command, mode, argument; std::cin >> command >> mode >> argument;) {
        const bool backward = mode == "forward_backward";
        if (command == "first") {
            forget_memory(policy);
            const auto begin = Clock::now();
            call(backward, [&](std::span<const float> result) {
                const double seconds = seconds_since(begin), peak = memory_mib("VmHWM");
                std::ofstream(argument, std::ios::binary)
                    .write(reinterpret_cast<const char*>(result.data()),
                           static_cast<std::streamsize>(result.size_bytes()));
                std::cout << seconds << ' ' << peak - before << std::endl;
            });
        } else {
            const int count = std::stoi(argument);
            const auto begin = Clock::now();
            for (int i = 0; i < count; ++i) call(backward, [](std::span<const float>) {});
            std::cout << seconds_since(begin) / count << std::endl;
        }
    }
    return 0;
}

/// Serves a conditional module: out = module(x, mask).
template <typename Module>
int serve_module(const Inputs& inputs) {
    Module module(inputs.policy);
    inputs.load(module);
    const Tokens x = inputs.tokens("x"), d_out = inputs.tokens("d_out");
    const auto mask = all_true_mask(inputs.policy, x.extent(0), x.extent(1));
    return serve(inputs.policy, [&](bool backward, const Keep& keep) {
        if (!backward) return keep(values(module(x, mask.const_view())));
        auto pass = module.forward(x, mask.const_view());
        auto gradients = module.make_gradients();
        keep(values(module.backward(std::move(pass), d_out, gradients)));
    });
}

}  // namespace bench
