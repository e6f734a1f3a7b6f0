// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <span>
#include <type_traits>

#include <colt5/core/policy.hpp>
#include <colt5/expr/node.hpp>

namespace colt5 {

/// The kernel: writes `expression` to `out` (rows, columns), whose shape fits. Overloaded for each policy.
template <typename P>
void assign_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `assign` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}

namespace expr {
/// The rows and columns of what an expression of this shape is assigned to. Throws ShapeError as assign says.
[[gnu::noinline]] inline Shape assigned_shape(std::span<const Index> out, const Shape& expression) {
    Shape rows{1, out.back()};
    for (const Index extent : out.first(out.size() - 1)) rows[0] *= extent;
    if (expression[1] == dynamic && rows[0] * rows[1] == expression[0]) rows = {expression[0], 1};  // one per row
    for (std::size_t axis = 0; axis < 2; ++axis)
        if (expression[axis] != dynamic && expression[axis] != rows[axis])
            throw ShapeError(colt5::detail::concat(
                {"colt5: the expression has shape ", shape_string(expression), ", but `out` has ", shape_string(out)}));
    return rows;
}
}  // namespace expr

/// Evaluates `expression` (a node, a tensor, an Eigen matrix or a number) into `out`, in one pass over its rows.
///
/// `out` is a tensor or a view of any rank, (rows, columns) with all leading axes merged. An expression that is
/// constant over the columns (a reduction, column(v)) may also be written once per row, to an `out` of one element per
/// row: a vector (rows), or (b, n) for an expression over (b, n, d).
///
/// `out` may be an operand itself, elementwise and under reductions, as in `assign(policy, y, y / row_sum(y))`: an
/// entry is read before it is written, a row is reduced before it is written. It must not overlap an operand in any
/// other way: as another region that is shifted, or inside row(v) or column(v).
///
/// Tensors of bfloat16 and float16 are float in an expression, and `out` of such a type takes floats, rounded to
/// nearest.
///
/// Throws ShapeError when the shapes differ.
template <Policy P, typename Out, typename E>
void assign(const P& policy, Out&& out, const E& expression) {
    static_assert(Viewable<std::remove_cvref_t<Out>>, "colt5: assign writes to a view or a tensor");
    static_assert(Operand<E> || Number<E>, "colt5: assign evaluates an expression, a tensor, a matrix or a number");
    const auto view = out.view();
    using T = typename decltype(view)::element_type;
    static_assert(!std::is_const_v<T>, "colt5: assign cannot write to elements that are const");
    const auto node = expr::node<std::remove_cvref_t<Out>>(expression);
    static_assert(std::is_same_v<typename decltype(node)::value_type, expr::computed_t<T>>,
                  "colt5: the expression and what it is assigned to have different scalar types; use cast<T>(e)");

    const auto rows = MatrixView<T>::unchecked(view.data(), expr::assigned_shape(view.shape(), node.shape()));
    assign_kernel(policy, rows, node);
}

}  // namespace colt5
