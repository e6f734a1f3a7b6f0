// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include <colt5/cpu/cumulative_softmax.hpp>
#include <colt5/cpu/top_k.hpp>

#include "support/tensors.hpp"

using namespace colt5;
using namespace support;

namespace {

template <typename T>
struct Case {
    Case(const Cpu& policy, Index batch, Index routes, Index length, Index k, bool masked, double deviation = 2)
        : logits(normal<T>(policy, std::array{batch, routes, length}, 40, deviation)) {
        if (masked) {
            mask_tensor = random_mask(policy, std::array{batch, length}, 41);
            if (batch > 1) std::fill_n(mask_tensor.data() + length, length, false);  // a sequence of padding only
            mask = mask_tensor;
        }
        indices = top_k(policy, logits, mask, k);
        d_scores = normal<T>(policy, indices.shape(), 42);
    }
    TokensTensor<T, Cpu> logits, d_scores;
    MatrixTensor<bool, Cpu> mask_tensor;
    Mask mask;
    TokensTensor<TokenIndex, Cpu> indices;
};

/// The reference's steps: sort ascending, exponentiate, divide by the running sum, keep the last k. The maximum that
/// is subtracted is a constant, that of `at`, also where finite differences move the logits.
auto naive(const Cpu& policy, double temperature, const Case<double>& c, const TokensTensor<double, Cpu>& at) {
    TokensTensor<double, Cpu> scores(policy, c.indices.shape());
    const auto [batch, routes, length] = c.logits.shape();
    const Index picks = c.indices.extent(2);
    for (Index b = 0; b < batch; ++b)
        for (Index r = 0; r < routes; ++r) {
            struct Entry {
                double logit, exponential;
            };
            std::vector<Entry> row;
            double largest = -std::numeric_limits<double>::infinity(), sum = 0;
            for (Index i = 0; i < length; ++i)
                if (!c.mask || c.mask(b, i)) largest = std::max(largest, at.view()(b, r, i));
            for (Index i = 0; i < length; ++i) {
                const double logit = c.logits.view()(b, r, i);
                if (!c.mask || c.mask(b, i)) row.push_back({logit, std::exp((logit - largest) / temperature)});
            }
            std::sort(row.begin(), row.end(), [](const Entry& x, const Entry& y) { return x.logit < y.logit; });
            for (Entry& entry : row) {
                sum += entry.exponential;
                entry.exponential /= std::max(sum, 1e-6);
            }
            for (Index i = 0; i < picks; ++i) {
                const auto rank = static_cast<Index>(row.size()) - 1 - i;
                scores.view()(b, r, i) = rank >= 0 ? row[static_cast<std::size_t>(rank)].exponential : 0;
            }
        }
    return scores;
}

constexpr std::array<std::array<Index, 4>, 7> shapes{
    // batch, routes, length, k
    {{1, 1, 1, 1}, {2, 2, 9, 4}, {2, 1, 33, 33}, {1, 3, 17, 100}, {2, 1, 600, 50}, {0, 1, 5, 2}, {2, 1, 0, 2}}};

}  // namespace

TEST_CASE("cumulative_softmax: agrees with sorting and running sums, in double and float") {
    const Cpu policy(2);
    for (const auto& shape : shapes)
        for (const bool masked : {false, true})
            for (const double temperature : {1.0, 0.4}) {
                CAPTURE(shape_string(shape));
                CAPTURE(masked);
                const auto [batch, routes, length, k] = shape;
                const Case<double> c(policy, batch, routes, length, k, masked);
                const Case<float> f(policy, batch, routes, length, k, masked);
                const auto expected = naive(policy, temperature, c, c.logits);
                CHECK(relative_error(cumulative_softmax(policy, temperature, c.logits, c.indices, c.mask), expected) <=
                      1e-13);
                CHECK(relative_error(cumulative_softmax(policy, temperature, f.logits, f.indices, f.mask), expected) <=
                      1e-5);
            }
}

TEST_CASE("cumulative_softmax: the gradient is that of finite differences") {
    const Cpu policy(1);
    for (const auto& shape : shapes)
        for (const bool masked : {false, true})
            for (const double deviation : {1.0, 9.0}) {  // 9: some running sums are below the floor
                CAPTURE(shape_string(shape));
                CAPTURE(masked);
                CAPTURE(deviation);
                const auto [batch, routes, length, k] = shape;
                if (length > 100) continue;
                Case<double> c(policy, batch, routes, length, k, masked, deviation);
                const auto d_logits = cumulative_softmax_vjp(policy, 0.7, c.d_scores, c.logits, c.indices, c.mask);
                const auto at = copy_of(policy, c.logits);
                const auto loss = [&] { return inner(c.d_scores, naive(policy, 0.7, c, at)); };
                const auto expected = finite_differences(policy, c.logits, loss);
                if (inner(expected, expected) > 1e-12)
                    CHECK(relative_error(d_logits, expected) <= 1e-6);
                else
                    CHECK(inner(d_logits, d_logits) <= 1e-12);
                const Case<float> f(policy, batch, routes, length, k, masked, deviation);
                const auto d_f = cumulative_softmax_vjp(policy, 0.7, f.d_scores, f.logits, f.indices, f.mask);
                if (inner(expected, expected) > 1e-12) CHECK(relative_error(d_f, d_logits) <= 2e-5);
            }
}

TEST_CASE("cumulative_softmax: what masked tokens hold, and the gradients of masked picks, change nothing") {
    const Cpu policy(1);
    Case<double> c(policy, 2, 2, 20, 18, true);
    const auto scores = cumulative_softmax(policy, 1, c.logits, c.indices, c.mask);
    const auto d_logits = cumulative_softmax_vjp(policy, 1, c.d_scores, c.logits, c.indices, c.mask);
    const double nan = std::numeric_limits<double>::quiet_NaN();
    for (Index b = 0; b < 2; ++b)
        for (Index r = 0; r < 2; ++r) {
            for (Index i = 0; i < 20; ++i)
                if (!c.mask(b, i)) {
                    CHECK(d_logits.view()(b, r, i) == 0);
                    c.logits.view()(b, r, i) = i % 2 == 0 ? nan : 1e30;
                }
            for (Index i = 0; i < 18; ++i)
                if (!c.mask(b, c.indices.view()(b, r, i))) {
                    CHECK(scores.view()(b, r, i) == 0);
                    c.d_scores.view()(b, r, i) = nan;
                }
        }
    CHECK(same_bits(cumulative_softmax(policy, 1, c.logits, c.indices, c.mask), scores));
    CHECK(to_host(policy, cumulative_softmax_vjp(policy, 1, c.d_scores, c.logits, c.indices, c.mask)) ==
          to_host(policy, d_logits));
}

TEST_CASE("cumulative_softmax: rows of infinities and rows with large logits never give NaN") {
    const Cpu policy(1);
    const double infinity = std::numeric_limits<double>::infinity();
    for (const auto& row : {std::vector<double>{-infinity, -infinity, -infinity},
                            {-infinity, 2, 3},
                            {1e300, -1e300, 0},
                            {1e4, 1e4 - 1, -1e4},
                            {infinity, 1e4, -infinity},
                            {infinity, 0, infinity},
                            {5, 5, 5}}) {
        const auto logits = from_host<TokensTensor<double, Cpu>>(policy, {1, 1, 3}, row);
        const auto indices = top_k(policy, logits, Mask{}, 2);
        const auto g = filled<double>(policy, indices.shape(), 1);
        for (const double score : to_host(policy, cumulative_softmax(policy, 1, logits, indices, {})))
            CHECK((score >= 0 && score <= 1));
        for (const double d : to_host(policy, cumulative_softmax_vjp(policy, 1, g, logits, indices, {})))
            CHECK(std::isfinite(d));
    }
}

TEST_CASE_TEMPLATE("cumulative_softmax: a NaN among the real logits makes its row NaN, wherever it stands", T, float,
                   double) {
    const Cpu policy(2);
    for (const bool masked : {false, true})
        for (const Index length : {1, 9, 600})
            for (const Index place : {Index{0}, Index{1}, length / 2, length - 1}) {
                if (place >= length) continue;
                CAPTURE(masked);
                CAPTURE(length);
                CAPTURE(place);
                Case<T> c(policy, 1, 2, length, 9, masked);
                if (masked) c.mask_tensor.data()[place] = true;
                c.logits.view()(0, 1, place) = std::numeric_limits<T>::quiet_NaN();
                const auto indices = top_k(policy, c.logits, c.mask, 9);
                const auto scores = cumulative_softmax(policy, 1, c.logits, indices, c.mask);
                const auto d = cumulative_softmax_vjp(policy, 1, c.d_scores, c.logits, indices, c.mask);
                const auto real = [&](Index i) { return !c.mask || c.mask(0, i); };
                for (Index i = 0; i < indices.extent(2); ++i) {
                    const T score = scores.view()(0, 1, i);
                    CHECK((real(indices.view()(0, 1, i)) ? std::isnan(score) : score == 0));
                    CHECK(std::isfinite(scores.view()(0, 0, i)));
                }
                for (Index i = 0; i < length; ++i) {
                    const T ds = d.view()(0, 1, i);
                    CHECK((real(i) ? std::isnan(ds) : ds == 0));
                    CHECK(std::isfinite(d.view()(0, 0, i)));
                }
            }
}

TEST_CASE("cumulative_softmax: the same bits with 1 and 2 threads, and for each sequence alone") {
    const Cpu one(1), two(2);
    const Case<float> c(one, 3, 2, 700, 60, true);
    const auto scores = cumulative_softmax(one, 0.7, c.logits, c.indices, c.mask);
    const auto d_logits = cumulative_softmax_vjp(one, 0.7, c.d_scores, c.logits, c.indices, c.mask);
    CHECK(same_bits(cumulative_softmax(two, 0.7, c.logits, c.indices, c.mask), scores));
    CHECK(same_bits(cumulative_softmax_vjp(two, 0.7, c.d_scores, c.logits, c.indices, c.mask), d_logits));
    for (Index b = 0; b < 3; ++b) {
        const auto logits = sequence(c.logits, b);
        const auto indices = sequence(c.indices, b);
        const auto mask = sequence(c.mask, b);
        CHECK(same_bits(cumulative_softmax(two, 0.7, logits, indices, mask), sequence(scores, b)));
        CHECK(same_bits(cumulative_softmax_vjp(two, 0.7, sequence(c.d_scores, b), logits, indices, mask),
                        sequence(d_logits, b)));
    }
}

TEST_CASE("cumulative_softmax: errors name the argument") {
    const Cpu policy(1);
    const Case<float> c(policy, 2, 1, 5, 3, false), narrow(policy, 2, 2, 4, 3, true);
    auto far = copy_of(policy, c.indices);
    far.data()[1] = 5;
    CHECK_THROWS_WITH_AS(cumulative_softmax(policy, 0, c.logits, c.indices, {}),
                         "colt5: `temperature` must be > 0, but is 0", ValueError);
    CHECK_THROWS_WITH_AS(cumulative_softmax(policy, 1e-40, c.logits, c.indices, {}),
                         "colt5: `temperature` must be in [1e-6, 1e6], but is 1e-40", ValueError);
    CHECK_THROWS_WITH_AS(cumulative_softmax_vjp(policy, 1e300, c.d_scores, c.logits, c.indices, {}),
                         "colt5: `temperature` must be in [1e-6, 1e6], but is 1e+300", ValueError);
    for (const double temperature : {smallest_divisor, largest_divisor}) {
        for (const float score : to_host(policy, cumulative_softmax(policy, temperature, c.logits, c.indices, {})))
            CHECK(std::isfinite(score));
        const auto d = cumulative_softmax_vjp(policy, temperature, c.d_scores, c.logits, c.indices, {});
        for (const float value : to_host(policy, d)) CHECK(std::isfinite(value));
    }
    CHECK_THROWS_WITH_AS(cumulative_softmax(policy, 1, c.logits, c.indices, narrow.mask),
                         "colt5: `mask` must have shape (2, 5), but has (2, 4)", ShapeError);
    CHECK_THROWS_WITH_AS(cumulative_softmax(policy, 1, c.logits, narrow.indices, {}),
                         "colt5: `indices` must have shape (2, 1, any), but has (2, 2, 3)", ShapeError);
    CHECK_THROWS_WITH_AS(cumulative_softmax(policy, 1, c.logits, far, {}),
                         "colt5: `indices` must be in [0, 5), but is 5", ValueError);
    CHECK_THROWS_WITH_AS(cumulative_softmax_vjp(policy, 1, c.logits, c.logits, c.indices, {}),
                         "colt5: `d_scores` must have shape (2, 1, 3), but has (2, 1, 5)", ShapeError);
    CHECK_THROWS_WITH_AS(cumulative_softmax_vjp(policy, 1, c.d_scores, c.logits, c.indices, narrow.mask),
                         "colt5: `mask` must have shape (2, 5), but has (2, 4)", ShapeError);
}
