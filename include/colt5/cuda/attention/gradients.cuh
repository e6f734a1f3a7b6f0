// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/cuda/attention/bias.cuh>
#include <colt5/cuda/attention/online_softmax.cuh>
#include <colt5/cuda/attention/pipeline.cuh>
#include <colt5/cuda/attention/single_rows.cuh>

/// What the two kernels of the vector-Jacobian product of attention share; see backward.cuh.
namespace colt5::cuda {

/// The operands of the backward kernels beyond those of Attention.
template <typename T>
struct AttentionGradients {
    using Sum = accumulate_t<T>;

    const T *out, *d_out;          // as Attention::out
    const Sum* log_sum_exp;        // (batch, heads, queries)
    Heads<T> d_q{}, d_k{}, d_v{};  // assigned
    Sum* d_value_scale = nullptr;  // (batch, heads, keys) or null: one gradient for each head, to be summed
};

/// Two numbers for each query (batch, heads, queries). The kernel for d_q writes them, the kernel for d_k and d_v reads
/// them.
template <typename Sum>
struct QueryNumbers {
    Sum* shift;  // log_sum_exp / ln 2; ∞ for a query without keys, so that its weights exp(s − ∞) are 0
    // D = out · d_out, with d_out rounded as in dp, so that this rounding cancels in dp − D (but not in rows that
    // single_rows.cuh recomputes); for a query with a single key its dp, so that ds = p (dp − D) is exactly 0. With a
    // bias, D is corrected by Σ ds over the keys, which is the error that D has from the rounding of `out`: the
    // gradient of a bias sums ds of many queries, in which these errors would add up.
    Sum* dot;
};

template <typename Sum>
__device__ Sum shift_of(Sum log_sum_exp) {
    constexpr Sum infinity = std::numeric_limits<Sum>::infinity();
    return log_sum_exp == -infinity ? infinity : log_sum_exp * static_cast<Sum>(log2_e);
}

/// a · b, rounded: the compiler must not fuse it with an addition, so that it is the same number everywhere.
__device__ inline float rounded_product(float a, float b) {
    return __fmul_rn(a, b);
}
__device__ inline double rounded_product(double a, double b) {
    return __dmul_rn(a, b);
}

/// The products of `groups` groups from `group` on: p = first · stage.firstᵀ and d_p = second ·
/// stage.secondᵀ, where `at(i)` finds group i.
template <typename Tile, int groups, typename Sum, typename Left, typename At>
__device__ void multiply_groups(Sum (&p)[groups][2][4], Sum (&d_p)[groups][2][4], const Left& first, const Left& second,
                                const At& at, int group) {
#pragma unroll
    for (int c = 0; c < groups; ++c) {
        const auto [stage, row] = at(group + c);
        multiply_transposed(p[c], first, stage.first + row * Tile::stride);
        multiply_transposed(d_p[c], second, stage.second + row * Tile::stride);
    }
}

/// The shape of the kernel for d_q (one accumulator), or of that for d_k and d_v (two).
template <typename Arithmetic, int width, Staging staging, int sums>
struct BackwardShape : KernelShape<Arithmetic, width, staging, backward_tuning<Arithmetic, width, staging, sums>(), 2> {
    using Base = KernelShape<Arithmetic, width, staging, backward_tuning<Arithmetic, width, staging, sums>(), 2>;
    using Tiles = typename Base::T[Base::tile_buffers][Base::tile_rows * Base::Tile::stride];
    struct Shared {
        Tiles first, second;
        typename Base::Sum of_row[Base::tile_rows];
        typename Base::Stage stage[Base::stages];
    };
    static_assert(sizeof(Shared) <= shared_bytes);
};

}  // namespace colt5::cuda
