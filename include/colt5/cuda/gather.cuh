// SPDX-License-Identifier: MIT
#pragma once

#include <concepts>
#include <cstdint>
#include <type_traits>

#include <colt5/cuda/kernel.cuh>
#include <colt5/cuda/zero.cuh>
#include <colt5/op/gather.hpp>

namespace colt5 {

namespace cuda {

/// Copies one row with each warp, in packs. A pick is one entry of `indices`, of which a sequence has `picks`. In rows
/// of padding, values that are not finite become 0.
template <typename Pack>
__global__ void gather_rows(Pack* out, const Pack* x, const TokenIndex* indices, const bool* mask, Index picks,
                            Index length, Index columns, Index rows) {
    for (Index row = global_thread() / warp_size; row < rows; row += grid_threads() / warp_size) {
        const Index token = row / picks * length + indices[row];
        const Pack* const from = x + token * columns;
        const bool padding = is_padding(mask, token);
        for (Index j = threadIdx.x % warp_size; j < columns; j += warp_size)
            out[row * columns + j] = padding ? finite_or_zero(from[j]) : from[j];
    }
}

/// out[i] = x[b, indices[i]] with b = i / picks
template <typename T>
__global__ void gather_entries(T* out, const T* x, const TokenIndex* indices, Index picks, Index length, Index count) {
    for (Index i = global_thread(); i < count; i += grid_threads()) out[i] = x[i / picks * length + indices[i]];
}

/// For one token: the number of its picks, which of them writes its row, and where the list of its picks is.
struct TokenPicks {
    unsigned count;
    unsigned writer;           ///< last pick + 1, or picks − first pick: atomicMax finds either; 0: none
    unsigned long long first;  ///< of the list
    unsigned listed;           ///< how many picks are in the list so far
};

/// `picks_of` is zeros at the start. The results do not depend on the order of the atomic operations.
template <bool last_writes>
__global__ void count_picks(TokenPicks* picks_of, const TokenIndex* indices, Index picks, Index length, Index count) {
    for (Index i = global_thread(); i < count; i += grid_threads()) {
        const auto pick = static_cast<unsigned>(i % picks);
        TokenPicks& entry = picks_of[i / picks * length + indices[i]];
        atomicAdd(&entry.count, 1u);
        atomicMax(&entry.writer, last_writes ? pick + 1 : static_cast<unsigned>(picks) - pick);
    }
}

/// Whether the picks of a token have a list: up to one for each lane of a warp.
__device__ inline bool has_list(unsigned token_picks) {
    return token_picks > 1 && token_picks <= warp_size;
}
/// Finds room for the lists. They follow each other in any order; `listed` is the number of picks in them, 0 at the
/// start.
template <typename Total>
__global__ void place_lists(TokenPicks* picks_of, Total* listed, Index tokens) {
    for (Index i = global_thread(); i < tokens; i += grid_threads())
        if (has_list(picks_of[i].count)) picks_of[i].first = atomicAdd(listed, picks_of[i].count);
}
/// Writes the lists, each in any order.
template <typename Token>
__global__ void list_picks(unsigned* lists, TokenPicks* picks_of, const Token* indices, Index picks, Index length,
                           Index count) {
    for (Index i = global_thread(); i < count; i += grid_threads()) {
        TokenPicks& entry = picks_of[i / picks * length + indices[i]];
        if (has_list(entry.count)) lists[entry.first + atomicAdd(&entry.listed, 1u)] = static_cast<unsigned>(i % picks);
    }
}
/// Lane i gets the i-th pick of the list, in rising order.
__device__ inline unsigned sorted_list(const unsigned* list, unsigned count) {
    const unsigned lane = threadIdx.x % warp_size, pick = lane < count ? list[lane] : ~0u;
    unsigned rank = 0, sorted = 0;
    for (unsigned i = 0; i < count; ++i) rank += __shfl_sync(0xffffffffu, pick, static_cast<int>(i)) < pick ? 1 : 0;
    for (unsigned i = 0; i < count; ++i) {
        const int from = __ffs(static_cast<int>(__ballot_sync(0xffffffffu, lane < count && rank == i))) - 1;
        const unsigned next = __shfl_sync(0xffffffffu, pick, from);
        if (lane == i) sorted = next;
    }
    return sorted;
}

/// Finds the picks of one token among those of its sequence. All lanes of a warp call its functions together.
class PickSearch {
public:
    __device__ PickSearch(const TokenIndex* indices, Index picks, TokenIndex token)
        : indices_(indices), picks_(picks), token_(token) {}

    /// One bit for each of the 32 picks from `at` on: whether it picks the token.
    __device__ unsigned among(Index at) const {
        const Index i = at + threadIdx.x % warp_size;
        return __ballot_sync(0xffffffffu, i < picks_ && indices_[i] == token_);
    }
    /// Returns how often the token is picked; `writes` becomes whether `pick` is the pick that writes.
    __device__ unsigned count(Index pick, bool last_writes, bool& writes) const {
        unsigned before = 0, after = 0;
#pragma unroll 8
        for (Index at = 0; at < picks_; at += warp_size) {
            const unsigned found = among(at);
            const auto earlier_lanes = static_cast<unsigned>(::max(Index{0}, ::min(pick - at, Index{warp_size})));
            const unsigned earlier = found & static_cast<unsigned>((std::uint64_t{1} << earlier_lanes) - 1);
            before += __popc(earlier);
            after += __popc(found ^ earlier);
        }
        writes = last_writes ? after == 1 : before == 0;  // `after` counts the pick itself
        return before + after;
    }

private:
    const TokenIndex* indices_;
    Index picks_;
    TokenIndex token_;
};

/// scatter: for up to this many picks of a sequence, each warp searches them all. For more, a table first gets an entry
/// for each token, and a list of the picks of each token that has a few.
inline constexpr Index max_searched_picks = 4096;

/// Into how many parts the columns of a row are cut. Without a table each warp searches all picks, which costs more.
template <int width>
__host__ __device__ Index scatter_parts(const TokenPicks* picks_of, Index columns) {
    return picks_of != nullptr ? divide_up(columns, Index{warp_size * width}) : 1;
}

/// One warp for each pick, or with `picks_of` for each part of its columns. The pick that writes also adds the rows of
/// the other picks of its token, in their order, unless it overwrites. `picks_of` and `lists` may be null.
template <typename T, int width>
__global__ void scatter_rows(Scatter how, T* out, const T* rows, const TokenIndex* indices,
                             const accumulate_t<T>* scale, const TokenPicks* picks_of, const unsigned* lists,
                             Index picks, Index length, Index columns, Index count) {
    using Sum = accumulate_t<T>;
    const bool overwrite = how == Scatter::overwrite;
    const auto scale_of = [&](Index pick) { return scale != nullptr ? scale[pick] : Sum(1); };
    const Index parts = scatter_parts<width>(picks_of, columns);
    for (Index item = global_thread() / warp_size; item < count * parts; item += grid_threads() / warp_size) {
        const Index row = item / parts, b = row / picks, pick = row % picks;
        const TokenIndex token = indices[row];
        const PickSearch search(indices + b * picks, picks, token);
        unsigned token_picks;
        bool writes;
        const unsigned* list = nullptr;
        if (picks_of) {
            const TokenPicks entry = picks_of[b * length + token];
            token_picks = entry.count;
            writes = entry.writer == static_cast<unsigned>(overwrite ? pick + 1 : picks - pick);
            if (lists && has_list(token_picks)) list = lists + entry.first;
        } else {
            token_picks = search.count(pick, overwrite, writes);
        }
        if (!writes) continue;
        const Sum weight = how == Scatter::mean ? static_cast<Sum>(1.0 / static_cast<double>(token_picks)) : Sum(1);
        const unsigned sorted = list ? sorted_list(list, token_picks) : 0;
        T* const to = out + (b * length + token) * columns;
        for (Index first = item % parts * warp_size * width; first < columns; first += parts * warp_size * width) {
            const Index j = first + threadIdx.x % warp_size * width;
            const bool mine = j < columns;
            Sum sum[width];
            const auto add = [&](const T* from, Sum factor) {
                const auto pack = load_pack<width>(from + j);
                const bool nothing = !overwrite && factor == Sum(0);  // whatever the row holds
                for (int i = 0; i < width; ++i)
                    sum[i] += nothing ? Sum(-0.0) : factor * static_cast<Sum>(pack.values[i]);
            };
            if (mine) {
                for (int i = 0; i < width; ++i) sum[i] = Sum(-0.0);  // x + −0 is x, also where x is −0
                if (!overwrite) add(to, Sum(1));
                add(rows + row * columns, weight * scale_of(row));
            }
            unsigned left = overwrite ? 0 : token_picks - 1;
            if (list) {
#pragma unroll 4
                for (unsigned i = 1; i < token_picks; ++i) {
                    const Index other = b * picks + __shfl_sync(0xffffffffu, sorted, static_cast<int>(i));
                    if (mine) add(rows + other * columns, weight * scale_of(other));
                }
                left = 0;
            }
            for (Index at = pick / warp_size * warp_size; left > 0; at += warp_size) {
                unsigned found = search.among(at);
                if (at <= pick) found &= ~0u << (pick - at) << 1;  // only later picks
                for (; found != 0; found &= found - 1, --left) {
                    const Index other = b * picks + at + __ffs(static_cast<int>(found)) - 1;
                    if (mine) add(rows + other * columns, weight * scale_of(other));
                }
            }
            if (!mine) continue;
            Pack<T, width> result;
            for (int i = 0; i < width; ++i) result.values[i] = static_cast<T>(sum[i]);
            store_pack(to + j, result);
        }
    }
}

/// rows[i] /= how often the token of pick i is picked. One warp for each row.
template <typename T>
__global__ void divide_by_picks(T* rows, const TokenIndex* indices, Index picks, Index columns, Index count) {
    using Sum = accumulate_t<T>;
    for (Index row = global_thread() / warp_size; row < count; row += grid_threads() / warp_size) {
        const Index b = row / picks;
        bool writes;
        const unsigned token_picks =
            PickSearch(indices + b * picks, picks, indices[row]).count(row % picks, false, writes);
        if (token_picks == 1) continue;
        const Sum weight = static_cast<Sum>(1.0 / static_cast<double>(token_picks));
        for (Index j = threadIdx.x % warp_size; j < columns; j += warp_size)
            rows[row * columns + j] = static_cast<T>(static_cast<Sum>(rows[row * columns + j]) * weight);
    }
}

/// out[i] = scores of pick i, or 1 if `scores` is null; 0 for a masked token.
template <typename T>
__global__ void pick_scores(T* out, const T* scores, const TokenIndex* indices, const bool* mask, Index routes,
                            Index picks, Index length, Index count) {
    for (Index i = global_thread(); i < count; i += grid_threads()) {
        const Index row = i / picks, token = indices[i];
        const bool real = RowMask(mask, row, routes, length)[token];
        out[i] = !real ? T(0) : scores ? scores[row * length + token] : T(1);
    }
}

/// scores[i] = 0 for a masked token; otherwise NaN if the first pick of the row has a NaN logit, which top_k puts
/// first; otherwise 1.
template <typename T>
__global__ void straight_through_scores(T* scores, const T* logits, const TokenIndex* indices, const bool* mask,
                                        Index routes, Index picks, Index length, Index count) {
    for (Index i = global_thread(); i < count; i += grid_threads()) {
        const Index row = i / picks;
        const T first = logits[row * length + indices[row * picks]];
        const bool real = RowMask(mask, row, routes, length)[indices[i]];
        scores[i] = !real ? T(0) : first != first ? first : T(1);
    }
}

/// In rows (b, r, columns) of sequences with at most k real tokens: values = 1 at real picks and 0 elsewhere; without
/// indices 0. One block for each row.
template <typename T>
__global__ void short_rows(T* values, const TokenIndex* indices, const bool* mask, Index routes, Index columns,
                           Index length, SampleCount k) {
    const bool* const real = RowMask(mask, blockIdx.x, routes, length).data();
    Index count = 0;
    for (Index i = threadIdx.x; i < length; i += blockDim.x) count += real[i] ? 1 : 0;
    if (block_reduce(count, Index{0}, Plus()) > k(blockIdx.x / routes)) return;
    for (Index i = threadIdx.x; i < columns; i += blockDim.x) {
        const Index at = blockIdx.x * columns + i;
        values[at] = indices != nullptr && real[indices[at]] ? T(1) : T(0);
    }
}

/// d_scores of the token of pick i = d_picked[i], unless the token is masked.
template <typename T>
__global__ void place_scores(T* d_scores, const T* d_picked, const TokenIndex* indices, const bool* mask, Index routes,
                             Index picks, Index length, Index count) {
    for (Index i = global_thread(); i < count; i += grid_threads()) {
        const Index row = i / picks, token = indices[i];
        if (RowMask(mask, row, routes, length)[token]) d_scores[row * length + token] = d_picked[i];
    }
}

}  // namespace cuda

/// Indices are not checked: those out of range read or write out of bounds.
template <typename T>
void gather_kernel(const Cuda& policy, TokensView<T> out, TokensView<const T> x, MatrixView<const TokenIndex> indices,
                   Mask clean_mask) {
    constexpr int threads = 256;
    const Index picks = indices.extent(1), length = x.extent(1), dim = x.extent(2), rows = indices.size();
    const auto start = [&](auto* to, auto* from, Index columns) {
        using Element = std::remove_pointer_t<decltype(to)>;
        cuda::launch(policy, "gather_rows", cuda::gather_rows<Element>,
                     cuda::blocks_for(rows * cuda::warp_size, threads), threads, 0, to, from, indices.data(),
                     clean_mask.data(), picks, length, columns, rows);
    };
    if (cuda::fits_packs<T>(dim, out.data(), x.data())) {
        using Pack = cuda::Pack<T, cuda::pack_size<T>>;
        start(reinterpret_cast<Pack*>(out.data()), reinterpret_cast<const Pack*>(x.data()), dim / cuda::pack_size<T>);
    } else {
        start(out.data(), x.data(), dim);
    }
}

template <std::same_as<bool> Bool>
void gather_mask_kernel(const Cuda& policy, TokensView<Bool> out, Mask mask, TokensView<const TokenIndex> indices) {
    constexpr int threads = 256;
    cuda::launch(policy, "gather_mask", cuda::gather_entries<bool>, cuda::blocks_for(out.size(), threads), threads, 0,
                 out.data(), mask.data(), indices.data(), out.extent(1) * out.extent(2), mask.extent(1), out.size());
}

/// rows[b, i] *= 1 / (number of picks of the same token)
template <typename T>
void scatter_mean_weights_kernel(const Cuda& policy, TokensView<T> rows, MatrixView<const TokenIndex> indices) {
    constexpr int threads = 256;
    cuda::launch(policy, "divide_by_picks", cuda::divide_by_picks<T>,
                 cuda::blocks_for(indices.size() * cuda::warp_size, threads), threads, 0, rows.data(), indices.data(),
                 indices.extent(1), rows.extent(2), indices.size());
}

template <typename T>
void scatter_kernel(const Cuda& policy, Scatter how, TokensView<T> out, TokensView<const T> rows,
                    MatrixView<const TokenIndex> indices, MatrixView<const accumulate_t<T>> scale) {
    constexpr int threads = 256;
    const Index picks = indices.extent(1), length = out.extent(1), dim = out.extent(2), count = indices.size();
    VectorTensor<cuda::TokenPicks, Cuda> table;
    VectorTensor<unsigned, Cuda> lists;
    if (picks > cuda::max_searched_picks) {
        const Index tokens = out.extent(0) * length;
        table = VectorTensor<cuda::TokenPicks, Cuda>(policy, {tokens + 1});  // the last one counts what lists have
        zero_kernel(policy, table.view());
        cuda::launch(policy, "count_picks",
                     how == Scatter::overwrite ? cuda::count_picks<true> : cuda::count_picks<false>,
                     cuda::blocks_for(count, threads), threads, 0, table.data(), indices.data(), picks, length, count);
        if (how != Scatter::overwrite) {
            lists = VectorTensor<unsigned, Cuda>(policy, {count});
            cuda::launch(policy, "place_lists", cuda::place_lists<unsigned long long>,
                         cuda::blocks_for(tokens, threads), threads, 0, table.data(), &table.data()[tokens].first,
                         tokens);
            cuda::launch(policy, "list_picks", cuda::list_picks<TokenIndex>, cuda::blocks_for(count, threads), threads,
                         0, lists.data(), table.data(), indices.data(), picks, length, count);
        }
    }
    const auto start = [&]<int width>() {
        const Index warps = count * cuda::scatter_parts<width>(table.data(), dim);
        cuda::launch(policy, "scatter_rows", cuda::scatter_rows<T, width>,
                     cuda::blocks_for(warps * cuda::warp_size, threads), threads, 0, how, out.data(), rows.data(),
                     indices.data(), scale.data(), table.data(), lists.data(), picks, length, dim, count);
    };
    if (cuda::fits_packs<T>(dim, out.data(), rows.data()))
        start.template operator()<cuda::pack_size<T>>();
    else
        start.template operator()<1>();
}

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

template <typename T>
void short_rows_kernel(const Cuda& policy, TokensView<T> values, TokensView<const TokenIndex> indices, Mask mask,
                       SampleCount k) {
    const Index rows = values.extent(0) * values.extent(1);
    cuda::launch(policy, "short_rows", cuda::short_rows<T>, cuda::grid(rows), 1024, 0, values.data(), indices.data(),
                 mask.data(), values.extent(1), values.extent(2), mask.extent(1), k);
}

}  // namespace colt5
