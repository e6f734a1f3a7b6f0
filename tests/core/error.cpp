// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <array>
#include <stdexcept>
#include <type_traits>

#include <colt5/core/error.hpp>

using namespace colt5;

TEST_CASE("error: every exception of the library is an Error, and that a runtime_error") {
    CHECK(std::is_base_of_v<std::runtime_error, Error>);
    CHECK(std::is_base_of_v<Error, ShapeError>);
    CHECK(std::is_base_of_v<Error, ValueError>);
    CHECK(std::is_base_of_v<Error, FileError>);
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
