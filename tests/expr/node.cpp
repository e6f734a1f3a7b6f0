// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <concepts>
#include <string>
#include <utility>
#include <vector>

#include "samples.hpp"

using namespace colt5;

namespace {

template <typename Call>
std::string message(const Call& call) {
    try {
        call();
    } catch (const ShapeError& error) {
        return error.what();
    }
    return "nothing was thrown";
}

template <typename A, typename B>
concept Addable = requires(const A& a, const B& b) {
    a + b;
};

struct Foreign {};

}  // namespace

TEST_CASE("expressions: shapes that differ are named, with those of all operands") {
    const Cpu policy(1);
    MatrixTensor<float, Cpu> x(policy, {6, 4}), y(policy, {6, 5});
    VectorTensor<float, Cpu> v(policy, {4}), w(policy, {6});
    const std::string hint = ", which do not match; row(v) and column(v) broadcast a vector";
    CHECK(message([&] { x + y; }) == "colt5: the operands of `+` have shapes (6, 4) and (6, 5)" + hint);
    CHECK(message([&] { max(x, v); }) == "colt5: the operands of `max` have shapes (6, 4) and (1, 4)" + hint);
    CHECK(message([&] { x* row(w); }) == "colt5: the operands of `*` have shapes (6, 4) and (any, 6)" + hint);
    CHECK(message([&] { x* column(v); }) == "colt5: the operands of `*` have shapes (6, 4) and (4, any)" + hint);
    CHECK(message([&] { select(x > 0, y, 0); }) ==
          "colt5: the operands of `select` have shapes (6, 4) and (6, 5) and (any, any)" + hint);
    CHECK(message([&] { x* row(v) - column(w) / row_sum(y); }) == "nothing was thrown");
}

TEST_CASE("expressions: what is assigned to must fit") {
    const Cpu policy(1);
    TokensTensor<float, Cpu> x(policy, {2, 3, 4});
    MatrixTensor<float, Cpu> out(policy, {6, 5});
    VectorTensor<float, Cpu> vector(policy, {5});
    CHECK(message([&] { assign(policy, out, x * 2); }) ==
          "colt5: the expression has shape (6, 4), but `out` has (6, 5)");
    CHECK(message([&] { assign(policy, vector, row_sum(x)); }) ==
          "colt5: the expression has shape (6, any), but `out` has (5)");
}

TEST_CASE("expressions: only what has columns can be reduced") {
    const Cpu policy(1);
    MatrixTensor<float, Cpu> x(policy, {6, 4});
    CHECK(message([&] { row_max(row_sum(x) * 2); }) ==
          "colt5: the operand of `row_max` has shape (6, any): it has no columns of its own to reduce");
}

TEST_CASE("expressions: leading axes are merged and a vector is one row") {
    const Cpu policy(1);
    const TokensTensor<float, Cpu> x(policy, {2, 3, 4});
    const MatrixTensor<float, Cpu> merged(policy, {6, 4});
    const VectorTensor<float, Cpu> v(policy, {4});
    CHECK((x + merged).shape() == expr::Shape{6, 4});
    CHECK(exp(v).shape() == expr::Shape{1, 4});
    CHECK(row_sum(x).shape() == expr::Shape{6, dynamic});
}

TEST_CASE("expressions: operators are there for our own types alone") {
    using Tensor = MatrixTensor<float, Cpu>;
    static_assert(Addable<Tensor, Tensor> && Addable<MatrixView<const float>, int> && Addable<double, Tensor>);
    static_assert(Addable<Tensor, Eigen::MatrixXf> && Addable<Eigen::MatrixXf, Tensor>);
    static_assert(!Addable<Foreign, Tensor> && !Addable<Tensor, Foreign> && !Addable<Tensor, std::string>);
    static_assert(!Addable<std::vector<Tensor>, int> && !Addable<std::vector<Tensor>, Tensor>);
    static_assert(
        std::same_as<decltype(std::declval<Eigen::MatrixXf>() + std::declval<Eigen::MatrixXf>())::Scalar, float>);
    // Views and tensors still say whether they hold anything.
    const Mask absent;
    CHECK(!absent);
    CHECK_FALSE((absent && absent));
}
