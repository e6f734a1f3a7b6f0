// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <fstream>
#include <functional>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#include <colt5/io/safetensors.hpp>

#if defined(__CUDACC__)
#include "on_cuda.cuh"
#else
#include "on_cpu.hpp"
#endif

/// What the programs of this folder share. Each times one operation or module on the commands of cpu.py or gpu.py: g++
/// makes a program for the CPU of each, nvcc one for the GPU in each type of element. reference_cpu.py and peers_gpu.py
/// answer the same commands with PyTorch.
///
///     PROGRAM INPUTS.safetensors POLICY [NUMBER...]
///
/// POLICY is the number of threads; on the GPU, fp32, tf32 or bf16.
/// Weights are the tensors `module.NAME` of the file, the input is `x` and the gradient of the output `d_out`, or `x`
/// again where the file has none.
/// Commands on the standard input, where MODE is `forward` or `forward_backward`:
///
///     first MODE FILE     makes one call, writes its result to FILE (float32, row-major, the first 2^25 numbers) and
///                         answers with the seconds of the call and the most memory that it took beyond weights and
///                         inputs, in MiB; on the GPU also with what the process took from the device for it
///     time MODE COUNT     makes COUNT calls and answers with the seconds: their mean, or on the GPU one number a call
///     replay MODE COUNT   on the GPU: the same for a CUDA graph of the call
///
/// The answer is `refused REASON` if the call throws. Between commands no memory is held but what inputs and weights
/// need.
namespace bench {

using colt5::dynamic;
using colt5::Index;
using Tokens = colt5::TokensTensor<Scalar, Policy>;

class Inputs {
public:
    Inputs(int argc, char** argv)
        : policy(make_policy(argc > 2 ? argv[2] : throw std::invalid_argument("two arguments are needed"))),
          file_(argv[1]) {
        for (int i = 3; i < argc; ++i) numbers_.push_back(std::stod(argv[i]));
    }

    double number(std::size_t i) const { return numbers_.at(i); }
    double number(std::size_t i, double otherwise) const { return i < numbers_.size() ? numbers_[i] : otherwise; }

    /// A tensor of the file; empty if it has none of that name.
    template <typename Result>
    Result tensor(const std::string& name) const {
        using T = typename Result::value_type;
        if (!file_.contains(name)) return {};
        typename Result::Shape shape{};
        std::copy_n(file_.entry(name).shape.begin(), shape.size(), shape.begin());
        const auto values = file_.read<float>(name);
        if constexpr (std::same_as<T, float>)
            return colt5::from_host<Result>(policy, shape, values);
        else
            return colt5::from_host<Result>(policy, shape, std::vector<T>(values.begin(), values.end()));
    }
    Tokens tokens(const std::string& name) const { return tensor<Tokens>(name); }

    template <typename Module>
    void load(Module& module) const {
        Module::each_parameter(
            [&](const std::string& name, auto& parameter) {
                parameter = tensor<std::decay_t<decltype(parameter)>>("module." + name);
            },
            "", module);
    }

    const Policy policy;

private:
    colt5::SafetensorsFile file_;
    std::vector<double> numbers_;
};

/// For the first two dimensions of x: what the peer is given, too.
inline auto all_true_mask(const Policy& policy, Index batch, Index length) {
    colt5::Tensor<bool, Policy, dynamic, dynamic> mask(policy, {batch, length});
    fill(policy, mask, 1);
    return mask;
}

/// A call hands its result, the output or the gradient of the input, to `keep` while it still holds it.
class Keep {
public:
    Keep() = default;
    /// When there is a result, calls `measure` and then writes it to a file.
    Keep(const Policy& policy, std::function<void()> measure, std::string file)
        : policy_(&policy), measure_(std::move(measure)), file_(std::move(file)) {}

    template <colt5::Viewable V>
    void operator()(const V& result) const {
        if (policy_ == nullptr) return;
        measure_();
        const auto numbers = to_host(*policy_, result);
        std::vector<float> values(std::min(numbers.size(), std::size_t{1} << 25));
        std::transform(numbers.begin(), numbers.begin() + static_cast<std::ptrdiff_t>(values.size()), values.begin(),
                       [](const auto& number) { return static_cast<float>(number); });
        std::ofstream(file_, std::ios::binary)
            .write(reinterpret_cast<const char*>(values.data()),
                   static_cast<std::streamsize>(values.size() * sizeof(float)));
    }

private:
    const Policy* policy_ = nullptr;
    std::function<void()> measure_;
    std::string file_;
};
using Call = std::function<void(bool backward, const Keep& keep)>;

/// Answers commands until the standard input ends.
inline int serve(const Policy& policy, const Call& call) {
    Meter meter(policy);
    std::cout << "ready " << Meter::library << std::endl;
    for (std::string command, mode, argument; std::cin >> command >> mode >> argument;) {
        const bool backward = mode == "forward_backward";
        const auto once = [&] { call(backward, Keep()); };
        std::ostringstream answer;
        try {
            if (command == "first") {
                meter.start();
                call(backward, Keep(
                                   policy, [&] { meter.stop(answer); }, argument));
            } else {
                const int count = std::stoi(argument);
                for (const double seconds : command == "replay" ? meter.replay(count, once) : meter.time(count, once))
                    answer << seconds << ' ';
            }
        } catch (const std::exception& error) {
            answer.str(std::string("refused ") + error.what());
        }
        meter.rest();
        std::cout << answer.str() << std::endl;
    }
    return 0;
}

/// Serves a conditional module: out = module(x, mask), perhaps with other numbers of routed tokens.
template <typename Module, typename... Counts>
int serve_module(const Inputs& inputs, Module module, const Counts&... counts) {
    inputs.load(module);
    const Tokens x = inputs.tokens("x"), d_out = inputs.tokens("d_out");
    const auto mask = all_true_mask(inputs.policy, x.extent(0), x.extent(1));
    return serve(inputs.policy, [&](bool backward, const Keep& keep) {
        if (!backward) return keep(module(x, mask.const_view(), counts...));
        auto saved = module.forward(x, mask.const_view(), counts...);
        auto gradients = module.make_gradients();
        keep(module.backward(std::move(saved), d_out ? d_out : x, gradients));
    });
}

}  // namespace bench
