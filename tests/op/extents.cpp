// SPDX-License-Identifier: MIT
// Every operation compares every extent of every argument before it reads or writes any of them.
#include <doctest/doctest.h>

#include <array>
#include <limits>

#include <colt5/colt5.hpp>

#include "support/arguments.hpp"

using namespace colt5;
using namespace support;

namespace {

const Cpu policy(1);
constexpr Index b = 2, n = 5, d = 4, k = 3, r = 2, width = 6, heads = 2, dim_head = 3;

using T = float;
using V = const float;

GradientEpilogue<T, Cpu, 1> epilogue_of(Arguments& a) {
    return {.d_residual = a.view<V>("d_residual", {b, n, d}),
            .rank_one = {RankOneUpdate<T>{.s = a.view<V>("s", {b, r, n + 2}, {"s"}),
                                          .route = 0,
                                          .t = a.view<V>("t", {d}),
                                          .d_t = a.view<T>("d_t", {d}),
                                          .first = 1}}};
}

FeedForwardParameters<V> feed_forward_parameters(Arguments& a) {
    return {{a.view<V>("norm", {d})},
            a.view<V>("hidden_weight", {width, d}, {"hidden_bias", "hidden_weight"}),
            a.view<V>("hidden_bias", {width}),
            a.view<V>("project_weight", {d, width}),
            a.view<V>("project_bias", {d})};
}

}  // namespace

TEST_CASE("extents: norms") {
    check_extents("rms_norm", [](Arguments& a) {
        rms_norm(policy, a.view<V>("x", {b, n, d}, {"", "", "gamma"}), a.view<V>("gamma", {d}));
    });
    check_extents("rms_norm_vjp", [](Arguments& a) {
        rms_norm_vjp(policy, a.view<T>("d_x", {b, n, d}), a.view<V>("d_y", {b, n, d}),
                     a.view<V>("x", {b, n, d}, {"d_x", "d_x", "d_x"}), a.view<V>("gamma", {d}),
                     a.view<T>("d_gamma", {d}));
    });
    check_extents("layer_norm", [](Arguments& a) {
        layer_norm(policy, a.view<V>("x", {b, n, d}, {"", "", "weight"}), a.view<V>("weight", {d}),
                   a.view<V>("bias", {d}));
    });
    check_extents("layer_norm_vjp", [](Arguments& a) {
        layer_norm_vjp(policy, a.view<T>("d_x", {b, n, d}), a.view<V>("d_y", {b, n, d}),
                       a.view<V>("x", {b, n, d}, {"d_x", "d_x", "d_x"}), a.view<V>("weight", {d}),
                       a.view<T>("d_weight", {d}), a.view<T>("d_bias", {d}));
    });
}

TEST_CASE("extents: linear maps") {
    check_extents("linear", [](Arguments& a) {
        linear(policy, a.view<T>("y", {b, n, width}), a.view<V>("x", {b, n, d}, {"y", "y", "weight"}),
               a.view<V>("weight", {width, d}, {"y", "weight"}), a.view<V>("bias", {width}),
               a.view<V>("add", {b, n, width}));
    });
    check_extents("linear to a new tensor", [](Arguments& a) {
        linear(policy, a.view<V>("x", {b, n, d}, {"add", "add", "weight"}),
               a.view<V>("weight", {width, d}, {"bias", "weight"}), a.view<V>("bias", {width}),
               a.view<V>("add", {b, n, width}));
    });
    check_extents("linear_vjp", [](Arguments& a) {
        linear_vjp(policy, a.view<V>("d_y", {b, n, width}), a.view<V>("x", {b, n, d}, {"d_y", "d_y", "weight"}),
                   a.view<V>("weight", {width, d}, {"d_y", "weight"}), a.view<T>("d_weight", {width, d}),
                   a.view<T>("d_bias", {width}));
    });
    check_extents("linear_vjp into x", [](Arguments& a) {
        auto x = a.tensor<T>("x", {b, n, d}, {"d_y", "d_y", "weight"});
        linear_vjp(policy, a.view<V>("d_y", {b, n, width}), std::move(x),
                   a.view<V>("weight", {width, d}, {"d_y", "weight"}), a.view<T>("d_weight", {width, d}),
                   a.view<T>("d_bias", {width}));
    });
    constexpr Index prime = 7;  // rows that only one route divides
    check_extents("routed_linear", [](Arguments& a) {
        routed_linear(policy, a.view<V>("x", {b, 1, n, d}, {"", "weight", "", "weight"}),
                      a.view<V>("weight", {prime, d}, {"bias", "weight"}), a.view<V>("bias", {prime}));
    });
    check_extents("routed_linear_vjp", [](Arguments& a) {
        routed_linear_vjp(policy, a.view<V>("d_y", {b, 1, n, prime}),
                          a.view<V>("x", {b, 1, n, d}, {"d_y", "weight", "d_y", "weight"}),
                          a.view<V>("weight", {prime, d}, {"d_y", "weight"}), a.view<T>("d_weight", {prime, d}),
                          a.view<T>("d_bias", {prime}));
    });
}

TEST_CASE("extents: linear maps of normalized tokens, and what is added to their gradient") {
    check_extents("norm_linear", [](Arguments& a) {
        const LayerNormParameters<V> norm{a.view<V>("norm", {d}), a.view<V>("norm", {d})};
        const Projection<T> to{a.view<T>("y", {b, n, width}), a.view<V>("weight", {width, d}, {"y", "weight"}),
                               a.view<V>("bias", {width})};
        norm_linear(policy, a.view<V>("x", {b, n, d}, {"y", "y", "norm"}), norm, std::array{to});
    });
    check_extents("norm_linear_vjp", [](Arguments& a) {
        const RMSNormParameters<V> norm{a.view<V>("norm", {d})};
        const RMSNormParameters<T> d_norm{a.view<T>("d_norm", {d})};
        norm_linear_vjp(policy, a.view<T>("d_x", {b, n, d}), a.view<V>("d_y", {b, n, width}),
                        a.view<V>("x", {b, n, d}, {"d_x", "d_x", "norm"}), norm,
                        a.view<V>("weight", {width, d}, {"d_y", "weight"}), d_norm, a.view<T>("d_weight", {width, d}),
                        a.view<T>("d_bias", {width}),
                        GradientEpilogue<T, Cpu>{.d_residual = a.view<V>("d_residual", {b, n, d})});
    });
    check_extents("a gradient's epilogue", [](Arguments& a) {
        const auto x = a.view<V>("x", {b, n, d}, {"d_residual", "d_residual", "d_residual"});
        colt5::detail::check_epilogue(epilogue_of(a), x);
    });
    const auto wrong_route = [](Index route, Index first) {
        const Cpu one(1);
        Arguments a(one);
        auto epilogue = epilogue_of(a);
        epilogue.rank_one[0].route = route;
        epilogue.rank_one[0].first = first;
        colt5::detail::check_epilogue(epilogue, a.view<V>("x", {b, n, d}));
    };
    CHECK_NOTHROW(wrong_route(1, 2));
    CHECK_THROWS_WITH_AS(wrong_route(2, 0), "colt5: `route` must be one of s, but is 2", ValueError);
    CHECK_THROWS_WITH_AS(wrong_route(-1, 0), "colt5: `route` must be one of s, but is -1", ValueError);
    CHECK_THROWS_WITH_AS(wrong_route(0, 3), "colt5: `first` must be a token of s, but is 3", ValueError);
}

TEST_CASE("extents: feedforward") {
    check_extents("feed_forward", [](Arguments& a) {
        const auto parameters = feed_forward_parameters(a);
        feed_forward(policy, a.view<T>("y", {b, n, d}), a.view<V>("x", {b, n, d}, {"y", "y", "norm"}), parameters,
                     a.view<T>("pre_activation", {b, n, width}), a.view<V>("add", {b, n, d}));
    });
    check_extents("feed_forward_vjp", [](Arguments& a) {
        const auto parameters = feed_forward_parameters(a);
        const FeedForwardParameters<T> gradients{{a.view<T>("gradients.norm", {d})},
                                                 a.view<T>("gradients.hidden_weight", {width, d}),
                                                 a.view<T>("gradients.hidden_bias", {width}),
                                                 a.view<T>("gradients.project_weight", {d, width}),
                                                 a.view<T>("gradients.project_bias", {d})};
        feed_forward_vjp(policy, a.view<T>("d_x", {b, n, d}), a.view<V>("d_y", {b, n, d}),
                         a.view<V>("x", {b, n, d}, {"d_x", "d_x", "norm"}), a.view<V>("pre_activation", {b, n, width}),
                         parameters, gradients,
                         GradientEpilogue<T, Cpu>{.d_residual = a.view<V>("d_residual", {b, n, d})});
    });
}

TEST_CASE("extents: GELU and softmax") {
    check_extents("gelu_vjp", [](Arguments& a) {
        auto d_y = a.view<T>("d_y", {b, n, d});
        gelu_vjp(policy, d_y, a.view<V>("x", {b, n, d}, {"d_y", "d_y", "d_y"}));
    });
    check_extents("softmax_vjp", [](Arguments& a) {
        softmax_vjp(policy, a.view<V>("d_y", {b, n, d}), a.view<V>("y", {b, n, d}, {"d_y", "d_y", "d_y"}));
    });
}

TEST_CASE("extents: local attention") {
    const LocalAttention attention{2, MaskedRows::zero};
    check_extents("local_attention", [&](Arguments& a) {
        local_attention(policy, attention, a.view<V>("q", {b, n, heads, dim_head}),
                        a.view<V>("kv", {b, n, 2, heads, dim_head}, {"q", "q", "kv", "q", "q"}),
                        a.view<const bool>("mask", {b, n}));
    });
    const auto vjp = [&](Index batch, Index first) {
        return [&, batch, first](Arguments& a) {
            const Index queries = n - first, window = attention.window(first, queries, n);
            const std::string m = batch == 1 ? "d_qkv" : "q";  // the queries of one sequence may be any number
            LocalAttentionActivations<T, Cpu> saved{a.tensor<T>("saved", {batch, queries, heads, dim_head}),
                                                    a.tensor<T>("saved.log_sum_exp", {batch, heads, queries})};
            local_attention_vjp(policy, a.view<T>("d_qkv", {batch, window, 3, heads, dim_head}), attention, saved,
                                a.view<V>("d_out", {batch, queries, heads, dim_head}),
                                a.view<V>("q", {batch, queries, heads, dim_head}),
                                a.view<V>("kv", {batch, n, 2, heads, dim_head}, {"q", "q", "kv", "q", "q"}),
                                a.view<const bool>("mask", {batch, n}), first, 0);
        };
    };
    check_extents("local_attention_vjp", vjp(b, 0));
    check_extents("projected_local_attention_vjp", [&](Arguments& a) {
        projected_local_attention_vjp(policy, a.view<T>("d_qkv", {b, n, 3, heads, dim_head}), attention,
                                      a.view<V>("d_y", {b, n, d}), a.view<V>("q", {b, n, heads, dim_head}),
                                      a.view<V>("kv", {b, n, 2, heads, dim_head}, {"q", "q", "kv", "q", "q"}),
                                      a.view<const bool>("mask", {b, n}), 0, 0,
                                      a.view<V>("weight", {d, heads * dim_head}, {"d_weight", "weight"}),
                                      a.view<T>("d_weight", {d, heads * dim_head}));
    });
    CHECK_THROWS_WITH_AS(
        [&] {
            Arguments a(policy);
            vjp(b, 2)(a);
        }(),
        "colt5: `first` must be 0 unless there is one sequence, but is 2", ValueError);
    Arguments one(policy);
    CHECK_NOTHROW(vjp(1, 2)(one));
}

TEST_CASE("extents: dense attention") {
    const auto kv = [](Arguments& a) {
        return a.view<V>("kv", {b, r, k, heads / r, 2, dim_head}, {"q", "q", "mask", "q", "kv", "q"});
    };
    check_extents("dense_attention_forward", [&](Arguments& a) {
        dense_attention_forward(policy, a.view<V>("q", {b, n, heads, dim_head}, {"q", "", "q", "q"}), kv(a),
                                a.view<const bool>("mask", {b, r, k}), a.view<V>("value_scale", {b, r, k}));
    });
    check_extents("dense_attention_vjp", [&](Arguments& a) {
        DenseAttentionActivations<T, Cpu> saved{a.tensor<T>("saved.out", {b, n, heads, dim_head}, {"q", "q", "q", "q"}),
                                                a.tensor<T>("saved.log_sum_exp", {b, heads, n})};
        dense_attention_vjp(policy, saved, a.view<V>("d_out", {b, n, heads, dim_head}),
                            a.view<V>("q", {b, n, heads, dim_head}), kv(a), a.view<const bool>("mask", {b, r, k}),
                            a.view<V>("value_scale", {b, r, k}));
    });
}

TEST_CASE("extents: what gathers and scatters") {
    check_extents("gather", [](Arguments& a) {
        gather(policy, a.view<V>("x", {b, n, d}, {"indices", "", ""}),
               a.view<const TokenIndex>("indices", {b, k}, {"indices", ""}));
    });
    check_extents("gather of several routes", [](Arguments& a) {
        gather(policy, a.view<V>("x", {b, n, d}, {"indices", "", ""}),
               a.view<const TokenIndex>("indices", {b, r, k}, {"indices", "", ""}));
    });
    check_extents("gather_mask", [](Arguments& a) {
        gather_mask(policy, a.view<const bool>("mask", {b, n}, {"mask", ""}),
                    a.view<const TokenIndex>("indices", {b, r, k}, {"mask", "", ""}));
    });
    for (const Scatter how : {Scatter::add, Scatter::mean, Scatter::overwrite}) {
        check_extents("scatter", [=](Arguments& a) {
            scatter(policy, how, a.view<T>("out", {b, n, d}, {"rows", "", "rows"}), a.view<V>("rows", {b, k, d}),
                    a.view<const TokenIndex>("indices", {b, k}, {"indices", "rows"}), a.view<V>("scale", {b, k}));
        });
        check_extents("scatter_vjp", [=](Arguments& a) {
            scatter_vjp(policy, how, a.view<V>("d_out", {b, n, d}, {"indices", "", ""}),
                        a.view<const TokenIndex>("indices", {b, k}, {"indices", ""}));
        });
    }
    check_extents("gather_vjp", [](Arguments& a) {
        gather_vjp(policy, a.view<T>("d_x", {b, n, d}, {"indices", "", "d_out"}), a.view<V>("d_out", {b, r, k, d}),
                   a.view<const TokenIndex>("indices", {b, r, k}, {"indices", "d_out", "d_out"}));
    });
    check_extents("pick_scores", [](Arguments& a) {
        pick_scores<T>(policy, a.view<V>("scores", {b, r, n}, {"scores", "scores", "mask"}),
                       a.view<const TokenIndex>("indices", {b, r, k}, {"scores", "scores", ""}),
                       a.view<const bool>("mask", {b, n}));
    });
    check_extents("place_scores", [](Arguments& a) {
        place_scores(policy, a.view<V>("d_picked", {b, r, k}),
                     a.view<const TokenIndex>("indices", {b, r, k}, {"d_picked", "d_picked", "d_picked"}),
                     a.view<const bool>("mask", {b, n}), n);
    });
}

TEST_CASE("extents: routing") {
    check_extents("top_k", [](Arguments& a) {
        top_k(policy, a.view<V>("logits", {b, r, n}, {"mask", "", "mask"}), a.view<const bool>("mask", {b, n}), k);
    });
    check_extents("route_logits", [](Arguments& a) {
        route_logits(policy, a.view<V>("x", {b, n, d}, {"", "", "routing_token"}),
                     a.view<V>("routing_token", {r, d}, {"", "routing_token"}));
    });
    check_extents("route_logits_vjp", [](Arguments& a) {
        route_logits_vjp(policy, a.view<T>("d_x", {b, n, d}), a.view<T>("d_routing_token", {r, d}),
                         a.view<V>("d_logits", {b, r, n}),
                         a.view<V>("x", {b, n, d}, {"d_logits", "d_logits", "routing_token"}),
                         a.view<V>("routing_token", {r, d}, {"d_logits", "routing_token"}));
    });
    check_extents("cumulative_softmax", [](Arguments& a) {
        cumulative_softmax(policy, 1, a.view<V>("logits", {b, r, n}, {"mask", "indices", "mask"}),
                           a.view<const TokenIndex>("indices", {b, r, k}, {"indices", "indices", ""}),
                           a.view<const bool>("mask", {b, n}));
    });
    check_extents("cumulative_softmax_vjp", [](Arguments& a) {
        cumulative_softmax_vjp(policy, 1, a.view<V>("d_scores", {b, r, k}),
                               a.view<V>("logits", {b, r, n}, {"mask", "indices", "mask"}),
                               a.view<const TokenIndex>("indices", {b, r, k}, {"indices", "indices", "d_scores"}),
                               a.view<const bool>("mask", {b, n}));
    });
    check_extents("coordinate_descent_forward", [](Arguments& a) {
        coordinate_descent_forward(policy, {}, 2, a.view<V>("logits", {b, r, n}, {"mask", "", "mask"}),
                                   a.view<const bool>("mask", {b, n}));
    });
    for (const bool converged : {false, true})
        check_extents("coordinate_descent_vjp", [=](Arguments& a) {
            const CoordinateDescent descent{.n_iters = 4, .iterate_to_convergence = converged};
            const Index steps = descent.steps();
            CoordinateDescentActivations<T, Cpu> saved{
                a.tensor<T>("saved.scores", {b, r, n}, {"logits", "logits", "logits"}),
                a.tensor<T>("saved.threshold", {b, r, steps + 1}), a.tensor<T>("saved.saturated", {b, r, steps})};
            coordinate_descent_vjp(policy, descent, 2, saved, a.view<V>("d_scores", {b, r, n}),
                                   a.view<V>("logits", {b, r, n}), a.view<const bool>("mask", {b, n}));
        });
    check_extents("sinkhorn_forward", [](Arguments& a) {
        sinkhorn_forward(policy, {}, a.view<V>("logits", {b, r, n}, {"noise", "noise", "noise"}),
                         a.view<V>("noise", {b * r, k, n}), a.view<const bool>("mask", {b, n}), k);
    });
    check_extents("sinkhorn_vjp", [](Arguments& a) {
        const Sinkhorn sinkhorn{.n_iters = 4};
        SinkhornActivations<T, Cpu> saved{
            a.tensor<TokenIndex>("saved.indices", {b, r, k}, {"", "", ""}),  // `indices` are read instead
            a.tensor<T>("saved.scores", {b, r, k}, {"saved.scores", "saved.scores", "saved.slot_potential"}),
            a.tensor<double>("saved.slot_potential", {b, r, 4, k}),
            a.tensor<double>("saved.token_potential", {b, r, 4, n})};
        sinkhorn_vjp(policy, sinkhorn, saved, a.view<V>("d_scores", {b, r, k}),
                     a.view<const TokenIndex>("indices", {b, r, k}),
                     a.view<V>("logits", {b, r, n}, {"saved.scores", "saved.scores", "saved.token_potential"}),
                     a.view<V>("noise", {b * r, k, n}), a.view<const bool>("mask", {b, n}));
    });
}

TEST_CASE("extents: the optimizer's update") {
    check_extents("adamw_update", [](Arguments& a) {
        auto parameter = a.view<T>("parameter", {r, d}, {"gradient", "gradient"});
        auto mean = a.view<T>("mean", {r, d}), square = a.view<T>("square", {r, d});
        adamw_update(policy, parameter, {}, a.view<V>("gradient", {r, d}), mean, square, {});
    });
    check_extents("adamw_update of 16 bits", [](Arguments& a) {
        auto parameter = a.view<bfloat16>("parameter", {r, d}, {"gradient", "gradient"});
        auto mean = a.view<T>("mean", {r, d}), square = a.view<T>("square", {r, d});
        adamw_update(policy, parameter, a.view<T>("master", {r * d}), a.view<V>("gradient", {r, d}), mean, square, {});
    });
}

TEST_CASE("extents: indices on the CPU are in their range, or nothing is written") {
    const Index length = 5;
    for (const TokenIndex wrong : {TokenIndex{-1}, TokenIndex{5}, std::numeric_limits<TokenIndex>::min(),
                                   std::numeric_limits<TokenIndex>::max()}) {
        CAPTURE(wrong);
        const std::string message = "colt5: `indices` must be in [0, 5), but is " + std::to_string(wrong);
        HostTensor<TokenIndex, 2> picks(policy, {1, 3});
        HostTensor<TokenIndex, 3> routed(policy, {1, 1, 3});
        for (Index i = 0; i < 3; ++i) picks.data()[i] = routed.data()[i] = i == 1 ? wrong : static_cast<TokenIndex>(i);
        auto x = filled<T>(policy, std::array<Index, 3>{1, length, 2}, 7);
        const auto rows = filled<T>(policy, std::array<Index, 3>{1, 3, 2}, 1);
        const auto d_routed = filled<T>(policy, std::array<Index, 4>{1, 1, 3, 2}, 1);
        const auto logits = filled<T>(policy, std::array<Index, 3>{1, 1, length}, 1);
        const auto d_scores = filled<T>(policy, std::array<Index, 3>{1, 1, 3}, 1);
        const auto mask = random_mask(policy, std::array<Index, 2>{1, length}, 0, 2);
        const auto before = copy_of(policy, x);
        CHECK_THROWS_WITH_AS(gather(policy, x, picks), message.c_str(), ValueError);
        CHECK_THROWS_WITH_AS(gather(policy, x, routed), message.c_str(), ValueError);
        CHECK_THROWS_WITH_AS(gather_mask(policy, mask.const_view(), routed), message.c_str(), ValueError);
        CHECK_THROWS_WITH_AS(gather_vjp(policy, x.view(), d_routed, routed), message.c_str(), ValueError);
        for (const Scatter how : {Scatter::add, Scatter::mean, Scatter::overwrite}) {
            CHECK_THROWS_WITH_AS(scatter(policy, how, x.view(), rows, picks), message.c_str(), ValueError);
            CHECK_THROWS_WITH_AS(scatter_vjp(policy, how, x, picks), message.c_str(), ValueError);
        }
        CHECK(same_bits(x, before));
        CHECK_THROWS_WITH_AS(pick_scores<T>(policy, logits.const_view(), routed, {}), message.c_str(), ValueError);
        CHECK_THROWS_WITH_AS(pick_scores<T>(policy, {}, routed, mask.const_view()), message.c_str(), ValueError);
        CHECK_THROWS_WITH_AS(place_scores(policy, d_scores, routed, {}, length), message.c_str(), ValueError);
        CHECK_THROWS_WITH_AS(cumulative_softmax(policy, 1, logits, routed, {}), message.c_str(), ValueError);
        CHECK_THROWS_WITH_AS(cumulative_softmax_vjp(policy, 1, d_scores, logits, routed, {}), message.c_str(),
                             ValueError);
        const Sinkhorn sinkhorn;
        const auto saved = sinkhorn_forward(policy, sinkhorn, logits, {}, Mask{}, 3);
        CHECK_THROWS_WITH_AS(sinkhorn_vjp(policy, sinkhorn, saved, d_scores, routed, logits, {}, Mask{}),
                             message.c_str(), ValueError);
    }
}

TEST_CASE("extents: a sequence has at most 2^31 - 1 tokens, so that a TokenIndex tells them apart") {
    // Views of memory that is not there: what is too long is refused before it is read.
    constexpr Index longest = std::numeric_limits<TokenIndex>::max();
    T number = 0;
    bool real = true;
    TokenIndex index = 0;
    for (const Index length : {longest + 1, 2 * longest + 2, Index{1} << 40}) {
        CAPTURE(length);
        const auto refuses = [&](const char* argument, auto&& call) {
            const std::string message = "colt5: `" + std::string(argument) +
                                        "` must be of at most 2^31 - 1 tokens a sequence, but is " +
                                        std::to_string(length);
            CHECK_THROWS_WITH_AS(call(), message.c_str(), ValueError);
        };
        const TokensView<T> tokens(&number, {1, length, 1});
        const TokensView<V> x = tokens, logits(&number, {1, 1, length}), one(&number, {1, 1, 1});
        const Mask mask(&real, {1, length});
        const TokensView<const TokenIndex> routed(&index, {1, 1, 1});
        const MatrixView<const TokenIndex> picks(&index, {1, 1}), many(&index, {1, length});
        refuses("logits", [&] { return top_k(policy, logits, {}, 1); });
        refuses("logits", [&] { return top_k(policy, logits, mask, 1); });
        refuses("x", [&] { return gather(policy, x, picks); });
        refuses("x", [&] { return gather(policy, x, routed); });
        refuses("mask", [&] { return gather_mask(policy, mask, routed); });
        refuses("out", [&] { scatter(policy, Scatter::add, tokens, one, picks); });
        refuses("out", [&] { gather_vjp(policy, tokens, one, picks); });
        refuses("rows", [&] { scatter(policy, Scatter::add, TokensView<T>(&number, {1, 1, 1}), x, many); });
        refuses("x", [&] { return scatter_vjp(policy, Scatter::mean, x, picks); });
        refuses("scores", [&] { return pick_scores<T>(policy, logits, routed, {}); });
        refuses("mask", [&] { return pick_scores<T>(policy, {}, routed, mask); });
        refuses("length", [&] { return place_scores(policy, one, routed, {}, length); });
        refuses("logits", [&] { return cumulative_softmax(policy, 1, logits, routed, {}); });
        refuses("logits", [&] { return cumulative_softmax_vjp(policy, 1, one, logits, routed, {}); });
        refuses("logits", [&] { return sinkhorn_forward(policy, {}, logits, {}, {}, 1); });
        refuses("kv", [&] {
            const View<V, dynamic, dynamic, dynamic, dynamic> q(&number, {1, length, 1, 1});
            const View<V, dynamic, dynamic, dynamic, dynamic, dynamic> kv(&number, {1, length, 2, 1, 1});
            return local_attention(policy, LocalAttention{2}, q, kv, {});
        });
        const View<V, dynamic, dynamic, dynamic, dynamic> q(&number, {1, length, 1, 1}), q_one(&number, {1, 1, 1, 1});
        const View<V, dynamic, dynamic, dynamic, dynamic, dynamic, dynamic> kv(&number, {1, 1, length, 1, 2, 1}),
            kv_one(&number, {1, 1, 1, 1, 2, 1});
        refuses("q", [&] { return dense_attention_forward(policy, q, kv_one, {}, {}); });
        refuses("kv", [&] { return dense_attention_forward(policy, q_one, kv, {}, {}); });
    }
    CHECK_NOTHROW(expect_length("x", longest));
    CHECK_THROWS_WITH_AS(
        place_scores(policy, HostTensor<T, 3>(policy, {1, 1, 0}), HostTensor<TokenIndex, 3>(policy, {1, 1, 0}), {}, -1),
        "colt5: `length` must be >= 0, but is -1", ValueError);
}

TEST_CASE("extents: sizes of windows and of passes do not overflow") {
    constexpr Index most = std::numeric_limits<Index>::max();
    for (const Index reach : {most, most / 2 + 1, most / 3}) {
        CAPTURE(reach);
        for (const MaskedRows masked_rows : {MaskedRows::zero, MaskedRows::window_mean}) {
            const LocalAttention attention{reach, masked_rows};
            CHECK(attention.window_begin(5) == 0);
            CHECK(attention.window(5, 3, 10) == 10);
        }
    }
    // One more threshold than steps.
    const auto none = HostTensor<T, 3>(policy, {0, 1, 5});
    const CoordinateDescent descent{.n_iters = std::numeric_limits<int>::max()};
    const auto saved = coordinate_descent_forward(policy, descent, 1, none, {});
    CHECK(saved.threshold.extent(2) == Index{std::numeric_limits<int>::max()} + 1);
    CHECK_THROWS_AS(
        sinkhorn_forward(policy, {}, View<V, dynamic, dynamic, dynamic>(none.data(), {0, 1, most / 4}), {}, Mask{}, 1),
        ValueError);
}
