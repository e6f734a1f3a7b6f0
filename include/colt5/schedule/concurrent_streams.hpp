// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <exception>
#include <utility>

#include <colt5/core/policy.hpp>
#include <colt5/core/view.hpp>

namespace colt5 {

/// A policy that can queue independent parts of a computation on several streams, each with a workspace and a side
/// stream of its own:
///
///     P::max_streams          how many of them are of use
///     policy.enter_stream(i)  what the policy queues from now on goes to stream i; number 0 is the policy's own
template <typename P>
concept HasConcurrentStreams = HasSideStream<P> && P::max_streams >= 2 && requires(const P& policy) {
    policy.enter_stream(std::size_t{});
};

/// Gives each of some parts of a computation, which do not depend on each other, to the stream that has had the fewest
/// tokens so far. All parts run after what the policy has queued before, and before what it queues after join() or the
/// end of the object. A part that backward computes must get the stream that forward gave it: the order and the numbers
/// of tokens must be the same. Not to be nested. On a policy without streams, nothing happens.
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
    static constexpr std::size_t most = [] {
        if constexpr (HasConcurrentStreams<P>)
            return P::max_streams;
        else
            return std::size_t{1};
    }();
    /// How many streams so many parts get.
    static std::size_t count_for(std::size_t parts) { return std::clamp(parts, std::size_t{1}, most); }

    ConcurrentStreams(const P& policy, std::size_t parts) : policy_(policy), count_(count_for(parts)) {
        if constexpr (HasConcurrentStreams<P>) {
            if (count_ == 1) return;
            const auto start = policy_.record_event();
            for (std::size_t stream = 1; stream < count_; ++stream)
                in_stream(stream, [&] { policy_.wait_event(start); });
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

    /// The stream of the next part, which has so many tokens.
    std::size_t enter(Index tokens) {
        const auto least = std::min_element(tokens_.begin(), tokens_.begin() + count_);
        *least += tokens;
        const auto stream = static_cast<std::size_t>(least - tokens_.begin());
        if constexpr (HasConcurrentStreams<P>)
            if (count_ > 1) policy_.enter_stream(stream);
        return stream;
    }
    void join() {
        if constexpr (HasConcurrentStreams<P>) {
            if (count_ == 1) return;
            for (std::size_t stream = std::exchange(count_, 1) - 1; stream > 0; --stream) {
                Event<P> end;
                in_stream(stream, [&] { end = policy_.record_event(); });
                policy_.wait_event(end);
            }
        }
    }

private:
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
