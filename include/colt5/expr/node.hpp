// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <concepts>
#include <cstddef>
#include <span>
#include <string>
#include <type_traits>

#include <colt5/core/scalar.hpp>
#include <colt5/core/view.hpp>

namespace colt5 {

/// Base of every node of an expression. It lives in colt5, so that the operators are found for every node.
struct Expression {};

/// A node: what it computes is read off its members by the evaluator of a policy (cpu/expr.hpp). A node has
///
///     value_type             type of an entry; bool for a mask; float for elements of 16 bits
///     varies_over_columns    false if all entries of a row are equal: constants, column(v), row reductions of anything
///     has_reduction          whether a row reduction is in it
///     smallest_scalar        size in bytes of the smallest type in it that is no bool
///     shape()                (rows, columns), `dynamic` where it takes whatever is around it
///     reduced_columns()      the longest row that a reduction in it reads
template <typename T>
concept ExpressionNode = std::derived_from<T, Expression>;

namespace expr {

using Shape = std::array<Index, 2>;

/// How the columns of a leaf lie in memory.
enum class Columns { contiguous, strided, broadcast };

/// What elements of type T are computed in: float for those of 16 bits, themselves otherwise.
template <typename T>
using computed_t = std::conditional_t<HalfPrecision<T>, float, T>;

/// Elements in memory, by address: (i, j) is data[i * row_stride + j * column_stride]. Strides are in elements.
template <typename T, Columns Layout>
class Leaf : public Expression {
public:
    using value_type = computed_t<T>;
    static constexpr bool varies_over_columns = Layout != Columns::broadcast;
    static constexpr bool has_reduction = false;
    static constexpr std::size_t smallest_scalar = std::is_same_v<T, bool> ? sizeof(double) : sizeof(value_type);
    static_assert(std::is_same_v<T, bool> || sizeof(T) <= sizeof(double),
                  "colt5: expressions are made of numbers of at most 8 bytes and bool");

    Leaf(const T* elements, const Shape& shape, Index between_rows, Index between_columns)
        : data(elements), row_stride(between_rows), column_stride(between_columns), shape_(shape) {}

    const Shape& shape() const { return shape_; }
    static Index reduced_columns() { return 0; }

    const T* data;
    Index row_stride, column_stride;

private:
    Shape shape_;
};

/// The same number everywhere.
template <typename T>
class Constant : public Expression {
public:
    using value_type = T;
    static constexpr bool varies_over_columns = false;
    static constexpr bool has_reduction = false;
    static constexpr std::size_t smallest_scalar = sizeof(T);

    explicit Constant(T constant) : value(constant) {}

    static Shape shape() { return {dynamic, dynamic}; }
    static Index reduced_columns() { return 0; }

    T value;
};

/// The number of its column at every entry.
template <typename T>
class ColumnNumber : public Expression {
public:
    using value_type = T;
    static constexpr bool varies_over_columns = true;
    static constexpr bool has_reduction = false;
    static constexpr std::size_t smallest_scalar = sizeof(T);

    static Shape shape() { return {dynamic, dynamic}; }
    static Index reduced_columns() { return 0; }
};

/// The shape that all of `shapes` agree on; throws ShapeError if there is none.
[[gnu::noinline]] inline Shape common_shape(const char* name, std::span<const Shape> shapes) {
    Shape common{dynamic, dynamic};
    for (const Shape& shape : shapes) {
        for (std::size_t axis = 0; axis < 2; ++axis) {
            if (common[axis] == dynamic) common[axis] = shape[axis];
            if (shape[axis] == dynamic || shape[axis] == common[axis]) continue;
            std::string text = colt5::detail::concat({"colt5: the operands of `", name, "` have shapes "});
            for (std::size_t i = 0; i < shapes.size(); ++i)
                text += colt5::detail::concat({i > 0 ? " and " : "", shape_string(shapes[i])});
            throw ShapeError(text + ", which do not match; row(v) and column(v) broadcast a vector");
        }
    }
    return common;
}

[[noreturn, gnu::noinline]] inline void throw_no_columns(const char* name, const Shape& shape) {
    throw ShapeError(colt5::detail::concat({"colt5: the operand of `", name, "` has shape ", shape_string(shape),
                                            ": it has no columns of its own to reduce"}));
}

/// What a node inherits from its operands.
template <typename... Operands>
class Inner : public Expression {
public:
    static constexpr bool varies_over_columns = (Operands::varies_over_columns || ...);
    static constexpr bool has_reduction = (Operands::has_reduction || ...);
    static constexpr std::size_t smallest_scalar = std::min({Operands::smallest_scalar...});

    Inner(const char* name, const Operands&... operands)
        : shape_(common_shape(name, std::array<Shape, sizeof...(Operands)>{operands.shape()...})),
          reduced_columns_(std::max({operands.reduced_columns()...})) {}

    const Shape& shape() const { return shape_; }
    Index reduced_columns() const { return reduced_columns_; }

private:
    Shape shape_;
    Index reduced_columns_;
};

/// Size of `T` for `smallest_scalar`: masks have no size of their own.
template <typename T>
inline constexpr std::size_t scalar_size = std::is_same_v<T, bool> ? sizeof(double) : sizeof(T);

/// A function of one operand, entry by entry. `Function` is a stateless functor, templated over what it is applied to:
/// a number, or whatever an evaluator packs several numbers into.
template <typename Function, ExpressionNode A>
class Unary : public Inner<A> {
public:
    static_assert(Function::on_masks == std::is_same_v<typename A::value_type, bool>,
                  "colt5: this function does not take masks (or only masks); cast<T>(mask) gives 1 where true, else 0");
    using value_type = std::invoke_result_t<Function, typename A::value_type>;
    static constexpr std::size_t smallest_scalar = std::min(scalar_size<value_type>, A::smallest_scalar);

    explicit Unary(const A& operand) : Inner<A>(Function::name, operand), a(operand) {}

    A a;
};

/// A function of two operands, entry by entry.
template <typename Function, ExpressionNode A, ExpressionNode B>
class Binary : public Inner<A, B> {
public:
    static_assert(std::is_same_v<typename A::value_type, typename B::value_type>,
                  "colt5: the operands of an expression have different scalar types; convert one with cast<T>(e)");
    static_assert(Function::on_masks == std::is_same_v<typename A::value_type, bool>,
                  "colt5: this function does not take masks (or only masks); cast<T>(mask) gives 1 where true, else 0");
    using value_type = std::invoke_result_t<Function, typename A::value_type, typename A::value_type>;

    Binary(const A& left, const B& right) : Inner<A, B>(Function::name, left, right), a(left), b(right) {}

    A a;
    B b;
};

/// a where the mask is true, else b.
template <ExpressionNode M, ExpressionNode A, ExpressionNode B>
class Selection : public Inner<M, A, B> {
public:
    static_assert(std::is_same_v<typename M::value_type, bool>,
                  "colt5: the first argument of select must be a mask: a comparison or a tensor of bool");
    static_assert(std::is_same_v<typename A::value_type, typename B::value_type>,
                  "colt5: the operands of an expression have different scalar types; convert one with cast<T>(e)");
    using value_type = typename A::value_type;

    Selection(const M& where, const A& then, const B& otherwise)
        : Inner<M, A, B>("select", where, then, otherwise), mask(where), a(then), b(otherwise) {}

    M mask;
    A a;
    B b;
};

/// One value per row, from all columns of the operand.
template <typename Reducer, ExpressionNode A>
class Reduction : public Expression {
public:
    static_assert(!std::is_same_v<typename A::value_type, bool>,
                  "colt5: row reductions take numbers; cast<T>(mask) gives 1 where true, else 0");
    using value_type = typename A::value_type;
    static constexpr bool varies_over_columns = false;
    static constexpr bool has_reduction = true;
    static constexpr std::size_t smallest_scalar = A::smallest_scalar;

    /// Throws ShapeError if the operand has no columns of its own, as a constant or another reduction.
    explicit Reduction(const A& operand) : a(operand), columns(operand.shape()[1]) {
        if (columns == dynamic) throw_no_columns(Reducer::name, operand.shape());
    }

    Shape shape() const { return {a.shape()[0], dynamic}; }
    Index reduced_columns() const { return std::max(columns, a.reduced_columns()); }

    A a;
    Index columns;
};

}  // namespace expr

/// How a type that is no node becomes a leaf. Specializations give, for a constant reference to a T,
///
///     value_type
///     is_vector                         whether row(v) takes it; the leaf of a vector is one row
///     static auto leaf(const T&);       a Leaf of the whole
///     static auto elements(const T&);   Elements, for column(v): all of them, in row-major order
///
/// Views and tensors are here; Eigen matrices in cpu/expr.hpp.
template <typename T>
struct LeafTraits;

namespace expr {

/// Elements in a line.
template <typename T>
struct Elements {
    const T* data;
    Index size, stride;
};

}  // namespace expr

template <Viewable T>
struct LeafTraits<T> {
    using value_type = std::remove_const_t<typename T::value_type>;
    static constexpr bool is_vector = T::rank == 1;
    static auto leaf(const T& tensor) {
        const auto rows = tensor.const_view().rows();
        return expr::Leaf<value_type, expr::Columns::contiguous>(rows.data(), rows.shape(), rows.extent(1), 1);
    }
    static auto elements(const T& tensor) {
        const auto view = tensor.const_view();
        return expr::Elements<value_type>{view.data(), view.size(), 1};
    }
};

/// What can stand in an expression by itself: a node, a view, a tensor, an Eigen matrix (with cpu/expr.hpp).
template <typename T>
concept Operand = ExpressionNode<T> || requires(const T& t) {
    LeafTraits<T>::leaf(t);
};

/// An operand of our own, for which we may define operators and functions.
template <typename T>
concept OwnOperand = ExpressionNode<T> || Viewable<T>;

/// A plain number; it is converted to the type of the operand beside it.
template <typename T>
concept Number = std::is_arithmetic_v<T> && !std::is_same_v<T, bool>;

/// What can stand on either side of an operator.
template <typename T>
concept Term = Operand<T> || Number<T>;

/// The operands of a function of two: at least one is our own.
template <typename A, typename B>
concept OperandPair = Term<A> && Term<B> &&(OwnOperand<A> || OwnOperand<B>);

/// The node that stands for an operand: itself, or the leaf of a view, a tensor or an Eigen matrix. Elements stay where
/// they are and must outlive the expression.
template <Operand T>
auto as_expression(const T& operand) {
    if constexpr (ExpressionNode<T>)
        return operand;
    else
        return LeafTraits<T>::leaf(operand);
}

namespace expr {

/// The node of an operand, or of a number beside an operand of type `Other`.
template <typename Other, typename T>
auto node(const T& operand) {
    if constexpr (Operand<T>) {
        return as_expression(operand);
    } else {
        using Scalar = typename decltype(as_expression(std::declval<const Other&>()))::value_type;
        static_assert(!std::is_same_v<Scalar, bool>, "colt5: a number cannot be combined with a mask");
        return Constant<Scalar>(static_cast<Scalar>(operand));
    }
}

template <typename Function, typename A>
auto unary(const A& a) {
    const auto operand = as_expression(a);
    return Unary<Function, std::remove_const_t<decltype(operand)>>(operand);
}

template <typename Function, typename A, typename B>
auto binary(const A& a, const B& b) {
    const auto left = node<B>(a);
    const auto right = node<A>(b);
    return Binary<Function, std::remove_const_t<decltype(left)>, std::remove_const_t<decltype(right)>>(left, right);
}

template <typename Reducer, typename A>
auto reduction(const A& a) {
    const auto operand = as_expression(a);
    return Reduction<Reducer, std::remove_const_t<decltype(operand)>>(operand);
}

}  // namespace expr

}  // namespace colt5
