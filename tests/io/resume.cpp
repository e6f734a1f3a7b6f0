// SPDX-License-Identifier: MIT
#include <colt5/colt5.hpp>
#include <colt5/io/adamw.hpp>

#include <string>
#include <vector>

#include <doctest/doctest.h>

#include "io/temporary_folder.hpp"

using namespace colt5;

namespace {

constexpr TransformerBlockConfig config{.dim = 8,
                                        .num_heavy_attn_tokens_q = 3,
                                        .num_heavy_attn_tokens_kv = 4,
                                        .num_routed_kv = 2,
                                        .num_heavy_ff_tokens = 3,
                                        .light_dim_head = 4,
                                        .light_heads = 2,
                                        .light_window_size = 4,
                                        .heavy_dim_head = 4,
                                        .heavy_heads = 2,
                                        .router_straight_through = false,
                                        .router_type = RouterType::sinkhorn};
using Block = ConditionalRoutedTransformerBlock<config, float, Cpu>;

/// Two blocks, as a user's model that only says what its parameters are.
struct Model {
    std::array<Block, 2> blocks;

    struct Gradients {
        using Module = Model;
        std::array<Block::Gradients, 2> blocks;
    };

    explicit Model(const Cpu& policy, SeedSequence seeds = SeedSequence(Seed{1}))
        : blocks{Block(policy, seeds), Block(policy, seeds)} {}
    Gradients make_gradients() const { return zeros_like_parameters(blocks[0].policy(), *this); }

    template <typename F, typename... M>
    static void each_parameter(F&& f, const std::string& prefix, M&... m) {
        for (std::size_t i = 0; i < 2; ++i)
            Block::each_parameter(f, prefix + "blocks." + std::to_string(i) + ".", m.blocks[i]...);
    }
};

/// A model in training, whose step depends on the noise of routing.
struct Training {
    explicit Training(std::uint64_t seed)
        : model(policy, SeedSequence(Seed{seed})), optimizer(policy, model, {.lr = 1e-2}) {}

    void steps(int first, int last) {
        TokensTensor<float, Cpu> x(policy, {2, 12, 8}), d_out(policy, {2, 12, 8});
        auto gradients = model.make_gradients();
        for (int step = first; step < last; ++step) {
            fill_normal(policy, x, Random(Seed{3}, static_cast<std::uint64_t>(step)));
            zero_gradients(policy, gradients);
            const auto one = model.blocks[0].forward(x), two = model.blocks[1].forward(one.out);
            assign(policy, d_out, two.out - x);
            model.blocks[0].backward(one, model.blocks[1].backward(two, d_out, gradients.blocks[1]),
                                     gradients.blocks[0]);
            optimizer.step(model, gradients);
        }
    }
    void evaluate() const {
        TokensTensor<float, Cpu> x(policy, {1, 20, 8});
        fill_normal(policy, x, Random(Seed{4}));
        model.blocks[1](model.blocks[0](x));
    }
    std::vector<float> values() const {
        std::vector<float> all;
        Model::each_parameter(
            [&](const std::string&, const auto& tensor) {
                all.insert(all.end(), tensor.data(), tensor.data() + tensor.size());
            },
            "", model);
        return all;
    }
    std::vector<std::uint64_t> state() const {
        std::vector<std::uint64_t> all;
        each_state<Model>([&](const std::string&, std::uint64_t number) { all.push_back(number); }, "", model);
        return all;
    }
    void save(const TemporaryFolder& folder) const {
        save_parameters(policy, folder / "model", model);
        save_optimizer(policy, folder / "optimizer", optimizer);
    }
    void load(const TemporaryFolder& folder) {
        load_parameters(policy, folder / "model", model);
        load_optimizer(policy, folder / "optimizer", optimizer);
    }

    Cpu policy{1};
    Model model;
    AdamW<Model> optimizer;
};

}  // namespace

TEST_CASE("resume: a run with noise that is saved and loaded gives the bits of one that never stopped") {
    const TemporaryFolder folder;
    Training whole(1), first(1), second(2);
    whole.steps(0, 60);
    first.steps(0, 30);
    first.save(folder);
    second.load(folder);
    CHECK(second.state() == first.state());
    second.steps(30, 60);
    CHECK(second.values() == whole.values());
    CHECK(second.state() == whole.state());

    const SafetensorsFile file(folder / "model");
    CHECK(file.read<int>("blocks.1.conditional_attn.kv_router.noise.calls") == std::vector<int>{30});
    CHECK(file.entry("blocks.0.conditional_ff.router.noise.seed").dtype == DType::u64);
}

TEST_CASE("resume: evaluating in between changes nothing") {
    Training quiet(1), evaluated(1);
    quiet.steps(0, 10);
    for (int step = 0; step < 10; ++step) {
        evaluated.steps(step, step + 1);
        evaluated.evaluate();
    }
    CHECK(evaluated.values() == quiet.values());
    CHECK(evaluated.state() == quiet.state());
}

TEST_CASE("resume: a file without the state of routers leaves it as it was, one of another kind is refused") {
    const TemporaryFolder folder;
    Training saved(1), loaded(2);
    saved.steps(0, 2);
    loaded.steps(0, 3);
    const std::vector<std::uint64_t> before = loaded.state();
    CHECK(before.size() == 12);  // seed and calls of three routers in each block

    std::vector<SafetensorsTensor> tensors;
    Model::each_parameter([&](const std::string& name, const auto& tensor) { tensors.emplace_back(name, tensor); }, "",
                          saved.model);
    save_safetensors(folder / "old", tensors);
    load_parameters(loaded.policy, folder / "old", loaded.model);
    CHECK(loaded.values() == saved.values());
    CHECK(loaded.state() == before);

    const std::vector<float> number{1};
    tensors.emplace_back("blocks.0.conditional_ff.router.noise.calls", VectorView<const float>(number.data(), {1}));
    save_safetensors(folder / "wrong", tensors);
    const std::string message =
        message_of<FileError>([&] { load_parameters(loaded.policy, folder / "wrong", loaded.model); });
    CHECK(message.ends_with("tensor `blocks.0.conditional_ff.router.noise.calls` must have shape (), but has (1)"));
    CHECK(loaded.state() == before);
}
