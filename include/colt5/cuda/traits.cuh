// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>

#include <colt5/cuda/policy.cuh>
#include <colt5/op/gradient_epilogue.hpp>
#include <colt5/op/local_attention.hpp>

/// What modules ask about the backend at compile time.
namespace colt5 {

/// Two: the kernels keep the sums of d_t of each update in registers, for the usual widths. A feedforward needs one
/// update, an attention with one route of keys and values two.
template <>
inline constexpr std::size_t max_rank_one_updates<Cuda> = 2;

/// Tiles of queries have 64 rows or fewer, and stages of keys begin at multiples of 16 of them.
template <typename T>
struct LocalGridOf<Cuda, T> {
    static constexpr LocalGrid of(const LocalAttention&) { return {64, 16}; }
};

}  // namespace colt5
