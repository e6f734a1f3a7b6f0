// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include <colt5/cpu/local_attention.hpp>
#include <colt5/cpu/projected_local_attention.hpp>

#include "support/tensors.hpp"

using namespace colt5;
using namespace support;

namespace {

template <typename T>
struct Case {
    /// Ragged masks: the last sequence ends early, and tokens are missing at random.
    Case(const Cpu& policy, Index batch, Index length, Index heads, Index dim_head, bool masked)
        : qkv(normal<T>(policy, std::array{batch, length, Index{3}, heads, dim_head}, 20)),
          d_out(normal<T>(policy, std::array{batch, length, heads, dim_head}, 21)) {
        if (!masked) return;
        mask_tensor = random_mask(policy, std::array{batch, length}, 22);
        for (Index i = length - length / 3; i < length; ++i) mask_tensor.view()(batch - 1, i) = false;
        mask = mask_tensor;
    }
    HostTensor<T, 5> qkv;
    HostTensor<T, 4> d_out;
    MatrixTensor<bool, Cpu> mask_tensor;
    Mask mask;
};

/// Part of the packed queries, keys and values: [first, first + count) of the third axis.
template <typename QKV>
auto columns(const Cpu& policy, const QKV& qkv, Index first, Index count) {
    using T = typename QKV::value_type;
    const auto [batch, length, three, heads, dim] = qkv.shape();
    HostTensor<T, 5> out(policy, {batch, length, count, heads, dim});
    const auto from = qkv.const_view();
    const Index row = heads * dim;
    for (Index i = 0; i < batch * length; ++i)
        std::copy_n(from.data() + (i * 3 + first) * row, count * row, out.data() + i * count * row);
    return out;
}
template <typename T>
struct Split {
    template <typename QKV>
    Split(const Cpu& policy, const QKV& qkv)
        : queries(columns(policy, qkv, 0, 1)),
          q(queries.const_view().reshape(std::array{qkv.extent(0), qkv.extent(1), qkv.extent(3), qkv.extent(4)})),
          kv(columns(policy, qkv, 1, 2)) {}
    HostTensor<T, 5> queries;
    View<const T, dynamic, dynamic, dynamic, dynamic> q;
    HostTensor<T, 5> kv;
};
template <typename QKV>
auto attend(const Cpu& policy, const LocalAttention& attention, const QKV& qkv, Mask mask) {
    const Split<typename QKV::value_type> s(policy, qkv);
    return local_attention(policy, attention, s.q, s.kv, mask);
}
template <typename QKV>
auto forward(const Cpu& policy, const LocalAttention& attention, const QKV& qkv, Mask mask) {
    const Split<typename QKV::value_type> s(policy, qkv);
    return local_attention_forward(policy, attention, s.q, s.kv, mask);
}
template <typename T, typename D, typename QKV>
auto vjp(const Cpu& policy, const LocalAttention& attention, const LocalAttentionActivations<T, Cpu>& saved,
         const D& d_out, const QKV& qkv, Mask mask) {
    const Split<T> s(policy, qkv);
    return local_attention_vjp(policy, attention, saved, d_out, s.q, s.kv, mask);
}

/// What one head of one sequence computes: scores of every pair, and the mean that window_mean gives to row i, summed
/// slot by slot over the three windows, as the reference's padded tensors would.
HostTensor<double, 4> naive(const Cpu& policy, const LocalAttention& attention, const Case<double>& c) {
    auto out = filled<double>(policy, c.d_out.shape(), 0);
    const auto [batch, length, heads, dim] = out.shape();
    const Index reach = attention.reach;
    for (Index b = 0; b < batch; ++b)
        for (Index h = 0; h < heads; ++h)
            for (Index i = 0; i < length; ++i) {
                double largest = -1e300, sum = 0;
                std::vector<double> score(static_cast<std::size_t>(length), -1e300);
                for (Index j = std::max(Index{0}, i - reach);
                     j <= std::min(length - 1, attention.causal ? i : i + reach); ++j) {
                    if (c.mask && !c.mask(b, j)) continue;
                    double& s = score[static_cast<std::size_t>(j)] = 0;
                    for (Index e = 0; e < dim; ++e) s += c.qkv.view()(b, i, 0, h, e) * c.qkv.view()(b, j, 1, h, e);
                    s /= std::sqrt(static_cast<double>(dim));
                    largest = std::max(largest, s);
                }
                if (largest > -1e300) {
                    for (const double s : score) sum += s > -1e300 ? std::exp(s - largest) : 0;
                    for (Index j = 0; j < length; ++j) {
                        const double s = score[static_cast<std::size_t>(j)];
                        if (s == -1e300) continue;
                        for (Index e = 0; e < dim; ++e)
                            out.view()(b, i, h, e) += std::exp(s - largest) / sum * c.qkv.view()(b, j, 2, h, e);
                    }
                } else if (attention.masked_rows == MaskedRows::window_mean) {
                    const Index windows = (length + reach - 1) / reach;
                    for (Index window = i / reach - 1; window <= i / reach + 1; ++window)
                        for (Index j = window * reach; j < (window + 1) * reach; ++j)
                            for (Index e = 0; e < dim; ++e) {
                                const bool beyond = window < 0 || window >= windows;
                                const double v = beyond ? -1 : j < length ? c.qkv.view()(b, j, 2, h, e) : 0;
                                out.view()(b, i, h, e) += v / static_cast<double>(3 * reach);
                            }
                }
            }
    return out;
}

struct Problem {
    Index batch, length, heads, dim_head, reach;
};
// Lengths around the tiles of 32 queries and the segments of 512; rows of one batch, of several and of parts; reaches
// below, at and above the length, and so wide that a tile of queries sees more than one block of 512 keys.
constexpr Problem problems[] = {{1, 1, 1, 1, 1},    {2, 5, 2, 3, 1},      {2, 7, 1, 4, 7},   {1, 9, 1, 5, 100},
                                {2, 64, 1, 8, 3},   {1, 65, 2, 16, 64},   {2, 63, 1, 7, 20}, {1, 130, 1, 4, 13},
                                {1, 400, 2, 3, 99}, {1, 900, 1, 33, 300}, {2, 0, 1, 4, 3},   {0, 5, 1, 4, 3}};

std::string describe(const Problem& p) {
    return shape_string(std::array{p.batch, p.length, p.heads, p.dim_head}) + " reach " + std::to_string(p.reach);
}

struct Kind {
    const char* name;
    MaskedRows masked_rows = MaskedRows::zero;
    bool causal = false;

    LocalAttention operator()(Index reach) const {
        return {.reach = reach, .masked_rows = masked_rows, .causal = causal};
    }
};
constexpr Kind kinds[] = {{.name = "zero"},
                          {.name = "window_mean", .masked_rows = MaskedRows::window_mean},
                          {.name = "causal", .causal = true}};

}  // namespace

TEST_CASE("local_attention: agrees with a loop over all pairs, in double and float") {
    const Cpu policy(2);
    for (const Problem& p : problems)
        for (const bool masked : {false, true})
            for (const Kind kind : kinds) {
                CAPTURE(describe(p));
                CAPTURE(masked);
                CAPTURE(kind.name);
                if (masked && p.batch == 0) continue;
                const LocalAttention attention = kind(p.reach);
                const Case<double> c(policy, p.batch, p.length, p.heads, p.dim_head, masked);
                const Case<float> f(policy, p.batch, p.length, p.heads, p.dim_head, masked);
                const auto expected = naive(policy, attention, c);
                const auto saved = forward(policy, attention, c.qkv, c.mask);
                CHECK(relative_error(saved.out, expected) <= 1e-13);
                CHECK(same_bits(attend(policy, attention, c.qkv, c.mask), saved.out));
                CHECK(relative_error(attend(policy, attention, f.qkv, f.mask), expected) <= 2e-6);
            }
}

TEST_CASE("local_attention: the widest reach sees all, a wider one is refused") {
    const Cpu policy(1);
    const Case<double> c(policy, 2, 40, 2, 4, true);
    const auto all = forward(policy, LocalAttention{40}, c.qkv, c.mask);
    for (const Kind kind : kinds) {
        const LocalAttention widest = kind(LocalAttention::most_reach);
        const auto saved = forward(policy, widest, c.qkv, c.mask);
        const auto d_qkv = vjp(policy, widest, saved, c.d_out, c.qkv, c.mask);
        for (const double d : to_host(policy, d_qkv)) CHECK(std::isfinite(d));
        if (kind.masked_rows == MaskedRows::zero && !kind.causal) CHECK(same_bits(saved.out, all.out));
    }
    CHECK_THROWS_WITH_AS(attend(policy, LocalAttention{std::numeric_limits<Index>::max()}, c.qkv, c.mask),
                         "colt5: `reach` must be at most 2^31, but is 9223372036854775807", ValueError);
}

TEST_CASE("local_attention: every reach from 1 to 100") {
    const Cpu policy(1);
    const Case<double> c(policy, 1, 97, 1, 3, true);
    for (Index reach = 1; reach <= 100; ++reach)
        for (const Kind kind : kinds) {
            CAPTURE(reach);
            const LocalAttention attention = kind(reach);
            CHECK(relative_error(attend(policy, attention, c.qkv, c.mask), naive(policy, attention, c)) <= 1e-13);
        }
}

TEST_CASE("local_attention: the log-sum-exp of each row, -infinity where no key is visible") {
    const Cpu policy(1);
    const Case<double> c(policy, 1, 70, 1, 2, true);
    const auto saved = forward(policy, LocalAttention{2}, c.qkv, c.mask);
    int without_key = 0;
    for (Index i = 0; i < 70; ++i) {
        double sum = 0;
        for (Index j = std::max(Index{0}, i - 2); j <= std::min(Index{69}, i + 2); ++j)
            if (c.mask(0, j)) {
                const auto q = c.qkv.view()[0][i], k = c.qkv.view()[0][j];
                sum += std::exp((q(0, 0, 0) * k(1, 0, 0) + q(0, 0, 1) * k(1, 0, 1)) / std::sqrt(2.0));
            }
        const double log_sum_exp = saved.log_sum_exp.view()(0, 0, i);
        if (sum > 0)
            CHECK(log_sum_exp == doctest::Approx(std::log(sum)).epsilon(1e-12));
        else
            CHECK(log_sum_exp == -std::numeric_limits<double>::infinity());
        without_key += sum > 0 ? 0 : 1;
    }
    CHECK(without_key > 10);
}

TEST_CASE("local_attention: the gradient is that of finite differences" * not_sanitized) {
    const Cpu policy(1);
    for (const Problem& p : problems)
        for (const bool masked : {false, true})
            for (const Kind kind : kinds) {
                CAPTURE(describe(p));
                CAPTURE(masked);
                CAPTURE(kind.name);
                if (masked && p.batch == 0) continue;
                const LocalAttention attention = kind(p.reach);
                Case<double> c(policy, p.batch, p.length, p.heads, p.dim_head, masked);
                const auto saved = forward(policy, attention, c.qkv, c.mask);
                const auto d_qkv = vjp(policy, attention, saved, c.d_out, c.qkv, c.mask);
                const auto loss = [&] { return inner(c.d_out, attend(policy, attention, c.qkv, c.mask)); };
                if (c.qkv.size() < 300)
                    CHECK(relative_error(d_qkv, finite_differences(policy, c.qkv, loss)) <= 1e-7);
                else
                    CHECK(directional_error(policy, c.qkv, d_qkv, loss) <= 1e-7);

                const Case<float> f(policy, p.batch, p.length, p.heads, p.dim_head, masked);
                const auto pass_f = forward(policy, attention, f.qkv, f.mask);
                CHECK(relative_error(vjp(policy, attention, pass_f, f.d_out, f.qkv, f.mask), d_qkv) <= 4e-6);
            }
}

TEST_CASE("local_attention: the gradient over several segments of both colours") {
    const Cpu policy(1);
    for (const auto& sizes : {std::array<Index, 2>{1024, 5}, {1025, 64}, {3333, 30}, {5000, 300}})
        for (const Kind kind : kinds) {
            const Index length = sizes[0], reach = sizes[1];
            CAPTURE(length);
            const LocalAttention attention = kind(reach);
            Case<double> c(policy, 1, length, 1, 2, true);
            // Padding across the border of two segments: window_mean reaches further back than attention does.
            for (Index i = 950; i < std::min(length, Index{1100}); ++i) c.mask_tensor.view()(0, i) = false;
            const auto saved = forward(policy, attention, c.qkv, c.mask);
            const auto d_qkv = vjp(policy, attention, saved, c.d_out, c.qkv, c.mask);
            const auto loss = [&] { return inner(c.d_out, attend(policy, attention, c.qkv, c.mask)); };
            CHECK(directional_error(policy, c.qkv, d_qkv, loss) <= 1e-7);
        }
}

TEST_CASE("local_attention: rows that see no key are zeros without a gradient") {
    const Cpu policy(1);
    for (const Index reach : {1, 70}) {
        Case<double> c(policy, 2, 150, 2, 3, true);
        std::fill_n(c.mask_tensor.data(), 150, false);  // the first sequence is padding only
        const LocalAttention attention{reach};
        const auto saved = forward(policy, attention, c.qkv, c.mask);
        const auto d_qkv = vjp(policy, attention, saved, c.d_out, c.qkv, c.mask);
        for (const double y : to_host(policy, sequence(saved.out, 0))) CHECK(y == 0);
        for (const double d : to_host(policy, sequence(d_qkv, 0))) CHECK(d == 0);
        for (Index j = 0; j < 150; ++j) {
            if (c.mask(1, j)) continue;
            for (const Index part : {1, 2})  // keys and values of padding
                for (Index h = 0; h < 2; ++h)
                    for (Index e = 0; e < 3; ++e) CHECK(d_qkv.view()(1, j, part, h, e) == 0);
        }
    }
}

TEST_CASE_TEMPLATE("local_attention: what padding holds changes no bit of a real token", T, float, double) {
    const Cpu policy(2);
    for (const Index reach : {1, 9, 64, 300})
        for (const Kind kind : kinds) {
            const LocalAttention attention = kind(reach);
            Case<T> c(policy, 2, 333, 2, 5, true);
            const auto d_padding_is_zero = [&] {  // padding's own outputs count for nothing
                for (Index b = 0; b < 2; ++b)
                    for (Index i = 0; i < 333; ++i)
                        if (!c.mask(b, i)) std::fill_n(c.d_out.view()[b][i].data(), 10, T(0));
            };
            d_padding_is_zero();
            const auto saved = forward(policy, attention, c.qkv, c.mask);
            const auto d_qkv = vjp(policy, attention, saved, c.d_out, c.qkv, c.mask);
            const auto noise = normal<T>(policy, c.qkv.shape(), 99, 1e4);
            for (Index b = 0; b < 2; ++b)
                for (Index i = 0; i < 333; ++i)
                    if (!c.mask(b, i)) std::copy_n(noise.view()[b][i].data(), 30, c.qkv.view()[b][i].data());
            const auto noisy = forward(policy, attention, c.qkv, c.mask);
            const auto noisy_d = vjp(policy, attention, noisy, c.d_out, c.qkv, c.mask);
            for (Index b = 0; b < 2; ++b)
                for (Index i = 0; i < 333; ++i) {
                    if (!c.mask(b, i)) continue;
                    CHECK(same_bits(noisy.out.view()[b][i], saved.out.view()[b][i]));
                    CHECK(same_bits(noisy_d.view()[b][i], d_qkv.view()[b][i]));
                }
        }
}

namespace {

/// Forward and backward, from what forward kept and computed again on the way.
template <typename T>
struct Gradients {
    Gradients(const Cpu& policy, const LocalAttention& attention, const Case<T>& c)
        : saved(forward(policy, attention, c.qkv, c.mask)),
          from_saved(vjp(policy, attention, saved, c.d_out, c.qkv, c.mask)),
          computed_again(tensor_like(policy, c.qkv)) {
        const auto [batch, length, heads, dim] = c.d_out.shape();
        const Index inner = heads * dim;
        auto identity = filled<T>(policy, std::array{inner, inner}, 0);
        auto d_weight = filled<T>(policy, std::array{inner, inner}, 0);
        for (Index e = 0; e < inner; ++e) identity.view()(e, e) = T(1);
        const Split<T> s(policy, c.qkv);
        projected_local_attention_vjp(policy, computed_again.view(), attention,
                                      c.d_out.const_view().reshape(std::array{batch, length, inner}), s.q, s.kv, c.mask,
                                      0, 0, identity, d_weight.view());
    }
    LocalAttentionActivations<T, Cpu> saved;
    HostTensor<T, 5> from_saved, computed_again;
};

/// Whether all entries of a row are NaN.
template <Viewable V>
bool all_nan(const V& row) {
    return std::all_of(row.data(), row.data() + row.size(), [](auto x) { return std::isnan(x); });
}

}  // namespace

TEST_CASE_TEMPLATE("local_attention: what is not finite reaches what sees it and nothing else", T, float, double) {
    const Cpu policy(1);
    enum { query, key, value, out_gradient };
    // One block of keys at once, or several; every position, or some in several segments.
    for (const auto& problem :
         {std::array<Index, 3>{1, 1, 1}, {70, 1, 1}, {131, 9, 1}, {150, 64, 7}, {1100, 5, 97}, {1300, 300, 173}}) {
        if (is_slow && problem[0] > 131) continue;  // they take minutes
        for (const bool masked : {false, true})
            for (const Kind kind : {kinds[0], kinds[2]})
                for (Index at = 0; at < problem[0]; at += std::max(problem[2], is_slow ? Index{5} : Index{1}))
                    for (const int part : {query, key, value, out_gradient}) {
                        const Index length = problem[0], reach = problem[1];
                        CAPTURE(length);
                        CAPTURE(reach);
                        CAPTURE(masked);
                        CAPTURE(kind.name);
                        CAPTURE(at);
                        CAPTURE(part);
                        const LocalAttention attention = kind(reach);
                        Case<T> c(policy, 1, length, 1, 3, masked);
                        T* const entries =
                            part == out_gradient ? &c.d_out.view()(0, at, 0, 0) : &c.qkv.view()(0, at, part, 0, 0);
                        std::fill_n(entries, 3, T(0));
                        const Gradients<T> expected(policy, attention, c);
                        const bool is_infinite = part != query && at % 2 == 1;  // logits of −∞ are legitimate
                        entries[at % 3] =
                            is_infinite ? -std::numeric_limits<T>::infinity() : std::numeric_limits<T>::quiet_NaN();
                        const Gradients<T> actual(policy, attention, c);
                        const auto sees = [&](Index i, Index j) {
                            return std::abs(i - j) <= reach && (i >= j || !attention.causal) &&
                                   (!c.mask || c.mask(0, j));
                        };
                        const bool of_keys = part == key || part == value;
                        const auto is_reached = [&](Index i) { return of_keys ? sees(i, at) : i == at; };
                        bool same = true, nan = true;
                        for (Index i = 0; i < length; ++i) {
                            bool sees_any = false, reached = false;  // by what this query sees, as a key by queries
                            for (Index j = std::max(Index{0}, i - reach); j <= std::min(length - 1, i + reach); ++j) {
                                sees_any = sees_any || sees(i, j);
                                reached = reached || (is_reached(j) && sees(j, i));
                            }
                            const auto check = [&](bool is_nan, const auto& a, const auto& e) {
                                if (is_nan)
                                    nan = nan && all_nan(a);
                                else
                                    same = same && same_bits(a, e);
                            };
                            const bool query_is_nan = is_reached(i) && sees_any;
                            check(query_is_nan && part != out_gradient, actual.saved.out.view()[0][i],
                                  expected.saved.out.view()[0][i]);
                            for (const auto gradients : {&Gradients<T>::from_saved, &Gradients<T>::computed_again}) {
                                const auto a = (actual.*gradients).view()[0][i], e = (expected.*gradients).view()[0][i];
                                check(query_is_nan, a[0], e[0]);
                                check(reached, a[1], e[1]);
                                check(reached, a[2], e[2]);
                            }
                        }
                        CHECK(same);
                        CHECK(nan);
                    }
    }
}

TEST_CASE_TEMPLATE("local_attention: NaN reaches a key that is seen even if its exponential is 0", T, float, double) {
    const Cpu policy(1);
    Case<T> c(policy, 1, 2, 1, 3, false);
    std::fill_n(c.qkv.view()[0][0][0].data(), 3, T(100));   // query 0
    std::fill_n(c.qkv.view()[0][0][1].data(), 3, T(0));     // key 0: score 0
    std::fill_n(c.qkv.view()[0][1][1].data(), 3, T(-100));  // key 1: its exponential underflows
    c.d_out.view()(0, 0, 0, 0) = std::numeric_limits<T>::quiet_NaN();
    const Gradients<T> d(policy, LocalAttention{1}, c);
    for (const auto& d_qkv : {d.from_saved.view(), d.computed_again.view()})
        for (Index key = 0; key < 2; ++key) {
            CHECK(all_nan(d_qkv[0][key][1]));
            CHECK(all_nan(d_qkv[0][key][2]));
        }
}

TEST_CASE_TEMPLATE("local_attention: what is not finite in masked tokens counts as zeros, in window_mean too", T, float,
                   double) {
    const Cpu policy(2);
    for (const Index reach : {1, 9, 64, 300})
        for (const Kind kind : kinds) {
            CAPTURE(reach);
            const LocalAttention attention = kind(reach);
            Case<T> c(policy, 2, 333, 2, 5, true);
            const auto fill_keys_and_values = [&](T value) {
                for (Index b = 0; b < 2; ++b)
                    for (Index i = 0; i < 333; ++i)
                        if (!c.mask(b, i)) std::fill_n(c.qkv.view()[b][i][1].data(), 20, value);
            };
            fill_keys_and_values(0);
            const Gradients<T> expected(policy, attention, c);
            for (const double poison :
                 {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity(),
                  -std::numeric_limits<double>::infinity()}) {
                if (is_slow && !std::isnan(poison)) continue;  // the same code
                fill_keys_and_values(static_cast<T>(poison));
                const Gradients<T> actual(policy, attention, c);
                CHECK(same_bits(actual.saved.out, expected.saved.out));
                CHECK(same_bits(actual.from_saved, expected.from_saved));
                CHECK(same_bits(actual.computed_again, expected.computed_again));
            }
            if (kind.masked_rows == MaskedRows::window_mean) continue;
            fill_keys_and_values(std::numeric_limits<T>::max());
            const Gradients<T> large(policy, attention, c);
            CHECK(same_bits(large.saved.out, expected.saved.out));
            CHECK(same_bits(large.from_saved, expected.from_saved));
            CHECK(same_bits(large.computed_again, expected.computed_again));
        }
}

TEST_CASE_TEMPLATE("local_attention: the logit of the only key that a query sees has no gradient", T, float, double) {
    const Cpu policy(1);
    for (const Index reach : {7, 300}) {
        Case<T> c(policy, 1, 700, 2, 19, true);
        for (Index i = 0; i < 700; ++i) c.mask_tensor.view()(0, i) = i % (2 * reach + 1) == 3;
        const Gradients<T> d(policy, LocalAttention{reach}, c);
        for (const auto& d_qkv : {d.from_saved.view(), d.computed_again.view()})
            for (Index i = 0; i < 700; ++i)
                for (Index e = 0; e < 2 * 2 * 19; ++e) CHECK(d_qkv[0][i].data()[e] == 0);  // queries and keys
    }
}

TEST_CASE("local_attention: with attends_to_padding, what it gives with zeros behind the sequence") {
    const Cpu policy(2);
    for (const Problem& p : problems) {
        CAPTURE(describe(p));
        const LocalAttention plain{p.reach}, attention{.reach = p.reach, .attends_to_padding = true};
        const Case<double> c(policy, p.batch, p.length, p.heads, p.dim_head, false);
        const Index length = (p.length + p.reach - 1) / p.reach * p.reach;
        Case<double> padded(policy, p.batch, length, p.heads, p.dim_head, false);
        fill(policy, padded.qkv, 0);
        fill(policy, padded.d_out, 0);
        for (Index b = 0; b < p.batch; ++b) {
            const auto qkv = c.qkv.const_view()[b];
            const auto d_out = c.d_out.const_view()[b];
            std::copy_n(qkv.data(), qkv.size(), padded.qkv.view()[b].data());
            std::copy_n(d_out.data(), d_out.size(), padded.d_out.view()[b].data());
        }
        const auto saved = forward(policy, attention, c.qkv, {}), expected = forward(policy, plain, padded.qkv, {});
        const auto d = vjp(policy, attention, saved, c.d_out, c.qkv, {}),
                   expected_d = vjp(policy, plain, expected, padded.d_out, padded.qkv, {});
        CHECK(same_bits(attend(policy, attention, c.qkv, {}), saved.out));
        for (Index b = 0; b < p.batch; ++b) {
            const auto error = [&](const auto& a, const auto& e) {
                return relative_error(VectorView<const double>(a[b].data(), {a[b].size()}),
                                      VectorView<const double>(e[b].data(), {a[b].size()}));
            };
            CHECK(error(saved.out.const_view(), expected.out.const_view()) <= 1e-13);
            CHECK(error(d.const_view(), expected_d.const_view()) <= 1e-12);
        }
        if (p.batch == 0) continue;  // the mask of the last sequence
        // With a mask, as without the option.
        const Case<double> masked(policy, p.batch, p.length, p.heads, p.dim_head, true);
        CHECK(same_bits(attend(policy, attention, masked.qkv, masked.mask),
                        attend(policy, plain, masked.qkv, masked.mask)));
    }
}

/// Tokens [first, first + count) of a batch of one.
template <Viewable V>
auto tokens(const V& tensor, Index first, Index count) {
    auto shape = tensor.shape();
    const Index stride = tensor.const_view().size() / shape[1];
    shape[1] = count;
    return decltype(tensor.const_view())(tensor.const_view().data() + first * stride, shape);
}

TEST_CASE_TEMPLATE("local_attention: causal outputs do not depend on what comes after them", T, float, double) {
    const Cpu policy(2);
    for (const Index reach : {1, 40, 700})
        for (const bool masked : {false, true}) {
            CAPTURE(reach);
            CAPTURE(masked);
            const LocalAttention attention{.reach = reach, .causal = true};
            Case<T> c(policy, 2, 1111, 2, 5, masked);
            const auto saved = forward(policy, attention, c.qkv, c.mask);
            for (const Index future : {1, 33, 600, 1110}) {
                if (is_slow && future != 33 && future != 600) continue;  // the same code
                const auto noise = normal<T>(policy, c.qkv.shape(), 99, 1e4);
                for (Index b = 0; b < 2; ++b)
                    std::copy_n(noise.view()[b][future].data(), (1111 - future) * 30, c.qkv.view()[b][future].data());
                c.qkv.view()(0, 1110, 1, 0, 0) = std::numeric_limits<T>::quiet_NaN();
                const auto changed = forward(policy, attention, c.qkv, c.mask);
                bool same = true;
                for (Index b = 0; b < 2; ++b)
                    for (Index i = 0; i < future; ++i)
                        same = same && same_bits(changed.out.view()[b][i], saved.out.view()[b][i]);
                CHECK(same);
                if (!masked) CHECK(!same_bits(changed.out.view()[0][future], saved.out.view()[0][future]));
                c.qkv = normal<T>(policy, c.qkv.shape(), 20);
            }
        }
}

TEST_CASE("local_attention: causal attention of a chunk reads no key after it") {
    const Cpu policy(2);
    for (const Index reach : {3, 64, 300}) {
        const LocalAttention attention{.reach = reach, .causal = true};
        Case<float> c(policy, 1, 900, 2, 5, false);
        Split<float> s(policy, c.qkv);
        const auto whole = local_attention(policy, attention, s.q, s.kv, {});
        std::fill_n(s.kv.view()[0][500].data(), 400 * 20, NAN);
        const auto part = local_attention(policy, attention, tokens(s.q, 160, 340), s.kv, {}, 160);
        CHECK(same_bits(part, tokens(whole, 160, 340)));
    }
    const Case<float> c(policy, 1, 4, 1, 2, true);
    CHECK_THROWS_WITH_AS(
        attend(policy, LocalAttention{.reach = 1, .masked_rows = MaskedRows::window_mean, .causal = true}, c.qkv, {}),
        "colt5: `masked_rows` must be MaskedRows::zero with causal, but is window_mean", ValueError);
}

TEST_CASE("local_attention: large logits do not overflow") {
    const Cpu policy(1);
    auto qkv = normal<float>(policy, std::array<Index, 5>{1, 300, 3, 1, 4}, 0, 300);  // logits of some 1e5
    const auto saved = forward(policy, LocalAttention{200}, qkv, {});
    const auto d_qkv = vjp(policy, LocalAttention{200}, saved, saved.out, qkv, {});
    CHECK(std::isfinite(inner(saved.out, saved.out)));
    CHECK(std::isfinite(inner(d_qkv, d_qkv)));
    CHECK(std::isfinite(inner(saved.log_sum_exp, saved.log_sum_exp)));
}

TEST_CASE("local_attention: the same bits with 1 and 2 threads, run to run, and for each sequence alone") {
    const Cpu one(1), two(2);
    for (const auto& [length, reach] : {std::array<Index, 2>{333, 70}, {2500, 17}})
        for (const Kind kind : kinds) {
            const LocalAttention attention = kind(reach);
            const Case<float> c(one, 2, length, 3, 5, true);
            const auto saved = forward(one, attention, c.qkv, c.mask);
            const auto d_qkv = vjp(one, attention, saved, c.d_out, c.qkv, c.mask);
            for (int run = 0; run < 2; ++run) {
                const auto pass2 = forward(two, attention, c.qkv, c.mask);
                CHECK(same_bits(pass2.out, saved.out));
                CHECK(same_bits(pass2.log_sum_exp, saved.log_sum_exp));
                CHECK(same_bits(vjp(two, attention, pass2, c.d_out, c.qkv, c.mask), d_qkv));
            }
            for (Index b = 0; b < 2; ++b) {
                const auto qkv = sequence(c.qkv, b);
                const auto mask = sequence(c.mask, b);
                const auto alone = forward(two, attention, qkv, mask);
                CHECK(same_bits(alone.out, sequence(saved.out, b)));
                CHECK(same_bits(vjp(two, attention, alone, sequence(c.d_out, b), qkv, mask), sequence(d_qkv, b)));
            }
        }
}

TEST_CASE("local_attention: a sequence in parts") {
    const Cpu policy(2);
    for (const auto& sizes : {std::array<Index, 3>{1, 1, 1},
                              {7, 2, 4},
                              {40, 3, 7},
                              {40, 9, 1},
                              {100, 20, 41},
                              {333, 16, 32},
                              {333, 64, 128},
                              {300, 500, 128},
                              {2500, 64, 1280},
                              {2500, 300, 640}})
        for (const bool masked : {false, true})
            for (const Kind kind : kinds) {
                const Index reach = sizes[1], part = sizes[2];
                const Index length = is_slow ? std::min(sizes[0], Index{1300}) : sizes[0];  // several segments still
                CAPTURE(length);
                CAPTURE(reach);
                CAPTURE(part);
                CAPTURE(masked);
                CAPTURE(kind.name);
                const LocalAttention attention = kind(reach);
                const Case<double> c(policy, 1, length, 2, 3, masked);
                const Split<double> s(policy, c.qkv);
                const auto whole = local_attention_forward(policy, attention, s.q, s.kv, c.mask);
                const auto d_whole = local_attention_vjp(policy, attention, whole, c.d_out, s.q, s.kv, c.mask);
                auto out = tensor_like(policy, whole.out);
                auto d_qkv = filled<double>(policy, c.qkv.shape(), NAN);         // what is not assigned stays NaN
                for (Index first = 0, end = 0; first < length; first += part) {  // end: of the window before
                    const Index count = std::min(part, length - first);
                    const auto q = tokens(s.q, first, count), d_out = tokens(c.d_out, first, count);
                    const auto saved = local_attention_forward(policy, attention, q, s.kv, c.mask, first);
                    CHECK(same_bits(local_attention(policy, attention, q, s.kv, c.mask, first), saved.out));
                    std::copy_n(saved.out.data(), saved.out.size(), &out.view()(0, first, 0, 0));
                    const Index begin = attention.window_begin(first);
                    auto shape = c.qkv.shape();
                    shape[1] = attention.window(first, count, length);
                    const View<double, dynamic, dynamic, dynamic, dynamic, dynamic> window(
                        &d_qkv.view()(0, begin, 0, 0, 0), shape);
                    local_attention_vjp(policy, window, attention, saved, d_out, q, s.kv, c.mask, first,
                                        std::max(Index{0}, end - begin));
                    end = begin + shape[1];
                }
                if (part % 32 == 0)
                    CHECK(same_bits(out, whole.out));
                else
                    CHECK(relative_error(out, whole.out) <= 1e-13);
                CHECK(relative_error(d_qkv, d_whole) <= 1e-13);
            }
}

TEST_CASE("local_attention_vjp: adds to the keys and values of the rows that are carried, and assigns the others") {
    const Cpu policy(2);
    const Index length = 700, first = 100;
    const Case<double> c(policy, 1, length, 2, 3, true);
    const Split<double> s(policy, c.qkv);
    auto identity = filled<double>(policy, std::array<Index, 2>{6, 6}, 0);
    for (Index e = 0; e < 6; ++e) identity.view()(e, e) = 1;
    for (const Kind kind : kinds)
        for (const Index count : {Index{520}, Index{0}}) {
            const auto q = tokens(s.q, first, count), d_out = tokens(c.d_out, first, count);
            const LocalAttention attention = kind(20);
            const auto saved = local_attention_forward(policy, attention, q, s.kv, c.mask, first);
            const Index before = first - attention.window_begin(first), window = attention.window(first, count, length);
            const std::array<Index, 5> shape{1, window, 3, 2, 3};
            // Whatever the distance to the queries: none, those within the halo and out of reach, some queries, all
            // rows.
            for (const Index carried : {Index{0}, Index{1}, before, before + 40, before + 519, window}) {
                if (carried > window) continue;
                CAPTURE(kind.name);
                CAPTURE(count);
                CAPTURE(carried);
                const auto run = [&](auto&& vjp) {
                    // Where nothing is carried there is NaN, which may not be read.
                    auto nothing = filled<double>(policy, shape, NAN), some = filled<double>(policy, shape, NAN);
                    for (Index j = 0; j < carried; ++j)
                        for (Index e = 0; e < 18; ++e) (&some.view()(0, j, 0, 0, 0))[e] = double(j + e);
                    vjp(nothing.view(), 0);
                    vjp(some.view(), carried);
                    double worst = 0;
                    for (Index j = 0; j < window; ++j)
                        for (Index e = 0; e < 18; ++e) {
                            const double assigned = (&nothing.view()(0, j, 0, 0, 0))[e];
                            const bool is_query = j >= before && j < before + count;
                            if (e < 6 && !is_query) continue;  // dq of other tokens is left alone
                            const double added = e >= 6 && j < carried ? double(j + e) : 0;
                            const double difference = std::abs((&some.view()(0, j, 0, 0, 0))[e] - (assigned + added));
                            worst = std::isnan(difference) ? INFINITY : std::max(worst, difference);
                        }
                    CHECK(worst <= 1e-11);
                };
                run([&](const auto& d_qkv, Index rows) {
                    local_attention_vjp(policy, d_qkv, attention, saved, d_out, q, s.kv, c.mask, first, rows);
                });
                run([&](const auto& d_qkv, Index rows) {
                    auto d_weight = filled<double>(policy, identity.shape(), 0);
                    projected_local_attention_vjp(policy, d_qkv, attention,
                                                  d_out.reshape(std::array<Index, 3>{1, count, 6}), q, s.kv, c.mask,
                                                  first, rows, identity, d_weight.view());
                });
            }
        }
}

TEST_CASE("local_attention: errors name the argument and both shapes") {
    const Cpu policy(1);
    const Case<float> c(policy, 2, 5, 2, 4, false), longer(policy, 2, 6, 2, 4, false);
    const Split<float> s(policy, c.qkv), longer_s(policy, longer.qkv);
    const LocalAttention attention{3};
    const auto mask = random_mask(policy, std::array<Index, 2>{2, 4}, 0);
    const auto wide = normal<float>(policy, std::array<Index, 4>{2, 5, 2, 5}, 0);
    CHECK_THROWS_WITH_AS(local_attention(policy, LocalAttention{0}, s.q, s.kv, {}),
                         "colt5: `reach` must be >= 1, but is 0", ValueError);
    CHECK_THROWS_WITH_AS(local_attention(policy, attention, s.q, c.qkv, {}),
                         "colt5: `kv` must have shape (any, any, 2, any, any), but has (2, 5, 3, 2, 4)", ShapeError);
    CHECK_THROWS_WITH_AS(local_attention(policy, attention, wide, s.kv, {}),
                         "colt5: `q` must have shape (2, 5, 2, 4), but has (2, 5, 2, 5)", ShapeError);
    CHECK_THROWS_WITH_AS(local_attention_forward(policy, attention, s.q, s.kv, Mask(mask)),
                         "colt5: `mask` must have shape (2, 5), but has (2, 4)", ShapeError);
    const auto saved = local_attention_forward(policy, attention, s.q, s.kv, {});
    CHECK_THROWS_WITH_AS(local_attention_vjp(policy, attention, saved, wide, s.q, s.kv, {}),
                         "colt5: `d_out` must have shape (2, 5, 2, 4), but has (2, 5, 2, 5)", ShapeError);
    CHECK_THROWS_WITH_AS(local_attention_vjp(policy, attention, saved, longer.d_out, longer_s.q, longer_s.kv, {}),
                         "colt5: `saved` must have shape (2, 6, 2, 4), but has (2, 5, 2, 4)", ShapeError);
    // Parts, of one sequence only.
    CHECK_THROWS_WITH_AS(local_attention(policy, attention, tokens(sequence(s.q, 0), 0, 2), s.kv, {}),
                         "colt5: `q` must have shape (2, 5, 2, 4), but has (1, 2, 2, 4)", ShapeError);
    const auto q = tokens(sequence(s.q, 0), 0, 3);
    const auto kv = sequence(s.kv, 0);
    CHECK_THROWS_WITH_AS(local_attention(policy, attention, q, kv, {}, 3),
                         "colt5: `q` must have shape (1, 2, 2, 4), but has (1, 3, 2, 4)", ShapeError);
    CHECK_THROWS_WITH_AS(local_attention(policy, attention, q, kv, {}, 6),
                         "colt5: `first` must be in [0, 5], the tokens of kv, but is 6", ValueError);
    const auto part = local_attention_forward(policy, LocalAttention{1}, q, kv, {}, 2);
    auto d_qkv = tensor_like(policy, c.qkv);
    CHECK_THROWS_WITH_AS(local_attention_vjp(policy, d_qkv.view(), LocalAttention{1}, part, q, q, kv, {}, 2, 0),
                         "colt5: `d_qkv` must have shape (1, 4, 3, 2, 4), but has (2, 5, 3, 2, 4)", ShapeError);
    auto d_window = normal<float>(policy, std::array<Index, 5>{1, 4, 3, 2, 4}, 0);
    for (const Index carried : {-1, 5})
        CHECK_THROWS_WITH_AS(
            local_attention_vjp(policy, d_window.view(), LocalAttention{1}, part, q, q, kv, {}, 2, carried),
            ("colt5: `carried` must be in [0, 4], the rows of d_qkv, but is " + std::to_string(carried)).c_str(),
            ValueError);
    const auto whole = local_attention_forward(policy, attention, s.q, s.kv, {});
    CHECK_THROWS_WITH_AS(local_attention_vjp(policy, d_qkv.view(), attention, whole, c.d_out, s.q, s.kv, {}, 0, 1),
                         "colt5: `carried` must be 0 unless there is one sequence, but is 1", ValueError);
}
