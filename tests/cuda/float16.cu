// SPDX-License-Identifier: MIT
#include "check/batch.hpp"
#include "device.hpp"

std::vector<cases::Case> cases::on_cuda_in_float16() {
    return all_cases_on_cuda<float16>();
}

TEST_SUITE_BEGIN("behaviour");

TEST_CASE("cuda: a batch in float16 is bit for bit what its samples are alone" * doctest::skip(!cases::has_gpu())) {
    cases::check_products_alone<colt5::float16>(cases::Precision::fp16);
    cases::check_modules_alone<colt5::float16>(cases::Precision::fp16);
}

TEST_SUITE_END();
