// SPDX-License-Identifier: MIT
#include <colt5/colt5.hpp>
#include <colt5/io/training.hpp>

#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include <doctest/doctest.h>

#include "io/temporary_folder.hpp"

using namespace colt5;

namespace {

template <Index dim>
constexpr TransformerBlockConfig config{.dim = dim,
                                        .num_heavy_attn_tokens_q = 3,
                                        .num_heavy_attn_tokens_kv = 4,
                                        .num_heavy_ff_tokens = 3,
                                        .light_dim_head = 4,
                                        .light_heads = 2,
                                        .light_window_size = 4,
                                        .heavy_dim_head = 4,
                                        .heavy_heads = 2,
                                        .router_straight_through = false,
                                        .router_type = RouterType::sinkhorn};
template <Index dim = 8, typename T = float>
using Model = Stack<ConditionalRoutedTransformerBlock<config<dim>, T, Cpu>, 2>;
static_assert(TrainableModule<Model<>>);
static_assert(TrainableModule<Embedding<float, Cpu>> == false);  // it has no policy to make gradients with
static_assert(!TrainableModule<int>);

/// A run whose steps depend on the noise of routing, on a schedule, and on where the data stand.
template <typename Trained = Model<>>
struct Run {
    explicit Run(std::uint64_t seed) : model(policy, Seed{seed}), optimizer(policy, model), average(policy, model) {}

    void step() {
        using T = typename Trained::Out::value_type;
        optimizer.set_learning_rate(warmup_cosine(static_cast<Index>(position.step), {.warmup = 5, .total = 20}));
        TokensTensor<T, Cpu> x(policy, {2, 12, 8}), d_out(policy, {2, 12, 8});
        fill_normal(policy, x, Random(Seed{3}, position.stream++));
        const auto saved = model.forward(x);
        assign(policy, d_out,
               static_cast<T>(loss_scale.scale()) * (saved.out - T(0.1) * static_cast<T>(position.data)));
        auto gradients = model.make_gradients();
        model.backward(saved, d_out, gradients);
        if (position.step == 4) gradients.layers[0].conditional_ff.light_ff.hidden.weight.data()[0] = INFINITY;
        if (loss_scale.unscale(policy, gradients)) optimizer.step(model, gradients);
        average.update(model);
        position.data = (position.data + 3) % 7;
        ++position.step;
    }
    void steps_until(std::uint64_t last) {
        while (position.step < last) step();
    }
    std::vector<double> numbers() const {
        std::vector<double> all{static_cast<double>(position.step),
                                static_cast<double>(position.data),
                                static_cast<double>(position.stream),
                                static_cast<double>(optimizer.state().steps),
                                loss_scale.scale(),
                                static_cast<double>(loss_scale.state().finite_steps),
                                static_cast<double>(loss_scale.state().skipped)};
        const auto add = [&](const std::string&, const auto& tensor) {
            all.insert(all.end(), tensor.data(), tensor.data() + tensor.size());
        };
        Trained::each_parameter(add, "", model);
        Trained::each_parameter(add, "", optimizer.state().mean);
        Trained::each_parameter(add, "", optimizer.state().square);
        Trained::each_parameter(add, "", average.state().average);
        each_state<Trained>(
            [&](const std::string&, std::uint64_t number) { all.push_back(static_cast<double>(number)); }, "", model);
        return all;
    }
    void save(const std::filesystem::path& path, const nlohmann::json& configuration = {{"dim", 8}}) const {
        save_training(policy, path, configuration, model, optimizer, average, loss_scale, position);
    }
    void load(const std::filesystem::path& path, const nlohmann::json& configuration = {{"dim", 8}}) {
        load_training(policy, path, configuration, model, optimizer, average, loss_scale, position);
    }

    Cpu policy{1};
    Trained model;
    AdamW<Trained> optimizer;
    MovingAverage<Trained> average;
    LossScale loss_scale{{.initial = 64, .growth_interval = 6}};
    TrainingPosition position;
};

constexpr const char* path_variable = "COLT5_TEST_TRAINING_PATH";

std::uint64_t saved_step(const std::filesystem::path& path) {
    return std::filesystem::exists(path) ? SafetensorsFile(path).read<std::uint64_t>("position.step")[0] : 0;
}

}  // namespace

TEST_CASE("training: the process that the next test kills" * doctest::skip(std::getenv(path_variable) == nullptr)) {
    const char* const path = std::getenv(path_variable);
    REQUIRE(path != nullptr);
    Run run(1);
    while (run.position.step < 10) {
        run.step();
        run.save(path);
    }
    for (;;) run.save(path);  // so that it is killed in the middle of this
}

TEST_CASE("training: 10 steps, kill -9 while it saves, and 10 steps give the bits of 20 steps") {
    const TemporaryFolder folder;
    const std::string path = folder / "run";
    for (const int milliseconds : {1, 7, 20}) {
        std::filesystem::remove(path);
        REQUIRE(::setenv(path_variable, path.c_str(), 1) == 0);
        const pid_t child = ::fork();
        if (child == 0) {
            ::execl("/proc/self/exe", "test", "--test-case=training: the process that the next test kills",
                    static_cast<char*>(nullptr));
            std::_Exit(1);
        }
        REQUIRE(child > 0);
        ::unsetenv(path_variable);
        int status = 0;
        while (saved_step(path) < 10) {
            REQUIRE(::waitpid(child, &status, WNOHANG) == 0);
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        }
        std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds));
        ::kill(child, SIGKILL);
        ::waitpid(child, &status, 0);
        REQUIRE(WIFSIGNALED(status));

        Run whole(1), resumed(2);
        resumed.load(path);
        CHECK(resumed.position.step == 10);
        whole.steps_until(20);
        resumed.steps_until(20);
        CHECK(resumed.numbers() == whole.numbers());
        resumed.save(path);  // takes away what the killed process may have left
        CHECK(folder.number_of_files() == 1);
    }
}

TEST_CASE("training: one file holds everything, also for load_parameters and load_optimizer") {
    const TemporaryFolder folder;
    Run run(1), other(2);
    run.steps_until(2);
    run.save(folder / "run", {{"dim", 8}, {"text", "bible"}});
    const SafetensorsFile file(folder / "run");
    CHECK(file.metadata().at("configuration") == R"({"dim":8,"text":"bible"})");
    CHECK(file.read<int>("position.step") == std::vector{2});
    CHECK(file.read<int>("optimizer.step") == std::vector{2});
    CHECK(file.read<int>("model.layers.1.conditional_ff.router.noise.calls") == std::vector{2});
    load_parameters(other.policy, file, other.model, {.prefix = "model"});
    Model<>::each_parameter([&](const std::string&, const auto& a,
                                const auto& b) { CHECK(to_host(run.policy, a) == to_host(run.policy, b)); },
                            "", run.model, other.model);
}

TEST_CASE("training: what does not fit is one line, and nothing changes") {
    const TemporaryFolder folder;
    Run run(1);
    run.steps_until(1);
    const std::string path = folder / "run", beginning = "colt5: " + path + ": ";
    const auto complaint = [&](auto& loaded, const nlohmann::json& configuration) {
        const auto before = loaded.numbers();
        const std::string message = message_of<FileError>([&] { loaded.load(path, configuration); });
        CHECK(loaded.numbers() == before);
        CHECK(message.find('\n') == std::string::npos);
        REQUIRE(message.starts_with(beginning));
        return message.substr(beginning.size());
    };
    Run other(2);
    run.save(path, {{"dim", 8}, {"text", "bible"}});
    CHECK(complaint(other, {{"dim", 16}, {"text", "bible"}}) == "configuration `dim` must be 16, but is 8");
    CHECK(complaint(other, {{"dim", 8}, {"text", "a\nb"}}) == R"(configuration `text` must be "a\nb", but is "bible")");
    CHECK(complaint(other, {{"dim", 8}}) == R"(configuration `text` must be absent, but is "bible")");
    CHECK(complaint(other, {{"dim", 8}, {"text", "bible"}, {"batch", 2}}) ==
          "configuration `batch` must be 2, but is absent");

    const auto long_text = [](const std::string& end) { return std::string(300, 'a') + end; };
    run.save(path, {{"text", long_text("b")}});
    CHECK(complaint(other, {{"text", long_text("c")}}) ==
          "configuration `text` must be …" + std::string(20, 'a') + "c\", but is …" + std::string(20, 'a') + "b\"");

    run.save(path);
    Run<Model<6>> narrow(1);
    CHECK(complaint(narrow, {{"dim", 8}}) ==
          "tensor `model.layers.0.conditional_ff.router.routing_token` must have shape (1, 6), but has (1, 8), and 167 "
          "more");
    Run<Model<8, double>> in_double(1);
    CHECK(complaint(in_double, {{"dim", 8}})
              .starts_with("tensor `model.layers.0.conditional_ff.router.routing_token` must "
                           "be F64, but is F32, and "));

    save_training(run.policy, path, {}, run.model, run.optimizer, run.average, run.loss_scale);
    CHECK(complaint(other, {}) == "tensor `position.step` is missing, and 2 more");
    LossScale small({.initial = 0.25, .least = 0.25});
    save_training(run.policy, path, {}, run.model, run.optimizer, run.average, small, run.position);
    CHECK(complaint(other, {}) == "tensor `loss_scale.scale` must be in the bounds of the options, but is 0.25");
    save_training(run.policy, path, {}, run.model, run.optimizer, run.position);
    const auto before = other.numbers();
    CHECK(message_of<FileError>([&] { load_training(other.policy, path, {}, other.model, other.optimizer); }) ==
          beginning + "tensor `position.data` is unexpected: no part of the run has it, and 2 more");
    CHECK(other.numbers() == before);

    save_parameters(run.policy, path, run.model);
    CHECK(complaint(other, {}) == "is not a file of save_training");
    save_parameters(run.policy, path, run.model, {{"configuration", "["}});
    CHECK(complaint(other, {}) == "has a configuration that is not a JSON object");

    // What is wrong is found when everything else has been read: half of the file is cut off.
    run.save(path);
    std::filesystem::resize_file(path, std::filesystem::file_size(path) - 8);
    CHECK(complaint(other, {{"dim", 8}}).find("bytes") != std::string::npos);
    std::filesystem::remove(path);
    CHECK(complaint(other, {}).starts_with("cannot be opened"));
}

TEST_CASE("training: misuse") {
    const TemporaryFolder folder;
    Run run(1);
    CHECK_THROWS_WITH_AS(run.save(folder / "run", 3), "colt5: `configuration` must be a JSON object, but is 3",
                         ValueError);
    CHECK_THROWS_WITH_AS(save_training(run.policy, folder / "run", {}, run.position, run.position),
                         "colt5: two tensors are called `position.step`", ValueError);
    run.average.swap_in(run.model);
    CHECK_THROWS_WITH_AS(run.save(folder / "run"), "colt5: `average` must be swapped out, but is swapped in",
                         ValueError);
    CHECK_THROWS_AS(run.save(folder / "run", {{"text", "\xff"}}), ValueError);
    CHECK(folder.number_of_files() == 0);
}
