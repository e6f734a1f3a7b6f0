// SPDX-License-Identifier: MIT
#pragma once

#include <concepts>

#include <colt5/cuda/kernel.cuh>
#include <colt5/op/look_back.hpp>

namespace colt5 {

namespace cuda {

/// For each window, the rows of the window before it, then its own; a window has `of_window` packs. For the first
/// window of a sequence: its own rows, then zeros.
template <typename Pack>
__global__ void look_back(Pack* rows, const Pack* x, Index windows, Index of_window, Index count) {
    for (Index i = global_thread(); i < count; i += grid_threads()) {
        const Index row = quotient(i, 2 * of_window), at = i - row * 2 * of_window;
        const bool first = row - quotient(row, windows) * windows == 0;
        rows[i] = !first ? x[(row - 1) * of_window + at] : at < of_window ? x[row * of_window + at] : Pack{};
    }
}
template <typename T, int width>
__global__ void look_back_vjp(T* d_x, const T* d_rows, Index windows, Index of_window, Index count) {
    using Sum = accumulate_t<T>;
    for (Index i = global_thread(); i < count; i += grid_threads()) {
        const Index window = quotient(i, of_window), at = i - window * of_window;
        const Index in_sequence = window - quotient(window, windows) * windows;
        const Index own = (2 * window + (in_sequence == 0 ? 0 : 1)) * of_window + at;
        auto sum = load_pack<width>(d_rows + own * width);
        if (in_sequence + 1 < windows) {
            const auto next = load_pack<width>(d_rows + (2 * (window + 1) * of_window + at) * width);
#pragma unroll
            for (int e = 0; e < width; ++e)
                sum.values[e] = static_cast<T>(static_cast<Sum>(sum.values[e]) + static_cast<Sum>(next.values[e]));
        }
        store_pack(d_x + i * width, sum);
    }
}
template <typename Count>
__global__ void look_back_counts(Count* counts, Index windows, Index window, Index size) {
    for (Index i = global_thread(); i < size; i += grid_threads()) {
        const Index row = quotient(i, window), j = i - row * window;
        const bool first = row - quotient(row, windows) * windows == 0;
        counts[i] = static_cast<Count>((first ? 0 : window) + j + 1);
    }
}

template <typename T>
__global__ void window_prefixes(T* rows, bool* mask, const T* logits, Index length, Index windows, Index window,
                                Index first, Index count) {
    for (Index i = global_thread(); i < count; i += grid_threads()) {
        const Index at = quotient(i, length), token = i - at * length, row = first + at;
        const Index sequence = quotient(row, windows);
        rows[i] = logits[sequence * length + token];
        mask[i] = token < (row - sequence * windows) * window;
    }
}

/// One thread for each logit (s, length). It adds the rows of its sequence that are in [first, first + rows).
template <typename T>
__global__ void window_prefixes_vjp(T* d_logits, const T* d_rows, Index length, Index windows, Index first, Index rows,
                                    Index count) {
    for (Index i = global_thread(); i < count; i += grid_threads()) {
        const Index sequence = quotient(i, length), token = i - sequence * length;
        const Index end = ::min(rows, (sequence + 1) * windows - first);
        T sum = d_logits[i];
#pragma unroll 8
        for (Index row = ::max(Index{0}, sequence * windows - first); row < end; ++row)
            sum += d_rows[row * length + token];
        d_logits[i] = sum;
    }
}

template <typename T, typename Token>
__global__ void window_keys(Token* indices, T* scores, bool* mask, const Token* picks, const T* pick_scores, Index k,
                            Index windows, Index window, Index first, Index null, Index count) {
    for (Index i = global_thread(); i < count; i += grid_threads()) {
        const Index at = quotient(i, k + 1), j = i - at * (k + 1) - 1, row = first + at;
        const Token pick = j < 0 ? static_cast<Token>(null) : picks[at * k + j];
        indices[i] = pick;
        scores[i] = j < 0 ? T(1) : pick_scores[at * k + j];
        mask[i] = j < 0 || pick < (row - quotient(row, windows) * windows) * window;
    }
}
template <typename T>
__global__ void without_first(T* to, const T* from, Index k, Index count) {
    for (Index i = global_thread(); i < count; i += grid_threads()) to[i] = from[i + quotient(i, k) + 1];
}

}  // namespace cuda

template <typename T>
void look_back_kernel(const Cuda& policy, TokensView<T> rows, TokensView<const T> x, Index window) {
    constexpr int threads = 256;
    const Index windows = x.extent(1) / window, dim = x.extent(2);
    const auto start = [&](auto* to, auto* from, Index columns) {
        using Element = std::remove_pointer_t<decltype(to)>;
        const Index of_window = window * columns, count = rows.extent(0) * 2 * of_window;
        cuda::launch(policy, "look_back", cuda::look_back<Element>, cuda::blocks_for(count, threads), threads, 0, to,
                     from, windows, of_window, count);
    };
    if (cuda::fits_packs<T>(dim, rows.data(), x.data())) {
        using Pack = cuda::Pack<T, cuda::pack_size<T>>;
        start(reinterpret_cast<Pack*>(rows.data()), reinterpret_cast<const Pack*>(x.data()), dim / cuda::pack_size<T>);
    } else {
        start(rows.data(), x.data(), dim);
    }
}

template <typename T>
void look_back_vjp_kernel(const Cuda& policy, TokensView<T> d_x, TokensView<const T> d_rows, Index window) {
    constexpr int threads = 256;
    const Index windows = d_x.extent(1) / window, dim = d_x.extent(2);
    const auto start = [&](auto* kernel, Index width) {
        const Index of_window = window * dim / width, count = d_x.size() / width;
        cuda::launch(policy, "look_back_vjp", kernel, cuda::blocks_for(count, threads), threads, 0, d_x.data(),
                     d_rows.data(), windows, of_window, count);
    };
    if (cuda::fits_packs<T>(dim, d_x.data(), d_rows.data()))
        start(cuda::look_back_vjp<T, cuda::pack_size<T>>, cuda::pack_size<T>);
    else
        start(cuda::look_back_vjp<T, 1>, 1);
}

template <typename T>
void window_prefixes_kernel(const Cuda& policy, TokensView<T> rows, View<bool, dynamic, dynamic> mask,
                            MatrixView<const T> logits, Index window, Index first) {
    constexpr int threads = 256;
    const Index length = logits.extent(1);
    cuda::launch(policy, "window_prefixes", cuda::window_prefixes<T>, cuda::blocks_for(rows.size(), threads), threads,
                 0, rows.data(), mask.data(), logits.data(), length, length / window, window, first, rows.size());
}

template <typename T>
void window_prefixes_vjp_kernel(const Cuda& policy, MatrixView<T> d_logits, TokensView<const T> d_rows, Index window,
                                Index first) {
    constexpr int threads = 128;  // so that the sums of short sequences, too, keep all multiprocessors busy
    const Index length = d_logits.extent(1);
    cuda::launch(policy, "window_prefixes_vjp", cuda::window_prefixes_vjp<T>,
                 cuda::blocks_for(d_logits.size(), threads), threads, 0, d_logits.data(), d_rows.data(), length,
                 length / window, first, d_rows.extent(0), d_logits.size());
}

template <typename T>
void window_keys_kernel(const Cuda& policy, TokensView<TokenIndex> indices, TokensView<T> scores, TokensView<bool> mask,
                        TokensView<const TokenIndex> picks, TokensView<const T> pick_scores, Index windows,
                        Index window, Index first, Index null) {
    constexpr int threads = 256;
    cuda::launch(policy, "window_keys", cuda::window_keys<T, TokenIndex>, cuda::blocks_for(indices.size(), threads),
                 threads, 0, indices.data(), scores.data(), mask.data(), picks.data(), pick_scores.data(),
                 picks.extent(2), windows, window, first, null, indices.size());
}

template <typename T>
void window_keys_vjp_kernel(const Cuda& policy, TokensView<T> d, TokensView<const T> d_scores) {
    constexpr int threads = 256;
    cuda::launch(policy, "window_keys_vjp", cuda::without_first<T>, cuda::blocks_for(d.size(), threads), threads, 0,
                 d.data(), d_scores.data(), d.extent(2), d.size());
}

template <std::same_as<TokenIndex> Integer>
void look_back_counts_kernel(const Cuda& policy, TokensView<Integer> counts, Index windows) {
    constexpr int threads = 256;
    cuda::launch(policy, "look_back_counts", cuda::look_back_counts<TokenIndex>,
                 cuda::blocks_for(counts.size(), threads), threads, 0, counts.data(), windows, counts.extent(2),
                 counts.size());
}

}  // namespace colt5
