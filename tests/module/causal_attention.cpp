// SPDX-License-Identifier: MIT
#include <colt5/module/conditional_routed_transformer_block.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include <colt5/module/ragged.hpp>

#include "module/checks.hpp"

/// Attention and the block with RouterType::causal.
using namespace colt5;
using namespace support;

namespace {

constexpr Index dim = 6;

constexpr AttentionConfig config_of(Index num_routed_q, Index num_routed_kv, bool all_options) {
    AttentionConfig config{.dim = dim,
                           .num_heavy_tokens_q = 1000,
                           .num_heavy_tokens_kv = 1000,
                           .num_routed_kv = num_routed_kv,
                           .num_routed_q = num_routed_q,
                           .light_dim_head = 2,
                           .light_heads = 2,
                           .light_window_size = 6,
                           .heavy_dim_head = 4,
                           .heavy_heads = 2,
                           .router_straight_through = false,
                           .router_type = RouterType::causal,
                           .router_kwargs = {.causal = {.rate = 0.25, .block_size = 8, .score_scale = 0.4}}};
    if (all_options) {
        config.use_null_kv = config.use_null_q_tokens = true;
        config.multiply_keys_by_score = config.multiply_queries_by_score = true;
        config.rotary_emb = config.light_rotary_emb = config.use_relative_position_bias = true;
        config.relative_position_num_buckets = 8;
        config.relative_position_max_distance = 6;
    }
    return config;
}
constexpr AttentionConfig plain = config_of(1, 1, false), two_routes = config_of(2, 1, false),
                          full = config_of(1, 1, true), full_of_routes = config_of(2, 2, true);
constexpr AttentionConfig heavy_alone = [] {
    AttentionConfig config = config_of(1, 2, false);
    config.has_light_attn = false;
    return config;
}();
constexpr TransformerBlockConfig block{.dim = dim,
                                       .num_heavy_attn_tokens_q = 1000,
                                       .num_heavy_attn_tokens_kv = 1000,
                                       .num_heavy_ff_tokens = 1000,
                                       .light_dim_head = 2,
                                       .light_heads = 2,
                                       .light_window_size = 6,
                                       .heavy_dim_head = 4,
                                       .heavy_heads = 2,
                                       .router_type = RouterType::causal,
                                       .router_kwargs = {.causal = {.rate = 0.25, .block_size = 8, .score_scale = 0.4}},
                                       .use_null_kv = true,
                                       .use_null_q_tokens = true,
                                       .rotary_emb = true};

using CausalFeedForward =
    ConditionalRoutedFeedForward<FeedForwardConfig{
                                     .dim = dim,
                                     .num_heavy_tokens = 1000,
                                     .router_type = RouterType::causal,
                                     .router_kwargs = {.causal = {.rate = 0.25, .block_size = 8, .score_scale = 0.4}}},
                                 float, Cpu>;

/// Chooses the same tokens whatever the logits are, and scores them e^(0.3 s): a causal router that finite differences
/// can follow. (CausalRouter's gradients take the price as a constant, and its scores may be straight-through.)
template <RouterConfig config, typename Scalar, typename P>
class FixedRouter : public LinearRouter<FixedRouter<config, Scalar, P>, config, Scalar, P> {
    using Base = LinearRouter<FixedRouter, config, Scalar, P>;

public:
    using typename Base::Logit;
    static constexpr bool picks_repeat = false, has_unused_picks = true, is_causal = true;
    using Base::Base;

    struct Activations {
        Routing<Logit, P> routing;
        TokensTensor<bool, P> live;
        Index length;
    };
    Routing<Logit, P> route(const P& policy, TokensView<const Scalar> x, Mask mask, Index num_tokens) const {
        return forward(policy, x, mask, num_tokens).routing;
    }
    Activations forward(const P& policy, TokensView<const Scalar> x, Mask mask, Index num_tokens) const {
        const auto logits = this->logits(policy, x, mask, {});
        const Index length = x.extent(1), routes = config.num_routing_tokens;
        const std::array<Index, 3> shape{x.extent(0), routes, std::min(num_tokens, length)};
        Activations saved{{{policy, shape}, {policy, shape}}, {policy, shape}, length};
        for (Index b = 0; b < shape[0]; ++b)
            for (Index r = 0; r < routes; ++r) {
                std::vector<Index> chosen, others;
                for (Index i = 0; i < length; ++i)
                    (i % 4 > r && (!mask || mask(b, i)) && static_cast<Index>(chosen.size()) < shape[2] ? chosen
                                                                                                        : others)
                        .push_back(i);
                const auto count = static_cast<Index>(chosen.size());
                chosen.insert(chosen.end(), others.rbegin(), others.rend());
                for (Index i = 0; i < shape[2]; ++i) {
                    const Index token = chosen[static_cast<std::size_t>(i)];
                    saved.live.view()(b, r, i) = i < count;
                    saved.routing.indices.view()(b, r, i) = static_cast<TokenIndex>(token);
                    saved.routing.scores.view()(b, r, i) =
                        i < count ? std::exp(Logit(0.3) * logits.const_view()(b, r, token)) : Logit(0);
                }
            }
        return saved;
    }
    auto d_logits(const P& policy, const Activations& saved, TokensView<const Logit> d_scores, Mask mask) const {
        auto d_picked = tensor_like(policy, d_scores);
        assign(policy, d_picked, d_scores * saved.routing.scores * Logit(0.3));
        return place_scores(policy, d_picked, saved.routing.indices, mask, saved.length);
    }
};

template <AttentionConfig config>
using FixedAttention = ConditionalRoutedAttention<config, double, Cpu, FixedRouter>;
template <typename T, AttentionConfig config>
using Attention = ConditionalRoutedAttention<config, T, Cpu>;
template <typename T>
using Block = ConditionalRoutedTransformerBlock<block, T, Cpu>;

/// Tokens from `from` on replaced by others, or by `value`.
template <typename T>
TokensTensor<T, Cpu> with_another_future(const Cpu& policy, const TokensTensor<T, Cpu>& x, Index from,
                                         std::optional<double> value = {}) {
    auto changed = copy_of(policy, x);
    const auto other = normal<T>(policy, x.shape(), 77, 3);
    for (Index b = 0; b < x.extent(0); ++b)
        for (Index i = from; i < x.extent(1); ++i)
            for (Index d = 0; d < x.extent(2); ++d)
                changed.view()(b, i, d) = value ? static_cast<T>(*value) : other.const_view()(b, i, d);
    return changed;
}
template <typename A, typename B>
bool same_first_tokens(const A& a, const B& b, Index count) {
    bool same = true;
    for (Index s = 0; s < a.extent(0); ++s)
        for (Index i = 0; i < count; ++i) same = same && same_bits(a.const_view()[s][i], b.const_view()[s][i]);
    return same;
}

}  // namespace

TEST_CASE_TEMPLATE("causal attention: later tokens change no bit of an output; a prefix gives the same outputs", Module,
                   Attention<float, plain>, Attention<double, plain>, Attention<float, two_routes>,
                   Attention<float, full>, Attention<double, full_of_routes>, Attention<double, heavy_alone>,
                   Block<float>, Block<double>) {
    using T = typename Module::Out::value_type;
    const Cpu policy(2);
    const Module module(policy, Seed{1});
    for (const Index length : {1, 2, 40, 700}) {
        CAPTURE(length);
        const auto x = normal<T>(policy, std::array<Index, 3>{2, length, dim}, 0);
        const auto some = random_mask(policy, std::array<Index, 2>{2, length}, 1);
        for (const Mask mask : {Mask(), some.const_view()}) {
            const auto out = module(x, mask);
            CHECK(same_bits(module.forward(x, mask).out, out));
            for (const Index from : {Index{1}, Index{17}, Index{32}, length / 2, length - 1}) {
                if (from >= length) continue;
                CAPTURE(from);
                CHECK(same_first_tokens(module(with_another_future(policy, x, from), mask), out, from));
                // Another mask from there on.
                auto masked = filled<bool>(policy, std::array<Index, 2>{2, length}, false);
                for (Index b = 0; b < 2; ++b)
                    for (Index i = 0; i < from; ++i) masked.view()(b, i) = !mask || mask(b, i);
                CHECK(same_first_tokens(module(x, masked.const_view()), out, from));

                const auto prefix = resized(policy, x, from);
                auto of_prefix = filled<bool>(policy, std::array<Index, 2>{2, from}, true);
                for (Index b = 0; b < 2; ++b)
                    for (Index i = 0; i < from; ++i) of_prefix.view()(b, i) = !mask || mask(b, i);
                CHECK(same_first_tokens(module(prefix, mask ? of_prefix.const_view() : Mask()), out, from));
            }
        }
    }
}

TEST_CASE("causal attention: gradients of outputs reach no later token") {
    const Cpu policy(2);
    const Attention<double, full_of_routes> module(policy, Seed{1});
    const auto x = normal<double>(policy, std::array<Index, 3>{2, 61, dim}, 0);
    const auto saved = module.forward(x);
    for (const Index last : {0, 20, 59}) {
        auto d_out = filled<double>(policy, x.shape(), 0);
        for (Index b = 0; b < 2; ++b)
            for (Index d = 0; d < dim; ++d) d_out.view()(b, last, d) = 1;
        auto gradients = module.make_gradients();
        const auto d_x = module.backward(saved, d_out, gradients);
        for (Index b = 0; b < 2; ++b)
            for (Index i = last + 1; i < 61; ++i)
                for (Index d = 0; d < dim; ++d) CHECK(d_x.const_view()(b, i, d) == 0);
        CHECK(inner(d_x, d_x) > 0);
    }
}

TEST_CASE("causal attention: heavy attention of each chosen query over the chosen keys up to it") {
    const Cpu policy(2);
    const Attention<double, plain> module(policy, Seed{1});
    const auto x = normal<double>(policy, std::array<Index, 3>{2, 61, dim}, 0);
    const auto some = mask_of_lengths(policy, {61, 40}, 61);
    for (const Mask mask : {Mask(), some.const_view()}) {
        const auto saved = module.forward(x, mask);
        const auto &q = saved.routed_q, &kv = saved.routed_kv;
        auto expected = module.light_attn(policy, x, mask);
        Index chosen = 0, unseen = 0;
        for (Index b = 0; b < 2; ++b)
            for (Index i = 0; i < q.live.extent(2); ++i) {
                if (!q.live.const_view()(b, 0, i)) continue;
                ++chosen;
                const Index token = q.routing.indices.const_view()(b, 0, i);
                std::vector<Row> keys;
                Row scores;
                for (Index j = 0; j < kv.live.extent(2); ++j)
                    if (const Index key = kv.routing.indices.const_view()(b, 0, j);
                        kv.live.const_view()(b, 0, j) && key <= token) {
                        keys.push_back(row_of(x, b, key));
                        scores.push_back(kv.routing.scores.const_view()(b, 0, j));
                    }
                if (keys.empty()) {
                    ++unseen;
                    continue;
                }
                const auto& heavy = module.heavy_attn;
                const Row query = evaluate(heavy.to_q, evaluate(heavy.norm, row_of(x, b, token)));
                Row attended;
                for (Index h = 0; h < 2; ++h) {
                    std::vector<Row> k, v;
                    for (const Row& key : keys) {
                        const Row projected = evaluate(heavy.to_kv, evaluate(heavy.norm, key));
                        k.push_back(part(projected, 8 * h, 4));
                        v.push_back(part(projected, 8 * h + 4, 4));
                    }
                    const Row of_head = attend(part(query, 4 * h, 4), k, v, scores);
                    attended.insert(attended.end(), of_head.begin(), of_head.end());
                }
                const Row out = evaluate(heavy.to_out, attended);
                for (Index d = 0; d < dim; ++d)
                    expected.view()(b, token, d) +=
                        q.routing.scores.const_view()(b, 0, i) * out[static_cast<std::size_t>(d)];
            }
        CHECK(chosen > 15);
        CHECK(unseen < chosen / 2);
        CHECK(relative_error(saved.out, expected) <= 1e-12);
    }
}

TEST_CASE_TEMPLATE("causal attention: gradients by finite differences" * not_sanitized, Module, FixedAttention<plain>,
                   FixedAttention<full>, FixedAttention<full_of_routes>, FixedAttention<heavy_alone>) {
    const Cpu policy(1);
    Module module(policy, Seed{1});
    auto x = normal<double>(policy, std::array<Index, 3>{2, 13, dim}, 0, 0.7);
    const auto mask = mask_of_lengths(policy, {13, 6}, 13);
    check_gradients(module, x, {});
    check_gradients(module, x, mask.const_view());
    check_gradients(module, x, mask.const_view(), AttentionCounts{.num_heavy_tokens_q = 3, .num_heavy_tokens_kv = 2});
    auto one = resized(policy, x, 1);
    check_gradients(module, one, {});
    const auto saved = module.forward(x);
    auto gradients = module.make_gradients();
    module.backward(saved, x, gradients);
    CHECK(gradient_norm<Module>(gradients, "q_router.routing_token") > 1e-4);
    CHECK(gradient_norm<Module>(gradients, "kv_router.routing_token") > 1e-4);
}

TEST_CASE("causal attention: the null query token is what tokens that are not chosen get") {
    const Cpu policy(1);
    Attention<double, full> module(policy, Seed{1});
    const auto x = normal<double>(policy, std::array<Index, 3>{1, 61, dim}, 0);
    const auto saved = module.forward(x);
    std::vector<bool> chosen(61, false);
    for (Index i = 0; i < saved.routed_q.live.extent(2); ++i)
        if (saved.routed_q.live.const_view()(0, 0, i))
            chosen[static_cast<std::size_t>(saved.routed_q.routing.indices.const_view()(0, 0, i))] = true;
    CHECK(std::count(chosen.begin(), chosen.end(), true) < saved.routed_q.live.extent(2));  // some picks are unused
    for (Index d = 0; d < dim; ++d) module.null_q_token.data()[d] += 100;
    const auto moved = module(x);
    for (Index i = 0; i < 61; ++i)
        CHECK(moved.const_view()(0, i, 0) - saved.out.const_view()(0, i, 0) ==
              doctest::Approx(chosen[static_cast<std::size_t>(i)] ? 0 : 100));
}

TEST_CASE("causal attention: tokens that are not finite reach no earlier output") {
    const Cpu policy(2);
    const Block<float> module(policy, Seed{1});
    const auto x = normal<float>(policy, std::array<Index, 3>{2, 100, dim}, 0);
    const auto out = module(x);
    for (const double value : {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()})
        for (const Index from : {1, 50, 99}) {
            const auto actual = module(with_another_future(policy, x, from, value));
            CHECK(same_first_tokens(actual, out, from));
            CHECK(!all_finite(actual));
        }
}

TEST_CASE_TEMPLATE("causal routing: heavy branches that overflow reach no token that is not chosen", Module,
                   Attention<float, plain>, Attention<float, full>, Attention<float, heavy_alone>, CausalFeedForward,
                   Block<float>) {
    const Cpu policy(2);
    Module module(policy, Seed{1});
    Module::each_parameter(
        [&](const std::string& name, auto& value) {
            if (name.find("heavy") != std::string::npos && name.find("weight") != std::string::npos)
                assign(policy, value, value * 1e38f);
        },
        "", module);
    const auto x = normal<float>(policy, std::array<Index, 3>{2, 300, dim}, 0);
    const auto out = module(x);
    CHECK(!all_finite(out));
    Index finite = 0;
    for (Index i = 0; i < 300; ++i) finite += all_finite(out.const_view()[0].range(i, 1)) ? 1 : 0;
    CHECK(finite >= 100);
    for (const Index from : {1, 17, 150, 299}) {
        CAPTURE(from);
        CHECK(same_first_tokens(module(resized(policy, x, from)), out, from));
        for (const int seed : {1, 2, 3}) {
            auto changed = with_another_future(policy, x, from);
            assign(policy, changed, changed + changed * static_cast<float>(seed));
            for (Index b = 0; b < 2; ++b)
                for (Index i = 0; i < from; ++i)
                    std::copy_n(x.const_view()[b][i].data(), dim, changed.view()[b][i].data());
            CHECK(same_first_tokens(module(changed), out, from));
        }
        for (const double value : {0.0, 1e6}) {
            CAPTURE(value);
            CHECK(same_first_tokens(module(with_another_future(policy, x, from, value)), out, from));
        }
    }
}

TEST_CASE("causal attention: ragged sequences, batches and threads give the bits of each sequence alone") {
    const Cpu one(1), policy(2);
    const Block<double> module(policy, Seed{1});
    const std::vector<Index> lengths{33, 0, 70, 1};
    const auto packed = normal<double>(policy, std::array<Index, 2>{104, dim}, 0);
    const auto d_packed = normal<double>(policy, packed.shape(), 1);
    const Ragged ragged(module);
    const auto cumulative = cumulative_lengths(lengths);
    auto saved = ragged.forward(packed, cumulative);
    auto gradients = module.make_gradients();
    const auto d_tokens = ragged.backward(saved, d_packed, gradients);
    Index first = 0;
    for (const Index length : lengths) {
        if (length == 0) continue;
        const TokensView<const double> x(packed.data() + first * dim, {1, length, dim}),
            d_out(d_packed.data() + first * dim, {1, length, dim});
        const Block<double> alone(one, Seed{1});
        const auto saved_alone = alone.forward(x);
        auto gradients_alone = alone.make_gradients();
        const auto d_alone = alone.backward(saved_alone, d_out, gradients_alone);
        CHECK(
            std::equal(saved_alone.out.data(), saved_alone.out.data() + length * dim, saved.out.data() + first * dim));
        CHECK(std::equal(d_alone.data(), d_alone.data() + length * dim, d_tokens.data() + first * dim));
        first += length;
    }
}
