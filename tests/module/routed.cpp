// SPDX-License-Identifier: MIT
#include <colt5/module/routed.hpp>

#include <algorithm>
#include <numeric>
#include <type_traits>

#include "module/checks.hpp"

/// Routed, with branches of the library and branches as a user would write them.

using namespace colt5;
using namespace support;

namespace {

/// A branch in its plain form:  out_i = gamma ∘ x_i
template <typename Scalar, typename P>
struct Diagonal {
    using Gradients = RMSNorm<accumulate_t<Scalar>, P>;
    struct Activations {};

    VectorTensor<Scalar, P> gamma;  // (12)

    Diagonal(const P& policy, SeedSequence& seeds) : gamma(policy, {12}) { fill_normal(policy, gamma, seeds.next()); }

    Activations forward(const P& policy, TokensView<Scalar> out, TokensView<const Scalar> x, bool) const {
        assign(policy, out, x * row(gamma));
        return {};
    }
    void backward(const P& policy, const Activations&, TokensView<Scalar> d_x, TokensView<const Scalar> d_out,
                  TokensView<const Scalar> x, Gradients& gradients) const {
        assign(policy, d_x, d_out * row(gamma));
        for (Index i = 0; i < x.size(); ++i) gradients.gamma.data()[i % 12] += d_out.data()[i] * x.data()[i];
    }
    template <typename F, typename... M>
    static void each_parameter(F&& f, const std::string& prefix, M&... m) {
        f(prefix + "gamma", m.gamma...);
    }
};

/// A branch whose tokens see each other, those that are real:  out_i = gamma ∘ (x_i − x_before(i)), where before(i) is
/// the real token before i, or none. What it saves tells whether it was told to.
template <typename Scalar, typename P>
struct Difference {
    using Gradients = RMSNorm<accumulate_t<Scalar>, P>;
    struct Activations {
        TokensTensor<Scalar, P> difference;  // (b, n, d)
    };

    VectorTensor<Scalar, P> gamma;  // (12)

    Difference(const P& policy, SeedSequence& seeds) : gamma(policy, {12}) { fill_normal(policy, gamma, seeds.next()); }

    static Index before(Mask mask, Index b, Index i) {
        do --i;
        while (i >= 0 && mask && !mask(b, i));
        return i;
    }

    Activations forward(const P& policy, TokensView<Scalar> out, TokensView<const Scalar> x, Mask mask,
                        bool save) const {
        auto difference = tensor_like(policy, x);
        for (Index b = 0; b < x.extent(0); ++b)
            for (Index i = 0; i < x.extent(1); ++i) {
                const Index j = before(mask, b, i);
                for (Index e = 0; e < 12; ++e)
                    difference.view()(b, i, e) = x(b, i, e) - (j < 0 ? Scalar(0) : x(b, j, e));
            }
        assign(policy, out, difference * row(gamma));
        if (!save) return {};
        return {std::move(difference)};
    }
    void backward(const P& policy, const Activations& saved, TokensView<Scalar> d_x, TokensView<const Scalar> d_out,
                  TokensView<const Scalar> x, Mask mask, Gradients& gradients) const {
        CHECK(saved.difference.shape() == x.shape());
        set_zero(policy, d_x);
        for (Index b = 0; b < x.extent(0); ++b)
            for (Index i = 0; i < x.extent(1); ++i) {
                const Index j = before(mask, b, i);
                for (Index e = 0; e < 12; ++e) {
                    const Scalar d = d_out(b, i, e) * gamma.data()[e];
                    d_x(b, i, e) += d;
                    if (j >= 0) d_x(b, j, e) -= d;
                    gradients.gamma.data()[e] += d_out(b, i, e) * saved.difference.const_view()(b, i, e);
                }
            }
    }
    template <typename F, typename... M>
    static void each_parameter(F&& f, const std::string& prefix, M&... m) {
        f(prefix + "gamma", m.gamma...);
    }
};

/// Light attention as a branch, with a small window.
template <typename Scalar, typename P>
struct Window : LightAttention<Scalar, P> {
    Window(const P& policy, SeedSequence& seeds) : LightAttention<Scalar, P>(policy, seeds, 12, 2, 4, {.reach = 3}) {}
};

static_assert(TokenModule<Diagonal<double, Cpu>, double, Cpu>);
static_assert(TokenModule<Difference<float, Cpu>, float, Cpu>);
static_assert(TokenModule<Window<double, Cpu>, double, Cpu>);
static_assert(TokenModule<SizedFeedForward<12, 7, float, Cpu>, float, Cpu>);
static_assert(TokenModule<NoLight<float, Cpu>, float, Cpu>);
static_assert(!TokenModule<FeedForward<float, Cpu>, float, Cpu>);  // knows no sizes
static_assert(!TokenModule<Diagonal<double, Cpu>, float, Cpu>);

constexpr RoutedConfig one_route(RouterType type = RouterType::coor_descent, bool sequence_order = false) {
    return {.dim = 12,
            .num_heavy_tokens = 5,
            .sequence_order = sequence_order,
            .router_straight_through = false,
            .router_type = type,
            .router_kwargs = {.coor_descent = {.score_scale = 0.3}}};
}
constexpr RoutedConfig routes(Index count, RouterType type = RouterType::coor_descent, bool shared = false) {
    RoutedConfig config = one_route(type);
    config.num_routes = count;
    config.shared_heavy = shared;
    return config;
}
constexpr RoutedConfig by_descent = one_route(), by_softmax = one_route(RouterType::cum_softmax),
                       in_order = one_route(RouterType::coor_descent, true), three = routes(3),
                       three_by_softmax = routes(3, RouterType::cum_softmax),
                       two_by_sinkhorn = routes(2, RouterType::sinkhorn),
                       two_shared = routes(2, RouterType::coor_descent, true), two_in_order = [] {
                           RoutedConfig config = routes(2);
                           config.sequence_order = true;
                           return config;
                       }();

template <typename T>
using Expert = SizedFeedForward<12, 7, T, Cpu>;
template <typename T>
using Small = SizedFeedForward<12, 3, T, Cpu>;

template <typename T>
using Experts = Routed<three, T, Cpu, Expert<T>, Small<T>>;
template <typename T>
using ExpertsBySoftmax = Routed<three_by_softmax, T, Cpu, Expert<T>>;
template <typename T>
using ExpertsBySinkhorn = Routed<two_by_sinkhorn, T, Cpu, Expert<T>, Diagonal<T, Cpu>>;
template <typename T>
using OneExpert = Routed<two_shared, T, Cpu, Expert<T>, Small<T>>;
template <typename T>
using Alone = Routed<by_softmax, T, Cpu, Difference<T, Cpu>>;
template <typename T>
using InOrder = Routed<in_order, T, Cpu, Difference<T, Cpu>, Diagonal<T, Cpu>>;
template <typename T>
using BothInOrder = Routed<two_in_order, T, Cpu, Difference<T, Cpu>, Small<T>>;
template <typename T>
using BesideWindow = Routed<by_descent, T, Cpu, Diagonal<T, Cpu>, Window<T, Cpu>>;
template <typename T>
using BesideDifference = Routed<by_descent, T, Cpu, Window<T, Cpu>, Difference<T, Cpu>>;

constexpr TransformerBlockConfig block_config{.dim = 12,
                                              .num_heavy_attn_tokens_q = 3,
                                              .num_heavy_attn_tokens_kv = 4,
                                              .num_heavy_ff_tokens = 3,
                                              .light_dim_head = 4,
                                              .light_heads = 2,
                                              .light_window_size = 4,
                                              .heavy_dim_head = 4,
                                              .heavy_heads = 2,
                                              .heavy_ff_mult = 1,
                                              .router_straight_through = false,
                                              .router_kwargs = {.coor_descent = {.score_scale = 0.3}}};
template <typename T>
using Block = ConditionalRoutedTransformerBlock<block_config, T, Cpu>;
template <typename T>
using Depths = Routed<in_order, T, Cpu, AsBranch<Block<T>>>;
template <typename T>
using BlockBeside = Routed<by_descent, T, Cpu, Expert<T>, AsBranch<Block<T>>>;

/// Rows of a sequence, and which of them are real.
using Rows = std::vector<Row>;
using Real = std::vector<bool>;

Rows evaluate(const FeedForward<double, Cpu>& branch, Rows x, const Real&) {
    for (Row& row : x) row = support::evaluate(branch, row);
    return x;
}
Rows evaluate(const NoLight<double, Cpu>&, Rows x, const Real&) {
    for (Row& row : x) row.assign(row.size(), 0);
    return x;
}
Rows evaluate(const Diagonal<double, Cpu>& branch, Rows x, const Real&) {
    for (Row& row : x)
        for (std::size_t e = 0; e < row.size(); ++e) row[e] *= branch.gamma.data()[e];
    return x;
}
Rows evaluate(const Difference<double, Cpu>& branch, const Rows& x, const Real& real) {
    Rows out = x;
    Row before(12, 0.0);
    for (std::size_t i = 0; i < x.size(); ++i) {
        for (std::size_t e = 0; e < 12; ++e) out[i][e] = branch.gamma.data()[e] * (x[i][e] - before[e]);
        if (real[i]) before = x[i];
    }
    return out;
}

template <typename Module>
const auto& heavy_of(const Module& module, Index route) {
    if constexpr (requires { module.heavy[0]; })
        return module.heavy[static_cast<std::size_t>(route)];
    else
        return module.heavy;
}

/// What Routed computes, as loops over the routes and tokens of each sequence.
template <typename Module>
TokensTensor<double, Cpu> naive(const Module& module, bool sorted, const TokensTensor<double, Cpu>& x, Mask mask,
                                Index k, Residual residual) {
    const Cpu& policy = module.policy();
    const auto routing = module.router.route(policy, x.const_view(), mask, k);
    const auto indices = routing.indices.const_view();
    auto out = tensor_like(policy, x);
    for (Index b = 0; b < x.extent(0); ++b) {
        Rows all;
        Real real;
        for (Index i = 0; i < x.extent(1); ++i) {
            all.push_back(row_of(x, b, i));
            real.push_back(!mask || mask(b, i));
        }
        Rows sum = evaluate(module.light, all, real);
        if (residual == Residual::tokens)
            for (std::size_t i = 0; i < all.size(); ++i)
                for (std::size_t e = 0; e < 12; ++e) sum[i][e] += all[i][e];
        for (Index r = 0; r < indices.extent(1); ++r) {
            std::vector<Index> picks(static_cast<std::size_t>(indices.extent(2)));
            std::iota(picks.begin(), picks.end(), Index{0});
            if (sorted)
                std::sort(picks.begin(), picks.end(),
                          [&](Index a, Index c) { return indices(b, r, a) < indices(b, r, c); });
            Rows picked;
            Real picked_real;
            for (const Index j : picks) {
                picked.push_back(all[static_cast<std::size_t>(indices(b, r, j))]);
                picked_real.push_back(real[static_cast<std::size_t>(indices(b, r, j))]);
            }
            const Rows heavy = evaluate(heavy_of(module, r), picked, picked_real);
            for (std::size_t j = 0; j < picks.size(); ++j) {
                const Index token = indices(b, r, picks[j]);
                const TokenIndex* const first = indices[b][r].data();
                const auto same =
                    static_cast<double>(std::count(first, first + indices.extent(2), static_cast<TokenIndex>(token)));
                for (std::size_t e = 0; e < 12; ++e)
                    sum[static_cast<std::size_t>(token)][e] +=
                        routing.scores.const_view()(b, r, picks[j]) / same * heavy[j][e];
            }
        }
        for (Index i = 0; i < x.extent(1); ++i)
            std::copy_n(sum[static_cast<std::size_t>(i)].data(), 12, out.view()[b][i].data());
    }
    return out;
}

/// A module of seed 1; a Sinkhorn router gets noise that stays.
template <typename Module>
struct Made {
    explicit Made(const Cpu& policy) : module(policy, Seed{1}) {}
    void draw(Index batch, Index k, Index length) {
        if constexpr (Module::TokenRouter::picks_repeat) {
            const Index routes = module.router.routing_token.extent(0);
            noise = HostTensor<double, 3>(module.policy(), {batch * routes, k, length});
            const Random random(Seed{5});
            fill_with(module.policy(), noise, [&](std::size_t i) { return random.gumbel(i); });
            module.router.noise = GumbelNoise<double>::given(noise.const_view());
        }
    }
    Module module;
    HostTensor<double, 3> noise;
};

}  // namespace

TEST_CASE_TEMPLATE("Routed: light for all, heavy for the chosen of each route", Module, Experts<double>,
                   ExpertsBySoftmax<double>, ExpertsBySinkhorn<double>, OneExpert<double>, Alone<double>,
                   InOrder<double>, BothInOrder<double>) {
    constexpr bool sorted = std::is_same_v<Module, InOrder<double>> || std::is_same_v<Module, BothInOrder<double>>;
    const Cpu policy(2);
    Made<Module> made(policy);
    const auto x = normal<double>(policy, std::array<Index, 3>{2, 9, 12}, 0);
    const auto some = random_mask(policy, std::array<Index, 2>{2, 9}, 1);
    for (const Mask mask : {Mask(), some.const_view()})
        for (const Index k : {1, 3, 9, 12})
            for (const Residual residual : {Residual::none, Residual::tokens}) {
                CAPTURE(k);
                made.draw(2, std::min<Index>(k, 9), 9);
                const auto out = made.module(x, mask, RoutedCounts{k}, residual);
                CHECK(relative_error(out, naive(made.module, sorted, x, mask, k, residual)) <= 1e-12);
                CHECK(same_bits(made.module.forward(x, mask, RoutedCounts{k}, residual).out, out));
            }
}

TEST_CASE_TEMPLATE("Routed: gradients by finite differences" * not_sanitized, Module, Experts<double>,
                   ExpertsBySoftmax<double>, ExpertsBySinkhorn<double>, OneExpert<double>, Alone<double>,
                   InOrder<double>, BothInOrder<double>, BesideWindow<double>, BesideDifference<double>, Depths<double>,
                   BlockBeside<double>) {
    for (const bool recompute : {false, true}) {
        CAPTURE(recompute);
        const Cpu policy(1, {.tokens_at_a_time = 64, .recompute = recompute});
        Made<Module> made(policy);
        auto x = normal<double>(policy, std::array<Index, 3>{2, 7, 12}, 0, 0.7);
        const auto mask = mask_of_lengths(policy, {6, 2}, 7);
        made.draw(2, 5, 7);
        check_gradients(made.module, x, {}, RoutedCounts{}, Residual::tokens);
        check_gradients(made.module, x, mask.const_view());
        if (recompute) continue;
        made.draw(2, 3, 7);
        check_gradients(made.module, x, mask.const_view(), RoutedCounts{.num_heavy_tokens = 3}, Residual::tokens);
        for (const Index length : {1, 3}) {  // n <= k
            auto shorter = resized(policy, x, length);
            made.draw(2, length, length);
            const auto shorter_mask = mask_of_lengths(policy, {length, 0}, length);
            check_gradients(made.module, shorter, shorter_mask.const_view());
        }
    }
}

TEST_CASE_TEMPLATE("Routed: a batch gives what its sequences give alone, bit for bit", T, float, double) {
    const auto check = []<typename Module>(std::type_identity<Module>) {
        const Cpu one(1), two(2);
        const Module module(two, Seed{1}), by_one(one, Seed{1});
        for (const Index length : {1, 30, 400}) {
            CAPTURE(length);
            const std::array<Index, 3> shape{3, length, 12};
            const auto x = normal<T>(two, shape, 0), d_out = normal<T>(two, shape, 1);
            const auto some = mask_of_lengths(two, {length, length * 2 / 3, 0}, length);
            for (const Mask mask : {Mask(), some.const_view()}) {
                auto gradients = module.make_gradients(), again = module.make_gradients(),
                     of_one = by_one.make_gradients();
                const auto saved = module.forward(x, mask);
                const auto d_x = module.backward(saved, d_out, gradients);
                CHECK(all_finite(saved.out));
                CHECK(all_finite(d_x));
                CHECK(same_bits(module(x, mask), saved.out));
                CHECK(same_bits(module.backward(module.forward(x, mask), d_out, again), d_x));
                CHECK(same_bits(by_one.backward(by_one.forward(x, mask), d_out, of_one), d_x));
                Module::each_parameter(
                    [](const std::string& name, const auto& a, const auto& b, const auto& c) {
                        CAPTURE(name);
                        CHECK(same_bits(a, b));
                        CHECK(same_bits(a, c));
                    },
                    "", gradients, again, of_one);
                for (Index b = 0; b < 3; ++b) {
                    const auto x_alone = copy_of(two, sequence(x, b)), d_alone = copy_of(two, sequence(d_out, b));
                    const auto alone = module.forward(x_alone, mask ? sequence(mask, b) : Mask());
                    CHECK(same_bits(alone.out, sequence(saved.out, b)));
                    CHECK(same_bits(module.backward(alone, d_alone, again), sequence(d_x, b)));
                }
            }
        }
    };
    check(std::type_identity<Experts<T>>());
    check(std::type_identity<BothInOrder<T>>());
    check(std::type_identity<Depths<T>>());
    check(std::type_identity<BesideDifference<T>>());
}

TEST_CASE_TEMPLATE("Routed: what padding holds changes nothing", Module, Experts<float>, Alone<double>,
                   BothInOrder<double>, BesideDifference<float>, Depths<double>, BlockBeside<double>) {
    using T = typename Module::Out::value_type;
    const Cpu policy(2);
    const Module module(policy, Seed{1});
    auto mask = random_mask(policy, std::array<Index, 2>{2, 40}, 5);
    std::fill_n(mask.view()[1].data() + 3, 37, false);  // fewer real tokens than are routed
    auto x = normal<T>(policy, std::array<Index, 3>{2, 40, 12}, 0), d_out = normal<T>(policy, x.shape(), 1);
    const auto fill_padding = [&](auto& tokens, T value) {
        for (Index i = 0; i < mask.size(); ++i)
            if (!mask.data()[i]) std::fill_n(tokens.data() + i * 12, 12, value);
    };
    fill_padding(d_out, 0);
    const auto train = [&](auto& gradients) {
        auto saved = module.forward(x, mask, {}, Residual::tokens);
        auto out = copy_of(policy, saved.out);
        fill_padding(out, 0);
        return std::pair(std::move(out), module.backward(std::move(saved), d_out, gradients));
    };
    fill_padding(x, 0);
    auto expected = module.make_gradients();
    const auto [out, d_x] = train(expected);
    for (const T poison : {std::numeric_limits<T>::quiet_NaN(), std::numeric_limits<T>::infinity(), T(-3), T(3e30)}) {
        CAPTURE(poison);
        fill_padding(x, poison);
        auto gradients = module.make_gradients();
        const auto [out_now, d_x_now] = train(gradients);
        CHECK(same_bits(out_now, out));
        CHECK(same_bits(d_x_now, d_x));
        Module::each_parameter(
            [](const std::string& name, const auto& a, const auto& b) {
                CAPTURE(name);
                CHECK(same_bits(a, b));
            },
            "", gradients, expected);
    }
}

TEST_CASE("Routed: a block that gets every token in order, with scores of 1, is the block") {
    static constexpr RoutedConfig all{.dim = 12, .num_heavy_tokens = 1000, .sequence_order = true};
    const Cpu policy(2);
    const Routed<all, float, Cpu, AsBranch<Block<float>>> module(policy, Seed{1});
    const auto x = normal<float>(policy, std::array<Index, 3>{2, 50, 12}, 0);
    const auto mask = mask_of_lengths(policy, {50, 31}, 50);
    const auto d_out = normal<float>(policy, x.shape(), 1);
    const Block<float>& block = module.heavy;
    CHECK(same_bits(module(x), block(x)));
    CHECK(module.forward(x, {}, {}, Residual::tokens).out.data()[7] == block(x).data()[7] + x.data()[7]);
    auto gradients = module.make_gradients();
    auto of_block = block.make_gradients();
    const auto saved = module.forward(x, mask);
    module.backward(saved, d_out, gradients);
    auto d_real = copy_of(policy, d_out);
    std::fill_n(d_real.data() + (50 + 31) * 12, 19 * 12, 0.0f);
    block.backward(block.forward(x, mask), d_real, of_block);
    Block<float>::each_parameter(
        [](const std::string& name, const auto& a, const auto& b) {
            CAPTURE(name);
            CHECK(same_bits(a, b));
        },
        "", gradients.heavy, of_block);
}

TEST_CASE("Routed: parameters are named by branch and route, and drawn in that order") {
    const Cpu policy(1);
    const auto names_of = [](const auto& module) {
        std::vector<std::string> names;
        std::remove_cvref_t<decltype(module)>::each_parameter(
            [&](const std::string& name, const auto&) { names.push_back(name); }, "m.", module);
        return names;
    };
    CHECK(names_of(InOrder<float>(policy)) ==
          std::vector<std::string>{"m.router.routing_token", "m.light.gamma", "m.heavy.gamma"});
    CHECK(names_of(Alone<float>(policy)) == std::vector<std::string>{"m.router.routing_token", "m.heavy.gamma"});
    CHECK(names_of(BothInOrder<float>(policy)) ==
          std::vector<std::string>{"m.router.routing_token", "m.light.0.gamma", "m.light.1.weight", "m.light.1.bias",
                                   "m.light.3.weight", "m.light.3.bias", "m.heavy.0.gamma", "m.heavy.1.gamma"});
    const BothInOrder<float> module(policy, Seed{3});
    CHECK(!same_bits(module.heavy[0].gamma, module.heavy[1].gamma));
    const auto copy = clone(policy, module);
    CHECK(same_bits(copy.heavy[1].gamma, module.heavy[1].gamma));
    int routers = 0;
    const auto x = normal<float>(policy, std::array<Index, 3>{2, 9, 12}, 0);
    module.forward(x).each_routing(
        [&](const std::string& name, const auto& routing) {
            ++routers;
            CHECK(name == "m.router");
            CHECK(routing.indices.shape() == std::array<Index, 3>{2, 2, 5});
            CHECK(routing.scores.shape() == std::array<Index, 3>{2, 2, 5});
        },
        "m.");
    CHECK(routers == 1);
}

TEST_CASE("Routed: errors name the argument, and leave the gradients as they were") {
    const Cpu policy(1);
    Experts<float> module(policy);
    const auto x = normal<float>(policy, std::array<Index, 3>{2, 4, 12}, 0);
    const auto wide = normal<float>(policy, std::array<Index, 3>{2, 4, 13}, 0);
    const auto mask = random_mask(policy, std::array<Index, 2>{2, 3}, 1);
    CHECK_THROWS_WITH_AS(module(wide), "colt5: `tokens` must have shape (any, any, 12), but has (2, 4, 13)",
                         ShapeError);
    CHECK_THROWS_WITH_AS(module(x, mask.const_view()), "colt5: `mask` must have shape (2, 4), but has (2, 3)",
                         ShapeError);
    CHECK_THROWS_WITH_AS(module(x, {}, {.num_heavy_tokens = 0}), "colt5: `num_heavy_tokens` must be >= 1, but is 0",
                         ValueError);
    const auto saved = module.forward(x);
    auto gradients = module.make_gradients();
    CHECK_THROWS_WITH_AS(module.backward(saved, wide, gradients),
                         "colt5: `d_out` must have shape (any, any, 12), but has (2, 4, 13)", ShapeError);
    gradients.heavy[2].hidden.bias = {policy, {6}};
    CHECK_THROWS_WITH_AS(module.backward(saved, x, gradients),
                         "colt5: `gradients.heavy.2.hidden.bias` must have shape (7), but has (6)", ShapeError);
    CHECK(all_zero(gradients.router.routing_token));
    const Experts<float> other(policy);
    auto right = module.make_gradients();
    CHECK_THROWS_WITH_AS(module.backward(other.forward(x), x, right),
                         "colt5: `saved` must be of this module, but is of another one of its type", ValueError);
    module.heavy[1].project.bias = {policy, {13}};
    CHECK_THROWS_WITH_AS(module(x), "colt5: `heavy.1.project.bias` must have shape (12), but has (13)", ShapeError);
}

TEST_CASE("Routed: no tokens, no sequences") {
    const Cpu policy(2);
    for (const auto& shape : {std::array<Index, 3>{2, 0, 12}, std::array<Index, 3>{0, 5, 12}}) {
        const TokensTensor<float, Cpu> x(policy, shape);
        const auto check = [&](const auto& module) {
            auto gradients = module.make_gradients();
            CHECK(module.backward(module.forward(x), x, gradients).shape() == shape);
            CHECK(module(x).shape() == shape);
        };
        check(Experts<float>(policy));
        check(BothInOrder<float>(policy));
        check(Depths<float>(policy));
    }
}
