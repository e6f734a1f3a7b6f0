// SPDX-License-Identifier: MIT
// A training run that stops and goes on: a causal language model of bytes, with dropout, a moving average of its
// parameters, and one file for the whole run.
#include <colt5/colt5.hpp>
#include <colt5/io/training.hpp>

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <string>
#include <string_view>

int main(int, char** arguments) {
    using namespace colt5;
    const std::string path = std::string(arguments[0]) + ".run";
    constexpr std::string_view text =
        "The light branch sees every token, the heavy branch sees the tokens it is given. ";
    std::filesystem::remove(path);
    // [model]
    constexpr TransformerBlockConfig config{.dim = 32,
                                            .num_heavy_attn_tokens_q = 16,
                                            .num_heavy_attn_tokens_kv = 16,
                                            .num_heavy_ff_tokens = 16,
                                            .light_dim_head = 8,
                                            .light_heads = 4,
                                            .light_window_size = 16,
                                            .heavy_dim_head = 8,
                                            .heavy_heads = 4,
                                            .router_type = RouterType::causal,  // no token sees a later one
                                            .dropout = 0.05};
    using Model = LanguageModel<Stack<ConditionalRoutedTransformerBlock<config, float, Cpu>, 2>>;
    Cpu policy;
    Model model(policy, {.vocabulary = 256, .dim = config.dim}, Seed{0});
    // [model]
    const auto draw_batch = [&](const Random& random, auto ids, auto next) {  // pieces of the text, and the next bytes
        for (Index b = 0; b < ids.extent(0); ++b) {
            const double place = random.uniform(static_cast<std::uint64_t>(b)) * static_cast<double>(text.size());
            for (Index i = 0; i < ids.extent(1); ++i) {
                const auto at = static_cast<std::size_t>(place) + static_cast<std::size_t>(i);
                ids(b, i) = text[at % text.size()];
                next(b, i) = text[(at + 1) % text.size()];
            }
        }
    };
    const auto train = [&](std::uint64_t stop) {
        // [run]
        AdamW optimizer(policy, model, {.betas = {0.9, 0.98}, .weight_decay = 0.1, .decays = decays_matrices(model)});
        MovingAverage average(policy, model, {.decay = 0.99});
        TrainingPosition position;
        const nlohmann::json configuration{{"dim", config.dim}, {"length", 64}};  // what must not change
        if (std::filesystem::exists(path))
            load_training(policy, path, configuration, model, optimizer, average, position);

        auto gradients = model.make_gradients();
        MatrixTensor<TokenIndex, Cpu> ids(policy, {4, 64}), next(policy, {4, 64});
        MatrixTensor<float, Cpu> d_losses(policy, {4, 64});
        assign(policy, d_losses, 1.0f / 256);  // of the mean
        double loss = 0;
        while (position.step < stop) {
            draw_batch(Random(Seed{1}, position.stream++), ids.view(), next.view());
            zero_gradients(policy, gradients);
            loss = model.add_gradients(ids, next, d_losses, gradients).matrix().mean();
            clip_gradient_norm(policy, gradients, 1.0);
            optimizer.set_learning_rate(warmup_cosine(static_cast<Index>(position.step),
                                                      {.peak = 1e-2, .warmup = 10, .total = 120, .floor = 1e-3}));
            optimizer.step(model, gradients);
            average.update(model);
            if (++position.step % 30 == 0)
                save_training(policy, path, configuration, model, optimizer, average, position);
        }
        average.swap_in(model);  // for evaluation; swap_out brings back the parameters, bit for bit
        const double of_average = model.losses(ids, next).matrix().mean();
        average.swap_out(model);
        // [run]
        std::printf("step %d: loss %.3f, of the average %.3f\n", static_cast<int>(position.step), loss, of_average);
        return of_average;
    };
    const double before = train(60);
    model = Model(policy, {.vocabulary = 256, .dim = config.dim}, Seed{9});  // as in another process
    const double after = train(120);
    return before < 0.5 && after < 0.5 ? 0 : 1;
}
