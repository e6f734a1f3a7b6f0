// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <numeric>
#include <utility>

#include <colt5/module/config.hpp>
#include <colt5/module/heavy_attention.hpp>
#include <colt5/module/module.hpp>
#include <colt5/op/gather.hpp>
#include <colt5/op/gathered_attention.hpp>
#include <colt5/op/look_back.hpp>
#include <colt5/op/null_key.hpp>
#include <colt5/op/route_blocks.hpp>
#include <colt5/op/swap_first_axes.hpp>
#include <colt5/op/top_k.hpp>

namespace colt5 {

/// The heavy branch of ConditionalRoutedAutoregressiveAttention for one call. A sequence is cut into windows. Queries,
/// a few of each window, attend to a learned null key and to the tokens that a router chooses among all tokens before
/// the window, whose values are multiplied by their scores:
///
///     out_i = to_out · attention(to_q · n_i, to_kv · n of the window's keys, their scores),   n = norm(x)
///
/// Keys and values are computed once for each token; windows hold indices into them, and backward processes a few
/// windows at a time. So memory grows with n · (d + num_heavy_tokens_kv / heavy_window_size), not with n². The time of
/// the router grows with n² / heavy_window_size.
///
/// In shapes, N is n rounded up to whole windows, m the number of windows, q and k the queries and keys of each, and
/// e = h / r · dim_head.
template <AutoregressiveAttentionConfig config, typename KVRouter, typename Scalar, Policy P>
class PrefixAttention {
public:
    using Heavy = HeavyAttention<Scalar, P>;
    using Logit = accumulate_t<Scalar>;
    using Out = TokensTensor<Scalar, P>;
    static constexpr Index window = config.heavy_window_size != 0 ? config.heavy_window_size : config.light_window_size;

    /// The sizes of a call. The windows of all sequences and routes are numbered (b, r, m).
    struct Sizes {
        Index batch = 0, length = 0, windows = 0, queries = 0, keys = 0;

        Sizes() = default;
        Sizes(const std::array<Index, 3>& shape, const AttentionCounts& counts) : batch(shape[0]), length(shape[1]) {
            constexpr Index step = std::lcm(window, config.light_window_size);  // whole windows of both branches
            windows = (length + step - 1) / step * (step / window);
            const Index q =
                detail::token_count("num_heavy_tokens_q", counts.num_heavy_tokens_q, config.num_heavy_tokens_q);
            const Index kv =
                detail::token_count("num_heavy_tokens_kv", counts.num_heavy_tokens_kv, config.num_heavy_tokens_kv);
            queries = std::min(q, window);
            keys = std::min(kv, padded());
        }
        Index padded() const { return windows * window; }
        Index sequences() const { return batch * routes; }
        /// Of how many windows of a sequence backward holds the gradients of keys: they take about three times the
        /// memory of a sequence's keys and values, or less; on the CPU, gathered keys take up to twice that memory
        /// more. At most 32, so that no token has more picks in a part than scatter's lists have room for.
        Index windows_at_once() const {
            return std::clamp(3 * routes * padded() / keys, Index{1}, std::min(windows, Index{32}));
        }
    };

    struct Activations {
        TokensTensor<Scalar, P> q;      // (b, r · m · q, e), rotated
        TokensTensor<Scalar, P> kv;     // (1 + b · r, N + 1, 2 · e), keys rotated, null ones last. The first rows
                                        // are free: backward uses them, see there
        TokensTensor<Logit, P> logits;  // (b, r, N), of the router
        TokensTensor<TokenIndex, P> indices;  // (b · r · m, 1, k)
        KeysOfWindows<Logit, P> keys;         // the same with the null keys, and scores
        TokensTensor<Scalar, P> attended;     // (b, m · q, r · e)
        TokensTensor<Logit, P> log_sum_exp;   // (b · r, m, h / r · q)
        Out out;                              // (b, m · q, d)
    };
    struct InputGradients {
        Out d_x;                          // (b, N, d), without that of the logits
        TokensTensor<Logit, P> d_logits;  // (b, r, N)
    };

    PrefixAttention(const Heavy& heavy, const KVRouter& router, const Sizes& sizes)
        : heavy_(heavy), router_(router), of_(sizes) {}

    /// x (b, N, d), and the tokens of it that are queries, at_q (b, m · q), those of each window together.
    Activations forward(const P& policy, TokensView<const Scalar> x, MatrixView<const TokenIndex> at_q) const {
        Activations saved;
        auto normed = heavy_.norm(policy, x);  // (b, N, d)
        auto q = linear(policy, gather(policy, normed, at_q), heavy_.to_q.weight);
        auto kv = linear(policy, normed, heavy_.to_kv.weight);  // (b, N, 2 · r · e)
        normed = {};
        if constexpr (config.rotary_emb) {
            rotary(policy, heads_of_q(q.view()), heads, heavy_.inv_freq, {at_q});
            rotary(policy, heads_of_kv(kv.view()), 1, heavy_.inv_freq, {});
        }
        saved.q = by_route(policy, std::move(q));
        saved.kv = by_route_with_room(policy, std::move(kv));
        const auto null = null_rows(policy);
        for (Index s = 0; s < of_.sequences(); ++s)
            assign(policy, null_row(saved.kv.data(), 1 + s), by_route_row(null).range(s % routes, 1));
        saved.logits = route_logits(policy, x, router_.routing_token, KVRouter::logit_scale);
        choose_keys(policy, saved);
        auto attended = tensor_like(policy, saved.q);  // (b, r · m · q, e)
        saved.log_sum_exp = {policy, {of_.sequences(), of_.windows, per_route * of_.queries}};
        each_part(of_.windows, [&](const Part& part) {
            gathered_attention_kernel(policy, part.queries(attended.data()), part.log_sum_exp(saved.log_sum_exp.data()),
                                      part.queries(std::as_const(saved.q).data()),
                                      rows_of_sequence(std::as_const(saved.kv).data(), 1 + part.sequence),
                                      part.keys(std::as_const(saved.keys.indices).data()),
                                      KeyMask(part.keys(std::as_const(saved.keys.mask).data())),
                                      part.keys(std::as_const(saved.keys.scores).data()));
        });
        saved.attended = by_token(policy, std::move(attended));  // (b, m · q, r · e)
        saved.out = linear(policy, saved.attended, heavy_.to_out.weight);
        return saved;
    }

    /// From d_out (b, m · q, d), the gradient of `out`. `owned` is `saved` if that may be freed, or null. Then parts of
    /// it are freed once they are read, and the gradient of keys and values takes their memory: that of one sequence
    /// and route goes to the rows before its own, which nobody reads any more.
    InputGradients backward(const P& policy, const Activations& saved, Activations* owned, Out d_out,
                            TokensView<const Scalar> x, MatrixView<const TokenIndex> at_q,
                            typename Heavy::Gradients& gradients) const {
        if (owned) owned->out = {};
        auto d_attended = by_route(policy, heavy_.to_out.backward(policy, d_out, saved.attended, gradients.to_out));
        d_out = {};
        TokensTensor<Scalar, P> of_routes;  // saved.attended, by route, if there are several
        if constexpr (routes > 1) {
            of_routes = by_route(policy, saved.attended.const_view());
            if (owned) owned->attended = {};
        }
        const auto& attended = routes > 1 ? std::as_const(of_routes) : saved.attended;

        auto d_q = tensor_like(policy, saved.q);
        const Scalar* const kv = saved.kv.data();
        auto d_by_route = owned ? std::move(owned->kv) : tensor_like(policy, saved.kv);  // (1 + b · r, N + 1, 2 · e)
        auto d_key_scores = tensor_like(policy, saved.keys.scores);                      // (b · r · m, 1, k + 1)
        Tensor<Logit, P, dynamic, dynamic, dynamic, dynamic> d_null(policy, {routes, 2, per_route, dim_head});
        set_zero(policy, d_null);
        each_part(of_.windows_at_once(), [&](const Part& part) {
            Tensor<Scalar, P, dynamic, dynamic, dynamic, dynamic, dynamic, dynamic> d_of_keys(policy,
                                                                                              part.keys_shape());
            const auto at = part.keys(saved.keys.indices.data());  // (count, 1, k + 1)
            gathered_attention_vjp_kernel(
                policy, part.queries(d_q.data()), d_of_keys.view(), part.keys(d_key_scores.data()),
                part.queries(std::as_const(d_attended).data()), part.queries(attended.data()),
                part.log_sum_exp(saved.log_sum_exp.data()), part.queries(saved.q.data()),
                rows_of_sequence(kv, 1 + part.sequence), at, KeyMask(part.keys(saved.keys.mask.data())),
                part.keys(saved.keys.scores.data()));
            null_key_gradient(policy, d_null.view()[part.sequence % routes], d_of_keys);
            auto d = of_sequence(d_by_route.data(), part.sequence);
            if (part.first % of_.windows == 0) set_zero(policy, d);
            gather_vjp(policy, d, d_of_keys.const_view().reshape(std::array{Index{1}, at.size(), 2 * width}),
                       at.reshape(std::array{Index{1}, at.size()}));
        });
        if (owned) {
            owned->q = {};
            owned->attended = {};
        }
        d_attended = {};
        of_routes = {};
        InputGradients d{{}, logit_gradients(policy, saved, d_key_scores)};

        const auto d_null_kv = swap_first_axes(policy, d_null.view().reshape(std::array{routes, Index{2}, width}));
        assign(policy, gradients.null_kv, gradients.null_kv + d_null_kv.view().reshape(gradients.null_kv.shape()));
        auto d_kv = by_token_without_null(policy, std::move(d_by_route));  // (b, N, 2 · r · e)
        d_q = by_token(policy, std::move(d_q));
        if constexpr (config.rotary_emb) {
            rotary_vjp(policy, heads_of_q(d_q.view()), heads, heavy_.inv_freq, {at_q});
            rotary_vjp(policy, heads_of_kv(d_kv.view()), 1, heavy_.inv_freq, {});
        }
        d.d_x = tensor_like(policy, x);
        const auto normed = heavy_.norm(policy, x);
        auto d_normed = heavy_.to_kv.backward(policy, d_kv, normed, gradients.to_kv);
        d_kv = {};
        gather_vjp(policy, d_normed.view(),
                   heavy_.to_q.backward(policy, d_q, gather(policy, normed, at_q), gradients.to_q), at_q);
        d_q = {};
        heavy_.norm.backward(policy, d.d_x.view(), d_normed, x, gradients.norm);
        return d;
    }

private:
    static constexpr Index routes = config.num_routed_kv, heads = config.heavy_heads, dim_head = config.heavy_dim_head,
                           inner = heads * dim_head, per_route = heads / routes, width = per_route * dim_head;

    /// Indices, scores and mask of the keys of all windows, from the logits.
    void choose_keys(const P& policy, Activations& saved) const {
        const Index all_windows = of_.sequences() * of_.windows;
        const std::array<Index, 3> of_keys{all_windows, 1, of_.keys + 1};
        saved.indices = {policy, {all_windows, 1, of_.keys}};
        saved.keys = {{policy, of_keys}, {policy, of_keys}, {policy, of_keys}};
        each_routed(policy, saved.logits, [&](const auto& prefixes, Index first, Index count) {
            const auto picks = rows_of(saved.indices.data(), first, count, of_.keys);
            top_k_kernel(policy, picks, prefixes.logits.const_view(), Mask(prefixes.mask.const_view()));
            const auto scores =
                KVRouter::scores_of(policy, prefixes.logits, picks, prefixes.mask.const_view(), of_.keys);
            const auto part = [&](auto& all) { return rows_of(all.data(), first, count, of_.keys + 1); };
            window_keys_kernel(policy, part(saved.keys.indices), part(saved.keys.scores), part(saved.keys.mask),
                               TokensView<const TokenIndex>(picks), scores.const_view(), of_.windows, window, first,
                               of_.padded());
        });
    }
    /// The gradient of the logits (b, r, N) from that of the scores of keys (b · r · m, 1, k + 1).
    auto logit_gradients(const P& policy, const Activations& saved, const TokensTensor<Logit, P>& d_key_scores) const {
        auto d_logits = tensor_like(policy, saved.logits);
        set_zero(policy, d_logits);
        each_routed(policy, saved.logits, [&](const auto& prefixes, Index first, Index count) {
            const auto d_scores =
                window_keys_vjp<P, Logit>(policy, rows_of(d_key_scores.data(), first, count, of_.keys + 1));
            const auto d_rows =
                KVRouter::d_logits_of(policy, prefixes.logits, rows_of(saved.indices.data(), first, count, of_.keys),
                                      d_scores.const_view(), prefixes.mask.const_view(), of_.keys);  // (count, 1, N)
            window_prefixes_vjp(policy, d_logits.view().rows(), d_rows.const_view(), window, first);
        });
        return d_logits;
    }

    /// Rows [first, first + count) of a tensor as (count, 1, columns).
    template <typename T>
    static TokensView<T> rows_of(T* all, Index first, Index count, Index columns) {
        return TokensView<T>::unchecked(all + first * columns, {count, 1, columns});
    }
    /// Calls f(prefixes, first, count) for all windows, as many at a time as have logits of 16 MiB in float.
    template <typename F>
    void each_routed(const P& policy, const TokensTensor<Logit, P>& logits, const F& f) const {
        const Index at_once = std::max((Index{1} << 22) / of_.padded(), Index{1}), all = of_.sequences() * of_.windows;
        for (Index first = 0; first < all; first += at_once) {
            const Index count = std::min(at_once, all - first);
            f(window_prefixes(policy, logits.const_view().reshape(std::array{of_.sequences(), of_.padded()}), window,
                              first, count),
              first, count);
        }
    }

    /// Some windows of one sequence and route: their parts of the tensors of a call.
    struct Part {
        Index sequence, first, count;  // the first window among all, and how many
        Sizes of;

        /// Queries or outputs (count, q, h / r, dim_head) of a tensor (b, r · m · q, e).
        template <typename T>
        View<T, dynamic, dynamic, dynamic, dynamic> queries(T* all) const {
            return View<T, dynamic, dynamic, dynamic, dynamic>::unchecked(all + first * of.queries * width,
                                                                          {count, of.queries, per_route, dim_head});
        }
        template <typename T>
        TokensView<T> log_sum_exp(T* all) const {  // (count, h / r, q)
            return TokensView<T>::unchecked(all + first * per_route * of.queries, {count, per_route, of.queries});
        }
        /// The rows of these windows in a tensor with a number for each key (count, 1, k + 1).
        template <typename T>
        TokensView<T> keys(T* all) const {
            return rows_of(all, first, count, of.keys + 1);
        }
        auto keys_shape() const { return std::array<Index, 6>{count, 1, of.keys + 1, per_route, 2, dim_head}; }
    };
    /// Calls f(Part) for all windows, up to at_once of them in one part.
    template <typename F>
    void each_part(Index at_once, const F& f) const {
        for (Index s = 0; s < of_.sequences(); ++s)
            for (Index first = 0; first < of_.windows; first += at_once)
                f(Part{s, s * of_.windows + first, std::min(at_once, of_.windows - first), of_});
    }

    /// The null key and value of each head, in the layout of kv: (1, h, 2, dim_head)
    auto null_rows(const P& policy) const {
        return swap_middle_axes(policy,
                                heavy_.null_kv.const_view().reshape(std::array<Index, 4>{1, 2, heads, dim_head}));
    }
    template <typename T>
    static auto by_route_row(T& null) {  // (r, 2 · e)
        return null.view().reshape(std::array<Index, 2>{routes, 2 * width});
    }
    /// Keys and values of all tokens of a sequence and route, and of its null key, in a tensor of such rows:
    /// (1, N + 1, 2 · e)
    template <typename T>
    TokensView<T> of_sequence(T* kv, Index sequence) const {
        const Index rows = of_.padded() + 1;
        return TokensView<T>::unchecked(kv + sequence * rows * 2 * width, {1, rows, 2 * width});
    }
    /// The same as (N + 1, h / r, 2, dim_head)
    View<const Scalar, dynamic, dynamic, dynamic, dynamic> rows_of_sequence(const Scalar* kv, Index sequence) const {
        return of_sequence(kv, sequence).reshape(std::array<Index, 4>{of_.padded() + 1, per_route, 2, dim_head});
    }
    template <typename T>
    MatrixView<T> null_row(T* kv, Index sequence) const {  // (1, 2 · e)
        return of_sequence(kv, sequence)[0].range(of_.padded(), 1);
    }
    /// kv (b, N, 2 · r · e) sorted by route, with free rows at the front and one at the end of each sequence:
    /// (1 + b · r, N + 1, 2 · e)
    TokensTensor<Scalar, P> by_route_with_room(const P& policy, TokensTensor<Scalar, P> kv) const {
        const Index rows = of_.padded() + 1;
        TokensTensor<Scalar, P> padded;  // (b, N + 1, 2 · r · e), if there are several routes
        const auto pad = [&](TokensView<Scalar> to) {
            pad_sequences(policy, to, TokensView<const Scalar>(kv.const_view()), of_.padded());
            kv = {};
        };
        if constexpr (routes > 1) {
            padded = {policy, {of_.batch, rows, 2 * inner}};
            pad(padded.view());
        }
        TokensTensor<Scalar, P> sorted(policy, {1 + of_.sequences(), rows, 2 * width});
        const auto behind = sorted.view().range(1, of_.sequences());
        if constexpr (routes > 1)
            swap_first_axes_kernel(policy, of_all(behind.data(), routes, rows),
                                   of_all(std::as_const(padded).data(), rows, routes));
        else
            pad(behind);
        return sorted;
    }
    /// The inverse: the first b · r of these rows as (b, N, 2 · r · e).
    TokensTensor<Scalar, P> by_token_without_null(const P& policy, TokensTensor<Scalar, P> d_by_route) const {
        const Index rows = of_.padded() + 1;
        TokensTensor<Scalar, P> padded = std::move(d_by_route);
        if constexpr (routes > 1) {
            TokensTensor<Scalar, P> of_tokens(policy, {of_.batch, rows, 2 * inner});
            swap_first_axes_kernel(policy, of_all(of_tokens.data(), rows, routes),
                                   of_all(std::as_const(padded).data(), routes, rows));
            padded = std::move(of_tokens);
        }
        TokensTensor<Scalar, P> d_kv(policy, {of_.batch, of_.padded(), 2 * inner});
        for (Index b = 0; b < of_.batch; ++b)
            assign(
                policy, d_kv.view()[b],
                MatrixView<const Scalar>::unchecked(padded.data() + b * rows * 2 * inner, {of_.padded(), 2 * inner}));
        return d_kv;
    }
    template <typename T>
    View<T, dynamic, dynamic, dynamic, dynamic> of_all(T* kv, Index rows, Index columns) const {
        return View<T, dynamic, dynamic, dynamic, dynamic>::unchecked(kv, {of_.batch, rows, columns, 2 * width});
    }

    /// Rows (b, n, r · e) as (b, r · n, e), sorted by route, and back.
    static TokensTensor<Scalar, P> by_route(const P& policy, TokensView<const Scalar> x) {
        const auto [batch, length, all] = x.shape();
        return swapped(policy, x, length, routes, {batch, routes * length, all / routes});
    }
    static TokensTensor<Scalar, P> by_route(const P& policy, TokensTensor<Scalar, P> x) {
        if constexpr (routes == 1)
            return x;
        else
            return by_route(policy, std::as_const(x).view());
    }
    static TokensTensor<Scalar, P> by_token(const P& policy, TokensTensor<Scalar, P> x) {
        const auto [batch, rows, each] = x.shape();
        if constexpr (routes == 1)
            return x;
        else
            return swapped(policy, std::as_const(x).view(), routes, rows / routes,
                           {batch, rows / routes, routes * each});
    }
    /// x seen as (b, rows, columns, e), with these two axes swapped, in this shape.
    static TokensTensor<Scalar, P> swapped(const P& policy, TokensView<const Scalar> x, Index rows, Index columns,
                                           const std::array<Index, 3>& shape) {
        const Index batch = x.extent(0), each = shape[2] * shape[1] / (rows * columns);
        TokensTensor<Scalar, P> y(policy, shape);
        swap_first_axes_kernel(policy, y.view().reshape(std::array{batch, columns, rows, each}),
                               x.reshape(std::array{batch, rows, columns, each}));
        return y;
    }
    static auto heads_of_q(TokensView<Scalar> q) {  // (b, m · q, 1, h, dim_head)
        return q.reshape(std::array<Index, 5>{q.extent(0), q.extent(1), 1, heads, dim_head});
    }
    static auto heads_of_kv(TokensView<Scalar> kv) {  // (b, N, h, 2, dim_head)
        return kv.reshape(std::array<Index, 5>{kv.extent(0), kv.extent(1), heads, 2, dim_head});
    }

    const Heavy& heavy_;
    const KVRouter& router_;
    Sizes of_;
};

}  // namespace colt5
