// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <array>

#include <colt5/cpu/windows.hpp>

#include "support/tensors.hpp"

using namespace colt5;
using namespace support;

namespace {

/// Batch, height, width, dim, side of a window.
constexpr std::array<std::array<Index, 5>, 9> shapes{{{1, 1, 1, 1, 1},
                                                      {2, 4, 6, 3, 2},
                                                      {2, 5, 7, 3, 4},
                                                      {1, 3, 2, 5, 8},
                                                      {3, 20, 41, 35, 16},
                                                      {2, 1, 50, 4, 7},
                                                      {2, 0, 3, 4, 2},
                                                      {2, 3, 0, 4, 2},
                                                      {0, 3, 4, 2, 2}}};

}  // namespace

TEST_CASE_TEMPLATE("windows: maps as sequences of windows and back, padding is 0 and masked", T, float, double) {
    const Cpu policy(2);
    for (const auto& size : shapes)
        for (const bool channel_first : {false, true}) {
            const auto [batch, height, width, dim, side] = size;
            CAPTURE(size[1]);
            CAPTURE(size[2]);
            CAPTURE(channel_first);
            const auto shape =
                channel_first ? std::array{batch, dim, height, width} : std::array{batch, height, width, dim};
            const auto maps = normal<T>(policy, shape, 0);
            const auto of_map = random_mask(policy, std::array{batch, height, width}, 1);
            const WindowGrid grid = window_grid("maps", maps, side, channel_first);
            const Index rows = (height + side - 1) / side, columns = (width + side - 1) / side;
            CHECK(grid.tokens() == rows * columns * side * side);
            CHECK(grid.is_padded() == (height % side != 0 || width % side != 0));

            auto expected = filled<T>(policy, std::array{batch, grid.tokens(), dim}, 0);
            auto expected_mask = filled<bool>(policy, std::array{batch, grid.tokens()}, false);
            Index token = 0;
            for (Index row = 0; row < rows; ++row)
                for (Index column = 0; column < columns; ++column)
                    for (Index i = 0; i < side * side; ++i, ++token) {
                        const Index y = row * side + i / side, x = column * side + i % side;
                        CHECK(grid.token_at(y, x) == token);
                        CHECK(grid.position(token) == MapPosition{y, x});
                        CHECK(grid.contains({y, x}) == (y < height && x < width));
                        if (y >= height || x >= width) continue;
                        for (Index b = 0; b < batch; ++b) {
                            expected_mask.view()(b, token) = of_map.const_view()(b, y, x);
                            for (Index c = 0; c < dim; ++c)
                                expected.view()(b, token, c) =
                                    channel_first ? maps.const_view()(b, c, y, x) : maps.const_view()(b, y, x, c);
                        }
                    }
            const auto tokens = to_windows(policy, maps, grid, channel_first);
            CHECK(same_bits(tokens, expected));
            CHECK(same_bits(from_windows(policy, tokens, grid, channel_first), maps));
            CHECK(same_bits(window_mask(policy, of_map.const_view(), batch, grid), expected_mask));

            const auto padding = window_mask(policy, {}, batch, grid);
            CHECK((padding.size() > 0) == (grid.is_padded() && batch * grid.tokens() > 0));
            if (padding)
                for (Index b = 0; b < batch; ++b)
                    for (Index i = 0; i < grid.tokens(); ++i)
                        CHECK(padding.const_view()(b, i) == grid.contains(grid.position(i)));
        }
}

TEST_CASE("windows: each is the other's vector-Jacobian product") {
    const Cpu policy(2);
    for (const bool channel_first : {false, true}) {
        const auto maps = normal<double>(policy, std::array<Index, 4>{2, 5, 7, 6}, 0);
        const WindowGrid grid = window_grid("maps", maps, 4, channel_first);
        const auto tokens = to_windows(policy, maps, grid, channel_first);
        const auto d_tokens = normal<double>(policy, tokens.shape(), 1);
        const auto d_maps = from_windows(policy, d_tokens, grid, channel_first);
        CHECK(inner(d_tokens, tokens) == doctest::Approx(inner(d_maps, maps)).epsilon(1e-12));
    }
}

TEST_CASE("windows: errors name the argument and both values") {
    const Cpu policy(1);
    const auto maps = normal<double>(policy, std::array<Index, 4>{2, 5, 7, 3}, 0);
    const WindowGrid grid = window_grid("maps", maps, 4);
    CHECK_THROWS_WITH_AS(window_grid("maps", maps, 0), "colt5: `side` must be in [1, 2^15], but is 0", ValueError);
    CHECK_THROWS_WITH_AS(to_windows(policy, normal<double>(policy, std::array<Index, 4>{2, 5, 6, 3}, 0), grid),
                         "colt5: `maps` must have shape (2, 5, 7, 3), but has (2, 5, 6, 3)", ShapeError);
    CHECK_THROWS_WITH_AS(from_windows(policy, normal<double>(policy, std::array<Index, 3>{2, 63, 3}, 0), grid),
                         "colt5: `tokens` must have shape (2, 64, 3), but has (2, 63, 3)", ShapeError);
    const auto mask = random_mask(policy, std::array<Index, 3>{2, 7, 5}, 1);
    CHECK_THROWS_WITH_AS(window_mask(policy, mask.const_view(), 2, grid),
                         "colt5: `mask` must have shape (2, 5, 7), but has (2, 7, 5)", ShapeError);
    const double one = 1;
    const auto huge = MapView<const double>::unchecked(&one, {1, Index{1} << 16, Index{1} << 15, 1});
    CHECK_THROWS_AS(window_grid("maps", huge, 4), ValueError);
    CHECK(window_grid("maps", MapView<const double>::unchecked(&one, {1, (Index{1} << 16) - 4, Index{1} << 15, 1}), 4)
              .tokens() == (Index{1} << 31) - (Index{1} << 17));
}
