// SPDX-License-Identifier: MIT
/// Options that can be switched on together, switched on together: each configuration has many of them, and all that
/// holds of a module holds of it.
#include <array>
#include <concepts>
#include <optional>
#include <string>
#include <utility>

#include <colt5/io/parameters.hpp>

#include "io/temporary_folder.hpp"
#include "module/checks.hpp"

using namespace colt5;
using namespace support;

namespace {

using Tokens = HostTensor<double, 3>;

constexpr Index dim = 6;
constexpr AttentionConfig attention(RouterType type, bool cosine, Index block_size) {
    return {.dim = dim,
            .num_heavy_tokens_q = 5,
            .num_heavy_tokens_kv = 4,
            .num_routed_kv = 2,
            .num_routed_q = 2,
            .light_dim_head = 2,
            .light_heads = 2,
            .light_window_size = 4,
            .heavy_dim_head = 4,
            .heavy_heads = 2,
            .router_straight_through = false,
            .router_type = type,
            .router_kwargs = {.route_block_size = block_size,
                              .coor_descent = {.score_scale = 0.4,
                                               .iterate_to_convergence = !cosine,
                                               .cosine_sim_routing = cosine,
                                               .cosine_sim_scale = 3,
                                               .short_rows_score_one = block_size > 0},
                              .cum_softmax = {.cosine_sim_routing = cosine, .cosine_sim_scale = 3},
                              .sinkhorn = {.n_iters = 3, .cosine_sim_routing = cosine, .cosine_sim_scale = 3}},
            .use_null_kv = true,
            .use_null_q_tokens = true,
            .multiply_keys_by_score = true,
            .multiply_queries_by_score = true,
            .use_relative_position_bias = true,
            .relative_position_num_buckets = 8,
            .relative_position_max_distance = 6,
            .rotary_emb = true,
            .light_rotary_emb = true};
}
constexpr AttentionConfig everything = attention(RouterType::coor_descent, true, 4);
constexpr AttentionConfig heavy_alone = [] {
    AttentionConfig config = attention(RouterType::coor_descent, false, 4);
    config.has_light_attn = false;
    config.num_routed_kv = 1;
    config.light_in_windows = true;  // of no light branch: means nothing
    config.masked_tokens_get_null_q = true;
    config.use_relative_position_bias = config.multiply_queries_by_score = false;
    return config;
}();
constexpr AttentionConfig by_softmax = [] {
    AttentionConfig config = attention(RouterType::cum_softmax, false, 4);
    config.attends_to_padding = true;
    config.masked_rows = MaskedRows::window_mean;
    config.num_routed_q = 1;
    config.router_kwargs.cum_softmax.short_rows_score_one = true;
    config.use_null_q_tokens = config.multiply_keys_by_score = false;
    return config;
}();
constexpr AttentionConfig by_sinkhorn = [] {
    AttentionConfig config = attention(RouterType::sinkhorn, true, 4);
    config.router_kwargs.sinkhorn.masked_tokens_take_part = true;
    return config;
}();
constexpr TransformerBlockConfig of_block = [] {
    constexpr AttentionConfig a = attention(RouterType::coor_descent, false, 0);
    return TransformerBlockConfig{.dim = dim,
                                  .num_heavy_attn_tokens_q = a.num_heavy_tokens_q,
                                  .num_heavy_attn_tokens_kv = a.num_heavy_tokens_kv,
                                  .num_routed_kv = a.num_routed_kv,
                                  .num_routed_q = a.num_routed_q,
                                  .num_heavy_ff_tokens = 3,
                                  .light_dim_head = a.light_dim_head,
                                  .light_heads = a.light_heads,
                                  .light_window_size = a.light_window_size,
                                  .heavy_dim_head = a.heavy_dim_head,
                                  .heavy_heads = a.heavy_heads,
                                  .feed_forward = FeedForwardType::gated,
                                  .heavy_ff_mult = 1,
                                  .router_straight_through = false,
                                  .router_kwargs = a.router_kwargs,
                                  .use_null_kv = true,
                                  .use_null_q_tokens = true,
                                  .masked_tokens_get_null_q = true,
                                  .multiply_keys_by_score = true,
                                  .multiply_queries_by_score = true,
                                  .use_relative_position_bias = true,
                                  .relative_position_num_buckets = 8,
                                  .relative_position_max_distance = 6,
                                  .rotary_emb = true,
                                  .light_rotary_emb = true};
}();
constexpr CrossAttentionConfig of_cross{.dim = dim,
                                        .num_tokens_q = 5,
                                        .num_tokens_kv = 4,
                                        .dim_head = 3,
                                        .heads = 2,
                                        .router_straight_through = false,
                                        .router_kwargs = attention(RouterType::coor_descent, true, 0).router_kwargs,
                                        .kv_routing_tokens = 2,
                                        .q_routing_tokens = 2,
                                        .condition_kv_routing_on_queries = true,
                                        .use_null_kv = true,
                                        .use_null_q_tokens = true,
                                        .multiply_keys_by_score = true,
                                        .use_relative_position_bias = true,
                                        .relative_position_num_buckets = 8,
                                        .relative_position_max_distance = 6};

using Everything = ConditionalRoutedAttention<everything, double, Cpu>;
using HeavyAlone = ConditionalRoutedAttention<heavy_alone, double, Cpu>;
using BySoftmax = ConditionalRoutedAttention<by_softmax, double, Cpu>;
using BySinkhorn = ConditionalRoutedAttention<by_sinkhorn, double, Cpu>;
using Block = ConditionalRoutedTransformerBlock<of_block, double, Cpu>;
using Cross = ConditionalRoutedCrossAttention<of_cross, double, Cpu>;
constexpr RoutedConfig of_nested{.dim = dim,
                                 .num_heavy_tokens = 7,
                                 .num_routes = 2,
                                 .sequence_order = true,
                                 .router_straight_through = false,
                                 .router_kwargs = heavy_alone.router_kwargs};
using Nested = Routed<of_nested, double, Cpu, AsBranch<BySinkhorn>, AsBranch<Everything>>;
#define ALL_MODULES Everything, HeavyAlone, BySoftmax, BySinkhorn, Block, Cross, Nested

/// Cross attention of x over a context two tokens longer, or another module of x alone.
template <typename Module>
constexpr bool crosses = std::same_as<Module, Cross>;

struct Inputs {
    Tokens x, context;
    std::optional<HostTensor<bool, 2>> mask, context_mask;

    Mask of_x() const { return mask ? Mask(mask->const_view()) : Mask(); }
    Mask of_context() const { return context_mask ? Mask(context_mask->const_view()) : Mask(); }
    std::array<std::pair<Tokens*, Mask>, 2> tokens() { return {{{&x, of_x()}, {&context, of_context()}}}; }
};
template <typename Module>
Inputs inputs(const Cpu& policy, Index batch, Index length, bool masked) {
    const Index of_context = crosses<Module> && length > 0 ? length + 2 : length;
    Inputs in{normal<double>(policy, std::array<Index, 3>{batch, length, dim}, 0, 0.7),
              normal<double>(policy, std::array<Index, 3>{batch, of_context, dim}, 1, 0.7),
              {},
              {}};
    if (masked) {
        in.mask = random_mask(policy, std::array<Index, 2>{batch, length}, 5);
        in.context_mask = random_mask(policy, std::array<Index, 2>{batch, of_context}, 6);
        if (length > 3)  // fewer real tokens than are routed
            std::fill_n(in.mask->view()[batch - 1].data() + 2, length - 2, false);
    }
    return in;
}

template <typename Module>
Tokens evaluate(const Module& module, const Inputs& in) {
    if constexpr (crosses<Module>)
        return copy_of(module.policy(), module(in.x, in.context, in.of_x(), in.of_context()));
    else
        return copy_of(module.policy(), module(in.x, in.of_x()));
}
template <typename Module>
auto forward(const Module& module, const Inputs& in) {
    if constexpr (crosses<Module>)
        return module.forward(in.x, in.context, in.of_x(), in.of_context());
    else
        return module.forward(in.x, in.of_x());
}

template <typename Module>
struct Results {
    Tokens out, d_x, d_context;
    typename Module::Gradients gradients;
};
template <typename Module>
Results<Module> run(const Module& module, const Inputs& in, const Tokens& d_out) {
    const Cpu& policy = module.policy();
    auto gradients = module.make_gradients();
    const auto saved = forward(module, in);
    auto out = copy_of(policy, saved.out);
    auto d = module.backward(saved, d_out, gradients);
    if constexpr (crosses<Module>)
        return {std::move(out), copy_of(policy, d.d_x), copy_of(policy, d.d_context), std::move(gradients)};
    else
        return {std::move(out), copy_of(policy, d), Tokens(policy, {0, 0, 0}), std::move(gradients)};
}

/// Noise of training starts again, of the samples or blocks from `first` on.
struct RestartNoise {
    Index first = 0;
    template <typename... T>
    void operator()(const std::string&, const T&...) const {}
    template <typename Noise>
    void noise(const std::string&, Noise& noise) const {
        noise = Noise::seeded(Seed{3});
        noise.first_sample = first;
    }
};
template <typename Module>
void restart_noise(const Module& module, Index first = 0) {
    RestartNoise restart{first};
    Module::each_parameter(restart, "", module);
}

/// How many blocks of a sequence draw noise, each as a sample of its own.
template <typename Module>
Index rows_of_noise(Index length) {
    const Index tokens = std::same_as<Module, Nested> ? std::min(length, of_nested.num_heavy_tokens) : length;
    return (tokens + 3) / 4;
}

/// A module whose tables of biases hold larger numbers than those at the start, so that they count.
template <typename Module>
Module drawn(const Cpu& policy) {
    Module module(policy, Seed{1});
    std::uint64_t stream = 500;
    Module::each_parameter(
        [&](const std::string& name, auto& value) {
            if (name.find("relative_attention_bias") != std::string::npos)
                fill_normal(policy, value, Random(Seed{3}, ++stream));
        },
        "", module);
    return module;
}

/// f(name, tensor of a, tensor of b) for the output, the gradients of inputs and those of parameters.
template <typename Module, typename F>
void each_result(const Results<Module>& a, const Results<Module>& b, F&& f) {
    f("out", a.out, b.out);
    f("d_x", a.d_x, b.d_x);
    f("d_context", a.d_context, b.d_context);
    Module::each_parameter([&](const std::string& name, const auto& of_a, const auto& of_b) { f(name, of_a, of_b); },
                           "", a.gradients, b.gradients);
}
template <typename Module>
void check_same_results(const Results<Module>& a, const Results<Module>& b) {
    each_result(a, b, [](const std::string& name, const auto& of_a, const auto& of_b) {
        CAPTURE(name);
        CHECK(same_bits(of_a, of_b));
    });
}

void fill_padding(Tokens& tokens, Mask mask, double value) {
    for (Index i = 0; i < mask.size(); ++i)
        if (!mask.data()[i]) std::fill_n(tokens.data() + i * dim, dim, value);
}

}  // namespace

TEST_CASE_TEMPLATE("combinations: gradients by finite differences" * not_sanitized, Module, ALL_MODULES) {
    const Cpu policy(1, {.tokens_at_a_time = 4, .recompute = true});
    auto module = drawn<Module>(policy);
    for (const Index length : {11, 3, 1})
        for (const bool masked : {false, true}) {
            CAPTURE(length);
            CAPTURE(masked);
            auto in = inputs<Module>(policy, 2, length, masked);
            const auto d_out = normal<double>(policy, in.x.shape(), 99);
            const auto loss = [&] {
                restart_noise(module);
                return inner(d_out, forward(module, in).out);
            };
            restart_noise(module);
            auto results = run(module, in, d_out);
            CHECK(gradient_error(results.d_x, finite_differences(policy, in.x, loss)) <= gradient_tolerance);
            if (crosses<Module>)
                CHECK(gradient_error(results.d_context, finite_differences(policy, in.context, loss)) <=
                      gradient_tolerance);
            check_parameter_gradients(policy, module, results.gradients, loss);
            without_noise(module, [&] { CHECK(same_bits(evaluate(module, in), forward(module, in).out)); });
        }
}

TEST_CASE_TEMPLATE("combinations: gradients of many tokens along a direction", Module, Everything, HeavyAlone,
                   BySoftmax, BySinkhorn, Block, Cross) {
    const Cpu policy(1, {.tokens_at_a_time = 64, .recompute = false});
    auto module = drawn<Module>(policy);
    for (const auto& at_a_time : {std::array<Index, 2>{70, 160}, {150, 90}})
        for (const bool masked : {false, true}) {
            const Index q = at_a_time[0], kv = at_a_time[1];
            CAPTURE(q);
            CAPTURE(kv);
            CAPTURE(masked);
            auto in = inputs<Module>(policy, 2, 150, masked);
            const auto d_out = normal<double>(policy, in.x.shape(), 99);
            const auto forward_many = [&] {
                restart_noise(module);
                if constexpr (crosses<Module>)
                    return module.forward(in.x, in.context, in.of_x(), in.of_context(), {q, kv});
                else
                    return module.forward(in.x, in.of_x(), {q, kv});
            };
            const auto loss = [&] { return inner(d_out, forward_many().out); };
            auto gradients = module.make_gradients();
            const auto saved = forward_many();
            CHECK(all_finite(saved.out));
            const auto d = module.backward(saved, d_out, gradients);
            const auto check = [&](const std::string& name, auto& tensor, const auto& gradient) {
                CAPTURE(name);
                CHECK(all_finite(gradient));
                if (is_sanitized) return;  // the passes above are all the code that the loss calls, many times
                if (tensor.size() > 0) CHECK(directional_error(policy, tensor, gradient, loss, 1e-5) <= 1e-5);
            };
            if constexpr (crosses<Module>) {
                check("x", in.x, d.d_x);
                check("context", in.context, d.d_context);
            } else {
                check("tokens", in.x, d);
            }
            Module::each_parameter(check, "", module, gradients);
        }
}

TEST_CASE_TEMPLATE("combinations: batched equals one at a time, bit for bit", Module, ALL_MODULES) {
    const Cpu policy(1);
    const auto module = drawn<Module>(policy);
    for (const Index length : {1, 11, 150})
        for (const bool masked : {false, true}) {
            CAPTURE(length);
            CAPTURE(masked);
            const auto in = inputs<Module>(policy, 3, length, masked);
            const auto d_out = normal<double>(policy, in.x.shape(), 99);
            restart_noise(module);
            const auto together = run(module, in, d_out);
            const auto evaluated = evaluate(module, in);
            CHECK(all_finite(together.out));
            CHECK(all_finite(together.d_x));
            for (Index b = 0; b < 3; ++b) {
                CAPTURE(b);
                Inputs alone{copy_of(policy, sequence(in.x, b)), copy_of(policy, sequence(in.context, b)), {}, {}};
                if (masked) {
                    alone.mask = copy_of(policy, sequence(*in.mask, b));
                    alone.context_mask = copy_of(policy, sequence(*in.context_mask, b));
                }
                restart_noise(module, b * rows_of_noise<Module>(length));
                const auto results = run(module, alone, copy_of(policy, sequence(d_out, b)));
                CHECK(same_bits(results.out, sequence(together.out, b)));
                CHECK(same_bits(results.d_x, sequence(together.d_x, b)));
                if (crosses<Module>) CHECK(same_bits(results.d_context, sequence(together.d_context, b)));
                CHECK(same_bits(evaluate(module, alone), sequence(evaluated, b)));
            }
        }
}

TEST_CASE_TEMPLATE("combinations: padding may hold anything", Module, ALL_MODULES) {
    for (const bool recompute : {false, true}) {
        const Cpu policy(1, {.tokens_at_a_time = 16, .recompute = recompute});
        const auto module = drawn<Module>(policy);
        for (const Index length : {3, 11, 90}) {
            CAPTURE(length);
            auto in = inputs<Module>(policy, 2, length, true);
            auto d_out = normal<double>(policy, in.x.shape(), 99);
            fill_padding(d_out, in.of_x(), 0);
            const auto train = [&](double padding) {
                for (const auto& [tokens, mask] : in.tokens()) fill_padding(*tokens, mask, padding);
                restart_noise(module);
                return run(module, in, d_out);
            };
            const auto expected = train(0);
            const auto evaluated = evaluate(module, in);
            for (const double padding : {std::numeric_limits<double>::quiet_NaN(), HUGE_VAL, -HUGE_VAL}) {
                check_same_results(train(padding), expected);
                CHECK(same_bits(evaluate(module, in), evaluated));
            }
        }
    }
}

TEST_CASE_TEMPLATE("combinations: the same bits with any number of threads, in any memory, a second call asks for none",
                   Module, ALL_MODULES) {
    const Cpu one(1), two(2, Cpu::usual_plan, Allocations::together);
    filled<double>(two, std::array<Index, 1>{1 << 18}, std::numeric_limits<double>::quiet_NaN());
    const auto by_one = drawn<Module>(one), by_two = drawn<Module>(two);
    for (const bool masked : {false, true}) {
        const auto in = inputs<Module>(one, 3, 150, masked);
        const auto d_out = normal<double>(one, in.x.shape(), 99);
        const auto run_again = [&](const Module& module) {
            restart_noise(module);
            return run(module, in, d_out);
        };
        const auto expected = run_again(by_one);
        for (int call = 0; call < 2; ++call) check_same_results(run_again(by_two), expected);
        const auto allocations = two.workspace()->statistics().system_allocations;
        run_again(by_two);
        CHECK(two.workspace()->statistics().system_allocations == allocations);
    }
}

TEST_CASE_TEMPLATE("combinations: chunks of the light branch, saved or recomputed, equal the whole", Module,
                   ALL_MODULES) {
    const Cpu whole(1, {1000, false});
    for (const bool masked : {false, true}) {
        const auto in = inputs<Module>(whole, 2, 40, masked);
        const auto d_out = normal<double>(whole, in.x.shape(), 99);
        const auto by_whole = drawn<Module>(whole);
        restart_noise(by_whole);
        const auto expected = run(by_whole, in, d_out);
        for (const MemoryPlan plan : {MemoryPlan{1, false}, {1, true}, {17, false}, {17, true}, {1000, true}}) {
            const Cpu policy(1, plan);
            const auto module = drawn<Module>(policy);
            restart_noise(module);
            each_result(run(module, in, d_out), expected, [](const std::string& name, const auto& a, const auto& b) {
                CAPTURE(name);
                CHECK(relative_error(a, b) <= 1e-12);
            });
        }
    }
}

TEST_CASE_TEMPLATE("combinations: clones and files hold all that counts", Module, ALL_MODULES) {
    const Cpu policy(1);
    auto module = drawn<Module>(policy);
    const auto in = inputs<Module>(policy, 2, 11, true);
    const TemporaryFolder folder;
    save_parameters(policy, folder / "module", module);
    Module other(policy, Seed{2});
    CHECK_FALSE(same_bits(evaluate(other, in), evaluate(module, in)));
    load_parameters(policy, folder / "module", other);
    restart_noise(module);
    restart_noise(other);
    CHECK(same_bits(evaluate(other, in), evaluate(module, in)));
    const auto copy = clone(policy, module);
    CHECK(same_bits(evaluate(copy, in), evaluate(module, in)));

    AdamW optimizer(policy, module, {.lr = 0.1});
    const auto before = evaluate(module, in);
    const auto d_out = normal<double>(policy, in.x.shape(), 99);
    optimizer.step(module, run(module, in, d_out).gradients);
    CHECK_FALSE(same_bits(evaluate(module, in), before));
    restart_noise(copy);
    CHECK(same_bits(evaluate(copy, in), before));
}

TEST_CASE_TEMPLATE("combinations: no sequences, and sequences of no tokens", Module, ALL_MODULES) {
    const Cpu policy(2);
    const auto module = drawn<Module>(policy);
    for (const auto& [batch, length] : {std::array<Index, 2>{0, 11}, {0, 3}, {2, 0}, {0, 0}})
        for (const bool masked : {false, true}) {
            const auto in = inputs<Module>(policy, batch, length, false);
            Inputs with_masks{copy_of(policy, in.x), copy_of(policy, in.context), {}, {}};
            if (masked) {
                with_masks.mask = filled<bool>(policy, std::array<Index, 2>{batch, length}, true);
                with_masks.context_mask = filled<bool>(policy, std::array<Index, 2>{batch, in.context.extent(1)}, true);
            }
            const auto results = run(module, with_masks, in.x);
            CHECK(evaluate(module, with_masks).shape() == in.x.shape());
            CHECK(results.d_x.shape() == in.x.shape());
            Module::each_parameter(
                [](const std::string& name, const auto& gradient) {
                    CAPTURE(name);
                    CHECK(all_zero(gradient));
                },
                "", results.gradients);
        }
}
