// SPDX-License-Identifier: MIT
// Scores of the tokens that the strictly causal router chooses by the logits x (b, 1, n). Numbers: how many at most,
// which are also the share of n that is asked for.
#include "../measure.hpp"

int main(int argc, char** argv) {
    const bench::Inputs inputs(argc, argv);
    const bench::Policy& policy = inputs.policy;
    const auto k = static_cast<colt5::Index>(inputs.number(0));
    const bench::Tokens logits = inputs.tokens("x"), d_out = inputs.tokens("d_out");
    const colt5::CausalTopK how{.rate = inputs.number(0) / static_cast<double>(logits.extent(2))};
    const auto all_true = bench::all_true_mask(policy, logits.extent(0), logits.extent(2));
    const colt5::Mask mask = all_true.const_view();
    return bench::serve(policy, [&](bool backward, const bench::Keep& keep) {
        const auto picks = colt5::causal_top_k(policy, how, logits, mask, k);
        if (!backward) return keep(picks.scores);
        auto d_picked = colt5::tensor_like(policy, picks.slopes);
        assign(policy, d_picked, select(picks.live, d_out * picks.slopes, bench::Scalar(0)));
        keep(colt5::place_scores(policy, d_picked, picks.indices, mask, logits.extent(2)));
    });
}
