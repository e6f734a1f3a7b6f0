// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <concepts>
#include <functional>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>

#include <colt5/core/error.hpp>
#include <colt5/core/view.hpp>
#include <colt5/module/config.hpp>

/// Numbers of routed tokens that follow the length of a sequence.
namespace colt5 {

/// A part of the tokens of a sequence: ⌊ratio · length⌋ of them, computed in double, but at least 1.
struct TokenRatio {
    double ratio;

    /// Throws ValueError unless 0 < ratio ≤ 1.
    Index operator()(Index length) const {
        expect_value(ratio > 0 && ratio <= 1, "ratio", "> 0 and <= 1", ratio);
        return std::max(Index{1}, static_cast<Index>(ratio * static_cast<double>(length)));
    }
};

/// A number of routed tokens: what the configuration says (default-constructed), a number, a TokenRatio, or any other
/// function `Index(Index length)` of the number of real tokens of a sequence. A sequence that has fewer tokens routes
/// all of them, as in any call of a module.
class TokenCount {
public:
    TokenCount() = default;
    template <std::integral Integer>
    TokenCount(Integer count)  // NOLINT: converts
        : of_([count](Index) { return static_cast<Index>(count); }) {}
    template <std::floating_point F>
    TokenCount(F) = delete;  // a part of the tokens is TokenRatio{part}
    template <typename F>
    requires std::is_invocable_r_v<Index, const F&, Index> TokenCount(F of)  // NOLINT: converts
        : of_(std::move(of)) {}

    /// For a sequence of `length` tokens; no number if the configuration decides, or if there is no token. Throws a
    /// ValueError that calls it `name` when it is below 1.
    std::optional<Index> operator()(const char* name, Index length) const {
        if (!of_ || length == 0) return {};
        const Index count = of_(length);
        if (count < 1)
            expect_value(false, name, detail::concat({">= 1 for a sequence of ", value_string(length), " tokens"}),
                         count);
        return count;
    }

private:
    std::function<Index(Index)> of_;
};

/// The numbers of tokens of a call, each a TokenCount, under the names that they have in Counts: a function of the
/// length of a sequence that returns a Counts, the struct that a module takes.
template <typename Counts>
struct CountsByLength {  // of a module of your own: what is configured
    template <std::same_as<Index>... Lengths>
    Counts operator()(Lengths...) const {
        return {};
    }
};

template <>
struct CountsByLength<RoutedCounts> {
    TokenCount num_heavy_tokens{};

    RoutedCounts operator()(Index length) const { return {num_heavy_tokens("num_heavy_tokens", length)}; }
};
template <>
struct CountsByLength<AttentionCounts> {
    TokenCount num_heavy_tokens_q{}, num_heavy_tokens_kv{};

    AttentionCounts operator()(Index length) const {
        return {num_heavy_tokens_q("num_heavy_tokens_q", length), num_heavy_tokens_kv("num_heavy_tokens_kv", length)};
    }
};
template <>
struct CountsByLength<TransformerBlockCounts> {
    TokenCount num_heavy_attn_tokens_q{}, num_heavy_attn_tokens_kv{}, num_heavy_ff_tokens{};

    TransformerBlockCounts operator()(Index length) const {
        return {num_heavy_attn_tokens_q("num_heavy_attn_tokens_q", length),
                num_heavy_attn_tokens_kv("num_heavy_attn_tokens_kv", length),
                num_heavy_ff_tokens("num_heavy_ff_tokens", length)};
    }
};
/// num_tokens_q depends on the length of x, num_tokens_kv on that of the context.
template <>
struct CountsByLength<CrossAttentionCounts> {
    TokenCount num_tokens_q{}, num_tokens_kv{};

    CrossAttentionCounts operator()(Index length, Index context_length) const {
        return {num_tokens_q("num_tokens_q", length), num_tokens_kv("num_tokens_kv", context_length)};
    }
};

}  // namespace colt5
