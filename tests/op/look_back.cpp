// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <array>

#include <colt5/cpu/look_back.hpp>
#include <colt5/cpu/zero.hpp>

#include "support/tensors.hpp"

using namespace colt5;
using namespace support;

TEST_CASE_TEMPLATE("look_back: rows of the window before and of the window itself", T, float, double) {
    const Cpu policy(2);
    for (const std::array<Index, 4> shape :
         {std::array<Index, 4>{1, 1, 1, 1}, {2, 3, 4, 5}, {3, 1, 2, 3}, {2, 0, 3, 4}, {0, 2, 3, 4}, {1, 5, 1, 40}}) {
        CAPTURE(shape_string(shape));
        const Index batch = shape[0], windows = shape[1], window = shape[2], dim = shape[3];
        const auto x = normal<T>(policy, std::array{batch, windows * window, dim}, 0);
        const auto rows = look_back(policy, x, window);
        const auto counts = look_back_counts(policy, batch, windows, window);
        REQUIRE(rows.shape() == std::array{batch * windows, 2 * window, dim});
        REQUIRE(counts.shape() == std::array{batch * windows, Index{1}, window});
        for (Index b = 0; b < batch; ++b)
            for (Index m = 0; m < windows; ++m) {
                const Index at = b * windows + m;
                for (Index i = 0; i < 2 * window; ++i)
                    for (Index d = 0; d < dim; ++d) {
                        const Index token = m == 0 ? i : (m - 1) * window + i;
                        const bool none = m == 0 && i >= window;
                        CHECK(rows.const_view()(at, i, d) == (none ? T(0) : x.const_view()(b, token, d)));
                    }
                // The first `count` rows are those up to the token.
                for (Index i = 0; i < window; ++i)
                    CHECK(counts.const_view()(at, 0, i) == (m == 0 ? i + 1 : window + i + 1));
            }
        const auto d_rows = normal<T>(policy, rows.shape(), 1);
        const auto d_x = look_back_vjp(policy, d_rows, windows * window, window);
        CHECK(inner(d_x, x) == doctest::Approx(inner(d_rows, rows)).epsilon(1e-5));
    }
}

TEST_CASE("window_prefixes: the logits for each window, and which tokens are before it") {
    const Cpu policy(2);
    const auto logits = normal<double>(policy, std::array<Index, 2>{3, 12}, 0);
    for (const std::array<Index, 2> part : {std::array<Index, 2>{0, 12}, {3, 6}, {11, 1}, {5, 0}}) {
        const auto prefixes = window_prefixes(policy, logits, 3, part[0], part[1]);
        REQUIRE(prefixes.logits.shape() == std::array<Index, 3>{part[1], 1, 12});
        for (Index i = 0; i < part[1]; ++i)
            for (Index token = 0; token < 12; ++token) {
                const Index row = part[0] + i;
                CHECK(prefixes.logits.const_view()(i, 0, token) == logits.const_view()(row / 4, token));
                CHECK(prefixes.mask.const_view()(i, token) == (token < row % 4 * 3));
            }
        const auto d_rows = normal<double>(policy, prefixes.logits.shape(), 1);
        auto d_logits = normal<double>(policy, logits.shape(), 2);
        const double before = inner(d_logits, logits);
        window_prefixes_vjp<Cpu, double>(policy, d_logits.view(), d_rows.const_view(), 3, part[0]);
        CHECK(inner(d_logits, logits) - before == doctest::Approx(inner(d_rows, prefixes.logits)));
    }
    // Longer than the columns of one task
    const auto rows = normal<double>(policy, std::array<Index, 3>{4, 1, 2100}, 3);
    MatrixTensor<double, Cpu> sums(policy, {2, 2100});
    set_zero(policy, sums);
    window_prefixes_vjp<Cpu, double>(policy, sums.view(), rows.const_view(), 700, 1);
    for (Index i = 0; i < 2100; ++i) {
        CHECK(sums.const_view()(0, i) == rows.const_view()(0, 0, i) + rows.const_view()(1, 0, i));
        CHECK(sums.const_view()(1, i) == rows.const_view()(2, 0, i) + rows.const_view()(3, 0, i));
    }
    CHECK_THROWS_WITH_AS(
        window_prefixes(policy, logits, 3, 11, 2),
        "colt5: `first` must be such that [first, first + rows) is within the s · n / window rows, but is 11",
        ValueError);
}

TEST_CASE("window_keys: a null key, then the picks; those before the window are visible") {
    const Cpu policy(2);
    TokensTensor<TokenIndex, Cpu> picks(policy, {6, 1, 5});
    for (Index i = 0; i < picks.size(); ++i) picks.data()[i] = static_cast<TokenIndex>(i * 7 % 12);
    const auto scores = normal<double>(policy, picks.shape(), 0);
    const auto keys = window_keys<Cpu, double>(policy, picks.const_view(), scores.const_view(), 4, 3, 3, 12);
    for (Index i = 0; i < 6; ++i) {
        CHECK(keys.indices.const_view()(i, 0, 0) == 12);
        CHECK(keys.scores.const_view()(i, 0, 0) == 1);
        CHECK(keys.mask.const_view()(i, 0, 0));
        for (Index j = 0; j < 5; ++j) {
            CHECK(keys.indices.const_view()(i, 0, j + 1) == picks.const_view()(i, 0, j));
            CHECK(keys.scores.const_view()(i, 0, j + 1) == scores.const_view()(i, 0, j));
            CHECK(keys.mask.const_view()(i, 0, j + 1) == (picks.const_view()(i, 0, j) < (3 + i) % 4 * 3));
        }
    }
    const auto d = normal<double>(policy, keys.scores.shape(), 1);
    const auto d_scores = window_keys_vjp<Cpu, double>(policy, d.const_view());
    for (Index i = 0; i < 6; ++i)
        for (Index j = 0; j < 5; ++j) CHECK(d_scores.const_view()(i, 0, j) == d.const_view()(i, 0, j + 1));
}

TEST_CASE("look_back: errors name the argument and both values") {
    const Cpu policy(1);
    const auto x = normal<float>(policy, std::array<Index, 3>{2, 6, 3}, 0);
    CHECK_THROWS_WITH_AS(look_back(policy, x, 4), "colt5: `length of x` must be a multiple of the window, but is 6",
                         ValueError);
    CHECK_THROWS_WITH_AS(look_back(policy, x, 0), "colt5: `window` must be >= 1, but is 0", ValueError);
    const TokensTensor<TokenIndex, Cpu> picks(policy, {1, 1, 2});
    const TokensTensor<double, Cpu> scores(policy, {1, 1, 2});
    const auto keys_of = [&](Index windows, Index window, Index first) {
        return window_keys<Cpu, double>(policy, picks.const_view(), scores.const_view(), windows, window, first, 12);
    };
    CHECK_THROWS_WITH_AS(keys_of(0, 3, 0), "colt5: `windows` must be >= 1, but is 0", ValueError);
    CHECK_THROWS_WITH_AS(keys_of(4, 0, 0), "colt5: `window` must be >= 1, but is 0", ValueError);
    CHECK_THROWS_WITH_AS(keys_of(4, 3, -1), "colt5: `first` must be >= 0, but is -1", ValueError);
    CHECK_THROWS_WITH_AS(look_back_vjp(policy, x, 9, 3),
                         "colt5: `d_rows` must have shape (0, 6, any), but has (2, 6, 3)", ShapeError);
}
