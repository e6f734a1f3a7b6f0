// SPDX-License-Identifier: MIT
// The light branch of the flagship block's attention. Numbers: whether it has a rotary embedding, and whether a
// relative position bias.
#include "../measure.hpp"

template <bool has_bias>
int run(const bench::Inputs& inputs) {
    const bench::Policy& policy = inputs.policy;
    colt5::SeedSequence seeds(colt5::Seed{0});
    colt5::LightAttention<bench::Scalar, bench::Policy, has_bias> light(policy, seeds, 512, 8, 64, {.reach = 64}, {},
                                                                        inputs.number(0, 0) != 0);
    inputs.load(light);
    const bench::Tokens x = inputs.tokens("x"), d_out = inputs.tokens("d_out");
    const auto mask = bench::all_true_mask(policy, x.extent(0), x.extent(1));
    return bench::serve(policy, [&](bool backward, const bench::Keep& keep) {
        if (!backward) return keep(light(policy, x, mask.const_view()));
        auto out = tensor_like(policy, x), d_x = tensor_like(policy, x);
        const auto saved = light.forward(policy, out.view(), x, mask.const_view(), !policy.memory_plan().recompute);
        auto gradients = colt5::zeros_like_parameters(policy, light);
        light.backward(policy, saved, d_x.view(), d_out, x, mask.const_view(), gradients);
        keep(d_x);
    });
}

int main(int argc, char** argv) {
    const bench::Inputs inputs(argc, argv);
    return inputs.number(1, 0) != 0 ? run<true>(inputs) : run<false>(inputs);
}
