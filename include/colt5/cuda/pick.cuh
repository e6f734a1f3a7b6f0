// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/cuda/gather.cuh>
#include <colt5/cuda/zero.cuh>
#include <colt5/op/pick.hpp>

namespace colt5 {

namespace cuda {

template <typename T>
__global__ void pick_scores(T* out, const T* scores, const TokenIndex* indices, const bool* mask, Index routes,
                            Index picks, Index length, Index count) {
    for (Index i = global_thread(); i < count; i += all_threads()) {
        const Index row = i / picks, token = indices[i];
        const bool real = !mask || mask[row / routes * length + token];
        out[i] = !real ? T(0) : scores ? scores[row * length + token] : T(1);
    }
}

template <typename T>
__global__ void straight_through_scores(T* scores, const T* logits, const TokenIndex* indices, const bool* mask,
                                        Index routes, Index picks, Index length, Index count) {
    for (Index i = global_thread(); i < count; i += all_threads()) {
        const Index row = i / picks;
        const T first = logits[row * length + indices[row * picks]];
        const bool real = !mask || mask[row / routes * length + indices[i]];
        scores[i] = !real ? T(0) : first != first ? first : T(1);
    }
}

template <typename T>
__global__ void place_scores(T* d_scores, const T* d_picked, const TokenIndex* indices, const bool* mask, Index routes,
                             Index picks, Index length, Index count) {
    for (Index i = global_thread(); i < count; i += all_threads()) {
        const Index row = i / picks, token = indices[i];
        if (!mask || mask[row / routes * length + token]) d_scores[row * length + token] = d_picked[i];
    }
}

}  // namespace cuda

template <typename T>
void pick_scores_kernel(const Cuda& policy, TokensView<T> out, TokensView<const T> scores,
                        TokensView<const TokenIndex> indices, Mask mask) {
    constexpr int threads = 256;
    const Index length = scores ? scores.extent(2) : mask ? mask.extent(1) : 0;
    cuda::launch(policy, "pick_scores", cuda::pick_scores<T>, cuda::blocks_for(out.size(), threads), threads, 0,
                 out.data(), scores.data(), indices.data(), mask.data(), indices.extent(1), indices.extent(2), length,
                 out.size());
}

template <typename T>
void straight_through_scores_kernel(const Cuda& policy, TokensView<T> scores, TokensView<const T> logits,
                                    TokensView<const TokenIndex> indices, Mask mask) {
    constexpr int threads = 256;
    cuda::launch(policy, "straight_through_scores", cuda::straight_through_scores<T>,
                 cuda::blocks_for(scores.size(), threads), threads, 0, scores.data(), logits.data(), indices.data(),
                 mask.data(), indices.extent(1), indices.extent(2), logits.extent(2), scores.size());
}

template <typename T>
void place_scores_kernel(const Cuda& policy, TokensView<T> d_scores, TokensView<const T> d_picked,
                         TokensView<const TokenIndex> indices, Mask mask) {
    constexpr int threads = 256;
    zero_kernel(policy, VectorView<T>(d_scores.data(), {d_scores.size()}));
    cuda::launch(policy, "place_scores", cuda::place_scores<T>, cuda::blocks_for(indices.size(), threads), threads, 0,
                 d_scores.data(), d_picked.data(), indices.data(), mask.data(), indices.extent(1), indices.extent(2),
                 d_scores.extent(2), indices.size());
}

}  // namespace colt5
