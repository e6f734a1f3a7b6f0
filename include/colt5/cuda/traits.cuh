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

/// The kernels for heads of up to 32, 64 and 128 numbers are compiled for these alone where a module has just as many.
template <>
inline constexpr Index head_size<Cuda, 32> = 32;
template <>
inline constexpr Index head_size<Cuda, 64> = 64;
template <>
inline constexpr Index head_size<Cuda, 128> = 128;

/// Tiles of queries have 64 rows or fewer, and stages of keys begin at multiples of 16 of them.
template <typename T>
struct LocalGridOf<Cuda, T> {
    static constexpr LocalGrid of(const LocalAttention&) { return {64, 16}; }
};

}  // namespace colt5
