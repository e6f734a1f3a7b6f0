// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <array>
#include <cmath>

#include <colt5/cpu/map_tokens.hpp>
#include <colt5/cpu/windows.hpp>

#include "support/tensors.hpp"

using namespace colt5;
using namespace support;

namespace {

/// Batch, height, width, dim, side of a window.
constexpr std::array<std::array<Index, 5>, 5> shapes{
    {{1, 1, 1, 8, 1}, {2, 5, 7, 12, 4}, {3, 20, 41, 72, 16}, {1, 2, 3, 132, 8}, {0, 2, 3, 8, 2}}};

}  // namespace

TEST_CASE_TEMPLATE("add_sincos_positions: sines and cosines of the column, then of the row", T, float, double) {
    const double tolerance = std::is_same_v<T, double> ? 1e-14 : 2e-7;
    const Cpu policy(2);
    for (const auto& shape : shapes) {
        const auto [batch, height, width, dim, side] = shape;
        CAPTURE(shape[3]);
        const WindowGrid grid{height, width, side};
        const auto before = normal<T>(policy, std::array{batch, grid.tokens(), dim}, 0);
        auto tokens = copy_of(policy, before), expected = copy_of(policy, before);
        const Index quarter = dim / 4;
        for (Index b = 0; b < batch; ++b)
            for (Index y = 0; y < height; ++y)
                for (Index x = 0; x < width; ++x)
                    for (Index c = 0; c < quarter; ++c) {
                        const double frequency = std::pow(10000.0, -static_cast<double>(c) / double(quarter - 1));
                        T* const token = &expected.view()(b, grid.token_at(y, x), c);
                        token[0] += static_cast<T>(std::sin(double(x) * frequency));
                        token[quarter] += static_cast<T>(std::cos(double(x) * frequency));
                        token[2 * quarter] += static_cast<T>(std::sin(double(y) * frequency));
                        token[3 * quarter] += static_cast<T>(std::cos(double(y) * frequency));
                    }
        add_sincos_positions(policy, tokens.view(), grid);
        // What padding gets, nobody reads.
        CHECK(relative_error(from_windows(policy, tokens, grid), from_windows(policy, expected, grid)) <= tolerance);
    }
}

TEST_CASE_TEMPLATE("map_mean: the mean of the real tokens; its vector-Jacobian product gives each its share", T, float,
                   double) {
    const double tolerance = std::is_same_v<T, double> ? 1e-13 : 2e-6;
    const Cpu policy(2);
    for (const auto& shape : shapes) {
        const auto [batch, height, width, dim, side] = shape;
        CAPTURE(shape[3]);
        const WindowGrid grid{height, width, side};
        const auto tokens = normal<T>(policy, std::array{batch, grid.tokens(), dim}, 0, 1);
        const auto d_mean = normal<T>(policy, std::array{batch, Index{1}, dim}, 1);
        auto mean = filled<T>(policy, d_mean.shape(), 0), d_tokens = filled<T>(policy, tokens.shape(), 0);
        const double count = static_cast<double>(height * width);
        for (Index b = 0; b < batch; ++b)
            for (Index j = 0; j < dim; ++j) {
                double sum = 0;
                for (Index y = 0; y < height; ++y)
                    for (Index x = 0; x < width; ++x) {
                        sum += static_cast<double>(tokens.const_view()(b, grid.token_at(y, x), j));
                        d_tokens.view()(b, grid.token_at(y, x), j) =
                            static_cast<T>(static_cast<double>(d_mean.const_view()(b, 0, j)) / count);
                    }
                mean.view()(b, 0, j) = static_cast<T>(sum / count);
            }
        CHECK(relative_error(map_mean(policy, tokens, grid), mean) <= tolerance);
        CHECK(relative_error(map_mean_vjp(policy, d_mean, grid), d_tokens) <= tolerance);
    }
}

TEST_CASE("map tokens: errors name the argument and both values") {
    const Cpu policy(1);
    const WindowGrid grid{4, 6, 2};
    auto tokens = normal<double>(policy, std::array<Index, 3>{2, 24, 8}, 0),
         few = normal<double>(policy, std::array<Index, 3>{2, 23, 8}, 0),
         narrow = normal<double>(policy, std::array<Index, 3>{2, 24, 4}, 0);
    CHECK_THROWS_WITH_AS(add_sincos_positions(policy, few.view(), grid),
                         "colt5: `tokens` must have shape (2, 24, 8), but has (2, 23, 8)", ShapeError);
    CHECK_THROWS_WITH_AS(add_sincos_positions(policy, narrow.view(), grid),
                         "colt5: `dim` must be a multiple of 4, at least 8, but is 4", ValueError);
    CHECK_THROWS_WITH_AS(map_mean(policy, few, grid), "colt5: `tokens` must have shape (2, 24, 8), but has (2, 23, 8)",
                         ShapeError);
    CHECK_THROWS_WITH_AS(map_mean_vjp(policy, tokens, grid),
                         "colt5: `d_mean` must have shape (2, 1, 8), but has (2, 24, 8)", ShapeError);
    CHECK_THROWS_AS(map_mean(policy, normal<double>(policy, std::array<Index, 3>{2, 0, 8}, 0), WindowGrid{0, 6, 2}),
                    ValueError);
}
