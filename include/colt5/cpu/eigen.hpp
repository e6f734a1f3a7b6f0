// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <type_traits>

#include <Eigen/Core>

#include <colt5/core/view.hpp>

#if !EIGEN_VERSION_AT_LEAST(3, 4, 0)
#error "colt5 needs Eigen 3.4 or newer"
#endif

namespace colt5 {

namespace detail {

template <typename T, int Rows, int Columns>
using EigenMap = Eigen::Map<std::conditional_t<
    std::is_const_v<T>,
    const Eigen::Matrix<std::remove_const_t<T>, Rows, Columns, Columns == 1 ? Eigen::ColMajor : Eigen::RowMajor>,
    Eigen::Matrix<T, Rows, Columns, Columns == 1 ? Eigen::ColMajor : Eigen::RowMajor>>>;

/// Evaluates without a temporary, which only products and their kin would make.
template <typename Map, typename Derived>
void evaluate_into(Map map, const Eigen::EigenBase<Derived>& expression) {
    if constexpr (std::is_base_of_v<Eigen::MatrixBase<Derived>, Derived>)
        map.noalias() = expression.derived();
    else if constexpr (std::is_base_of_v<Eigen::ArrayBase<Derived>, Derived>)
        map.array() = expression.derived();
    else
        map = expression.derived();
}

}  // namespace detail

/// The elements as a row-major Eigen matrix, all leading axes merged into rows; a vector is one row. No copy.
template <typename T, Index... Extents>
auto eigen_matrix(const View<T, Extents...>& view) {
    const auto rows = view.rows();
    return detail::EigenMap<T, Eigen::Dynamic, Eigen::Dynamic>(rows.data(), rows.extent(0), rows.extent(1));
}

/// All the elements, in row-major order, as an Eigen column vector. No copy.
template <typename T, Index... Extents>
auto eigen_vector(const View<T, Extents...>& view) {
    return detail::EigenMap<T, Eigen::Dynamic, 1>(view.data(), view.size());
}

/// Evaluates an Eigen expression into `to`, seen as `eigen_matrix(to)`; a vector takes a row or a column.
///
/// No temporary is made, so that the operands of a matrix product must not overlap `to` (elementwise operands may).
/// Throws ShapeError when the number of rows or columns differs.
template <typename T, Index... Extents, typename Derived>
void assign_eigen(const View<T, Extents...>& to, const Eigen::EigenBase<Derived>& expression) {
    static_assert(!std::is_const_v<T>, "colt5: cannot assign to a view of const elements");
    const Eigen::Index rows = expression.rows(), columns = expression.cols();
    const std::array<Index, 2> actual{rows, columns};
    const std::array<Index, 2> expected = to.rows().shape();
    const bool is_column = sizeof...(Extents) == 1 && columns == 1 && rows == to.size();
    if (actual != expected && !is_column) throw_shape_error("assigned Eigen expression", expected, actual);
    constexpr int static_rows = Derived::RowsAtCompileTime == 1 ? 1 : Eigen::Dynamic;
    constexpr int static_columns = Derived::ColsAtCompileTime == 1 && static_rows != 1 ? 1 : Eigen::Dynamic;
    detail::evaluate_into(detail::EigenMap<T, static_rows, static_columns>(to.data(), rows, columns), expression);
}

}  // namespace colt5
