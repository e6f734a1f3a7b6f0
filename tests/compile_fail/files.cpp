// SPDX-License-Identifier: MIT
// cases: 3
// expect 1: colt5: NumPy has no bfloat16: save float, or a safetensors file
// expect 2: colt5: the unversioned DLManagedTensor cannot say that its elements are const
// expect 3: colt5: DLPack shares float, double, bfloat16, float16, bool and integers
#include "wrong.hpp"

#include <colt5/io/dlpack.hpp>
#include <colt5/io/npy.hpp>

#ifdef COLT5_COMPILE_FAIL_CONTROL
#define COLT5_CASE -1
#endif

template <int number, typename Bad, typename Good>
using Pick = std::conditional_t<COLT5_CASE == number, Bad, Good>;

void write(const colt5::VectorTensor<Pick<1, colt5::bfloat16, float>, colt5::Cpu>& tensor) {
    colt5::save_npy("tensor.npy", tensor);
}
auto* share(const colt5::Cpu& policy, const colt5::VectorView<Pick<2, const float, float>>& view) {
    return colt5::to_dlpack<colt5::dlpack::DLManagedTensor>(policy, view, nullptr);
}
auto* share(const colt5::Cpu& policy, const colt5::VectorView<Pick<3, colt5::Seed, int>>& view) {
    return colt5::to_dlpack(policy, view, nullptr);
}
