// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <string>
#include <vector>

#include "samples.hpp"

using namespace colt5;

namespace {

/// One of everything that could depend on where a row lies.
template <typename T>
auto busy(const MatrixView<const T>& x, const VectorView<const T>& scale) {
    const auto center = x - row_mean(x);
    return select(x > 0, gelu(center / sqrt(row_mean(square(center)) + 1e-5) * row(scale)),
                  exp(x - row_log_sum_exp(x)) / row_max(abs(x)));
}

template <typename T>
bool same_bits(const T* a, const T* b, Index count) {
    return std::memcmp(a, b, static_cast<std::size_t>(count) * sizeof(T)) == 0;
}

}  // namespace

TEST_CASE_TEMPLATE("assign: the same bits with 1, 2 and 3 threads", T, float, double) {
    for (const Index columns : {1, 37, 200, 40000}) {
        CAPTURE(columns);
        const Index rows = std::max<Index>(3, 100000 / columns);
        const Cpu one(1);
        const auto x = samples::matrix<T>(one, rows, columns, -3, 3);
        const auto scale = samples::vector<T>(one, columns, 0.5, 2);
        MatrixTensor<T, Cpu> expected(one, {rows, columns}), plain(one, {rows, columns});
        VectorTensor<T, Cpu> norms(one, {rows});
        assign(one, expected, busy<T>(x.view(), scale.view()));
        assign(one, plain, silu(x) * row(scale));
        assign(one, norms, row_norm(x));
        for (const int threads : {2, 3}) {
            const Cpu policy(threads);
            MatrixTensor<T, Cpu> out(policy, {rows, columns});
            VectorTensor<T, Cpu> vector(policy, {rows});
            assign(policy, out, busy<T>(x.view(), scale.view()));
            CHECK(same_bits(out.data(), expected.data(), out.size()));
            assign(policy, out, silu(x) * row(scale));
            CHECK(same_bits(out.data(), plain.data(), out.size()));
            assign(policy, vector, row_norm(x));
            CHECK(same_bits(vector.data(), norms.data(), rows));
        }
    }
}

TEST_CASE_TEMPLATE("assign: the same bits wherever the row lies", T, float, double) {
    const Cpu policy(1);
    for (Index columns = 1; columns <= 70; ++columns) {
        CAPTURE(columns);
        const auto row_values = samples::matrix<T>(policy, 1, columns, -3, 3);
        const auto scale = samples::vector<T>(policy, columns, 0.5, 2);
        MatrixTensor<T, Cpu> alone(policy, {1, columns}), x(policy, {7, columns}), out(policy, {7, columns});
        assign(policy, x, row(row_values.view()[0]));
        assign(policy, alone, busy<T>(row_values.view(), scale.view()));
        assign(policy, out, busy<T>(x.view(), scale.view()));
        for (Index i = 0; i < 7; ++i) CHECK(same_bits(out.view()[i].data(), alone.data(), columns));
    }
}

TEST_CASE("assign: a long row is cut where nothing shows") {
    const Cpu policy(2);
    const Index size = 3 * 16384 + 5;
    const auto x = samples::vector<float>(policy, size, -3, 3);
    VectorTensor<float, Cpu> out(policy, {size});
    assign(policy, out, x * 2 + 1);
    Index wrong = 0;
    for (Index i = 0; i < size; ++i) wrong += out.view()[i] == x.view()[i] * 2 + 1 ? 0 : 1;
    CHECK(wrong == 0);
}

TEST_CASE("assign: writes nothing beyond the last column") {
    const Cpu policy(1);
    for (Index columns = 1; columns <= 40; ++columns) {
        std::vector<double> memory(static_cast<std::size_t>(columns + 1), 7.0);
        const VectorView<double> out(memory.data(), {columns});
        assign(policy, out, 1.0);
        CHECK(std::count(memory.begin(), memory.end(), 1.0) == columns);
        CHECK(memory.back() == 7.0);
    }
}

TEST_CASE("assign: what is written may be an operand, elementwise and under reductions") {
    const Cpu policy(1);
    for (const Index columns : {1, 5, 16, 37}) {
        CAPTURE(columns);
        const auto x = samples::matrix<double>(policy, 3, columns, 1, 2);
        MatrixTensor<double, Cpu> y(policy, {3, columns}), expected(policy, {3, columns});
        assign(policy, y, x);
        assign(policy, expected, x + x * 3);
        assign(policy, y, y + y * 3);
        CHECK(same_bits(y.data(), expected.data(), y.size()));
        assign(policy, y, x);
        assign(policy, expected, x / row_sum(x) - row_max(x));
        assign(policy, y, y / row_sum(y) - row_max(y));
        CHECK(same_bits(y.data(), expected.data(), y.size()));
    }
}

TEST_CASE("assign: one value per row goes to a vector, to leading axes, or over the columns") {
    const Cpu policy(1);
    TokensTensor<float, Cpu> x(policy, {2, 3, 4}), filled(policy, {2, 3, 4});
    for (Index i = 0; i < x.size(); ++i) x.data()[i] = static_cast<float>(i);
    VectorTensor<float, Cpu> vector(policy, {6});
    MatrixTensor<float, Cpu> matrix(policy, {2, 3});
    assign(policy, vector, row_sum(x));
    assign(policy, matrix, row_sum(x) + column(vector));
    assign(policy, filled, row_sum(x));
    for (Index i = 0; i < 6; ++i) {
        const float sum = static_cast<float>(16 * i + 6);
        CHECK(vector.view()[i] == sum);
        CHECK(matrix.data()[i] == 2 * sum);
        CHECK(filled.data()[4 * i + 3] == sum);
    }
}

TEST_CASE("assign: an expression with a row or column too few or too many is refused, and nothing is written") {
    const Cpu policy(1);
    constexpr Index rows = 3, columns = 5;
    const auto refused = [&](auto&& expression_of) {
        for (const auto& off : {std::array<Index, 2>{0, -1}, {0, 1}, {-1, 0}, {1, 0}, {0, -columns}, {-rows, 0}}) {
            const Index i = off[0], j = off[1];
            CAPTURE(i);
            CAPTURE(j);
            const auto x = samples::matrix<float>(policy, rows + i, columns + j, 1, 2);
            const auto of_columns = samples::vector<float>(policy, columns + j, 1, 2);
            const auto of_rows = samples::vector<float>(policy, rows + i, 1, 2);
            const auto expression = expression_of(x, of_columns, of_rows);
            const auto shape = as_expression(expression).shape();
            const bool fits = (shape[0] == dynamic || i == 0) && (shape[1] == dynamic || j == 0);
            TokensTensor<float, Cpu> out(policy, {1, rows, columns});
            assign(policy, out, -1);
            if (fits) {
                CHECK_NOTHROW(assign(policy, out, expression));
                continue;
            }
            const std::string message =
                "colt5: the expression has shape " + shape_string(shape) + ", but `out` has (1, 3, 5)";
            CHECK_THROWS_WITH_AS(assign(policy, out, expression), message.c_str(), ShapeError);
            CHECK(std::count(out.data(), out.data() + out.size(), -1.0f) == out.size());
        }
    };
    refused([](const auto& x, const auto&, const auto&) { return as_expression(x); });
    refused([](const auto& x, const auto&, const auto&) { return cast<float>(x > 1.5f); });
    refused([](const auto&, const auto& v, const auto&) { return row(v); });
    refused([](const auto&, const auto&, const auto& v) { return column(v); });
    refused([](const auto&, const auto& v, const auto& w) { return row(v) * column(w); });
    refused([](const auto& x, const auto& v, const auto& w) { return select(x > column(w), row(v), exp(x)); });
    refused([](const auto& x, const auto&, const auto&) { return row_sum(x); });
    refused([](const auto& x, const auto& v, const auto&) { return row_log_sum_exp(x) + row(v); });

    // One entry per row: as many as `out` has elements.
    VectorTensor<float, Cpu> vector(policy, {rows});
    MatrixTensor<float, Cpu> leading(policy, {1, rows});
    for (const Index wrong : {rows - 1, rows + 1}) {
        const auto v = samples::vector<float>(policy, wrong, 1, 2);
        const auto x = samples::matrix<float>(policy, wrong, columns, 1, 2);
        CHECK_THROWS_AS(assign(policy, vector, column(v)), ShapeError);
        CHECK_THROWS_AS(assign(policy, leading, column(v)), ShapeError);
        CHECK_THROWS_AS(assign(policy, vector, row_max(x)), ShapeError);
        CHECK_THROWS_AS(assign(policy, leading, row_max(x)), ShapeError);
    }
}

TEST_CASE("assign: takes views, numbers and empty tensors") {
    const Cpu policy(2);
    MatrixTensor<float, Cpu> x(policy, {2, 3}), empty(policy, {0, 3});
    assign(policy, x, 2);
    assign(policy, x.view()[1], 5);
    CHECK(x.view()(0, 2) == 2.0f);
    CHECK(x.view()(1, 0) == 5.0f);
    CHECK_NOTHROW(assign(policy, empty, empty + 1));
}

TEST_CASE("assign: an expression may be kept and evaluated again") {
    const Cpu policy(1);
    auto x = samples::matrix<float>(policy, 2, 9, -1, 1);
    MatrixTensor<float, Cpu> out(policy, {2, 9});
    const auto doubled = x * 2 + row_max(x);
    assign(policy, out, doubled);
    assign(policy, x, 1);
    assign(policy, out, doubled);
    CHECK(out.view()(1, 8) == 3.0f);
}

TEST_CASE_TEMPLATE("assign: 16 bits are computed in float and rounded once", T, bfloat16, float16) {
    const Cpu policy(1);
    for (const Index columns : {1, 7, 16, 100}) {
        CAPTURE(columns);
        const auto wide = samples::matrix<float>(policy, 9, columns, -3, 3);
        MatrixTensor<T, Cpu> x(policy, {9, columns}), y(policy, {9, columns});
        MatrixTensor<float, Cpu> x_widened(policy, {9, columns}), expected(policy, {9, columns});
        assign(policy, x, wide);
        for (Index i = 0; i < wide.size(); ++i) REQUIRE(x.data()[i].bits() == T(wide.data()[i]).bits());
        assign(policy, x_widened, x);
        assign(policy, y, exp(x - row_log_sum_exp(x)) * wide);
        assign(policy, expected, exp(x_widened - row_log_sum_exp(x_widened)) * wide);
        for (Index i = 0; i < wide.size(); ++i) CHECK(y.data()[i].bits() == T(expected.data()[i]).bits());
    }
}
