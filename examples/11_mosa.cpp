// SPDX-License-Identifier: MIT
// MoSA (Mixture of Sparse Attention, Piękos et al. 2025): attention whose heads each choose their own tokens. Those of
// three kinds are to become their kind's mean.
#include <colt5/colt5.hpp>

#include <cstdio>

using namespace colt5;

/// One head: dense attention among the tokens of its route, of which the mask says which are real.
struct OneHead : HeavyAttention<float, Cpu> {
    OneHead(const Cpu& policy, SeedSequence& seeds) : HeavyAttention(policy, seeds, 16, 1, 16) {}  // one head of 16

    // HeavyAttention has several sets of keys: here it is one set, (b, 1, k, d) and its mask (b, 1, k), or none.
    static auto keys(TokensView<const float> x) {
        return x.reshape(std::array{x.extent(0), Index{1}, x.extent(1), x.extent(2)});
    }
    static KeyMask key_mask(Mask m) { return KeyMask::unchecked(m.data(), {m.extent(0), 1, m.extent(1)}); }

    Activations forward(const Cpu& policy, TokensView<float> out, TokensView<const float> x, Mask mask, bool) const {
        auto saved = HeavyAttention::forward(policy, x, keys(x), key_mask(mask), {});
        assign(policy, out, as_expression(saved.out));
        return saved;
    }
    void backward(const Cpu& policy, const Activations& saved, TokensView<float> d_x, TokensView<const float> d_out,
                  TokensView<const float> x, Mask mask, Gradients& gradients) const {
        const auto d = HeavyAttention::backward(policy, saved, d_out, x, keys(x), key_mask(mask), {}, gradients);
        assign(policy, d_x, d.d_x + d.d_context.view().reshape(x.shape()));
    }
};

constexpr RoutedConfig config{.dim = 16,
                              .num_heavy_tokens = 32,  // of each head
                              .num_routes = 3,
                              .router_straight_through = false,
                              .router_kwargs = {.coor_descent = {.score_scale = 0.25, .iterate_to_convergence = true}}};

int main() {
    Cpu policy;
    Routed<config, float, Cpu, OneHead> mosa{policy, Seed{0}};
    AdamW optimizer(policy, mosa, {.lr = 2e-2});
    TokensTensor<float, Cpu> tokens(policy, {1, 96, 16}), d_out(policy, {1, 96, 16});
    auto gradients = mosa.make_gradients();
    for (std::uint64_t step = 0;; ++step) {
        fill_normal(policy, tokens, Random(Seed{1}, step));
        auto x = tokens.matrix();  // token i is of kind i / 32
        x.leftCols(3).setConstant(-1);
        for (Index kind = 0; kind < 3; ++kind) x.block(32 * kind, kind, 32, 1).setConstant(2);
        auto saved = mosa.forward(tokens);
        for (Index i = 0; i < 96; ++i)  // the gradient of the mean squared error
            d_out.matrix().row(i) =
                1.0f / 768 * (saved.out.matrix().row(i) - x.middleRows(i / 32 * 32, 32).colwise().mean());
        const double error = 384 * double(d_out.matrix().squaredNorm());
        if (step % 100 == 0) std::printf("step %3d: mean squared error %.4f\n", int(step), error);
        if (step == 400) return error < 0.04 ? 0 : 1;
        zero_gradients(policy, gradients);
        mosa.backward(std::move(saved), d_out, gradients);
        optimizer.step(mosa, gradients);
    }
}
