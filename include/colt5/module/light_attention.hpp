// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>

#include <colt5/module/layers.hpp>
#include <colt5/op/local_attention.hpp>

namespace colt5 {

/// The light branch of attention: every token sees the tokens around it (LocalMHA of the package local-attention).
///
/// LayerNorm → queries, keys and values → local attention → output projection; no biases in the projections.
template <typename Scalar, Policy P>
struct LightAttention {
    LayerNorm<Scalar, P> norm;
    Linear<Scalar, P> to_qkv, to_out;
    Index heads, dim_head;
    LocalAttention attention;

    struct Gradients {
        LayerNorm<accumulate_t<Scalar>, P> norm;
        Linear<accumulate_t<Scalar>, P> to_qkv, to_out;
    };
    struct Pass {
        TokensTensor<Scalar, P> out;  // (b, n, d)
        TokensTensor<Scalar, P> qkv;  // (b, n, 3 · h · dim_head)
        LocalAttentionPass<Scalar, P> attention;
    };

    LightAttention(const P& policy, SeedSequence& seeds, Index dim, Index heads_, Index dim_head_,
                   LocalAttention attention_)
        : norm(policy, dim),
          to_qkv(policy, seeds, dim, 3 * heads_ * dim_head_, false),
          to_out(policy, seeds, heads_ * dim_head_, dim, false),
          heads(heads_),
          dim_head(dim_head_),
          attention(attention_) {}

    template <Viewable X>
    TokensTensor<Scalar, P> operator()(const P& policy, const X& x, Mask mask) const {
        const auto qkv = to_qkv(policy, norm(policy, x));                            // (b, n, 3 · h · dim_head)
        const auto attended = local_attention(policy, attention, split(qkv), mask);  // (b, n, h, dim_head)
        return to_out(policy, merge(attended));                                      // (b, n, d)
    }

    template <Viewable X>
    Pass forward(const P& policy, const X& x, Mask mask) const {
        auto qkv = to_qkv(policy, norm(policy, x));                                    // (b, n, 3 · h · dim_head)
        auto attended = local_attention_forward(policy, attention, split(qkv), mask);  // (b, n, h, dim_head)
        auto out = to_out(policy, merge(attended.out));                                // (b, n, d)
        return {std::move(out), std::move(qkv), std::move(attended)};
    }

    template <Viewable D, Viewable X>
    TokensTensor<Scalar, P> backward(const P& policy, const Pass& pass, const D& d_out, const X& x, Mask mask,
                                     Gradients& gradients) const {
        auto d_x = tensor_like(policy, x);
        // The gradient of queries, keys and values is three times as large as any other tensor: some sequences at a
        // time.
        const Index batch = x.extent(0), group = std::max(Index{1}, tokens_at_a_time / std::max(Index{1}, x.extent(1)));
        for (Index first = 0; first < batch; first += group) {
            const auto part = [&](const auto& t) { return t.view().range(first, std::min(group, batch - first)); };
            const auto attended = part(pass.attention.out);
            auto d_attended = to_out.backward(policy, part(d_out), merge(attended), gradients.to_out);
            auto d_qkv = local_attention_vjp(policy, attention, attended, part(pass.attention.log_sum_exp),
                                             split_heads(d_attended), split(part(pass.qkv)), part(mask));
            d_attended = {};  // what is not read any more gives its memory to what follows
            const auto d_normed = to_qkv.backward(policy, merge(d_qkv), norm(policy, part(x)), gradients.to_qkv);
            d_qkv = {};
            norm.backward(policy, part(d_x.view()), d_normed, part(x), gradients.norm);
        }
        return d_x;
    }

    template <typename F, typename... M>
    static void each_parameter(F&& f, const std::string& prefix, M&... m) {
        LayerNorm<Scalar, P>::each_parameter(f, prefix + "norm.", m.norm...);
        Linear<Scalar, P>::each_parameter(f, prefix + "to_qkv.", m.to_qkv...);
        Linear<Scalar, P>::each_parameter(f, prefix + "to_out.", m.to_out...);
    }

private:
    static constexpr Index tokens_at_a_time = 16384;

    template <typename T>
    auto split(const T& qkv) const {  // (b, n, 3, h, dim_head)
        return qkv.view().reshape(std::array<Index, 5>{qkv.extent(0), qkv.extent(1), 3, heads, dim_head});
    }
    template <typename T>
    auto split_heads(const T& x) const {  // (b, n, h, dim_head)
        return x.view().reshape(std::array<Index, 4>{x.extent(0), x.extent(1), heads, dim_head});
    }
    template <typename T>
    static auto merge(const T& x) {  // (b, n, …) → (b, n, all the rest)
        Index width = 1;
        for (std::size_t axis = 2; axis < T::rank; ++axis) width *= x.extent(axis);
        return x.view().reshape(std::array<Index, 3>{x.extent(0), x.extent(1), width});
    }
};

}  // namespace colt5
