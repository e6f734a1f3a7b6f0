// SPDX-License-Identifier: MIT
#include <colt5/io/adamw.hpp>

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include <doctest/doctest.h>

#include <colt5/cpu/adamw.hpp>
#include <colt5/cpu/expr.hpp>

#include "io/temporary_folder.hpp"
#include "optim/tiny_module.hpp"

using namespace colt5;

namespace {

const Cpu policy{1};
using Module = TinyModule<>;

void steps(AdamW<Module>& optimizer, Module& module, int first, int count) {
    auto gradients = module.make_gradients();
    for (int t = first; t < first + count; ++t) {
        fill_normal(policy, gradients.weight, Random(Seed{2}, static_cast<std::uint64_t>(t)));
        fill_normal(policy, gradients.gamma, Random(Seed{3}, static_cast<std::uint64_t>(t)));
        optimizer.step(module, gradients);
    }
}

}  // namespace

TEST_CASE("adamw: a run goes on from a file as if it had not stopped") {
    const TemporaryFolder folder;
    Module module(policy, 7, 5);
    AdamW<Module> optimizer(policy, module);
    steps(optimizer, module, 0, 5);
    save_parameters(policy, folder / "module", module);
    save_optimizer(policy, folder / "optimizer", optimizer, {{"epoch", "1"}});
    steps(optimizer, module, 5, 5);

    const SafetensorsFile file(folder / "optimizer");
    CHECK(file.read<int>("step") == std::vector<int>{5});
    CHECK(file.entry("exp_avg.to_q.weight").shape == std::vector<Index>{7, 5});
    CHECK(file.contains("exp_avg_sq.norm.gamma"));
    CHECK(file.metadata().at("epoch") == "1");

    Module resumed(policy, 7, 5);
    AdamW<Module> resumed_optimizer(policy, resumed);
    load_parameters(policy, folder / "module", resumed);
    load_optimizer(policy, folder / "optimizer", resumed_optimizer);
    CHECK(resumed_optimizer.state().steps == 5);
    steps(resumed_optimizer, resumed, 5, 5);
    CHECK(to_host(policy, resumed.weight) == to_host(policy, module.weight));
    CHECK(to_host(policy, resumed.gamma) == to_host(policy, module.gamma));
}

TEST_CASE("adamw: a state that does not fit changes nothing") {
    const TemporaryFolder folder;
    Module module(policy, 2, 2);
    AdamW<Module> optimizer(policy, module);
    steps(optimizer, module, 0, 3);
    const auto mean = to_host(policy, optimizer.state().mean.weight);
    const auto complaint = [&](const std::string& name) {
        const std::string message = message_of<FileError>([&] { load_optimizer(policy, folder / name, optimizer); });
        CHECK(optimizer.state().steps == 3);
        CHECK(to_host(policy, optimizer.state().mean.weight) == mean);
        return message;
    };

    const std::string a = (folder / "a").string();
    save_parameters(policy, a, module);
    CHECK(complaint("a") == "colt5: " + a +
                                ": \n  tensor `step` is missing"
                                "\n  tensor `exp_avg.to_q.weight` is missing"
                                "\n  tensor `exp_avg.norm.gamma` is missing"
                                "\n  tensor `exp_avg_sq.to_q.weight` is missing"
                                "\n  tensor `exp_avg_sq.norm.gamma` is missing");

    // A negative number of steps, found when everything else has been read.
    const std::int64_t negative = -1;
    const std::vector<float> values{5, 5, 5, 5};
    const MatrixView<const float> weight(values.data(), {2, 2});
    const VectorView<const float> gamma(values.data(), {2});
    save_safetensors(a, {{{"step", DType::i64, {}}, std::as_bytes(std::span(&negative, 1))},
                         {"exp_avg.to_q.weight", weight},
                         {"exp_avg.norm.gamma", gamma},
                         {"exp_avg_sq.to_q.weight", weight},
                         {"exp_avg_sq.norm.gamma", gamma}});
    CHECK(complaint("a") == "colt5: " + a + ": tensor `step` holds -1 at position 0, which U64 cannot hold");
}

TEST_CASE("adamw: a file keeps the master copy of parameters of 16 bits") {
    const TemporaryFolder folder;
    using SmallModule = TinyModule<bfloat16>;
    SmallModule module(policy, 7, 5), resumed(policy, 7, 5);
    AdamW<SmallModule> optimizer(policy, module), resumed_optimizer(policy, resumed);
    auto gradients = module.make_gradients();
    fill_normal(policy, gradients.weight, Random(Seed{2}));
    optimizer.step(module, gradients);
    save_parameters(policy, folder / "module", module);
    save_optimizer(policy, folder / "optimizer", optimizer);
    CHECK(SafetensorsFile(folder / "module").entry("to_q.weight").dtype == DType::bf16);
    CHECK(SafetensorsFile(folder / "optimizer").entry("master.to_q.weight").dtype == DType::f32);

    load_parameters(policy, folder / "module", resumed);
    load_optimizer(policy, folder / "optimizer", resumed_optimizer);
    CHECK(to_host(policy, resumed_optimizer.state().master.weight) == to_host(policy, optimizer.state().master.weight));
    const auto values = to_host(policy, module.weight), loaded = to_host(policy, resumed.weight);
    for (std::size_t i = 0; i < values.size(); ++i) CHECK(loaded[i].bits() == values[i].bits());
}

TEST_CASE("adamw: parameters of 16 bits that are loaded after the optimizer was made are trained from there") {
    const TemporaryFolder folder;
    using SmallModule = TinyModule<bfloat16>;
    SmallModule saved(policy, 3, 4), module(policy, 3, 4);
    fill(policy, saved.weight, 5);
    save_parameters(policy, folder / "module", saved);
    AdamW<SmallModule> optimizer(policy, module, {.weight_decay = 0});
    load_parameters(policy, folder / "module", module);
    optimizer.step(module, module.make_gradients());  // zeros: nothing moves
    for (const bfloat16 value : to_host(policy, module.weight)) CHECK(static_cast<float>(value) == 5);
    CHECK(to_host(policy, optimizer.state().master.weight) == std::vector<float>(12, 5));
}
