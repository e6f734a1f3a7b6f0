// SPDX-License-Identifier: MIT
#pragma once

#include <limits>

#include <colt5/cuda/row_team.cuh>

namespace colt5::cuda {

/// One row of logits, −∞ where masked, as a block of the team that shares it sees it: entry i is that of token
/// team.begin + i, for i < team.count. Kept in the block's dynamic shared memory if it fits.
template <typename Team, typename T>
class MaskedRow {
public:
    static constexpr T infinity = std::numeric_limits<T>::infinity();

    __device__ MaskedRow(const Meeting& meeting, const RowPart& part, const T* logits, const bool* mask, Index routes)
        : team(meeting, part),
          logit_(logits + team.row * part.length + team.begin),
          real_(mask ? mask + team.row / routes * part.length + team.begin : nullptr),
          on_chip_(part.on_chip) {
        T top = -infinity;
        unsigned real = 0;
        for (Index i = threadIdx.x; i < team.count; i += Team::threads) {
            const bool is_real = !real_ || real_[i];
            const T s = is_real ? logit_[i] : -infinity;
            if (on_chip_) shared()[i] = s;
            top = Greater()(top, s);
            real += is_real ? 1 : 0;
        }
        const Partial all = team.combine(top, real, -infinity, Greater());
        largest = static_cast<T>(all.first);
        valid = all.second;
    }

    __device__ T operator[](Index i) const {
        return on_chip_ ? shared()[i] : !real_ || real_[i] ? logit_[i] : -infinity;
    }

    Team team;
    T largest;
    double valid;  ///< number of real tokens

private:
    __device__ static T* shared() {
        extern __shared__ double dynamic_shared[];
        return reinterpret_cast<T*>(dynamic_shared);
    }

    const T* logit_;
    const bool* real_;
    bool on_chip_;
};

}  // namespace colt5::cuda
