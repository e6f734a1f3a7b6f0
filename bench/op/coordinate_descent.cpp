// SPDX-License-Identifier: MIT
// Scores of the logits x (b, 1, n) by coordinate descent with ε = 1, and the largest of them.
// Numbers: iterations, k of the descent, how many tokens are chosen (0: no choice, the result is the scores of all).
#include "../measure.hpp"

int main(int argc, char** argv) {
    const bench::Inputs inputs(argc, argv);
    const bench::Policy& policy = inputs.policy;
    const colt5::CoordinateDescent descent{.n_iters = static_cast<int>(inputs.number(0)), .eps = 1};
    const double k = inputs.number(1);
    const auto chosen = static_cast<colt5::Index>(inputs.number(2));
    const bench::Tokens logits = inputs.tokens("x"), d_out = inputs.tokens("d_out");
    const auto all_true = bench::all_true_mask(policy, logits.extent(0), logits.extent(2));
    const colt5::Mask mask = all_true.const_view();
    return bench::serve(policy, [&](bool backward, const bench::Keep& keep) {
        const auto saved = colt5::coordinate_descent_forward(policy, descent, k, logits, mask);
        if (chosen == 0) {
            if (!backward) return keep(saved.scores);
            const auto d = colt5::coordinate_descent_vjp(policy, descent, k, saved, d_out, logits, mask);
            return keep(d.d_logits);
        }
        const auto indices = colt5::top_k(policy, logits, mask, chosen);
        const auto picked = colt5::pick_scores<bench::Scalar>(policy, saved.scores, indices, mask);
        if (!backward) return keep(picked);
        const auto d_scores = colt5::place_scores(policy, d_out, indices, mask, logits.extent(2));
        const auto d = colt5::coordinate_descent_vjp(policy, descent, k, saved, d_scores, logits, mask);
        keep(d.d_logits);
    });
}
