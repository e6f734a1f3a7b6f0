// SPDX-License-Identifier: MIT
// Operations that are made of others: with the header of each and with the whole backend, the same kernels run.
#if defined(COLT5_WHOLE_BACKEND)
#include <colt5/cpu.hpp>
#else
#include <colt5/cpu/feed_forward.hpp>
#include <colt5/cpu/norm_linear.hpp>
#include <colt5/cpu/projected_local_attention.hpp>
#endif

using namespace colt5;
using Tokens = TokensTensor<float, Cpu>;
using Matrix = MatrixTensor<float, Cpu>;

void norm_linears(const Cpu& policy, const Tokens& x, Tokens& y, const Matrix& weight, Matrix& d_weight,
                  const RMSNormParameters<const float>& norm, const RMSNormParameters<float>& d_norm) {
    norm_linear(policy, x, norm, weight);
    norm_linear_vjp(policy, y.view(), x, x, norm, weight, d_norm, d_weight);
}

void feed_forwards(const Cpu& policy, const Tokens& x, Tokens& y, const FeedForwardParameters<const float>& parameters,
                   const FeedForwardParameters<float>& gradients) {
    feed_forward(policy, x, parameters);
    feed_forward_vjp(policy, y.view(), x, x, {}, parameters, gradients);
}

void attention(const Cpu& policy, const Tensor<float, Cpu, 1, 8, 2, 4>& q, const Tensor<float, Cpu, 1, 8, 2, 2, 4>& kv,
               Tensor<float, Cpu, 1, 8, 3, 2, 4>& d_qkv, const Tokens& d_y, const Matrix& weight, Matrix& d_weight) {
    projected_local_attention_vjp(policy, d_qkv.view(), {.reach = 2}, d_y, q, kv, {}, 0, 0, weight, d_weight);
}
