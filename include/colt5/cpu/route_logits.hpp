// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>

#include <colt5/core/norm.hpp>
#include <colt5/cpu/parallel.hpp>
#include <colt5/cpu/partial_sums.hpp>
#include <colt5/cpu/simd.hpp>
#include <colt5/op/route_logits.hpp>

namespace colt5 {

template <typename T>
void route_logits_kernel(const Cpu& policy, TokensView<T> logits, TokensView<const T> x, MatrixView<const T> token,
                         T scale) {
    const Index batch = logits.extent(0), routes = logits.extent(1), length = logits.extent(2);
    cpu::for_each_row_chunk(policy, batch * length, [&](Index, Index begin, Index end) {
        for (Index row = begin; row < end; ++row)
            for (Index r = 0; r < routes; ++r)
                logits(row / length, r, row % length) =
                    scale * cpu::dot(x[row / length][row % length].data(), token[r].data(), x.extent(2));
    });
}

template <typename T>
void route_logits_vjp_kernel(const Cpu& policy, TokensView<T> d_x, MatrixView<T> d_token, TokensView<const T> d_logits,
                             TokensView<const T> x, MatrixView<const T> token, T scale) {
    using cpu::load, cpu::store;
    using Batch = cpu::Batch<T>;
    const Index batch = d_logits.extent(0), routes = d_logits.extent(1), length = d_logits.extent(2);
    const Index d = x.extent(2);
    cpu::PartialSums<T> sums(policy, cpu::row_chunks(batch * length), routes * d);
    cpu::for_each_row_chunk(policy, batch * length, [&](Index chunk, Index begin, Index end) {
        for (Index row = begin; row < end; ++row)
            for (Index r = 0; r < routes; ++r) {
                const T s = scale * d_logits(row / length, r, row % length);
                if (s == T(0)) continue;
                const T* const in = x.data() + row * d;
                T *const out = d_x.data() + row * d, *const part = sums[chunk][0] + r * d;
                cpu::for_each_batch<T>(d, [&](Index j, Index width) {
                    store(out + j, xsimd::fma(Batch(s), load(token[r].data() + j, width), load(out + j, width)), width);
                    store(part + j, xsimd::fma(Batch(s), load(in + j, width), load(part + j, width)), width);
                });
            }
    });
    sums.add_to({VectorView<T>(d_token.data(), {routes * d})});
}

namespace cpu {

/// a · b / (‖a‖ ‖b‖). Where the inner product overflows, that of the scaled vectors does not.
template <typename T>
T cosine(const T* a, const T* b, Index d, T norm_a, T norm_b) {
    const T product = dot(a, b, d);
    if (std::isfinite(product)) return product / norm_a / norm_b;
    const Batch<T> unit(scale_of_large<T>);
    Batch<T> total(T(0));
    for_each_batch<T>(d, [&](Index j, Index width) {
        total = xsimd::fma(load(a + j, width) * unit, load(b + j, width) * unit, total);
    });
    return reduce_add(total) / (norm_a * scale_of_large<T>) / (norm_b * scale_of_large<T>);
}

}  // namespace cpu

template <typename T>
void cosine_logits_kernel(const Cpu& policy, TokensView<T> logits, MatrixView<T> norms, TokensView<const T> x,
                          MatrixView<const T> token, VectorView<const T> token_norms, T scale) {
    using cpu::load;
    const Index batch = logits.extent(0), routes = logits.extent(1), length = logits.extent(2), d = x.extent(2);
    cpu::for_each_row_chunk(policy, batch * length, [&](Index, Index begin, Index end) {
        for (Index row = begin; row < end; ++row) {
            const T* const in = x.data() + row * d;
            T norm = std::sqrt(cpu::dot(in, in, d));
            if (!std::isfinite(norm)) {
                cpu::Batch<T> squares(T(0));
                cpu::for_each_batch<T>(d, [&](Index j, Index width) {
                    const auto scaled = load(in + j, width) * cpu::Batch<T>(scale_of_large<T>);
                    squares = xsimd::fma(scaled, scaled, squares);
                });
                norm = std::sqrt(cpu::reduce_add(squares)) / scale_of_large<T>;
            }
            norm = std::max(norm, static_cast<T>(cosine_norm_floor));  // NaN stays NaN
            norms.data()[row] = norm;
            for (Index r = 0; r < routes; ++r)
                logits(row / length, r, row % length) =
                    scale * cpu::cosine(in, token[r].data(), d, norm, token_norms(r));
        }
    });
}

template <typename T>
void cosine_logits_vjp_kernel(const Cpu& policy, TokensView<T> d_x, MatrixView<T> d_token, TokensView<const T> d_logits,
                              TokensView<const T> logits, MatrixView<const T> norms, TokensView<const T> x,
                              MatrixView<const T> token, VectorView<const T> token_norms, T scale) {
    const Index batch = d_logits.extent(0), routes = d_logits.extent(1), length = d_logits.extent(2);
    const Index d = x.extent(2);
    cpu::PartialSums<T> sums(policy, cpu::row_chunks(batch * length), routes * d);
    cpu::for_each_row_chunk(policy, batch * length, [&](Index chunk, Index begin, Index end) {
        for (Index row = begin; row < end; ++row) {
            const T norm = norms.data()[row];
            const T* const in = x.data() + row * d;
            T* const out = d_x.data() + row * d;
            T along = 0;
            for (Index r = 0; r < routes; ++r) {
                const T ds = d_logits(row / length, r, row % length);
                if (ds == T(0)) continue;
                const T s = scale * ds / norm / token_norms(r);
                cpu::add_row(out, token[r].data(), d, s);
                cpu::add_row(sums[chunk][0] + r * d, in, d, s);
                along += ds * logits(row / length, r, row % length) / norm / norm;
            }
            if (along != T(0) && norm > static_cast<T>(cosine_norm_floor)) cpu::add_row(out, in, d, -along);
        }
    });
    sums.add_to({VectorView<T>(d_token.data(), {routes * d})});
}

}  // namespace colt5
