// SPDX-License-Identifier: MIT
#include "check/batch.hpp"
#include "check/gelu.hpp"
#include "check/norms.hpp"
#include "check/routers.hpp"
#include "device.hpp"

bool cases::has_gpu() {
    int count = 0;
    return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}

std::vector<cases::Case> cases::on_cuda_in_double() {
    return all_cases_on_cuda<double>();
}
std::vector<cases::Golden> cases::goldens_in_double() {
    return all_goldens_on_cuda<double>();
}

TEST_SUITE_BEGIN("behaviour");

TEST_CASE("cuda: a batch in double is bit for bit what its samples are alone" * doctest::skip(!cases::has_gpu())) {
    cases::check_products_alone<double>(cases::Precision::fp64);
    cases::check_modules_alone<double>(cases::Precision::fp64);
}
TEST_CASE("cuda: norms in double do not change with the scale of rows" * doctest::skip(!cases::has_gpu())) {
    cases::check_scale_of_norms<double>();
}
TEST_CASE("cuda: GELU in double far below 0" * doctest::skip(!cases::has_gpu())) {
    cases::check_gelu_tail<double>();
}
TEST_CASE("cuda: NaN logits in double" * doctest::skip(!cases::has_gpu())) {
    cases::check_nan_logits<double>();
}
TEST_CASE("cuda: routers in double at the ends of their range" * doctest::skip(!cases::has_gpu())) {
    cases::check_ends_of_routers<double>();
}

TEST_SUITE_END();
