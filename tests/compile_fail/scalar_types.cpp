// SPDX-License-Identifier: MIT
// cases: 9
// first: must have the scalar type of
#include "wrong.hpp"

using colt5::Cpu;

#ifdef COLT5_COMPILE_FAIL_CONTROL
#define COLT5_CASE -1
#endif

template <int number>
using Scalar = std::conditional_t<COLT5_CASE == number, double, float>;
template <int number>
using Vector = colt5::VectorTensor<Scalar<number>, Cpu>;
template <int number>
using Matrix = colt5::MatrixTensor<Scalar<number>, Cpu>;
template <int number>
using Tokens = colt5::TokensTensor<Scalar<number>, Cpu>;

void norms(const Cpu& policy, const Tokens<0>& x, Vector<0>& d_gamma, const Vector<1>& gamma, const Tokens<2>& d_y,
           const Vector<0>& weight, const Vector<3>& bias) {
    rms_norm(policy, x, gamma);
    rms_norm_vjp(policy, d_y, x, weight, d_gamma);
    layer_norm(policy, x, weight, bias);
}

void routing(const Cpu& policy, const Tokens<0>& x, const Matrix<4>& token, const Tokens<5>& d_scores,
             const colt5::TokensTensor<colt5::TokenIndex, Cpu>& indices) {
    const auto logits = route_logits(policy, x, token);
    cumulative_softmax_vjp(policy, 1, d_scores, x, indices, {});
    const auto saved = coordinate_descent_forward(policy, {}, 4, x, {});
    coordinate_descent_vjp(policy, {}, 4, saved, Tokens<6>(), x, {});
}

void attention(const Cpu& policy, const colt5::Tensor<float, Cpu, 1, 8, 2, 4>& q,
               const colt5::Tensor<Scalar<7>, Cpu, 1, 8, 2, 2, 4>& kv,
               const colt5::Tensor<Scalar<8>, Cpu, 1, 1, 8, 2, 2, 4>& dense_kv,
               const colt5::Tensor<Scalar<9>, Cpu, 1, 8, 2, 4>& d_out,
               const colt5::Tensor<float, Cpu, 1, 8, 2, 2, 4>& right_kv) {
    local_attention(policy, {.reach = 2}, q, kv, {});
    dense_attention_forward(policy, q, dense_kv, {}, {});
    const auto saved = local_attention_forward(policy, {.reach = 2}, q, right_kv, {});
    local_attention_vjp(policy, {.reach = 2}, saved, d_out, q, right_kv, {});
}
