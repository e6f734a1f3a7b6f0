// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include <colt5/cpu/coordinate_descent.hpp>

#include "support/tensors.hpp"

using namespace colt5;
using namespace support;

namespace {

using Row = std::vector<double>;
constexpr double infinity = std::numeric_limits<double>::infinity();

/// The reference's loop over a and b, on the real logits of one row.
Row naive_descent(const CoordinateDescent& descent, double k, const Row& s) {
    if (descent.limit_k) k = std::min(k, static_cast<double>(s.size()));
    double eps = std::max(descent.eps_init, descent.eps), a = 0;
    Row b(s.size()), y(s.size());
    for (std::size_t i = 0; i < s.size(); ++i)
        b[i] = descent.start == DescentStart::zero ? -std::max(s[i], 0.0) : -s[i];
    for (int t = 0; t < descent.n_iters; ++t) {
        double largest = -infinity, sum = 0;
        for (std::size_t i = 0; i < s.size(); ++i) largest = std::max(largest, (s[i] + b[i]) / eps);
        for (std::size_t i = 0; i < s.size(); ++i) sum += std::exp((s[i] + b[i]) / eps - largest);
        a = eps * std::log(k) - eps * (largest + std::log(sum));
        for (std::size_t i = 0; i < s.size(); ++i) b[i] = -std::max(s[i] + a, 0.0);
        eps = std::max(eps * descent.eps_decay, descent.eps);
    }
    for (std::size_t i = 0; i < s.size(); ++i) y[i] = std::exp((s[i] + a + b[i]) / eps);
    return y;
}

/// Finds the threshold at which the scores sum to k by bisection.
Row naive_solution(const CoordinateDescent& descent, double k, const Row& s) {
    if (k >= static_cast<double>(s.size())) return Row(s.size(), 1.0);
    const auto scores = [&](double threshold) {
        Row y;
        for (const double logit : s) y.push_back(std::exp(std::min(logit - threshold, 0.0) / descent.eps));
        return y;
    };
    double low = -1e3, high = 1e3;
    for (int i = 0; i < 90; ++i) {
        const double middle = (low + high) / 2;
        const Row y = scores(middle);
        (std::accumulate(y.begin(), y.end(), 0.0) > k ? low : high) = middle;
    }
    return scores(low);
}

Row naive_row(const CoordinateDescent& descent, double k, const Row& s) {
    if (s.empty()) return {};
    return descent.iterate_to_convergence ? naive_solution(descent, k, s) : naive_descent(descent, k, s);
}

template <typename T>
struct Case {
    Case(const Cpu& policy, Index batch, Index routes, Index length, double deviation, bool masked)
        : logits(normal<T>(policy, std::array{batch, routes, length}, 10, deviation)),
          d_scores(normal<T>(policy, std::array{batch, routes, length}, 11)) {
        if (masked) {
            mask_tensor = random_mask(policy, std::array{batch, length}, 12);
            if (batch > 1) std::fill_n(mask_tensor.data() + length, length, false);  // a sequence of padding only
            mask = mask_tensor;
        }
    }
    TokensTensor<T, Cpu> logits, d_scores;
    MatrixTensor<bool, Cpu> mask_tensor;
    Mask mask;
};

auto naive(const Cpu& policy, const CoordinateDescent& descent, double k, const Case<double>& c) {
    auto scores = filled<double>(policy, c.logits.shape(), 0);
    const auto [batch, routes, length] = scores.shape();
    for (Index b = 0; b < batch; ++b)
        for (Index r = 0; r < routes; ++r) {
            Row real;
            for (Index i = 0; i < length; ++i)
                if (!c.mask || c.mask(b, i)) real.push_back(c.logits.view()(b, r, i));
            const Row y = naive_row(descent, k, real);
            std::size_t next = 0;
            for (Index i = 0; i < length; ++i)
                if (!c.mask || c.mask(b, i)) scores.view()(b, r, i) = y[next++];
        }
    return scores;
}

/// A descent, k, the deviation of the logits and the length of a row.
struct Problem {
    CoordinateDescent descent;
    double k, deviation;
    Index length;
};

const std::vector<Problem>& problems() {
    constexpr auto zero = DescentStart::zero, minus_logits = DescentStart::minus_logits;
    static const std::vector<Problem> all{
        {{.n_iters = 50, .eps = 1, .start = zero}, 9, 1, 37},
        {{.n_iters = 50, .eps = 1, .start = zero}, 4.5, 6, 37},
        {{.n_iters = 50, .eps = 1, .start = minus_logits}, 9, 2, 37},
        {{.n_iters = 1, .eps = 1, .start = zero}, 3, 1, 16},
        {{.n_iters = 1, .eps = 0.5, .start = minus_logits}, 3, 1, 17},
        {{.n_iters = 2, .eps = 0.5, .start = minus_logits}, 3, 1, 17},
        {{.n_iters = 20, .eps = 0.03, .eps_init = 4, .eps_decay = 0.7, .start = minus_logits}, 5.625, 1, 33},
        {{.n_iters = 20, .eps = 0.1, .eps_init = 4, .eps_decay = 0.7, .start = zero}, 5.625, 1, 33},
        {{.n_iters = 7, .eps = 0.5, .eps_init = 0.1, .eps_decay = 0.7, .start = zero}, 2, 1, 9},
        // The second threshold is so far below the first that the exponential of their difference overflows.
        {{.n_iters = 4, .eps = 1, .eps_init = 1e4, .eps_decay = 1e-4, .start = zero}, 9, 3, 17},
        {{.n_iters = 4, .eps = 0.5, .eps_init = 1e4, .eps_decay = 1e-3, .start = minus_logits}, 9, 3, 17},
        {{.n_iters = 50, .eps = 1, .start = zero}, 40, 1, 20},          // k > n
        {{.n_iters = 10, .eps = 1, .start = minus_logits}, 40, 1, 20},  // k > n
        {{.n_iters = 50, .eps = 1, .start = zero, .limit_k = true}, 40, 1, 20},
        {{.n_iters = 10, .eps = 1, .start = minus_logits, .limit_k = true}, 15.5, 1, 20},
        {{.n_iters = 50, .eps = 1, .start = zero}, 0.8, 1, 1},
        {{.n_iters = 5, .eps = 1, .start = minus_logits}, 0.3, 1, 1},
        {{.eps = 1, .iterate_to_convergence = true}, 9, 1, 37},
        {{.eps = 0.1, .iterate_to_convergence = true}, 4.5, 3, 37},
        {{.eps = 0.1, .limit_k = true, .iterate_to_convergence = true}, 40, 3, 20},
        {{.eps = 0.1, .iterate_to_convergence = true}, 40, 3, 20},
    };
    return all;
}

std::string describe(const Problem& p) {
    std::ostringstream text;
    text << "n_iters " << p.descent.n_iters << " eps " << p.descent.eps << " eps_init " << p.descent.eps_init
         << " start " << static_cast<int>(p.descent.start) << " limit_k " << p.descent.limit_k << " converged "
         << p.descent.iterate_to_convergence << " k " << p.k << " n " << p.length;
    return text.str();
}

TokensTensor<double, Cpu> row_of(const Cpu& policy, const Row& logits) {
    return from_host<TokensTensor<double, Cpu>>(policy, {1, 1, static_cast<Index>(logits.size())}, logits);
}

}  // namespace

TEST_CASE("coordinate_descent: the scores are the reference's, in double and float") {
    const Cpu policy(2);
    for (const Problem& p : problems())
        for (const bool masked : {false, true}) {
            CAPTURE(describe(p));
            CAPTURE(masked);
            const Case<double> c(policy, 2, 2, p.length, p.deviation, masked);
            const Case<float> f(policy, 2, 2, p.length, p.deviation, masked);
            const auto expected = naive(policy, p.descent, p.k, c);
            CHECK(relative_error(coordinate_descent_forward(policy, p.descent, p.k, c.logits, c.mask).scores,
                                 expected) <= 1e-12);
            CHECK(relative_error(coordinate_descent_forward(policy, p.descent, p.k, f.logits, f.mask).scores,
                                 expected) <= 2e-6 / p.descent.eps);
        }
}

TEST_CASE("coordinate_descent: long rows, over several blocks of sums") {
    const Cpu policy(2);
    for (const Index length : {511, 512, 513, 3000}) {
        CAPTURE(length);
        const Case<double> c(policy, 1, 1, length, 3, true);
        for (const CoordinateDescent& descent :
             {CoordinateDescent{}, CoordinateDescent{.eps = 0.1, .iterate_to_convergence = true}}) {
            const auto expected = naive(policy, descent, 72.5, c);
            CHECK(relative_error(coordinate_descent_forward(policy, descent, 72.5, c.logits, c.mask).scores,
                                 expected) <= 1e-11);
        }
    }
}

TEST_CASE("coordinate_descent: the gradients are those of finite differences of the reference") {
    const Cpu policy(1);
    for (const Problem& p : problems())
        for (const bool masked : {false, true}) {
            CAPTURE(describe(p));
            CAPTURE(masked);
            Case<double> c(policy, 1, 2, p.length, p.deviation, masked);
            const auto saved = coordinate_descent_forward(policy, p.descent, p.k, c.logits, c.mask);
            const auto d = coordinate_descent_vjp(policy, p.descent, p.k, saved, c.d_scores, c.logits, c.mask);
            const double step = 1e-5 * p.descent.eps;
            const auto expected = finite_differences(
                policy, c.logits, [&] { return inner(c.d_scores, naive(policy, p.descent, p.k, c)); }, step);
            // Where every score is 1 the gradient is 0, on which differences of the loss leave their rounding.
            if (inner(expected, expected) > 1e-12)
                CHECK(relative_error(d.d_logits, expected) <= 1e-6);
            else
                CHECK(inner(d.d_logits, d.d_logits) <= 1e-12);

            auto d_k = tensor_like(policy, d.d_k);
            const auto above = naive(policy, p.descent, p.k + 1e-5, c), below = naive(policy, p.descent, p.k - 1e-5, c);
            for (Index row = 0; row < d_k.size(); ++row) {
                d_k.data()[row] = 0;
                for (Index i = row * p.length; i < (row + 1) * p.length; ++i)
                    d_k.data()[row] += c.d_scores.data()[i] * (above.data()[i] - below.data()[i]) / 2e-5;
            }
            for (Index row = 0; row < d_k.size(); ++row)
                CHECK(d.d_k.data()[row] == doctest::Approx(d_k.data()[row]).epsilon(1e-6));

            const Case<float> f(policy, 1, 2, p.length, p.deviation, masked);
            const auto pass_f = coordinate_descent_forward(policy, p.descent, p.k, f.logits, f.mask);
            const auto d_f = coordinate_descent_vjp(policy, p.descent, p.k, pass_f, f.d_scores, f.logits, f.mask);
            if (inner(expected, expected) > 1e-12)
                CHECK(relative_error(d_f.d_logits, d.d_logits) <= 2e-5 / p.descent.eps);
        }
}

TEST_CASE("coordinate_descent: saves the thresholds and the numbers of logits above them") {
    const Cpu policy(1);
    const Case<double> c(policy, 1, 1, 40, 2, true);
    for (const DescentStart start : {DescentStart::zero, DescentStart::minus_logits}) {
        const CoordinateDescent descent{.n_iters = 12, .eps = 0.2, .eps_init = 2, .eps_decay = 0.8, .start = start};
        const auto saved = coordinate_descent_forward(policy, descent, 5, c.logits, c.mask);
        const auto tau = to_host(policy, saved.threshold), count = to_host(policy, saved.saturated);
        REQUIRE(tau.size() == 13);
        REQUIRE(count.size() == 12);
        CHECK(tau[0] == (start == DescentStart::zero ? 0 : infinity));
        for (std::size_t t = 0; t < 12; ++t) {
            double above = 0, sum = 0;
            const double eps = descent.step_eps(static_cast<int>(t) + 1);
            for (Index i = 0; i < 40; ++i) {
                if (!c.mask(0, i)) continue;
                const double s = c.logits.data()[i];
                above += s > tau[t] ? 1 : 0;
                sum += std::isinf(tau[t]) ? 1 : std::exp(std::min(s, tau[t]) / eps);  // b = −s: s + b = 0
            }
            CHECK(count[t] == above);
            CHECK(tau[t + 1] == doctest::Approx(eps * std::log(sum / 5)).epsilon(1e-12));
        }
    }
}

TEST_CASE("coordinate_descent: stopping early changes no bit") {
    const Cpu policy(1);
    const Case<float> c(policy, 2, 1, 200, 1, true);
    const auto pass_of = [&](int n_iters) {
        return coordinate_descent_forward(policy, CoordinateDescent{.n_iters = n_iters}, 40, c.logits, c.mask);
    };
    const auto longest = pass_of(100);
    Index stops_at = 0;
    while (longest.threshold.view()(0, 0, stops_at) != longest.threshold.view()(0, 0, stops_at + 1)) ++stops_at;
    REQUIRE(stops_at < 90);
    for (const int n_iters : {1, 2, 3, static_cast<int>(stops_at), static_cast<int>(stops_at) + 1, 60}) {
        CAPTURE(n_iters);
        const auto saved = pass_of(n_iters);
        for (Index t = 0; t <= n_iters; ++t)
            CHECK(saved.threshold.view()(0, 0, t) == longest.threshold.view()(0, 0, t));
        for (Index t = 0; t < n_iters; ++t) CHECK(saved.saturated.view()(0, 0, t) == longest.saturated.view()(0, 0, t));
    }
    CHECK(same_bits(pass_of(60).scores, longest.scores));
    // An ε that only just decays is never "the same as in every later step", so nothing stops early.
    const CoordinateDescent unstopped{.n_iters = 100, .eps = 1, .eps_init = 1 + 1e-13, .eps_decay = 1 - 1e-16};
    REQUIRE(unstopped.step_eps(100) < unstopped.step_eps(1));
    const auto never = coordinate_descent_forward(policy, unstopped, 40, c.logits, c.mask);
    CHECK(same_bits(never.scores, longest.scores));
    CHECK(same_bits(never.threshold, longest.threshold));
    CHECK(same_bits(never.saturated, longest.saturated));
}

TEST_CASE("coordinate_descent: from minus the logits, stopping early changes no bit either") {
    const Cpu policy(1);
    const CoordinateDescent descent{.n_iters = 50, .eps = 1, .start = DescentStart::minus_logits};
    CoordinateDescent unstopped = descent;
    unstopped.eps_init = 1 + 1e-13;
    unstopped.eps_decay = 1 - 1e-16;
    for (const float last : {-15.0f, -9.0f, -8.0f, -7.0f, -6.0f}) {
        const auto logits = from_host<TokensTensor<float, Cpu>>(policy, {1, 1, 3}, std::vector{-10.0f, -9.75f, last});
        const auto saved = coordinate_descent_forward(policy, descent, 2, logits, {}),
                   never = coordinate_descent_forward(policy, unstopped, 2, logits, {});
        CHECK(same_bits(saved.scores, never.scores));
        CHECK(same_bits(saved.threshold, never.threshold));
        CHECK(same_bits(saved.saturated, never.saturated));
    }
}

TEST_CASE_TEMPLATE("coordinate_descent: a threshold that stands still goes on where epsilon still falls", T, float,
                   double) {
    const Cpu policy(1);
    // At ε = 2 these add up to k = 3 at the threshold 0, where the descent begins; at smaller ε they do not.
    const double half = -2 * std::log(2.0);
    const Row row{0, half, 0, half};
    const CoordinateDescent descent{.n_iters = 6, .eps = 0.25, .eps_init = 2, .eps_decay = 0.5};
    TokensTensor<T, Cpu> logits(policy, {1, 1, 4});
    for (Index i = 0; i < 4; ++i) logits.data()[i] = static_cast<T>(row[static_cast<std::size_t>(i)]);
    const auto saved = coordinate_descent_forward(policy, descent, 3, logits, {});
    REQUIRE(saved.threshold.data()[1] == T(0));
    CHECK(saved.threshold.data()[2] < T(-0.1));
    const Row expected = naive_row(descent, 3, row);
    for (Index i = 0; i < 4; ++i)
        CHECK(static_cast<double>(saved.scores.data()[i]) ==
              doctest::Approx(expected[static_cast<std::size_t>(i)]).epsilon(std::is_same_v<T, float> ? 1e-5 : 1e-12));
}

TEST_CASE(
    "coordinate_descent: solved for as many tokens as are real, or more, every score is 1 and nothing has a gradient") {
    const Cpu policy(1);
    for (const bool masked : {false, true}) {
        const Case<double> c(policy, 1, 1, 20, 3, masked);
        double real = 0;
        for (Index i = 0; i < 20; ++i) real += !c.mask || c.mask(0, i) ? 1 : 0;
        for (const double k : {real, real + 0.5, real + 1, 20.0, 25.0})
            for (const bool limit_k : {false, true}) {
                CAPTURE(k);
                CAPTURE(limit_k);
                const CoordinateDescent descent{.eps = 0.7, .limit_k = limit_k, .iterate_to_convergence = true};
                const auto saved = coordinate_descent_forward(policy, descent, k, c.logits, c.mask);
                const auto d = coordinate_descent_vjp(policy, descent, k, saved, c.d_scores, c.logits, c.mask);
                CHECK(saved.threshold.data()[1] == -infinity);
                for (Index i = 0; i < 20; ++i) {
                    CHECK(saved.scores.data()[i] == (!c.mask || c.mask(0, i) ? 1.0 : 0.0));
                    CHECK(d.d_logits.data()[i] == 0);
                }
                CHECK(d.d_k.data()[0] == 0);
            }
        // One less, and the smallest of the real ones is below the threshold.
        const CoordinateDescent descent{.eps = 0.7, .iterate_to_convergence = true};
        const auto scores =
            to_host(policy, coordinate_descent_forward(policy, descent, real - 0.25, c.logits, c.mask).scores);
        CHECK(std::accumulate(scores.begin(), scores.end(), 0.0) == doctest::Approx(real - 0.25).epsilon(1e-12));
    }
}

TEST_CASE("coordinate_descent: solved to convergence, the scores sum to k") {
    const Cpu policy(1);
    for (const double deviation : {0.1, 1.0, 22.0})
        for (const double k : {0.25, 1.0, 7.0, 31.5, 99.0, 99.9}) {
            CAPTURE(deviation);
            CAPTURE(k);
            const Case<double> c(policy, 1, 1, 100, deviation, false);
            const CoordinateDescent descent{.eps = 1, .iterate_to_convergence = true};
            const auto scores = to_host(policy, coordinate_descent_forward(policy, descent, k, c.logits, {}).scores);
            CHECK(std::accumulate(scores.begin(), scores.end(), 0.0) == doctest::Approx(k).epsilon(1e-12));
        }
    const auto ties = row_of(policy, {2, 2, 2, 2, -1});
    const CoordinateDescent descent{.eps = 0.01, .iterate_to_convergence = true};
    const auto scores = to_host(policy, coordinate_descent_forward(policy, descent, 2, ties, {}).scores);
    for (std::size_t i = 0; i < 4; ++i) CHECK(scores[i] == doctest::Approx(0.5).epsilon(1e-12));
    CHECK(scores[4] < 1e-100);
}

TEST_CASE("coordinate_descent: solved to convergence, as many tokens wanted as have a logit above -infinity") {
    const Cpu policy(1);
    const CoordinateDescent descent{.eps = 1, .iterate_to_convergence = true};
    const auto logits = row_of(policy, {5, 1, 1, -infinity}), d_scores = row_of(policy, {1, 2, -1, 3});
    const auto saved = coordinate_descent_forward(policy, descent, 3, logits, {});
    for (Index i = 0; i < 4; ++i) CHECK(saved.scores.data()[i] == (i < 3 ? 1.0 : 0.0));
    const auto d = coordinate_descent_vjp(policy, descent, 3, saved, d_scores, logits, {});
    for (const double ds : to_host(policy, d.d_logits)) CHECK(ds == 0);
    CHECK(d.d_k.data()[0] == 0);
}

TEST_CASE("coordinate_descent: far more tokens wanted than there are, every score is 1 and the gradient 0") {
    const Cpu policy(1);
    const Case<double> c(policy, 1, 1, 20, 1, true);
    const auto saved = coordinate_descent_forward(policy, CoordinateDescent{}, 400, c.logits, c.mask);
    for (Index i = 0; i < 20; ++i) CHECK(saved.scores.data()[i] == (c.mask(0, i) ? 1.0 : 0.0));
    const auto d = coordinate_descent_vjp(policy, CoordinateDescent{}, 400, saved, c.d_scores, c.logits, c.mask);
    for (const double ds : to_host(policy, d.d_logits)) CHECK(ds == 0);
    CHECK(d.d_k.data()[0] == 0);
}

TEST_CASE("coordinate_descent: masked tokens and logits of -infinity score 0, have no gradient and change no bit") {
    const Cpu policy(1);
    for (const Problem& p : problems()) {
        CAPTURE(describe(p));
        Case<double> c(policy, 2, 1, p.length, p.deviation, true);
        const auto saved = coordinate_descent_forward(policy, p.descent, p.k, c.logits, c.mask);
        const auto d = coordinate_descent_vjp(policy, p.descent, p.k, saved, c.d_scores, c.logits, c.mask);
        auto other = copy_of(policy, c.logits), unmasked = copy_of(policy, c.logits);
        for (Index i = 0; i < other.size(); ++i) {
            if (c.mask.data()[i]) continue;
            CHECK(saved.scores.data()[i] == 0);
            CHECK(d.d_logits.data()[i] == 0);
            other.data()[i] = i % 2 == 0 ? 1e30 : std::numeric_limits<double>::quiet_NaN();
            c.d_scores.data()[i] = std::numeric_limits<double>::quiet_NaN();
            unmasked.data()[i] = -infinity;
        }
        const auto other_saved = coordinate_descent_forward(policy, p.descent, p.k, other, c.mask);
        const auto other_d = coordinate_descent_vjp(policy, p.descent, p.k, other_saved, c.d_scores, other, c.mask);
        CHECK(same_bits(other_saved.scores, saved.scores));
        CHECK(same_bits(other_d.d_logits, d.d_logits));
        CHECK(same_bits(other_d.d_k, d.d_k));
        // A logit of −∞ still counts as a real token, of which only two things depend: the start at −s, and limit_k.
        if (p.descent.start == DescentStart::zero && !p.descent.limit_k) {
            const auto infinite = coordinate_descent_forward(policy, p.descent, p.k, unmasked, {});
            const auto infinite_d = coordinate_descent_vjp(policy, p.descent, p.k, infinite, c.d_scores, unmasked, {});
            CHECK(same_bits(infinite.scores, saved.scores));
            CHECK(same_bits(infinite_d.d_logits, d.d_logits));
        }
    }
}

TEST_CASE("coordinate_descent: extreme logits never give NaN, and scores stay in [0, 1]") {
    const Cpu policy(1);
    const std::vector<Row> rows{
        {-1e4, -1e4, -1e4},        {1e4, 1e4, -1e4},         {1e30, 0, -1e30}, {-infinity, -infinity},
        {-infinity, 3, -infinity}, {infinity, 0, -infinity}, {5, 5, 5, 5},     {0, 0, 0}};
    for (const Row& row : rows)
        for (const double k : {0.5, 1.0, 2.0, 10.0})
            for (const DescentStart start : {DescentStart::zero, DescentStart::minus_logits})
                for (CoordinateDescent descent :
                     {CoordinateDescent{}, CoordinateDescent{.eps = 0.03, .eps_init = 4, .eps_decay = 0.001},
                      CoordinateDescent{.eps = 0.1, .iterate_to_convergence = true}}) {
                    descent.start = start;
                    CAPTURE(row[0]);
                    CAPTURE(k);
                    CAPTURE(static_cast<int>(start));
                    CAPTURE(descent.eps);
                    const auto logits = row_of(policy, row);
                    const auto saved = coordinate_descent_forward(policy, descent, k, logits, {});
                    const auto g = filled<double>(policy, logits.shape(), 1);
                    const auto d = coordinate_descent_vjp(policy, descent, k, saved, g, logits, {});
                    for (std::size_t i = 0; i < row.size(); ++i) {
                        const double y = saved.scores.data()[i];
                        CHECK((y >= 0 && y <= 1));
                        CHECK(std::isfinite(d.d_logits.data()[i]));
                        if (row[i] == -infinity) CHECK(y == 0);
                        if (row[i] == infinity) CHECK(y == 1);
                    }
                    CHECK(std::isfinite(d.d_k.data()[0]));
                }
}

TEST_CASE_TEMPLATE("coordinate_descent: a NaN among the real logits makes its row NaN, wherever it stands", T, float,
                   double) {
    const Cpu policy(2);
    for (const Problem& p : problems())
        for (const bool masked : {false, true})
            for (const Index length : {1, 9, 600})
                for (const Index place : {Index{0}, Index{1}, length / 2, length - 1}) {
                    if (place >= length) continue;
                    CAPTURE(describe(p));
                    CAPTURE(masked);
                    CAPTURE(length);
                    CAPTURE(place);
                    Case<T> c(policy, 1, 2, length, p.deviation, masked);
                    if (masked) c.mask_tensor.data()[place] = true;
                    const auto clean = coordinate_descent_forward(policy, p.descent, p.k, c.logits, c.mask);
                    c.logits.view()(0, 1, place) = std::numeric_limits<T>::quiet_NaN();
                    const auto saved = coordinate_descent_forward(policy, p.descent, p.k, c.logits, c.mask);
                    const auto d = coordinate_descent_vjp(policy, p.descent, p.k, saved, c.d_scores, c.logits, c.mask);
                    Index wrong = 0;
                    for (Index i = 0; i < length; ++i) {
                        const T y = saved.scores.view()(0, 1, i), ds = d.d_logits.view()(0, 1, i);
                        const bool real = !c.mask || c.mask(0, i);
                        wrong += real ? !std::isnan(y) || !std::isnan(ds) : y != 0 || ds != 0;
                        wrong += saved.scores.view()(0, 0, i) != clean.scores.view()(0, 0, i);
                        wrong += !std::isfinite(d.d_logits.view()(0, 0, i));
                    }
                    CHECK(wrong == 0);
                    CHECK(std::isnan(d.d_k.view()(0, 1)));
                    CHECK_FALSE(std::isnan(d.d_k.view()(0, 0)));
                }
}

TEST_CASE("coordinate_descent: a logit of +infinity scores 1 and is as one that is large, converged too") {
    const Cpu policy(1);
    for (const Problem& p : problems()) {
        CAPTURE(describe(p));
        Case<double> c(policy, 1, 1, p.length, p.deviation, false);
        for (const Index count : {Index{1}, p.length / 2, p.length}) {  // also more of them than wanted tokens
            auto infinite = copy_of(policy, c.logits), large = copy_of(policy, c.logits);
            for (Index i = 0; i < count; ++i) infinite.data()[i] = infinity, large.data()[i] = 1e300;
            const auto saved = coordinate_descent_forward(policy, p.descent, p.k, infinite, {});
            const auto d = coordinate_descent_vjp(policy, p.descent, p.k, saved, c.d_scores, infinite, {});
            const auto of_large = coordinate_descent_forward(policy, p.descent, p.k, large, {});
            for (Index i = 0; i < p.length; ++i) {
                CHECK(saved.scores.data()[i] == of_large.scores.data()[i]);
                if (i < count) CHECK(saved.scores.data()[i] == 1);
                CHECK(std::isfinite(d.d_logits.data()[i]));
                if (i < count) CHECK(d.d_logits.data()[i] == 0);
            }
        }
    }
}

TEST_CASE_TEMPLATE("coordinate_descent: a sample that wants no token scores 0 and changes no other", T, float, double) {
    const Cpu policy(1);
    const std::array<TokenIndex, 4> wanted{0, 3, -2, 5};
    for (const bool converged : {false, true})
        for (const bool limit_k : {false, true})
            for (const DescentStart start : {DescentStart::zero, DescentStart::minus_logits}) {
                CAPTURE(converged);
                CAPTURE(limit_k);
                CAPTURE(static_cast<int>(start));
                const CoordinateDescent descent{
                    .start = start, .limit_k = limit_k, .iterate_to_convergence = converged};
                Case<T> c(policy, 4, 2, 37, 2, false);
                c.logits.view()(2, 1, 5) = std::numeric_limits<T>::infinity();
                DescentK k(SampleCount(7), 1.5);
                k.of_sample = wanted.data();
                const auto saved = coordinate_descent_forward(policy, descent, k, c.logits, {});
                const auto d = coordinate_descent_vjp(policy, descent, k, saved, c.d_scores, c.logits, {});
                const auto all = [](const auto& view, T value) {
                    return std::all_of(view.data(), view.data() + view.size(), [&](T x) { return x == value; });
                };
                for (const Index b : {0, 2}) {
                    CHECK(all(saved.scores.view()[b], T(0)));
                    CHECK(all(saved.threshold.view()[b], std::numeric_limits<T>::infinity()));
                    CHECK(all(saved.saturated.view()[b], T(0)));
                    CHECK(all(d.d_logits.view()[b], T(0)));
                    CHECK(all(d.d_k.view()[b], T(0)));
                }
                for (const Index b : {1, 3}) {
                    const double own = 1.5 * wanted[static_cast<std::size_t>(b)];
                    const auto logits = sequence(c.logits, b);
                    const auto alone = coordinate_descent_forward(policy, descent, own, logits, {});
                    const auto d_alone =
                        coordinate_descent_vjp(policy, descent, own, alone, sequence(c.d_scores, b), logits, {});
                    CHECK(same_bits(sequence(saved.scores, b), alone.scores));
                    CHECK(same_bits(sequence(d.d_logits, b), d_alone.d_logits));
                }
            }
}

TEST_CASE("coordinate_descent: empty rows and batches") {
    const Cpu policy(1);
    for (const auto& shape : {std::array<Index, 3>{0, 1, 4}, {2, 0, 4}, {2, 1, 0}})
        for (const bool converged : {false, true}) {
            const CoordinateDescent descent{.iterate_to_convergence = converged};
            const auto logits = filled<float>(policy, shape, 0);
            const auto saved = coordinate_descent_forward(policy, descent, 2, logits, {});
            const auto d = coordinate_descent_vjp(policy, descent, 2, saved, logits, logits, {});
            CHECK(saved.scores.shape() == shape);
            for (const float d_k : to_host(policy, d.d_k)) CHECK(d_k == 0);
        }
}

TEST_CASE("coordinate_descent: the same bits with 1 and 2 threads, and for each sequence alone") {
    const Cpu one(1), two(2);
    for (const Problem& p : problems()) {
        const Case<float> c(one, 3, 2, 300, p.deviation, true);
        const auto saved = coordinate_descent_forward(one, p.descent, p.k, c.logits, c.mask);
        const auto d = coordinate_descent_vjp(one, p.descent, p.k, saved, c.d_scores, c.logits, c.mask);
        const auto pass2 = coordinate_descent_forward(two, p.descent, p.k, c.logits, c.mask);
        const auto d2 = coordinate_descent_vjp(two, p.descent, p.k, pass2, c.d_scores, c.logits, c.mask);
        CHECK(same_bits(pass2.scores, saved.scores));
        CHECK(same_bits(d2.d_logits, d.d_logits));
        CHECK(same_bits(d2.d_k, d.d_k));
        for (Index b = 0; b < 3; ++b) {
            const auto logits = sequence(c.logits, b);
            const auto alone = coordinate_descent_forward(two, p.descent, p.k, logits, sequence(c.mask, b));
            CHECK(same_bits(alone.scores, sequence(saved.scores, b)));
            CHECK(same_bits(
                coordinate_descent_vjp(two, p.descent, p.k, alone, sequence(c.d_scores, b), logits, sequence(c.mask, b))
                    .d_logits,
                sequence(d.d_logits, b)));
        }
    }
}

TEST_CASE_TEMPLATE("coordinate_descent: the extremes of its options give no NaN", T, float, double) {
    const Cpu policy(1);
    for (const double eps : {smallest_divisor, largest_divisor})
        for (const double k : {1e-6, 20.0, 1e30})
            for (const double deviation : {1e-3, 1.0, 22.0, 1e5})
                for (const bool masked : {false, true})
                    for (CoordinateDescent descent :
                         {CoordinateDescent{}, CoordinateDescent{.start = DescentStart::minus_logits},
                          CoordinateDescent{.eps_init = largest_divisor, .eps_decay = 1e-9},
                          CoordinateDescent{.limit_k = true}, CoordinateDescent{.iterate_to_convergence = true}}) {
                        descent.eps = eps;
                        CAPTURE(eps);
                        CAPTURE(k);
                        CAPTURE(deviation);
                        const Case<T> c(policy, 1, 1, 300, deviation, masked);
                        const auto saved = coordinate_descent_forward(policy, descent, k, c.logits, c.mask);
                        const auto d = coordinate_descent_vjp(policy, descent, k, saved, c.d_scores, c.logits, c.mask);
                        Index nans = 0;
                        for (Index i = 0; i < 300; ++i)
                            nans += std::isnan(saved.scores.data()[i]) || std::isnan(d.d_logits.data()[i]);
                        CHECK(nans == 0);
                        CHECK_FALSE(std::isnan(d.d_k.data()[0]));
                    }
}

TEST_CASE("coordinate_descent: errors name the argument") {
    const Cpu policy(1);
    const Case<float> c(policy, 2, 1, 5, 1, false);
    const auto mask = random_mask(policy, std::array<Index, 2>{2, 4}, 0);
    const auto wide = filled<float>(policy, std::array<Index, 3>{2, 1, 6}, 0);
    const auto forward = [&](const CoordinateDescent& descent, double k) {
        return coordinate_descent_forward(policy, descent, k, c.logits, {});
    };
    CHECK_THROWS_WITH_AS(forward({}, 0), "colt5: `k` must be > 0, but is 0", ValueError);
    CHECK_THROWS_WITH_AS(forward({.n_iters = 0}, 1), "colt5: `n_iters` must be >= 1, but is 0", ValueError);
    CHECK_THROWS_WITH_AS(forward({.eps = 0}, 1), "colt5: `eps` must be > 0, but is 0", ValueError);
    CHECK_THROWS_WITH_AS(forward({.eps = 1e-40}, 1), "colt5: `eps` must be in [1e-6, 1e6], but is 1e-40", ValueError);
    CHECK_THROWS_WITH_AS(forward({.eps = infinity}, 1), "colt5: `eps` must be in [1e-6, 1e6], but is inf", ValueError);
    CHECK_THROWS_WITH_AS(forward({.eps = std::nan("")}, 1), "colt5: `eps` must be > 0, but is nan", ValueError);
    CHECK_THROWS_WITH_AS(forward({.eps_init = infinity}, 1), "colt5: `eps_init` must be in [0, 1e6], but is inf",
                         ValueError);
    CHECK_THROWS_WITH_AS(forward({.eps_init = std::nan("")}, 1), "colt5: `eps_init` must be in [0, 1e6], but is nan",
                         ValueError);
    CHECK_THROWS_WITH_AS(forward({.eps_decay = std::nan("")}, 1), "colt5: `eps_decay` must be in (0, 1], but is nan",
                         ValueError);
    CHECK_THROWS_WITH_AS(forward({}, infinity), "colt5: `k` must be in [1e-6, 1e30], but is inf", ValueError);
    CHECK_THROWS_WITH_AS(forward({}, 1e-300), "colt5: `k` must be in [1e-6, 1e30], but is 1e-300", ValueError);
    CHECK_THROWS_WITH_AS(forward({.eps_decay = 0}, 1), "colt5: `eps_decay` must be in (0, 1], but is 0", ValueError);
    CHECK_THROWS_WITH_AS(forward({.eps_decay = 1.5}, 1), "colt5: `eps_decay` must be in (0, 1], but is 1.5",
                         ValueError);
    CHECK_THROWS_WITH_AS(coordinate_descent_forward(policy, CoordinateDescent{}, 1, c.logits, Mask(mask)),
                         "colt5: `mask` must have shape (2, 5), but has (2, 4)", ShapeError);
    const auto saved = forward({}, 1);
    const auto vjp = [&](const auto& d_scores, const auto& logits, Mask given) {
        return coordinate_descent_vjp(policy, CoordinateDescent{}, 1, saved, d_scores, logits, given);
    };
    CHECK_THROWS_WITH_AS(vjp(wide, c.logits, {}), "colt5: `d_scores` must have shape (2, 1, 5), but has (2, 1, 6)",
                         ShapeError);
    CHECK_THROWS_WITH_AS(vjp(wide, wide, {}), "colt5: `logits` must have shape (2, 1, 5), but has (2, 1, 6)",
                         ShapeError);
    CHECK_THROWS_WITH_AS(vjp(c.d_scores, c.logits, Mask(mask)), "colt5: `mask` must have shape (2, 5), but has (2, 4)",
                         ShapeError);
}
