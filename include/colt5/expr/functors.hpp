// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <concepts>
#include <numbers>
#include <type_traits>

#include <colt5/core/macros.hpp>
#include <colt5/expr/node.hpp>

/// The functions that nodes hold, as stateless functors that work alike on a number and on whatever an evaluator packs
/// several numbers into (V), or on their truth values (M). To add a function: a functor here, its public name in
/// functions.hpp, and an overload for packs in cpu/pack.hpp if it is made of something new.
namespace colt5::expr {

/// What the functors below need of plain numbers beside <cmath>. Evaluators bring their own overloads for their packs.
namespace scalar {

template <Number T>
COLT5_HOST_DEVICE T max(T a, T b) {
    return a > b ? a : b;
}
template <Number T>
COLT5_HOST_DEVICE T min(T a, T b) {
    return a < b ? a : b;
}
template <typename To, typename T>
requires std::is_arithmetic_v<T> COLT5_HOST_DEVICE To convert(T x) {
    return static_cast<To>(x);
}

/// x within the range outside of which exp(−x² / 2) is 0; NaN stays NaN.
template <std::floating_point T>
COLT5_HOST_DEVICE T within_normal_range(T x) {
    constexpr T limit = std::is_same_v<T, double> ? T(38.75) : T(14.5);
    return x < -limit ? -limit : x > limit ? limit : x;
}
/// Φ(x), without cancellation below 0.
template <std::floating_point T>
COLT5_HOST_DEVICE T normal_cumulative(T x) {
#if defined(__CUDA_ARCH__)
    return ::normcdf(x);
#else
    return T(0.5) * std::erfc(x * static_cast<T>(-1 / std::numbers::sqrt2));
#endif
}
/// x · Φ(x); 0 at −∞, +∞ at +∞
template <std::floating_point T>
COLT5_HOST_DEVICE T gelu(T x) {
    return (x > T(0) ? x : within_normal_range(x)) * normal_cumulative(x);
}
/// Φ(x) + x φ(x), φ(x) = exp(−x² / 2) / √(2π); 0 at −∞, 1 at +∞
template <std::floating_point T>
COLT5_HOST_DEVICE T gelu_slope(T x) {
    constexpr T density = static_cast<T>(std::numbers::inv_sqrtpi / std::numbers::sqrt2);
    const T v = within_normal_range(x), square = v * v;
    const T rounded = std::exp(T(-0.5) * square), bell = rounded - rounded * (T(0.5) * std::fma(v, v, -square));
    return normal_cumulative(v) + v * density * bell;
}

}  // namespace scalar

struct OfNumbers {
    static constexpr bool on_masks = false;
};
struct OfMasks {
    static constexpr bool on_masks = true;
};

struct Add : OfNumbers {
    static constexpr const char* name = "+";
    template <typename V>
    COLT5_HOST_DEVICE V operator()(const V& a, const V& b) const {
        return a + b;
    }
};
struct Subtract : OfNumbers {
    static constexpr const char* name = "-";
    template <typename V>
    COLT5_HOST_DEVICE V operator()(const V& a, const V& b) const {
        return a - b;
    }
};
struct Multiply : OfNumbers {
    static constexpr const char* name = "*";
    template <typename V>
    COLT5_HOST_DEVICE V operator()(const V& a, const V& b) const {
        return a * b;
    }
};
struct Divide : OfNumbers {
    static constexpr const char* name = "/";
    template <typename V>
    COLT5_HOST_DEVICE V operator()(const V& a, const V& b) const {
        return a / b;
    }
};
struct Maximum : OfNumbers {
    static constexpr const char* name = "max";
    template <typename V>
    COLT5_HOST_DEVICE V operator()(const V& a, const V& b) const {
        using scalar::max;
        return max(a, b);
    }
};
struct Minimum : OfNumbers {
    static constexpr const char* name = "min";
    template <typename V>
    COLT5_HOST_DEVICE V operator()(const V& a, const V& b) const {
        using scalar::min;
        return min(a, b);
    }
};
struct Power : OfNumbers {
    static constexpr const char* name = "pow";
    template <typename V>
    COLT5_HOST_DEVICE V operator()(const V& a, const V& b) const {
        using std::pow;
        return pow(a, b);
    }
};

struct Less : OfNumbers {
    static constexpr const char* name = "<";
    template <typename V>
    COLT5_HOST_DEVICE auto operator()(const V& a, const V& b) const {
        return a < b;
    }
};
struct LessOrEqual : OfNumbers {
    static constexpr const char* name = "<=";
    template <typename V>
    COLT5_HOST_DEVICE auto operator()(const V& a, const V& b) const {
        return a <= b;
    }
};
struct Equal : OfNumbers {
    static constexpr const char* name = "==";
    template <typename V>
    COLT5_HOST_DEVICE auto operator()(const V& a, const V& b) const {
        return a == b;
    }
};
struct NotEqual : OfNumbers {
    static constexpr const char* name = "!=";
    template <typename V>
    COLT5_HOST_DEVICE auto operator()(const V& a, const V& b) const {
        return a != b;
    }
};
struct And : OfMasks {
    static constexpr const char* name = "&&";
    template <typename M>
    COLT5_HOST_DEVICE M operator()(const M& a, const M& b) const {
        return a && b;
    }
};
struct Or : OfMasks {
    static constexpr const char* name = "||";
    template <typename M>
    COLT5_HOST_DEVICE M operator()(const M& a, const M& b) const {
        return a || b;
    }
};
struct Not : OfMasks {
    static constexpr const char* name = "!";
    template <typename M>
    COLT5_HOST_DEVICE M operator()(const M& a) const {
        return !a;
    }
};

struct Negate : OfNumbers {
    static constexpr const char* name = "-";
    template <typename V>
    COLT5_HOST_DEVICE V operator()(const V& x) const {
        return -x;
    }
};
struct Exp : OfNumbers {
    static constexpr const char* name = "exp";
    template <typename V>
    COLT5_HOST_DEVICE V operator()(const V& x) const {
        using std::exp;
        return exp(x);
    }
};
struct Log : OfNumbers {
    static constexpr const char* name = "log";
    template <typename V>
    COLT5_HOST_DEVICE V operator()(const V& x) const {
        using std::log;
        return log(x);
    }
};
struct Sqrt : OfNumbers {
    static constexpr const char* name = "sqrt";
    template <typename V>
    COLT5_HOST_DEVICE V operator()(const V& x) const {
        using std::sqrt;
        return sqrt(x);
    }
};
struct Abs : OfNumbers {
    static constexpr const char* name = "abs";
    template <typename V>
    COLT5_HOST_DEVICE V operator()(const V& x) const {
        using std::abs;
        return abs(x);
    }
};
struct Square : OfNumbers {
    static constexpr const char* name = "square";
    template <typename V>
    COLT5_HOST_DEVICE V operator()(const V& x) const {
        return x * x;
    }
};
struct Reciprocal : OfNumbers {
    static constexpr const char* name = "reciprocal";
    template <typename V>
    COLT5_HOST_DEVICE V operator()(const V& x) const {
        return V(1) / x;
    }
};
struct Tanh : OfNumbers {
    static constexpr const char* name = "tanh";
    template <typename V>
    COLT5_HOST_DEVICE V operator()(const V& x) const {
        using std::tanh;
        return tanh(x);
    }
};
struct Erf : OfNumbers {
    static constexpr const char* name = "erf";
    template <typename V>
    COLT5_HOST_DEVICE V operator()(const V& x) const {
        using std::erf;
        return erf(x);
    }
};
struct Gelu : OfNumbers {
    static constexpr const char* name = "gelu";
    template <typename V>
    COLT5_HOST_DEVICE V operator()(const V& x) const {
        using scalar::gelu;
        return gelu(x);
    }
};
struct GeluSlope : OfNumbers {
    static constexpr const char* name = "gelu_slope";
    template <typename V>
    COLT5_HOST_DEVICE V operator()(const V& x) const {
        using scalar::gelu_slope;
        return gelu_slope(x);
    }
};
/// GELU with tanh is x · σ(z), where z = √(8/π) (x + 0.044715 x³) = x (linear + cubic · x²). At ±22 and beyond, σ(z) is
/// 0 or 1.
struct GeluTanhExponent {
    static constexpr double linear = 2 * std::numbers::sqrt2 * std::numbers::inv_sqrtpi, cubic = 0.044715 * linear;
    static constexpr double limit = 22;
};
struct GeluTanh : OfNumbers {
    static constexpr const char* name = "gelu_tanh";
    template <typename V>
    COLT5_HOST_DEVICE V operator()(const V& x) const {
        using scalar::max;
        using std::exp;
        using Z = GeluTanhExponent;
        const V v = max(V(-Z::limit), x);  // in this order a NaN stays one
        return v / (V(1) + exp(-v * (V(Z::linear) + V(Z::cubic) * v * v)));
    }
};
struct GeluTanhSlope : OfNumbers {
    static constexpr const char* name = "gelu_tanh_slope";
    template <typename V>
    COLT5_HOST_DEVICE V operator()(const V& x) const {
        using scalar::max, scalar::min;
        using std::exp, std::abs;
        using Z = GeluTanhExponent;
        const V v = min(V(Z::limit), max(V(-Z::limit), x)), square = v * v;
        const V z = v * (V(Z::linear) + V(Z::cubic) * square);
        const V v_dz = v * (V(Z::linear) + V(3 * Z::cubic) * square);
        const V power = exp(-abs(z)), of_larger = V(1) / (V(1) + power);  // σ(|z|); σ(−|z|) = power · σ(|z|)
        const V of_z = min(V(1), power + V(2) * max(V(0), z));            // σ(z) / σ(|z|): power, or 1 from 0 on
        return of_larger * (of_z + v_dz * power * of_larger);             // σ + x z' σ (1 − σ)
    }
};
struct Relu : OfNumbers {
    static constexpr const char* name = "relu";
    template <typename V>
    COLT5_HOST_DEVICE V operator()(const V& x) const {
        using scalar::max;
        return max(V(0), x);  // in this order a NaN stays one
    }
};
struct Sigmoid : OfNumbers {
    static constexpr const char* name = "sigmoid";
    template <typename V>
    COLT5_HOST_DEVICE V operator()(const V& x) const {
        using std::exp;
        return V(1) / (V(1) + exp(-x));
    }
};
struct Silu : OfNumbers {
    static constexpr const char* name = "silu";
    template <typename V>
    COLT5_HOST_DEVICE V operator()(const V& x) const {
        using scalar::max, scalar::min;
        using std::exp, std::abs;
        const V root = exp(V(-0.5) * abs(x)), power = root * root;  // e^−|x| would be 0 where x · e^x is not yet
        const V from_end = max(V(-1500), x);  // where the power is 0; in this order a NaN stays one
        return (max(V(0), from_end) + min(V(0), from_end) * root * root) / (V(1) + power);
    }
};
template <typename To>
struct Convert : OfNumbers {
    static constexpr const char* name = "cast";
    template <typename V>
    COLT5_HOST_DEVICE auto operator()(const V& x) const {
        using scalar::convert;
        return convert<To>(x);
    }
};

}  // namespace colt5::expr
