// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <array>
#include <limits>
#include <locale>
#include <numeric>
#include <type_traits>
#include <vector>

#include <colt5/core/tensor.hpp>
#include <colt5/core/view.hpp>
#include <colt5/cpu/policy.hpp>

using namespace colt5;

namespace {

std::vector<int> numbers(std::size_t count) {
    std::vector<int> values(count);
    std::iota(values.begin(), values.end(), 0);
    return values;
}

}  // namespace

TEST_CASE("view: elements and slices lie in row-major order") {
    auto values = numbers(24);
    const View<int, dynamic, 3, dynamic> view(values.data(), {2, 3, 4});
    CHECK(view.size() == 24);
    CHECK(view.extent(2) == 4);
    for (Index i = 0; i < 2; ++i)
        for (Index j = 0; j < 3; ++j)
            for (Index k = 0; k < 4; ++k) {
                CHECK(view(i, j, k) == i * 12 + j * 4 + k);
                CHECK(&view[i][j][k] == &view(i, j, k));
            }
    const auto slice = view[1];
    CHECK(std::is_same_v<decltype(slice), const View<int, 3, dynamic>>);
    CHECK(slice.shape() == std::array<Index, 2>{3, 4});
    slice(2, 3) = -1;
    CHECK(values[23] == -1);
}

TEST_CASE("view: leading axes merge into rows") {
    auto values = numbers(24);
    const View<int, dynamic, dynamic, 4> view(values.data(), {2, 3, 4});
    const auto rows = view.rows();
    CHECK(std::is_same_v<decltype(rows), const View<int, dynamic, 4>>);
    CHECK(rows.shape() == std::array<Index, 2>{6, 4});
    CHECK(rows(5, 3) == 23);
    CHECK(VectorView<int>(values.data(), {24}).rows().shape() == std::array<Index, 2>{1, 24});
}

TEST_CASE("view: reshape keeps the elements and checks the size") {
    auto values = numbers(24);
    const View<int, dynamic, dynamic> view(values.data(), {4, 6});
    const auto other = view.reshape(std::array<Index, 3>{2, 3, 4});
    CHECK(std::is_same_v<decltype(other), const View<int, dynamic, dynamic, dynamic>>);
    CHECK(other.data() == values.data());
    CHECK(other(1, 2, 3) == 23);
    CHECK_THROWS_WITH_AS(view.reshape(std::array<Index, 2>{5, 5}),
                         "colt5: `reshape` must have shape (5, 5), but has (4, 6)", ShapeError);
    CHECK_THROWS_AS(view.reshape(std::array<Index, 2>{-4, -6}), ValueError);
    CHECK_THROWS_AS(view.reshape(std::array<Index, 2>{8, (Index{1} << 61) + 3}), ValueError);  // 24 modulo 2^64
}

TEST_CASE("view: ranges of slices are those that are there") {
    auto values = numbers(24);
    const View<int, dynamic, 3, 2> view(values.data(), {4, 3, 2});
    const auto range = view.range(1, 2);
    CHECK(std::is_same_v<decltype(range), const View<int, dynamic, dynamic, dynamic>>);
    CHECK(range.shape() == std::array<Index, 3>{2, 3, 2});
    CHECK(range.data() == values.data() + 6);
    CHECK(view.range(4, 0).size() == 0);
    CHECK(view.range(0, 4).size() == 24);
    CHECK_FALSE(Mask().range(3, 5));  // what is absent stays absent
    CHECK_THROWS_WITH_AS(view.range(1, 4), "colt5: `range` must be within 4 slices, but is 4 from slice 1 on",
                         ValueError);
    CHECK_THROWS_AS(view.range(5, 0), ValueError);
    CHECK_THROWS_AS(view.range(-1, 2), ValueError);
    CHECK_THROWS_AS(view.range(2, -1), ValueError);
    CHECK_THROWS_AS(view.range(2, std::numeric_limits<Index>::max()), ValueError);
}

TEST_CASE("view: its extents are not negative, and its bytes can be counted") {
    int value = 0;
    CHECK_THROWS_WITH_AS(MatrixView<int>(&value, {2, -6}),
                         "colt5: `view` must be non-negative in every dimension, but is -6", ValueError);
    CHECK_THROWS_WITH_AS(MatrixView<int>(&value, {Index{1} << 40, Index{1} << 40}),
                         "colt5: `view` must be of less than 2^63 bytes, but is (1099511627776, 1099511627776)",
                         ValueError);
    CHECK_THROWS_AS(MatrixView<int>(&value, {0, Index{1} << 62}), ValueError);
}

TEST_CASE("view: converts to const and between static and dynamic extents, which it checks") {
    auto values = numbers(6);
    const View<int, dynamic, dynamic> view(values.data(), {2, 3});
    const View<const int, 2, 3> fixed = view;
    CHECK(fixed.data() == view.data());
    const View<const int, dynamic, 3> back = fixed;
    CHECK(back.shape() == view.shape());
    using Wrong = View<int, 2, 4>;
    CHECK_THROWS_WITH_AS(Wrong{view}, "colt5: `view` must have shape (2, 4), but has (2, 3)", ShapeError);
    CHECK_THROWS_WITH_AS(Wrong(values.data(), {2, 3}), "colt5: `view` must have shape (2, 4), but has (2, 3)",
                         ShapeError);
    CHECK(!std::is_convertible_v<View<const int, 2, 3>, View<int, 2, 3>>);     // constness stays
    CHECK(!std::is_convertible_v<View<int, 2, 3>, View<int, 2, 4>>);           // known not to fit
    CHECK(!std::is_convertible_v<View<int, dynamic>, View<int, dynamic, 1>>);  // another rank
    CHECK(!std::is_convertible_v<View<int, dynamic>, View<long, dynamic>>);
}

TEST_CASE("view: erases its static extents") {
    auto values = numbers(6);
    const View<int, 2, 3> view(values.data(), {2, 3});
    CHECK(std::is_same_v<decltype(view.view()), View<int, dynamic, dynamic>>);
    CHECK(std::is_same_v<decltype(view.const_view()), View<const int, dynamic, dynamic>>);
    CHECK(view.const_view().shape() == std::array<Index, 2>{2, 3});
    CHECK(view.const_view().data() == values.data());
}

TEST_CASE("view: without data it is false, and stands for an argument that is not given") {
    const Mask absent;
    CHECK_FALSE(absent);
    const View<const bool, 3, dynamic> converted = absent;  // its extents are not checked
    CHECK_FALSE(converted);
    const bool value = true;
    CHECK(Mask(&value, {1, 1}));
}

TEST_CASE("view: expect converts or names the argument") {
    auto values = numbers(6);
    const View<int, dynamic, dynamic> view(values.data(), {2, 3});
    const auto fixed = expect<View<const int, dynamic, 3>>("tokens", view);
    CHECK(fixed(1, 2) == 5);
    using Wrong = View<const int, dynamic, 4>;
    CHECK_THROWS_WITH_AS(expect<Wrong>("tokens", view), "colt5: `tokens` must have shape (any, 4), but has (2, 3)",
                         ShapeError);
}

TEST_CASE("view: works in constant expressions") {
    static constexpr std::array<int, 6> values{0, 1, 2, 3, 4, 5};
    constexpr View<const int, 2, 3> view(values.data(), {2, 3});
    static_assert(view(1, 1) == 4);
    static_assert(view[1][2] == 5);
    static_assert(view.size() == 6);
    CHECK(view.rows().extent(0) == 2);
}

TEST_CASE("view: what operations take are views and tensors") {
    CHECK(Viewable<View<const float, dynamic, 3>>);
    CHECK(Viewable<Tensor<float, Cpu, dynamic>>);
    CHECK_FALSE(Viewable<std::vector<float>>);
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

TEST_CASE("view: shapes in words") {
    CHECK(shape_string(std::array<Index, 3>{2, -1, 512}) == "(2, any, 512)");
    CHECK(shape_string(std::array<Index, 1>{0}) == "(0)");
    CHECK(shape_string(std::array<Index, 0>{}) == "()");
}

TEST_CASE("view: expect_shape names the argument and prints both shapes; negative extents match anything") {
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

TEST_CASE("view: expect_value names the argument and prints the condition and the value") {
    CHECK_NOTHROW(expect_value(true, "k", ">= 1", 0));
    CHECK_THROWS_WITH_AS(expect_value(false, "k", ">= 1", 0), "colt5: `k` must be >= 1, but is 0", ValueError);
    CHECK_THROWS_WITH_AS(expect_value(false, "eps", "> 0", -0.5), "colt5: `eps` must be > 0, but is -0.5", ValueError);
}

TEST_CASE("view: numbers in messages do not depend on the program's locale") {
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

TEST_CASE("view: expect_bytes counts, and refuses what a signed number cannot count") {
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

TEST_CASE("view: is_range_of does not overflow") {
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
