// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <array>
#include <vector>

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
