// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <cstdint>

#include <colt5/core/random.hpp>
#include <colt5/core/tensor.hpp>

namespace colt5 {

template <typename P>
void dropout_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `dropout` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}

/// Which elements dropout keeps: a pure function of an element's row-major index i, which backward recomputes. Element
/// i is kept if word i % 4 of block i / 4 of the stream is at least ⌊rate · 2^32⌋.
struct DropoutMask {
    Random random;
    double rate;  ///< the probability that an element is dropped, in [0, 1)

    COLT5_HOST_DEVICE std::uint32_t threshold() const { return static_cast<std::uint32_t>(rate * 0x1p32); }
    COLT5_HOST_DEVICE double scale() const { return 1 / (1 - rate); }
};

/// Dropout (Srivastava et al. 2014) of a residual branch:
///
///     out = residual + x · keep / (1 − rate)     keep is 1 with probability 1 − rate and 0 otherwise
///     x, residual (b, n, d), mask (b, n)  →  out (b, n, d)
///
/// An absent residual counts as 0. Vector-Jacobian product: dropout(policy, d_x, d_out, drop). In the residual of a
/// masked token, what is not finite counts as 0. `out` may be x. Throws ValueError unless the rate is in [0, 1),
/// ShapeError when shapes differ.
template <Policy P, typename T, Viewable X>
void dropout(const P& policy, TokensView<T> out, const X& x, const DropoutMask& drop, TokensView<const T> residual = {},
             Mask mask = {}) {
    static_assert(same_scalar<X, TokensView<T>>, "colt5: `x` must have the scalar type of `out`");
    expect_value(drop.rate >= 0 && drop.rate < 1, "rate", "in [0, 1)", drop.rate);
    expect_shape("x", x.shape(), out.shape());
    if (residual) expect_shape("residual", residual.shape(), out.shape());
    if (mask) expect_shape("mask", mask.shape(), {out.extent(0), out.extent(1)});
    dropout_kernel(policy, out, TokensView<const T>(x.const_view()), residual, mask, drop);
}

}  // namespace colt5
