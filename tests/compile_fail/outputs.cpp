// SPDX-License-Identifier: MIT
// cases: 4
// first: must be a view to write to, such as tensor.view()
#include "wrong.hpp"

using colt5::Cpu;
using Tokens = colt5::TokensTensor<float, Cpu>;
using Matrix = colt5::MatrixTensor<float, Cpu>;

#ifdef COLT5_COMPILE_FAIL_CONTROL
#define COLT5_CASE -1
#endif

/// The tensor in the wrong case, its view in all others.
template <int number>
decltype(auto) output(Tokens& tensor) {
    if constexpr (COLT5_CASE == number)
        return (tensor);
    else
        return tensor.view();
}

void use(const Cpu& policy, const Tokens& x, Tokens& y, const Matrix& weight, Matrix& d_weight,
         const colt5::RMSNormParameters<const float>& norm, const colt5::RMSNormParameters<float>& d_norm,
         const colt5::FeedForwardParameters<const float>& parameters) {
    linear(policy, output<1>(y), x, weight);
    normalize_vjp(policy, output<2>(y), x, x, norm, d_norm);
    norm_linear_vjp(policy, output<3>(y), x, x, norm, weight, d_norm, d_weight);
    feed_forward(policy, output<4>(y), x, parameters);
}
