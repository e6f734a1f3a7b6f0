// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <string>

#include <colt5/op/sinkhorn.hpp>

#include "../draw.hpp"

/// Cases of op/sinkhorn.hpp.
namespace cases {

template <typename T, typename P>
Results sinkhorn_case(const P& policy, const Setting& setting) {
    using Logit = accumulate_t<T>;
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    const Index batch = draw.size(1, 4), routes = draw.size(1, 2), length = draw.length(500), slots = draw.size(1, 60);
    const auto with_mask = draw.optional_mask(batch, length);
    const Mask mask = with_mask.const_view();
    const auto logits = draw.sums(std::array{batch, routes, length});
    const auto noise =
        gumbel_noise<Logit>(policy, Random(Seed{setting.seed}), batch * routes, std::min(slots, length), length);
    record.in_float("noise", noise);
    for (const bool masked_take_part : {false, true}) {
        const Sinkhorn sinkhorn{.masked_tokens_take_part = masked_take_part};
        const auto saved = sinkhorn_forward(policy, sinkhorn, logits, noise.const_view(), mask, slots);
        const std::string name = masked_take_part ? " with masked tokens" : "";
        record("indices" + name, saved.indices);
        record.in_float("scores" + name, saved.scores);
        record.in_float("d_logits" + name, sinkhorn_vjp(policy, sinkhorn, saved, saved.scores, saved.indices, logits,
                                                        noise.const_view(), mask));
    }
    return record.results;
}

}  // namespace cases
