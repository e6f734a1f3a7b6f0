// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include <colt5/cpu/parallel.hpp>
#include <colt5/cpu/scratch.hpp>
#include <colt5/cpu/simd.hpp>
#include <colt5/op/sinkhorn.hpp>

namespace colt5 {

template <typename T>
void gumbel_noise_kernel(const Cpu& policy, TokensView<T> noise, Random random) {
    const Index rows = noise.extent(0), slots = noise.extent(1), length = noise.extent(2);
    parallel_for(policy, rows * slots, [&](Index task) {
        const Index row = task / slots, slot = task % slots;
        for (Index j = 0; j < length; ++j)
            noise(row, slot, j) = static_cast<T>(random.gumbel(gumbel_counter(row, slot, j)));
    });
}

namespace cpu {

/// z of one (sample, route), computed where it is read: (log-logit of the token + noise) / temperature.
template <typename T>
class SinkhornRow {
public:
    SinkhornRow(const Cpu& policy, TokensView<const T> logits, TokensView<const T> noise, Mask mask,
                const Sinkhorn& sinkhorn, Index row)
        : length_(logits.extent(2)),
          policy_(policy),
          log_logit_(policy, {length_}),
          noise_(noise ? noise[row].data() : nullptr),
          inverse_temperature_(static_cast<T>(1 / sinkhorn.temperature)) {
        const T* const s = logits.data() + row * length_;
        const bool* const real = mask ? mask[row / logits.extent(1)].data() : nullptr;
        for (Index j = 0; j < length_; ++j) {
            const bool is_real = real == nullptr || real[j];
            real_ += is_real ? 1 : 0;
            const T clamped = is_real ? std::max(s[j], static_cast<T>(sinkhorn_floor)) : static_cast<T>(sinkhorn_floor);
            log_logit_.data()[j] = is_real || sinkhorn.masked_tokens_take_part ? std::log(clamped) : -infinity;
        }
    }
    /// Slots that choose among the real tokens; the others are left over.
    Index slots(Index all, const Sinkhorn& sinkhorn) const {
        if (real_ == 0) return 0;
        return sinkhorn.masked_tokens_take_part ? all : std::min(all, real_);
    }

    Batch<T> z(Index slot, Index j, Index width) const {
        Batch<T> value = load(log_logit_.data() + j, width);
        if (noise_) value += load(noise_ + slot * length_ + j, width);
        return value * Batch<T>(inverse_temperature_);
    }

    /// u_i = log Σ_j exp(z_ij − v_j); v may be null (zeros)
    void slot_potentials(T* u, Index slots, const T* v) const {
        parallel_for(policy_, slots, [&](Index i) {
            const auto term = [&](Index j, Index width) {
                Batch<T> x = z(i, j, width);
                if (v) x -= load(v + j, width);
                return width < lanes<T> ? pad(x, width, -infinity) : x;
            };
            Batch<T> top(-infinity), sum(T(0));
            for_each_batch<T>(length_, [&](Index j, Index width) { top = xsimd::max(top, term(j, width)); });
            const T largest = reduce_max(top);
            if (largest == -infinity) {
                u[i] = T(0);
                return;
            }
            for_each_batch<T>(length_,
                              [&](Index j, Index width) { sum += cpu::exp(term(j, width) - Batch<T>(largest)); });
            u[i] = largest + std::log(reduce_add(sum));
        });
    }

    /// v_j = log Σ_i exp(z_ij − u_i); 0 for tokens that take no part
    void token_potentials(T* v, const T* u, Index slots) const {
        for_each_token_batch([&](Index j, Index width) {
            const Batch<T> none(-infinity);
            Batch<T> top = none, sum(T(0));
            for (Index i = 0; i < slots; ++i) top = xsimd::max(top, z(i, j, width) - Batch<T>(u[i]));
            top = xsimd::select(top == none, Batch<T>(T(0)), top);
            for (Index i = 0; i < slots; ++i) sum += cpu::exp(z(i, j, width) - Batch<T>(u[i]) - top);
            const Batch<T> value = xsimd::select(sum > Batch<T>(T(0)), top + cpu::log(sum), Batch<T>(T(0)));
            store(v + j, value, width);
        });
    }

    /// Σ over tokens of weight[j] exp(z_ij − u_i − v_j), for one slot
    T sum_over_tokens(Index i, const T* weight, T u, const T* v) const {
        Batch<T> sum(T(0));
        for_each_batch<T>(length_, [&](Index j, Index width) {
            const Batch<T> p = cpu::exp(z(i, j, width) - Batch<T>(u) - load(v + j, width));
            const Batch<T> term = load(weight + j, width) * p;
            sum += width < lanes<T> ? pad(term, width, T(0)) : term;
        });
        return reduce_add(sum);
    }

    /// out[j] = Σ over slots of weight[i] exp(z_ij − u_i − v_j); v may be null (zeros)
    void sum_over_slots(T* out, const T* weight, const T* u, const T* v, Index slots) const {
        for_each_token_batch([&](Index j, Index width) {
            const Batch<T> shift = v ? load(v + j, width) : Batch<T>(T(0));
            Batch<T> sum(T(0));
            for (Index i = 0; i < slots; ++i)
                sum = xsimd::fma(Batch<T>(weight[i]), cpu::exp(z(i, j, width) - Batch<T>(u[i]) - shift), sum);
            store(out + j, sum, width);
        });
    }

private:
    static constexpr T infinity = std::numeric_limits<T>::infinity();

    template <typename Body>
    void for_each_token_batch(Body&& body) const {
        constexpr Index block = 512;
        parallel_for(policy_, (length_ + block - 1) / block, [&](Index task) {
            const Index first = task * block;
            for_each_batch<T>(std::min(block, length_ - first), [&](Index j, Index width) { body(first + j, width); });
        });
    }

    Index length_;
    const Cpu& policy_;
    VectorTensor<T, Cpu> log_logit_;
    const T* noise_;
    T inverse_temperature_;
    Index real_ = 0;
};

}  // namespace cpu

template <typename T>
void sinkhorn_kernel(const Cpu& policy, TokensView<TokenIndex> indices, TokensView<T> scores,
                     View<T, dynamic, dynamic, dynamic, dynamic> slot_potential,
                     View<T, dynamic, dynamic, dynamic, dynamic> token_potential, TokensView<const T> logits,
                     TokensView<const T> noise, Mask mask, const Sinkhorn& sinkhorn) {
    const Index batch = logits.extent(0), routes = logits.extent(1), length = logits.extent(2);
    const Index steps = sinkhorn.n_iters;
    for (Index task = 0; task < batch * routes; ++task) {
        const Index b = task / routes, r = task % routes;
        const auto u = slot_potential[b][r], v = token_potential[b][r];
        const cpu::SinkhornRow<T> row(policy, logits, noise, mask, sinkhorn, task);
        const Index slots = row.slots(indices.extent(2), sinkhorn);
        if (slots < indices.extent(2)) {
            const bool* const real = mask[b].data();
            const auto masked = static_cast<TokenIndex>(std::find(real, real + length, false) - real);
            std::fill_n(indices[b][r].data() + slots, indices.extent(2) - slots, masked);
            std::fill_n(scores[b][r].data() + slots, indices.extent(2) - slots, T(0));
            std::fill_n(u.data(), u.size(), T(0));
            std::fill_n(v.data(), v.size(), T(0));
            if (slots == 0) continue;
        }
        for (Index t = 0; t < steps; ++t) {
            row.slot_potentials(u[t].data(), slots, t > 0 ? v[t - 1].data() : nullptr);
            row.token_potentials(v[t].data(), u[t].data(), slots);
        }
        const T *const last_u = u[steps - 1].data(), *const last_v = v[steps - 1].data();
        parallel_for(policy, slots, [&](Index i) {
            T* const p = cpu::thread_scratch<T, struct Transport>(length);
            cpu::for_each_batch<T>(length, [&](Index j, Index width) {
                const cpu::Batch<T> shift = cpu::Batch<T>(last_u[i]) + cpu::load(last_v + j, width);
                cpu::store(p + j, cpu::exp(row.z(i, j, width) - shift), width);
            });
            const auto is_real = [&](Index j) { return !mask || mask(b, j); };
            Index best = 0;
            while (!is_real(best)) ++best;  // a token in any case, even if the logits are no numbers
            for (Index j = best + 1; j < length; ++j)
                if (p[j] > p[best] && is_real(j)) best = j;
            indices(b, r, i) = static_cast<TokenIndex>(best);
            scores(b, r, i) = p[best];
        });
    }
}

template <typename T>
void sinkhorn_vjp_kernel(const Cpu& policy, TokensView<T> d_logits, TokensView<const T> d_scores,
                         TokensView<const TokenIndex> indices, TokensView<const T> scores,
                         View<const T, dynamic, dynamic, dynamic, dynamic> slot_potential,
                         View<const T, dynamic, dynamic, dynamic, dynamic> token_potential, TokensView<const T> logits,
                         TokensView<const T> noise, Mask mask, const Sinkhorn& sinkhorn) {
    const Index batch = logits.extent(0), routes = logits.extent(1), length = logits.extent(2);
    VectorTensor<T, Cpu> d_u(policy, {indices.extent(2)}), d_v(policy, {length}), d_v_before(policy, {length});
    for (Index task = 0; task < batch * routes; ++task) {
        const Index b = task / routes, r = task % routes;
        const auto u = slot_potential[b][r], v = token_potential[b][r];
        T* const d_log = d_logits[b][r].data();
        std::fill_n(d_log, length, T(0));
        const cpu::SinkhornRow<T> row(policy, logits, noise, mask, sinkhorn, task);
        const Index slots = row.slots(indices.extent(2), sinkhorn);
        if (slots == 0) continue;
        std::fill_n(d_v.data(), length, T(0));
        for (Index i = 0; i < slots; ++i) {  // P = exp(z − u − v) at the chosen token
            const TokenIndex j = indices(b, r, i);
            const T g = d_scores(b, r, i) * scores(b, r, i);
            d_log[j] += g;
            d_v.data()[j] -= g;
            d_u.data()[i] = -g;
        }
        for (Index t = sinkhorn.n_iters - 1; t >= 0; --t) {
            // v_j = log Σ_i exp(z_ij − u_i): the weights of one token sum to 1
            parallel_for(policy, slots,
                         [&](Index i) { d_u.data()[i] -= row.sum_over_tokens(i, d_v.data(), u(t, i), v[t].data()); });
            for (Index j = 0; j < length; ++j) d_log[j] += d_v.data()[j];
            // u_i = log Σ_j exp(z_ij − v_j) of the iteration before
            row.sum_over_slots(d_v_before.data(), d_u.data(), u[t].data(), t > 0 ? v[t - 1].data() : nullptr, slots);
            for (Index j = 0; j < length; ++j) {
                d_log[j] += d_v_before.data()[j];
                d_v.data()[j] = -d_v_before.data()[j];
            }
            std::fill_n(d_u.data(), slots, T(0));
        }
        for (Index j = 0; j < length; ++j) {
            const T s = logits(b, r, j);
            const bool passes = (!mask || mask(b, j)) && s >= static_cast<T>(sinkhorn_floor);
            d_log[j] = passes ? d_log[j] / (s * static_cast<T>(sinkhorn.temperature)) : T(0);
        }
    }
}

}  // namespace colt5
