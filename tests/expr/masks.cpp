// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <cmath>
#include <cstdint>

#include "samples.hpp"

using namespace colt5;
using samples::close, samples::first_wrong;

TEST_CASE_TEMPLATE("expressions: comparisons equal a loop", T, float, double) {
    // Of few different numbers, so that == happens.
    const auto compare = [](const auto& comparison) {
        return first_wrong<T>(
            -2, 2, 0,
            [&](const auto& x, const auto& y) {
                return comparison(cast<T>(cast<std::int32_t>(x)), cast<T>(cast<std::int32_t>(y)));
            },
            [&](double a, double b) { return comparison(std::trunc(a), std::trunc(b)); });
    };
    CHECK(compare([](const auto& a, const auto& b) { return a < b; }) == "none");
    CHECK(compare([](const auto& a, const auto& b) { return a <= b; }) == "none");
    CHECK(compare([](const auto& a, const auto& b) { return a > b; }) == "none");
    CHECK(compare([](const auto& a, const auto& b) { return a >= b; }) == "none");
    CHECK(compare([](const auto& a, const auto& b) { return a == b; }) == "none");
    CHECK(compare([](const auto& a, const auto& b) { return a != b; }) == "none");
    CHECK(compare([](const auto& a, const auto& b) { return (a > 0 && b < 1) || !(a < b); }) == "none");
}

TEST_CASE_TEMPLATE("expressions: select and the cast of a mask equal a loop", T, float, double) {
    CHECK(first_wrong<T>(
              -2, 2, 1, [](const auto& x, const auto& y) { return select(x < y, x * 2, 0); },
              [](double a, double b) { return a < b ? a * 2 : 0; }) == "none");
    CHECK(first_wrong<T>(
              -2, 2, 0, [](const auto& x, const auto& y) { return cast<T>(x < y); },
              [](double a, double b) { return a < b ? 1 : 0; }) == "none");
}

TEST_CASE("expressions: casts change the type that is computed in") {
    const auto product = [](double a, double b) { return a * b; };
    CHECK(first_wrong<float>(
              -2, 2, 1, [](const auto& x, const auto& y) { return cast<double>(x) * cast<double>(y); }, product) ==
          "none");
    CHECK(first_wrong<double>(
              -2, 2, 1, [](const auto& x, const auto& y) { return cast<float>(x * y); }, product) == "none");
}

TEST_CASE("expressions: a mask of one type chooses between values of another") {
    CHECK(first_wrong<float>(
              -2, 2, 0,
              [](const auto& x, const auto& y) { return select(x < y, cast<double>(x), cast<double>(y) * 2); },
              [](double a, double b) { return a < b ? a : b * 2; }) == "none");
    CHECK(first_wrong<float>(
              -2, 2, 0,
              [](const auto& x, const auto& y) { return select(cast<double>(x) < cast<double>(y) && x > -1, x, y); },
              [](double a, double b) { return a < b && a > -1 ? a : b; }) == "none");
}

TEST_CASE("expressions: tensors of bool are masks, tensors of integers are numbers") {
    const Cpu policy(1);
    for (Index columns = 1; columns <= 40; ++columns) {
        const auto x = samples::matrix<float>(policy, 3, columns, -2, 2);
        MatrixTensor<bool, Cpu> mask(policy, {3, columns}), inverse(policy, {3, columns});
        MatrixTensor<std::int32_t, Cpu> counts(policy, {3, columns}), sums(policy, {3, columns});
        for (Index i = 0; i < x.size(); ++i) {
            mask.data()[i] = i % 3 == 0;
            counts.data()[i] = static_cast<std::int32_t>(i);
        }
        MatrixTensor<float, Cpu> kept(policy, {3, columns}), scaled(policy, {3, columns});
        assign(policy, kept, select(mask, x, -1));
        assign(policy, inverse, !as_expression(mask));
        assign(policy, scaled, cast<float>(counts) * x);
        assign(policy, sums, counts + 2);
        Index wrong = 0;
        for (Index i = 0; i < x.size(); ++i) {
            wrong += kept.data()[i] == (i % 3 == 0 ? x.data()[i] : -1.0f) ? 0 : 1;
            wrong += inverse.data()[i] == (i % 3 != 0) ? 0 : 1;
            wrong += scaled.data()[i] == static_cast<float>(i) * x.data()[i] ? 0 : 1;
            wrong += sums.data()[i] == static_cast<std::int32_t>(i) + 2 ? 0 : 1;
        }
        CHECK(wrong == 0);
    }
}

TEST_CASE("expressions: what select does not choose does not count, whatever it is") {
    const Cpu policy(1);
    const auto x = samples::matrix<float>(policy, 3, 19, -1, 1);
    MatrixTensor<float, Cpu> out(policy, {3, 19});
    assign(policy, out, select(x > 0, log(x), 0));
    for (Index i = 0; i < x.size(); ++i)
        CHECK(close(out.data()[i], x.data()[i] > 0 ? std::log(static_cast<double>(x.data()[i])) : 0, 2));
}
