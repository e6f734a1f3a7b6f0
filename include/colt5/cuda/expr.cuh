// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <type_traits>

#include <colt5/cuda/launch.cuh>
#include <colt5/expr/assign.hpp>
#include <colt5/expr/reduce.hpp>

namespace colt5 {

namespace cuda {

/// Reads a node's entries on the device. `row` values of reductions are computed by the threads of a group together: a
/// warp has a row, and all its lanes call prepare(row) before any of them asks for an entry.
template <typename Node>
class Evaluator;

template <typename T, expr::Columns Layout>
class Evaluator<expr::Leaf<T, Layout>> {
public:
    explicit Evaluator(const expr::Leaf<T, Layout>& leaf)
        : data_(leaf.data), row_stride_(leaf.row_stride), column_stride_(leaf.column_stride) {}
    __device__ void prepare(Index) {}
    __device__ auto operator()(Index row, Index column) const {
        return static_cast<expr::computed_t<T>>(data_[row * row_stride_ + column * column_stride_]);
    }

private:
    const T* data_;
    Index row_stride_, column_stride_;
};

template <typename T>
class Evaluator<expr::Constant<T>> {
public:
    explicit Evaluator(const expr::Constant<T>& constant) : value_(constant.value) {}
    __device__ void prepare(Index) {}
    __device__ T operator()(Index, Index) const { return value_; }

private:
    T value_;
};

template <typename Function, typename A>
class Evaluator<expr::Unary<Function, A>> {
public:
    explicit Evaluator(const expr::Unary<Function, A>& node) : a_(node.a) {}
    __device__ void prepare(Index row) { a_.prepare(row); }
    __device__ auto operator()(Index row, Index column) const { return Function()(a_(row, column)); }

private:
    Evaluator<A> a_;
};

template <typename Function, typename A, typename B>
class Evaluator<expr::Binary<Function, A, B>> {
public:
    explicit Evaluator(const expr::Binary<Function, A, B>& node) : a_(node.a), b_(node.b) {}
    __device__ void prepare(Index row) {
        a_.prepare(row);
        b_.prepare(row);
    }
    __device__ auto operator()(Index row, Index column) const { return Function()(a_(row, column), b_(row, column)); }

private:
    Evaluator<A> a_;
    Evaluator<B> b_;
};

template <typename M, typename A, typename B>
class Evaluator<expr::Selection<M, A, B>> {
public:
    explicit Evaluator(const expr::Selection<M, A, B>& node) : mask_(node.mask), a_(node.a), b_(node.b) {}
    __device__ void prepare(Index row) {
        mask_.prepare(row);
        a_.prepare(row);
        b_.prepare(row);
    }
    __device__ auto operator()(Index row, Index column) const {
        return mask_(row, column) ? a_(row, column) : b_(row, column);
    }

private:
    Evaluator<M> mask_;
    Evaluator<A> a_;
    Evaluator<B> b_;
};

template <typename Reducer, typename A>
class Evaluator<expr::Reduction<Reducer, A>> {
public:
    using T = typename A::value_type;

    explicit Evaluator(const expr::Reduction<Reducer, A>& node) : a_(node.a), columns_(node.columns) {}
    __device__ void prepare(Index row) {
        a_.prepare(row);
        const Index lane = threadIdx.x % warp_size;
        if constexpr (std::is_same_v<Reducer, expr::LogSumExp>) {
            T largest = -std::numeric_limits<T>::infinity();
            for (Index j = lane; j < columns_; j += warp_size) largest = Greater()(largest, a_(row, j));
            largest = warp_max(largest);
            if (!isfinite(largest)) {
                value_ = largest;
                return;
            }
            T sum = T(0);
            for (Index j = lane; j < columns_; j += warp_size) sum += std::exp(a_(row, j) - largest);
            value_ = largest + std::log(warp_sum(sum));
        } else {
            T total = Reducer::template identity<T>;
            for (Index j = lane; j < columns_; j += warp_size) total = Reducer()(total, a_(row, j));
            value_ = warp_reduce(total, Reducer());
        }
    }
    __device__ T operator()(Index, Index) const { return value_; }

private:
    Evaluator<A> a_;
    Index columns_;
    T value_{};
};

/// One warp a row.
template <typename T, typename E>
__global__ void assign_rows(T* out, Index rows, Index columns, Evaluator<E> evaluate) {
    const Index warps = all_threads() / warp_size;
    for (Index row = global_thread() / warp_size; row < rows; row += warps) {
        evaluate.prepare(row);
        for (Index column = threadIdx.x % warp_size; column < columns; column += warp_size)
            out[row * columns + column] = static_cast<T>(evaluate(row, column));
    }
}

/// One thread an entry.
template <typename T, typename E>
__global__ void assign_entries(T* out, Index rows, Index columns, Evaluator<E> evaluate) {
    for (Index i = global_thread(); i < rows * columns; i += all_threads())
        out[i] = static_cast<T>(evaluate(i / columns, i % columns));
}

}  // namespace cuda

template <typename T, typename E>
void assign_kernel(const Cuda& policy, const MatrixView<T>& out, const E& expression) {
    constexpr int threads = 256;
    const Index rows = out.extent(0), columns = out.extent(1);
    const cuda::Evaluator<E> evaluate(expression);
    if constexpr (E::has_reduction)
        cuda::launch(policy, "assign_rows", cuda::assign_rows<T, E>, cuda::blocks_for(rows * cuda::warp_size, threads),
                     threads, 0, out.data(), rows, columns, evaluate);
    else
        cuda::launch(policy, "assign_entries", cuda::assign_entries<T, E>, cuda::blocks_for(rows * columns, threads),
                     threads, 0, out.data(), rows, columns, evaluate);
}

}  // namespace colt5
