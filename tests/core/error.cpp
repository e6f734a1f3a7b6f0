// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <array>
#include <limits>
#include <locale>
#include <stdexcept>
#include <string>
#include <type_traits>

#include <colt5/core/error.hpp>

using namespace colt5;

TEST_CASE("error: every exception of the library is an Error, and that a runtime_error") {
    CHECK(std::is_base_of_v<std::runtime_error, Error>);
    CHECK(std::is_base_of_v<Error, ShapeError>);
    CHECK(std::is_base_of_v<Error, ValueError>);
    CHECK(std::is_base_of_v<Error, FileError>);
}

TEST_CASE("divide_up, round_up: of any size, in indices and in bytes") {
    constexpr Index most = std::numeric_limits<Index>::max();
    for (const Index unit : {Index{1}, Index{2}, Index{7}, Index{512}})
        for (Index n = 0; n < 3 * unit + 2; ++n) {
            CHECK(divide_up(n, unit) == (n + unit - 1) / unit);
            CHECK(round_up(n, unit) == (n + unit - 1) / unit * unit);
            CHECK(round_up(static_cast<std::size_t>(n), static_cast<std::size_t>(unit)) ==
                  static_cast<std::size_t>(round_up(n, unit)));
        }
    CHECK(divide_up(most, most) == 1);
    CHECK(divide_up(most, 2) == most / 2 + 1);
    static_assert(divide_up(9, 4) == 3 && round_up(9, 4) == 12);
}

TEST_CASE("error: shapes in words") {
    CHECK(shape_string(std::array<Index, 3>{2, -1, 512}) == "(2, any, 512)");
    CHECK(shape_string(std::array<Index, 1>{0}) == "(0)");
    CHECK(shape_string(std::array<Index, 0>{}) == "()");
}

TEST_CASE("error: expect_shape names the argument and prints both shapes; negative extents match anything") {
    const std::array<Index, 2> actual{3, 4};
    CHECK_NOTHROW(expect_shape("x", actual, {3, 4}));
    CHECK_NOTHROW(expect_shape("x", actual, {-1, 4}));
    CHECK_NOTHROW(expect_shape("x", actual, {-1, -1}));
    CHECK_THROWS_WITH_AS(expect_shape("x", actual, {-1, 5}), "colt5: `x` must have shape (any, 5), but has (3, 4)",
                         ShapeError);
    CHECK_THROWS_WITH_AS(expect_shape("x", actual, {0, 4}), "colt5: `x` must have shape (0, 4), but has (3, 4)",
                         ShapeError);
    CHECK_THROWS_WITH_AS(throw_shape_error("x", std::array<Index, 1>{7}, actual),
                         "colt5: `x` must have shape (7), but has (3, 4)", ShapeError);
}

TEST_CASE("error: expect_value names the argument and prints the condition and the value") {
    CHECK_NOTHROW(expect_value(true, "k", ">= 1", 0));
    CHECK_THROWS_WITH_AS(expect_value(false, "k", ">= 1", 0), "colt5: `k` must be >= 1, but is 0", ValueError);
    CHECK_THROWS_WITH_AS(expect_value(false, "eps", "> 0", -0.5), "colt5: `eps` must be > 0, but is -0.5", ValueError);
}

TEST_CASE("error: numbers in messages do not depend on the program's locale") {
    struct Grouped : std::numpunct<char> {
        char do_decimal_point() const override { return ','; }
        char do_thousands_sep() const override { return '.'; }
        std::string do_grouping() const override { return "\3"; }
    };
    const std::locale before = std::locale::global(std::locale(std::locale::classic(), new Grouped));
    CHECK(shape_string(std::array<Index, 2>{1234567, -1}) == "(1234567, any)");
    CHECK_THROWS_WITH_AS(expect_value(false, "n", ">= 0.5", 1234567), "colt5: `n` must be >= 0.5, but is 1234567",
                         ValueError);
    CHECK_THROWS_WITH_AS(expect_value(false, "n", ">= 1", 0.5), "colt5: `n` must be >= 1, but is 0.5", ValueError);
    std::locale::global(before);
}

TEST_CASE("error: expect_bytes counts, and refuses what a signed number cannot count") {
    constexpr Index large = Index{1} << 40;
    CHECK(expect_bytes("x", std::array<Index, 3>{2, 3, 4}, 4) == 96);
    CHECK(expect_bytes("x", std::array<Index, 2>{large, Index{1} << 20}, 4) == Index{1} << 62);
    CHECK(expect_bytes("x", std::array<Index, 3>{large, 0, 4}, 4) == 0);
    CHECK_THROWS_WITH_AS(expect_bytes("x", std::array<Index, 2>{3, -1}, 4),
                         "colt5: `x` must be non-negative in every dimension, but is -1", ValueError);
    CHECK_THROWS_WITH_AS(expect_bytes("x", std::array<Index, 2>{large, Index{1} << 20}, 8),
                         "colt5: `x` must be of less than 2^63 bytes, but is (1099511627776, 1048576)", ValueError);
    for (const auto& shape : {std::array<Index, 3>{0, large, large}, {large, 0, large}, {large, large, 0}}) {
        CAPTURE(shape_string(shape));
        CHECK_THROWS_AS(expect_bytes("x", shape, 1), ValueError);  // strides between its slices would overflow
    }
}

TEST_CASE("error: is_range_of does not overflow") {
    constexpr Index most = std::numeric_limits<Index>::max();
    CHECK(is_range_of(0, 0, 0));
    CHECK(is_range_of(2, 3, 5));
    CHECK(is_range_of(5, 0, 5));
    CHECK_FALSE(is_range_of(3, 3, 5));
    CHECK_FALSE(is_range_of(6, 0, 5));
    CHECK_FALSE(is_range_of(-1, 2, 5));
    CHECK_FALSE(is_range_of(2, -1, 5));
    CHECK_FALSE(is_range_of(2, most, 5));
    CHECK_FALSE(is_range_of(most, most, 5));
}
