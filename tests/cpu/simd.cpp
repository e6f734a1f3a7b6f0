// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <type_traits>
#include <vector>

#include <colt5/cpu/simd.hpp>

using namespace colt5;

namespace {

template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, float>, double, long double>;

/// The largest error over [low, high] in units in the last place of the exact result.
template <typename T, typename Function, typename Exact>
double largest_error(double low, double high, const Function& function, const Exact& exact, Index steps = 100000) {
    double worst = 0;
    for (Index i = 0; i <= steps; ++i) {
        const T x = static_cast<T>(low + (high - low) * static_cast<double>(i) / static_cast<double>(steps));
        const Wide<T> want = exact(static_cast<Wide<T>>(x));
        const T got = function(cpu::Batch<T>(x)).get(0), magnitude = std::abs(static_cast<T>(want));
        const T unit = std::nextafter(magnitude, std::numeric_limits<T>::infinity()) - magnitude;
        const double error =
            static_cast<double>(std::abs(static_cast<Wide<T>>(got) - want) / static_cast<Wide<T>>(unit));
        if (!(error <= worst)) worst = error;
    }
    return worst;
}

template <typename T>
T first(const cpu::Batch<T>& batch) {
    return batch.get(0);
}

}  // namespace

TEST_CASE_TEMPLATE("simd: partial loads pad with zero and partial stores touch nothing else", T, float, double) {
    std::vector<T> from(static_cast<std::size_t>(cpu::lanes<T>) + 1);
    std::iota(from.begin(), from.end(), T(1));
    for (Index count = 0; count <= cpu::lanes<T>; ++count) {
        const cpu::Batch<T> batch = cpu::load_partial(from.data() + 1, count);
        std::vector<T> to(from.size(), T(-1));
        cpu::store_partial(to.data(), batch, count);
        for (Index i = 0; i < cpu::lanes<T>; ++i) {
            CHECK(batch.get(static_cast<std::size_t>(i)) == (i < count ? T(i + 2) : T(0)));
            CHECK(to[static_cast<std::size_t>(i)] == (i < count ? T(i + 2) : T(-1)));
        }
        const cpu::Batch<T> padded = cpu::pad(batch, count, T(9));
        for (Index i = 0; i < cpu::lanes<T>; ++i)
            CHECK(padded.get(static_cast<std::size_t>(i)) == (i < count ? T(i + 2) : T(9)));
    }
}

TEST_CASE_TEMPLATE("simd: for_each_batch covers every element once, the tail too", T, float, double) {
    for (Index n = 0; n <= 3 * cpu::lanes<T> + 1; ++n) {
        std::vector<T> x(static_cast<std::size_t>(n) + 1, T(2)), y(x);
        cpu::for_each_batch<T>(n, [&](Index offset, Index count) {
            cpu::store(y.data() + offset, cpu::load(x.data() + offset, count) + cpu::load(y.data() + offset, count),
                       count);
        });
        std::vector<T> expected(x.size(), T(4));
        expected.back() = T(2);
        CHECK(y == expected);
    }
}

TEST_CASE_TEMPLATE("simd: horizontal reductions", T, float, double) {
    std::vector<T> x(static_cast<std::size_t>(cpu::lanes<T>));
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = T(i % 2 == 0 ? 1 : -1) * T(i + 1);
    const cpu::Batch<T> batch = cpu::load(x.data());
    CHECK(cpu::reduce_add(batch) == std::accumulate(x.begin(), x.end(), T(0)));
    CHECK(cpu::reduce_max(batch) == *std::max_element(x.begin(), x.end()));
    CHECK(cpu::reduce_min(batch) == *std::min_element(x.begin(), x.end()));
}

TEST_CASE_TEMPLATE("simd: functions are as accurate as they say", T, float, double) {
    const bool single = std::is_same_v<T, float>;
    using B = cpu::Batch<T>;
    using W = Wide<T>;
    const auto exp = [](const B& x) { return cpu::exp(x); };
    const auto exact_exp = [](W x) { return std::exp(x); };
    CHECK(largest_error<T>(single ? -87.3 : -708.3, single ? 88.37 : 709.43, exp, exact_exp) <= 1.5);
    CHECK(largest_error<T>(-1, 1, exp, exact_exp) <= 1.5);
    const auto log = [](const B& x) { return cpu::log(x); };
    const auto exact_log = [](W x) { return std::log(x); };
    for (const double high : {1e-30, 1.01, 4.0, 1e30}) CHECK(largest_error<T>(1e-37, high, log, exact_log) <= 1);
    const auto erf = [](const B& x) { return cpu::erf(x); };
    const auto exact_erf = [](W x) { return std::erf(x); };
    for (const double range : {0.1, 1.0, 4.0, 100.0})
        CHECK(largest_error<T>(-range, range * 1.01, erf, exact_erf) <= (single ? 2.5 : 70));
    const auto tanh = [](const B& x) { return cpu::tanh(x); };
    const auto exact_tanh = [](W x) { return std::tanh(x); };
#if defined(__aarch64__)
    constexpr double tanh_bound = 1.7;
#else
    constexpr double tanh_bound = 1.5;
#endif
    for (const double range : {0.1, 1.0, 10.0, 1000.0})
        CHECK(largest_error<T>(-range, range * 1.01, tanh, exact_tanh) <= tanh_bound);
    for (const double y : {-3.0, 0.5, 1.75, 10.0}) {
        const auto pow = [&](const B& x) { return cpu::pow(x, B(T(y))); };
        const auto exact_pow = [&](W x) { return std::pow(x, W(y)); };
        for (double low = 0.01; low < 30; low *= 1.5) {
            const double growth = std::abs(y) * std::fmax(std::abs(std::log(low)), std::abs(std::log(low * 1.5)));
            CHECK(largest_error<T>(low, low * 1.5, pow, exact_pow, 1000) <= 4 + 2 * growth);
        }
    }
    const auto error_of_sincos = [](double range) {
        W worst = 0;
        for (Index i = -100000; i <= 100000; ++i) {
            const T x = static_cast<T>(range * static_cast<double>(i) / 100000);
            const auto [sin, cos] = cpu::sincos(B(x));
            worst = std::max({worst, std::abs(static_cast<W>(first(sin)) - std::sin(static_cast<W>(x))),
                              std::abs(static_cast<W>(first(cos)) - std::cos(static_cast<W>(x)))});
        }
        return worst / std::numeric_limits<T>::epsilon();
    };
    for (const double range : {0.1, 1.0, 3.15}) CHECK(error_of_sincos(range) <= 1);
}

TEST_CASE_TEMPLATE("simd: functions at the ends of their range", T, float, double) {
    using B = cpu::Batch<T>;
    const T infinity = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
    for (const T x : {-infinity, std::numeric_limits<T>::lowest(), T(-1e30), T(-1e5), T(-800)})
        CHECK(first(cpu::exp(B(x))) == T(0));
    for (const T x : {T(-90), T(-100), T(-709), T(-745)}) {
        CHECK(first(cpu::exp(B(x))) >= T(0));
        CHECK(first(cpu::exp(B(x))) <= T(1e-38));
    }
    for (const T x : {infinity, std::numeric_limits<T>::max(), T(1e5)}) CHECK(first(cpu::exp(B(x))) == infinity);
    CHECK(first(cpu::exp(B(T(0)))) == T(1));
    CHECK(first(cpu::log(B(T(0)))) == -infinity);
    CHECK(first(cpu::log(B(infinity))) == infinity);
    CHECK(std::isnan(first(cpu::log(B(T(-1))))));
    for (const T sign : {T(-1), T(1)}) {
        CHECK(first(cpu::erf(B(sign * infinity))) == sign);
        CHECK(first(cpu::tanh(B(sign * infinity))) == sign);
    }
    CHECK(first(cpu::pow(B(T(0)), B(T(2)))) == T(0));
    CHECK(std::isnan(first(cpu::exp(B(nan)))));
    CHECK(std::isnan(first(cpu::log(B(nan)))));
    CHECK(std::isnan(first(cpu::erf(B(nan)))));
    CHECK(std::isnan(first(cpu::tanh(B(nan)))));
}

TEST_CASE_TEMPLATE("transpose: every entry, and nothing beside it", T, float, double) {
    const Index size = cpu::lanes<T>;
    for (const Index rows : {Index{0}, size, 2 * size, 5 * size})
        for (const Index columns : {Index{0}, size, 2 * size, 9 * size}) {
            const Index stride = columns + 3, to_stride = rows + 5;
            std::vector<T> from(static_cast<std::size_t>(rows * stride + 1));
            std::iota(from.begin(), from.end(), T(0));
            std::vector<T> to(static_cast<std::size_t>(columns * to_stride + 1), T(-1));
            cpu::transpose(rows, columns, from.data(), stride, to.data(), to_stride);
            bool same = true;
            for (Index j = 0; j < columns; ++j)
                for (Index i = 0; i < to_stride; ++i)
                    same = same && to[static_cast<std::size_t>(j * to_stride + i)] ==
                                       (i < rows ? from[static_cast<std::size_t>(i * stride + j)] : T(-1));
            CHECK(same);
            CHECK(to.back() == T(-1));
        }
}
