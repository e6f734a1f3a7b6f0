// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include <colt5/cpu/gather.hpp>
#include <colt5/cpu/nan_row.hpp>
#include <colt5/cpu/parallel.hpp>
#include <colt5/cpu/simd.hpp>
#include <colt5/op/sinkhorn.hpp>

namespace colt5 {

template <typename T>
void gumbel_noise_kernel(const Cpu& policy, TokensView<T> noise, Random random, GumbelRows which) {
    const Index rows = noise.extent(0), slots = noise.extent(1), length = noise.extent(2);
    parallel_for(policy, rows * slots, [&](Index task) {
        const Index row = task / slots, slot = task % slots;
        for (Index j = 0; j < length; ++j) noise(row, slot, j) = static_cast<T>(gumbel_of(random, which[row], slot, j));
    });
}

namespace cpu {

/// z of one (sample, route), computed where it is read: (log-logit of the token + noise) / temperature. In double,
/// whatever the logits are: see SinkhornActivations.
template <typename T>
class SinkhornRow {
public:
    SinkhornRow(const Cpu& policy, TokensView<const T> logits, TokensView<const T> noise, Mask mask,
                const Sinkhorn& sinkhorn, Index row)
        : length_(logits.extent(2)),
          policy_(policy),
          log_logit_(policy, {length_}),
          noise_(noise ? noise[row].data() : nullptr),
          inverse_temperature_(1 / sinkhorn.temperature) {
        const T* const s = logits.data() + row * length_;
        const bool* const real = mask ? mask[row / logits.extent(1)].data() : nullptr;
        for (Index j = 0; j < length_; ++j) {
            const bool is_real = real == nullptr || real[j];
            real_ += is_real ? 1 : 0;
            has_nan_ = has_nan_ || (is_real && std::isnan(s[j]));
            const double clamped =
                is_real ? std::clamp(static_cast<double>(s[j]), sinkhorn_floor, sinkhorn_ceiling) : sinkhorn_floor;
            log_logit_.data()[j] = is_real || sinkhorn.masked_tokens_take_part ? std::log(clamped) : -infinity;
        }
    }
    /// Slots that choose among the real tokens; the others are left over. At most `most` of them, if that is given.
    Index slots(Index all, const Sinkhorn& sinkhorn, const TokenIndex* most) const {
        if (real_ == 0) return 0;
        if (most != nullptr) all = std::min(all, static_cast<Index>(*most));
        return sinkhorn.masked_tokens_take_part ? all : std::min(all, real_);
    }

    /// A real logit is NaN.
    bool has_nan() const { return has_nan_; }

    Batch<double> z(Index slot, Index j, Index width) const {
        Batch<double> value = load(log_logit_.data() + j, width);
        if (noise_) value += load_double(noise_ + slot * length_ + j, width);
        return value * Batch<double>(inverse_temperature_);
    }

    /// u_i = log Σ_j exp(z_ij − v_j); v may be null (zeros)
    void slot_potentials(double* u, Index slots, const double* v) const {
        parallel_for(policy_, slots, [&](Index i) {
            const auto term = [&](Index j, Index width) {
                Batch<double> x = z(i, j, width);
                if (v) x -= load(v + j, width);
                return width < lanes<double> ? pad(x, width, -infinity) : x;
            };
            Batch<double> top(-infinity), sum(0.0);
            for_each_batch<double>(length_, [&](Index j, Index width) { top = xsimd::max(top, term(j, width)); });
            const double largest = reduce_max(top);
            if (largest == -infinity) {
                u[i] = 0.0;
                return;
            }
            for_each_batch<double>(
                length_, [&](Index j, Index width) { sum += cpu::exp(term(j, width) - Batch<double>(largest)); });
            u[i] = largest + std::log(reduce_add(sum));
        });
    }

    /// v_j = log Σ_i exp(z_ij − u_i); 0 for tokens that take no part
    void token_potentials(double* v, const double* u, Index slots) const {
        for_each_token_batch([&](Index j, Index width) {
            const Batch<double> none(-infinity);
            Batch<double> top = none, sum(0.0);
            for (Index i = 0; i < slots; ++i) top = xsimd::max(top, z(i, j, width) - Batch<double>(u[i]));
            top = xsimd::select(top == none, Batch<double>(0.0), top);
            for (Index i = 0; i < slots; ++i) sum += cpu::exp(z(i, j, width) - Batch<double>(u[i]) - top);
            const Batch<double> value =
                xsimd::select(sum > Batch<double>(0.0), top + cpu::log(sum), Batch<double>(0.0));
            store(v + j, value, width);
        });
    }

    /// Σ over tokens of weight[j] exp(z_ij − u_i − v_j), for one slot
    double sum_over_tokens(Index i, const double* weight, double u, const double* v) const {
        Batch<double> sum(0.0);
        for_each_batch<double>(length_, [&](Index j, Index width) {
            const Batch<double> p = cpu::exp(z(i, j, width) - Batch<double>(u) - load(v + j, width));
            const Batch<double> term = load(weight + j, width) * p;
            sum += width < lanes<double> ? pad(term, width, 0.0) : term;
        });
        return reduce_add(sum);
    }

    /// out[j] = Σ over slots of weight[i] exp(z_ij − u_i − v_j); v may be null (zeros)
    void sum_over_slots(double* out, const double* weight, const double* u, const double* v, Index slots) const {
        for_each_token_batch([&](Index j, Index width) {
            const Batch<double> shift = v ? load(v + j, width) : Batch<double>(0.0);
            Batch<double> sum(0.0);
            for (Index i = 0; i < slots; ++i)
                sum = xsimd::fma(Batch<double>(weight[i]), cpu::exp(z(i, j, width) - Batch<double>(u[i]) - shift), sum);
            store(out + j, sum, width);
        });
    }

private:
    static constexpr double infinity = std::numeric_limits<double>::infinity();

    static Batch<double> load_double(const T* from, Index count) {
        detail::Lanes<double> lane{};
        if (count == lanes<double>)
            std::copy_n(from, lanes<double>, lane.values);
        else
            std::copy_n(from, count, lane.values);
        return Batch<double>::load_aligned(lane.values);
    }

    template <typename Body>
    void for_each_token_batch(Body&& body) const {
        constexpr Index block = 512;
        parallel_for(policy_, divide_up(length_, block), [&](Index task) {
            const Index first = task * block;
            for_each_batch<double>(std::min(block, length_ - first),
                                   [&](Index j, Index width) { body(first + j, width); });
        });
    }

    Index length_;
    const Cpu& policy_;
    VectorTensor<double, Cpu> log_logit_;
    const T* noise_;
    double inverse_temperature_;
    Index real_ = 0;
    bool has_nan_ = false;
};

}  // namespace cpu

template <typename T>
void sinkhorn_kernel(const Cpu& policy, TokensView<TokenIndex> indices, TokensView<T> scores,
                     View<double, dynamic, dynamic, dynamic, dynamic> slot_potential,
                     View<double, dynamic, dynamic, dynamic, dynamic> token_potential, TokensView<const T> logits,
                     TokensView<const T> noise, Mask mask, const Sinkhorn& sinkhorn,
                     VectorView<const TokenIndex> slots_of_sample) {
    const Index batch = logits.extent(0), routes = logits.extent(1), length = logits.extent(2);
    const Index steps = sinkhorn.n_iters;
    for (Index task = 0; task < batch * routes; ++task) {
        const Index b = task / routes, r = task % routes;
        const auto u = slot_potential[b][r], v = token_potential[b][r];
        const cpu::SinkhornRow<T> row(policy, logits, noise, mask, sinkhorn, task);
        const Index slots = row.slots(indices.extent(2), sinkhorn, slots_of_sample ? &slots_of_sample[b] : nullptr);
        if (slots < indices.extent(2)) {
            const bool* const real = mask ? mask[b].data() : nullptr;
            const Index none = mask ? std::find(real, real + length, false) - real : length;
            const auto masked = static_cast<TokenIndex>(std::min(none, length - 1));
            std::fill_n(indices[b][r].data() + slots, indices.extent(2) - slots, masked);
            std::fill_n(scores[b][r].data() + slots, indices.extent(2) - slots, T(0));
            std::fill_n(u.data(), u.size(), 0.0);
            std::fill_n(v.data(), v.size(), 0.0);
            if (slots == 0) continue;
        }
        if (row.has_nan()) {
            constexpr double nan = std::numeric_limits<double>::quiet_NaN();
            const Index first = mask ? std::find(mask[b].data(), mask[b].data() + length, true) - mask[b].data() : 0;
            std::fill_n(indices[b][r].data(), slots, static_cast<TokenIndex>(first));
            std::fill_n(scores[b][r].data(), slots, static_cast<T>(nan));
            std::fill_n(u.data(), u.size(), nan);
            std::fill_n(v.data(), v.size(), nan);
            continue;
        }
        for (Index t = 0; t < steps; ++t) {
            row.slot_potentials(u[t].data(), slots, t > 0 ? v[t - 1].data() : nullptr);
            row.token_potentials(v[t].data(), u[t].data(), slots);
        }
        const double *const last_u = u[steps - 1].data(), *const last_v = v[steps - 1].data();
        parallel_for(policy, slots, [&](Index i) {
            double* const p = cpu::thread_scratch<double, struct Transport>(length);
            cpu::for_each_batch<double>(length, [&](Index j, Index width) {
                const cpu::Batch<double> shift = cpu::Batch<double>(last_u[i]) + cpu::load(last_v + j, width);
                cpu::store(p + j, cpu::exp(row.z(i, j, width) - shift), width);
            });
            const auto is_real = [&](Index j) { return !mask || mask(b, j); };
            Index best = 0;
            while (!is_real(best)) ++best;  // a token in any case, even if the noise is no number
            for (Index j = best + 1; j < length; ++j)
                if (p[j] > p[best] && is_real(j)) best = j;
            indices(b, r, i) = static_cast<TokenIndex>(best);
            scores(b, r, i) = static_cast<T>(p[best]);
        });
    }
}

template <typename T>
void sinkhorn_vjp_kernel(const Cpu& policy, TokensView<T> d_logits, TokensView<const T> d_scores,
                         TokensView<const TokenIndex> indices, TokensView<const T> scores,
                         View<const double, dynamic, dynamic, dynamic, dynamic> slot_potential,
                         View<const double, dynamic, dynamic, dynamic, dynamic> token_potential,
                         TokensView<const T> logits, TokensView<const T> noise, Mask mask, const Sinkhorn& sinkhorn,
                         VectorView<const TokenIndex> slots_of_sample) {
    const Index batch = logits.extent(0), routes = logits.extent(1), length = logits.extent(2);
    cpu::check_indices(indices, length);
    VectorTensor<double, Cpu> d_log_z(policy, {length}), d_u(policy, {indices.extent(2)}), d_v(policy, {length}),
        d_v_before(policy, {length});
    for (Index task = 0; task < batch * routes; ++task) {
        const Index b = task / routes, r = task % routes;
        const auto u = slot_potential[b][r], v = token_potential[b][r];
        double* const d_log = d_log_z.data();
        std::fill_n(d_log, length, 0.0);
        const cpu::SinkhornRow<T> row(policy, logits, noise, mask, sinkhorn, task);
        const Index slots = row.slots(indices.extent(2), sinkhorn, slots_of_sample ? &slots_of_sample[b] : nullptr);
        if (row.has_nan()) {
            cpu::fill_nan_row(d_logits[b][r].data(), length, mask ? mask[b].data() : nullptr);
            continue;
        }
        std::fill_n(d_v.data(), length, 0.0);
        for (Index i = 0; i < slots; ++i) {  // P = exp(z − u − v) at the chosen token
            const TokenIndex j = indices(b, r, i);
            const double g = static_cast<double>(d_scores(b, r, i)) * static_cast<double>(scores(b, r, i));
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
            std::fill_n(d_u.data(), slots, 0.0);
        }
        for (Index j = 0; j < length; ++j) {
            const auto s = static_cast<double>(logits(b, r, j));
            const bool passes = (!mask || mask(b, j)) && s >= sinkhorn_floor;
            d_logits(b, r, j) = passes ? static_cast<T>(d_log[j] / (s * sinkhorn.temperature)) : T(0);
        }
    }
}

}  // namespace colt5
