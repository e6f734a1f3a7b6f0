// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <limits>

#include <colt5/cuda/kernel.cuh>
#include <colt5/op/gather.hpp>
#include <colt5/op/sinkhorn.hpp>

namespace colt5 {

namespace cuda {

template <typename T>
__global__ void gumbel_noise(T* noise, Random random, GumbelRows which, Index slots, Index length, Index count) {
    for (Index i = global_thread(); i < count; i += grid_threads())
        noise[i] = static_cast<T>(gumbel_of(random, which[i / length / slots], i / length % slots, i % length));
}

inline constexpr int sinkhorn_threads = 256;
inline constexpr double sinkhorn_infinity = std::numeric_limits<double>::infinity();

/// The slots of one row of logits.
struct SinkhornSlots {
    Index count;        ///< slots that choose a real token; the others take `masked`
    TokenIndex masked;  ///< the first masked token; the last token if none is
    bool has_nan;       ///< whether a real logit is NaN
};

/// z = (log-logit of the token + noise) / temperature of all rows. It is recomputed where it is read.
template <typename T>
struct SinkhornRows {
    const double* log_logit;     // (rows, n)
    const SinkhornSlots* slots;  // (rows)
    const T* noise;              // (rows, all slots, n) or null
    double inverse_temperature;
    Index all_slots, length;

    __device__ double z(Index row, Index slot, Index j) const {
        double value = log_logit[row * length + j];
        if (noise) value += static_cast<double>(noise[(row * all_slots + slot) * length + j]);
        return value * inverse_temperature;
    }
};

template <typename T>
__global__ void sinkhorn_prepare(double* log_logit, SinkhornSlots* slots, const T* logits, const bool* mask,
                                 Index routes, Index length, SampleCount slots_of_sample,
                                 bool masked_tokens_take_part) {
    const Index row = blockIdx.x, all_slots = ::min(slots_of_sample.all, slots_of_sample(row / routes));
    const RowMask real(mask, row, routes, length);
    unsigned reals = 0, nans = 0;
    Index masked = length;
    for (Index j = threadIdx.x; j < length; j += blockDim.x) {
        const bool is_real = real[j];
        const double s = static_cast<double>(logits[row * length + j]);
        const double clamped = is_real ? ::min(::max(s, sinkhorn_floor), sinkhorn_ceiling) : sinkhorn_floor;
        nans += is_real && s != s ? 1 : 0;
        log_logit[row * length + j] = is_real || masked_tokens_take_part ? ::log(clamped) : -sinkhorn_infinity;
        reals += is_real ? 1 : 0;
        if (!is_real) masked = ::min(masked, j);
    }
    const Index count = block_sum(reals);
    const bool has_nan = block_sum(nans) > 0;
    masked = block_reduce(masked, length, Smaller());
    if (threadIdx.x == 0)
        slots[row] = {count == 0                ? 0
                      : masked_tokens_take_part ? all_slots
                                                : ::min(all_slots, count),
                      static_cast<TokenIndex>(::min(masked, length - 1)), has_nan};
}

/// log Σ exp of the numbers that are added, without overflow.
struct LogSum {
    double largest = -sinkhorn_infinity, sum = 0;

    __device__ void add(double x) {
        if (x == -sinkhorn_infinity) return;
        const double e = ::exp(x > largest ? largest - x : x - largest);
        sum = x > largest ? sum * e + 1 : sum + e;
        largest = x > largest ? x : largest;
    }
    /// Σ exp(x − top), for top >= largest.
    __device__ double relative_to(double top) const { return sum > 0 ? sum * ::exp(largest - top) : sum; }
};

/// u_i = log Σ_j exp(z_ij − v_j). One block for each slot and row. u points to this iteration; v points to the one
/// before, or is null for zeros. The iterations of a row lie one after another.
template <typename T>
__global__ void sinkhorn_slot_potentials(double* u, const double* v, Index iterations, SinkhornRows<T> rows) {
    const RowBlock at(rows.all_slots);
    const Index slot = at.block, row = at.row;
    double* const to = u + row * iterations * rows.all_slots + slot;
    LogSum mine;
    if (slot < rows.slots[row].count)
        for (Index j = threadIdx.x; j < rows.length; j += blockDim.x)
            mine.add(rows.z(row, slot, j) - (v ? v[row * iterations * rows.length + j] : 0.0));
    const double top = block_max(mine.largest), sum = block_sum(mine.relative_to(top));
    if (threadIdx.x == 0) *to = top == -sinkhorn_infinity ? 0.0 : top + ::log(sum);
}

/// In a block of token_potentials or vjp_tokens, each lane has a token, and each warp every eighth slot.
inline constexpr int sinkhorn_groups = sinkhorn_threads / warp_size;
struct SinkhornToken {
    __device__ SinkhornToken(Index length, const SinkhornSlots* slots_of_rows) {
        const RowBlock at(divide_up(length, warp_size));
        lane = threadIdx.x % warp_size;
        group = threadIdx.x / warp_size;
        row = at.row;
        token = static_cast<Index>(at.block) * warp_size + lane;
        slots = slots_of_rows[row].count;
    }
    Index row, token, slots, lane, group;
};

/// v_j = log Σ_i exp(z_ij − u_i); 0 for tokens that take no part
template <typename T>
__global__ void sinkhorn_token_potentials(double* v, const double* u, Index iterations, SinkhornRows<T> rows) {
    __shared__ LogSum shared[sinkhorn_groups][warp_size];
    const auto [row, j, slots, lane, group] = SinkhornToken(rows.length, rows.slots);
    LogSum mine;
    if (j < rows.length)
        for (Index i = group; i < slots; i += sinkhorn_groups)
            mine.add(rows.z(row, i, j) - u[row * iterations * rows.all_slots + i]);
    shared[group][lane] = mine;
    __syncthreads();
    if (group != 0 || j >= rows.length) return;
    double top = -sinkhorn_infinity, sum = 0;
    for (int g = 0; g < sinkhorn_groups; ++g) top = ::max(top, shared[g][lane].largest);
    for (int g = 0; g < sinkhorn_groups; ++g) sum += shared[g][lane].relative_to(top);
    v[row * iterations * rows.length + j] = sum > 0 ? top + ::log(sum) : 0.0;
}

/// Each slot takes its most likely real token, the first of several. Slots beyond SinkhornSlots::count take a masked
/// token. One block for each slot.
template <typename T>
__global__ void sinkhorn_choose(TokenIndex* indices, T* scores, const double* u, const double* v, Index iterations,
                                SinkhornRows<T> rows, const bool* mask, Index routes) {
    const RowBlock at(rows.all_slots);
    const Index slot = at.block, row = at.row, out = row * rows.all_slots + slot;
    if (slot >= rows.slots[row].count) {
        if (threadIdx.x == 0) {
            indices[out] = rows.slots[row].masked;
            scores[out] = T(0);
        }
        return;
    }
    const RowMask real(mask, row, routes, rows.length);
    const double slot_u = u[row * iterations * rows.all_slots + slot];
    const double* const token_v = v + row * iterations * rows.length;
    double most = -1;
    Index first_real = rows.length, best = rows.length;
    for (Index j = threadIdx.x; j < rows.length; j += blockDim.x) {
        if (!real[j]) continue;
        first_real = ::min(first_real, j);
        const double p = ::exp(rows.z(row, slot, j) - (slot_u + token_v[j]));
        if (p > most) {
            most = p;
            best = j;
        }
    }
    first_real = block_reduce(first_real, rows.length, Smaller());
    const double top = block_max(most);
    best = block_reduce(most == top ? best : rows.length, rows.length, Smaller());
    if (threadIdx.x != 0) return;
    best = ::min(best, rows.length) == rows.length ? first_real
                                                   : best;  // if the noise is NaN, no token is the most likely one
    const bool has_nan = rows.slots[row].has_nan;
    indices[out] = static_cast<TokenIndex>(has_nan ? first_real : best);
    scores[out] = has_nan ? std::numeric_limits<T>::quiet_NaN()
                          : static_cast<T>(::exp(rows.z(row, slot, best) - (slot_u + token_v[best])));
}

/// The gradients through the chosen entries of P = exp(z − u − v). With g_i = d_score_i · score_i:
/// d_z_j = Σ of g_i over the slots i that chose token j (the gradient of z_ij, summed over i), and d_v_j = −d_z_j.
template <typename T>
__global__ void sinkhorn_vjp_start(double* d_z, double* d_v, const T* d_scores, const T* scores,
                                   const TokenIndex* indices, SinkhornRows<T> rows) {
    const RowBlock at(divide_up(rows.length, sinkhorn_threads));
    const Index row = at.row, slots = rows.slots[row].count;
    const Index j = static_cast<Index>(at.block) * sinkhorn_threads + threadIdx.x;
    if (j >= rows.length) return;
    double sum = 0;
    for (Index i = row * rows.all_slots; i < row * rows.all_slots + slots; ++i)
        if (indices[i] == j) sum += static_cast<double>(d_scores[i]) * static_cast<double>(scores[i]);
    d_z[row * rows.length + j] = sum;
    d_v[row * rows.length + j] = -sum;
}

/// d_u_i = −g_i − Σ_j d_v_j exp(z_ij − u_i − v_j), with g_i = d_score_i · score_i if `last` (the last iteration of
/// forward), otherwise g_i = 0. One block for each slot and row.
template <typename T>
__global__ void sinkhorn_vjp_slots(double* d_u, const double* d_v, const double* u, const double* v, Index iterations,
                                   SinkhornRows<T> rows, const T* d_scores, const T* scores, bool last) {
    const RowBlock block(rows.all_slots);
    const Index slot = block.block, row = block.row, at = row * rows.all_slots + slot;
    if (slot >= rows.slots[row].count) return;
    const double slot_u = u[row * iterations * rows.all_slots + slot];
    const double* const token_v = v + row * iterations * rows.length;
    double sum = 0;
    for (Index j = threadIdx.x; j < rows.length; j += blockDim.x)
        sum += d_v[row * rows.length + j] * ::exp(rows.z(row, slot, j) - slot_u - token_v[j]);
    sum = block_sum(sum);
    const double g = last ? static_cast<double>(d_scores[at]) * static_cast<double>(scores[at]) : 0;
    if (threadIdx.x == 0) d_u[at] = -g - sum;
}

/// With e_j = Σ_i d_u_i exp(z_ij − u_i − v_j), where v is that of the iteration before, or null for zeros:
/// d_z_j += d_v_j + e_j, then d_v_j = −e_j.
template <typename T>
__global__ void sinkhorn_vjp_tokens(double* d_z, double* d_v, const double* d_u, const double* u, const double* v,
                                    Index iterations, SinkhornRows<T> rows) {
    __shared__ double shared[sinkhorn_groups][warp_size];
    const auto [row, j, slots, lane, group] = SinkhornToken(rows.length, rows.slots);
    double sum = 0;
    if (j < rows.length) {
        const double shift = v ? v[row * iterations * rows.length + j] : 0.0;
        for (Index i = group; i < slots; i += sinkhorn_groups)
            sum += d_u[row * rows.all_slots + i] *
                   ::exp(rows.z(row, i, j) - u[row * iterations * rows.all_slots + i] - shift);
    }
    shared[group][lane] = sum;
    __syncthreads();
    if (group != 0 || j >= rows.length) return;
    for (int g = 1; g < sinkhorn_groups; ++g) sum += shared[g][lane];
    const Index at = row * rows.length + j;
    d_z[at] += d_v[at] + sum;
    d_v[at] = -sum;
}

template <typename T>
__global__ void sinkhorn_vjp_logits(T* d_logits, const double* d_z, const T* logits, const bool* mask,
                                    const SinkhornSlots* slots, Index routes, Index length, Index count,
                                    double temperature) {
    for (Index i = global_thread(); i < count; i += grid_threads()) {
        const double s = static_cast<double>(logits[i]);
        const bool real = RowMask(mask, i / length, routes, length)[i % length];
        const bool has_nan = slots[i / length].has_nan;
        d_logits[i] = !real                 ? T(0)
                      : has_nan             ? std::numeric_limits<T>::quiet_NaN()
                      : s >= sinkhorn_floor ? static_cast<T>(d_z[i] / (s * temperature))
                                            : T(0);
    }
}

/// Launches kernels over all slots, or all tokens, of all rows.
class SinkhornGrid {
public:
    SinkhornGrid(const Cuda& policy, Index slots, Index length, Index rows)
        : policy_(policy),
          slots_(grid_of_rows(rows, slots)),
          tokens_(grid_of_rows(rows, divide_up(length, warp_size))) {}
    template <typename... P, typename... A>
    void over_slots(const char* name, void (*kernel)(P...), const A&... arguments) const {
        launch(policy_, name, kernel, slots_, sinkhorn_threads, 0, arguments...);
    }
    template <typename... P, typename... A>
    void over_tokens(const char* name, void (*kernel)(P...), const A&... arguments) const {
        launch(policy_, name, kernel, tokens_, sinkhorn_threads, 0, arguments...);
    }

private:
    const Cuda& policy_;
    dim3 slots_, tokens_;
};

/// SinkhornRows with the memory that they point to.
template <typename T>
struct PreparedSinkhorn {
    PreparedSinkhorn(const Cuda& policy, TokensView<const T> logits, TokensView<const T> noise, Mask mask,
                     const Sinkhorn& sinkhorn, Index slots, VectorView<const TokenIndex> slots_of_sample)
        : log_logit(policy, {logits.size()}), slots_of_row(policy, {logits.extent(0) * logits.extent(1)}) {
        rows = {log_logit.data(), slots_of_row.data(), noise.data(), 1 / sinkhorn.temperature, slots, logits.extent(2)};
        launch(policy, "sinkhorn_prepare", sinkhorn_prepare<T>, grid(slots_of_row.size()), 1024, 0, log_logit.data(),
               slots_of_row.data(), logits.data(), mask.data(), logits.extent(1), logits.extent(2),
               SampleCount(slots, slots_of_sample), sinkhorn.masked_tokens_take_part);
    }
    VectorTensor<double, Cuda> log_logit;
    VectorTensor<SinkhornSlots, Cuda> slots_of_row;
    SinkhornRows<T> rows;
};

}  // namespace cuda

template <typename T>
void gumbel_noise_kernel(const Cuda& policy, TokensView<T> noise, Random random, GumbelRows which) {
    constexpr int threads = 256;
    cuda::launch(policy, "gumbel_noise", cuda::gumbel_noise<T>, cuda::blocks_for(noise.size(), threads), threads, 0,
                 noise.data(), random, which, noise.extent(1), noise.extent(2), noise.size());
}

/// Each half of an iteration reads z once: a block sums over the tokens of one slot, or over the slots of 32 tokens.
template <typename T>
void sinkhorn_kernel(const Cuda& policy, TokensView<TokenIndex> indices, TokensView<T> scores,
                     View<double, dynamic, dynamic, dynamic, dynamic> slot_potential,
                     View<double, dynamic, dynamic, dynamic, dynamic> token_potential, TokensView<const T> logits,
                     TokensView<const T> noise, Mask mask, const Sinkhorn& sinkhorn,
                     VectorView<const TokenIndex> slots_of_sample) {
    if (indices.size() == 0) return;
    const Index slots = indices.extent(2), length = logits.extent(2), iterations = sinkhorn.n_iters;
    const cuda::PreparedSinkhorn<T> prepared(policy, logits, noise, mask, sinkhorn, slots, slots_of_sample);
    const cuda::SinkhornGrid grid(policy, slots, length, logits.extent(0) * logits.extent(1));
    const auto u = [&](Index t) { return slot_potential.data() + t * slots; };
    const auto v = [&](Index t) { return t < 0 ? nullptr : token_potential.data() + t * length; };
    for (Index t = 0; t < iterations; ++t) {
        grid.over_slots("sinkhorn_slot_potentials", cuda::sinkhorn_slot_potentials<T>, u(t), v(t - 1), iterations,
                        prepared.rows);
        grid.over_tokens("sinkhorn_token_potentials", cuda::sinkhorn_token_potentials<T>, v(t), u(t), iterations,
                         prepared.rows);
    }
    grid.over_slots("sinkhorn_choose", cuda::sinkhorn_choose<T>, indices.data(), scores.data(), u(iterations - 1),
                    v(iterations - 1), iterations, prepared.rows, mask.data(), logits.extent(1));
}

template <typename T>
void sinkhorn_vjp_kernel(const Cuda& policy, TokensView<T> d_logits, TokensView<const T> d_scores,
                         TokensView<const TokenIndex> indices, TokensView<const T> scores,
                         View<const double, dynamic, dynamic, dynamic, dynamic> slot_potential,
                         View<const double, dynamic, dynamic, dynamic, dynamic> token_potential,
                         TokensView<const T> logits, TokensView<const T> noise, Mask mask, const Sinkhorn& sinkhorn,
                         VectorView<const TokenIndex> slots_of_sample) {
    if (logits.size() == 0) return;
    const Index slots = indices.extent(2), length = logits.extent(2), iterations = sinkhorn.n_iters;
    const Index rows = logits.extent(0) * logits.extent(1);
    const cuda::PreparedSinkhorn<T> prepared(policy, logits, noise, mask, sinkhorn, slots, slots_of_sample);
    const cuda::SinkhornGrid grid(policy, slots, length, rows);
    VectorTensor<double, Cuda> d_z(policy, {logits.size()}), d_v(policy, {logits.size()}),
        d_u(policy, {indices.size()});
    constexpr int threads = cuda::sinkhorn_threads;
    cuda::launch(policy, "sinkhorn_vjp_start", cuda::sinkhorn_vjp_start<T>,
                 cuda::grid_of_rows(rows, divide_up(length, threads)), threads, 0, d_z.data(), d_v.data(),
                 d_scores.data(), scores.data(), indices.data(), prepared.rows);
    const auto u = [&](Index t) { return slot_potential.data() + t * slots; };
    const auto v = [&](Index t) { return t < 0 ? nullptr : token_potential.data() + t * length; };
    for (Index t = iterations - 1; t >= 0; --t) {
        grid.over_slots("sinkhorn_vjp_slots", cuda::sinkhorn_vjp_slots<T>, d_u.data(), d_v.data(), u(t), v(t),
                        iterations, prepared.rows, d_scores.data(), scores.data(), t == iterations - 1);
        grid.over_tokens("sinkhorn_vjp_tokens", cuda::sinkhorn_vjp_tokens<T>, d_z.data(), d_v.data(), d_u.data(), u(t),
                         v(t - 1), iterations, prepared.rows);
    }
    cuda::launch(policy, "sinkhorn_vjp_logits", cuda::sinkhorn_vjp_logits<T>, cuda::blocks_for(logits.size(), threads),
                 threads, 0, d_logits.data(), d_z.data(), logits.data(), mask.data(), prepared.slots_of_row.data(),
                 logits.extent(1), length, logits.size(), sinkhorn.temperature);
}

}  // namespace colt5
