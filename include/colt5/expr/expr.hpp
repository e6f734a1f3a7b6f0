// SPDX-License-Identifier: MIT
#pragma once

/// Elementwise and row-reduction expressions.
///
/// Written like the formula, evaluated in one parallel, vectorized pass over the rows, without a temporary:
///
///     assign(policy, y, x / row_norm(x) * row(gamma));               // normalize, then scale each column
///     assign(policy, p, exp(x - row_log_sum_exp(x)));                // softmax
///     assign(policy, y, y + column(score) * gelu(x + row(bias)));    // accumulate
///     assign(policy, norms, row_norm(x));                            // one value per row
///     assign(policy, y, select(mask, x, 0));                         // y = 0 where mask is false
///     assign(policy, y, cast<double>(x) - eigen_matrix);             // types are converted on request only
///
/// | operands     | views and tensors of any rank, seen as (all leading axes merged, last axis), a vector as one row;
/// |              | plain numbers; Eigen matrices, vectors, maps and blocks (with cpu/expr.hpp); expressions; |
/// |              | elements of bfloat16 and float16 are computed in float, and rounded when assigned |
/// | arithmetic   | + - * / unary minus, max, min, pow |
/// | functions    | exp, log, sqrt, abs, square, reciprocal, tanh, erf, gelu, relu, sigmoid, silu, cast<T> |
/// | masks        | < <= > >= == !=, && || !, tensors of bool; select(mask, a, b), cast<T>(mask) |
/// | broadcasting | row(v): one entry per column; column(v): one entry per row; column_numbers<T>(): 0, 1, 2 … |
/// | reductions   | row_sum, row_mean, row_max, row_min, row_norm, row_log_sum_exp: one value per row |
///
/// An expression is a small value that holds the addresses of its operands' elements. It can be kept in an `auto` and
/// evaluated any number of times for as long as these live. Functions of several operands throw ShapeError where shapes
/// differ; different scalar types do not compile without a cast. What is constant over the columns of a row, as
/// sqrt(row_sum(x)), is computed once per row. `assign` documents what may alias.
///
/// The bits of an entry depend on the values of its row alone: not on the number of threads, on where the row lies, or
/// on how many there are.

#include <colt5/expr/assign.hpp>
#include <colt5/expr/functions.hpp>
#include <colt5/expr/functors.hpp>
#include <colt5/expr/node.hpp>
#include <colt5/expr/reduce.hpp>
