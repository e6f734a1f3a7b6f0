// SPDX-License-Identifier: MIT
#include <colt5/optim/adamw.hpp>

#include <array>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include <doctest/doctest.h>

#include <colt5/cpu/adamw.hpp>
#include <colt5/cpu/expr.hpp>

#include "optim/tiny_module.hpp"

using namespace colt5;

namespace {

/// AdamW of torch, one element at a time in double.
struct NaiveAdamW {
    double lr, beta1, beta2, eps, weight_decay;
    std::vector<double> mean, square;

    void step(std::vector<double>& p, const std::vector<double>& g, int t) {
        mean.resize(p.size());
        square.resize(p.size());
        for (std::size_t i = 0; i < p.size(); ++i) {
            p[i] *= 1 - lr * weight_decay;
            mean[i] = beta1 * mean[i] + (1 - beta1) * g[i];
            square[i] = beta2 * square[i] + (1 - beta2) * g[i] * g[i];
            const double unbiased_mean = mean[i] / (1 - std::pow(beta1, t));
            const double unbiased_square = square[i] / (1 - std::pow(beta2, t));
            p[i] -= lr * unbiased_mean / (std::sqrt(unbiased_square) + eps);
        }
    }
};

template <typename T>
std::vector<double> doubles(const Cpu& policy, const VectorTensor<T, Cpu>& tensor) {
    const auto values = to_host(policy, tensor);
    return {values.begin(), values.end()};
}

/// 100 steps on random gradients; returns the largest difference from the naive loop, relative to 1 + |p|.
template <typename T>
double difference_from_naive(Index size) {
    const Cpu policy{2};
    TinyModule<T> module(policy, 1, size);
    auto gradients = module.make_gradients();
    AdamW<TinyModule<T>> optimizer(policy, module,
                                   {.lr = 1e-2, .betas = {0.8, 0.95}, .eps = 1e-6, .weight_decay = 0.1});
    NaiveAdamW naive{1e-2, 0.8, 0.95, 1e-6, 0.1, {}, {}};
    std::vector<double> expected = doubles(policy, module.gamma);
    for (int t = 1; t <= 100; ++t) {
        if (t == 60) optimizer.set_learning_rate(naive.lr = 3e-3);
        fill_normal(policy, gradients.gamma, Random(Seed{5}, static_cast<std::uint64_t>(t)));
        naive.step(expected, doubles(policy, gradients.gamma), t);
        optimizer.step(module, gradients);
    }
    double largest = 0;
    const auto actual = doubles(policy, module.gamma);
    for (std::size_t i = 0; i < actual.size(); ++i)
        largest = std::max(largest, std::fabs(actual[i] - expected[i]) / (1 + std::fabs(expected[i])));
    return largest;
}

/// A module with one parameter of four elements, as in the table of torch's values.
struct Four {
    VectorTensor<double, Cpu> p;
    Cpu policy;

    explicit Four(const Cpu& where)
        : p(from_host<VectorTensor<double, Cpu>>(where, {4}, std::vector<double>{0.5, -1.25, 2.0, 0.0})),
          policy(where) {}
    struct Gradients {
        VectorTensor<double, Cpu> p;
    };
    Gradients make_gradients() const {
        Gradients gradients{{policy, {4}}};
        fill(policy, gradients.p, 0);
        return gradients;
    }
    template <typename Visit, typename... Objects>
    static void each_parameter(Visit&& visit, const std::string& prefix, Objects&... objects) {
        visit(prefix + "p", objects.p...);
    }
};

struct TorchRow {
    int step;
    std::array<double, 4> p;
};

void check_against_torch(const AdamWOptions& options, const std::vector<TorchRow>& rows) {
    const Cpu policy{1};
    Four module(policy);
    auto gradients = module.make_gradients();
    AdamW optimizer(policy, module, options);
    static_assert(std::is_same_v<decltype(optimizer), AdamW<Four, Cpu>>);
    std::size_t row = 0;
    for (int t = 1; t <= 100; ++t) {
        optimizer.set_learning_rate(options.lr * (t <= 50 ? 1 : 0.1));
        const std::array<double, 4> g{0.1 * t, -0.3, t % 2 == 0 ? 1.0 : -1.0, 1e-9 * t};
        std::copy(g.begin(), g.end(), gradients.p.data());
        optimizer.step(module, gradients);
        if (t != rows[row].step) continue;
        for (std::size_t i = 0; i < 4; ++i)
            CHECK(module.p.data()[i] == doctest::Approx(rows[row].p[i]).epsilon(1e-13).scale(1e-3));
        ++row;
    }
    CHECK(row == rows.size());
}

}  // namespace

TEST_CASE("adamw: the values of torch") {
    // import torch
    // p = torch.nn.Parameter(torch.tensor([0.5, -1.25, 2.0, 0.0], dtype=torch.double))
    // o = torch.optim.AdamW([p], lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    // for t in range(1, 101):
    //     o.param_groups[0]["lr"] = lr * (1 if t <= 50 else 0.1)
    //     p.grad = torch.tensor([0.1 * t, -0.3, (-1.0)**t, 1e-9 * t], dtype=torch.double)
    //     o.step()
    //     if t in (1, 2, 10, 100): print(t, p.tolist())          # torch 2.15.0
    check_against_torch({.lr = 1e-2},
                        {{1, {0.4899500009999999, -1.2398750003333334, 2.0097999999000002, -0.000909090909090909}},
                         {2, {0.48024918635202535, -1.2297510131666334, 2.0090727041157996, -0.0022269053819372847}},
                         {10, {0.40108520517164487, -1.14879555368396, 2.013442932963564, -0.0250980726995304}},
                         {100, {-0.17122362973732597, -0.6946281937350289, 2.00650459239448, -0.3981443255038083}}});
    check_against_torch({.lr = 1e-1, .betas = {0.8, 0.95}, .eps = 1e-4, .weight_decay = 0.5},
                        {{1, {0.3750999000999001, -1.0875333222259247, 1.9999900009998999, -9.99990000099999e-07}},
                         {2, {0.25877233720237436, -0.9331899783405531, 1.8888805008388048, -2.5055212720785416e-06}},
                         {10, {-0.5285280830915502, 0.05383752790795022, 1.2841921939691276, -3.373357403612217e-05}},
                         {100, {-2.254411691455002, 1.8047399355057292, 0.12518443154254427, -0.0007719342077845743}}});
}

TEST_CASE("adamw: equals a plain loop in double over 100 steps, for sizes around vectors and pieces") {
    for (const Index size : {1, 3, 8, 17, 16384, 40001}) {
        CAPTURE(size);
        CHECK(difference_from_naive<double>(size) < 1e-14);
        CHECK(difference_from_naive<float>(size) < 3e-6);
    }
}

TEST_CASE("adamw: the same bits with any number of threads") {
    const auto run = [](int threads) {
        const Cpu policy{threads};
        TinyModule<> module(policy, 100, 501);
        auto gradients = module.make_gradients();
        AdamW optimizer(policy, module);
        for (std::uint64_t t = 0; t < 3; ++t) {
            fill_normal(policy, gradients.weight, Random(Seed{5}, t));
            optimizer.step(module, gradients);
        }
        return to_host(policy, module.weight);
    };
    const auto one = run(1);
    CHECK(run(2) == one);
    CHECK(run(3) == one);
}

TEST_CASE("adamw: decay by name") {
    const Cpu policy{1};
    TinyModule<double> module(policy, 2, 3);
    const auto weight = to_host(policy, module.weight), gamma = to_host(policy, module.gamma);
    const auto gradients = module.make_gradients();  // zeros: decay is all that moves
    std::vector<std::string> asked;
    AdamW optimizer(policy, module, {.lr = 0.5, .weight_decay = 0.25, .decays = [&](std::string_view name) {
                                         asked.emplace_back(name);
                                         return !name.ends_with("gamma");
                                     }});
    optimizer.step(module, gradients);
    CHECK(asked == std::vector<std::string>{"to_q.weight", "norm.gamma"});
    CHECK(to_host(policy, module.gamma) == gamma);
    for (std::size_t i = 0; i < weight.size(); ++i)
        CHECK(to_host(policy, module.weight)[i] == doctest::Approx(0.875 * weight[i]).epsilon(1e-15));

    AdamW everything(policy, module, {.lr = 0.5, .weight_decay = 0.25});
    everything.step(module, gradients);
    CHECK(to_host(policy, module.gamma)[1] == doctest::Approx(0.875 * gamma[1]).epsilon(1e-15));
}

TEST_CASE("adamw: steps ask the system for no memory") {
    const Cpu policy{2};
    TinyModule<> module(policy, 300, 300);
    const auto gradients = module.make_gradients();
    AdamW optimizer(policy, module);
    const auto before = policy.workspace()->statistics();
    policy.workspace()->reset_peak();
    optimizer.step(module, gradients);
    CHECK(policy.workspace()->statistics().peak == before.in_use);
    CHECK(optimizer.state().steps == 1);
}

TEST_CASE("adamw: options out of range") {
    const Cpu policy{1};
    TinyModule<> module(policy, 1, 1);
    const auto refusal = [&](const AdamWOptions& options) -> std::string {
        try {
            AdamW optimizer(policy, module, options);
        } catch (const ValueError& error) {
            return error.what();
        }
        return "";
    };
    CHECK(refusal({.lr = -1}) == "colt5: `lr` must be >= 0, but is -1");
    CHECK(refusal({.lr = std::nan("")}) == "colt5: `lr` must be >= 0, but is nan");
    CHECK(refusal({.betas = {1, 0.9}}) == "colt5: `betas[0]` must be in [0, 1), but is 1");
    CHECK(refusal({.betas = {0.9, -0.5}}) == "colt5: `betas[1]` must be in [0, 1), but is -0.5");
    CHECK(refusal({.eps = -1}) == "colt5: `eps` must be >= 0, but is -1");
    CHECK(refusal({.weight_decay = -1}) == "colt5: `weight_decay` must be >= 0, but is -1");
    CHECK(refusal({.lr = 1e300}) == "colt5: `lr` must be at most 1e6, but is 1e+300");
    CHECK(refusal({.eps = HUGE_VAL}) == "colt5: `eps` must be at most 1e6, but is inf");
    CHECK(refusal({.weight_decay = HUGE_VAL}) == "colt5: `weight_decay` must be at most 1e6, but is inf");
    CHECK(refusal({.lr = 0, .betas = {0, 0}, .eps = 0, .weight_decay = 0}) == "");

    AdamW optimizer(policy, module);
    CHECK_THROWS_AS(optimizer.set_learning_rate(-2), ValueError);
    CHECK(optimizer.learning_rate() == 1e-3);
}

TEST_CASE_TEMPLATE("adamw: without eps, or with one that is 0 in float, what has no gradient stays", T, float, double) {
    const Cpu policy{1};
    for (const double eps : {0.0, 1e-300}) {
        TinyModule<T> module(policy, 3, 5);
        fill(policy, module.weight, 2);
        auto gradients = module.make_gradients();
        fill(policy, gradients.weight, 0);
        fill(policy, gradients.gamma, 0);
        gradients.weight.data()[4] = T(3);
        AdamW optimizer(policy, module, {.lr = 0.5, .eps = eps, .weight_decay = 0});
        for (int step = 0; step < 2; ++step) optimizer.step(module, gradients);
        for (Index i = 0; i < module.weight.size(); ++i)
            CHECK(module.weight.data()[i] == doctest::Approx(i == 4 ? 1 : 2).epsilon(1e-6));
    }
}

TEST_CASE("adamw: a step that cannot be made changes nothing and does not count") {
    const Cpu policy{1};
    TinyModule<> module(policy, 2, 3), other(policy, 2, 4);
    AdamW optimizer(policy, module, {.decays = [](std::string_view name) -> bool {
                        if (name == "norm.gamma") throw std::runtime_error("no opinion");
                        return true;
                    }});
    auto gradients = module.make_gradients();
    fill(policy, gradients.weight, 1);
    fill(policy, gradients.gamma, 1);
    const auto weight = to_host(policy, module.weight), other_weight = to_host(policy, other.weight);
    const auto refusal = [&]<typename Error>(std::type_identity<Error>, TinyModule<>& of,
                                             const auto& with) -> std::string {
        std::string message;
        try {
            optimizer.step(of, with);
        } catch (const Error& error) {
            message = error.what();
        }
        CHECK(optimizer.state().steps == 0);
        CHECK(to_host(policy, module.weight) == weight);
        CHECK(to_host(policy, other.weight) == other_weight);
        CHECK(to_host(policy, optimizer.state().mean.weight) == std::vector<float>(6));
        CHECK(to_host(policy, optimizer.state().square.weight) == std::vector<float>(6));
        return message;
    };
    const std::type_identity<ShapeError> shape;
    const std::type_identity<ValueError> value;
    // What does not fit comes last, behind a weight that does.
    auto wrong = module.make_gradients();
    wrong.gamma = {policy, {4}};
    CHECK(refusal(shape, module, wrong) == "colt5: `gradients.norm.gamma` must have shape (3), but has (4)");
    CHECK(refusal(shape, other, gradients) == "colt5: `module.to_q.weight` must have shape (2, 3), but has (2, 4)");
    wrong.gamma = {};
    CHECK(refusal(value, module, wrong) ==
          "colt5: `gradients.norm.gamma` must be a tensor, as of make_gradients(), but is empty");
    CHECK(refusal(value, module, TinyModule<>::Gradients()) ==
          "colt5: `gradients.to_q.weight` must be a tensor, as of make_gradients(), but is empty");
    CHECK(refusal(std::type_identity<std::runtime_error>(), module, gradients) == "no opinion");
}

TEST_CASE_TEMPLATE("adamw: what is written into parameters of 16 bits between steps is what the next step updates", T,
                   bfloat16, float16) {
    const Cpu policy{1};
    for (const Index size : {1, 40}) {
        TinyModule<T> module(policy, 1, size), fresh(policy, 1, size);
        AdamW optimizer(policy, module, {.lr = 1e-4, .weight_decay = 0});
        auto gradients = module.make_gradients();
        fill_normal(policy, gradients.gamma, Random(Seed{5}));
        optimizer.step(module, gradients);
        const auto master = to_host(policy, optimizer.state().master.gamma);

        // Every second one is written, the last one with zero.
        for (Index i = 0; i < size; i += 2) module.gamma.data()[i] = T(0.1 * static_cast<double>(i + 1));
        module.gamma.data()[size - 1] = T(0);
        assign(policy, fresh.gamma, module.gamma);
        optimizer.set_learning_rate(0);
        optimizer.step(module, gradients);
        const auto after = to_host(policy, optimizer.state().master.gamma);
        for (Index i = 0; i < size; ++i) {
            CAPTURE(i);
            const auto at = static_cast<std::size_t>(i);
            const bool written = i % 2 == 0 || i == size - 1;
            CHECK(module.gamma.data()[i].bits() == fresh.gamma.data()[i].bits());
            CHECK(after[at] == (written ? static_cast<float>(fresh.gamma.data()[i]) : master[at]));
        }
    }
}

TEST_CASE_TEMPLATE("adamw: parameters of 16 bits follow a master copy in float", T, bfloat16, float16) {
    const Cpu policy{1};
    TinyModule<T> module(policy, 3, 40);
    TinyModule<float> reference(policy, 3, 40);
    assign(policy, reference.gamma, module.gamma);  // starts where the rounded parameters do
    AdamW<TinyModule<T>> optimizer(policy, module, {.lr = 1e-4});
    AdamW<TinyModule<float>> reference_optimizer(policy, reference, {.lr = 1e-4});
    CHECK(optimizer.keeps_master());
    CHECK_FALSE(reference_optimizer.keeps_master());
    auto gradients = module.make_gradients();
    auto reference_gradients = reference.make_gradients();
    for (int t = 0; t < 50; ++t) {  // steps of 1e-4 are below half a unit in the last place of most parameters
        fill_normal(policy, gradients.gamma, Random(Seed{5}, static_cast<std::uint64_t>(t)));
        assign(policy, reference_gradients.gamma, gradients.gamma);
        optimizer.step(module, gradients);
        reference_optimizer.step(reference, reference_gradients);
    }
    CHECK(to_host(policy, optimizer.state().master.gamma) == to_host(policy, reference.gamma));
    const auto rounded = to_host(policy, module.gamma);
    const auto expected = to_host(policy, reference.gamma);
    for (std::size_t i = 0; i < rounded.size(); ++i) CHECK(rounded[i].bits() == T(expected[i]).bits());
}

TEST_CASE("adamw: decays_matrices leaves out vectors and what is named") {
    const Cpu policy{1};
    TinyModule<> module(policy, 2, 3);
    const auto decays = decays_matrices(module);
    CHECK(decays("to_q.weight"));
    CHECK(!decays("norm.gamma"));
    CHECK(!decays("unknown"));
    CHECK(!decays_matrices(module, {"to_q"})("to_q.weight"));
    AdamW<TinyModule<>> optimizer(policy, module, {.lr = 0.5, .weight_decay = 0.5, .decays = decays});
    const auto weight = to_host(policy, module.weight), gamma = to_host(policy, module.gamma);
    optimizer.step(module, module.make_gradients());
    CHECK(to_host(policy, module.gamma) == gamma);
    for (std::size_t i = 0; i < weight.size(); ++i) CHECK(to_host(policy, module.weight)[i] == 0.75f * weight[i]);
}
