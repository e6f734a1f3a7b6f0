// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <iterator>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <colt5/core/tensor.hpp>
#include <colt5/schedule/next_tokens.hpp>

/// Decoding: a causal module computes sequences a few tokens at a time. What later tokens read of earlier ones is in a
/// cache, so that no token is computed twice.
///
///     auto cache = module.make_cache(batch, max_length);
///     const auto out = module.decode(cache, tokens);         // (b, m, d): the next m tokens of each sequence
///     const auto more = module.decode(cache, some, {3, 0});  // 3 tokens of the first sequence, none of the second
///
/// Together the outputs are those of the module for the whole sequences: see `decode` of ModuleBase.
namespace colt5 {

/// For a part that has no state: no tensors.
struct NoDecodeState {
    template <typename F, typename... States>
    static void each_tensor(F&&, const std::string&, States&...) {}
};

namespace detail {
template <typename M>
struct DecodeStateOf {
    using type = NoDecodeState;
};
template <typename M>
requires requires {
    typename M::DecodeState;
}
struct DecodeStateOf<M> {
    using type = typename M::DecodeState;
};
}  // namespace detail

/// What decode keeps of the tokens so far, for a module or a part of one: M::DecodeState, or NoDecodeState.
template <typename M>
using DecodeStateOf = typename detail::DecodeStateOf<M>::type;

namespace detail {
/// The bytes of the tensors of a state, which has each_tensor.
template <typename State>
Index bytes_of(const State& state) {
    Index bytes = 0;
    State::each_tensor([&](const std::string&,
                           const auto& tensor) { bytes += tensor.size() * static_cast<Index>(sizeof(*tensor.data())); },
                       "", state);
    return bytes;
}
}  // namespace detail

/// The cache of a module: what decode keeps of the tokens so far. Its tensors take bytes(), which `cache_bytes` of the
/// module says beforehand, and do not grow. Move-only.
template <typename Module>
class Cache {
    using P = typename Module::Out::PolicyType;

public:
    typename Module::DecodeState state;

    /// For `batch` sequences, all empty; `make_decode_state` of the module takes `more`. Throws ValueError when `batch`
    /// or `max_length` is less than 1.
    template <typename... More>
    Cache(const Module& module, Index batch, Index max_length, const More&... more) : max_length_(max_length) {
        expect_value(batch >= 1, "batch", ">= 1", batch);
        expect_value(max_length >= 1, "max_length", ">= 1", max_length);
        expect_length("max_length", max_length);
        lengths_.assign(static_cast<std::size_t>(batch), 0);
        state = module.make_decode_state(batch, max_length, more...);
    }
    Cache(Cache&&) noexcept = default;
    Cache& operator=(Cache&&) noexcept = default;

    Index batch() const { return static_cast<Index>(lengths_.size()); }
    /// The largest length of a sequence.
    Index max_length() const { return max_length_; }
    /// How many tokens each sequence has.
    const std::vector<Index>& lengths() const { return lengths_; }
    /// False after a call of decode that threw halfway: then the cache cannot be used any more.
    bool is_whole() const { return is_whole_; }
    Index bytes() const { return detail::bytes_of(state); }

    /// The NextTokens of a call with `width` tokens per sequence. The first lengths[b] are real; without lengths, all
    /// are. Valid until the next call. Throws ValueError, with the lengths of the cache unchanged, if they do not fit.
    const NextTokens<P>& next(const P& policy, Index width, std::span<const Index> lengths) {
        expect_value(is_whole_, "cache", "as a call of decode left it", "half-written: that call threw an exception");
        if (!lengths.empty() && std::ssize(lengths) != batch())
            expect_value(false, "lengths", detail::concat({"one number a sequence, ", value_string(batch())}),
                         std::ssize(lengths));
        next_.past = lengths_;
        next_.counts.assign(lengths_.size(), width);
        std::copy(lengths.begin(), lengths.end(), next_.counts.begin());
        next_.real = {};
        bool all_real = true;
        for (Index b = 0; b < batch(); ++b) {
            const Index count = next_.count_of(b), length = next_.past_of(b) + count;
            if (count < 0 || count > width)
                expect_value(false, element("lengths", b),
                             detail::concat({"between 0 and the ", value_string(width), " tokens that are given"}),
                             count);
            if (length > max_length_)
                expect_value(false, element("length of sequence", b),
                             detail::concat({"at most ", value_string(max_length_), ", for which the cache was made"}),
                             length);
            all_real = all_real && count == width;
        }
        if (all_real) return next_;
        real_.clear();
        for (Index b = 0; b < batch(); ++b)
            for (Index i = 0; i < width; ++i) real_.push_back(i < next_.count_of(b) ? 1 : 0);
        next_.real = {policy, {batch(), width}};
        upload(policy, next_.real.data(), real_.data(), real_.size());
        return next_;
    }
    /// Returns body(), which computes these tokens and adds them to the state, and adds them to the lengths. If it
    /// throws, further calls of `next` throw, too.
    template <typename Body>
    auto go_on(const NextTokens<P>& next, const Body& body) {
        is_whole_ = false;
        auto out = body();
        for (Index b = 0; b < batch(); ++b) lengths_[static_cast<std::size_t>(b)] += next.count_of(b);
        is_whole_ = true;
        return out;
    }
    /// For load_cache, once it has restored `state` (see io/cache.hpp).
    void set_lengths(std::vector<Index> lengths) {
        lengths_ = std::move(lengths);
        is_whole_ = true;
    }

private:
    static std::string element(const char* argument, Index i) {
        return detail::concat({argument, "[", value_string(i), "]"});
    }

    std::vector<Index> lengths_;
    Index max_length_;
    NextTokens<P> next_;               // of the last call: its memory is used again
    std::vector<unsigned char> real_;  // likewise: next_.real on the host
    bool is_whole_ = true;
};

}  // namespace colt5
