// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "samples.hpp"

using namespace colt5;
using samples::close;

TEST_CASE_TEMPLATE("row reductions equal a loop", T, float, double) {
    const Cpu policy(1);
    for (Index columns = 1; columns <= 70; ++columns) {
        CAPTURE(columns);
        const Index rows = 5;
        const auto x = samples::matrix<T>(policy, rows, columns, -3, 3);
        VectorTensor<T, Cpu> sum(policy, {rows}), mean(policy, {rows}), largest(policy, {rows}),
            smallest(policy, {rows}), norm(policy, {rows}), log_sum(policy, {rows});
        assign(policy, sum, row_sum(x));
        assign(policy, mean, row_mean(x));
        assign(policy, largest, row_max(x));
        assign(policy, smallest, row_min(x));
        assign(policy, norm, row_norm(x));
        assign(policy, log_sum, row_log_sum_exp(x));
        for (Index i = 0; i < rows; ++i) {
            double total = 0, magnitude = 0, squares = 0, exponentials = 0;
            double high = -std::numeric_limits<double>::infinity(), low = -high;
            for (Index j = 0; j < columns; ++j) {
                const double value = static_cast<double>(x.view()(i, j));
                total += value;
                magnitude += std::abs(value);
                squares += value * value;
                exponentials += std::exp(value);
                high = std::max(high, value);
                low = std::min(low, value);
            }
            CHECK(close(sum.view()[i], total, 4, magnitude));
            CHECK(close(mean.view()[i], total / static_cast<double>(columns), 4,
                        magnitude / static_cast<double>(columns)));
            CHECK(close(largest.view()[i], high, 0));
            CHECK(close(smallest.view()[i], low, 0));
            CHECK(close(norm.view()[i], std::sqrt(squares), 4));
            CHECK(close(log_sum.view()[i], std::log(exponentials), 8, 1));
        }
    }
}

TEST_CASE_TEMPLATE("row reductions stand inside expressions, and inside each other", T, float, double) {
    const Cpu policy(1);
    for (const Index columns : {1, 2, 7, 16, 33, 70}) {
        CAPTURE(columns);
        const Index rows = 3;
        const auto x = samples::matrix<T>(policy, rows, columns, -3, 3);
        const auto scale = samples::vector<T>(policy, columns, 0.5, 2);
        MatrixTensor<T, Cpu> normalized(policy, {rows, columns}), softmax(policy, {rows, columns}),
            centered(policy, {rows, columns});
        assign(policy, normalized, x / sqrt(row_sum(square(x))) * row(scale));
        assign(policy, softmax, exp(x - row_log_sum_exp(x)));
        const auto center = x - row_mean(x);
        assign(policy, centered, center / sqrt(row_mean(square(center)) + 1e-5));
        for (Index i = 0; i < rows; ++i) {
            double squares = 0, exponentials = 0, total = 0, variance = 0;
            const auto value = [&](Index j) { return static_cast<double>(x.view()(i, j)); };
            for (Index j = 0; j < columns; ++j) {
                squares += value(j) * value(j);
                exponentials += std::exp(value(j));
                total += value(j) / static_cast<double>(columns);
            }
            for (Index j = 0; j < columns; ++j)
                variance += (value(j) - total) * (value(j) - total) / static_cast<double>(columns);
            for (Index j = 0; j < columns; ++j) {
                CHECK(close(normalized.view()(i, j),
                            value(j) / std::sqrt(squares) * static_cast<double>(scale.view()[j]), 8));
                CHECK(close(softmax.view()(i, j), std::exp(value(j)) / exponentials, 16));
                CHECK(close(centered.view()(i, j), (value(j) - total) / std::sqrt(variance + 1e-5), 32, 1));
            }
        }
    }
}

TEST_CASE("row_log_sum_exp neither overflows nor makes a NaN of infinities, and keeps a NaN") {
    const Cpu policy(1);
    const float infinity = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
    for (const Index columns : {1, 3, 8, 37}) {
        MatrixTensor<float, Cpu> x(policy, {7, columns});
        for (Index j = 0; j < columns; ++j) {
            x.view()(0, j) = 1000;
            x.view()(1, j) = -infinity;
            x.view()(2, j) = j == 0 ? 5 : -infinity;
            x.view()(3, j) = j == 0 ? infinity : 0;
            x.view()(4, j) = j == columns - 1 ? nan : -infinity;
            x.view()(5, j) = j == columns - 1 ? nan : 2;
            x.view()(6, j) = j == columns - 1 ? nan : infinity;
        }
        VectorTensor<float, Cpu> result(policy, {7});
        assign(policy, result, row_log_sum_exp(x));
        CHECK(close(result.view()[0], 1000 + std::log(static_cast<double>(columns)), 2));
        CHECK(result.view()[1] == -infinity);
        CHECK(result.view()[2] == 5.0f);
        CHECK(result.view()[3] == infinity);
        for (const Index row : {4, 5, 6}) CHECK(std::isnan(result.view()[row]));
    }
}

TEST_CASE_TEMPLATE("row_norm neither overflows nor loses small squares", T, float, double) {
    const Cpu policy(1);
    const double high = std::is_same_v<T, float> ? 0x1p120 : 0x1p1015;
    for (const Index columns : {1, 3, 8, 37, 70}) {
        CAPTURE(columns);
        const auto x = samples::matrix<T>(policy, 4, columns, -3, 3);
        MatrixTensor<T, Cpu> scaled(policy, {4, columns});
        VectorTensor<T, Cpu> plain(policy, {4}), norm(policy, {4});
        assign(policy, plain, row_norm(x));
        for (const double scale : {high, std::sqrt(high), 1 / std::sqrt(high), 1 / high}) {
            assign(policy, scaled, x * static_cast<T>(scale));
            assign(policy, norm, row_norm(scaled));
            for (Index i = 0; i < 4; ++i) CHECK(close(norm.view()[i], scale * static_cast<double>(plain.view()[i]), 8));
        }
        scaled.view()(1, columns - 1) = std::numeric_limits<T>::infinity();
        scaled.view()(2, 0) = std::numeric_limits<T>::quiet_NaN();
        assign(policy, scaled, select(as_expression(scaled) * T(0) == T(0), scaled * T(0), scaled));
        assign(policy, norm, row_norm(scaled));
        CHECK(norm.view()[0] == T(0));
        CHECK(norm.view()[1] == std::numeric_limits<T>::infinity());
        CHECK(std::isnan(norm.view()[2]));
    }
}

TEST_CASE("row reductions of no columns are what leaves the others unchanged") {
    const Cpu policy(1);
    MatrixTensor<double, Cpu> x(policy, {2, 0});
    VectorTensor<double, Cpu> result(policy, {2});
    assign(policy, result, row_sum(x));
    CHECK(result.view()[1] == 0);
    assign(policy, result, row_max(x));
    CHECK(result.view()[1] == -std::numeric_limits<double>::infinity());
    assign(policy, result, row_min(x));
    CHECK(result.view()[1] == std::numeric_limits<double>::infinity());
    assign(policy, result, row_log_sum_exp(x));
    CHECK(result.view()[1] == -std::numeric_limits<double>::infinity());
}

TEST_CASE("row(v) gives one entry per column, column(v) one per row, of a tensor of any rank") {
    const Cpu policy(1);
    TokensTensor<float, Cpu> tokens(policy, {2, 3, 5}), out(policy, {2, 3, 5});
    assign(policy, tokens, 2.0f);
    const auto scale = samples::vector<float>(policy, 5, 1, 2);
    const auto scores = samples::matrix<float>(policy, 2, 3, 1, 2);
    assign(policy, out, tokens * row(scale) + column(scores));
    for (Index b = 0; b < 2; ++b)
        for (Index i = 0; i < 3; ++i)
            for (Index j = 0; j < 5; ++j) CHECK(out.view()(b, i, j) == 2.0f * scale.view()[j] + scores.view()(b, i));
}
