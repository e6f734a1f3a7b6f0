// SPDX-License-Identifier: MIT
#pragma once

#include <limits>

#include <colt5/expr/functions.hpp>

namespace colt5 {

namespace expr {

/// A reducer combines entries that start from `identity`, which no entry changes.
struct Sum : Add {
    static constexpr const char* name = "row_sum";
    template <typename T>
    static constexpr T identity = T(0);
};
struct Largest : Maximum {
    static constexpr const char* name = "row_max";
    template <typename T>
    static constexpr T identity = std::numeric_limits<T>::has_infinity ? -std::numeric_limits<T>::infinity()
                                                                       : std::numeric_limits<T>::lowest();
};
struct Smallest : Minimum {
    static constexpr const char* name = "row_min";
    template <typename T>
    static constexpr T identity = std::numeric_limits<T>::has_infinity ? std::numeric_limits<T>::infinity()
                                                                       : std::numeric_limits<T>::max();
};
/// Not a fold but two: the largest, then the sum of exponentials below it.
struct LogSumExp {
    static constexpr const char* name = "row_log_sum_exp";
};
/// A fold of squares, and another one where they leave the range.
struct Norm {
    static constexpr const char* name = "row_norm";
};

}  // namespace expr

/// Every row is `v`: one entry per column. `v` is a vector: of rank 1, or an Eigen vector.
template <Operand V>
requires(!ExpressionNode<V>) auto row(const V& v) {
    static_assert(LeafTraits<V>::is_vector, "colt5: row(v) takes a vector");
    auto leaf = LeafTraits<V>::leaf(v);
    return decltype(leaf)(leaf.data, {dynamic, leaf.shape()[1]}, 0, leaf.column_stride);
}

/// Every column is `v`: one entry per row. A tensor of any rank gives its elements in row-major order, so that scores
/// (b, k) scale the rows of tokens (b, k, d).
template <Operand V>
requires(!ExpressionNode<V>) auto column(const V& v) {
    const expr::Elements elements = LeafTraits<V>::elements(v);
    using Scalar = typename LeafTraits<V>::value_type;
    return expr::Leaf<Scalar, expr::Columns::broadcast>(elements.data, {elements.size, dynamic}, elements.stride, 0);
}

/// Row reductions: one value per row, the same for all columns of the expression around it. The order of the operations
/// depends on the number of columns (and the instruction set) alone. They are computed once per row and mention; the
/// sum is kept in the type of the operand, in as many partial sums as two vector registers hold.
///
/// Of no columns at all: 0, −∞, +∞; NaN entries make row_max and row_min unspecified.
template <Operand A>
auto row_sum(const A& a) {
    return expr::reduction<expr::Sum>(a);
}
template <Operand A>
auto row_max(const A& a) {
    return expr::reduction<expr::Largest>(a);
}
template <Operand A>
auto row_min(const A& a) {
    return expr::reduction<expr::Smallest>(a);
}

/// log Σ exp(x), without overflow. −∞ if every entry is −∞ (or there are none), so that exp(x − row_log_sum_exp(x)),
/// the softmax, is NaN in such a row.
template <Operand A>
auto row_log_sum_exp(const A& a) {
    return expr::reduction<expr::LogSumExp>(a);
}

/// Σ x / columns
template <Operand A>
auto row_mean(const A& a) {
    const auto sum = row_sum(a);
    return sum / sum.columns;
}

/// ‖x‖₂ = √Σ x², also where squares overflow or are too small for the type.
template <Operand A>
auto row_norm(const A& a) {
    return expr::reduction<expr::Norm>(a);
}

}  // namespace colt5
