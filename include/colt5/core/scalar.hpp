// SPDX-License-Identifier: MIT
#pragma once

namespace colt5 {

namespace detail {
template <typename Scalar>
struct Accumulate {
    using type = float;
};
template <>
struct Accumulate<double> {
    using type = double;
};
}  // namespace detail

/// The type that sums, softmax, norms and routing are computed in: double for double, float for everything else.
template <typename Scalar>
using accumulate_t = typename detail::Accumulate<Scalar>::type;

}  // namespace colt5
