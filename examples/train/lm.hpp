// SPDX-License-Identifier: MIT
// A byte-level language model, trained on any file: a program to copy. lm.cpp is for the CPU, lm.cu for the GPU; each
// sets the size of the model.
#pragma once

#include <algorithm>
#include <array>
#include <charconv>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <fstream>
#include <iterator>
#include <numbers>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <colt5/io/training.hpp>

namespace lm {

using colt5::Index;
using colt5::TokenIndex;

struct Size {
    colt5::TransformerBlockConfig block;
    std::size_t depth;
    Index length, batch;  // of a training step: bytes of a sequence, sequences
    double learning_rate;
};

template <Size size, typename Scalar, typename P>
using Model =
    colt5::LanguageModel<colt5::Stack<colt5::ConditionalRoutedTransformerBlock<size.block, Scalar, P>, size.depth>>;

/// Bytes as token ids (b, n), in the memory of the policy.
template <typename P>
colt5::MatrixTensor<TokenIndex, P> ids_of(const P& policy, std::string_view bytes, Index batch = 1) {
    std::vector<TokenIndex> numbers;
    for (const char byte : bytes) numbers.push_back(static_cast<unsigned char>(byte));
    colt5::MatrixTensor<TokenIndex, P> ids(policy, {batch, static_cast<Index>(numbers.size()) / batch});
    upload(policy, ids.data(), numbers.data(), numbers.size() * sizeof(TokenIndex));
    return ids;
}

/// Random pieces of the text (b, n), and the next byte of each byte (b, n). A pure function of `random`.
template <Size size, typename P>
auto draw_batch(const P& policy, std::string_view text, colt5::Random random) {
    std::string bytes, next_bytes;
    for (std::uint64_t b = 0; b < static_cast<std::uint64_t>(size.batch); ++b) {
        const auto places = static_cast<double>(text.size() - static_cast<std::size_t>(size.length));
        const auto at = static_cast<std::size_t>(random.uniform(b) * places);
        bytes += text.substr(at, static_cast<std::size_t>(size.length));
        next_bytes += text.substr(at + 1, static_cast<std::size_t>(size.length));
    }
    return std::pair(ids_of(policy, bytes, size.batch), ids_of(policy, next_bytes, size.batch));
}

/// The mean loss in bits, from losses in nats.
template <typename P, typename Losses>
double mean_bits(const P& policy, const Losses& losses) {
    double sum = 0;
    for (const auto loss : to_host(policy, losses)) sum += static_cast<double>(loss);
    return sum / static_cast<double>(losses.size()) / std::numbers::ln2;
}

/// For comparison: the bits per byte of a model that counts in the training text which byte follows which two.
inline double order_2_bits(std::string_view training, std::string_view held_out) {
    std::vector<std::uint32_t> after_two(1 << 24), after_one(1 << 16), two(1 << 16), one(1 << 8);
    double bits = 0;
    const auto each_byte = [&](std::string_view text, const auto& f) {
        for (std::size_t i = 2; i < text.size(); ++i) {
            const auto a = static_cast<unsigned char>(text[i - 2]), b = static_cast<unsigned char>(text[i - 1]);
            const auto c = static_cast<unsigned char>(text[i]);
            f(after_two[static_cast<std::size_t>(a << 16 | b << 8 | c)], two[static_cast<std::size_t>(a << 8 | b)],
              after_one[static_cast<std::size_t>(b << 8 | c)], one[b]);
        }
    };
    each_byte(training, [](auto&... counts) { (++counts, ...); });
    each_byte(held_out, [&](double abc, double ab, double bc, double b) {
        bits -= std::log2((abc + (bc + 1.0 / 256) / (b + 1)) / (ab + 1));
    });
    return bits / static_cast<double>(held_out.size() - 2);
}

/// Samples `count` bytes after `text`. The cache holds what the model needs of earlier bytes.
template <typename Trained, typename P>
std::string sample(const P& policy, const Trained& model, const std::string& text, std::size_t count,
                   double temperature) {
    const colt5::Random random(colt5::Seed{3});
    auto cache = model.make_cache(1, static_cast<Index>(text.size() + count));
    std::string written, next = text;  // next: bytes that the model has not seen
    for (std::size_t i = 0; i < count; ++i) {
        const auto logits = model.decode(cache, ids_of(policy, next));  // (1, m, 256)
        const auto last = to_host(policy, logits.const_view().rows().range(logits.extent(1) - 1, 1));
        double largest = -1e30;
        for (const auto logit : last) largest = std::max(largest, static_cast<double>(logit));
        std::vector<double> up_to;  // sums of the weights of the bytes so far
        for (const auto logit : last)
            up_to.push_back((up_to.empty() ? 0 : up_to.back()) +
                            std::exp((static_cast<double>(logit) - largest) / temperature));
        const double at = random.uniform(i) * up_to.back();
        next = std::string(1, static_cast<char>(std::lower_bound(up_to.begin(), up_to.end(), at) - up_to.begin()));
        written += next;
    }
    return written;
}

/// Tells texts apart (FNV-1a).
inline std::uint64_t digest(std::string_view text) {
    std::uint64_t value = 0xCBF29CE484222325u;
    for (const char byte : text) value = (value ^ static_cast<unsigned char>(byte)) * 0x100000001B3u;
    return value;
}

template <Size size, typename Scalar, typename P>
void train(const P& policy, const std::string& path, const std::string& checkpoint, std::uint64_t steps, bool resume) {
    std::ifstream file(path, std::ios::binary);
    if (!file) throw std::invalid_argument(path + " cannot be read");
    const std::string text{std::istreambuf_iterator<char>(file), {}};
    if (static_cast<Index>(text.size()) < 20 * size.length)
        throw std::invalid_argument(path + " must have " + std::to_string(20 * size.length) + " bytes, but has " +
                                    std::to_string(text.size()));
    const auto training = std::string_view(text).substr(0, text.size() / 10 * 9);
    const auto held_out = std::string_view(text).substr(training.size());

    using Trained = Model<size, Scalar, P>;
    Trained model(policy, {.vocabulary = 256, .dim = size.block.dim});
    auto gradients = model.make_gradients();
    colt5::AdamW<Trained, P> optimizer(policy, model, {.betas = {0.9, 0.98}});
    colt5::TrainingPosition position;
    // What a run that goes on must have in common with the one that was saved.
    const nlohmann::json configuration{{"text", digest(text)},
                                       {"length", size.length},
                                       {"batch", size.batch},
                                       {"steps", steps},
                                       {"learning_rate", size.learning_rate},
                                       {"rate", size.block.router_kwargs.causal.rate},
                                       {"block_size", size.block.router_kwargs.causal.block_size},
                                       {"score_scale", size.block.router_kwargs.causal.score_scale},
                                       {"light_heads", size.block.light_heads},
                                       {"light_window_size", size.block.light_window_size},
                                       {"heavy_heads", size.block.heavy_heads},
                                       {"num_heavy_attn_tokens_q", size.block.num_heavy_attn_tokens_q},
                                       {"num_heavy_attn_tokens_kv", size.block.num_heavy_attn_tokens_kv},
                                       {"num_heavy_ff_tokens", size.block.num_heavy_ff_tokens}};
    if (resume) load_training(policy, checkpoint, configuration, model, optimizer, position);
    std::printf("%td parameters, %zu bytes of text\n", colt5::count_parameters(model), text.size());

    const auto held_out_bits = [&](std::uint64_t batches) {
        double bits = 0;
        for (std::uint64_t i = 0; i < batches; ++i) {
            const auto [ids, targets] = draw_batch<size>(policy, held_out, colt5::Random(colt5::Seed{1}, i));
            bits += mean_bits(policy, model.losses(ids, targets)) / static_cast<double>(batches);
        }
        return bits;
    };
    colt5::MatrixTensor<typename Trained::Sum, P> d_losses(policy, {size.batch, size.length});
    fill(policy, d_losses, 1 / static_cast<double>(d_losses.size()));  // the loss is the mean
    const auto start = std::chrono::steady_clock::now();
    const std::uint64_t first = position.step;
    const colt5::WarmupCosine schedule{.peak = size.learning_rate,
                                       .warmup = static_cast<Index>(steps / 20),
                                       .total = static_cast<Index>(steps),
                                       .floor = size.learning_rate / 30};
    while (position.step < steps) {
        const auto [ids, targets] = draw_batch<size>(policy, training, colt5::Random(colt5::Seed{2}, position.step));
        zero_gradients(policy, gradients);
        const auto losses = model.add_gradients(ids, targets, d_losses, gradients);  // (b, n)
        clip_gradient_norm(policy, gradients, 1.0);
        optimizer.set_learning_rate(colt5::warmup_cosine(static_cast<Index>(position.step), schedule));
        optimizer.step(model, gradients);
        ++position.step;

        const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
        const std::uint64_t bytes = (position.step - first) * static_cast<std::uint64_t>(size.batch * size.length);
        std::printf("\r[%-30s] step %ju: %.3f bits per byte, %.0f bytes/s ",
                    std::string(30 * position.step / steps, '#').c_str(), std::uintmax_t{position.step},
                    mean_bits(policy, losses), static_cast<double>(bytes) / elapsed.count());
        if (position.step * 10 / steps > (position.step - 1) * 10 / steps) {  // each tenth
            std::printf("\nheld-out text: %.3f bits per byte\n", held_out_bits(2));
            save_training(policy, checkpoint, configuration, model, optimizer, position);
        }
        std::fflush(stdout);
    }
    std::printf("The model: %.3f bits per byte of held-out text. Counts of three bytes: %.3f\n", held_out_bits(16),
                order_2_bits(training, held_out));
    const std::string prompt(held_out.substr(0, 200));
    std::printf("Held-out text, and how the model goes on:\n%s|%s\n", prompt.c_str(),
                sample(policy, model, prompt, 300, 0.8).c_str());
}

/// `main` of a program.
template <Size size, typename Scalar, typename P>
int run(int count, char** arguments, const P& policy) {
    try {
        const bool resume = count == 5 && std::string_view(arguments[4]) == "--resume";
        if (count != 4 + resume) throw std::invalid_argument("usage: lm TEXT CHECKPOINT STEPS [--resume]");
        const std::string_view number(arguments[3]);
        std::uint64_t steps = 0;
        const auto [end, error] = std::from_chars(number.data(), number.data() + number.size(), steps);
        if (error != std::errc() || end != number.data() + number.size() || steps == 0)
            throw std::invalid_argument("STEPS must be a positive number, but is " + std::string(number));
        train<size, Scalar>(policy, arguments[1], arguments[2], steps, resume);
        return 0;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "lm: %s\n", error.what());
        return 1;
    }
}

}  // namespace lm
