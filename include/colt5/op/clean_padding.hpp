// SPDX-License-Identifier: MIT
#pragma once

#include <limits>

#include <colt5/core/tensor.hpp>
#include <colt5/expr/expr.hpp>

namespace colt5 {

template <typename P>
bool padding_is_finite_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `padding_is_finite` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
    return true;
}

/// The mask that operations on tokens take to clean them as they read; absent where they are clean already.
template <Policy P>
Mask to_clean(Mask mask) {
    return cleans_as_it_reads<P> ? mask : Mask();
}

/// A copy of the tokens in which masked tokens have 0 for what is not finite: x (b, n, d), mask (b, n)  →  (b, n, d)
template <Policy P, Viewable X>
auto copy_with_clean_padding(const P& policy, const X& x, Mask mask) {
    using Scalar = typename X::value_type;
    using Number = accumulate_t<Scalar>;
    expect_shape("mask", mask.shape(), {x.extent(0), x.extent(1)});
    TokensTensor<Scalar, P> copy(policy, x.shape());
    const auto is_finite = abs(as_expression(x)) <= std::numeric_limits<Number>::max();
    assign(policy, copy, select(column(mask) || is_finite, x, Number(0)));
    return copy;
}

/// Tokens whose padding is clean: what is not finite in masked tokens counts as 0, so that neither outputs nor
/// gradients depend on what padding holds that nobody wrote.
template <typename Scalar, Policy P, typename Tokens>
struct CleanTokens {
    TokensTensor<Scalar, P> copy;  // of the tokens, if they were not clean
    Tokens tokens;                 // (b, n, d)
};

/// x (b, n, d), mask (b, n) or absent. Reads masked tokens alone, and copies only where one of them is not finite. A
/// policy that cleans as it reads gets x back.
template <Policy P, Viewable X>
auto clean_padding(const P& policy, const X& x, Mask mask) {
    CleanTokens<typename X::value_type, P, decltype(x.const_view())> clean{{}, x.const_view()};
    if constexpr (!cleans_as_it_reads<P>) {
        if (!mask) return clean;
        expect_shape("mask", mask.shape(), {x.extent(0), x.extent(1)});
        if (padding_is_finite_kernel(policy, TokensView<const typename X::value_type>(x), mask)) return clean;
        clean.copy = copy_with_clean_padding(policy, x, mask);
        clean.tokens = decltype(clean.tokens)::unchecked(clean.copy.data(), x.shape());
    }
    return clean;
}

}  // namespace colt5
