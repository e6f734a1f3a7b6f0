// SPDX-License-Identifier: MIT
#include <limits>
#include <set>
#include <string>

#include "module/checks.hpp"

using namespace colt5;
using namespace support;

namespace {

constexpr ImageAttentionConfig with(RoutingScope scope, Index num_routed_kv, bool channel_first = false,
                                    RouterType type = RouterType::coor_descent) {
    return {.dim = 5,
            .num_heavy_tokens_q = 3,
            .num_heavy_tokens_kv = 4,
            .num_routed_kv = num_routed_kv,
            .light_dim_head = 2,
            .light_heads = 2,
            .light_window_size = 3,
            .heavy_dim_head = 3,
            .heavy_heads = 2,
            .router_straight_through = false,
            .router_type = type,
            .channel_first = channel_first,
            .routing_scope = scope,
            .use_null_kv = true,
            .use_null_q_tokens = true};
}
constexpr ImageAttentionConfig over_map = with(RoutingScope::map, 1), over_map_2 = with(RoutingScope::map, 2),
                               per_window = with(RoutingScope::window, 2), channels = with(RoutingScope::map, 1, true),
                               channels_per_window = with(RoutingScope::window, 1, true),
                               by_softmax = with(RoutingScope::map, 1, false, RouterType::cum_softmax),
                               by_sinkhorn = with(RoutingScope::map, 2, false, RouterType::sinkhorn);
template <ImageAttentionConfig config, typename Scalar = double>
using Image = ConditionalRoutedImageAttention<config, Scalar, Cpu>;
using InFloat = Image<over_map_2, float>;

/// (b, h, w, d), of maps (b, d, h, w).
HostTensor<double, 4> channels_last(const Cpu& policy, const HostTensor<double, 4>& maps) {
    const auto [batch, dim, height, width] = maps.shape();
    HostTensor<double, 4> out(policy, {batch, height, width, dim});
    for (Index b = 0; b < batch; ++b)
        for (Index c = 0; c < dim; ++c)
            for (Index y = 0; y < height; ++y)
                for (Index x = 0; x < width; ++x) out.view()(b, y, x, c) = maps.const_view()(b, c, y, x);
    return out;
}

/// By the definition, position by position, of maps (b, h, w, d).
template <typename Module>
HostTensor<double, 4> naive(const Module& module, const HostTensor<double, 4>& maps, MapMask mask, RoutingScope scope) {
    const Cpu policy(1);
    const auto& attention = module.attention;
    const auto& light = attention.light_attn.attention;
    const auto [batch, height, width, dim] = maps.shape();
    const auto is_real = [&](Index b, Index y, Index x) {
        return y < maps.extent(1) && x < maps.extent(2) && (!mask || mask(b, y, x));
    };
    const auto row = [&](Index b, Index y, Index x) {
        const double* const first = &maps.const_view()(b, y, x, 0);
        return Row(first, first + maps.extent(3));
    };
    constexpr Index side = 3;
    auto out = filled<double>(policy, maps.shape(), 0);
    for (Index b = 0; b < batch; ++b)
        for (Index y = 0; y < height; ++y)
            for (Index x = 0; x < width; ++x) {
                const Row qkv = evaluate(light.to_qkv, evaluate(light.norm, row(b, y, x)));
                Row attended;
                for (Index h = 0; h < 2; ++h) {
                    std::vector<Row> keys, values;
                    for (Index ky = y / side * side; ky < y / side * side + side; ++ky)
                        for (Index kx = x / side * side; kx < x / side * side + side; ++kx)
                            if (is_real(b, ky, kx)) {
                                const Row of_key = evaluate(light.to_qkv, evaluate(light.norm, row(b, ky, kx)));
                                keys.push_back(part(of_key, 4 + 2 * h, 2));
                                values.push_back(part(of_key, 8 + 2 * h, 2));
                            }
                    const Row of_head = attend(part(qkv, 2 * h, 2), keys, values, Row(keys.size(), 1.0));
                    attended.insert(attended.end(), of_head.begin(), of_head.end());
                }
                const Row projected = evaluate(light.to_out, attended);
                for (Index e = 0; e < dim; ++e) out.view()(b, y, x, e) = projected[static_cast<std::size_t>(e)];
            }

    // What is routed together: the map row by row, or each window with its padding.
    const Index step_y = scope == RoutingScope::map ? height : side, step_x = scope == RoutingScope::map ? width : side;
    for (Index b = 0; b < batch; ++b)
        for (Index top = 0; top < height; top += step_y)
            for (Index left = 0; left < width; left += step_x) {
                const Index n = step_y * step_x;
                auto tokens = filled<double>(policy, std::array{Index{1}, n, dim}, 0);
                HostTensor<bool, 2> real(policy, {1, n});
                const auto at = [&](Index i) { return MapPosition{top + i / step_x, left + i % step_x}; };
                bool all_real = true;
                for (Index i = 0; i < n; ++i) {
                    const auto [y, x] = at(i);
                    real.view()(0, i) = is_real(b, y, x);
                    all_real = all_real && real.view()(0, i);
                    if (real.view()(0, i)) std::copy_n(row(b, y, x).begin(), dim, &tokens.view()(0, i, 0));
                }
                const Mask of_group = all_real && !mask ? Mask() : Mask(real.const_view());
                const auto q = attention.q_router.route(policy, tokens.const_view(), of_group, 3);
                const auto kv = attention.kv_router.route(policy, tokens.const_view(), of_group, 4);
                const auto kv_mask = gather_mask(policy, of_group, kv.indices);
                const auto heavy = attention.heavy_attn.forward(policy, gather(policy, tokens, single_route(q.indices)),
                                                                gather(policy, tokens, kv.indices),
                                                                kv_mask.const_view(), kv.scores.const_view(), {});
                std::set<Index> queries;
                for (Index i = 0; i < q.indices.extent(2); ++i) {
                    const Index token = q.indices.const_view()(0, 0, i);
                    const auto [y, x] = at(token);
                    queries.insert(token);
                    if (!is_real(b, y, x)) continue;
                    for (Index e = 0; e < dim; ++e)
                        out.view()(b, y, x, e) += q.scores.const_view()(0, 0, i) * heavy.out.const_view()(0, i, e);
                }
                for (Index i = 0; i < n; ++i) {
                    const auto [y, x] = at(i);
                    if (queries.contains(i) || !is_real(b, y, x)) continue;
                    for (Index e = 0; e < dim; ++e) out.view()(b, y, x, e) += attention.null_q_token.data()[e];
                }
            }
    return out;
}

constexpr std::array<std::array<Index, 2>, 6> sizes{{{1, 1}, {2, 7}, {6, 6}, {5, 4}, {7, 8}, {3, 9}}};

template <typename Module>
std::array<Index, 4> shape_of(Index batch, Index height, Index width) {
    return Module::Maps::extents[1] == 5 ? std::array<Index, 4>{batch, 5, height, width}
                                         : std::array<Index, 4>{batch, height, width, 5};
}

/// Real at the top left, less in each map; nothing of the last.
HostTensor<bool, 3> some_real(const Cpu& policy, Index batch, Index height, Index width) {
    HostTensor<bool, 3> mask(policy, {batch, height, width});
    for (Index b = 0; b < batch; ++b)
        for (Index y = 0; y < height; ++y)
            for (Index x = 0; x < width; ++x)
                mask.view()(b, y, x) = b + 1 < batch && y < height - b && (x * 3 + y) % 4 != 1;
    return mask;
}

/// Training draws the noise of evaluation, the same for each sample.
struct DrawAsEvaluated {
    template <typename... T>
    void operator()(const std::string&, const T&...) const {}
    template <typename Noise>
    void noise(const std::string&, Noise& noise) const {
        noise.evaluates = true;
    }
};

}  // namespace

TEST_CASE("ConditionalRoutedImageAttention: by its definition, maps of any size, over the map and per window") {
    const Cpu policy(2);
    const auto check = [&]<ImageAttentionConfig config>(const Image<config>& module) {
        for (const auto& size : sizes) {
            const Index height = size[0], width = size[1];
            CAPTURE(height);
            CAPTURE(width);
            const auto maps = normal<double>(policy, shape_of<Image<config>>(3, height, width), 0);
            const auto some = some_real(policy, 3, height, width);
            for (const MapMask mask : {MapMask(), some.const_view()}) {
                const auto out = module(maps, mask);
                if constexpr (config.channel_first)
                    CHECK(relative_error(channels_last(policy, out), naive(module, channels_last(policy, maps), mask,
                                                                           config.routing_scope)) <= 1e-11);
                else
                    CHECK(relative_error(out, naive(module, maps, mask, config.routing_scope)) <= 1e-11);
            }
        }
    };
    check(Image<over_map>(policy, Seed{1}));
    check(Image<over_map_2>(policy, Seed{1}));
    check(Image<per_window>(policy, Seed{1}));
    check(Image<channels>(policy, Seed{1}));
    check(Image<channels_per_window>(policy, Seed{1}));
}

TEST_CASE_TEMPLATE("ConditionalRoutedImageAttention: gradients by finite differences" * not_sanitized, Module,
                   Image<over_map>, Image<per_window>, Image<channels>, Image<by_softmax>) {
    const Cpu policy(1);
    Module module(policy, Seed{1});
    for (const auto& [height, width] : {std::array<Index, 2>{4, 5}, std::array<Index, 2>{3, 6}}) {
        auto maps = normal<double>(policy, shape_of<Module>(2, height, width), 0, 0.7);
        const auto some = some_real(policy, 2, height, width);
        check_gradients_of(module, maps, MapMask());
        check_gradients_of(module, maps, MapMask(some.const_view()));
        check_gradients_of(module, maps, MapMask(some.const_view()), AttentionCounts{.num_heavy_tokens_q = 5},
                           Residual::tokens);
    }
}

TEST_CASE_TEMPLATE("ConditionalRoutedImageAttention: a batch gives each map the bits that it gets alone", Module,
                   Image<over_map>, Image<per_window>, Image<channels>, Image<by_sinkhorn>, InFloat) {
    using T = typename Module::Out::value_type;
    const Cpu policy(2);
    const Module module(policy, Seed{1});
    Module::each_parameter(DrawAsEvaluated(), "", module);
    for (const auto& [height, width] : {std::array<Index, 2>{1, 2}, std::array<Index, 2>{40, 31}}) {
        const auto maps = normal<T>(policy, shape_of<Module>(3, height, width), 0),
                   d_out = normal<T>(policy, maps.shape(), 1);
        const auto some = some_real(policy, 3, height, width);
        for (const MapMask mask : {MapMask(), some.const_view()}) {
            auto gradients = module.make_gradients();
            const auto together = module.forward(maps, mask);
            const auto d_maps = module.backward(together, d_out, gradients);
            CHECK(all_finite(together.out));
            CHECK(all_finite(d_maps));
            for (Index b = 0; b < 3; ++b) {
                const MapMask mask_alone = mask ? sequence(mask, b) : MapMask();
                auto alone = module.forward(sequence(maps, b), mask_alone);
                CHECK(same_bits(alone.out, sequence(together.out, b)));
                CHECK(same_bits(module(sequence(maps, b), mask_alone), alone.out));
                CHECK(same_bits(module.backward(std::move(alone), sequence(d_out, b), gradients), sequence(d_maps, b)));
            }
        }
    }
}

TEST_CASE_TEMPLATE(
    "ConditionalRoutedImageAttention: maps of several sizes, packed as windows, have the bits of each alone", Module,
    Image<channels>, InFloat) {
    using T = typename Module::Out::value_type;
    constexpr bool channel_first = Module::Maps::extents[1] == 5;
    const Cpu policy(2);
    const Module module(policy, Seed{1});
    const Ragged ragged(module.attention);
    const std::vector<std::array<Index, 2>> sizes_of_maps{{6, 9}, {3, 3}, {9, 6}, {12, 15}, {3, 3}};
    std::vector<Index> lengths;
    for (const auto& [height, width] : sizes_of_maps) lengths.push_back(height * width);
    const auto offsets = cumulative_lengths(lengths);
    HostTensor<T, 2> tokens(policy, {offsets.back(), 5}), d_out(policy, tokens.shape());
    std::vector<HostTensor<T, 4>> outs, d_maps;
    auto expected = module.make_gradients();
    for (std::size_t i = 0; i < lengths.size(); ++i) {
        const auto maps = normal<T>(policy, shape_of<Module>(1, sizes_of_maps[i][0], sizes_of_maps[i][1]), 2 * i),
                   d = normal<T>(policy, maps.shape(), 2 * i + 1);
        const WindowGrid grid = window_grid("maps", maps, 3, channel_first);
        const auto pack = [&](const auto& from, auto& to) {
            const auto of_windows = to_windows(policy, from, grid, channel_first);
            std::copy_n(of_windows.data(), of_windows.size(), to.view()[offsets[i]].data());
        };
        pack(maps, tokens);
        pack(d, d_out);
        auto saved = module.forward(maps);
        d_maps.push_back(module.backward(saved, d, expected));
        outs.push_back(std::move(saved.out));
    }
    auto gradients = module.make_gradients();
    const auto saved = ragged.forward(tokens, offsets);
    const auto d_tokens = ragged.backward(saved, d_out, gradients.attention);
    for (std::size_t i = 0; i < lengths.size(); ++i) {
        CAPTURE(i);
        const WindowGrid grid = window_grid("maps", outs[i], 3, channel_first);
        const auto of = [&](const auto& packed) {
            const auto part = packed.const_view().range(offsets[i], lengths[i]);
            return from_windows(policy, part.reshape(std::array{Index{1}, lengths[i], Index{5}}), grid, channel_first);
        };
        CHECK(same_bits(of(saved.out), outs[i]));
        CHECK(same_bits(of(d_tokens), d_maps[i]));
    }
    Module::each_parameter(
        [](const std::string&, const auto& a, const auto& b) {
            CHECK(relative_error(a, b) <= (std::is_same_v<T, float> ? 1e-5 : 1e-12));
        },
        "", gradients, expected);
}

TEST_CASE_TEMPLATE("ConditionalRoutedImageAttention: what stands in masked tokens is not seen", Module, Image<over_map>,
                   Image<per_window>, Image<channels>, Image<by_sinkhorn>) {
    const Cpu policy(2);
    const Module module(policy, Seed{1});
    Module::each_parameter(DrawAsEvaluated(), "", module);
    const Index height = 7, width = 8;
    const auto maps = normal<double>(policy, shape_of<Module>(2, height, width), 0);
    auto d_out = normal<double>(policy, maps.shape(), 1);
    const auto mask = some_real(policy, 2, height, width);
    auto other = copy_of(policy, maps);
    const auto each_entry = [&](const auto& body) {
        for (Index i = 0; i < maps.size(); ++i) {
            const Index at = Module::Maps::extents[1] == 5
                                 ? i / (5 * height * width) * height * width + i % (height * width)
                                 : i / 5;
            body(i, mask.data()[at]);
        }
    };
    each_entry([&](Index i, bool real) {
        if (!real) d_out.data()[i] = 0;  // whose output is read by nobody
        if (!real) other.data()[i] = i % 2 == 0 ? std::numeric_limits<double>::quiet_NaN() : 1e300;
    });
    auto gradients = module.make_gradients(), gradients_of_other = module.make_gradients();
    const auto saved = module.forward(maps, mask.const_view()),
               saved_of_other = module.forward(other, mask.const_view());
    const auto d = module.backward(saved, d_out, gradients),
               d_of_other = module.backward(saved_of_other, d_out, gradients_of_other);
    bool same = true;
    each_entry([&](Index i, bool real) {
        same = same &&
               (!real || (saved.out.data()[i] == saved_of_other.out.data()[i] && d.data()[i] == d_of_other.data()[i]));
    });
    CHECK(same);
}

TEST_CASE("ConditionalRoutedImageAttention: padding to whole windows is a mask") {
    const Cpu policy(2);
    const Image<over_map> module(policy, Seed{1});
    const auto maps = normal<double>(policy, std::array<Index, 4>{2, 4, 5, 5}, 0);
    auto padded = normal<double>(policy, std::array<Index, 4>{2, 6, 6, 5}, 1);
    auto mask = filled<bool>(policy, std::array<Index, 3>{2, 6, 6}, false);
    for (Index b = 0; b < 2; ++b)
        for (Index y = 0; y < 4; ++y) {
            std::copy_n(&maps.const_view()(b, y, 0, 0), 25, &padded.view()(b, y, 0, 0));
            std::fill_n(&mask.view()(b, y, 0), 5, true);
        }
    const auto out = module(maps), out_of_padded = module(padded, mask.const_view());
    for (Index b = 0; b < 2; ++b)
        for (Index y = 0; y < 4; ++y)
            for (Index i = 0; i < 25; ++i)
                CHECK((&out.const_view()(b, y, 0, 0))[i] == (&out_of_padded.const_view()(b, y, 0, 0))[i]);
}

TEST_CASE("ConditionalRoutedImageAttention: where the routers' choices are in the map") {
    const Cpu policy(2);
    const auto check = [&]<ImageAttentionConfig config>(const Image<config>& module, Index rows) {
        const auto maps = normal<double>(policy, std::array<Index, 4>{2, 5, 7, 5}, 0);
        const auto saved = module.forward(maps);
        std::set<std::string> names;
        saved.each_routing([&](const std::string& name, const auto& routing) {
            names.insert(name);
            CHECK(routing.indices.extent(0) == rows);
            for (Index row = 0; row < rows; ++row)
                for (Index i = 0; i < routing.indices.extent(2); ++i) {
                    if (routing.scores.const_view()(row, 0, i) == 0) continue;  // padding
                    const Index index = routing.indices.const_view()(row, 0, i);
                    const auto [y, x] = saved.position(row, index);
                    REQUIRE((y < 5 && x < 7));
                    const Index sequences = rows / 2, length = saved.grid.tokens() / sequences;
                    const double* const token =
                        &saved.tokens.const_view()(row / sequences, row % sequences * length + index, 0);
                    CHECK(std::equal(token, token + 5, &maps.const_view()(row / sequences, y, x, 0)));
                }
        });
        CHECK(names == std::set<std::string>{"q_router", "kv_router"});
    };
    check(Image<over_map>(policy, Seed{1}), 2);
    check(Image<per_window>(policy, Seed{1}), 12);
}

TEST_CASE("ConditionalRoutedImageAttention: the second call of a shape asks for no memory") {
    const Cpu policy(2, Cpu::usual_plan, Allocations::together);
    const Image<over_map> module(policy, Seed{1});
    const auto maps = normal<double>(policy, std::array<Index, 4>{2, 5, 7, 5}, 0);
    auto gradients = module.make_gradients();
    const auto step = [&] { module.backward(module.forward(maps), maps, gradients); };
    step();
    const auto allocations = policy.workspace()->statistics().system_allocations;
    step();
    CHECK(policy.workspace()->statistics().system_allocations == allocations);
}

TEST_CASE("ConditionalRoutedImageAttention: errors name the argument and both shapes") {
    const Cpu policy(1);
    const Image<over_map> module(policy, Seed{1});
    const auto maps = normal<double>(policy, std::array<Index, 4>{2, 5, 7, 5}, 0);
    const auto mask = random_mask(policy, std::array<Index, 3>{2, 7, 5}, 1);
    CHECK_THROWS_WITH_AS(module(maps, mask.const_view()), "colt5: `mask` must have shape (2, 5, 7), but has (2, 7, 5)",
                         ShapeError);
    CHECK_THROWS_WITH_AS(module(normal<double>(policy, std::array<Index, 4>{2, 5, 7, 4}, 0)),
                         "colt5: `maps` must have shape (any, any, any, 5), but has (2, 5, 7, 4)", ShapeError);
    CHECK_THROWS_WITH_AS(module(maps, {}, {.num_heavy_tokens_q = 0}),
                         "colt5: `num_heavy_tokens_q` must be >= 1, but is 0", ValueError);
    auto gradients = module.make_gradients();
    auto saved = module.forward(maps);
    CHECK_THROWS_WITH_AS(module.backward(saved, normal<double>(policy, std::array<Index, 4>{2, 7, 5, 5}, 0), gradients),
                         "colt5: `d_out` must have shape (2, 5, 7, 5), but has (2, 7, 5, 5)", ShapeError);
    module.backward(std::move(saved), maps, gradients);
    CHECK_THROWS_AS(module.backward(saved, maps, gradients), ValueError);
}
