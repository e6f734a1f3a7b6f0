// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <type_traits>

#include <colt5/cuda/attention/tuning.cuh>

/// Which instance of a kernel runs a problem.
namespace colt5::cuda {

/// Which keys a query attends to: those in a window, all, or all that are picked rows of k and v.
enum class KeyRows { in_window, all, picked };

/// Calls `run.template operator()<width>()` with the narrowest tile that holds rows of dim_head entries. `head` is
/// dim_head if it is a head_size, or dynamic: then all widths are compiled.
template <Index head, typename Run>
void with_width(Index dim_head, const Run& run) {
    expect_value(dim_head <= 128, "dim_head", "at most 128 on a GPU", dim_head);
    if constexpr (head != dynamic) {
        run.template operator()<static_cast<int>(head)>();
    } else {
        if (dim_head <= 32)
            run.template operator()<32>();
        else if (dim_head <= 64)
            run.template operator()<64>();
        else
            run.template operator()<128>();
    }
}

/// Calls `run.template operator()<Arithmetic>()` with the arithmetic that multiplies values of type T under the policy.
template <typename T, typename Run>
void with_arithmetic(const Cuda& policy, const Run& run) {
    if constexpr (HalfPrecision<T>) {
        run.template operator()<HalfProduct<T>>();
    } else if constexpr (std::is_same_v<T, float>) {
        if (policy.math() == MathMode::tf32)
            run.template operator()<Tf32Product>();
        else
            run.template operator()<ScalarProduct<float>>();
    } else {
        run.template operator()<ScalarProduct<T>>();
    }
}

/// Calls `run.template operator()<Arithmetic, width, staging>()` with the arithmetic, the tile width and the staging
/// that suit the problem. Sliding: local attention without a value scale, aligned 16-bit rows of at most 128 bytes, a
/// reach of at most 64. One large stage: local attention on tensor cores, rows of 256 bytes. Picked: picked rows.
/// Otherwise pipelined.
template <KeyRows keys, Index head, typename T, typename Run>
void with_staging(const Cuda& policy, const Attention<T>& a, const Run& run) {
    with_arithmetic<T>(policy, [&]<typename Arithmetic>() {
        with_width<head>(a.dim_head, [&]<int width>() {
            constexpr bool window = keys == KeyRows::in_window;
            constexpr bool may_slide = window && HalfPrecision<T> && width * sizeof(T) <= 128;
            constexpr bool large_stage = window && Arithmetic::has_tensor_cores && width * sizeof(T) == 256;
            if constexpr (may_slide) {
                if (a.reach <= SlidingWindowTuning::rows && a.vectors && a.value_scale == nullptr)
                    return run.template operator()<Arithmetic, width, Staging::sliding>();
            }
            run.template operator()<Arithmetic, width,
                                    keys == KeyRows::picked ? Staging::picked
                                    : large_stage           ? Staging::large_stage
                                                            : Staging::pipelined>();
        });
    });
}

/// The number of tiles of `tile_rows` rows that a block owns, of the `rows` rows of each head: 1, or for a sliding
/// window about so many that one wave of blocks has all tiles, at most 32.
template <typename Shape, typename T>
int tiles_of_block(const Cuda& policy, const Attention<T>& a, Index rows, Index tile_rows) {
    if (!Shape::slides) return 1;
    const Index blocks = Index{multiprocessors(policy)} * Shape::blocks_per_multiprocessor;
    const Index tiles = divide_up(rows, tile_rows) * a.heads() * a.batch;
    return static_cast<int>(std::clamp(divide_up(tiles, blocks), Index{1}, Index{SlidingWindowTuning::most_tiles}));
}

}  // namespace colt5::cuda
