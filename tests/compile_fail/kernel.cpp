// SPDX-License-Identifier: MIT
// expect: colt5: no `rms_norm` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>
#include "wrong.hpp"

/// A policy for which there are no kernels.
struct Elsewhere {
    using Workspace = colt5::Cpu::Workspace;
    const std::shared_ptr<Workspace>& workspace() const { return workspace_; }
    colt5::MemoryPlan memory_plan() const { return {.tokens_at_a_time = 1, .recompute = false}; }
    std::shared_ptr<Workspace> workspace_ = std::make_shared<Workspace>();
};
void upload(const Elsewhere&, void*, const void*, std::size_t);
void download(const Elsewhere&, void*, const void*, std::size_t);

#ifdef COLT5_COMPILE_FAIL_CONTROL
using Policy = colt5::Cpu;
#else
using Policy = Elsewhere;
#endif

void normalize(const Policy& policy) {
    const colt5::MatrixTensor<float, Policy> x(policy, {3, 8});
    const colt5::VectorTensor<float, Policy> gamma(policy, {8});
    rms_norm(policy, x, gamma);
}
