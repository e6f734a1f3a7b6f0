// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <string>

#include <colt5/op/coordinate_descent.hpp>
#include <colt5/op/cumulative_softmax.hpp>
#include <colt5/op/dense_attention.hpp>
#include <colt5/op/gather.hpp>
#include <colt5/op/layer_norm.hpp>
#include <colt5/op/linear.hpp>
#include <colt5/op/local_attention.hpp>
#include <colt5/op/rms_norm.hpp>
#include <colt5/op/route_logits.hpp>
#include <colt5/op/sinkhorn.hpp>
#include <colt5/op/softmax.hpp>
#include <colt5/op/top_k.hpp>

#include "../draw.hpp"

/// One case of all operations whose kernels have a grid over sequences or rows.
namespace cases {

/// More short sequences than a grid of blocks has room for in its second dimension.
template <typename T, typename P>
Results many_sequences_case(const P& policy, const Setting& setting) {
    using Logit = accumulate_t<T>;
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    const Index batch = sanitized() ? 100 : 70'000, half = batch / 2 + 1, length = 3, dim = 8;
    const std::array shape{batch, length, dim};
    const auto x = draw.values(shape), d_y = draw.values(shape);
    const auto with_mask = draw.mask(batch, length);
    const Mask mask = with_mask.const_view();

    const auto logits = draw.sums(std::array{half, Index{2}, length});
    const Mask mask_of_half = mask.range(0, half);
    const auto top = top_k(policy, logits, mask_of_half, 2);
    record("top_k", top);
    const auto picked = pick_scores<Logit>(policy, logits.const_view(), top, mask_of_half);
    record.in_float("pick_scores", picked);
    const auto d_all = place_scores(policy, picked, top, mask_of_half, length);
    record.in_float("place_scores", d_all);
    record.in_float("cumulative_softmax", cumulative_softmax(policy, 1.0, logits, top, mask_of_half));
    record.in_float("d_logits of cumulative_softmax",
                    cumulative_softmax_vjp(policy, 1.0, picked, logits, top, mask_of_half));
    for (const bool converged : {false, true}) {
        const CoordinateDescent descent{.limit_k = true, .iterate_to_convergence = converged};
        const std::string name = converged ? " of converged descent" : " of descent";
        const auto saved = coordinate_descent_forward(policy, descent, 1.5, logits, mask_of_half);
        record.in_float("scores" + name, saved.scores);
        const auto d = coordinate_descent_vjp(policy, descent, 1.5, saved, d_all, logits, mask_of_half);
        // Of so many logits, some are so close to a threshold, where the gradient jumps, that rounding decides: a few
        // sequences at the beginning, in the middle and at the end are compared.
        for (const Index first : {Index{0}, Index{32'750}, half - 50})
            if (first + 50 <= half)
                record.in_float("d_logits from " + std::to_string(first) + name,
                                d.d_logits.const_view().range(first, 50));
    }
    const auto noise = gumbel_noise<Logit>(policy, Random(Seed{setting.seed}), half * 2, 2, length);
    const auto chosen = sinkhorn_forward(policy, {}, logits, noise.const_view(), mask_of_half, 2);
    record("indices of Sinkhorn", chosen.indices);
    record.in_float("scores of Sinkhorn", chosen.scores);
    record.in_float("d_logits of Sinkhorn", sinkhorn_vjp(policy, {}, chosen, chosen.scores, chosen.indices, logits,
                                                         noise.const_view(), mask_of_half));
    const auto token = draw.values(std::array{Index{2}, dim});
    const auto d_logits = draw.sums(std::array{batch, Index{2}, length});
    record.in_float("route_logits", route_logits(policy, x, token, 0.5));
    auto d_x = draw.values(shape);
    auto d_token = draw.sums(std::array{Index{2}, dim});
    route_logits_vjp(policy, d_x.view(), d_token.view(), d_logits, x, token, 0.5);
    record("d_x of route_logits", d_x);

    const auto weight = draw.values(std::array{dim}), bias = draw.values(std::array{dim});
    auto d_weight = draw.sums(std::array{dim}), d_bias = draw.sums(std::array{dim});
    record("rms_norm", rms_norm(policy, x, weight));
    record("d_x of rms_norm", rms_norm_vjp(policy, d_y, x, weight, d_weight.view()));
    record("layer_norm", layer_norm(policy, x, weight, bias));
    record("d_x of layer_norm", layer_norm_vjp(policy, d_y, x, weight, d_weight.view(), d_bias.view()));
    record("softmax", softmax(policy, x));

    const auto indices = draw.indices(batch, 2, length);
    const auto rows = gather(policy, x, indices);
    record("gather", rows);
    auto scattered = draw.values(shape);
    scatter(policy, Scatter::mean, scattered.view(), rows, indices);
    record("mean", scattered);
    record("d_rows of mean", scatter_vjp(policy, Scatter::mean, scattered, indices));

    const auto in = draw.values(std::array{batch, Index{2}, Index{1}, dim});
    const auto weights = draw.values(std::array{2 * dim, dim});
    auto d_weights = draw.sums(std::array{2 * dim, dim});
    record("y of linear", routed_linear(policy, in, weights));
    record("d_x of linear", routed_linear_vjp(policy, in, in, weights, d_weights.view()));

    const auto q = draw.values(std::array{batch, length, Index{1}, dim}), d_out = draw.values(q.shape());
    const auto kv = draw.values(std::array{batch, length, Index{2}, Index{1}, dim});
    const LocalAttention local{1, MaskedRows::window_mean};
    const auto of_local = local_attention_forward(policy, local, q, kv, mask);
    record("out of local attention", of_local.out);
    record("d_qkv of local attention", local_attention_vjp(policy, local, of_local, d_out, q, kv, mask));

    const auto keys = draw.values(std::array{batch, Index{1}, length, Index{1}, Index{2}, dim});
    const auto of_dense = dense_attention_forward(policy, q, keys, KeyMask{}, {});
    record("out of dense attention", of_dense.out);
    const auto d = dense_attention_vjp(policy, of_dense, d_out, q, keys, KeyMask{}, {});
    record("d_q of dense attention", d.d_q);
    record("d_kv of dense attention", d.d_kv);
    return record.results;
}

}  // namespace cases
