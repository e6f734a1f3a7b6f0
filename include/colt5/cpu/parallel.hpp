// SPDX-License-Identifier: MIT
#pragma once

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstring>
#include <exception>
#include <limits>
#include <new>
#include <utility>

#include <colt5/core/allocations.hpp>
#include <colt5/cpu/policy.hpp>

/// What CPU kernels run on: threads, rows cut into panels, and memory of a thread.
namespace colt5 {

namespace cpu {
inline std::atomic<bool> threads_are_gone = false;

/// Whether OpenMP can be asked for threads: a child of fork() would wait for ever for those of its parent.
inline bool has_threads() {
    static const int registered = pthread_atfork(nullptr, nullptr, [] { threads_are_gone = true; });
    static_cast<void>(registered);
    return !threads_are_gone.load(std::memory_order_relaxed);
}
}  // namespace cpu

namespace cpu::detail {
/// parallel_for with a body of any type behind a pointer: OpenMP's code is compiled once for all of them.
[[gnu::noinline]] inline void parallel_calls(const Cpu& policy, Index count, const void* body,
                                             void (*call)(const void*, Index)) {
#if defined(_OPENMP)
    if (policy.threads() > 1 && count > 1 && has_threads()) {
        std::exception_ptr exception;
        Index thrown_at = count;
        const int threads = static_cast<int>(std::min<Index>(policy.threads(), count));
#pragma omp parallel for schedule(static) num_threads(threads)
        for (Index i = 0; i < count; ++i) {
            try {
                call(body, i);
            } catch (...) {  // an exception must not leave the parallel region
#pragma omp critical(colt5_parallel_for)
                if (i < thrown_at) {
                    exception = std::current_exception();
                    thrown_at = i;
                }
            }
        }
        if (exception) std::rethrow_exception(exception);
        return;
    }
#else
    static_cast<void>(policy);
#endif
    for (Index i = 0; i < count; ++i) call(body, i);
}
template <typename Body>
void call(const void* body, Index i) {
    (*static_cast<const Body*>(body))(i);
}
}  // namespace cpu::detail

/// Calls body(i) for every i in [0, count), on up to `policy.threads()` threads with a static schedule, or one after
/// the other when one thread is enough, the compiler has no OpenMP, or this is a child of a process that has used it.
///
/// Called in the `body` of one that runs on several threads, it makes its calls one after the other; in that of one
/// with a single index, it has all threads. Calls must not depend on each other. If some throw, the exception of the
/// smallest such i leaves parallel_for, after every thread has finished; which of the other calls were made is
/// unspecified.
template <typename Body>
void parallel_for(const Cpu& policy, Index count, const Body& body) {
    cpu::detail::parallel_calls(policy, count, &body, cpu::detail::call<Body>);
}

namespace cpu {

/// Rows that one task of a row-wise kernel takes. Fixed, so that sums over chunks do not depend on the threads. (These
/// chunks of rows are not the chunks of tokens of schedule/chunks.hpp.)
inline constexpr Index rows_per_chunk = 128;

inline Index row_chunks(Index rows) {
    return divide_up(rows, rows_per_chunk);
}
/// Calls body(chunk, begin, end) for consecutive chunks of rows, in parallel.
template <typename Body>
void for_each_row_chunk(const Cpu& policy, Index rows, Body&& body) {
    parallel_for(policy, row_chunks(rows), [&](Index chunk) {
        body(chunk, chunk * rows_per_chunk, std::min(rows, (chunk + 1) * rows_per_chunk));
    });
}

/// Whether a BLAS computes the matrix products (see docs/blas.md).
#if defined(COLT5_USE_BLAS)
inline constexpr bool uses_blas = true;
#else
inline constexpr bool uses_blas = false;
#endif

/// Rows of a tile, the part of a result that a product keeps in registers. Panels consist of whole tiles.
inline constexpr int tile_rows = 6;
/// A product multiplies so many rows by one strip of packed weights (the columns of a tile) before it takes the next
/// strip. These rows stay in L2.
inline constexpr Index panel_rows = 32 * tile_rows;
/// The fewest rows that are worth a task of their own. If a product has no more rows in all, its threads share out the
/// columns of the result instead.
inline constexpr Index few_rows = 4 * tile_rows;
inline constexpr Index many_rows = std::numeric_limits<Index>::max();

/// Rows in groups that stay in a cache while one operation after the other works on them.
///
/// With a BLAS, how rows are cut depends on the length of a sequence alone, so that a sequence gets the same bits in
/// any batch and with any number of threads. Our own products give the same bits however rows are cut. Without a BLAS,
/// a batch whose sequences lie one after the other (`contiguous`) is therefore cut as one long sequence.
class Panels {
public:
    Panels(Index batch, Index length, Index largest, bool contiguous = true) : batch_(batch), length_(length) {
        if (contiguous && !uses_blas) length_ *= std::exchange(batch_, 1);
        per_sequence_ = divide_up(length_, largest);
    }

    Index count() const { return batch_ * per_sequence_; }
    /// Calls body(sequence, first row, rows) for one of them.
    template <typename Body>
    void visit(Index i, Body&& body) const {
        const Index first = begin(i % per_sequence_);
        body(i / per_sequence_, first, begin(i % per_sequence_ + 1) - first);
    }
    /// The same for all, in parallel.
    template <typename Body>
    void for_each(const Cpu& policy, Body&& body) const {
        parallel_for(policy, count(), [&](Index i) { visit(i, body); });
    }

private:
    /// The first row of a panel. Panels have whole tiles and nearly the same number of rows: with unequal panels,
    /// threads would wait for the one with the larger panels.
    Index begin(Index panel) const {
        return std::min(length_, divide_up(length_, tile_rows) * panel / per_sequence_ * tile_rows);
    }

    Index batch_, length_, per_sequence_;
};

/// Panels in which tokens go through an operation. Panels of short sequences have few rows, so that every thread gets
/// some. Others have about panel_rows rows, and not more.
inline Panels panels(Index batch, Index length, bool contiguous = true) {
    const Index rows = contiguous && !uses_blas ? batch * length : length;
    const Index count = divide_up(rows, std::clamp(divide_up(rows, 16), few_rows, panel_rows));
    const Index even = count > 1 ? count + count % 2 : 1;  // an odd number leaves one of two threads idle
    return {batch, length, std::max(Index{1}, divide_up(rows, even)), contiguous};
}

/// The rows that backward works on at a time, several panels: first panel by panel the gradients of the rows, then
/// those of the weights, from what the panels have left in L3.
inline Panels backward_blocks(Index batch, Index length, bool contiguous = true) {
    return {batch, length, Index{1024}, contiguous};
}

/// Bytes for thread_scratch, aligned to 64.
class ScratchBuffer {
public:
    ScratchBuffer() = default;
    ScratchBuffer(const ScratchBuffer&) = delete;
    ScratchBuffer& operator=(const ScratchBuffer&) = delete;
    ~ScratchBuffer() { ::operator delete(data_, alignment); }

    /// At least `bytes` bytes. In a build with a sanitizer exactly `bytes`, so that it finds accesses beyond them; new
    /// memory is then filled with NaN.
    void* of(std::size_t bytes) {
        if (is_sanitized ? bytes != bytes_ : bytes > bytes_) resize(bytes);
        return data_;
    }

private:
    [[gnu::noinline]] void resize(std::size_t bytes) {
        void* const data = ::operator new(bytes, alignment);
        if (is_sanitized) std::memset(data, 0xFF, bytes);
        ::operator delete(data_, alignment);
        data_ = data;
        bytes_ = bytes;
    }

    static constexpr std::align_val_t alignment{64};
    void* data_ = nullptr;
    std::size_t bytes_ = 0;
};

/// Memory of one thread that grows once and is given back when the thread ends: packing buffers and tiles of the
/// kernels. `Use` is any type; it tells apart buffers that are in use at the same time: thread_scratch<float, struct
/// Scores>(n). A struct that is declared in this call in the body of a function is local to it, so no other gets the
/// same buffer.
template <typename T, typename Use>
T* thread_scratch(Index count) {
    thread_local ScratchBuffer buffer;
    return static_cast<T*>(buffer.of(static_cast<std::size_t>(count) * sizeof(T)));
}

}  // namespace cpu

}  // namespace colt5
