// SPDX-License-Identifier: MIT
// What each library of this example holds, compiled for one instruction set: a block behind a C function, and nothing
// of colt5 in the interface.
#include <colt5/colt5.hpp>

#include <algorithm>
#include <cstddef>
#include <exception>

namespace {
constexpr colt5::TransformerBlockConfig config{
    .dim = 128, .num_heavy_attn_tokens_q = 64, .num_heavy_attn_tokens_kv = 64, .num_heavy_ff_tokens = 64};
}  // namespace

/// out (n, 128) = block(tokens (n, 128)); the parameters are those of seed 0. False if that failed. One call at a time:
/// all use one policy.
extern "C" [[gnu::visibility("default")]] bool run_block(const float* tokens, std::ptrdiff_t n, float* out) noexcept {
    try {
        using namespace colt5;
        static const ConditionalRoutedTransformerBlock<config, float, Cpu> block{Cpu(), Seed{0}};
        const auto result = block(TokensView<const float>(tokens, {1, n, config.dim}));
        std::copy_n(result.data(), result.size(), out);
        return true;
    } catch (const std::exception&) {
        return false;
    }
}
