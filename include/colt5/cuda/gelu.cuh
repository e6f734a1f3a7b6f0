// SPDX-License-Identifier: MIT
#pragma once

#include <numbers>

#include <colt5/core/scalar.hpp>
#include <colt5/cuda/warp.cuh>
#include <colt5/expr/functors.hpp>

namespace colt5::cuda {

/// x · Φ(x), and its derivative Φ(x) + x φ(x), to the precision of numbers of type T.
template <typename T>
struct Gelu {
    using Sum = accumulate_t<T>;
    __device__ explicit Gelu(Sum x) : value(expr::scalar::gelu(x)), slope(expr::scalar::gelu_slope(x)) {}
    Sum value, slope;
};

/// With a = |x|: x Φ(x) = max(x, 0) − a Φ(−a), and Φ(−a) = exp(−a²/2) t P(t), t = 1 / (1 + 0.38 a), P fitted to a
/// relative error of 4e-5, a tenth of float16's.
template <HalfPrecision T>
struct Gelu<T> {
    __device__ explicit Gelu(float x) {
        const float a = ::fminf(::fabsf(x), 32.0f);  // beyond 32, Φ(−a) is 0; a NaN of x remains in `bell`
        float t, bell;
        asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(t) : "f"(::fmaf(0.38f, a, 1.0f)));
        asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(bell) : "f"(-0.72134752f * x * x));
        float p = -0.08992639f;
        p = ::fmaf(p, t, 0.18887252f);
        p = ::fmaf(p, t, 0.09198286f);
        p = ::fmaf(p, t, 0.15782826f);
        p = ::fmaf(p, t, 0.15122533f);
        const float tail = p * t * bell;  // Φ(−a)
        constexpr auto density = static_cast<float>(std::numbers::inv_sqrtpi / std::numbers::sqrt2);
        const float along = a * density * bell;  // a φ(a)
        value = ::fmaxf(x, 0.0f) - a * tail;
        slope = x > 0 ? 1.0f - tail + along : tail - along;
    }
    float value, slope;
};

/// y = gelu(x) for `size` numbers; y may be x.
template <typename T>
__global__ void gelu(T* y, const T* x, Index size, bool packed) {
    for_each_pack<pack_size<T>>(size, packed, [&](Index i, auto width) {
        auto pack = load_pack<width>(x + i);
        for (T& value : pack.values) value = static_cast<T>(Gelu<T>(static_cast<accumulate_t<T>>(value)).value);
        store_pack(y + i, pack);
    });
}
template <typename T>
void launch_gelu(const Cuda& policy, T* y, const T* x, Index size) {
    constexpr int threads = 256;
    launch(policy, "gelu", gelu<T>, blocks_for(divide_up(size, pack_size<T>), threads), threads, 0, y, x, size,
           fits_packs<T>(0, y, x));
}

}  // namespace colt5::cuda
