// SPDX-License-Identifier: MIT
#pragma once

#include <string>

#include <colt5/core/tensor.hpp>

namespace colt5 {

template <typename P>
void copy_tokens_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `copy_tokens` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}

/// Copies `count` tokens of each sequence:
///
///     to[b, to_first + i] = from[b, from_first + i]   for i < count
///
///     to (b, n, d), from (b, m, d); they do not overlap
///
/// Throws ShapeError when b or d differ, ValueError when a range is not within its n or m tokens.
template <Policy P, Viewable To, Viewable From>
void copy_tokens(const P& policy, const To& to, Index to_first, const From& from, Index from_first, Index count) {
    static_assert(is_output<To>, "colt5: `to` must be a view to write to, such as tensor.view()");
    static_assert(same_scalar<To, From>, "colt5: `from` must have the scalar type of `to`");
    expect_shape("from", from.shape(), {to.extent(0), dynamic, to.extent(2)});
    const auto check = [&](const char* argument, Index first, Index length) {
        if (!is_range_of(first, count, length))
            expect_value(false, argument, detail::concat({"within ", value_string(length), " tokens"}),
                         detail::concat({value_string(count), " tokens from ", value_string(first), " on"}));
    };
    check("to_first", to_first, to.extent(1));
    check("from_first", from_first, from.extent(1));
    copy_tokens_kernel(policy, to.view(), to_first, from.const_view(), from_first, count);
}

}  // namespace colt5
