// SPDX-License-Identifier: MIT
#pragma once

#include <doctest/doctest.h>

#include <colt5/cuda.cuh>
#include <colt5/io/dlpack.hpp>

#include <cstdint>
#include <utility>
#include <vector>

/// Tensors shared by DLPack on the device.
namespace cases {

using namespace colt5;

/// What a policy exports goes back to its workspace when it is deleted, and is the tensor that another policy of the
/// device imports; memory of cudaMalloc is imported, too; memory of the host is not.
inline void check_dlpack() {
    const Cuda policy;
    const std::vector<float> values{1, 2, 3, 4, 5, 6};
    const auto expected = std::vector<float>{2, 4, 6, 8, 10, 12};
    auto tensor = from_host<MatrixTensor<float, Cuda>>(policy, {2, 3}, values);
    const std::size_t in_use = policy.statistics().in_use;
    auto* const managed = to_dlpack(policy, std::move(tensor));
    CHECK(managed->dl_tensor.device.device_type == dlpack::kDLCUDA);
    CHECK(managed->dl_tensor.device.device_id == policy.device());
    CHECK(policy.statistics().in_use == in_use);
    {
        const Cuda other;
        const auto imported = from_dlpack<MatrixView<float>>(other, managed);
        assign(other, imported, imported + imported);
        CHECK(to_host(other, imported) == expected);
    }
    CHECK(policy.statistics().in_use == 0);

    struct Theirs {
        void* data = nullptr;
        std::int64_t shape[2] = {2, 3};
        dlpack::DLManagedTensor managed{};
    } theirs;
    colt5::cuda::check(cudaMalloc(&theirs.data, values.size() * sizeof(float)), "cudaMalloc");
    upload(policy, theirs.data, values.data(), values.size() * sizeof(float));
    theirs.managed = {
        .dl_tensor = {theirs.data, {dlpack::kDLCUDA, policy.device()}, 2, {2, 32, 1}, theirs.shape, nullptr, 0},
        .manager_ctx = &theirs,
        .deleter = [](dlpack::DLManagedTensor* self) {
            auto& owner = *static_cast<Theirs*>(self->manager_ctx);
            CHECK(cudaFree(std::exchange(owner.data, nullptr)) == cudaSuccess);
        }};
    {
        const auto imported = from_dlpack<MatrixView<float>>(policy, &theirs.managed);
        assign(policy, imported, imported + imported);
        CHECK(to_host(policy, imported) == expected);
    }
    CHECK(theirs.data == nullptr);

    theirs.managed.dl_tensor.device = {dlpack::kDLCPU, 0};
    CHECK_THROWS_AS(static_cast<void>(from_dlpack<MatrixView<float>>(policy, &theirs.managed)), ValueError);
}

}  // namespace cases
