// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <tuple>
#include <type_traits>
#include <utility>

#include <colt5/core/norm.hpp>
#include <colt5/cuda/kernel.cuh>
#include <colt5/expr/assign.hpp>
#include <colt5/expr/reduce.hpp>

namespace colt5 {

namespace cuda {

/// Computes the entries of a node of an expression on the device, `width` neighbours of a row at a time. An evaluator
/// has
///
/// - prepare(row): computes the reductions of a row; all lanes of a warp call it, before get;
/// - get<width>(row, column): a Pack of entries from `column` on, which is a multiple of width;
/// - fits(width), on the host: whether leaves can be read in packs;
/// - is_flat(columns), on the host: whether entry (i, j) is entry (0, i · columns + j).
template <typename Node>
class Evaluator;

template <typename T, expr::Columns Layout>
class Evaluator<expr::Leaf<T, Layout>> {
public:
    using Value = expr::computed_t<T>;

    explicit Evaluator(const expr::Leaf<T, Layout>& leaf)
        : data_(leaf.data), row_stride_(leaf.row_stride), column_stride_(leaf.column_stride) {}
    bool fits(int width) const {
        if constexpr (Layout != expr::Columns::contiguous) return true;
        const auto bytes = std::min(std::uintptr_t{16}, width * sizeof(T));
        return reinterpret_cast<std::uintptr_t>(data_) % bytes == 0 &&
               static_cast<std::uintptr_t>(row_stride_) * sizeof(T) % bytes == 0;
    }
    bool is_flat(Index columns) const { return Layout == expr::Columns::contiguous && row_stride_ == columns; }

    __device__ void prepare(Index) {}
    template <int width>
    __device__ Pack<Value, width> get(Index row, Index column) const {
        Pack<Value, width> values;
        const T* const from = data_ + row * row_stride_;
        if constexpr (Layout == expr::Columns::contiguous) {
            const auto stored = load_pack<width>(from + column);
            for (int e = 0; e < width; ++e) values.values[e] = static_cast<Value>(stored.values[e]);
        } else if constexpr (Layout == expr::Columns::broadcast) {
            const auto value = static_cast<Value>(*from);
            for (int e = 0; e < width; ++e) values.values[e] = value;
        } else {
            for (int e = 0; e < width; ++e) values.values[e] = static_cast<Value>(from[(column + e) * column_stride_]);
        }
        return values;
    }

private:
    const T* data_;
    Index row_stride_, column_stride_;
};

template <typename T>
class Evaluator<expr::ColumnNumber<T>> {
public:
    explicit Evaluator(const expr::ColumnNumber<T>&) {}
    static bool fits(int) { return true; }
    static bool is_flat(Index) { return false; }
    __device__ void prepare(Index) {}
    template <int width>
    __device__ Pack<T, width> get(Index, Index column) const {
        Pack<T, width> values;
        for (int e = 0; e < width; ++e) values.values[e] = static_cast<T>(column + e);
        return values;
    }
};

template <typename T>
class Evaluator<expr::Constant<T>> {
public:
    explicit Evaluator(const expr::Constant<T>& constant) : value_(constant.value) {}
    static bool fits(int) { return true; }
    static bool is_flat(Index) { return true; }
    __device__ void prepare(Index) {}
    template <int width>
    __device__ Pack<T, width> get(Index, Index) const {
        Pack<T, width> values;
        for (int e = 0; e < width; ++e) values.values[e] = value_;
        return values;
    }

private:
    T value_;
};

/// A node whose entries are functions of the operands' entries at the same place.
template <typename... Operands>
class EvaluatorOfOperands {
public:
    explicit EvaluatorOfOperands(const Operands&... operands) : operands_(Evaluator<Operands>(operands)...) {}
    bool fits(int width) const {
        return std::apply([&](const auto&... operand) { return (operand.fits(width) && ...); }, operands_);
    }
    bool is_flat(Index columns) const {
        return std::apply([&](const auto&... operand) { return (operand.is_flat(columns) && ...); }, operands_);
    }
    __device__ void prepare(Index row) {
        std::apply([&](auto&... operand) { (operand.prepare(row), ...); }, operands_);
    }

protected:
    /// function(entry of each operand), for each of `width` entries
    template <int width, typename Function>
    __device__ auto each(Index row, Index column, const Function& function) const {
        return std::apply(
            [&](const auto&... operand) { return combine(function, operand.template get<width>(row, column)...); },
            operands_);
    }

private:
    template <typename Function, typename... Values, int width>
    __device__ static auto combine(const Function& function, const Pack<Values, width>&... packs) {
        Pack<std::invoke_result_t<Function, Values...>, width> values;
        for (int e = 0; e < width; ++e) values.values[e] = function(packs.values[e]...);
        return values;
    }
    std::tuple<Evaluator<Operands>...> operands_;
};

template <typename Function, typename A>
class Evaluator<expr::Unary<Function, A>> : public EvaluatorOfOperands<A> {
public:
    explicit Evaluator(const expr::Unary<Function, A>& node) : EvaluatorOfOperands<A>(node.a) {}
    template <int width>
    __device__ auto get(Index row, Index column) const {
        return this->template each<width>(row, column, Function());
    }
};

template <typename Function, typename A, typename B>
class Evaluator<expr::Binary<Function, A, B>> : public EvaluatorOfOperands<A, B> {
public:
    explicit Evaluator(const expr::Binary<Function, A, B>& node) : EvaluatorOfOperands<A, B>(node.a, node.b) {}
    template <int width>
    __device__ auto get(Index row, Index column) const {
        return this->template each<width>(row, column, Function());
    }
};

struct Select {
    template <typename T>
    __device__ T operator()(bool mask, T a, T b) const {
        return mask ? a : b;
    }
};
template <typename M, typename A, typename B>
class Evaluator<expr::Selection<M, A, B>> : public EvaluatorOfOperands<M, A, B> {
public:
    explicit Evaluator(const expr::Selection<M, A, B>& node)
        : EvaluatorOfOperands<M, A, B>(node.mask, node.a, node.b) {}
    template <int width>
    __device__ auto get(Index row, Index column) const {
        return this->template each<width>(row, column, Select());
    }
};

template <typename Reducer, typename A>
class Evaluator<expr::Reduction<Reducer, A>> {
public:
    using T = typename A::value_type;

    explicit Evaluator(const expr::Reduction<Reducer, A>& node) : a_(node.a), columns_(node.columns) {}
    static bool fits(int) { return false; }
    static bool is_flat(Index) { return false; }
    __device__ void prepare(Index row) {
        a_.prepare(row);
        const Index lane = threadIdx.x % warp_size;
        const auto entry = [&](Index column) { return a_.template get<1>(row, column).values[0]; };
        if constexpr (std::is_same_v<Reducer, expr::LogSumExp>) {
            T largest = -std::numeric_limits<T>::infinity();
            for (Index j = lane; j < columns_; j += warp_size) largest = GreaterOrNan()(largest, entry(j));
            largest = warp_reduce(largest, GreaterOrNan());  // the same in all lanes, NaN too
            if (!isfinite(largest)) {
                value_ = largest;
                return;
            }
            T sum = T(0);
            for (Index j = lane; j < columns_; j += warp_size) sum += std::exp(entry(j) - largest);
            value_ = largest + std::log(warp_sum(sum));
        } else if constexpr (std::is_same_v<Reducer, expr::Norm>) {
            value_ = scaled_norm<T>([&](T scale) {
                T sum = 0;
                for (Index j = lane; j < columns_; j += warp_size) {
                    const T x = scale * entry(j);
                    sum += x * x;
                }
                return warp_sum(sum);
            });
        } else {
            T total = Reducer::template identity<T>;
            for (Index j = lane; j < columns_; j += warp_size) total = Reducer()(total, entry(j));
            value_ = warp_reduce(total, Reducer());
        }
    }
    template <int width>
    __device__ Pack<T, width> get(Index, Index) const {
        Pack<T, width> values;
        for (int e = 0; e < width; ++e) values.values[e] = value_;
        return values;
    }

private:
    Evaluator<A> a_;
    Index columns_;
    T value_{};
};

/// One warp for each row.
template <typename T, typename E>
__global__ void assign_rows(T* out, Index rows, Index columns, Evaluator<E> evaluate) {
    const Index warps = grid_threads() / warp_size;
    for (Index row = global_thread() / warp_size; row < rows; row += warps) {
        evaluate.prepare(row);
        for (Index column = threadIdx.x % warp_size; column < columns; column += warp_size)
            out[row * columns + column] = static_cast<T>(evaluate.template get<1>(row, column).values[0]);
    }
}

/// One thread for each pack of `width` entries of a row.
template <int width, typename T, typename E>
__global__ void assign_entries(T* out, Index rows, Index columns, Evaluator<E> evaluate) {
    const Index packs = rows * columns / width;
    for (Index pack = global_thread(); pack < packs; pack += grid_threads()) {
        const Index i = pack * width, row = rows == 1 ? 0 : quotient(i, columns);
        const auto values = evaluate.template get<width>(row, i - row * columns);
        Pack<T, width> rounded;
        for (int e = 0; e < width; ++e) rounded.values[e] = static_cast<T>(values.values[e]);
        store_pack(out + i, rounded);
    }
}

}  // namespace cuda

template <typename T, typename E>
void assign_kernel(const Cuda& policy, const MatrixView<T>& out, const E& expression) {
    constexpr int threads = 256, width = cuda::pack_size<T>;
    Index rows = out.extent(0), columns = out.extent(1);
    const cuda::Evaluator<E> evaluate(expression);
    if constexpr (E::has_reduction) {
        cuda::launch(policy, "assign_rows", cuda::assign_rows<T, E>, cuda::blocks_for(rows * cuda::warp_size, threads),
                     threads, 0, out.data(), rows, columns, evaluate);
    } else {
        if (evaluate.is_flat(columns)) columns *= std::exchange(rows, 1);
        const bool packed = columns % width == 0 && cuda::fits_packs<T>(columns, out.data()) && evaluate.fits(width);
        cuda::launch(policy, "assign_entries",
                     packed ? cuda::assign_entries<width, T, E> : cuda::assign_entries<1, T, E>,
                     cuda::blocks_for(rows * columns / (packed ? width : 1), threads), threads, 0, out.data(), rows,
                     columns, evaluate);
    }
}

}  // namespace colt5
