// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

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
