// SPDX-License-Identifier: MIT
// cases: 5
// first: colt5: `indices` must be of TokenIndex
#include "wrong.hpp"

using colt5::Cpu;

#ifdef COLT5_COMPILE_FAIL_CONTROL
#define COLT5_CASE -1
#endif

template <int number>
using Index = std::conditional_t<COLT5_CASE == number, colt5::Index, colt5::TokenIndex>;
template <int number>
using Indices = colt5::TokensTensor<Index<number>, Cpu>;

void use(const Cpu& policy, const colt5::TokensTensor<float, Cpu>& x, colt5::Mask mask) {
    gather(policy, x, Indices<1>());
    gather_mask(policy, mask, Indices<2>());
    colt5::pick_scores<float>(policy, x, Indices<3>(), mask);
    place_scores(policy, x, Indices<4>(), mask, 8);
    cumulative_softmax(policy, 1, x, Indices<5>(), mask);
}
