// SPDX-License-Identifier: MIT
#include "check/attention.hpp"
#include "check/batch.hpp"
#include "check/embedding.hpp"
#include "check/gelu.hpp"
#include "check/norms.hpp"
#include "check/optimizers.hpp"
#include "check/padding.hpp"
#include "check/policy.hpp"
#include "device.hpp"

std::vector<cases::Case> cases::on_cuda_in_bfloat16() {
    return all_cases_on_cuda<bfloat16>();
}
std::vector<cases::Golden> cases::goldens_in_bfloat16() {
    return all_goldens_on_cuda<bfloat16>();
}

TEST_SUITE_BEGIN("behaviour");

TEST_CASE("cuda: graphs of a block in bfloat16" * doctest::skip(!cases::has_gpu())) {
    cases::check_graphs<colt5::bfloat16>();
    cases::check_graph_of_first_call<colt5::bfloat16>();
}
TEST_CASE("cuda: concurrent streams in bfloat16" * doctest::skip(!cases::has_gpu())) {
    cases::check_concurrent_streams<colt5::bfloat16>();
}
TEST_CASE("cuda: graphs of modules in bfloat16" * doctest::skip(!cases::has_gpu())) {
    cases::check_graphs_of_modules<colt5::bfloat16>();
}
TEST_CASE("cuda: padding of bfloat16 may hold anything" * doctest::skip(!cases::has_gpu())) {
    cases::check_padding<colt5::bfloat16>();
}
TEST_CASE("cuda: hidden keys of bfloat16 may hold anything" * doctest::skip(!cases::has_gpu())) {
    cases::check_hidden_keys<colt5::bfloat16>();
    cases::check_hidden_keys<colt5::bfloat16, true>();
}
TEST_CASE("cuda: keys of bfloat16 that no query sees may hold anything" * doctest::skip(!cases::has_gpu())) {
    cases::check_unseen_keys<colt5::bfloat16>();
}
TEST_CASE("cuda: the logit of an only key in bfloat16 has no gradient" * doctest::skip(!cases::has_gpu())) {
    cases::check_only_key<colt5::bfloat16>();
    cases::check_only_key<colt5::bfloat16, true>();
    cases::check_nan_beside_only_key<colt5::bfloat16>();
    cases::check_nan_beside_only_key<colt5::bfloat16, true>();
}
TEST_CASE("cuda: a second call in bfloat16 allocates nothing" * doctest::skip(!cases::has_gpu())) {
    cases::check_allocations<colt5::bfloat16>();
}
TEST_CASE("cuda: several policies in bfloat16" * doctest::skip(!cases::has_gpu())) {
    cases::check_streams<colt5::bfloat16>();
}
TEST_CASE("cuda: out of memory in bfloat16" * doctest::skip(!cases::has_gpu())) {
    cases::check_out_of_memory<colt5::bfloat16>();
}
TEST_CASE("cuda: a clone in bfloat16" * doctest::skip(!cases::has_gpu())) {
    cases::check_clone<colt5::bfloat16>();
}
TEST_CASE("cuda: embedding in bfloat16 of ids that are out of range" * doctest::skip(!cases::has_gpu())) {
    cases::check_embedding<colt5::bfloat16>();
}
TEST_CASE("cuda: training in bfloat16 goes on from a file bit for bit" * doctest::skip(!cases::has_gpu())) {
    cases::check_resumed_training<colt5::bfloat16>();
}
TEST_CASE("cuda: parameters of 16 bits that are written between steps" * doctest::skip(!cases::has_gpu())) {
    cases::check_written_parameters<colt5::bfloat16>();
    cases::check_written_parameters<colt5::float16>();
}
TEST_CASE("cuda: exceptions in bfloat16" * doctest::skip(!cases::has_gpu())) {
    cases::check_exceptions<colt5::bfloat16>();
}
TEST_CASE("cuda: norms in bfloat16 do not change with the scale of rows" * doctest::skip(!cases::has_gpu())) {
    cases::check_scale_of_norms<colt5::bfloat16>();
}
TEST_CASE("cuda: GELU in bfloat16 far below 0" * doctest::skip(!cases::has_gpu())) {
    cases::check_gelu_tail<colt5::bfloat16>();
}

TEST_CASE("cuda: a batch in bfloat16 is bit for bit what its samples are alone" * doctest::skip(!cases::has_gpu())) {
    cases::check_products_alone<colt5::bfloat16>(cases::Precision::bf16);
    cases::check_modules_alone<colt5::bfloat16>(cases::Precision::bf16);
}
TEST_CASE("cuda: gradients of parameters in bfloat16 are summed in float" * doctest::skip(!cases::has_gpu())) {
    cases::check_sums_over_batch<colt5::bfloat16>(cases::Precision::bf16);
}

TEST_SUITE_END();
