// SPDX-License-Identifier: MIT
// cases: 8
// first: must have the scalar type of
#include "wrong.hpp"

using colt5::Cpu;

#ifdef COLT5_COMPILE_FAIL_CONTROL
#define COLT5_CASE -1
#endif

template <int number>
using Scalar = std::conditional_t<COLT5_CASE == number, double, float>;
template <int number>
using Matrix = colt5::MatrixTensor<Scalar<number>, Cpu>;
template <int number>
using Tokens = colt5::TokensTensor<Scalar<number>, Cpu>;

void products(const Cpu& policy, const Tokens<0>& x, const Matrix<0>& weight, Matrix<0>& d_weight) {
    linear(policy, x, Matrix<1>());
    linear(policy, Tokens<2>().view(), x, weight);
    linear_vjp(policy, Tokens<3>(), x, weight, d_weight);
}

void routes(const Cpu& policy, const colt5::Tensor<float, Cpu, 1, 2, 8, 4>& x) {
    routed_linear(policy, x, Matrix<4>());
}

void norms(const Cpu& policy, const Tokens<0>& x, const colt5::RMSNormParameters<const float>& norm,
           const colt5::RMSNormParameters<float>& d_norm, const Matrix<0>& weight, Matrix<0>& d_weight) {
    norm_linear(policy, x, norm, Matrix<5>());
    norm_linear_vjp(policy, Tokens<0>().view(), Tokens<6>(), x, norm, weight, d_norm, d_weight);
    normalize(policy, Tokens<7>(), norm);
}

void feed_forwards(const Cpu& policy, const Tokens<0>& x, const colt5::FeedForwardParameters<const float>& parameters) {
    feed_forward(policy, Tokens<8>().view(), x, parameters);
}
