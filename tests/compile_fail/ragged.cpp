// SPDX-License-Identifier: MIT
// expect: colt5: `counts` must be the numbers of tokens that the module takes, or a function that returns
// expect: colt5: `saved` must be what forward returned for tokens of the rank of `d_out`
// expect: colt5: this argument has the wrong scalar type
#include "wrong.hpp"

using colt5::Cpu, colt5::Index;
constexpr colt5::FeedForwardConfig config{.dim = 8, .num_heavy_tokens = 2};
using Module = colt5::ConditionalRoutedFeedForward<config, float, Cpu>;
using Matrix = colt5::MatrixTensor<float, Cpu>;

#ifdef COLT5_COMPILE_FAIL_CONTROL
using Double = Matrix;
using Padded = Matrix;
#else
using Double = colt5::MatrixTensor<double, Cpu>;
using Padded = colt5::TokensTensor<float, Cpu>;
#endif

void call(const Module& module, const Matrix& x, const Double& y, const Padded& d_out, std::span<const Index> lengths,
          Module::Gradients& gradients) {
    const colt5::Ragged ragged(module);
    ragged(x, lengths, [](Index length) {
        if constexpr (wrong(true, false))
            return length;
        else
            return colt5::RoutedCounts{length};
    });
    ragged(y, lengths);
    ragged.backward(ragged.forward(x, lengths), d_out, gradients);
}
