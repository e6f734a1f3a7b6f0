// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <concepts>
#include <cstddef>
#include <exception>
#include <utility>

#include <colt5/core/policy.hpp>
#include <colt5/core/view.hpp>

namespace colt5 {

/// A policy that can queue independent parts of a computation on several streams, each with a workspace and a side
/// stream of its own:
///
///     P::max_streams               the greatest number of streams, with the policy's own
///     policy.concurrent_streams()  how many of them to use
///     policy.enter_stream(i)       what the policy queues from now on goes to stream i; number 0 is the policy's own
///     policy.entered_stream()      that number
template <typename P>
concept HasConcurrentStreams = HasSideStream<P> && P::max_streams >= 2 && requires(const P& policy) {
    { policy.concurrent_streams() } -> std::same_as<std::size_t>;
    policy.enter_stream(std::size_t{});
    { policy.entered_stream() } -> std::same_as<std::size_t>;
};

/// Gives each of some parts of a computation, which do not depend on each other, to the stream that has had the fewest
/// tokens so far. All parts run after what the policy has queued before, and before what it queues after join() or the
/// end of the object. A part that backward computes must get the stream that forward gave it: the order and the numbers
/// of tokens must be the same. Inside a part of another ConcurrentStreams, and on the CPU, all parts stay on the stream
/// in use.
///
///     ConcurrentStreams streams(policy, parts);
///     for (...) {
///         streams.enter(tokens);
///         ...
///     }
///     streams.join();
template <typename P>
class ConcurrentStreams {
public:
    /// The number of streams that `parts` parts get.
    static std::size_t count_for(const P& policy, std::size_t parts) {
        if constexpr (HasConcurrentStreams<P>)
            if (policy.entered_stream() == 0 && parts > 1) return std::min(parts, policy.concurrent_streams());
        return 1;
    }

    ConcurrentStreams(const P& policy, std::size_t parts) : policy_(policy), count_(count_for(policy, parts)) {
        if constexpr (HasConcurrentStreams<P>) {
            if (count_ == 1) return;
            for (std::size_t i = 1; i < count_; ++i) in_stream(i, [] {});  // makes it, which may fail
            const auto start = policy_.record_event();
            for (std::size_t i = 1; i < count_; ++i) in_stream(i, [&] { policy_.wait_event(start); });
        }
    }
    ConcurrentStreams(const ConcurrentStreams&) = delete;
    ConcurrentStreams& operator=(const ConcurrentStreams&) = delete;
    ~ConcurrentStreams() {
        try {
            join();
        } catch (const std::exception&) {  // the exception that unwinds the stack says more
        }
    }

    /// Goes to the stream of the next part, which has so many tokens. Returns the stream's number among this object's.
    std::size_t enter(Index tokens) {
        if constexpr (HasConcurrentStreams<P>) {
            if (count_ == 1) return 0;
            const auto least = std::min_element(tokens_.begin(), tokens_.begin() + count_);
            *least += tokens;
            const auto stream = static_cast<std::size_t>(least - tokens_.begin());
            policy_.enter_stream(stream);
            return stream;
        } else {
            return 0;
        }
    }
    /// Throws what a stream throws, after it has tried to join the others.
    void join() {
        if constexpr (HasConcurrentStreams<P>) {
            std::exception_ptr error;
            for (std::size_t i = std::exchange(count_, 1) - 1; i > 0; --i) {
                try {
                    Event<P> end;
                    in_stream(i, [&] { end = policy_.record_event(); });
                    policy_.wait_event(end);
                } catch (...) {
                    error = std::current_exception();
                }
            }
            if (error) std::rethrow_exception(error);
        }
    }

private:
    static constexpr std::size_t most = [] {
        if constexpr (HasConcurrentStreams<P>)
            return P::max_streams;
        else
            return std::size_t{1};
    }();

    /// Calls f() in a stream, and then goes to stream 0.
    template <typename F>
    void in_stream(std::size_t stream, const F& f) {
        try {
            policy_.enter_stream(stream);
            f();
        } catch (...) {
            policy_.enter_stream(0);
            throw;
        }
        policy_.enter_stream(0);
    }

    const P& policy_;
    std::size_t count_;
    std::array<Index, most> tokens_{};
};

}  // namespace colt5
