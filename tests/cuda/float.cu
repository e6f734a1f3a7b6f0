// SPDX-License-Identifier: MIT
#include <unistd.h>

#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <iostream>
#include <string>
#include <vector>

#include "check/attention.hpp"
#include "check/batch.hpp"
#include "check/dlpack.hpp"
#include "check/embedding.hpp"
#include "check/gelu.hpp"
#include "check/norms.hpp"
#include "check/optimizers.hpp"
#include "check/padding.hpp"
#include "check/policy.hpp"
#include "check/routers.hpp"
#include "device.hpp"

std::vector<cases::Case> cases::on_cuda_in_float() {
    return all_cases_on_cuda<float>();
}
std::vector<cases::Golden> cases::goldens_in_float() {
    return all_goldens_on_cuda<float>();
}

namespace {

__global__ void write_to(int* at) {
    *at = 1;
}

/// Rounds `count` floats, given by their bits, for a product in TF32.
__global__ void round_to_tf32(std::uint32_t* bits, int count) {
    for (int i = 0; i < count; ++i) bits[i] = colt5::cuda::Tf32Product::round(bits[i]);
}

/// What this program prints when it runs one test case, skipped or not.
std::string output_of_case(const std::string& name) {
    std::array<char, 4096> path{};
    if (readlink("/proc/self/exe", path.data(), path.size() - 1) < 0) return {};
    const std::string command = "'" + std::string(path.data()) + "' --no-skip --test-case='" + name + "' 2>&1";
    std::FILE* const pipe = popen(command.c_str(), "r");
    if (pipe == nullptr) return {};
    std::string output;
    for (int c = std::fgetc(pipe); c != EOF; c = std::fgetc(pipe)) output += static_cast<char>(c);
    output += "exit status " + std::to_string(pclose(pipe));
    return output;
}

}  // namespace

TEST_SUITE_BEGIN("behaviour");

TEST_CASE("cuda: graphs of a block in float" * doctest::skip(!cases::has_gpu())) {
    cases::check_graphs<float>();
    cases::check_graph_of_first_call<float>();
}
TEST_CASE("cuda: concurrent streams in float" * doctest::skip(!cases::has_gpu())) {
    cases::check_concurrent_streams<float>();
}
TEST_CASE("cuda: graphs of modules in float" * doctest::skip(!cases::has_gpu())) {
    cases::check_graphs_of_modules<float>();
}
TEST_CASE("cuda: a graph of routing over a long row" * doctest::skip(!cases::has_gpu())) {
    cases::check_graph_of_long_row();
}
TEST_CASE("cuda: padding of float may hold anything" * doctest::skip(!cases::has_gpu())) {
    cases::check_padding<float>();
}
TEST_CASE("cuda: hidden keys of float may hold anything" * doctest::skip(!cases::has_gpu())) {
    cases::check_hidden_keys<float>();
    cases::check_hidden_keys<float, true>();
}
TEST_CASE("cuda: keys of float that no query sees may hold anything" * doctest::skip(!cases::has_gpu())) {
    cases::check_unseen_keys<float>();
}
TEST_CASE("cuda: the logit of an only key in float has no gradient" * doctest::skip(!cases::has_gpu())) {
    cases::check_only_key<float>();
    cases::check_only_key<float, true>();
    cases::check_nan_beside_only_key<float>();
    cases::check_nan_beside_only_key<float, true>();
}
TEST_CASE("cuda: a second call in float allocates nothing" * doctest::skip(!cases::has_gpu())) {
    cases::check_allocations<float>();
}
TEST_CASE("cuda: several policies in float" * doctest::skip(!cases::has_gpu())) {
    cases::check_streams<float>();
}
TEST_CASE("cuda: several devices" * doctest::skip(!cases::has_gpu())) {
    cases::check_devices<float>();
}
TEST_CASE("cuda: out of memory in float" * doctest::skip(!cases::has_gpu())) {
    cases::check_out_of_memory<float>();
}
TEST_CASE("cuda: a clone in float" * doctest::skip(!cases::has_gpu())) {
    cases::check_clone<float>();
}
TEST_CASE("cuda: Gumbel noise of any row, slot and token" * doctest::skip(!cases::has_gpu())) {
    cases::check_gumbel_noise();
}
TEST_CASE("cuda: exceptions in float" * doctest::skip(!cases::has_gpu())) {
    cases::check_exceptions<float>();
}
TEST_CASE("cuda: tensors shared by DLPack" * doctest::skip(!cases::has_gpu())) {
    cases::check_dlpack();
}
TEST_CASE("cuda: what was never written is NaN where a policy is asked for it" * doctest::skip(!cases::has_gpu())) {
    const colt5::Cuda policy({.allocations = colt5::Allocations::separate_with_nan});
    for (int again = 0; again < 2; ++again) {  // the second time in memory that held zeros
        colt5::Tensor<float, colt5::Cuda, colt5::dynamic> tensor(policy, {1000});
        for (const float value : to_host(policy, tensor)) CHECK(std::isnan(value));
        set_zero(policy, tensor);
        for (const float value : to_host(policy, tensor)) CHECK(value == 0);
    }
}
TEST_CASE("cuda: errors have a call and a place" * doctest::skip(!cases::has_gpu())) {
    cases::check_errors();
}
TEST_CASE("cuda: norms in float do not change with the scale of rows" * doctest::skip(!cases::has_gpu())) {
    cases::check_scale_of_norms<float>();
}
TEST_CASE("cuda: every NaN stays NaN when it is rounded to TF32" * doctest::skip(!cases::has_gpu())) {
    using namespace colt5;
    const Cuda policy;
    auto bits = from_host<VectorTensor<std::uint32_t, Cuda>>(
        policy, {5}, std::vector<std::uint32_t>{0x7F800001u, 0xFF801FFFu, 0x7FFFFFFFu, 0x3F801000u, 0x3F800FFFu});
    colt5::cuda::launch(policy, "round_to_tf32", round_to_tf32, dim3(1), 1, 0, bits.data(), 5);
    auto rounded = to_host(policy, bits);
    for (std::uint32_t& value : rounded) value &= ~0x1FFFu;  // what the tensor cores read
    for (const std::size_t i : {0, 1, 2}) CHECK(std::isnan(std::bit_cast<float>(rounded[i])));
    CHECK((rounded[3] == 0x3F802000u && rounded[4] == 0x3F800000u));
}
TEST_CASE("cuda: GELU in float far below 0" * doctest::skip(!cases::has_gpu())) {
    cases::check_gelu_tail<float>();
}
TEST_CASE("cuda: NaN logits in float" * doctest::skip(!cases::has_gpu())) {
    cases::check_nan_logits<float>();
}
TEST_CASE("cuda: routers in float at the ends of their range" * doctest::skip(!cases::has_gpu())) {
    cases::check_ends_of_routers<float>();
}
TEST_CASE("cuda: embedding in float of ids that are out of range" * doctest::skip(!cases::has_gpu())) {
    cases::check_embedding<float>();
}
TEST_CASE("cuda: training in float goes on from a file bit for bit" * doctest::skip(!cases::has_gpu())) {
    cases::check_resumed_training<float>();
}
TEST_CASE("cuda: optimizers at the ends of their range" * doctest::skip(!cases::has_gpu())) {
    cases::check_ends_of_optimizers();
}

// An illegal access makes CUDA useless for its process: the case below runs in another one.
TEST_CASE("a kernel writes where it must not" * doctest::skip(true)) {
    using namespace colt5;
    const Cuda policy;
    TokensTensor<float, Cuda> tensor(policy, {1, 1, 1});
    colt5::cuda::launch(policy, "write_to", write_to, dim3(1), 1, 0, static_cast<int*>(nullptr));
    std::cout << "first: " << cases::message_of<CudaError>([&] { policy.synchronize(); }) << '\n';
    std::cout << "then: " << cases::message_of<CudaError>([&] { set_zero(policy, tensor); }) << '\n';
}
TEST_CASE("cuda: after an illegal access every call says so, and nothing crashes" *
          doctest::skip(!cases::has_gpu() || cases::sanitized())) {
    const std::string output = output_of_case("a kernel writes where it must not");
    CAPTURE(output);
    CHECK(output.find("first: colt5: cudaStreamSynchronize failed: an illegal memory access") != std::string::npos);
    CHECK(output.find("policy.cuh:") != std::string::npos);
    CHECK(output.find("then: colt5: ") != std::string::npos);
    CHECK(output.find("exit status 0") != std::string::npos);
}

TEST_CASE("cuda: a batch in float is bit for bit what its samples are alone" * doctest::skip(!cases::has_gpu())) {
    cases::check_products_alone<float>(cases::Precision::fp32);
    cases::check_modules_alone<float>(cases::Precision::fp32);
}
TEST_CASE("cuda: a batch in tf32 is bit for bit what its samples are alone" * doctest::skip(!cases::has_gpu())) {
    cases::check_products_alone<float>(cases::Precision::tf32);
    cases::check_modules_alone<float>(cases::Precision::tf32);
}

TEST_SUITE_END();
