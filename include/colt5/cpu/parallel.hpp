// SPDX-License-Identifier: MIT
#pragma once

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <exception>

#include <colt5/cpu/policy.hpp>

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

/// Calls body(i) for every i in [0, count), on up to `policy.threads()` threads with a static schedule, or one after
/// the other when one thread is enough, the compiler has no OpenMP, or this is a child of a process that has used it.
///
/// A loop in a loop makes its calls one after the other. Calls must not depend on each other. If some throw, the
/// exception of the smallest such i leaves parallel_for, after every thread has finished; which of the other calls were
/// made is unspecified.
template <typename Body>
void parallel_for(const Cpu& policy, Index count, Body&& body) {
#if defined(_OPENMP)
    if (policy.threads() > 1 && count > 1 && cpu::has_threads()) {
        std::exception_ptr exception;
        Index thrown_at = count;
        const int threads = static_cast<int>(std::min<Index>(policy.threads(), count));
#pragma omp parallel for schedule(static) num_threads(threads)
        for (Index i = 0; i < count; ++i) {
            try {
                body(i);
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
    for (Index i = 0; i < count; ++i) body(i);
}

}  // namespace colt5
