// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include "../expr/samples.hpp"

using namespace colt5;

TEST_CASE_TEMPLATE("Eigen matrices of either storage order stand in expressions", T, float, double) {
    const Cpu policy(1);
    for (const Index columns : {1, 4, 7, 16, 33}) {
        CAPTURE(columns);
        const Index rows = 5;
        const auto x = samples::matrix<T>(policy, rows, columns, -2, 2);
        using RowMajor = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
        using ColumnMajor = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic>;
        const ColumnMajor by_columns = ColumnMajor::Random(rows, columns);
        const RowMajor by_rows = RowMajor::Random(rows, columns);
        const Eigen::Array<T, Eigen::Dynamic, Eigen::Dynamic> array = by_columns.array() + T(1);
        MatrixTensor<T, Cpu> out(policy, {rows, columns});
        assign(policy, out, x * by_columns - by_rows / (array + 0 * x));
        RowMajor expected = x.matrix().array() * by_columns.array() - by_rows.array() / array;
        CHECK(out.matrix().isApprox(expected));
        assign(policy, out, as_expression(by_columns) / row_norm(by_columns));
        expected = by_columns.rowwise().normalized();
        CHECK(out.matrix().isApprox(expected));
        assign(policy, out, by_columns);
        CHECK(out.matrix() == by_columns);
    }
}

TEST_CASE("Eigen blocks, transposes and maps stand in expressions") {
    const Cpu policy(1);
    const Eigen::MatrixXd large = Eigen::MatrixXd::Random(20, 30);
    MatrixTensor<double, Cpu> out(policy, {7, 11});
    assign(policy, out, large.block(3, 4, 7, 11));
    CHECK(out.matrix() == large.block(3, 4, 7, 11));
    assign(policy, out, large.transpose().block(3, 4, 7, 11));
    CHECK(out.matrix() == large.transpose().block(3, 4, 7, 11));
    const auto x = samples::matrix<double>(policy, 7, 11, -1, 1);
    assign(policy, out, x.matrix() * as_expression(x));
    CHECK(out.matrix().isApprox(x.matrix().cwiseAbs2()));
    const Eigen::Map<const Eigen::MatrixXd, 0, Eigen::Stride<Eigen::Dynamic, Eigen::Dynamic>> strided(
        large.data(), 7, 11, Eigen::Stride<Eigen::Dynamic, Eigen::Dynamic>(40, 2));
    assign(policy, out, strided);
    CHECK(out.matrix() == strided);
}

TEST_CASE("Eigen vectors are one row; row and column broadcast them") {
    const Cpu policy(1);
    const auto x = samples::matrix<float>(policy, 5, 19, -1, 1);
    const Eigen::VectorXf per_column = Eigen::VectorXf::Random(19);
    const Eigen::RowVectorXf per_row = Eigen::RowVectorXf::Random(5);
    const Eigen::MatrixXf matrix = Eigen::MatrixXf::Random(40, 19);
    MatrixTensor<float, Cpu> out(policy, {5, 19});
    assign(policy, out, x * row(per_column) + column(per_row));
    for (Index i = 0; i < 5; ++i)
        for (Index j = 0; j < 19; ++j)
            CHECK(out.view()(i, j) == doctest::Approx(x.view()(i, j) * per_column(j) + per_row(i)));
    assign(policy, out, x + row(matrix.row(3)));  // its entries lie 40 apart
    for (Index j = 0; j < 19; ++j) CHECK(out.view()(4, j) == x.view()(4, j) + matrix(3, j));
    VectorTensor<float, Cpu> vector(policy, {19});
    assign(policy, vector, 2 * as_expression(per_column));
    CHECK(vector.vector() == 2 * per_column);
    CHECK_THROWS_WITH_AS(x + per_column,
                         "colt5: the operands of `+` have shapes (5, 19) and (1, 19), which do not match; row(v) and "
                         "column(v) broadcast a vector",
                         ShapeError);
}

TEST_CASE("an Eigen expression evaluated in the statement lives long enough") {
    const Cpu policy(1);
    const auto x = samples::matrix<double>(policy, 4, 4, -1, 1);
    MatrixTensor<double, Cpu> out(policy, {4, 4});
    assign(policy, out, x + (x.matrix() * x.matrix()).eval());
    CHECK(out.matrix().isApprox(x.matrix() + x.matrix() * x.matrix()));
}
