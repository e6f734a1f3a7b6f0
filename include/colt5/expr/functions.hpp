// SPDX-License-Identifier: MIT
#pragma once

#include <type_traits>

#include <colt5/expr/functors.hpp>
#include <colt5/expr/node.hpp>

namespace colt5 {

/// Arithmetic, entry by entry.
template <typename A, typename B>
requires OperandPair<A, B>
auto operator+(const A& a, const B& b) {
    return expr::binary<expr::Add>(a, b);
}
template <typename A, typename B>
requires OperandPair<A, B>
auto operator-(const A& a, const B& b) {
    return expr::binary<expr::Subtract>(a, b);
}
template <typename A, typename B>
requires OperandPair<A, B>
auto operator*(const A& a, const B& b) {
    return expr::binary<expr::Multiply>(a, b);
}
template <typename A, typename B>
requires OperandPair<A, B>
auto operator/(const A& a, const B& b) {
    return expr::binary<expr::Divide>(a, b);
}
template <OwnOperand A>
auto operator-(const A& a) {
    return expr::unary<expr::Negate>(a);
}

/// The larger and the smaller of two; unspecified where one is NaN.
template <typename A, typename B>
requires OperandPair<A, B>
auto max(const A& a, const B& b) {
    return expr::binary<expr::Maximum>(a, b);
}
template <typename A, typename B>
requires OperandPair<A, B>
auto min(const A& a, const B& b) {
    return expr::binary<expr::Minimum>(a, b);
}

/// a to the power of b, for a >= 0.
template <typename A, typename B>
requires OperandPair<A, B>
auto pow(const A& a, const B& b) {
    return expr::binary<expr::Power>(a, b);
}

/// Comparisons give masks.
template <typename A, typename B>
requires OperandPair<A, B>
auto operator<(const A& a, const B& b) {
    return expr::binary<expr::Less>(a, b);
}
template <typename A, typename B>
requires OperandPair<A, B>
auto operator<=(const A& a, const B& b) {
    return expr::binary<expr::LessOrEqual>(a, b);
}
template <typename A, typename B>
requires OperandPair<A, B>
auto operator>(const A& a, const B& b) {
    return b < a;
}
template <typename A, typename B>
requires OperandPair<A, B>
auto operator>=(const A& a, const B& b) {
    return b <= a;
}
template <typename A, typename B>
requires OperandPair<A, B>
auto operator==(const A& a, const B& b) {
    return expr::binary<expr::Equal>(a, b);
}
template <typename A, typename B>
requires OperandPair<A, B>
auto operator!=(const A& a, const B& b) {
    return expr::binary<expr::NotEqual>(a, b);
}

/// Masks combine. One side must be an expression: `view && view` and `!view` keep asking whether the views have data;
/// as_expression(view) makes an expression of a tensor of bool.
template <typename A, typename B>
requires(OperandPair<A, B> && (ExpressionNode<A> || ExpressionNode<B>)) auto operator&&(const A& a, const B& b) {
    return expr::binary<expr::And>(a, b);
}
template <typename A, typename B>
requires(OperandPair<A, B> && (ExpressionNode<A> || ExpressionNode<B>)) auto operator||(const A& a, const B& b) {
    return expr::binary<expr::Or>(a, b);
}
template <ExpressionNode A>
auto operator!(const A& a) {
    return expr::unary<expr::Not>(a);
}

/// a where `mask` (a comparison or a tensor of bool) is true, else b. Both are evaluated, but only the chosen one
/// counts, whatever the other is. At least one of a and b is not a plain number.
template <Operand M, typename A, typename B>
requires(Operand<A> || Operand<B>) auto select(const M& mask, const A& a, const B& b) {
    const auto where = as_expression(mask);
    const auto then = expr::node<B>(a);
    const auto otherwise = expr::node<A>(b);
    return expr::Selection<std::remove_const_t<decltype(where)>, std::remove_const_t<decltype(then)>,
                           std::remove_const_t<decltype(otherwise)>>(where, then, otherwise);
}

/// The values in another type, as static_cast does it. A mask becomes 1 where true and 0 elsewhere. (What is assigned
/// to a tensor of 16 bits needs no cast: float is rounded there.)
template <Number To, Operand A>
auto cast(const A& a) {
    const auto operand = as_expression(a);
    if constexpr (std::is_same_v<typename decltype(operand)::value_type, bool>)
        return select(operand, expr::Constant<To>(To(1)), expr::Constant<To>(To(0)));
    else if constexpr (std::is_same_v<typename decltype(operand)::value_type, To>)
        return operand;
    else
        return expr::unary<expr::Convert<To>>(operand);
}

/// The number of its column at every entry, 0, 1, 2 …: column_numbers<float>() == column(target) is one-hot.
template <Number T>
auto column_numbers() {
    return expr::ColumnNumber<T>();
}

/// Functions, entry by entry. The accuracy is that of cpu/simd.hpp; see there.
template <OwnOperand A>
auto exp(const A& a) {
    return expr::unary<expr::Exp>(a);
}
template <OwnOperand A>
auto log(const A& a) {
    return expr::unary<expr::Log>(a);
}
template <OwnOperand A>
auto sqrt(const A& a) {
    return expr::unary<expr::Sqrt>(a);
}
template <OwnOperand A>
auto abs(const A& a) {
    return expr::unary<expr::Abs>(a);
}
template <OwnOperand A>
auto tanh(const A& a) {
    return expr::unary<expr::Tanh>(a);
}
template <OwnOperand A>
auto erf(const A& a) {
    return expr::unary<expr::Erf>(a);
}
/// x²
template <OwnOperand A>
auto square(const A& a) {
    return expr::unary<expr::Square>(a);
}
/// 1 / x
template <OwnOperand A>
auto reciprocal(const A& a) {
    return expr::unary<expr::Reciprocal>(a);
}
/// x · Φ(x), Φ(x) = (1 + erf(x / √2)) / 2, with the accuracy of cpu/simd.hpp: without cancellation below 0.
template <OwnOperand A>
auto gelu(const A& a) {
    return expr::unary<expr::Gelu>(a);
}
/// Its derivative Φ(x) + x φ(x), φ(x) = exp(−x² / 2) / √(2π)
template <OwnOperand A>
auto gelu_slope(const A& a) {
    return expr::unary<expr::GeluSlope>(a);
}
/// ½ x (1 + tanh(√(2/π) (x + 0.044715 x³))): the GELU of T5 1.1 ("gelu_new"), without cancellation below 0.
template <OwnOperand A>
auto gelu_tanh(const A& a) {
    return expr::unary<expr::GeluTanh>(a);
}
/// Its derivative.
template <OwnOperand A>
auto gelu_tanh_slope(const A& a) {
    return expr::unary<expr::GeluTanhSlope>(a);
}
/// max(0, x)
template <OwnOperand A>
auto relu(const A& a) {
    return expr::unary<expr::Relu>(a);
}
/// 1 / (1 + exp(−x))
template <OwnOperand A>
auto sigmoid(const A& a) {
    return expr::unary<expr::Sigmoid>(a);
}
/// x / (1 + exp(−x)); 0 at −∞
template <OwnOperand A>
auto silu(const A& a) {
    return expr::unary<expr::Silu>(a);
}

}  // namespace colt5
