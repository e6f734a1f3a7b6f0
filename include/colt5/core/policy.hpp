// SPDX-License-Identifier: MIT
#pragma once

#include <concepts>
#include <cstddef>

#include <colt5/core/view.hpp>

namespace colt5 {

/// How modules trade memory for time.
struct MemoryPlan {
    /// The light branches take about so many tokens through all of their layers before the next ones, so that what lies
    /// between two layers is small and stays in caches.
    Index tokens_at_a_time;
    /// The light branches save little for backward, which recomputes the rest: a tenth more work.
    bool recompute;
};

/// Where tensors live and which kernels run. A policy is a cheap handle: copies share one workspace.
///
///     typename P::Workspace                         what allocates (see workspace.hpp)
///     policy.workspace()                            std::shared_ptr<Workspace>
///     policy.memory_plan()                          how modules trade memory for time
///     upload(policy, device, host, bytes)           copies from the host to where the policy's tensors live, and waits
///     download(policy, host, device, bytes)         and back
///
/// An operation `x` finds its kernels as overloads `x_kernel(const P&, …)` in the policy's namespace.
template <typename P>
concept Policy = std::copyable<P> && requires(const P& policy, void* to, const void* from) {
    typename P::Workspace;
    policy.workspace()->allocate(std::size_t{});
    policy.memory_plan().tokens_at_a_time;
    upload(policy, to, from, std::size_t{});
    download(policy, to, from, std::size_t{});
};

/// Whether the modules run in a scalar type on a policy. Policies with kernels for others specialize it.
template <typename Scalar, typename P>
inline constexpr bool is_module_scalar = std::same_as<Scalar, float> || std::same_as<Scalar, double>;

/// Whether kernels clean padding while they read tokens (see clean_padding in module/module.hpp), because the host must
/// not wait to look at it first. Policies for which that is so specialize it.
template <typename P>
inline constexpr bool cleans_as_it_reads = false;

/// `dim_head` if a policy has kernels of attention for exactly this head dimension; otherwise dynamic, which means
/// kernels that look at run time. Modules know the head dimension, so that a program contains only the kernels of its
/// own heads. Policies specialize it.
template <typename P, Index dim_head>
inline constexpr Index head_size = dynamic;

/// Queries (b, n, h, dim_head) as the kernels of a policy take them: dim_head is static if it is a head_size.
template <typename P, typename Q>
constexpr auto heads_of_kernel(const Q& q) {
    return q.const_view();
}
template <typename P, typename T, Index dim_head>
constexpr auto heads_of_kernel(const View<T, dynamic, dynamic, dynamic, dim_head>& q) {
    return View<const T, dynamic, dynamic, dynamic, head_size<P, dim_head>>::unchecked(q.data(), q.shape());
}

/// Always false; do not specialize it. Where a policy has no kernel `x`, the call finds the fallback x_kernel(const P&,
/// …), which says `static_assert(has_kernel<P>, "…")`: since that depends on P, it fails only where it is called.
template <typename>
inline constexpr bool has_kernel = false;

namespace detail {
/// An address that the copies of a policy share, and no other policies.
template <Policy P>
const void* identity_of(const P& policy) {
    if constexpr (requires { policy.identity(); })
        return policy.identity();
    else
        return policy.workspace().get();
}
}  // namespace detail

/// A policy whose work goes to a stream, and which has a second one, the side stream:
///
///     typename P::Event         a point in the order of a stream's work; default-constructed, nothing to wait for
///     policy.record_event()     the event behind all work that the policy has queued so far
///     policy.wait_event(event)  what the policy queues from now on runs after the event; the host does not wait
///     policy.side_policy()      the policy of the side stream, always the same one
template <typename P>
concept HasSideStream = requires(const P& policy, typename P::Event event) {
    { policy.record_event() } -> std::same_as<typename P::Event>;
    policy.wait_event(event);
    { policy.side_policy() } -> std::same_as<const P&>;
};

/// The event of a policy; of one without streams, whose work is done when a call returns, an empty type.
template <typename P>
struct EventOf {
    struct type {};
};
template <HasSideStream P>
struct EventOf<P> {
    using type = typename P::Event;
};
template <typename P>
using Event = typename EventOf<P>::type;

}  // namespace colt5
