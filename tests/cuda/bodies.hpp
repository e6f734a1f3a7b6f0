// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>

#include <colt5/module/conditional_routed_cross_attention.hpp>
#include <colt5/module/conditional_routed_transformer_block.hpp>
#include <colt5/op/gelu.hpp>
#include <colt5/op/softmax.hpp>
#include <colt5/optim/adamw.hpp>
#include <colt5/optim/clip.hpp>

#include "cases.hpp"

/// The bodies of the cases, for a policy P whose kernels are included before this file and a scalar type T: that of the
/// setting's precision on the GPU, double on the CPU.
namespace cases {

using namespace colt5;

/// The nearest number of a precision.
inline double rounded(Precision precision, double value) {
    switch (precision) {
        case Precision::fp64:
            return value;
        case Precision::bf16:
            return static_cast<double>(bfloat16(value));
        case Precision::fp16:
            return static_cast<double>(float16(value));
        default:
            return static_cast<double>(static_cast<float>(value));
    }
}
/// The precision of logits, gradients of parameters and the like.
inline Precision accumulated(Precision precision) {
    return precision == Precision::fp64 ? Precision::fp64 : Precision::fp32;
}

/// Collects what a case computes.
template <typename P>
struct Recorder {
    explicit Recorder(const P& policy_) : policy(policy_) {}
    template <typename V>
    void operator()(const std::string& name, const V& tensor, Kind kind = Kind::rounded) {
        Result& result = results[name];
        result.kind = std::integral<typename V::value_type> ? Kind::exact : kind;
        for (const auto& value : to_host(policy, tensor)) result.values.push_back(static_cast<double>(value));
    }
    template <typename V>
    void in_float(const std::string& name, const V& tensor) {
        (*this)(name, tensor, Kind::in_float);
    }
    void holds(const std::string& name, bool whether) { results[name] = {Kind::exact, {whether ? 1.0 : 0.0}}; }

    const P& policy;
    Results results;
};

/// Draws shapes and values from a seed: the same on every policy.
template <typename T, typename P>
class Draw {
public:
    Draw(const P& policy, const Setting& setting)
        : policy_(policy),
          precision_(setting.precision),
          seeds_(Seed{setting.seed}),
          shapes_(seeds_.next()),
          seed_(setting.seed) {}

    Index size(Index least, Index most) {
        return least + static_cast<Index>(shapes_.uniform(drawn_++) * static_cast<double>(most - least + 1));
    }
    bool chance(double probability) { return shapes_.uniform(drawn_++) < probability; }
    /// From 1 to `most`, as often between 1 and 10 as between 100 and 1000; less where each takes many elements.
    Index length(Index most, Index elements_of_each = 1) {
        most = std::max<Index>(1, std::min(most, (sanitized() ? 50'000 : 250'000) / elements_of_each));
        const double highest = std::log(static_cast<double>(sanitized() ? std::min<Index>(most, 150) : most) + 1);
        return std::max<Index>(1, static_cast<Index>(std::exp(shapes_.uniform(drawn_++) * highest)));
    }
    /// Up to 128, mostly a multiple of 8.
    Index dim_head() { return chance(0.75) ? 8 * size(1, 16) : size(1, 128); }

    /// In T, of the setting's precision.
    template <std::size_t Rank>
    auto values(const std::array<Index, Rank>& shape, double deviation = 1) {
        return normal<T>(shape, deviation, precision_, std::make_index_sequence<Rank>{});
    }
    /// In the type of logits and of gradients of parameters.
    template <std::size_t Rank>
    auto sums(const std::array<Index, Rank>& shape, double deviation = 1) {
        return normal<accumulate_t<T>>(shape, deviation, accumulated(precision_), std::make_index_sequence<Rank>{});
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
    Tensor<TokenIndex, P, dynamic, dynamic> indices(Index batch, Index k, Index length) {
        Tensor<TokenIndex, P, dynamic, dynamic> indices(policy_, {batch, k});
        fill_with(policy_, indices, [&](std::size_t) { return size(0, length - 1); });
        return indices;
    }
    /// A module with parameters of the setting's precision.
    template <typename Module>
    Module made() {
        Module drawn{policy_, Seed{seed_}};
        Module::each_parameter(
            [&](const std::string&, auto& parameter) {
                const auto values = to_host(policy_, parameter);
                fill_with(policy_, parameter,
                          [&](std::size_t i) { return rounded(precision_, static_cast<double>(values[i])); });
            },
            "", drawn);
        return drawn;
    }
    /// Gives the gradients of a module random values.
    template <typename Module, typename Gradients>
    void fill_gradients(Gradients& gradients) {
        Module::each_parameter(
            [&](const std::string&, auto& gradient) { fill_normal_of(gradient, 1, accumulated(precision_)); }, "",
            gradients);
    }

private:
    template <typename Scalar, std::size_t... I>
    auto normal(const std::array<Index, sizeof...(I)>& shape, double deviation, Precision precision,
                std::index_sequence<I...>) {
        Tensor<Scalar, P, (static_cast<void>(I), dynamic)...> tensor(policy_, shape);
        fill_normal_of(tensor, deviation, precision);
        return tensor;
    }
    template <typename Result>
    void fill_normal_of(Result& tensor, double deviation, Precision precision) {
        const Random random = seeds_.next();
        fill_with(policy_, tensor, [&](std::size_t i) { return rounded(precision, deviation * random.normal(i)); });
    }

    const P& policy_;
    Precision precision_;
    SeedSequence seeds_;
    Random shapes_;
    std::uint64_t seed_, drawn_ = 0;
};

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

/// Rows that several blocks share: a cluster of them, or, where that has no room, more that meet in global memory.
template <typename T, typename P>
Results long_rows_case(const P& policy, const Setting& setting) {
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    const Index in_cluster = draw.size(5000, sanitized() ? 20'000 : 200'000), longer = draw.size(480'000, 600'000);
    record_routing(record, draw, {draw.size(1, 2), 1, setting.seed % 2 == 0 ? in_cluster : longer}, draw.length(5000));
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
Results local_attention_case(const P& policy, const Setting& setting) {
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    const Index batch = draw.size(1, 9), heads = draw.size(1, 16), dim_head = draw.dim_head();
    const Index length = draw.length(5000, batch * heads * dim_head), reach = draw.length(200);
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

/// Output and all gradients of a module.
template <typename Module, typename T, typename P, typename... Inputs>
void record_module(Recorder<P>& record, Draw<T, P>& draw, const Module& of, const Inputs&... inputs) {
    const auto pass = of.forward(inputs...);
    record("inference", of(inputs...));
    record("out", pass.out);
    auto gradients = of.make_gradients();
    const auto d = of.backward(pass, draw.values(pass.out.shape()), gradients);
    if constexpr (requires { d.d_context; }) {
        record("d_x", d.d_x);
        record("d_context", d.d_context);
    } else {
        record("d_tokens", d);
    }
    Module::each_parameter([&](const std::string& name, auto& gradient) { record("gradient of " + name, gradient); },
                           "", gradients);
}

constexpr TransformerBlockConfig block_config(RouterType router, Index routes = 2) {
    return {.dim = 48,
            .num_heavy_attn_tokens_q = 12,
            .num_heavy_attn_tokens_kv = 20,
            .num_routed_kv = routes,
            .num_heavy_ff_tokens = 17,
            .light_dim_head = 16,
            .light_heads = 3,
            .light_window_size = 30,
            .heavy_dim_head = 32,
            .heavy_heads = 4,
            .router_straight_through = false,
            .router_type = router,
            .router_kwargs = {.coor_descent = {.score_scale = 0.2}, .cum_softmax = {.temperature = 4}}};
}
inline constexpr TransformerBlockConfig by_descent = block_config(RouterType::coor_descent),
                                        by_descent_of_one_route = block_config(RouterType::coor_descent, 1),
                                        by_softmax = block_config(RouterType::cum_softmax),
                                        by_sinkhorn = block_config(RouterType::sinkhorn);

/// Each half of the block on its own: what it routes by is the same number on either side, whatever the precision.
template <TransformerBlockConfig config, typename T, typename P>
Results half_block_case(const P& policy, const Setting& setting) {
    using Block = ConditionalRoutedTransformerBlock<config, T, P>;
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    const Index batch = draw.size(1, 9), length = draw.length(500);
    const auto x = draw.values(std::array{batch, length, config.dim});
    const auto with_mask = draw.mask(batch, length);
    const Mask mask = draw.chance(0.5) ? Mask{} : Mask(with_mask.const_view());
    const Residual residual = draw.chance(0.5) ? Residual::tokens : Residual::none;
    if (setting.seed % 2 == 0)
        record_module(record, draw, draw.template made<typename Block::Attention>(), x, mask, AttentionTokens{},
                      residual);
    else
        record_module(record, draw, draw.template made<typename Block::FeedForward>(), x, mask, FeedForwardTokens{},
                      residual);
    return record.results;
}

template <typename P, typename A, typename B>
bool same_bits(const P& policy, const A& a, const B& b) {
    const auto of_a = to_host(policy, a), of_b = to_host(policy, b);
    const auto same = [](const auto& x, const auto& y) { return static_cast<double>(x) == static_cast<double>(y); };
    return std::equal(of_a.begin(), of_a.end(), of_b.begin(), of_b.end(), same);
}

/// The block is its two halves, bit for bit. Where numbers are rounded less than in float, this is all that can be said
/// of it: its feedforward routes by what its attention computed, and may choose another token.
template <TransformerBlockConfig config, typename T, typename P>
Results block_case(const P& policy, const Setting& setting) {
    using Block = ConditionalRoutedTransformerBlock<config, T, P>;
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    const Index batch = draw.size(1, 9), length = draw.length(500);
    const auto x = draw.values(std::array{batch, length, config.dim});
    const auto d_out = draw.values(x.shape());
    const auto with_mask = draw.mask(batch, length);
    const Mask mask = draw.chance(0.5) ? Mask{} : Mask(with_mask.const_view());

    const Block block = draw.template made<Block>();
    auto gradients = block.make_gradients();
    const auto pass = block.forward(x, mask);
    const auto d_x = block.backward(pass, d_out, gradients);

    const Block parts = draw.template made<Block>();  // another one, since Sinkhorn draws noise at every call
    auto gradients_of_parts = parts.make_gradients();
    const auto attention = parts.conditional_attn.forward(x, mask, {}, Residual::tokens);
    const auto feed_forward = parts.conditional_ff.forward(attention.out, mask, {}, Residual::tokens);
    const auto d_middle = parts.conditional_ff.backward(feed_forward, d_out, gradients_of_parts.conditional_ff);
    const auto d_x_of_parts = parts.conditional_attn.backward(attention, d_middle, gradients_of_parts.conditional_attn);

    record.holds("out is that of the parts", same_bits(policy, pass.out, feed_forward.out));
    record.holds("d_tokens is that of the parts", same_bits(policy, d_x, d_x_of_parts));
    Block::each_parameter(
        [&](const std::string& name, const auto& a, const auto& b) {
            record.holds("gradient of " + name + " is that of the parts", same_bits(policy, a, b));
        },
        "", gradients, gradients_of_parts);
    if (setting.precision == Precision::fp64 || setting.precision == Precision::fp32)
        record_module(record, draw, draw.template made<Block>(), x, mask);
    return record.results;
}

template <typename T, typename P>
Results cross_case(const P& policy, const Setting& setting) {
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    constexpr CrossAttentionConfig config{.dim = 48,
                                          .num_tokens_q = 20,
                                          .num_tokens_kv = 30,
                                          .dim_head = 16,
                                          .heads = 4,
                                          .router_kwargs = {.coor_descent = {.score_scale = 0.2}},
                                          .kv_routing_tokens = 2};
    const Index batch = draw.size(1, 5), length = draw.length(200), memories = draw.length(2000);
    const auto x = draw.values(std::array{batch, length, config.dim});
    const auto context = draw.values(std::array{batch, memories, config.dim});
    const auto with_mask = draw.mask(batch, length);
    const auto with_context_mask = draw.mask(batch, memories);
    const bool masked = draw.chance(0.5);
    record_module(record, draw, draw.template made<ConditionalRoutedCrossAttention<config, T, P>>(), x, context,
                  masked ? Mask(with_mask.const_view()) : Mask{},
                  masked ? Mask(with_context_mask.const_view()) : Mask{});
    return record.results;
}

inline constexpr FeedForwardConfig trained_config{
    .dim = 32, .num_heavy_tokens = 8, .router_kwargs = {.coor_descent = {.score_scale = 0.2}}};

/// Ten steps of AdamW on given gradients. Of 16-bit parameters, the master copy is what is compared.
template <typename T, typename P>
Results optimizer_case(const P& policy, const Setting& setting) {
    using Module = ConditionalRoutedFeedForward<trained_config, T, P>;
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    Module trained = draw.template made<Module>();
    AdamW optimizer(policy, trained,
                    {.lr = 1e-2, .decays = [](std::string_view name) { return name.size() % 2 == 0; }});
    auto gradients = trained.make_gradients();
    for (int step = 0; step < 10; ++step) {
        draw.template fill_gradients<Module>(gradients);
        clip_gradient_norm<Module>(policy, gradients, 10);
        optimizer.step(trained, gradients);
    }
    Module::each_parameter(
        [&](const std::string& name, const auto& parameter, auto& master) {
            if constexpr (HalfPrecision<T>) {
                record.in_float(name, master);
                auto copy = tensor_like(policy, parameter);
                assign(policy, copy, master);
                record.holds(name + " is its master copy, rounded", same_bits(policy, copy, parameter));
            } else {
                record.in_float(name, parameter);
                record.holds(name + " is its master copy, rounded", true);
            }
        },
        "", trained, optimizer.state().master);
    return record.results;
}

/// Ten steps of AdamW with clipping: the losses on the way, of ‖module(x) − target‖².
template <typename T, typename P>
Results training_case(const P& policy, const Setting& setting) {
    using Module = ConditionalRoutedFeedForward<trained_config, T, P>;
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    Module trained = draw.template made<Module>();
    AdamW optimizer(policy, trained, {.lr = 1e-2});
    const std::array shape{Index{2}, draw.size(1, 100), trained_config.dim};
    const auto x = draw.values(shape), target = draw.values(shape);
    auto gradients = trained.make_gradients();
    std::vector<double> losses;
    for (int step = 0; step < 10; ++step) {
        zero_gradients<Module>(policy, gradients);
        const auto pass = trained.forward(x);
        auto difference = tensor_like(policy, x);
        assign(policy, difference, pass.out - target);
        losses.push_back(sum_of_squares(policy, difference));
        trained.backward(pass, difference, gradients);
        clip_gradient_norm<Module>(policy, gradients, 0.5);
        optimizer.step(trained, gradients);
    }
    record.holds("the loss has fallen", losses.back() < 0.95 * losses.front());
    record.results["losses"] = {Kind::amplified, losses};  // a token more or less is routed on the way
    return record.results;
}

/// All cases in T, for policies that `make_policy(setting)` gives.
template <typename T, typename MakePolicy>
std::vector<Case> all_cases(MakePolicy make_policy) {
    using P = decltype(make_policy(Setting()));
    std::vector<Case> all;
    const auto add = [&](const char* name, Results (*body)(const P&, const Setting&), std::uint64_t seeds = 6,
                         bool is_of_modules = false) {
        all.push_back(
            {name, seeds, is_of_modules, [=](const Setting& setting) { return body(make_policy(setting), setting); }});
    };
    const auto add_of_modules = [&](const char* name, Results (*body)(const P&, const Setting&)) {
        add(name, body, 6, true);
    };
    add("linear", linear_case<T, P>);
    add("norms", norms_case<T, P>);
    add("expressions", expressions_case<T, P>);
    add("gather", gather_case<T, P>);
    add("routing", routing_case<T, P>);
    add("long rows", long_rows_case<T, P>, 2);
    add("sinkhorn", sinkhorn_case<T, P>);
    add("local attention", local_attention_case<T, P>);
    add("dense attention", dense_attention_case<T, P>);
    add("optimizer", optimizer_case<T, P>);
    add_of_modules("half a block, coordinate descent", half_block_case<by_descent_of_one_route, T, P>);
    add_of_modules("half a block, cumulative softmax", half_block_case<by_softmax, T, P>);
    add_of_modules("half a block, Sinkhorn", half_block_case<by_sinkhorn, T, P>);
    add_of_modules("block, coordinate descent", block_case<by_descent, T, P>);
    add_of_modules("block, cumulative softmax", block_case<by_softmax, T, P>);
    add_of_modules("block, Sinkhorn", block_case<by_sinkhorn, T, P>);
    add_of_modules("cross attention", cross_case<T, P>);
    add_of_modules("training", training_case<T, P>);
    return all;
}

}  // namespace cases
