// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <limits>

#include <colt5/cpu/pack.hpp>

using namespace colt5;

namespace {

/// What the evaluator of expressions combines: one batch, and several of a wide type beside one of a narrow type.
template <typename T, Index Lanes>
struct Shape {
    using Scalar = T;
    static constexpr Index count = Lanes;
    using Pack = cpu::Pack<T, Lanes>;
    using Mask = cpu::PackMask<Lanes>;
    using Values = std::array<T, std::size_t{Lanes}>;
    using Bits = std::array<bool, std::size_t{Lanes}>;

    static Pack load(const Values& values) { return cpu::load_pack(values.data(), cpu::Full<Lanes>()); }
    static Mask load(const Bits& bits) { return cpu::load_pack(bits.data(), cpu::Full<Lanes>()); }
    static Values store(const Pack& pack) {
        Values values;
        cpu::store_pack(values.data(), pack, cpu::Full<Lanes>());
        return values;
    }
    static Bits store(const Mask& mask) {
        Bits bits;
        cpu::store_pack(bits.data(), mask, cpu::Full<Lanes>());
        return bits;
    }
    /// Every entry another one, of both signs.
    static Values ascending() {
        Values values;
        for (std::size_t i = 0; i < values.size(); ++i)
            values[i] = static_cast<T>(static_cast<Index>(i) - Lanes / 2) + T(0.25);
        return values;
    }
    /// Less than `ascending` in every third entry, equal in the next and greater in the last.
    static Values neighbours() {
        Values values = ascending();
        for (std::size_t i = 0; i < values.size(); ++i) values[i] += static_cast<T>(static_cast<int>(i % 3) - 1);
        return values;
    }
    static Bits every(std::size_t period) {
        Bits bits;
        for (std::size_t i = 0; i < bits.size(); ++i) bits[i] = i % period == 0;
        return bits;
    }
};

#define PACK_SHAPES Shape<float, cpu::lanes<float>>, Shape<double, cpu::lanes<double>>, Shape<double, cpu::lanes<float>>

}  // namespace

TEST_CASE_TEMPLATE("pack: entries keep their places from memory to memory", S, PACK_SHAPES) {
    CHECK(S::store(S::load(S::ascending())) == S::ascending());
    CHECK(S::store(S::load(S::every(3))) == S::every(3));
    typename S::Values same;
    same.fill(typename S::Scalar(7));
    CHECK(S::store(typename S::Pack(7)) == same);
}

TEST_CASE_TEMPLATE("pack: types of 16 bits become float and are rounded on the way back", T, float16, bfloat16) {
    constexpr Index count = cpu::lanes<float>;
    std::array<T, std::size_t{count}> values, back;
    for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<T>(0.5f * static_cast<float>(i) - 1);
    const cpu::Pack<float, count> pack = cpu::load_pack(values.data(), cpu::Full<count>());
    const auto floats = Shape<float, count>::store(pack);
    for (std::size_t i = 0; i < values.size(); ++i) CHECK(floats[i] == static_cast<float>(values[i]));
    const cpu::Pack<float, count> tenth(0.1f);
    cpu::store_pack(back.data(), pack * tenth, cpu::Full<count>());
    for (std::size_t i = 0; i < values.size(); ++i)
        CHECK(static_cast<float>(back[i]) == static_cast<float>(static_cast<T>(floats[i] * 0.1f)));
}

TEST_CASE_TEMPLATE("pack: the first entries are loaded, stored and padded alone", S, PACK_SHAPES) {
    using T = typename S::Scalar;
    const auto values = S::ascending();
    for (Index count = 0; count <= S::count; ++count) {
        CAPTURE(count);
        const auto first = S::store(cpu::load_first<S::count>(values.data(), count));
        const auto bits = S::store(cpu::load_first<S::count>(S::every(1).data(), count));
        const auto padded = S::store(cpu::pad(S::load(values), count, T(-9)));
        typename S::Values stored;
        stored.fill(T(777));
        cpu::store_first<S::count>(stored.data(), S::load(values), count);
        for (std::size_t i = 0; i < values.size(); ++i) {
            const bool inside = static_cast<Index>(i) < count;
            CHECK(first[i] == (inside ? values[i] : T(0)));
            CHECK(bits[i] == inside);
            CHECK(padded[i] == (inside ? values[i] : T(-9)));
            CHECK(stored[i] == (inside ? values[i] : T(777)));
        }
    }
}

TEST_CASE_TEMPLATE("pack: a reduction takes every entry once", S, PACK_SHAPES) {
    using T = typename S::Scalar;
    const auto add = [](T a, T b) { return a + b; };
    const auto greatest = [](T a, T b) { return std::max(a, b); };
    typename S::Values powers;  // their sum tells which were taken, and how often
    for (std::size_t i = 0; i < powers.size(); ++i) powers[i] = std::ldexp(T(1), static_cast<int>(i));
    CHECK(cpu::reduce(S::load(powers), add) == std::ldexp(T(1), static_cast<int>(S::count)) - 1);
    for (std::size_t i = 0; i < powers.size(); ++i) {
        typename S::Values values = S::ascending();
        values[i] = T(1000);
        CHECK(cpu::reduce(S::load(values), greatest) == T(1000));
    }
}

TEST_CASE_TEMPLATE("pack: arithmetic is that of each entry", S, PACK_SHAPES) {
    using T = typename S::Scalar;
    const auto a = S::ascending(), b = S::neighbours();
    const auto x = S::load(a), y = S::load(b);
    const auto check = [&](const typename S::Pack& pack, const auto& expected) {
        const auto values = S::store(pack);
        for (std::size_t i = 0; i < values.size(); ++i) CHECK(values[i] == expected(a[i], b[i]));
    };
    check(x + y, [](T p, T q) { return p + q; });
    check(x - y, [](T p, T q) { return p - q; });
    check(x * y, [](T p, T q) { return p * q; });
    check(x / y, [](T p, T q) { return p / q; });
    check(-x, [](T p, T) { return -p; });
    check(max(x, y), [](T p, T q) { return std::max(p, q); });
    check(min(x, y), [](T p, T q) { return std::min(p, q); });
    check(abs(x), [](T p, T) { return std::abs(p); });
    check(sqrt(abs(x)), [](T p, T) { return std::sqrt(std::abs(p)); });
}

TEST_CASE_TEMPLATE("pack: functions are those of each entry", S, PACK_SHAPES) {
    using T = typename S::Scalar;
    const auto a = S::ascending(), b = S::neighbours();
    const auto x = S::load(a), y = S::load(b), positive = abs(x);
    const auto check = [&](const typename S::Pack& pack, const auto& expected) {
        const auto values = S::store(pack);
        for (std::size_t i = 0; i < values.size(); ++i) {
            const double right = expected(double(a[i]), double(b[i]));
            CHECK(std::abs(double(values[i]) - right) <=
                  64 * double(std::numeric_limits<T>::epsilon()) * (std::abs(right) + 1e-2));
        }
    };
    const auto normal = [](double p) { return 0.5 * std::erfc(-p / std::sqrt(2.0)); };
    check(exp(x), [](double p, double) { return std::exp(p); });
    check(log(positive), [](double p, double) { return std::log(std::abs(p)); });
    check(erf(x), [](double p, double) { return std::erf(p); });
    check(tanh(x), [](double p, double) { return std::tanh(p); });
    check(pow(positive, y), [](double p, double q) { return std::pow(std::abs(p), q); });
    check(gelu(x), [&](double p, double) { return p * normal(p); });
    check(gelu_slope(x), [&](double p, double) {
        return normal(p) + p * std::exp(-p * p / 2) / std::sqrt(2 * 3.14159265358979323846);
    });
}

TEST_CASE_TEMPLATE("pack: comparisons, masks and choices keep their lanes", S, PACK_SHAPES) {
    const auto a = S::ascending(), b = S::neighbours();
    const auto twos = S::every(2), threes = S::every(3);
    const auto x = S::load(a), y = S::load(b);
    const auto two = S::load(twos), three = S::load(threes);
    const auto less = S::store(x < y), at_most = S::store(x <= y), equal = S::store(x == y), other = S::store(x != y);
    const auto both = S::store(two && three), any = S::store(two || three), none = S::store(!three);
    const auto number = S::store(select(three, x, y));
    const auto bit = S::store(select(three, two, !two));
    for (std::size_t i = 0; i < a.size(); ++i) {
        CAPTURE(i);
        CHECK(less[i] == (a[i] < b[i]));
        CHECK(at_most[i] == (a[i] <= b[i]));
        CHECK(equal[i] == (a[i] == b[i]));
        CHECK(other[i] == (a[i] != b[i]));
        CHECK(both[i] == (twos[i] && threes[i]));
        CHECK(any[i] == (twos[i] || threes[i]));
        CHECK(none[i] == !threes[i]);
        CHECK(number[i] == (threes[i] ? a[i] : b[i]));
        CHECK(bit[i] == (threes[i] ? twos[i] : !twos[i]));
    }
}

TEST_CASE_TEMPLATE(
    "pack: nothing compares with NaN, but everything differs from it; max and min give the second operand", S,
    PACK_SHAPES) {
    using T = typename S::Scalar;
    const auto x = S::load(S::ascending());
    const typename S::Pack nan(std::numeric_limits<T>::quiet_NaN());
    CHECK(S::store(x < nan) == typename S::Bits{});
    CHECK(S::store(x <= nan) == typename S::Bits{});
    CHECK(S::store(nan == nan) == typename S::Bits{});
    CHECK(S::store(nan != nan) == S::every(1));
    CHECK(S::store(max(x, nan) == max(x, nan)) == typename S::Bits{});
    CHECK(S::store(min(x, nan) == min(x, nan)) == typename S::Bits{});
    CHECK(S::store(max(nan, x) == x) == S::every(1));
    CHECK(S::store(min(nan, x) == x) == S::every(1));
}

TEST_CASE("pack: numbers are converted entry by entry, both ways") {
    constexpr Index count = cpu::lanes<float>;
    using Narrow = Shape<float, count>;
    using Wide = Shape<double, count>;
    const auto wide = Wide::store(cpu::convert<double>(Narrow::load(Narrow::ascending())));
    CHECK(wide == Wide::ascending());
    Wide::Values thirds;
    for (std::size_t i = 0; i < thirds.size(); ++i) thirds[i] = (static_cast<double>(i) + 1) / 3;
    const auto narrow = Narrow::store(cpu::convert<float>(Wide::load(thirds)));
    for (std::size_t i = 0; i < thirds.size(); ++i) CHECK(narrow[i] == static_cast<float>(thirds[i]));
}
