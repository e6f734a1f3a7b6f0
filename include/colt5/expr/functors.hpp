// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
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
        using std::erf;
        const V inverse_sqrt_2(0.70710678118654752440);
        return V(0.5) * x * (V(1) + erf(x * inverse_sqrt_2));
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
        using std::exp;
        return x / (V(1) + exp(-x));
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
