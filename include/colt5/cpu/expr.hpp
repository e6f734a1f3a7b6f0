// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>
#include <type_traits>

#include <Eigen/Core>

#include <colt5/core/norm.hpp>
#include <colt5/cpu/pack.hpp>
#include <colt5/cpu/parallel.hpp>
#include <colt5/expr/assign.hpp>
#include <colt5/expr/reduce.hpp>

namespace colt5 {

namespace cpu {

using expr::Columns;

/// Computes a node's entries, `Lanes` at a time, for one thread. An evaluator has
///
///     begin_row(row)                 before any entry of the row is asked for; row reductions are computed here
///     operator()(column, count)      the entries from `column` on: Full<Lanes>, or an Index less than that, which
///                                    leaves the other lanes unspecified
template <typename Node, Index Lanes>
class Evaluator;

/// A node that is constant over the columns: computed when a row begins.
template <typename Node, Index Lanes>
class RowEvaluator {
public:
    explicit RowEvaluator(const Node& node) : evaluator_(node) {}
    void begin_row(Index row) {
        evaluator_.begin_row(row);
        value_ = evaluator_(0, Full<Lanes>());
    }
    template <typename Count>
    const auto& operator()(Index, Count) const {
        return value_;
    }

private:
    Evaluator<Node, Lanes> evaluator_;
    std::invoke_result_t<Evaluator<Node, Lanes>, Index, Full<Lanes>> value_;
};

template <typename Node, Index Lanes>
using Evaluate = std::conditional_t<Node::varies_over_columns, Evaluator<Node, Lanes>, RowEvaluator<Node, Lanes>>;

template <typename T, Columns Layout, Index Lanes>
class Evaluator<expr::Leaf<T, Layout>, Lanes> {
public:
    explicit Evaluator(const expr::Leaf<T, Layout>& leaf)
        : data_(leaf.data), row_stride_(leaf.row_stride), column_stride_(leaf.column_stride) {}
    void begin_row(Index row) { row_ = data_ + row * row_stride_; }

    template <typename Count>
    auto operator()(Index column, Count count) const {
        if constexpr (Layout == Columns::contiguous && std::is_same_v<Count, Full<Lanes>>) {
            return load_pack(row_ + column, count);
        } else if constexpr (Layout == Columns::contiguous) {
            return load_first<Lanes>(row_ + column, count);
        } else {
            PackBuffer<T, Lanes> buffer{};
            for (Index i = 0; i < count; ++i) buffer.values[i] = row_[(column + i) * column_stride_];
            return load_pack(buffer.values, Full<Lanes>());
        }
    }

private:
    const T* data_;
    const T* row_ = nullptr;
    Index row_stride_, column_stride_;
};

template <typename T, Index Lanes>
class Evaluator<expr::ColumnNumber<T>, Lanes> {
public:
    explicit Evaluator(const expr::ColumnNumber<T>&) {}
    void begin_row(Index) {}
    template <typename Count>
    auto operator()(Index column, Count) const {
        PackBuffer<T, Lanes> buffer{};
        for (Index i = 0; i < Lanes; ++i) buffer.values[i] = static_cast<T>(column + i);
        return load_pack(buffer.values, Full<Lanes>());
    }
};

template <typename T, Index Lanes>
class Evaluator<expr::Constant<T>, Lanes> {
public:
    explicit Evaluator(const expr::Constant<T>& constant) : value_(constant.value) {}
    void begin_row(Index) {}
    template <typename Count>
    auto operator()(Index, Count) const {
        return Pack<T, Lanes>(value_);
    }

private:
    T value_;
};

template <typename Function, typename A, Index Lanes>
class Evaluator<expr::Unary<Function, A>, Lanes> {
public:
    explicit Evaluator(const expr::Unary<Function, A>& node) : a_(node.a) {}
    void begin_row(Index row) { a_.begin_row(row); }
    template <typename Count>
    auto operator()(Index column, Count count) const {
        return Function()(a_(column, count));
    }

private:
    Evaluate<A, Lanes> a_;
};

template <typename Function, typename A, typename B, Index Lanes>
class Evaluator<expr::Binary<Function, A, B>, Lanes> {
public:
    explicit Evaluator(const expr::Binary<Function, A, B>& node) : a_(node.a), b_(node.b) {}
    void begin_row(Index row) {
        a_.begin_row(row);
        b_.begin_row(row);
    }
    template <typename Count>
    auto operator()(Index column, Count count) const {
        return Function()(a_(column, count), b_(column, count));
    }

private:
    Evaluate<A, Lanes> a_;
    Evaluate<B, Lanes> b_;
};

template <typename M, typename A, typename B, Index Lanes>
class Evaluator<expr::Selection<M, A, B>, Lanes> {
public:
    explicit Evaluator(const expr::Selection<M, A, B>& node) : mask_(node.mask), a_(node.a), b_(node.b) {}
    void begin_row(Index row) {
        mask_.begin_row(row);
        a_.begin_row(row);
        b_.begin_row(row);
    }
    template <typename Count>
    auto operator()(Index column, Count count) const {
        return select(mask_(column, count), a_(column, count), b_(column, count));
    }

private:
    Evaluate<M, Lanes> mask_;
    Evaluate<A, Lanes> a_;
    Evaluate<B, Lanes> b_;
};

/// Folds entry(column, count) over [0, columns): even and odd packs apart, so that one addition need not wait for the
/// one before.
template <typename Reducer, typename T, Index Lanes, typename Entry>
T reduce_row(Index columns, const Entry& entry) {
    constexpr Reducer combine;
    constexpr Full<Lanes> full;
    Pack<T, Lanes> even(Reducer::template identity<T>), odd = even;
    Index column = 0;
    for (; column + 2 * Lanes <= columns; column += 2 * Lanes) {
        even = combine(even, entry(column, full));
        odd = combine(odd, entry(column + Lanes, full));
    }
    if (column + Lanes <= columns) {
        even = combine(even, entry(column, full));
        column += Lanes;
    }
    if (column < columns) {
        const Index count = columns - column;
        odd = combine(odd, pad(entry(column, count), count, Reducer::template identity<T>));
    }
    return reduce(combine(even, odd), combine);
}

template <typename Reducer, typename A, Index Lanes>
class Evaluator<expr::Reduction<Reducer, A>, Lanes> {
public:
    using T = typename A::value_type;

    explicit Evaluator(const expr::Reduction<Reducer, A>& node) : a_(node.a), columns_(node.columns) {}
    void begin_row(Index row) {
        a_.begin_row(row);
        value_ = reduced();
    }
    template <typename Count>
    auto operator()(Index, Count) const {
        return Pack<T, Lanes>(value_);
    }

private:
    T reduced() const {
        if constexpr (std::is_same_v<Reducer, expr::LogSumExp>) {
            const T largest = reduce_row<expr::Largest, T, Lanes>(columns_, a_);
            const T finite = std::isfinite(largest) ? largest : T(0);  // of −∞ and NaN the largest may be −∞
            const Pack<T, Lanes> shift(finite);
            const auto exponential = [&](Index column, auto count) { return exp(a_(column, count) - shift); };
            return finite + std::log(reduce_row<expr::Sum, T, Lanes>(columns_, exponential));
        } else if constexpr (std::is_same_v<Reducer, expr::Norm>) {
            return scaled_norm<T>([&](T scale) {
                const auto square = [&](Index column, auto count) {
                    const Pack<T, Lanes> x = a_(column, count) * Pack<T, Lanes>(scale);
                    return x * x;
                };
                return reduce_row<expr::Sum, T, Lanes>(columns_, square);
            });
        } else {
            return reduce_row<Reducer, T, Lanes>(columns_, a_);
        }
    }

    Evaluate<A, Lanes> a_;
    Index columns_;
    T value_{};
};

}  // namespace cpu

/// Rows are shared out in blocks of about `grain` entries. A row is cut in several blocks if no reduction needs it
/// whole, at multiples of the vector length, so that every entry is computed the same way whatever the cut.
template <typename T, typename E>
void assign_kernel(const Cpu& policy, const MatrixView<T>& out, const E& expression) {
    constexpr Index lanes = static_cast<Index>(sizeof(cpu::Batch<float>) / E::smallest_scalar);
    constexpr Index grain = 16384;
    const Index rows = out.extent(0), columns = out.extent(1);
    if (rows == 0 || columns == 0) return;
    const Index width = E::has_reduction ? columns : std::min(columns, grain);
    const Index height = std::max<Index>(1, grain / std::max(width, expression.reduced_columns()));
    const Index across = divide_up(columns, width), down = divide_up(rows, height);

    parallel_for(policy, across * down, [&](Index block) {
        const Index first_row = block / across * height, last_row = std::min(rows, first_row + height);
        const Index first_column = block % across * width, last_column = std::min(columns, first_column + width);
        cpu::Evaluate<E, lanes> evaluate(expression);
        for (Index row = first_row; row < last_row; ++row) {
            evaluate.begin_row(row);
            T* to = out.data() + row * columns;
            Index column = first_column;
            for (; column + lanes <= last_column; column += lanes)
                cpu::store_pack(to + column, evaluate(column, cpu::Full<lanes>()), cpu::Full<lanes>());
            if (column < last_column)
                cpu::store_first<lanes>(to + column, evaluate(column, last_column - column), last_column - column);
        }
    });
}

namespace detail {

template <typename Derived>
void is_eigen_dense(const Eigen::DenseBase<Derived>&);

template <typename T>
concept EigenDense = requires(const T& t) {
    detail::is_eigen_dense(t);
};

template <typename T>
concept EigenInMemory = EigenDense<T> &&(unsigned{T::Flags} & Eigen::DirectAccessBit) != 0;

}  // namespace detail

/// Eigen objects with elements in memory: matrices, arrays, vectors, maps, references, blocks, transposes, in either
/// storage order. A vector is one row, as everywhere.
template <detail::EigenInMemory T>
struct LeafTraits<T> {
    using value_type = typename T::Scalar;
    static constexpr bool is_vector = T::IsVectorAtCompileTime;
    static constexpr bool contiguous_columns = T::InnerStrideAtCompileTime == 1 && (is_vector || bool(T::IsRowMajor));

    static auto leaf(const T& matrix) {
        constexpr expr::Columns layout = contiguous_columns ? expr::Columns::contiguous : expr::Columns::strided;
        using Leaf = expr::Leaf<value_type, layout>;
        if constexpr (is_vector)
            return Leaf(matrix.data(), {1, matrix.size()}, 0, matrix.innerStride());
        else if constexpr (bool(T::IsRowMajor))
            return Leaf(matrix.data(), {matrix.rows(), matrix.cols()}, matrix.outerStride(), matrix.innerStride());
        else
            return Leaf(matrix.data(), {matrix.rows(), matrix.cols()}, matrix.innerStride(), matrix.outerStride());
    }
    static auto elements(const T& vector) {
        static_assert(is_vector, "colt5: column(v) takes a vector");
        return expr::Elements<value_type>{vector.data(), vector.size(), vector.innerStride()};
    }
};

/// What Eigen would have to compute first does not compile: evaluate it into a tensor or a matrix, or write
/// `(a * b).eval()` in the statement that assigns.
template <detail::EigenDense T>
struct LeafTraits<T> {
    using value_type = typename T::Scalar;
    static constexpr bool is_vector = T::IsVectorAtCompileTime;
    static expr::Leaf<value_type, expr::Columns::contiguous> leaf(const T&) {
        static_assert(
            detail::EigenInMemory<T>,
            "colt5: an Eigen expression must be evaluated before it stands in a colt5 expression; use .eval()");
    }
    static expr::Elements<value_type> elements(const T& vector) { return leaf(vector); }
};

}  // namespace colt5
