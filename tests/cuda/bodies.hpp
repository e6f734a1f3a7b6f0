// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/module/conditional_routed_cross_attention.hpp>
#include <colt5/module/conditional_routed_transformer_block.hpp>
#include <colt5/op/gelu.hpp>
#include <colt5/op/softmax.hpp>
#include <colt5/optim/adamw.hpp>
#include <colt5/optim/clip.hpp>

#include "cases.hpp"

/// The bodies of the cases, for a policy P whose kernels are included before this file.
namespace cases {

using namespace colt5;

/// Collects what a case computes.
template <typename P>
struct Recorder {
    explicit Recorder(const P& policy_) : policy(policy_) {}
    template <typename V>
    void operator()(const std::string& name, const V& tensor) {
        std::vector<double>& values = results[name];
        for (const auto& value : to_host(policy, tensor)) values.push_back(static_cast<double>(value));
    }
    const P& policy;
    Results results;
};

/// Draws shapes and values from a seed: the same on every policy.
template <typename T, typename P>
class Draw {
public:
    Draw(const P& policy, std::uint64_t seed) : policy_(policy), seeds_(Seed{seed}), shapes_(seeds_.next()) {}

    Index size(Index least, Index most) {
        return least + static_cast<Index>(shapes_.uniform(drawn_++) * static_cast<double>(most - least + 1));
    }
    template <typename Scalar, std::size_t Rank>
    auto values(const std::array<Index, Rank>& shape, double deviation = 1) {
        return normal_of<Scalar>(shape, deviation, std::make_index_sequence<Rank>{});
    }
    /// Real tokens first, as padding leaves them; now and then a sequence has none.
    Tensor<bool, P, dynamic, dynamic> mask(Index batch, Index length) {
        std::vector<Index> real;
        for (Index b = 0; b < batch; ++b) real.push_back(size(0, 4) == 0 ? 0 : size(length / 2, length));
        Tensor<bool, P, dynamic, dynamic> mask(policy_, {batch, length});
        fill_with(policy_, mask, [&](std::size_t i) {
            const auto at = static_cast<Index>(i);
            return at % length < real[static_cast<std::size_t>(at / length)];
        });
        return mask;
    }

private:
    template <typename Scalar, std::size_t Rank, std::size_t... I>
    auto normal_of(const std::array<Index, Rank>& shape, double deviation, std::index_sequence<I...>) {
        Tensor<Scalar, P, (static_cast<void>(I), dynamic)...> tensor(policy_, shape);
        fill_normal(policy_, tensor, seeds_.next(), deviation);
        return tensor;
    }

    const P& policy_;
    SeedSequence seeds_;
    Random shapes_;
    std::uint64_t drawn_ = 0;
};

template <typename T, typename P>
Results linear_case(const P& policy, std::uint64_t seed) {
    Draw<T, P> draw(policy, seed);
    Recorder record(policy);
    const Index batch = draw.size(1, 4), routes = draw.size(1, 3), length = draw.size(1, 300), in = draw.size(1, 70),
                out = draw.size(1, 70);
    const auto x = draw.template values<T>(std::array{batch, routes, length, in});
    const auto weight = draw.template values<T>(std::array{routes * out, in});
    const auto bias = draw.template values<T>(std::array{routes * out});
    const auto d_y = draw.template values<T>(std::array{batch, routes, length, out});
    auto d_weight = draw.template values<T>(std::array{routes * out, in});
    auto d_bias = draw.template values<T>(std::array{routes * out});
    record("y", routed_linear(policy, x, weight, bias.const_view()));
    record("y without bias", routed_linear(policy, x, weight));
    record("d_x", routed_linear_vjp(policy, d_y, x, weight, d_weight.view(), d_bias.view()));
    record("d_weight", d_weight);
    record("d_bias", d_bias);
    return record.results;
}

template <typename T, typename P>
Results norms_case(const P& policy, std::uint64_t seed) {
    Draw<T, P> draw(policy, seed);
    Recorder record(policy);
    const std::array shape{draw.size(1, 4), draw.size(1, 700), draw.size(2, 300)};
    const auto x = draw.template values<T>(shape), d_y = draw.template values<T>(shape);
    const auto weight = draw.template values<T>(std::array{shape[2]}),
               bias = draw.template values<T>(std::array{shape[2]});
    auto d_weight = draw.template values<T>(std::array{shape[2]}),
         d_bias = draw.template values<T>(std::array{shape[2]});
    record("rms_norm", rms_norm(policy, x, weight));
    record("d_x of rms_norm", rms_norm_vjp(policy, d_y, x, weight, d_weight.view()));
    record("layer_norm", layer_norm(policy, x, weight, bias));
    record("d_x of layer_norm", layer_norm_vjp(policy, d_y, x, weight, d_weight.view(), d_bias.view()));
    record("d_weight", d_weight);
    record("d_bias", d_bias);
    return record.results;
}

template <typename T, typename P>
Results expressions_case(const P& policy, std::uint64_t seed) {
    Draw<T, P> draw(policy, seed);
    Recorder record(policy);
    const std::array shape{draw.size(1, 4), draw.size(1, 300), draw.size(1, 300)};
    const auto x = draw.template values<T>(shape);
    auto y = draw.template values<T>(shape);
    const auto mask = draw.mask(shape[0], shape[1]);
    const auto scores = draw.template values<T>(std::array{shape[0], shape[1]});
    record("gelu", gelu_forward(policy, x));
    gelu_vjp(policy, y, x);
    record("gelu_vjp", y);
    record("softmax", softmax(policy, x));
    record("softmax_vjp", softmax_vjp(policy, y, x));
    assign(policy, y, select(column(mask), x * column(scores) / max(row_norm(x), T(1e-6)), T(0)));
    record("rows", y);
    return record.results;
}

template <typename T, typename P>
Results gather_case(const P& policy, std::uint64_t seed) {
    Draw<T, P> draw(policy, seed);
    Recorder record(policy);
    const Index batch = draw.size(1, 5), length = draw.size(1, 600), dim = draw.size(1, 200), k = draw.size(1, 100);
    const auto x = draw.template values<T>(std::array{batch, length, dim});
    auto out = draw.template values<T>(std::array{batch, length, dim});
    Tensor<TokenIndex, P, dynamic, dynamic> indices(policy, {batch, k});
    std::vector<TokenIndex> drawn(static_cast<std::size_t>(batch * k));
    for (TokenIndex& index : drawn) index = static_cast<TokenIndex>(draw.size(0, length - 1));
    upload(policy, indices.data(), drawn.data(), drawn.size() * sizeof(TokenIndex));
    const auto rows = gather(policy, x, indices);
    record("gather", rows);
    for (const Scatter how : {Scatter::add, Scatter::mean}) {
        scatter(policy, how, out.view(), rows, indices);
        record(how == Scatter::add ? "add" : "mean", out);
        record(how == Scatter::add ? "d_rows of add" : "d_rows of mean", scatter_vjp(policy, how, out, indices));
    }
    return record.results;
}

/// Logits, top-k and the scores of the three routers, with their gradients.
template <typename T, typename P>
Results routing_case(const P& policy, std::uint64_t seed) {
    using Logit = accumulate_t<T>;
    Draw<T, P> draw(policy, seed);
    Recorder record(policy);
    const Index batch = draw.size(1, 4), routes = draw.size(1, 3), length = draw.size(1, 3000), dim = draw.size(1, 100);
    const Index k = draw.size(1, std::min(length, Index{200})) + draw.size(0, 1) * length;
    const auto x = draw.template values<T>(std::array{batch, length, dim});
    const auto token = draw.template values<T>(std::array{routes, dim});
    const auto with_mask = draw.mask(batch, length);
    const Mask mask = draw.size(0, 1) == 0 ? Mask{} : Mask(with_mask.const_view());
    const auto logits = draw.template values<Logit>(std::array{batch, routes, length}, 2.0);
    record("route_logits", route_logits(policy, x, token, 0.5));
    auto d_x = draw.template values<T>(std::array{batch, length, dim});
    auto d_token = draw.template values<T>(std::array{routes, dim});
    route_logits_vjp(policy, d_x.view(), d_token.view(), logits, x, token, 0.5);
    record("d_x of route_logits", d_x);
    record("d_token", d_token);

    const auto indices = top_k(policy, logits, mask, k);
    record("top_k", indices);
    const auto picked = pick_scores<Logit>(policy, logits.const_view(), indices, mask);
    record("pick_scores", picked);
    const auto d_all = place_scores(policy, picked, indices, mask, length);
    record("place_scores", d_all);

    for (int way = 0; way < 3; ++way) {
        const std::string name = way == 0 ? "0.2.3" : way == 1 ? "scaled" : "converged";
        CoordinateDescent descent{.limit_k = true};
        if (way == 1)
            descent = {.n_iters = 20,
                       .eps = 0.1,
                       .eps_init = 4,
                       .eps_decay = 0.7,
                       .start = DescentStart::minus_logits,
                       .limit_k = true};
        if (way == 2) descent.iterate_to_convergence = true;
        const auto pass = coordinate_descent_forward(policy, descent, static_cast<double>(k), logits, mask);
        record("scores of descent " + name, pass.scores);
        const auto d = coordinate_descent_vjp(policy, descent, static_cast<double>(k), pass, d_all, logits, mask);
        record("d_logits of descent " + name, d.d_logits);
        record("d_k of descent " + name, d.d_k);
    }
    record("cumulative_softmax", cumulative_softmax(policy, 1.0, logits, indices, mask));
    record("d_logits of cumulative_softmax", cumulative_softmax_vjp(policy, 1.0, picked, logits, indices, mask));
    return record.results;
}

template <typename T, typename P>
Results sinkhorn_case(const P& policy, std::uint64_t seed) {
    using Logit = accumulate_t<T>;
    Draw<T, P> draw(policy, seed);
    Recorder record(policy);
    const Index batch = draw.size(1, 3), routes = draw.size(1, 2), length = draw.size(1, 500), slots = draw.size(1, 40);
    const auto with_mask = draw.mask(batch, length);
    const Mask mask = draw.size(0, 1) == 0 ? Mask{} : Mask(with_mask.const_view());
    const auto logits = draw.template values<Logit>(std::array{batch, routes, length});
    const auto noise = gumbel_noise<Logit>(policy, Random(Seed{seed}), batch * routes, std::min(slots, length), length);
    record("noise", noise);
    for (const bool masked_take_part : {false, true}) {
        const Sinkhorn sinkhorn{.masked_tokens_take_part = masked_take_part};
        const auto pass = sinkhorn_forward(policy, sinkhorn, logits, noise.const_view(), mask, slots);
        const std::string name = masked_take_part ? " with masked tokens" : "";
        record("indices" + name, pass.indices);
        record("scores" + name, pass.scores);
        record("d_logits" + name,
               sinkhorn_vjp(policy, sinkhorn, pass, pass.scores, pass.indices, logits, noise.const_view(), mask));
    }
    return record.results;
}

template <typename T, typename P>
Results local_attention_case(const P& policy, std::uint64_t seed) {
    Draw<T, P> draw(policy, seed);
    Recorder record(policy);
    const Index batch = draw.size(1, 3), length = draw.size(1, 600), heads = draw.size(1, 5), reach = draw.size(1, 100);
    const Index dim_head = 8 * draw.size(1, 16);
    const auto with_mask = draw.mask(batch, length);
    const Mask mask = draw.size(0, 1) == 0 ? Mask{} : Mask(with_mask.const_view());
    const auto q = draw.template values<T>(std::array{batch, length, heads, dim_head});
    const auto kv = draw.template values<T>(std::array{batch, length, Index{2}, heads, dim_head});
    const auto d_out = draw.template values<T>(q.shape());
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
Results dense_attention_case(const P& policy, std::uint64_t seed) {
    using Logit = accumulate_t<T>;
    Draw<T, P> draw(policy, seed);
    Recorder record(policy);
    const Index batch = draw.size(1, 3), length = draw.size(1, 400), routes = draw.size(1, 3),
                per_route = draw.size(1, 3);
    const Index keys = draw.size(1, 500), dim_head = 8 * draw.size(1, 16);
    const auto with_mask = draw.mask(batch * routes, keys);
    const KeyMask mask =
        draw.size(0, 1) == 0 ? KeyMask{} : KeyMask(with_mask.const_view().reshape(std::array{batch, routes, keys}));
    const auto q = draw.template values<T>(std::array{batch, length, routes * per_route, dim_head});
    const auto kv = draw.template values<T>(std::array{batch, routes, keys, per_route, Index{2}, dim_head});
    const auto d_out = draw.template values<T>(std::array{batch, length, routes * per_route, dim_head});
    const auto with_scale = draw.template values<Logit>(std::array{batch, routes, keys});
    for (const bool scaled : {false, true}) {
        const auto scale = scaled ? with_scale.const_view() : TokensView<const Logit>{};
        const std::string name = scaled ? " with value_scale" : "";
        const auto pass = dense_attention_forward(policy, q, kv, mask, scale);
        record("out" + name, pass.out);
        const auto d = dense_attention_vjp(policy, pass, d_out, q, kv, mask, scale);
        record("d_q" + name, d.d_q);
        record("d_kv" + name, d.d_kv);
        if (scaled) record("d_value_scale", d.d_value_scale);
    }
    return record.results;
}

/// Output and all gradients of a module.
template <typename Module, typename P, typename... Inputs>
void record_module(Recorder<P>& record, const Module& of, const Inputs&... inputs) {
    auto pass = of.forward(inputs...);
    record("inference", of(inputs...));
    record("out", pass.out);
    auto gradients = of.make_gradients();
    const auto d = of.backward(pass, pass.out, gradients);
    if constexpr (requires { d.d_context; }) {
        record("d_x", d.d_x);
        record("d_context", d.d_context);
    } else {
        record("d_tokens", d);
    }
    Module::each_parameter([&](const std::string& name, auto& gradient) { record("gradient of " + name, gradient); },
                           "", gradients);
}

template <RouterType router, typename T, typename P>
Results block_case(const P& policy, std::uint64_t seed) {
    Draw<T, P> draw(policy, seed);
    Recorder record(policy);
    constexpr TransformerBlockConfig config{
        .dim = 48,
        .num_heavy_attn_tokens_q = 12,
        .num_heavy_attn_tokens_kv = 20,
        .num_routed_kv = 2,
        .num_heavy_ff_tokens = 17,
        .light_dim_head = 16,
        .light_heads = 3,
        .light_window_size = 30,
        .heavy_dim_head = 32,
        .heavy_heads = 4,
        .router_straight_through = false,
        .router_type = router,
        .router_kwargs = {.coor_descent = {.score_scale = 0.2}, .cum_softmax = {.temperature = 4}}};
    const Index batch = draw.size(1, 9), length = draw.size(1, 200);
    const auto x = draw.template values<T>(std::array{batch, length, config.dim});
    const auto with_mask = draw.mask(batch, length);
    const Mask mask = draw.size(0, 1) == 0 ? Mask{} : Mask(with_mask.const_view());
    record_module(record, ConditionalRoutedTransformerBlock<config, T, P>{policy, Seed{seed}}, x, mask);
    return record.results;
}

template <typename T, typename P>
Results cross_case(const P& policy, std::uint64_t seed) {
    Draw<T, P> draw(policy, seed);
    Recorder record(policy);
    constexpr CrossAttentionConfig config{.dim = 48,
                                          .num_tokens_q = 20,
                                          .num_tokens_kv = 30,
                                          .dim_head = 16,
                                          .heads = 4,
                                          .router_kwargs = {.coor_descent = {.score_scale = 0.2}},
                                          .kv_routing_tokens = 2};
    const Index batch = draw.size(1, 5), length = draw.size(1, 60), memories = draw.size(1, 400);
    const auto x = draw.template values<T>(std::array{batch, length, config.dim});
    const auto context = draw.template values<T>(std::array{batch, memories, config.dim});
    const auto with_mask = draw.mask(batch, length);
    const auto with_context_mask = draw.mask(batch, memories);
    const bool masked = draw.size(0, 1) == 1;
    record_module(record, ConditionalRoutedCrossAttention<config, T, P>{policy, Seed{seed}}, x, context,
                  masked ? Mask(with_mask.const_view()) : Mask{},
                  masked ? Mask(with_context_mask.const_view()) : Mask{});
    return record.results;
}

/// Ten steps of AdamW with clipping on a feedforward.
template <typename T, typename P>
Results training_case(const P& policy, std::uint64_t seed) {
    Draw<T, P> draw(policy, seed);
    Recorder record(policy);
    constexpr FeedForwardConfig config{
        .dim = 32, .num_heavy_tokens = 8, .router_kwargs = {.coor_descent = {.score_scale = 0.2}}};
    using Module = ConditionalRoutedFeedForward<config, T, P>;
    Module feedforward{policy, Seed{seed}};
    AdamW optimizer(policy, feedforward, {.lr = 1e-2});
    const auto x = draw.template values<T>(std::array{Index{2}, draw.size(1, 100), config.dim});
    auto gradients = feedforward.make_gradients();
    for (int step = 0; step < 10; ++step) {
        zero_gradients<Module>(policy, gradients);
        const auto pass = feedforward.forward(x);
        feedforward.backward(pass, pass.out, gradients);
        clip_gradient_norm<Module>(policy, gradients, 0.5);
        optimizer.step(feedforward, gradients);
    }
    record("out", feedforward(x));
    return record.results;
}

/// All cases, for policies that `make_policy(precision)` gives.
template <typename MakePolicy>
std::vector<Case> all_cases(MakePolicy make_policy) {
    const auto of = [make_policy](auto body) {
        return [make_policy, body](Precision precision, std::uint64_t seed) {
            const auto policy = make_policy(precision);
            return precision == Precision::fp64 ? body(policy, seed, double()) : body(policy, seed, float());
        };
    };
    return {
        {"linear", of([](const auto& p, std::uint64_t s, auto t) { return linear_case<decltype(t)>(p, s); })},
        {"norms", of([](const auto& p, std::uint64_t s, auto t) { return norms_case<decltype(t)>(p, s); })},
        {"expressions", of([](const auto& p, std::uint64_t s, auto t) { return expressions_case<decltype(t)>(p, s); })},
        {"gather", of([](const auto& p, std::uint64_t s, auto t) { return gather_case<decltype(t)>(p, s); })},
        {"routing", of([](const auto& p, std::uint64_t s, auto t) { return routing_case<decltype(t)>(p, s); })},
        {"sinkhorn", of([](const auto& p, std::uint64_t s, auto t) { return sinkhorn_case<decltype(t)>(p, s); })},
        {"local attention",
         of([](const auto& p, std::uint64_t s, auto t) { return local_attention_case<decltype(t)>(p, s); })},
        {"dense attention",
         of([](const auto& p, std::uint64_t s, auto t) { return dense_attention_case<decltype(t)>(p, s); })},
        {"block, coordinate descent", of([](const auto& p, std::uint64_t s, auto t) {
             return block_case<RouterType::coor_descent, decltype(t)>(p, s);
         })},
        {"block, cumulative softmax", of([](const auto& p, std::uint64_t s, auto t) {
             return block_case<RouterType::cum_softmax, decltype(t)>(p, s);
         })},
        {"block, Sinkhorn", of([](const auto& p, std::uint64_t s, auto t) {
             return block_case<RouterType::sinkhorn, decltype(t)>(p, s);
         })},
        {"cross attention", of([](const auto& p, std::uint64_t s, auto t) { return cross_case<decltype(t)>(p, s); })},
        {"training", of([](const auto& p, std::uint64_t s, auto t) { return training_case<decltype(t)>(p, s); })},
    };
}

}  // namespace cases
