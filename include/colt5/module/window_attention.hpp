// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <cstddef>
#include <string>
#include <string_view>

#include <colt5/module/light_attention.hpp>

namespace colt5 {

/// A light branch for which a sequence is cut into windows of consecutive tokens: every token sees the tokens of its
/// own window (SelfAttention of the reference). To `attention`, windows are sequences.
///
/// RMSNorm → queries, keys and values → attention in each window → output projection; no biases in the projections.
template <typename Scalar, Policy P>
struct WindowAttention {
    using Attention = LightAttention<Scalar, P, false, RMSNorm>;
    using Activations = typename Attention::Activations;
    using Gradients = typename Attention::Gradients;

    Attention attention;
    Index window;  ///< tokens

    WindowAttention(const P& policy, SeedSequence& seeds, Index dim, Index heads, Index dim_head, Index window_)
        : attention(policy, seeds, dim, heads, dim_head, LocalAttention{.reach = window_}), window(window_) {}

    void expect_parameters(std::string_view prefix, Index dim) const { attention.expect_parameters(prefix, dim); }

    /// As LightAttention. Throws ValueError unless n is a multiple of the window.
    template <Viewable X>
    Activations forward(const P& policy, TokensView<Scalar> out, const X& x, Mask mask, bool save,
                        TokensView<const Scalar> residual = {}) const {
        expect_value(x.extent(1) % window == 0, "tokens", "a multiple of the window", x.extent(1));
        return attention.forward(policy, windows(out), windows(x.const_view()), windows(mask), save, windows(residual));
    }
    template <Viewable D, Viewable X, std::size_t updates = 0>
    void backward(const P& policy, const Activations& saved, TokensView<Scalar> d_x, const D& d_out, const X& x,
                  Mask mask, Gradients& gradients, GradientEpilogue<Scalar, P, updates> epilogue = {}) const {
        epilogue.d_residual = windows(epilogue.d_residual);
        for (auto& update : epilogue.rank_one) {
            expect_value(update.s.extent(1) == 1, "routes of s", "1", update.s.extent(1));
            update.s = update.s.reshape(std::array{update.s.size() / window, Index{1}, window});
        }
        attention.backward(policy, saved, windows(d_x), windows(d_out.const_view()), windows(x.const_view()),
                           windows(mask), gradients, epilogue);
    }

    template <typename F, typename... M>
    static void each_parameter(F&& f, const std::string& prefix, M&... m) {
        Attention::each_parameter(f, prefix, part(m)...);
    }

private:
    template <typename M>
    static auto& part(M& m) {
        if constexpr (requires { m.attention; })
            return m.attention;
        else
            return m;
    }
    /// (b, n, …) → (b · n / window, window, …); absent views stay absent.
    template <typename T, Index... Extents>
    auto windows(const View<T, dynamic, dynamic, Extents...>& x) const {
        using Out = View<T, dynamic, dynamic, Extents...>;
        auto shape = x.shape();
        shape[0] *= shape[1] / window;
        shape[1] = window;
        return Out::unchecked(x.data(), shape);
    }
};

}  // namespace colt5
