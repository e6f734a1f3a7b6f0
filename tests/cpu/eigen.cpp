// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <type_traits>
#include <vector>

#include <colt5/core/tensor.hpp>
#include <colt5/cpu/eigen.hpp>
#include <colt5/cpu/policy.hpp>

using namespace colt5;

TEST_CASE("eigen_matrix: a row-major map with the leading axes merged") {
    std::vector<double> values(24);
    for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<double>(i);
    const View<double, dynamic, dynamic, 4> view(values.data(), {2, 3, 4});
    auto matrix = eigen_matrix(view);
    CHECK(matrix.rows() == 6);
    CHECK(matrix.cols() == 4);
    CHECK(matrix(4, 1) == 17.0);
    matrix(5, 3) = -1;
    CHECK(values[23] == -1.0);
    CHECK(eigen_matrix(VectorView<double>(values.data(), {24})).rows() == 1);
    static_assert(!std::is_assignable_v<decltype(eigen_matrix(view.const_view())(0, 0)), double>);
}

TEST_CASE("eigen_vector: all elements in row-major order") {
    MatrixTensor<float, Cpu> tensor(Cpu(1), {2, 3});
    for (Index i = 0; i < 6; ++i) tensor.data()[i] = static_cast<float>(i + 1);
    auto vector = eigen_vector(tensor.view());
    CHECK(vector.cols() == 1);
    CHECK(vector.size() == 6);
    CHECK(vector(4) == 5.0f);
    vector *= 2;
    CHECK(tensor.view()(1, 2) == 12.0f);
}

TEST_CASE("tensors take Eigen expressions: matrices, arrays, products, diagonals") {
    const Cpu policy(1);
    const Eigen::MatrixXd a = Eigen::MatrixXd::Random(6, 5), b = Eigen::MatrixXd::Random(5, 4);
    TokensTensor<double, Cpu> tokens(policy, {2, 3, 4});
    tokens = a * b;
    CHECK(tokens.matrix().isApprox(a * b));
    tokens = (a * b).array().exp() * 2.0;
    CHECK(tokens.matrix().isApprox(((a * b).array().exp() * 2.0).matrix()));
    tokens = tokens.matrix() + tokens.matrix() * 2.0;  // elementwise: may be an operand of itself
    CHECK(tokens.matrix().isApprox(((a * b).array().exp() * 6.0).matrix()));
    MatrixTensor<double, Cpu> square(policy, {4, 4});
    square = Eigen::VectorXd::Constant(4, 3.0).asDiagonal();
    CHECK(square.view()(2, 2) == 3.0);
    CHECK(square.view()(2, 1) == 0.0);
}

TEST_CASE("vectors take columns and rows") {
    const Cpu policy(1);
    const Eigen::MatrixXf a = Eigen::MatrixXf::Random(3, 5);
    const Eigen::VectorXf v = Eigen::VectorXf::Random(5);
    VectorTensor<float, Cpu> out(policy, {3});
    out = a * v;
    CHECK(out.vector().isApprox(a * v));
    out = v.transpose() * a.transpose();
    CHECK(out.vector().isApprox(a * v));
    out = a.rowwise().sum();
    CHECK(out.vector().isApprox(a.rowwise().sum()));
    out = a.col(2);
    CHECK(out.vector() == a.col(2));
    const Eigen::MatrixXf column = a.col(1), row = column.transpose();
    out = column;
    CHECK(out.vector() == column);
    out = row;
    CHECK(out.vector() == column);
}

TEST_CASE("assigning an Eigen expression allocates nothing in the policy's workspace") {
    const Cpu policy(1);
    const Eigen::MatrixXd a = Eigen::MatrixXd::Random(6, 5), b = Eigen::MatrixXd::Random(5, 4);
    MatrixTensor<double, Cpu> out(policy, {6, 4});
    const double* data = out.data();
    out = a * b;
    CHECK(out.data() == data);
}

TEST_CASE("assigning an Eigen expression of another shape throws and names both") {
    const Cpu policy(1);
    TokensTensor<double, Cpu> tokens(policy, {2, 3, 4});
    VectorTensor<double, Cpu> vector(policy, {3});
    const char* expected = "colt5: `assigned Eigen expression` must have shape (6, 4), but has (4, 6)";
    CHECK_THROWS_WITH_AS(tokens = Eigen::MatrixXd::Zero(4, 6), expected, ShapeError);
    expected = "colt5: `assigned Eigen expression` must have shape (1, 3), but has (4, 1)";
    CHECK_THROWS_WITH_AS(vector = Eigen::VectorXd::Zero(4), expected, ShapeError);
}
