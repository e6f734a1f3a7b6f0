// SPDX-License-Identifier: MIT
// Modules compare everything that they are handed, and their own parameters, before they read or write any of it.
#include <doctest/doctest.h>

#include <array>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include <colt5/colt5.hpp>

#include "support/arguments.hpp"

using namespace colt5;
using namespace support;

namespace {

using T = float;
using V = const float;
constexpr Index b = 2, n = 20, d = 4, k = 3, r = 2, heads = 2, dim_head = 3, inner_width = heads * dim_head, hidden = 7;

template <RouterType router_type>
using FF = ConditionalRoutedFeedForward<FeedForwardConfig{.dim = d, .num_heavy_tokens = k, .router_type = router_type},
                                        T, Cpu>;
constexpr AttentionConfig attention_config{.dim = d,
                                           .num_heavy_tokens_q = k,
                                           .num_heavy_tokens_kv = k,
                                           .num_routed_kv = 2,
                                           .light_dim_head = dim_head,
                                           .light_heads = heads,
                                           .light_window_size = 4,
                                           .heavy_dim_head = dim_head,
                                           .heavy_heads = heads};
using Attention = ConditionalRoutedAttention<attention_config, T, Cpu>;
constexpr CrossAttentionConfig cross_config{
    .dim = d, .num_tokens_q = k, .num_tokens_kv = k, .dim_head = dim_head, .heads = heads, .kv_routing_tokens = 2};
using Cross = ConditionalRoutedCrossAttention<cross_config, T, Cpu>;
constexpr TransformerBlockConfig block_config{.dim = d,
                                              .num_heavy_attn_tokens_q = k,
                                              .num_heavy_attn_tokens_kv = k,
                                              .num_heavy_ff_tokens = k,
                                              .light_dim_head = dim_head,
                                              .light_heads = heads,
                                              .light_window_size = 4,
                                              .heavy_dim_head = dim_head,
                                              .heavy_heads = heads};
using Block = ConditionalRoutedTransformerBlock<block_config, T, Cpu>;

/// The message of the Error that `call` throws.
template <typename Call>
std::string message_of(Call&& call) {
    try {
        call();
    } catch (const Error& error) {
        return error.what();
    }
    return "nothing was thrown";
}

struct CollectMembers {
    using names_members = void;
    std::vector<std::string>& names;
    template <typename Parameter>
    void operator()(const std::string& name, const Parameter&) const {
        names.push_back(name);
    }
};

/// The names of all parameters, as members.
template <typename Module>
std::vector<std::string> member_names(const Module& module) {
    std::vector<std::string> names;
    Module::each_parameter(CollectMembers{names}, "", module);
    return names;
}

/// Makes one extent of the i-th parameter of a module, or of its gradients, too small or too large by one while `body`
/// runs with the shape as it was and as it is.
template <typename Module, typename Of, typename Body>
void with_wrong_parameter(const Cpu& policy, Of& of, std::size_t i, Body&& body) {
    std::size_t at = 0;
    Module::each_parameter(
        [&](const std::string&, auto& tensor) {
            if (at++ != i) return;
            for (std::size_t axis = 0; axis < tensor.shape().size(); ++axis)
                for (const Index difference : {Index{-1}, Index{1}}) {
                    auto shape = tensor.shape();
                    shape[axis] += difference;
                    std::remove_cvref_t<decltype(tensor)> wrong(policy, shape);
                    fill(policy, wrong, 0);
                    std::swap(tensor, wrong);
                    body(shape_string(wrong.shape()), shape_string(shape));
                    std::swap(tensor, wrong);
                }
        },
        "", of);
}

template <typename Module, typename Gradients>
bool all_zero(const Gradients& gradients) {
    double sum = 0;
    Module::each_parameter([&](const std::string&, const auto& gradient) { sum += inner(gradient, gradient); }, "",
                           gradients);
    return sum == 0;
}

/// Every gradient and every parameter, each with each extent off by one. `run(module)` calls the module without a
/// saved activations; forward(module) gives them, and backward(module, saved, gradients) takes them, by reference or as
/// they are.
template <typename Module, typename Run, typename Forward, typename Backward>
void check_parameters_and_gradients(Run&& run, Forward&& forward, Backward&& backward) {
    const Cpu policy(1);
    Module module(policy, Seed{1});
    const std::vector<std::string> names = member_names(module);
    auto saved = forward(module);
    for (std::size_t i = 0; i < names.size(); ++i) {
        CAPTURE(names[i]);
        auto gradients = module.make_gradients();
        with_wrong_parameter<Module>(policy, gradients, i, [&](const std::string& right, const std::string& wrong) {
            const std::string expected =
                "colt5: `gradients." + names[i] + "` must have shape " + right + ", but has " + wrong;
            CHECK(message_of([&] { backward(module, saved, gradients); }) == expected);
            CHECK(message_of([&] { backward(module, std::move(saved), gradients); }) == expected);
            CHECK(all_zero<Module>(gradients));
        });
        with_wrong_parameter<Module>(policy, module, i, [&](const std::string&, const std::string& wrong) {
            // The width of a feedforward is that of one of its parameters: another one may be blamed.
            const auto is_named = [&](const std::string& message) {
                const auto own =
                    "`" + names[i].substr(names[i].rfind("conditional_", 0) == 0 ? names[i].find('.') + 1 : 0);
                const bool names_it = message.find(own + "` must have shape (") != std::string::npos &&
                                      message.find("but has " + wrong) != std::string::npos;
                const bool is_width = own.find("_ff.hidden.weight") != std::string::npos &&
                                      message.find("_ff.hidden.bias` must have shape (") != std::string::npos;
                return names_it || is_width;
            };
            CHECK(is_named(message_of([&] { run(module); })));
            CHECK(is_named(message_of([&] { forward(module); })));
        });
    }
    // Nothing has come of it: what was handed over is still there.
    auto gradients = module.make_gradients(), again = module.make_gradients();
    const auto d_x = backward(module, saved, gradients);
    CHECK_FALSE(all_zero<Module>(gradients));
    CHECK(same_bits(backward(module, std::move(saved), again), d_x));
}

template <typename Module>
void check_module() {
    const Cpu policy(1);
    const auto x = normal<T>(policy, std::array<Index, 3>{b, n, d}, 0), d_out = normal<T>(policy, x.shape(), 1);
    check_parameters_and_gradients<Module>(
        [&](const Module& module) { return module(x); }, [&](const Module& module) { return module.forward(x); },
        [&](const Module& module, auto&& saved, typename Module::Gradients& gradients) {
            return module.backward(std::forward<decltype(saved)>(saved), d_out, gradients);
        });
    const Module module(policy, Seed{1});
    check_extents("call", [&](Arguments& a) {
        module(a.view<V>("tokens", {b, n, d}, {"mask", "mask", "tokens"}), a.view<const bool>("mask", {b, n}));
    });
    const auto saved = module.forward(x);
    check_extents("backward", [&](Arguments& a) {
        auto gradients = module.make_gradients();
        try {
            module.backward(saved, a.view<V>("d_out", {b, n, d}), gradients);
        } catch (const ShapeError&) {
            CHECK(all_zero<Module>(gradients));
            throw;
        }
    });
    auto handed_over = module.forward(x);
    auto gradients = module.make_gradients();
    const auto longer = normal<T>(policy, std::array<Index, 3>{b, n + 1, d}, 1);
    CHECK(message_of([&] { module.backward(std::move(handed_over), longer, gradients); }) ==
          "colt5: `d_out` must have shape (2, 20, 4), but has (2, 21, 4)");
    CHECK(handed_over.out.shape() == x.shape());  // still there
    T number = 0;                                 // refused before it is read
    for (const Index length : {Index{1} << 31, Index{1} << 40})
        CHECK(message_of([&] {
                  module(TokensView<V>(&number, {1, length, d}));
              }) == "colt5: `tokens` must be of at most 2^31 - 1 tokens a sequence, but is " + std::to_string(length));
}

/// Batches of nothing and sequences of nothing.
template <typename Module>
void check_empty() {
    const Cpu policy(2);
    const Module module(policy, Seed{1});
    for (const auto& shape : {std::array<Index, 3>{0, n, d}, {b, 0, d}, {0, 0, d}}) {
        CAPTURE(shape_string(shape));
        const auto x = normal<T>(policy, shape, 0);
        const auto mask = random_mask(policy, std::array<Index, 2>{shape[0], shape[1]}, 0);
        auto gradients = module.make_gradients();
        CHECK(module(x, mask.const_view()).shape() == shape);
        const auto saved = module.forward(x, mask.const_view());
        CHECK(module.backward(saved, x, gradients).shape() == shape);
        CHECK(all_zero<Module>(gradients));
    }
}

}  // namespace

TEST_CASE("extents: gradients, parameters and inputs of the conditional modules") {
    check_module<FF<RouterType::coor_descent>>();
    check_module<FF<RouterType::cum_softmax>>();
    check_module<FF<RouterType::sinkhorn>>();
    check_module<Attention>();
    check_module<Block>();
}

TEST_CASE("extents: gradients, parameters and inputs of conditional cross attention") {
    const Cpu policy(1);
    const auto x = normal<T>(policy, std::array<Index, 3>{b, n, d}, 0), d_out = normal<T>(policy, x.shape(), 1);
    const auto context = normal<T>(policy, std::array<Index, 3>{b, n - 5, d}, 2);
    check_parameters_and_gradients<Cross>([&](const Cross& module) { return module(x, context); },
                                          [&](const Cross& module) { return module.forward(x, context); },
                                          [&](const Cross& module, const auto& saved, Cross::Gradients& gradients) {
                                              return module.backward(saved, d_out, gradients).d_x;
                                          });
    const Cross module(policy, Seed{1});
    for (const Index length : {n, k})  // routed and not
        check_extents("call", [&](Arguments& a) {
            module(a.view<V>("x", {b, length, d}, {"mask", "mask", "x"}),
                   a.view<V>("context", {b, length, d}, {"context_mask", "context_mask", "context"}),
                   a.view<const bool>("mask", {b, length}), a.view<const bool>("context_mask", {b, length}));
        });
    check_extents("call without masks", [&](Arguments& a) {
        module(a.view<V>("x", {b, n, d}, {"context", "", "x"}),
               a.view<V>("context", {b, n, d}, {"context", "", "context"}));
    });
    const auto saved = module.forward(x, context);
    check_extents("backward", [&](Arguments& a) {
        auto gradients = module.make_gradients();
        module.backward(saved, a.view<V>("d_out", {b, n, d}), gradients);
    });
}

TEST_CASE("extents: LightAttention, with what its backward pass is handed") {
    for (const MemoryPlan plan : {MemoryPlan{1, false}, {1, true}, {1000, false}}) {
        const Cpu policy(1, plan);
        SeedSequence seeds(Seed{1});
        const LightAttention<T, Cpu> light(policy, seeds, d, heads, dim_head, {2});
        check_extents("forward", [&](Arguments& a) {
            light.forward(policy, a.view<T>("out", {b, n, d}), a.view<V>("x", {b, n, d}, {"out", "out", "norm.weight"}),
                          a.view<const bool>("mask", {b, n}), true, a.view<V>("residual", {b, n, d}));
        });
        const auto x = normal<T>(policy, std::array<Index, 3>{b, n, d}, 0);
        auto out = tensor_like(policy, x);
        auto saved = light.forward(policy, out.view(), x, {}, !plan.recompute);
        check_extents("backward", [&](Arguments& a) {
            auto gradients = zeros_like_parameters(policy, light);
            saved.kv = a.tensor<T>("saved.kv", {b, n, 2 * inner_width});
            const GradientEpilogue<T, Cpu> epilogue{.d_residual = a.view<V>("d_residual", {b, n, d})};
            try {
                light.backward(policy, saved, a.view<T>("d_x", {b, n, d}), a.view<V>("d_out", {b, n, d}),
                               a.view<V>("x", {b, n, d}, {"saved.kv", "saved.kv", "norm.weight"}),
                               a.view<const bool>("mask", {b, n}), gradients, epilogue);
            } catch (const ShapeError&) {
                CHECK(all_zero<LightAttention<T, Cpu>>(gradients));
                throw;
            }
        });
        if (plan.recompute) continue;
        const Cpu other(1, {plan.tokens_at_a_time == 1 ? 1000 : 1, false});
        auto gradients = zeros_like_parameters(policy, light);
        gradients.to_out.weight = {policy, {d, inner_width + 1}};
        CHECK(message_of([&] { light.backward(policy, saved, out.view(), x, x, {}, gradients); }) ==
              "colt5: `gradients.to_out.weight` must have shape (4, 6), but has (4, 7)");
        gradients = zeros_like_parameters(policy, light);
        CHECK(message_of([&] { light.backward(other, saved, out.view(), x, x, {}, gradients); }) ==
              "colt5: `saved.chunks` must be " + std::to_string(plan.tokens_at_a_time == 1 ? 1 : 6) +
                  ", as many as by this policy's plan, but is " + std::to_string(saved.chunks.size()));
    }
}

TEST_CASE("extents: HeavyAttention, with what its backward pass is handed") {
    using Heavy = HeavyAttention<T, Cpu>;
    const Cpu policy(1);
    SeedSequence seeds(Seed{1});
    const Heavy heavy(policy, seeds, d, heads, dim_head);
    check_extents("forward", [&](Arguments& a) {
        heavy.forward(policy, a.view<V>("x", {b, n, d}, {"context", "", "norm.gamma"}),
                      a.view<V>("context", {b, r, k, d}, {"context", "mask", "mask", "context"}),
                      a.view<const bool>("mask", {b, r, k}), a.view<V>("scores", {b, r, k}));
    });
    check_extents("backward", [&](Arguments& a) {
        auto gradients = zeros_like_parameters(policy, heavy);
        Heavy::Activations saved{{},
                                 a.tensor<T>("saved.q", {b, n, inner_width}),
                                 a.tensor<T>("saved.kv", {b, r, k, 2 * inner_width / r}),
                                 {a.tensor<T>("saved.attention.out", {b, n, heads, dim_head}),
                                  a.tensor<T>("saved.attention.log_sum_exp", {b, heads, n})}};
        Heavy::InputGradients to{a.tensor<T>("d.d_x", {b, n, d}), a.tensor<T>("d.d_context", {b, r, k, d}),
                                 a.tensor<T>("d.d_scores", {b, r, k})};
        try {
            heavy.backward(policy, saved, to, a.view<V>("d_out", {b, n, d}),
                           a.view<V>("x", {b, n, d}, {"context", "saved.q", "norm.gamma"}),
                           a.view<V>("context", {b, r, k, d}, {"context", "mask", "mask", "context"}),
                           a.view<const bool>("mask", {b, r, k}), a.view<V>("scores", {b, r, k}), gradients);
        } catch (const Error&) {
            CHECK(all_zero<Heavy>(gradients));
            throw;
        }
    });
    const auto x = normal<T>(policy, std::array<Index, 3>{b, n, d}, 0);
    const auto context = normal<T>(policy, std::array<Index, 4>{b, r, k, d}, 1);
    const auto saved = heavy.forward(policy, x, context, {}, {});
    auto gradients = zeros_like_parameters(policy, heavy);
    gradients.to_q.weight = {policy, {inner_width, d - 1}};
    CHECK(message_of([&] { heavy.backward(policy, saved, x, x, context, {}, {}, gradients); }) ==
          "colt5: `gradients.to_q.weight` must have shape (6, 4), but has (6, 3)");
    for (const Index routes : {0, 3}) {
        Arguments a(policy);
        CHECK(message_of([&] {
                  heavy.forward(policy, a.view<V>("x", {b, n, d}), a.view<V>("context", {b, routes, k, d}), {}, {});
              }) == "colt5: `routes of context` must be a divisor of 2 heads, but is " + std::to_string(routes));
    }
}

TEST_CASE("extents: FeedForward, with what its backward pass is handed") {
    for (const Index tokens : {1, 1000}) {
        const Cpu policy(1, {tokens, false});
        SeedSequence seeds(Seed{1});
        const FeedForward<T, Cpu> ff(policy, seeds, d, hidden), other(policy, seeds, d, hidden + 1);
        check_extents("forward", [&](Arguments& a) {
            ff.forward(policy, a.view<T>("out", {b, n, d}), a.view<V>("x", {b, n, d}, {"out", "out", "norm.gamma"}),
                       true, a.view<V>("residual", {b, n, d}));
        });
        check_extents("backward", [&](Arguments& a) {
            auto gradients = zeros_like_parameters(policy, ff);
            FeedForward<T, Cpu>::Activations saved{a.tensor<T>("saved.pre_activation", {b, n, hidden})};
            const GradientEpilogue<T, Cpu> epilogue{.d_residual = a.view<V>("d_residual", {b, n, d})};
            ff.backward(policy, saved, a.view<T>("d_x", {b, n, d}), a.view<V>("d_out", {b, n, d}),
                        a.view<V>("x", {b, n, d}, {"saved.pre_activation", "saved.pre_activation", "norm.gamma"}),
                        gradients, epilogue);
        });
        auto x = normal<T>(policy, std::array<Index, 3>{b, n, d}, 0);
        auto of_other = zeros_like_parameters(policy, other);
        CHECK(message_of([&] { ff.backward(policy, {}, x.view(), x, x, of_other); }) ==
              "colt5: `gradients.hidden.weight` must have shape (7, 4), but has (8, 4)");
    }
}

TEST_CASE_TEMPLATE("extents: routers", Router, CoordinateDescentRouter<RouterConfig{.dim = d}, T, Cpu>,
                   DifferentiableTopKRouter<RouterConfig{.dim = d}, T, Cpu>,
                   SinkhornRouter<RouterConfig{.dim = d}, T, Cpu>) {
    const Cpu policy(1);
    SeedSequence seeds(Seed{1});
    Router router(policy, seeds);
    check_extents("route", [&](Arguments& a) {
        router.route(policy, a.view<V>("x", {b, n, d}, {"mask", "mask", "x"}), a.view<const bool>("mask", {b, n}), k);
    });
    const auto x = normal<T>(policy, std::array<Index, 3>{b, n, d}, 0);
    const auto saved = router.forward(policy, x.const_view(), {}, k);
    check_extents("backward", [&](Arguments& a) {
        typename Router::Gradients gradients{a.tensor<T>("gradients.routing_token", {1, d})};
        router.backward(policy, saved, a.view<V>("d_scores", {b, 1, k}), a.view<V>("x", {b, n, d}, {"x", "d_x", "x"}),
                        a.view<const bool>("mask", {b, n}), a.view<T>("d_x", {b, n, d}), gradients);
    });
    router.routing_token = {policy, {2, d}};
    CHECK(message_of([&] { router.route(policy, x.const_view(), {}, k); }) ==
          "colt5: `routing_token` must have shape (1, 4), but has (2, 4)");
}

TEST_CASE("extents: modules take no tokens at all") {
    check_empty<FF<RouterType::coor_descent>>();
    check_empty<FF<RouterType::cum_softmax>>();
    check_empty<FF<RouterType::sinkhorn>>();
    check_empty<Attention>();
    check_empty<Block>();
    const Cpu policy(2);
    const Cross cross(policy, Seed{1});
    for (const auto& [batch, length, of_context] :
         {std::array<Index, 3>{0, n, n}, {b, 0, n}, {b, n, 0}, {b, 0, 0}, {b, 2, 0}}) {
        const auto x = normal<T>(policy, std::array<Index, 3>{batch, length, d}, 0);
        const auto context = normal<T>(policy, std::array<Index, 3>{batch, of_context, d}, 1);
        auto gradients = cross.make_gradients();
        const auto saved = cross.forward(x, context);
        CHECK(saved.out.shape() == x.shape());
        const auto inputs = cross.backward(saved, x, gradients);
        CHECK(inputs.d_x.shape() == x.shape());
        CHECK(inputs.d_context.shape() == context.shape());
    }
}

TEST_CASE("extents: widths whose sizes would overflow") {
    const Cpu policy(1);
    SeedSequence seeds(Seed{1});
    constexpr Index huge = Index{1} << 40, most = std::numeric_limits<Index>::max();
    using Light = LightAttention<T, Cpu>;
    using Heavy = HeavyAttention<T, Cpu>;
    CHECK(message_of([&] { Light(policy, seeds, d, huge, 2, {2}); }) ==
          "colt5: `heads` must be at most 2^40 / dim_head, but is 1099511627776");
    CHECK(message_of([&] { Heavy(policy, seeds, d, 3, most); }) ==
          "colt5: `heads` must be at most 2^40 / dim_head, but is 3");
    CHECK(message_of([&] { Heavy(policy, seeds, d, 0, 3); }) == "colt5: `heads` must be >= 1, but is 0");
    CHECK(message_of([&] { Light(policy, seeds, d, 3, -1, {2}); }) == "colt5: `dim_head` must be >= 1, but is -1");
    using Feed = FeedForward<T, Cpu>;
    CHECK_THROWS_AS(Feed(policy, seeds, most, most), ValueError);
    CHECK_THROWS_AS(Feed(policy, seeds, d, -1), ValueError);
}

TEST_CASE("extents: numbers of tokens of any size mean all of them") {
    const Cpu policy(1);
    const auto x = normal<T>(policy, std::array<Index, 3>{b, n, d}, 0);
    constexpr Index most = std::numeric_limits<Index>::max();
    const FF<RouterType::coor_descent> ff(policy, Seed{1});
    const FF<RouterType::sinkhorn> sinkhorn(policy, Seed{1});
    const Block block(policy, Seed{1});
    const Cross cross(policy, Seed{1});
    for (const Index many : {most, most - 1, Index{1} << 32}) {
        CHECK(same_bits(ff(x, {}, {.num_heavy_tokens = many}), ff(x, {}, {.num_heavy_tokens = n})));
        CHECK(sinkhorn(x, {}, {.num_heavy_tokens = many}).shape() == x.shape());
        CHECK(same_bits(block(x, {}, {many, many, many}), block(x, {}, {n, n, n})));
        CHECK(same_bits(cross(x, x, {}, {}, {many, many}), cross(x, x, {}, {}, {n, n})));
    }
    for (const Index tokens : {Index{1}, most - 1, most}) {  // at a time
        const Cpu other(1, {tokens, false});
        CHECK(relative_error(Block(other, Seed{1})(x), block(x)) <= 1e-5);
    }
}
