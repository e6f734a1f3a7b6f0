// SPDX-License-Identifier: MIT
// expect: colt5: the operands of an expression have different scalar types; convert one with cast<T>(e)
// expect: colt5: the expression and what it is assigned to have different scalar types; use cast<T>(e)
// expect: colt5: an Eigen expression must be evaluated before it stands in a colt5 expression; use .eval()
#include "wrong.hpp"

#ifdef COLT5_COMPILE_FAIL_CONTROL
using Other = float;
const auto evaluated = [](const auto& expression) { return expression.eval(); };
#else
using Other = double;
const auto evaluated = [](const auto& expression) { return expression; };
#endif

using Policy = colt5::Cpu;
template <typename T>
using Matrix = colt5::MatrixTensor<T, Policy>;

void operands(const Policy& policy, Matrix<float>& out, const Matrix<float>& a, const Matrix<Other>& b) {
    colt5::assign(policy, out, a + b);
}
void target(const Policy& policy, Matrix<float>& out, const Matrix<Other>& a) {
    colt5::assign(policy, out, a + a);
}
void eigen(const Policy& policy, Matrix<float>& out, const Eigen::MatrixXf& a) {
    colt5::assign(policy, out, out + evaluated(a * a));
}
