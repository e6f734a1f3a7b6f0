// SPDX-License-Identifier: MIT
#pragma once

#include <limits>

#include <colt5/cuda/kernel.cuh>
#include <colt5/cuda/row_team.cuh>

namespace colt5::cuda {

/// The score and the gradient of a token in a row with a NaN logit: NaN if the token is real, 0 if it is masked.
template <typename T>
__device__ T nan_if(bool real) {
    return real ? std::numeric_limits<T>::quiet_NaN() : T(0);
}

/// A block's chunk of a row of logits, −∞ where masked. Entry i belongs to token team.begin + i, for i < team.count.
/// The chunk is in the block's dynamic shared memory if split.on_chip.
template <typename Team, typename T>
class MaskedRow {
public:
    static constexpr T infinity = std::numeric_limits<T>::infinity();

    __device__ MaskedRow(const TeamBarrier& barrier, const RowSplit& split, const T* logits, const bool* mask,
                         Index routes)
        : team(barrier, split),
          logit_(logits + team.row * split.length + team.begin),
          real_(mask, team.row, routes, split.length, team.begin),
          on_chip_(split.on_chip) {
        T top = -infinity;
        unsigned real = 0;
        for (Index i = threadIdx.x; i < team.count; i += Team::threads) {
            const bool is_real = real_[i];
            const T s = is_real ? logit_[i] : -infinity;
            if (on_chip_) shared()[i] = s;
            top = GreaterOrNan()(top, s);
            real += is_real ? 1 : 0;
        }
        const Partial all = team.combine(top, real, -infinity, GreaterOrNan());
        largest = static_cast<T>(all.value);
        valid = all.count;
    }

    __device__ T operator[](Index i) const { return on_chip_ ? shared()[i] : real_[i] ? logit_[i] : -infinity; }

    __device__ bool is_real(Index i) const { return real_[i]; }
    /// Whether a real logit is NaN.
    __device__ bool has_nan() const { return largest != largest; }

    Team team;
    T largest;
    double valid;  ///< number of real tokens

private:
    __device__ static T* shared() {
        extern __shared__ double dynamic_shared[];
        return reinterpret_cast<T*>(dynamic_shared);
    }

    const T* logit_;
    RowMask real_;
    bool on_chip_;
};

}  // namespace colt5::cuda
