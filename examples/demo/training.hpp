// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <ctime>
#include <string>

#include "encoder.hpp"
#include "models.hpp"

namespace demo {

/// Seconds of processor time of this thread: what other programs do does not count.
inline double thread_seconds() {
    std::timespec time{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

struct Loss {
    double mean, accuracy;
    Tokens d_logits;  // (b, answers, 10): gradient of the mean
};

/// Cross entropy  mean(log Σ exp(logits) − logits[answer])  and its gradient  (softmax(logits) − one-hot) / count.
inline Loss cross_entropy(const Cpu& policy, const Tokens& logits, const Batch& batch) {
    const Index count = batch.size() * answers;
    colt5::VectorTensor<float, Cpu> digit(policy, {10}), answer(policy, {count}), losses(policy, {count}),
        right(policy, {count});
    for (Index i = 0; i < 10; ++i) digit.data()[i] = static_cast<float>(i);
    std::copy(batch.answer_digits.begin(), batch.answer_digits.end(), answer.data());

    const auto one_hot = row(digit) == column(answer);  // (b · answers, 10)
    const auto of_answer = row_sum(select(one_hot, logits, 0));
    const auto log_sum = row_log_sum_exp(logits);
    assign(policy, losses, log_sum - of_answer);
    assign(policy, right, colt5::cast<float>(of_answer >= row_max(logits)));

    Loss loss{losses.vector().mean(), right.vector().mean(), tensor_like(policy, logits)};
    assign(policy, loss.d_logits, (exp(logits - log_sum) - colt5::cast<float>(one_hot)) / static_cast<float>(count));
    return loss;
}

/// Bytes of a document at `done` of the training. The budget of heavy tokens is the same throughout; a router only
/// learns about tokens that it routes, so at first they are half of a short document, and in the first 70 % of the
/// training the documents grow to full length.
inline Index document_length(double done) {
    constexpr double shortest = 2 * heavy_tokens;
    const double grown = shortest * std::pow(full_length / shortest, std::min(1.0, done / 0.7));
    return static_cast<Index>(std::lround(grown / 32)) * 32;
}

template <typename Routing>
void record_routing(const Routing& routing, const Batch& batch, bool first, Routed& routed) {
    const auto indices = single_route(routing.indices);  // (b, k)
    const auto scores = single_route(routing.scores);
    if (first) routed.scores.assign(full_length, 0.0f);
    for (Index b = 0; b < batch.size(); ++b)
        for (Index i = 0; i < indices.extent(1); ++i) {
            const Index place = indices(b, i);
            if (first && b == 0) routed.scores[static_cast<std::size_t>(place)] = scores(b, i);
            const bool in_question = place >= full_length - notes * note_length;
            bool in_note = false;
            for (Index j = 0; j < notes; ++j) {
                const Index begin = batch.note_places[static_cast<std::size_t>(b * notes + j)];
                in_note = in_note || (place >= begin && place < begin + note_length);
            }
            routed.in_questions += in_question;
            routed.in_notes += in_note;
        }
}

/// What the trained model does on documents that it has not seen.
template <typename Model>
void evaluate(const Cpu& policy, const Model& model, const Task& task, Index batches, Result& result) {
    constexpr Index size = 8;
    Index routed_tokens = 0;
    for (Index i = 0; i < batches; ++i) {
        const Batch batch = task.held_out_batch(i, size);
        const auto saved = model.forward(batch);
        const Loss loss = cross_entropy(policy, saved.logits, batch);
        result.loss += loss.mean / static_cast<double>(batches);
        result.accuracy += loss.accuracy / static_cast<double>(batches);
        for (std::size_t layer = 0; layer < layers; ++layer) {
            const auto& block = saved.blocks[layer];
            const auto& ff = block.ff.routed.routing;
            record_routing(block.attn.routed_q.routing, batch, i == 0, result.routed[layer][queries]);
            record_routing(block.attn.routed_kv.routing, batch, i == 0, result.routed[layer][keys_values]);
            record_routing(ff, batch, i == 0, result.routed[layer][feedforward]);
            if (layer == 0) routed_tokens += ff.indices.size();
        }
        if (i > 0) continue;
        const auto logits = saved.logits.matrix();  // (b · answers, 10)
        for (Index j = 0; j < answers; ++j) {
            Index digit = 0;
            logits.row(j).maxCoeff(&digit);
            result.predicted += static_cast<char>('0' + digit);
        }
        result.document = task.held_out_batch(i, 1);
    }
    result.heavy_share = static_cast<double>(routed_tokens) / static_cast<double>(batches * size * full_length);
    for (auto& layer : result.routed)
        for (auto& routed : layer) {
            routed.in_notes /= static_cast<double>(std::max<Index>(routed_tokens, 1));
            routed.in_questions /= static_cast<double>(std::max<Index>(routed_tokens, 1));
        }
}

/// Trains an encoder with this router and evaluates it.
template <template <colt5::RouterConfig, typename, typename> class Router>
Result train(const std::string& name, std::size_t number, const Task& task, const Settings& settings,
             Progress& progress) {
    using Model = Encoder<Router>;
    const Cpu policy(1);  // the models share the processors among them
    Model model(policy, colt5::SeedSequence({settings.seed}));
    auto gradients = model.make_gradients();
    colt5::AdamW<Model> optimizer(policy, model, {.lr = 0, .betas = {0.9, 0.98}, .weight_decay = 0});

    Result result;
    result.name = name;
    const double start = thread_seconds();
    const Index steps = settings.steps;
    Index tokens = 0;
    Point mean{};  // of the last steps
    for (Index step = 0; step < steps; ++step) {
        const Index length = document_length(static_cast<double>(step) / static_cast<double>(steps));
        const Batch batch = task.training_batch(step, settings.tokens / length, length);
        const auto saved = model.forward(batch);
        const Loss loss = cross_entropy(policy, saved.logits, batch);

        colt5::zero_gradients<Model>(policy, gradients);
        model.backward(saved, loss.d_logits, gradients);
        colt5::clip_gradient_norm<Model>(policy, gradients, 1.0);
        optimizer.set_learning_rate(
            colt5::warmup_cosine(step, {.peak = 3e-3, .warmup = steps / 20, .total = steps, .floor = 1e-4}));
        optimizer.step(model, gradients);

        const double forget = step < 20 ? 1.0 / static_cast<double>(step + 1) : 0.05;
        mean.step = static_cast<double>(step + 1);
        mean.loss += forget * (loss.mean - mean.loss);
        mean.accuracy += forget * (loss.accuracy - mean.accuracy);
        result.curve.push_back(mean);
        tokens += batch.size() * length;
        result.tokens_per_second = static_cast<double>(tokens) / std::max(thread_seconds() - start, 1e-9);
        progress.update(number, static_cast<double>(step + 1) / static_cast<double>(steps), mean,
                        result.tokens_per_second);
    }
    evaluate(policy, model, task, settings.held_out_batches, result);
    return result;
}

}  // namespace demo
