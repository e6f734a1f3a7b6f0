// SPDX-License-Identifier: MIT
#pragma once

#include <exception>

#include <colt5/core/policy.hpp>

namespace colt5 {

/// Work on the side stream of a policy, such as a heavy branch beside the light one. It starts after everything that
/// the policy has queued before. Until `join`, which the destructor calls, the two streams are unordered: neither may
/// write or free what the other uses. After `join`, either may free what the other has allocated.
///
/// Without a side stream, policy() is the policy itself, and the work runs in program order.
template <Policy P>
class SideStream {
public:
    explicit SideStream(const P& policy) : main_(policy) {
        if constexpr (HasSideStream<P>) this->policy().wait_event(main_.record_event());
    }
    SideStream(const SideStream&) = delete;
    SideStream& operator=(const SideStream&) = delete;
    ~SideStream() {
        try {
            join();
        } catch (const std::exception&) {  // the exception that unwinds the stack says more
        }
    }

    const P& policy() const {
        if constexpr (HasSideStream<P>)
            return main_.side_policy();
        else
            return main_;
    }
    /// The event behind the side stream's work so far.
    Event<P> record_event() const {
        if constexpr (HasSideStream<P>)
            return policy().record_event();
        else
            return {};
    }
    /// Work that the policy queues from now on runs after all work of the side stream so far.
    void join() {
        if constexpr (HasSideStream<P>)
            if (!joined_) main_.wait_event(record_event());
        joined_ = true;
    }

private:
    const P& main_;
    bool joined_ = false;
};

}  // namespace colt5
