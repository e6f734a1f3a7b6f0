// SPDX-License-Identifier: MIT
#pragma once

#include <chrono>
#include <cmath>
#include <cstdio>
#include <numbers>
#include <stdexcept>
#include <string>

#include "model.hpp"

namespace experiment {

/// One training.
struct Run {
    Task task;
    Arm arm;
    std::uint64_t seed;
    Index steps;  ///< of the learned arm, see equal_steps
    Index held_out_batches;
};

/// The norm of the gradient of all routing tokens.
template <typename Model, typename P>
double router_gradient(const P& policy, const typename Model::Gradients& gradients) {
    double squares = 0;
    Model::each_parameter(
        [&](const std::string& name, const auto& gradient) {
            if (name.ends_with("routing_token")) squares += sum_of_squares(policy, gradient);
        },
        "", gradients);
    return std::sqrt(squares);
}

/// Throws if the losses of a language model in the first half of a text depend on the second half. (Not for the arm
/// `random`, which differs from call to call.)
template <typename Model>
void expect_causal(const Model& model, const Batch& batch) {
    Batch changed = batch;
    for (std::size_t i = 0; i < changed.ids.size(); ++i)
        if (static_cast<Index>(i) % batch.length >= batch.length / 2) changed.ids[i] = 255 - changed.ids[i];
    const auto losses = model.losses(batch), others = model.losses(changed);
    for (std::size_t i = 0; i < losses.size(); ++i)
        if (static_cast<Index>(i) % batch.length < batch.length / 2 && losses[i] != others[i])
            throw std::runtime_error("the language model sees the future: at byte " + std::to_string(i));
}

/// Trains and evaluates. Returns lines of CSV, one after each tenth of the training.
template <Size model_size, bool causal, typename Scalar, typename P>
std::string train(const P& policy, std::string_view text, const Size& size, const Run& run) {
    using Trained = Model<model_size, causal, Scalar, P>;
    const Data data(run.task, size, text, run.seed);
    Trained model(policy, size, run.arm, colt5::SeedSequence({run.seed}));
    auto gradients = model.make_gradients();
    colt5::AdamW<Trained, P> optimizer(policy, model, {.betas = {0.9, 0.98}, .weight_decay = 0});

    std::string lines;
    const Index steps = equal_steps(run.task, size, run.arm, run.steps);
    double loss = 0, gradient = 0, spent = 0;
    Index points = 0, tokens = 0;
    const auto start = std::chrono::steady_clock::now();
    if (causal && run.arm != Arm::random) expect_causal(model, data.held_out_batch(0, 1, size.length));
    const auto evaluate = [&](Index step, Index batches) {
        double bits = 0, right = 0;
        for (Index i = 0; i < batches; ++i) {
            const Batch batch =
                data.held_out_batch(static_cast<std::uint64_t>(i), size.tokens / size.length, size.length);
            const auto [losses, is_right] = model.evaluate(batch);
            bits += model.mean(losses) / std::numbers::ln2 / static_cast<double>(batches);
            right += model.mean(is_right) / static_cast<double>(batches);
        }
        const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
        char line[512];
        std::snprintf(line, sizeof line, "%s,%s,%llu,%td,%td,%td,%td,%td,%.6g,%.6g,%.6g,%.6g,%.6g,%.6g,%.1f\n",
                      task_names[static_cast<std::size_t>(run.task)].data(),
                      arm_names[static_cast<std::size_t>(run.arm)].data(), static_cast<unsigned long long>(run.seed),
                      size.dim, size.length, run.steps, step, tokens,
                      operations_per_token(size, run.arm, size.length, causal), spent, loss / std::numbers::ln2, bits,
                      right, gradient, elapsed.count());
        lines += line;
    };
    for (Index step = 0; step < steps; ++step) {
        const double done = static_cast<double>(step) / static_cast<double>(steps);
        const Index length = length_at(run.task, size, done);
        const Batch batch = data.training_batch(static_cast<std::uint64_t>(step), size.tokens / length, length);
        colt5::zero_gradients(policy, gradients);
        const double now = model.add_gradients(batch, gradients);
        loss += (step < 20 ? 1.0 / static_cast<double>(step + 1) : 0.05) * (now - loss);
        tokens += batch.size * length;
        spent += static_cast<double>(batch.size * length) * operations_per_token(size, run.arm, length, causal);
        const bool is_last = step + 1 == steps;
        const bool is_point = is_last || (step + 1) * 10 >= (points + 1) * steps;
        if (is_point) gradient = router_gradient<Trained>(policy, gradients);
        colt5::clip_gradient_norm(policy, gradients, 1.0);
        optimizer.set_learning_rate(colt5::warmup_cosine(
            step,
            {.peak = size.learning_rate, .warmup = steps / 20, .total = steps, .floor = size.learning_rate / 30}));
        optimizer.step(model, gradients);
        if (is_point) {
            ++points;
            evaluate(step + 1, is_last ? 4 * run.held_out_batches : run.held_out_batches);
        }
    }
    return lines;
}

inline constexpr const char* csv_header =
    "task,arm,seed,dim,length,planned_steps,step,tokens,operations_per_token,operations,training_bits,bits,accuracy,"
    "router_gradient,seconds\n";

}  // namespace experiment
