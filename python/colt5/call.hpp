// SPDX-License-Identifier: MIT
#pragma once

// What all functions have that colt5/library.py calls. The generated file defines colt5_python::Policy.
//
// A call gets its arguments as one array of 64-bit numbers: integers, and addresses. It returns 0 or a handle, or on
// failure a negative number, one for each kind of exception; colt5_message() then says what was wrong.

#include <algorithm>
#include <array>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <utility>
#include <vector>

#if defined(CUDART_VERSION)
#include "capture.hpp"
#endif

namespace colt5_python {

using colt5::Index;

/// The arguments of a call, one after the other.
class Arguments {
public:
    explicit Arguments(const std::int64_t* numbers) : next_(numbers) {}
    Index number() { return static_cast<Index>(*next_++); }
    template <typename T>
    T* pointer() {
        return reinterpret_cast<T*>(static_cast<std::uintptr_t>(*next_++));
    }
    template <std::size_t rank>
    std::array<Index, rank> shape() {
        std::array<Index, rank> shape;
        for (Index& extent : shape) extent = number();
        return shape;
    }
    void read(colt5::RoutedCounts& counts) { counts = {number()}; }
    void read(colt5::AttentionCounts& counts) { counts = {number(), number()}; }
    void read(colt5::CrossAttentionCounts& counts) { counts = {number(), number()}; }
    void read(colt5::TransformerBlockCounts& counts) { counts = {number(), number(), number()}; }

private:
    const std::int64_t* next_;
};

/// Where a call runs.
struct Place {
    Index device, stream, threads, tf32;
#if defined(CUDART_VERSION)
    Capture capture;  // of the stream
#endif
    explicit Place(Arguments& arguments)
        : device(arguments.number()),
          stream(arguments.number()),
          threads(arguments.number()),
          tf32(arguments.number()) {
#if defined(CUDART_VERSION)
        if (stream != 0) capture = Capture(cuda_stream());
#endif
    }
    bool operator==(const Place&) const = default;

#if defined(CUDART_VERSION)
    /// PyTorch's default stream is null, which a policy takes as a wish for a stream of its own.
    cudaStream_t cuda_stream() const {
        return stream == 0 ? cudaStreamLegacy : reinterpret_cast<cudaStream_t>(static_cast<std::uintptr_t>(stream));
    }
    bool is_like(const Place& other) const {
        return device == other.device && tf32 == other.tf32;
    }
#endif
    /// The policy of a new context. To make a context, the host waits for the policy's stream, which must not be while
    /// that is being captured: then the policy starts on a stream of its own, and changes to the captured one later.
    Policy policy() const {
#if defined(CUDART_VERSION)
        Policy::Options options;
        options.device = static_cast<int>(device);
        options.math = tf32 != 0 ? colt5::MathMode::tf32 : colt5::MathMode::fp32;
        if (!capture) options.stream = cuda_stream();
        return Policy(options);
#else
        return Policy(static_cast<int>(threads));
#endif
    }
};

inline std::string& message() {
    thread_local std::string text;
    return text;
}

template <typename Call>
std::int64_t guarded(const Call& call) {
    const auto fail = [](std::int64_t kind, const std::exception& error) {
        message() = error.what();
        return kind;
    };
    try {
        return call();
    } catch (const colt5::ShapeError& error) {
        return fail(-1, error);
    } catch (const colt5::ValueError& error) {
        return fail(-2, error);
    } catch (const colt5::OutOfMemory& error) {
        return fail(-3, error);
    } catch (const std::bad_alloc& error) {
        return fail(-3, error);
    } catch (const std::exception& error) {
        return fail(-4, error);
    }
}

/// A pool of contexts that no call uses now. A call takes one, or makes one if none fits, and gives it back. A Context
/// is made of a Place, and has `place` and `policy`, whose workspace it holds. A context of calls that are captured
/// into a CUDA graph is for this graph alone, until the graph is destroyed. The pool is never destroyed, because at the
/// end of a process CUDA may be gone already.
template <typename Context>
class Contexts {
public:
    static Contexts& all() {
        static Contexts& contexts = *new Contexts;
        return contexts;
    }
    std::unique_ptr<Context> take(const Place& place) {
        if (auto context = take_free([&](const Context& free) { return free.place == place; })) return context;
#if defined(CUDART_VERSION)
        if (place.capture) return take_for_graph(place);
#endif
        return std::make_unique<Context>(place);
    }
    /// This one, as soon as no other call has it.
    std::unique_ptr<Context> take(const Context* wanted) {
        std::unique_lock lock(mutex_);
        const auto find = [&] {
            return std::find_if(free_.begin(), free_.end(), [&](const auto& free) { return free.get() == wanted; });
        };
        given_back_.wait(lock, [&] { return find() != free_.end(); });
        const auto at = find();
        auto context = std::move(*at);
        free_.erase(at);
        return context;
    }
    void give_back(std::unique_ptr<Context> context) {
        {
            const std::lock_guard lock(mutex_);
            free_.push_back(std::move(context));
        }
        given_back_.notify_all();
    }
    /// Hands memory that no tensor uses back to the system.
    void release_memory() {
        const std::lock_guard lock(mutex_);
        for (const auto& context : free_) {
#if defined(CUDART_VERSION)
            if (!context->place.capture || context->graph_end.has_come()) context->policy.release_unused();
#else
            context->policy.workspace()->release_unused();
#endif
        }
    }

private:
    /// The one of those that `fits` that was given back last, or null.
    template <typename Fits>
    std::unique_ptr<Context> take_free(const Fits& fits) {
        const std::lock_guard lock(mutex_);
        const auto at = std::find_if(free_.rbegin(), free_.rend(), [&](const auto& free) { return fits(*free); });
        if (at == free_.rend()) return nullptr;
        auto context = std::move(*at);
        free_.erase(std::next(at).base());
        return context;
    }
#if defined(CUDART_VERSION)
    std::unique_ptr<Context> take_for_graph(const Place& place) {
        GraphEnd end(place.capture);
        auto context =
            take_free([&](const Context& free) { return free.graph_end.has_come() && free.place.is_like(place); });
        if (!context) {
            const colt5::cuda::AllocationsInCapture allowed;
            context = std::make_unique<Context>(place);
            context->policy.synchronize();
        }
        context->policy.use_stream(place.cuda_stream());
        context->place = place;
        context->graph_end = std::move(end);
        return context;
    }
#endif

    std::mutex mutex_;
    std::condition_variable given_back_;
    std::vector<std::unique_ptr<Context>> free_;
};

/// What every context has.
struct ContextOfPlace {
    Place place;
    Policy policy;
#if defined(CUDART_VERSION)
    GraphEnd graph_end;  // of the graph that it is for
#endif
    explicit ContextOfPlace(const Place& place_) : place(place_), policy(place.policy()) {}
};

/// A context for the time of one call.
template <typename Context>
class Lease {
public:
    /// A context that is made of this place, or the one that is `wanted`.
    explicit Lease(const Place& place, const Context* wanted = nullptr)
        : context_(wanted != nullptr ? Contexts<Context>::all().take(wanted) : Contexts<Context>::all().take(place)) {}
    ~Lease() { Contexts<Context>::all().give_back(std::move(context_)); }
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;
    Context* operator->() const { return context_.get(); }
    Context* get() const { return context_.get(); }

private:
    std::unique_ptr<Context> context_;
};

}  // namespace colt5_python

#define COLT5_EXPORT extern "C" __attribute__((visibility("default")))

COLT5_EXPORT const char* colt5_message() {
    return colt5_python::message().c_str();
}
