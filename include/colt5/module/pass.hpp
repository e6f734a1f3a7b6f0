// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include <colt5/core/error.hpp>
#include <colt5/core/tensor.hpp>

namespace colt5 {

/// What backward asks of a pass before it reads it: that forward of the same module returned it, and that nobody has
/// used it up. In a program that is compiled with COLT5_CHECK_TOKENS defined, also that the tokens are as they were: a
/// copy of them to the host and one pass over it in each forward and backward.
class PassOrigin {
public:
    PassOrigin() = default;
    /// `module` is the memory of one of its parameters, which stays where it is when the module moves.
    template <Policy P, Viewable... Tokens>
    PassOrigin(const P& policy, const void* module, const Tokens&... tokens)
        : module_(module), tokens_(checksum(policy, tokens...)) {}
    PassOrigin(PassOrigin&& other) noexcept : module_(std::exchange(other.module_, nullptr)), tokens_(other.tokens_) {}
    PassOrigin& operator=(PassOrigin&& other) noexcept {
        module_ = std::exchange(other.module_, nullptr);
        tokens_ = other.tokens_;
        return *this;
    }

    /// Throws ValueError.
    template <Policy P, Viewable... Tokens>
    void expect(const P& policy, const void* module, const Tokens&... tokens) const {
        expect_value(module_ != nullptr, "pass", "what forward returned",
                     "used up: it was handed to backward, or moved from");
        expect_value(module_ == module, "pass", "of this module", "of another one of its type");
        expect_value(tokens_ == checksum(policy, tokens...), "tokens", "what forward was given", "changed since");
    }

private:
    template <Policy P, Viewable... Tokens>
    static std::uint64_t checksum([[maybe_unused]] const P& policy, [[maybe_unused]] const Tokens&... tokens) {
        std::uint64_t sum = 0;
#if defined(COLT5_CHECK_TOKENS)
        const auto add = [&](const auto& values) {
            for (const auto& value : values) {
                std::uint64_t bits = 0;
                std::memcpy(&bits, &value, sizeof(value));
                sum = (sum ^ bits) * 0x100000001B3 + 1;  // as FNV-1a, by elements
            }
        };
        (add(to_host(policy, tokens)), ...);
#endif
        return sum;
    }

    const void* module_ = nullptr;
    std::uint64_t tokens_ = 0;
};

/// Throws ValueError if `d_out` is the output of a pass that is handed over, which frees it.
template <Viewable D, Viewable Out>
void expect_not_output(const D& d_out, const Out& out) {
    const void *const of_d = d_out.const_view().data(), *const of_out = out.const_view().data();
    expect_value(of_d == nullptr || of_d != of_out, "d_out", "another tensor than the output of the pass handed over",
                 "that output");
}

}  // namespace colt5
