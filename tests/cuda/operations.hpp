// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>

#include <colt5/op/coordinate_descent.hpp>
#include <colt5/op/cumulative_softmax.hpp>
#include <colt5/op/dense_attention.hpp>
#include <colt5/op/feed_forward.hpp>
#include <colt5/op/gather.hpp>
#include <colt5/op/gelu.hpp>
#include <colt5/op/layer_norm.hpp>
#include <colt5/op/linear.hpp>
#include <colt5/op/local_attention.hpp>
#include <colt5/op/pick.hpp>
#include <colt5/op/rms_norm.hpp>
#include <colt5/op/route_logits.hpp>
#include <colt5/op/sinkhorn.hpp>
#include <colt5/op/softmax.hpp>
#include <colt5/op/top_k.hpp>

#include "draw.hpp"

/// The bodies of the cases of operations: see bodies.hpp.
namespace cases {

using namespace colt5;

template <typename T, typename P>
Results linear_case(const P& policy, const Setting& setting) {
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    const Index batch = draw.size(1, 9), routes = draw.size(1, 3), in = draw.size(1, 140), out = draw.size(1, 140);
    const Index length = draw.length(5000, batch * routes * std::max(in, out));
    const auto x = draw.values(std::array{batch, routes, length, in});
    const auto weight = draw.values(std::array{routes * out, in});
    const auto bias = draw.values(std::array{routes * out});
    const auto d_y = draw.values(std::array{batch, routes, length, out});
    auto d_weight = draw.sums(std::array{routes * out, in});
    auto d_bias = draw.sums(std::array{routes * out});
    record("y", routed_linear(policy, x, weight, bias.const_view()));
    record("y without bias", routed_linear(policy, x, weight));
    record("d_x", routed_linear_vjp(policy, d_y, x, weight, d_weight.view(), d_bias.view()));
    record("d_weight", d_weight);
    record.in_float("d_bias", d_bias);
    return record.results;
}

template <typename T, typename P>
Results norms_case(const P& policy, const Setting& setting) {
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    const Index batch = draw.size(1, 9), dim = draw.size(2, 600);
    const std::array shape{batch, draw.length(5000, batch * dim), dim};
    const auto x = draw.values(shape), d_y = draw.values(shape);
    const auto weight = draw.values(std::array{shape[2]}), bias = draw.values(std::array{shape[2]});
    auto d_weight = draw.sums(std::array{shape[2]}), d_bias = draw.sums(std::array{shape[2]});
    record("rms_norm", rms_norm(policy, x, weight));
    record("d_x of rms_norm", rms_norm_vjp(policy, d_y, x, weight, d_weight.view()));
    record("layer_norm", layer_norm(policy, x, weight, bias));
    record("d_x of layer_norm", layer_norm_vjp(policy, d_y, x, weight, d_weight.view(), d_bias.view()));
    record.in_float("d_weight", d_weight);
    record.in_float("d_bias", d_bias);
    return record.results;
}

/// Every other one of the widths that one kernel of compute capability 9.0a takes in 16 bits.
template <typename T, typename P>
Results feed_forward_case(const P& policy, const Setting& setting) {
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    using Sum = accumulate_t<T>;
    const bool wide = setting.seed % 2 == 0;
    const Index dim = wide ? 512 : draw.size(1, 140), hidden = wide ? 256 : draw.size(1, 140);
    const Index batch = draw.size(1, 4);
    const std::array shape{batch, draw.length(5000, batch * dim / 4), dim};
    const auto x = draw.values(shape), d_y = draw.values(shape), add = draw.values(shape);
    const auto gamma = draw.values(std::array{dim}), hidden_bias = draw.values(std::array{hidden}, 0.3);
    const auto bias = draw.values(std::array{dim}, 0.3);
    const auto hidden_weight = draw.values(std::array{hidden, dim}, 1 / std::sqrt(double(dim)));
    const auto weight = draw.values(std::array{dim, hidden}, 1 / std::sqrt(double(hidden)));
    const FeedForwardParameters<const T> parameters{{gamma.const_view()},
                                                    hidden_weight.const_view(),
                                                    hidden_bias.const_view(),
                                                    weight.const_view(),
                                                    bias.const_view()};
    TokensTensor<T, P> before(policy, {shape[0], shape[1], hidden});
    const auto y = feed_forward(policy, x, parameters);
    record("y", y);
    const auto kept = feed_forward(policy, x, parameters, before.view());
    record.holds("y is the same where `before` is kept", same_bits(policy, kept, y));
    record("before", before);
    record("y with something added", feed_forward(policy, x, parameters, {}, add.const_view()));
    auto d_gamma = draw.sums(std::array{dim}), d_hidden_bias = draw.sums(std::array{hidden});
    auto d_bias = draw.sums(std::array{dim});
    auto d_hidden_weight = draw.sums(std::array{hidden, dim}), d_weight = draw.sums(std::array{dim, hidden});
    const FeedForwardParameters<Sum> gradients{
        {d_gamma.view()}, d_hidden_weight.view(), d_hidden_bias.view(), d_weight.view(), d_bias.view()};
    auto d_x = tensor_like(policy, x);
    feed_forward_vjp(policy, d_x.view(), d_y, x, before.const_view(), parameters, gradients);
    record("d_x", d_x);
    record("d_gamma", d_gamma);
    record("d_hidden_weight", d_hidden_weight);
    record("d_hidden_bias", d_hidden_bias);
    record("d_weight", d_weight);
    record.in_float("d_bias", d_bias);
    return record.results;
}

template <typename T, typename P>
Results expressions_case(const P& policy, const Setting& setting) {
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    const Index batch = draw.size(1, 9), dim = draw.size(1, 300);
    const std::array shape{batch, draw.length(5000, batch * dim), dim};
    const auto x = draw.values(shape);
    auto y = draw.values(shape);
    const auto mask = draw.mask(shape[0], shape[1]);
    const auto scores = draw.values(std::array{shape[0], shape[1]});
    record("gelu", gelu_forward(policy, x));
    gelu_vjp(policy, y, x);
    record("gelu_vjp", y);
    record("softmax", softmax(policy, x));
    record("softmax_vjp", softmax_vjp(policy, y, x));
    assign(policy, y,
           select(column(mask), x * column(scores) / max(row_norm(x), accumulate_t<T>(1e-6)), accumulate_t<T>(0)));
    record("rows", y);
    return record.results;
}

template <typename T, typename P>
Results gather_case(const P& policy, const Setting& setting) {
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    const Index batch = draw.size(1, 9), dim = draw.size(1, 200), length = draw.length(5000, batch * dim);
    const Index k = draw.length(400);
    const auto x = draw.values(std::array{batch, length, dim});
    auto out = draw.values(std::array{batch, length, dim});
    const auto indices = draw.indices(batch, k, length);
    const auto rows = gather(policy, x, indices);
    record("gather", rows);
    for (const Scatter how : {Scatter::add, Scatter::mean}) {
        scatter(policy, how, out.view(), rows, indices);
        record(how == Scatter::add ? "add" : "mean", out);
        record(how == Scatter::add ? "d_rows of add" : "d_rows of mean", scatter_vjp(policy, how, out, indices));
    }
    return record.results;
}

/// Top-k and the scores of two routers, with their gradients, for logits (b, r, n).
template <typename T, typename P>
void record_routing(Recorder<P>& record, Draw<T, P>& draw, const std::array<Index, 3>& shape, Index k) {
    using Logit = accumulate_t<T>;
    const P& policy = record.policy;
    const auto with_mask = draw.mask(shape[0], shape[2]);
    const Mask mask = draw.chance(0.5) ? Mask{} : Mask(with_mask.const_view());
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
        const auto pass = coordinate_descent_forward(policy, descent, wanted, s, mask);
        record.in_float("scores of descent " + name, pass.scores);
        const auto d = coordinate_descent_vjp(policy, descent, wanted, pass, d_all, s, mask);
        record.in_float("d_logits of descent " + name, d.d_logits);
        record.in_float("d_k of descent " + name, d.d_k);
    }
    record.in_float("cumulative_softmax", cumulative_softmax(policy, 1.0, logits, indices, mask));
    record.in_float("d_logits of cumulative_softmax",
                    cumulative_softmax_vjp(policy, 1.0, picked, logits, indices, mask));
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

template <typename T, typename P>
Results sinkhorn_case(const P& policy, const Setting& setting) {
    using Logit = accumulate_t<T>;
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    const Index batch = draw.size(1, 4), routes = draw.size(1, 2), length = draw.length(500), slots = draw.size(1, 60);
    const auto with_mask = draw.mask(batch, length);
    const Mask mask = draw.chance(0.5) ? Mask{} : Mask(with_mask.const_view());
    const auto logits = draw.sums(std::array{batch, routes, length});
    const auto noise =
        gumbel_noise<Logit>(policy, Random(Seed{setting.seed}), batch * routes, std::min(slots, length), length);
    record.in_float("noise", noise);
    for (const bool masked_take_part : {false, true}) {
        const Sinkhorn sinkhorn{.masked_tokens_take_part = masked_take_part};
        const auto pass = sinkhorn_forward(policy, sinkhorn, logits, noise.const_view(), mask, slots);
        const std::string name = masked_take_part ? " with masked tokens" : "";
        record("indices" + name, pass.indices);
        record.in_float("scores" + name, pass.scores);
        record.in_float("d_logits" + name, sinkhorn_vjp(policy, sinkhorn, pass, pass.scores, pass.indices, logits,
                                                        noise.const_view(), mask));
    }
    return record.results;
}

template <typename T, typename P>
Results local_attention_of(const P& policy, Draw<T, P>& draw, Index batch, Index length, Index heads, Index dim_head,
                           Index reach) {
    Recorder record(policy);
    const auto with_mask = draw.mask(batch, length);
    const Mask mask = draw.chance(0.5) ? Mask{} : Mask(with_mask.const_view());
    const auto q = draw.values(std::array{batch, length, heads, dim_head});
    const auto kv = draw.values(std::array{batch, length, Index{2}, heads, dim_head});
    const auto d_out = draw.values(q.shape());
    const Index part = draw.size(length / 5 + 1, length);
    for (const MaskedRows rows : {MaskedRows::zero, MaskedRows::window_mean}) {
        const LocalAttention attention{reach, rows};
        const std::string name = rows == MaskedRows::zero ? "" : " with window means";
        const auto pass = local_attention_forward(policy, attention, q, kv, mask);
        record("out" + name, pass.out);
        record("out alone" + name, local_attention(policy, attention, q, kv, mask));
        record("d_qkv" + name, local_attention_vjp(policy, attention, pass, d_out, q, kv, mask));

        // The first sequence in parts: each goes to its own place of out and of d_qkv.
        const auto of_sequence = [&](const auto& t, Index first, Index count) {
            const auto view = t.view();
            auto shape = view.shape();
            const Index token = view.size() / (shape[0] * shape[1]);
            shape[0] = 1;
            shape[1] = count;
            return decltype(view)::unchecked(view.data() + first * token, shape);
        };
        Tensor<T, P, dynamic, dynamic, dynamic, dynamic, dynamic> d_qkv(policy, {1, length, 3, heads, dim_head});
        const auto of_window = [&](Index first, Index count) {
            return View<T, dynamic, dynamic, dynamic, dynamic, dynamic>(d_qkv.data() + first * 3 * heads * dim_head,
                                                                        {1, count, 3, heads, dim_head});
        };
        const auto first_mask = mask ? mask.range(0, 1) : mask;
        for (Index first = 0; first < length; first += part) {
            const Index count = std::min(part, length - first);
            const auto some_q = of_sequence(q, first, count);
            const auto keys = of_sequence(kv, 0, length);
            const auto some = local_attention_forward(policy, attention, some_q, keys, first_mask, first);
            record("out from " + std::to_string(first) + name, some.out);
            local_attention_vjp(policy,
                                of_window(attention.window_begin(first), attention.window(first, count, length)),
                                attention, some, of_sequence(d_out, first, count), some_q, keys, first_mask, first);
        }
        record("d_qkv in parts" + name, d_qkv);
    }
    return record.results;
}

template <typename T, typename P>
Results local_attention_case(const P& policy, const Setting& setting) {
    Draw<T, P> draw(policy, setting);
    const Index batch = draw.size(1, 9), heads = draw.size(1, 16), dim_head = draw.dim_head();
    const Index length = draw.length(5000, batch * heads * dim_head), reach = draw.length(200);
    return local_attention_of(policy, draw, batch, length, heads, dim_head, reach);
}

/// So many short heads that a block of a kernel that marches gets several tiles of each.
template <typename T, typename P>
Results many_heads_case(const P& policy, const Setting& setting) {
    Draw<T, P> draw(policy, setting);
    const Index length = draw.size(257, 450), dim_head = 8 * draw.size(1, 8), reach = draw.size(1, 64);
    return local_attention_of(policy, draw, 9, length, 16, dim_head, reach);
}

template <typename T, typename P>
Results dense_attention_case(const P& policy, const Setting& setting) {
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    const Index batch = draw.size(1, 9), routes = draw.size(1, 3), per_route = draw.size(1, 16 / routes);
    const Index dim_head = draw.dim_head(), of_token = batch * routes * per_route * dim_head;
    const Index length = draw.length(3000, of_token), keys = draw.length(3000, of_token);
    const auto with_mask = draw.mask(batch * routes, keys);
    const KeyMask mask =
        draw.chance(0.5) ? KeyMask{} : KeyMask(with_mask.const_view().reshape(std::array{batch, routes, keys}));
    const auto q = draw.values(std::array{batch, length, routes * per_route, dim_head});
    const auto kv = draw.values(std::array{batch, routes, keys, per_route, Index{2}, dim_head});
    const auto d_out = draw.values(std::array{batch, length, routes * per_route, dim_head});
    const auto with_scale = draw.sums(std::array{batch, routes, keys});
    for (const bool scaled : {false, true}) {
        const auto scale = scaled ? with_scale.const_view() : TokensView<const accumulate_t<T>>{};
        const std::string name = scaled ? " with value_scale" : "";
        const auto pass = dense_attention_forward(policy, q, kv, mask, scale);
        record("out" + name, pass.out);
        const auto d = dense_attention_vjp(policy, pass, d_out, q, kv, mask, scale);
        record("d_q" + name, d.d_q);
        record("d_kv" + name, d.d_kv);
        if (scaled) record("d_value_scale", d.d_value_scale, Kind::amplified);
    }
    return record.results;
}

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
        const auto pass = coordinate_descent_forward(policy, descent, 1.5, logits, mask_of_half);
        record.in_float("scores" + name, pass.scores);
        const auto d = coordinate_descent_vjp(policy, descent, 1.5, pass, d_all, logits, mask_of_half);
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
