// SPDX-License-Identifier: MIT
// Expert choice (Zhou et al. 2022): every expert, a feedforward, chooses its tokens, beside a small one for all. There
// are tokens of three kinds, and each wants another thing done: its numbers moved by 1, 2 or 3 places.
#include <colt5/colt5.hpp>

#include <array>
#include <cstdio>

using namespace colt5;

// [experts]
constexpr RoutedConfig config{.dim = 16,
                              .num_heavy_tokens = 32,  // that each expert chooses, of 96
                              .num_routes = 3,
                              .router_straight_through = false,
                              .router_kwargs = {.coor_descent = {.score_scale = 0.25, .iterate_to_convergence = true}}};
using Expert = SizedFeedForward<16, 64, float, Cpu>;
using Light = SizedFeedForward<16, 8, float, Cpu>;
using Experts = Routed<config, float, Cpu, Expert, Light>;
// [experts]

int main() {
    constexpr Index batch = 4, length = 96, dim = config.dim;
    Cpu policy;
    Experts experts{policy, Seed{0}};
    AdamW optimizer(policy, experts, {.lr = 1e-2});
    TokensTensor<float, Cpu> tokens(policy, {batch, length, dim}), target(policy, tokens.shape());
    auto gradients = experts.make_gradients();
    float first = 0, loss = 0;
    std::array<std::array<int, 3>, 3> chosen{};  // by expert and kind
    for (std::uint64_t step = 0; step <= 400; ++step) {
        fill_normal(policy, tokens, Random(Seed{1}, step));
        for (Index i = 0; i < batch * length; ++i)
            for (Index kind = 0; kind < 3; ++kind) tokens.data()[i * dim + kind] = i % 3 == kind ? 2 : -1;
        for (Index i = 0; i < batch * length; ++i)
            for (Index e = 0; e < dim; ++e) target.data()[i * dim + e] = tokens.data()[i * dim + (e + 1 + i % 3) % dim];

        auto saved = experts.forward(tokens);
        chosen = {};
        const auto indices = saved.routed.routing.indices.const_view();  // (b, r, k)
        for (Index j = 0; j < indices.size(); ++j)
            ++chosen[std::size_t(j / config.num_heavy_tokens % 3)][std::size_t(indices.data()[j] % 3)];
        auto d_out = tensor_like(policy, target);
        assign(policy, d_out, (saved.out - target) / float(target.size()));
        loss = d_out.matrix().squaredNorm() * float(target.size());
        if (step == 0) first = loss;

        zero_gradients(policy, gradients);
        experts.backward(std::move(saved), d_out, gradients);
        optimizer.step(experts, gradients);
    }
    std::printf("mean squared error %.3f, at first %.3f; what the experts choose:\n", double(loss), double(first));
    for (const auto& of : chosen)
        std::printf("  %3d of the first kind, %3d of the second, %3d of the third\n", of[0], of[1], of[2]);
    return loss < first / 4 ? 0 : 1;
}
