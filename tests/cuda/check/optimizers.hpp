// SPDX-License-Identifier: MIT
#pragma once

#include <doctest/doctest.h>

#include <colt5/cuda.cuh>
#include <colt5/io/training.hpp>

#include <cmath>
#include <cstddef>
#include <filesystem>
#include <random>
#include <string>
#include <vector>

#include "block_once.hpp"
#include "numbers.hpp"

/// Optimizers at the ends of the range of numbers, and with parameters that somebody writes.
namespace cases {

using namespace colt5;

/// Norms of gradients whose squares double cannot hold, and AdamW without eps.
inline void check_ends_of_optimizers() {
    const Cuda policy;
    const auto unit = normal_rows<double>(policy, 30, 40, 6, 1);
    const double norm = std::sqrt(sum_of_squares(policy, unit));
    for (const double factor : {0x1p520, 0x1p1010, 0x1p-560, 0x1p-1000}) {
        const auto x = normal_rows<double>(policy, 30, 40, 6, factor);
        const double found = scaled_norm<double>([&](double scale) { return sum_of_squares(policy, x, scale); });
        CHECK(found / factor == doctest::Approx(norm).epsilon(1e-13));
    }
    VectorTensor<float, Cuda> parameter(policy, {70}), gradient(policy, {70}), mean(policy, {70}), square(policy, {70});
    fill(policy, parameter, 2);
    for (auto* zeros : {&gradient, &mean, &square}) set_zero(policy, *zeros);
    const AdamWCoefficients coefficients{
        .keep = 1, .beta1 = 0.9, .beta2 = 0.999, .step_size = 5, .square_bias = 0.03, .eps = 0};
    adamw_update(policy, parameter, {}, gradient, mean, square, coefficients);
    for (const double value : numbers(policy, parameter)) CHECK(value == 2);
}

/// What is written into parameters of 16 bits between two steps is what the next step updates; the others keep the
/// digits that their master has beyond them.
template <HalfPrecision T>
void check_written_parameters() {
    BlockOnce<T> once;
    AdamW optimizer(once.policy, once.block, {.weight_decay = 0});
    once.run();
    optimizer.step(once.block, once.gradients);
    auto& weight = once.block.conditional_ff.light_ff.hidden.weight;
    const auto& master = optimizer.state().master.conditional_ff.light_ff.hidden.weight;
    const auto before = to_host(once.policy, master);
    auto values = to_host(once.policy, weight);
    for (std::size_t i = 0; i < values.size(); i += 2) values[i] = T(0.001 * static_cast<double>(i));
    upload(once.policy, weight.data(), values.data(), values.size() * sizeof(T));
    optimizer.set_learning_rate(0);
    optimizer.step(once.block, once.gradients);
    const auto after = to_host(once.policy, master);
    const auto parameters = to_host(once.policy, weight);
    std::size_t wrong = 0, finer = 0;
    for (std::size_t i = 0; i < values.size(); ++i) {
        wrong += after[i] != (i % 2 == 0 ? static_cast<float>(values[i]) : before[i]);
        wrong += parameters[i].bits() != values[i].bits();
        finer += static_cast<float>(parameters[i]) != after[i];
    }
    CHECK(wrong == 0);
    CHECK(finer > values.size() / 4);
}

/// A run that is saved and loaded goes on bit for bit.
template <typename T>
void check_resumed_training() {
    const auto path = std::filesystem::temp_directory_path() /
                      ("colt5-training-" + std::to_string(sizeof(T)) + "-" + std::to_string(std::random_device()()));
    BlockOnce<T> first, second;
    AdamW optimizer(first.policy, first.block), another(second.policy, second.block);
    MovingAverage average(first.policy, first.block), other_average(second.policy, second.block);
    LossScale scale({.initial = 256}), other_scale;
    TrainingPosition position{1, 2, 3}, loaded;
    const auto step = [](BlockOnce<T>& once, auto& of_once, auto& average_of_once, LossScale& scale_of_once) {
        std::vector<double> values = once.run();
        CHECK(scale_of_once.unscale(once.policy, once.gradients));
        of_once.step(once.block, once.gradients);
        average_of_once.update(once.block);
        average_of_once.swap_in(once.block);
        for (const double value : once.values(once.infer())) values.push_back(value);
        average_of_once.swap_out(once.block);
        return values;
    };
    step(first, optimizer, average, scale);
    const nlohmann::json configuration{{"dim", small_block.dim}};
    save_training(first.policy, path, configuration, first.block, optimizer, average, scale, position);
    fill(second.policy, second.block.conditional_ff.light_ff.hidden.weight, 1);
    load_training(second.policy, path, configuration, second.block, another, other_average, other_scale, loaded);
    std::filesystem::remove(path);
    CHECK(loaded.stream == 3);
    CHECK(other_scale.scale() == 256);
    for (int count = 0; count < 2; ++count)
        CHECK(step(first, optimizer, average, scale) == step(second, another, other_average, other_scale));
}

}  // namespace cases
