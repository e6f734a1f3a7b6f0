// SPDX-License-Identifier: MIT
#pragma once

#include <concepts>
#include <cstddef>

#include <colt5/core/error.hpp>

namespace colt5 {

/// How modules trade memory for time.
struct MemoryPlan {
    /// The light branches take about so many tokens through all of their layers before the next ones, so that what lies
    /// between two layers is small and stays in caches.
    Index tokens_at_a_time;
    /// The light branches keep little from forward to backward, which computes the rest again: a tenth more work.
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

/// Whether kernels clean padding while they read tokens (see op/clean_padding.hpp), because the host must not wait to
/// look at it first. Policies for which that is so specialize it.
template <typename P>
inline constexpr bool cleans_as_it_reads = false;

/// Used in the message of a missing kernel: `static_assert(has_kernel<Policy>, "…")`.
template <typename>
inline constexpr bool has_kernel = false;

/// Lets a part of a computation run beside the rest: from construction to `join`, work under `policy()` and work under
/// the policy itself need not be in order. Until then, neither may write or free what the other uses; but what was
/// queued beside before the last `mark` may be read after `wait_for_mark`. Joins when it is destroyed. A policy that
/// has nothing to run it on does it in line.
template <Policy P>
class Beside {
public:
    explicit Beside(const P& policy) : policy_(policy) {}
    const P& policy() const { return policy_; }
    void mark() {}
    void wait_for_mark() {}
    void join() {}

private:
    const P& policy_;
};

}  // namespace colt5
