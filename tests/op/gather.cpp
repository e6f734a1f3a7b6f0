// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include <colt5/cpu/expr.hpp>
#include <colt5/cpu/gather.hpp>

#include "support/tensors.hpp"

using namespace colt5;
using namespace support;

namespace {

// batch, picks, length, dim: picks around the chunks of 64 rows, widths around the blocks of 128 columns.
constexpr std::array<std::array<Index, 4>, 9> shapes{{{1, 1, 1, 1},
                                                      {2, 3, 5, 7},
                                                      {3, 65, 9, 127},
                                                      {2, 64, 100, 128},
                                                      {2, 130, 40, 300},
                                                      {1, 0, 5, 3},
                                                      {2, 0, 0, 3},
                                                      {0, 2, 5, 3},
                                                      {2, 3, 5, 0}}};

/// Picks with repetitions, if there are more picks than tokens or by chance.
template <std::size_t rank>
HostTensor<TokenIndex, rank> random_indices(const Cpu& policy, const std::array<Index, rank>& shape, Index length) {
    HostTensor<TokenIndex, rank> indices(policy, shape);
    const Random random(Seed{5});
    fill_with(policy, indices, [&](std::size_t i) { return random.uniform(i) * static_cast<double>(length); });
    return indices;
}

/// Each token at most once.
HostTensor<TokenIndex, 2> distinct_indices(const Cpu& policy, Index batch, Index picks) {
    HostTensor<TokenIndex, 2> indices(policy, {batch, picks});
    fill_with(policy, indices, [&](std::size_t i) { return 2 * (static_cast<Index>(i) * 7 % picks) + 1; });
    return indices;
}

template <typename T>
TokensTensor<T, Cpu> naive_scatter(const Cpu& policy, Scatter how, const TokensTensor<T, Cpu>& before,
                                   const TokensTensor<T, Cpu>& rows, const HostTensor<TokenIndex, 2>& indices) {
    auto out = copy_of(policy, before);
    const auto [batch, length, dim] = out.shape();
    for (Index b = 0; b < batch; ++b)
        for (Index token = 0; token < length; ++token)
            for (Index j = 0; j < dim; ++j) {
                double sum = 0, last = static_cast<double>(before.view()(b, token, j));
                int count = 0;
                for (Index i = 0; i < indices.extent(1); ++i)
                    if (indices.view()(b, i) == token) {
                        last = static_cast<double>(rows.view()(b, i, j));
                        sum += last;
                        ++count;
                    }
                const auto old = static_cast<double>(before.view()(b, token, j));
                const double mean = count > 0 ? sum / count : 0;
                out.view()(b, token, j) = static_cast<T>(how == Scatter::add    ? old + sum
                                                         : how == Scatter::mean ? old + mean
                                                                                : last);
            }
    return out;
}

TokensTensor<TokenIndex, Cpu> indices_of(const Cpu& policy, const std::array<Index, 3>& shape,
                                         std::vector<TokenIndex> values) {
    return from_host<TokensTensor<TokenIndex, Cpu>>(policy, shape, values);
}

}  // namespace

TEST_CASE("gather: picks rows, one or several routes") {
    const Cpu policy(2);
    for (const auto& shape : shapes) {
        CAPTURE(shape_string(shape));
        const auto [batch, picks, length, dim] = shape;
        const auto x = normal<float>(policy, std::array{batch, length, dim}, 0);
        const auto indices = random_indices(policy, std::array{batch, picks}, length);
        const auto out = gather(policy, x, indices);
        CHECK(out.shape() == std::array{batch, picks, dim});
        bool same = true;
        for (Index b = 0; b < batch; ++b)
            for (Index i = 0; i < picks; ++i)
                for (Index j = 0; j < dim; ++j)
                    same = same && out.view()(b, i, j) == x.view()(b, indices.view()(b, i), j);
        CHECK(same);

        const auto routed = random_indices(policy, std::array{batch, Index{3}, picks}, length);
        const auto routed_out = gather(policy, x, routed);
        CHECK(routed_out.shape() == std::array{batch, Index{3}, picks, dim});
        for (Index b = 0; b < batch; ++b)
            for (Index r = 0; r < 3; ++r)
                for (Index i = 0; i < picks; ++i)
                    for (Index j = 0; j < dim; ++j)
                        same = same && routed_out.view()(b, r, i, j) == x.view()(b, routed.view()(b, r, i), j);
        CHECK(same);
    }
}

TEST_CASE("gather: its gradient is that of finite differences and accumulates") {
    const Cpu policy(1);
    auto x = normal<double>(policy, std::array<Index, 3>{2, 5, 3}, 0);
    const auto indices = random_indices(policy, std::array<Index, 3>{2, 2, 9}, 5);
    const auto d_out = normal<double>(policy, std::array<Index, 4>{2, 2, 9, 3}, 1);
    auto d_x = filled<double>(policy, x.shape(), 0), more = filled<double>(policy, x.shape(), 3);
    gather_vjp(policy, d_x.view(), d_out, indices);
    const auto loss = [&] { return inner(d_out, gather(policy, x, indices)); };
    CHECK(relative_error(d_x, finite_differences(policy, x, loss)) <= 1e-9);
    gather_vjp(policy, more.view(), d_out, indices);
    for (Index i = 0; i < d_x.size(); ++i) d_x.data()[i] += 3;
    CHECK(relative_error(more, d_x) <= 1e-14);
}

TEST_CASE("gather_mask: the mask at the chosen tokens, or nothing") {
    const Cpu policy(2);
    const auto mask = random_mask(policy, std::array<Index, 2>{2, 7}, 0);
    const auto indices = random_indices(policy, std::array<Index, 3>{2, 3, 5}, 7);
    const auto picked = gather_mask(policy, Mask(mask), indices);
    REQUIRE(picked.shape() == indices.shape());
    for (Index b = 0; b < 2; ++b)
        for (Index r = 0; r < 3; ++r)
            for (Index i = 0; i < 5; ++i) CHECK(picked.view()(b, r, i) == mask.view()(b, indices.view()(b, r, i)));
    CHECK_FALSE(gather_mask(policy, Mask{}, indices));
}

TEST_CASE("scatter: adds, averages or overwrites, as a loop does") {
    const Cpu policy(2);
    for (const auto& shape : shapes) {
        CAPTURE(shape_string(shape));
        const auto [batch, picks, length, dim] = shape;
        const auto before = normal<double>(policy, std::array{batch, length, dim}, 0);
        const auto rows = normal<double>(policy, std::array{batch, picks, dim}, 1);
        const auto indices = random_indices(policy, std::array{batch, picks}, length);
        const auto before_f = normal<float>(policy, before.shape(), 0);
        const auto rows_f = normal<float>(policy, rows.shape(), 1);
        for (const Scatter how : {Scatter::add, Scatter::mean, Scatter::overwrite}) {
            CAPTURE(static_cast<int>(how));
            auto out = copy_of(policy, before);
            scatter(policy, how, out.view(), rows, indices);
            CHECK(relative_error(out, naive_scatter(policy, how, before, rows, indices)) <= 1e-14);
            auto out_f = copy_of(policy, before_f);
            scatter(policy, how, out_f.view(), rows_f, indices);
            CHECK(relative_error(out_f, out) <= 2e-6);
        }
    }
}

TEST_CASE("scatter: a scale multiplies each row before rows are combined") {
    const Cpu policy(2);
    for (const auto& shape : shapes) {
        CAPTURE(shape_string(shape));
        const auto [batch, picks, length, dim] = shape;
        const auto before = normal<double>(policy, std::array{batch, length, dim}, 0);
        const auto rows = normal<double>(policy, std::array{batch, picks, dim}, 1);
        const auto scale = normal<double>(policy, std::array{batch, picks}, 2);
        const auto indices = random_indices(policy, std::array{batch, picks}, length);
        auto scaled = copy_of(policy, rows);
        for (Index b = 0; b < batch; ++b)
            for (Index i = 0; i < picks; ++i)
                for (Index j = 0; j < dim; ++j) scaled.view()(b, i, j) *= scale.view()(b, i);
        for (const Scatter how : {Scatter::add, Scatter::mean, Scatter::overwrite}) {
            CAPTURE(static_cast<int>(how));
            auto out = copy_of(policy, before);
            scatter(policy, how, out.view(), rows, indices, scale);
            CHECK(relative_error(out, naive_scatter(policy, how, before, scaled, indices)) <= 1e-14);
        }
    }
}

TEST_CASE("scatter: a row with a scale of 0 changes no bit, whatever it holds, unless it overwrites") {
    const Cpu policy(2);
    auto rows = filled<float>(policy, std::array<Index, 3>{1, 4, 20}, std::numeric_limits<double>::infinity());
    for (Index j = 0; j < 20; ++j) {
        rows.view()(0, 1, j) = std::numeric_limits<float>::quiet_NaN();
        rows.view()(0, 2, j) = rows.view()(0, 3, j) = 1;
    }
    HostTensor<TokenIndex, 2> indices(policy, {1, 4});
    std::iota(indices.data(), indices.data() + 4, 0);
    auto scale = filled<float>(policy, std::array<Index, 2>{1, 4}, 0);
    scale.data()[3] = 2;
    for (const auto how : {Scatter::add, Scatter::mean}) {
        auto out = filled<float>(policy, std::array<Index, 3>{1, 4, 20}, -0.0);
        auto expected = filled<float>(policy, out.shape(), -0.0);
        for (Index j = 0; j < 20; ++j) expected.view()(0, 3, j) = 2;
        scatter(policy, how, out.view(), rows, indices, scale);
        CHECK(same_bits(out, expected));
    }
    auto out = filled<float>(policy, std::array<Index, 3>{1, 4, 20}, 5);
    scatter(policy, Scatter::overwrite, out.view(), rows, indices, scale);
    CHECK(std::isnan(out.const_view()(0, 0, 0)));
    CHECK(out.const_view()(0, 2, 0) == 0);
    CHECK(out.const_view()(0, 3, 0) == 2);
}

TEST_CASE("scatter: rows of several routes are those of one route after the other; each route has means of its own") {
    const Cpu policy(1);
    const auto before = normal<double>(policy, std::array<Index, 3>{2, 9, 4}, 0);
    auto rows = normal<double>(policy, std::array<Index, 3>{2, 3 * 7, 4}, 1);
    const auto scale = normal<double>(policy, std::array<Index, 3>{2, 3, 7}, 2);
    const auto indices = random_indices(policy, std::array<Index, 3>{2, 3, 7}, 9);
    const auto d_out = normal<double>(policy, before.shape(), 3);
    const auto part_of = [&](const auto& of_routes, Index b, Index r) {  // (1, k, …)
        using T = typename std::remove_cvref_t<decltype(of_routes)>::value_type;
        const Index entries = of_routes.size() / (2 * 3 * 7);
        return TokensView<const T>(of_routes.data() + (b * 3 + r) * 7 * entries, {1, 7, entries});
    };
    for (const Scatter how : {Scatter::add, Scatter::mean, Scatter::overwrite})
        for (const bool scaled : {false, true}) {
            CAPTURE(static_cast<int>(how));
            CAPTURE(scaled);
            const auto factors = scaled ? scale.const_view() : TokensView<const double>();
            auto out = copy_of(policy, before);
            scatter(policy, how, out.view(), rows, indices, factors);
            for (Index b = 0; b < 2; ++b) {
                auto expected = copy_of(policy, sequence(before, b));
                for (Index r = 0; r < 3; ++r) {
                    const auto of_indices = part_of(indices, b, r).reshape(std::array<Index, 2>{1, 7});
                    const auto of_scale = part_of(scale, b, r).reshape(std::array<Index, 2>{1, 7});
                    scatter(policy, how, expected.view(), part_of(rows, b, r), of_indices,
                            scaled ? of_scale : MatrixView<const double>());
                }
                CHECK(relative_error(sequence(out, b), expected) <= 1e-14);
            }
            if (scaled || how == Scatter::overwrite) continue;
            const auto loss = [&] {
                auto to = copy_of(policy, before);
                scatter(policy, how, to.view(), rows, indices);
                return inner(d_out, to);
            };
            const auto d_rows = scatter_vjp(policy, how, d_out, indices);
            REQUIRE(d_rows.shape() == rows.shape());
            CHECK(relative_error(d_rows, finite_differences(policy, rows, loss)) <= 1e-9);
        }
    auto out = copy_of(policy, before);
    const auto one_route = random_indices(policy, std::array<Index, 3>{2, 1, 7}, 9);
    CHECK_THROWS_WITH_AS(scatter(policy, Scatter::add, out.view(), rows, one_route),
                         "colt5: `rows` must have shape (2, 7, 4), but has (2, 21, 4)", ShapeError);
    CHECK_THROWS_WITH_AS(scatter(policy, Scatter::mean, out.view(), rows, indices, sequence(scale, 0)),
                         "colt5: `scale` must have shape (2, 3, 7), but has (1, 3, 7)", ShapeError);
}

TEST_CASE("scatter: overwriting puts the last row, bit for bit, and leaves the others") {
    const Cpu policy(2);
    auto out = filled<float>(policy, std::array<Index, 3>{1, 4, 2}, 9);
    const auto rows = normal<float>(policy, std::array<Index, 3>{1, 3, 2}, 1);
    const auto indices = from_host<HostTensor<TokenIndex, 2>>(policy, {1, 3}, std::vector<TokenIndex>{2, 0, 2});
    scatter(policy, Scatter::overwrite, out.view(), rows, indices);
    const auto* r = rows.data();
    CHECK(to_host(policy, out) == std::vector<float>{r[2], r[3], 9, 9, r[4], r[5], 9, 9});
}

TEST_CASE("scatter: the gradient with respect to the rows is that of finite differences") {
    const Cpu policy(1);
    const auto before = normal<double>(policy, std::array<Index, 3>{2, 20, 3}, 0);
    auto rows = normal<double>(policy, std::array<Index, 3>{2, 9, 3}, 1);
    const auto d_out = normal<double>(policy, before.shape(), 2);
    const auto repeated = random_indices(policy, std::array<Index, 2>{2, 9}, 6);
    const auto distinct = distinct_indices(policy, 2, 9);
    for (const Scatter how : {Scatter::add, Scatter::mean, Scatter::overwrite}) {
        CAPTURE(static_cast<int>(how));
        const auto& indices = how == Scatter::overwrite ? distinct : repeated;
        const auto loss = [&] {
            auto out = copy_of(policy, before);
            scatter(policy, how, out.view(), rows, indices);
            return inner(d_out, out);
        };
        const auto d_rows = scatter_vjp(policy, how, d_out, indices);
        CHECK(relative_error(d_rows, finite_differences(policy, rows, loss)) <= 1e-9);
    }
}

TEST_CASE("gather and scatter: the same bits with 1 and 2 threads, and for each sequence alone") {
    const Cpu one(1), two(2);
    const auto before = normal<float>(one, std::array<Index, 3>{3, 50, 300}, 0);
    const auto rows = normal<float>(one, std::array<Index, 3>{3, 200, 300}, 1);
    const auto indices = random_indices(one, std::array<Index, 2>{3, 200}, 50);
    for (const Scatter how : {Scatter::add, Scatter::mean, Scatter::overwrite}) {
        CAPTURE(static_cast<int>(how));
        auto out = copy_of(one, before), out2 = copy_of(one, before);
        scatter(one, how, out.view(), rows, indices);
        scatter(two, how, out2.view(), rows, indices);
        CHECK(same_bits(out2, out));
        const auto d_rows = scatter_vjp(one, how, before, indices);
        CHECK(same_bits(scatter_vjp(two, how, before, indices), d_rows));
        for (Index b = 0; b < 3; ++b) {
            auto alone = copy_of(one, sequence(before, b));
            scatter(two, how, alone.view(), sequence(rows, b), sequence(indices, b));
            CHECK(same_bits(alone, sequence(out, b)));
            CHECK(same_bits(scatter_vjp(two, how, sequence(before, b), sequence(indices, b)), sequence(d_rows, b)));
        }
    }
}

TEST_CASE("gather and scatter: errors name the argument, and indices are checked before anything is written") {
    const Cpu policy(1);
    const auto x = normal<float>(policy, std::array<Index, 3>{2, 5, 3}, 0);
    const auto rows = normal<float>(policy, std::array<Index, 3>{2, 2, 3}, 0);
    const auto indices_of = [&](std::vector<TokenIndex> values) {
        return from_host<HostTensor<TokenIndex, 2>>(policy, {2, 2}, values);
    };
    const auto good = indices_of({0, 1, 2, 3}), three = random_indices(policy, std::array<Index, 2>{3, 2}, 5);
    const auto mask = random_mask(policy, std::array<Index, 2>{2, 5}, 0);
    CHECK_THROWS_WITH_AS(gather(policy, x, indices_of({0, 1, 5, 3})), "colt5: `indices` must be in [0, 5), but is 5",
                         ValueError);
    CHECK_THROWS_WITH_AS(gather(policy, x, indices_of({0, -1, 4, 3})), "colt5: `indices` must be in [0, 5), but is -1",
                         ValueError);
    CHECK_THROWS_WITH_AS(gather(policy, x, three), "colt5: `indices` must have shape (2, any), but has (3, 2)",
                         ShapeError);

    const auto routed = [](const auto& indices) { return indices.view().reshape(std::array<Index, 3>{2, 1, 2}); };
    const auto far = indices_of({0, 1, 5, 3});
    CHECK_THROWS_WITH_AS(gather_mask(policy, Mask(mask), routed(far)), "colt5: `indices` must be in [0, 5), but is 5",
                         ValueError);
    CHECK_THROWS_WITH_AS(gather_mask(policy, sequence(mask, 0), routed(good)),
                         "colt5: `mask` must have shape (2, any), but has (1, 5)", ShapeError);

    auto out = copy_of(policy, x);
    CHECK_THROWS_WITH_AS(scatter(policy, Scatter::add, out.view(), rows, indices_of({0, 1, 2, 7})),
                         "colt5: `indices` must be in [0, 5), but is 7", ValueError);
    CHECK(same_bits(out, x));
    CHECK_THROWS_WITH_AS(scatter(policy, Scatter::add, out.view(), x, good),
                         "colt5: `rows` must have shape (2, 2, 3), but has (2, 5, 3)", ShapeError);
    CHECK_THROWS_WITH_AS(scatter(policy, Scatter::add, out.view(), rows, three),
                         "colt5: `indices` must have shape (2, any), but has (3, 2)", ShapeError);
    CHECK_THROWS_WITH_AS(gather_vjp(policy, out.view(), x, good),
                         "colt5: `d_out` must have shape (2, 2, 3), but has (2, 5, 3)", ShapeError);
}

TEST_CASE("pick_scores: the scores of the chosen tokens, 1 without scores, 0 at masked tokens") {
    const Cpu policy(1);
    const auto scores = normal<double>(policy, std::array<Index, 3>{2, 2, 5}, 0);
    const auto mask = random_mask(policy, std::array<Index, 2>{2, 5}, 1, 0.5);
    const auto indices = indices_of(policy, {2, 2, 3}, {0, 4, 2, 1, 2, 3, 4, 3, 2, 0, 1, 4});
    const auto picked = pick_scores<double>(policy, scores.const_view(), indices, {});
    const auto masked = pick_scores<double>(policy, scores.const_view(), indices, Mask(mask));
    const auto ones = pick_scores<double>(policy, {}, indices, {});
    const auto masked_ones = pick_scores<double>(policy, {}, indices, Mask(mask));
    int zeros = 0;
    for (Index b = 0; b < 2; ++b)
        for (Index r = 0; r < 2; ++r)
            for (Index i = 0; i < 3; ++i) {
                const Index token = indices.view()(b, r, i);
                const double score = scores.view()(b, r, token), real = mask.view()(b, token) ? 1 : 0;
                CHECK(picked.view()(b, r, i) == score);
                CHECK(masked.view()(b, r, i) == real * score);
                CHECK(ones.view()(b, r, i) == 1);
                CHECK(masked_ones.view()(b, r, i) == real);
                zeros += real == 0 ? 1 : 0;
            }
    CHECK((zeros > 0 && zeros < 12));
}

TEST_CASE("straight_through_scores: 1, 0 at masked tokens, and NaN in rows whose first choice is NaN") {
    const Cpu policy(1);
    constexpr double nan = std::numeric_limits<double>::quiet_NaN();
    const auto logits =
        from_host<TokensTensor<double, Cpu>>(policy, {2, 1, 3}, std::vector<double>{1, 3, 2, 1, nan, 2});
    const auto indices =
        from_host<TokensTensor<TokenIndex, Cpu>>(policy, {2, 1, 3}, std::vector<TokenIndex>{1, 2, 0, 1, 2, 0});
    HostTensor<bool, 2> mask(policy, {2, 3});
    fill_with(policy, mask, [](std::size_t i) { return i % 3 != 0; });
    const auto scores = straight_through_scores(policy, logits, indices, {});
    const auto masked = straight_through_scores(policy, logits, indices, Mask(mask));
    for (Index i = 0; i < 3; ++i) {
        CHECK(scores.const_view()(0, 0, i) == 1);
        CHECK(masked.const_view()(0, 0, i) == (i == 2 ? 0 : 1));
        CHECK(std::isnan(scores.const_view()(1, 0, i)));
        CHECK((i == 2 ? masked.const_view()(1, 0, i) == 0 : std::isnan(masked.const_view()(1, 0, i))));
    }
    const auto far = from_host<TokensTensor<TokenIndex, Cpu>>(policy, {2, 1, 1}, std::vector<TokenIndex>{0, 3});
    CHECK_THROWS_WITH_AS(straight_through_scores(policy, logits, far, {}),
                         "colt5: `indices` must be in [0, 3), but is 3", ValueError);
    CHECK_THROWS_WITH_AS(
        straight_through_scores(policy, logits.const_view().reshape(std::array<Index, 3>{1, 2, 3}), indices, {}),
        "colt5: `logits` must have shape (2, 1, any), but has (1, 2, 3)", ShapeError);
}

TEST_CASE("place_scores: its gradient is that of finite differences, and 0 for tokens that are not chosen") {
    const Cpu policy(1);
    auto scores = normal<double>(policy, std::array<Index, 3>{2, 2, 5}, 0);
    const auto mask = random_mask(policy, std::array<Index, 2>{2, 5}, 1, 0.5);
    const auto indices = indices_of(policy, {2, 2, 3}, {0, 4, 2, 1, 2, 3, 4, 3, 2, 0, 1, 4});
    const auto d_picked = normal<double>(policy, indices.shape(), 2);
    for (const Mask given : {Mask{}, Mask(mask)}) {
        const auto d_scores = place_scores(policy, d_picked, indices, given, 5);
        const auto loss = [&] {
            return inner(d_picked, pick_scores<double>(policy, scores.const_view(), indices, given));
        };
        CHECK(relative_error(d_scores, finite_differences(policy, scores, loss)) <= 1e-9);
    }
}

TEST_CASE("pick_scores and place_scores: nothing to pick") {
    const Cpu policy(1);
    const auto scores = normal<double>(policy, std::array<Index, 3>{2, 1, 5}, 0);
    const auto none = indices_of(policy, {2, 1, 0}, {});
    CHECK(pick_scores<double>(policy, scores.const_view(), none, {}).size() == 0);
    for (const double d : to_host(policy, place_scores(policy, filled<double>(policy, none.shape(), 1), none, {}, 5)))
        CHECK(d == 0);
}

TEST_CASE("pick_scores and place_scores: errors name the argument") {
    const Cpu policy(1);
    const auto scores = normal<double>(policy, std::array<Index, 3>{2, 1, 5}, 0);
    const auto mask = random_mask(policy, std::array<Index, 2>{2, 4}, 0);
    const auto good = indices_of(policy, {2, 1, 2}, {0, 1, 2, 3}), far = indices_of(policy, {2, 1, 2}, {0, 1, 2, 5});
    const auto two_routes = indices_of(policy, {2, 2, 1}, {0, 1, 2, 3});
    CHECK_THROWS_WITH_AS(pick_scores<double>(policy, scores.const_view(), far, {}),
                         "colt5: `indices` must be in [0, 5), but is 5", ValueError);
    CHECK_THROWS_WITH_AS(pick_scores<double>(policy, {}, far, Mask(mask)),
                         "colt5: `indices` must be in [0, 4), but is 5", ValueError);
    CHECK_THROWS_WITH_AS(pick_scores<double>(policy, scores.const_view(), two_routes, {}),
                         "colt5: `scores` must have shape (2, 2, any), but has (2, 1, 5)", ShapeError);
    CHECK_THROWS_WITH_AS(pick_scores<double>(policy, scores.const_view(), good, Mask(mask)),
                         "colt5: `mask` must have shape (2, 5), but has (2, 4)", ShapeError);
    const auto d_picked = filled<double>(policy, good.shape(), 1);
    CHECK_THROWS_WITH_AS(place_scores(policy, scores, good, {}, 5),
                         "colt5: `d_picked` must have shape (2, 1, 2), but has (2, 1, 5)", ShapeError);
    CHECK_THROWS_WITH_AS(place_scores(policy, d_picked, far, {}, 5), "colt5: `indices` must be in [0, 5), but is 5",
                         ValueError);
    CHECK_THROWS_WITH_AS(place_scores(policy, d_picked, good, Mask(mask), 5),
                         "colt5: `mask` must have shape (2, 5), but has (2, 4)", ShapeError);
}
