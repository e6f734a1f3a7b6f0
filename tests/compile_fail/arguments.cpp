// SPDX-License-Identifier: MIT
// expect: colt5: this argument has the wrong scalar type
// expect: colt5: this argument has the wrong number of dimensions
#include "wrong.hpp"

#ifdef COLT5_COMPILE_FAIL_CONTROL
using Double = colt5::TokensTensor<float, colt5::Cpu>;
using Matrix = colt5::TokensTensor<float, colt5::Cpu>;
#else
using Double = colt5::TokensTensor<double, colt5::Cpu>;
using Matrix = colt5::MatrixTensor<float, colt5::Cpu>;
#endif

constexpr colt5::FeedForwardConfig config{.dim = 8, .num_heavy_tokens = 2};
using Module = colt5::ConditionalRoutedFeedForward<config, float, colt5::Cpu>;

void call(const Module& module, const Double& x) {
    module(x);
}
void call_again(const Module& module, const Matrix& x) {
    module(x);
}
