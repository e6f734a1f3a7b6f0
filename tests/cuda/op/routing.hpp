// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <string>
#include <utility>
#include <vector>

#include <colt5/op/causal_top_k.hpp>
#include <colt5/op/causal_top_k_next.hpp>
#include <colt5/op/coordinate_descent.hpp>
#include <colt5/op/cumulative_softmax.hpp>
#include <colt5/op/gather.hpp>
#include <colt5/op/route_blocks.hpp>
#include <colt5/op/route_logits.hpp>
#include <colt5/op/top_k.hpp>
#include <colt5/op/topk.hpp>

#include "../draw.hpp"

/// Cases of the operations of a router, from tokens to scores: op/route_logits.hpp, op/top_k.hpp, op/topk.hpp, picking
/// of op/gather.hpp, op/coordinate_descent.hpp, op/cumulative_softmax.hpp, op/causal_top_k.hpp
/// and op/causal_top_k_next.hpp.
namespace cases {

/// Top-k and the scores of two routers, with their gradients, for logits (b, r, n).
template <typename T, typename P>
void record_routing(Recorder<P>& record, Draw<T, P>& draw, const std::array<Index, 3>& shape, Index k) {
    using Logit = accumulate_t<T>;
    const P& policy = record.policy;
    const auto with_mask = draw.optional_mask(shape[0], shape[2]);
    const Mask mask = with_mask.const_view();
    const auto logits = draw.sums(shape, 2.0), wide_logits = draw.sums(shape, 20.0);
    const auto indices = top_k(policy, logits, mask, k);
    record("top_k", indices);
    const auto picked = pick_scores<Logit>(policy, logits.const_view(), indices, mask);
    record.in_float("pick_scores", picked);
    const auto d_all = place_scores(policy, picked, indices, mask, shape[2]);
    record.in_float("place_scores", d_all);
    for (int way = 0; way < 3; ++way) {
        const std::string name = way == 0 ? "0.2.3" : way == 1 ? "scaled" : "converged";
        CoordinateDescent descent{.limit_k = true};
        if (way == 1)
            descent = {.n_iters = 20,
                       .eps = 0.3,
                       .eps_init = 4,
                       .eps_decay = 0.7,
                       .start = DescentStart::minus_logits,
                       .limit_k = true};
        if (way == 2) descent.iterate_to_convergence = true;
        const auto& s = way == 2 ? wide_logits : logits;
        const double wanted = static_cast<double>(k) * (way == 2 ? 1.1 : 1);
        const auto saved = coordinate_descent_forward(policy, descent, wanted, s, mask);
        record.in_float("scores of descent " + name, saved.scores);
        const auto d = coordinate_descent_vjp(policy, descent, wanted, saved, d_all, s, mask);
        record.in_float("d_logits of descent " + name, d.d_logits);
        record.in_float("d_k of descent " + name, d.d_k);
    }
    record.in_float("cumulative_softmax", cumulative_softmax(policy, 1.0, logits, indices, mask));
    record.in_float("d_logits of cumulative_softmax",
                    cumulative_softmax_vjp(policy, 1.0, picked, logits, indices, mask));
    if (mask) {
        const Index real_at_most = draw.size(1, shape[2]);
        auto scores = pick_scores<Logit>(policy, logits.const_view(), indices, mask);
        set_short_scores(policy, scores.view(), indices, mask, real_at_most);
        record.in_float("set_short_scores", scores);
        auto d_short = place_scores(policy, picked, indices, mask, shape[2]);
        set_short_scores_vjp(policy, d_short.view(), mask, real_at_most);
        record.in_float("set_short_scores_vjp", d_short);
    }
    const TopkOptions soft{.eps = 0.3};
    const auto largest = topk(policy, logits, k, soft, mask);
    record.in_float("values of topk", largest.values);
    record.in_float("scores of topk", largest.coor_descent_values);
    record.in_float("d_x of topk", topk_vjp(policy, largest, picked, logits, k, soft, mask));
}

template <typename T, typename P>
Results routing_case(const P& policy, const Setting& setting) {
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    const Index batch = draw.size(1, 9), routes = draw.size(1, 3), dim = draw.size(1, 200);
    const Index length = draw.length(5000, batch * dim);
    const auto x = draw.values(std::array{batch, length, dim});
    const auto token = draw.values(std::array{routes, dim});
    const auto d_logits = draw.sums(std::array{batch, routes, length});
    record.in_float("route_logits", route_logits(policy, x, token, 0.5));
    auto d_x = draw.values(std::array{batch, length, dim});
    auto d_token = draw.sums(std::array{routes, dim});
    route_logits_vjp(policy, d_x.view(), d_token.view(), d_logits, x, token, 0.5);
    record("d_x of route_logits", d_x);
    record.in_float("d_token", d_token);
    const Index k = draw.length(std::min(length, Index{500})) + (draw.chance(0.3) ? length : 0);
    record_routing(record, draw, {batch, routes, length}, k);
    const auto cosine = cosine_logits(policy, x, token, 8);
    record.in_float("cosine_logits", cosine.logits);
    record.in_float("norms of cosine_logits", cosine.norms);
    auto d_x_cosine = draw.values(std::array{batch, length, dim});
    auto d_token_cosine = draw.sums(std::array{routes, dim});
    cosine_logits_vjp(policy, d_x_cosine.view(), d_token_cosine.view(), d_logits, cosine.logits, cosine.norms, x, token,
                      8);
    record("d_x of cosine_logits", d_x_cosine);
    record.in_float("d_token of cosine_logits", d_token_cosine);
    const auto tokens = draw.values(std::array{batch, routes, dim});
    record.in_float("route_logits of samples", route_logits(policy, x, tokens, 0.5));
    auto d_tokens = draw.sums(std::array{batch, routes, dim});
    route_logits_vjp(policy, d_x.view(), d_tokens.view(), d_logits, x, tokens, 0.5);
    record("d_x of route_logits of samples", d_x);
    record.in_float("d_tokens of samples", d_tokens);
    const RouteBlocks blocks{length, draw.size(1, length), 1};
    const auto of_blocks = draw.sums(std::array{batch * blocks.count(), routes, blocks.size});
    record.in_float("logits of blocks", merge_block_rows(policy, blocks, batch, of_blocks));
    return record.results;
}

template <typename T, typename P>
Results causal_case(const P& policy, const Setting& setting) {
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    const Index batch = draw.size(1, 9), routes = draw.size(1, 3), length = draw.length(20'000);
    const auto with_mask = draw.optional_mask(batch, length);
    const auto logits = draw.sums(std::array{batch, routes, length}, 2.0);
    for (const CausalTopK& how : {CausalTopK{.rate = 1.0 / 16}, CausalTopK{.rate = 0.25, .burst = 7, .block_size = 32},
                                  CausalTopK{.rate = 0.5, .block_size = 1024, .fetch_k_ratio = 1.1, .eps = 0.3},
                                  CausalTopK{.rate = 1, .block_size = 1, .straight_through = true}}) {
        const std::string of = " of blocks of " + std::to_string(how.block_size);
        const auto picks = causal_top_k(policy, how, logits, with_mask.const_view(), draw.size(1, length + 9));
        record("picks" + of, picks.indices);
        record("live" + of, picks.live);
        record.in_float("scores" + of, picks.scores);
        record.in_float("slopes" + of, picks.slopes);
    }
    return record.results;
}

/// The picks of causal_top_k_next, chunk by chunk, are those of causal_top_k for each sequence.
template <typename T, typename P>
Results next_causal_case(const P& policy, const Setting& setting) {
    using Logit = accumulate_t<T>;
    using Picks = std::vector<std::pair<Index, Logit>>;  // positions and scores
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    const Index batch = draw.size(1, 5), routes = draw.size(1, 3), length = draw.length(3000), rows = batch * routes;
    const auto with_mask = draw.mask(batch, length);
    const auto real = to_host(policy, with_mask);
    const auto logits = draw.sums(std::array{batch, routes, length}, 2.0);
    const auto all = to_host(policy, logits);
    for (const CausalTopK& how : {CausalTopK{.rate = 1.0 / 16}, CausalTopK{.rate = 0.25, .burst = 7, .block_size = 32},
                                  CausalTopK{.rate = 0.5, .block_size = 1024, .fetch_k_ratio = 1.1, .eps = 0.3},
                                  CausalTopK{.rate = 1, .block_size = 1, .straight_through = true}}) {
        const Index limit = draw.size(1, length + 9), most = draw.length(length);
        std::vector<Picks> expected(static_cast<std::size_t>(rows)), actual(static_cast<std::size_t>(rows));
        const auto add = [&](std::vector<Picks>& to, const auto& positions, const auto& scores, const auto& live) {
            const auto p = to_host(policy, positions);
            const auto s = to_host(policy, scores);
            const auto l = to_host(policy, live);
            for (std::size_t i = 0; i < p.size(); ++i)
                if (l[i]) to[i / (p.size() / to.size())].emplace_back(p[i], s[i]);
        };
        const auto picks = causal_top_k(policy, how, logits, with_mask.const_view(), limit);
        add(expected, picks.indices, picks.scores, picks.live);
        CausalTopKState<Logit, P> state(policy, how, batch, routes, limit);
        for (Index first = 0, count; first < length; first += count) {
            count = std::min(draw.size(1, most), length - first);
            Tensor<bool, P, dynamic, dynamic> mask(policy, {batch, count});
            fill_with(policy, mask, [&](std::size_t i) {
                const auto at = static_cast<Index>(i);
                return real[static_cast<std::size_t>(at / count * length + first + at % count)];
            });
            TokensTensor<Logit, P> part(policy, {batch, routes, count});
            fill_with(policy, part, [&](std::size_t i) {
                const auto at = static_cast<Index>(i);
                return static_cast<double>(all[static_cast<std::size_t>(at / count * length + first + at % count)]);
            });
            const auto next = causal_top_k_next(policy, how, state, part, mask.const_view(), limit);
            add(actual, next.positions, next.scores, next.live);
        }
        record.holds("the same picks in blocks of " + std::to_string(how.block_size), actual == expected);
    }
    return record.results;
}

/// Rows that several blocks share: a cluster of them, or, where that has no room, more that meet in global memory; and
/// the longest that we promise.
template <typename T, typename P>
Results long_rows_case(const P& policy, const Setting& setting) {
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    const Index in_cluster = draw.size(5000, sanitized() ? 20'000 : 200'000), longer = draw.size(480'000, 600'000);
    const Index length = std::array{in_cluster, longer, Index{1} << 24}[setting.seed % 3];
    const Index batch = setting.seed % 3 == 2 ? 1 : draw.size(1, 2), k = draw.length(5000);
    record_routing(record, draw, {batch, 1, length}, k);
    return record.results;
}

}  // namespace cases
