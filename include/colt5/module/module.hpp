// SPDX-License-Identifier: MIT
#pragma once

#include <concepts>
#include <cstdint>
#include <cstring>
#include <exception>
#include <initializer_list>
#include <optional>
#include <span>
#include <type_traits>
#include <utility>

#include <colt5/core/policy.hpp>
#include <colt5/core/random.hpp>
#include <colt5/core/tensor.hpp>
#include <colt5/core/view.hpp>
#include <colt5/module/cache.hpp>
#include <colt5/module/layers.hpp>
#include <colt5/op/clean_padding.hpp>

namespace colt5 {

/// What backward asks of saved activations before it reads them: that forward of the same module returned them, and
/// that nobody has used them up. In a program that is compiled with COLT5_CHECK_TOKENS defined, also that the tokens
/// are as they were, which costs a copy to the host and one pass over it in each forward and backward.
class ActivationsOrigin {
public:
    ActivationsOrigin() = default;
    /// `module` is the address of one of the module's parameters, which moving the module does not change.
    template <Policy P, Viewable... Tokens>
    ActivationsOrigin(const P& policy, const void* module, const Tokens&... tokens)
        : module_(module), tokens_(checksum(policy, tokens...)) {}
    ActivationsOrigin(ActivationsOrigin&& other) noexcept
        : module_(std::exchange(other.module_, nullptr)), tokens_(other.tokens_) {}
    ActivationsOrigin& operator=(ActivationsOrigin&& other) noexcept {
        module_ = std::exchange(other.module_, nullptr);
        tokens_ = other.tokens_;
        return *this;
    }

    /// Throws ValueError if they are used up or of another module, or if the tokens are known to have changed.
    template <Policy P, Viewable... Tokens>
    void expect(const P& policy, const void* module, const Tokens&... tokens) const {
        expect_value(module_ != nullptr, "saved", "what forward returned",
                     "used up: it was handed to backward, or moved from");
        expect_value(module_ == module, "saved", "of this module", "of another one of its type");
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

/// Tokens whose padding is clean: what is not finite in masked tokens counts as 0, so that NaN and infinity in padding
/// that nobody has initialized reach neither outputs nor gradients.
template <typename Scalar, Policy P, typename Tokens>
struct CleanTokens {
    TokensTensor<Scalar, P> copy;  // of the tokens, if they were not clean
    Tokens tokens;                 // (b, n, d)
};

/// x (b, n, d), mask (b, n) or absent. Reads masked tokens alone, and copies x only if one of them is not finite. With
/// a policy that cleans padding as it reads, returns x itself.
template <Policy P, Viewable X>
auto clean_padding(const P& policy, const X& x, Mask mask) {
    CleanTokens<typename X::value_type, P, decltype(x.const_view())> clean{{}, x.const_view()};
    if constexpr (!cleans_as_it_reads<P>) {
        if (!mask || padding_is_finite(policy, x, mask)) return clean;
        clean.copy = copy_with_clean_padding(policy, x, mask);
        clean.tokens = decltype(clean.tokens)::unchecked(clean.copy.data(), x.shape());
    }
    return clean;
}

/// Where a module draws its parameters from: a seed, or a sequence that other modules draw from, too.
class Seeds {
public:
    Seeds(Seed seed = {}) : own_(seed) {}                           // NOLINT: converts
    Seeds(SeedSequence& sequence) : own_({}), given_(&sequence) {}  // NOLINT
    Seeds(SeedSequence&& sequence) : own_(std::move(sequence)) {}   // NOLINT
    /// Draws from the sequence of `other`.
    Seeds(Seeds& other) : Seeds(static_cast<SeedSequence&>(other)) {}
    operator SeedSequence&() { return given_ != nullptr ? *given_ : own_; }  // NOLINT

private:
    SeedSequence own_;
    SeedSequence* given_ = nullptr;
};

/// Work on the side stream of a policy, such as a heavy branch beside the light one. It starts after everything that
/// the policy has queued before. Until `join`, which the destructor calls, the two streams are unordered: neither may
/// write or free what the other uses. After `join`, either may free what the other has allocated.
///
/// Without a side stream, policy() is the policy itself, and the work runs in program order.
template <Policy P>
class SideStream {
public:
    explicit SideStream(const P& policy) : main_(policy) {
        if constexpr (HasSideStream<P>) this->policy().wait_event(main_.record_event());
    }
    SideStream(const SideStream&) = delete;
    SideStream& operator=(const SideStream&) = delete;
    ~SideStream() {
        try {
            join();
        } catch (const std::exception&) {  // the exception that unwinds the stack says more
        }
    }

    const P& policy() const {
        if constexpr (HasSideStream<P>)
            return main_.side_policy();
        else
            return main_;
    }
    /// Records an event after the side stream's work so far.
    Event<P> record_event() const {
        if constexpr (HasSideStream<P>)
            return policy().record_event();
        else
            return {};
    }
    /// Work that the policy queues from now on runs after all work of the side stream so far.
    void join() {
        if constexpr (HasSideStream<P>)
            if (!joined_) main_.wait_event(record_event());
        joined_ = true;
    }

private:
    const P& main_;
    bool joined_ = false;
};

/// What a module adds to its output: nothing, or the tokens that it was given.
enum class Residual { none, tokens };

namespace detail {

/// t if there is a residual, otherwise an absent view: t is the tokens in forward, and d_out in backward.
template <Viewable T>
auto residual_of(Residual residual, const T& t) {
    return residual == Residual::tokens ? t.const_view() : decltype(t.const_view())();
}

/// The number of heavy tokens of a call: `given`, or else `configured`. Throws ValueError below 1.
inline Index token_count(const char* argument, std::optional<Index> given, Index configured) {
    const Index count = given.value_or(configured);
    expect_value(count >= 1, argument, ">= 1", count);
    return count;
}

/// Checks tokens (b, n, dim) in the memory of policy P and a mask (b, n), which may be absent. Returns the tokens as a
/// view with static dim.
template <typename Tokens, typename P, typename X>
Tokens expect_tokens(const char* argument, const X& tokens, const char* mask_argument, Mask mask) {
    const auto x = expect<Tokens, P>(argument, tokens);
    expect_value(mask || mask.size() == 0, mask_argument, "a view of data", "null");
    if (mask) expect_shape(mask_argument, mask.shape(), {x.extent(0), x.extent(1)});
    expect_length(argument, x.extent(1));
    return x;
}

/// The same for tokens that saved activations keep a view of.
template <typename Tokens, typename P, typename X>
Tokens expect_kept_tokens(const char* argument, X&& tokens, const char* mask_argument, Mask mask) {
    static_assert(outlives_call<X>,
                  "colt5: backward reads the tokens again: give the tensor a name, a temporary is gone by then");
    return expect_tokens<Tokens, P>(argument, tokens, mask_argument, mask);
}

/// The tensor for a result of the shape of `like`: `given`, or if that is empty a new one. Throws ShapeError.
template <typename Result, Policy P, Viewable V>
Result result_like(const P& policy, const char* argument, Result given, const V& like) {
    if (!given) return tensor_like(policy, like);
    expect_shape(argument, given.shape(), like.shape());
    return given;
}

/// Frees a value that backward has finished reading; does nothing if it is const.
template <typename T>
void release(T& value) {
    if constexpr (!std::is_const_v<T>) value = {};
}

/// A pointer to a value that backward may free, or null if it is const: backward of a part of a module that takes both
/// needs to be compiled only once.
template <typename T>
std::remove_const_t<T>* if_owned([[maybe_unused]] T& value) {
    if constexpr (std::is_const_v<T>)
        return nullptr;
    else
        return &value;
}

/// Passes a part of saved activations to backward of a part of the module: as an rvalue if the whole was moved in,
/// otherwise by const reference.
template <typename T>
decltype(auto) forward_part(T& part) {
    if constexpr (std::is_const_v<T>)
        return (part);
    else
        return std::move(part);
}

}  // namespace detail

/// What the modules have in common. A Self that derives from it has Gradients, Activations, and two functions for the
/// base:
///
///     self.expect_backward(saved, d_out, gradients, into…)     throws before anything is touched
///     self.compute_gradients(saved, d_out, gradients, into…)   backward; if saved is not const, it may free parts of
///     it
///                                                              once they are read
///
/// One that decodes also has
///
///     Self::DecodeState                                 the tensors of its cache; its each_tensor(f, prefix, state...)
///                                                       calls f(prefix + name, tensor...) for each of them
///     Self::cache_bytes(batch, max_length)              what they take
///     self.make_decode_state(batch, max_length)         those of sequences without a token
///     self.decode_next(state, next, x, out)             computes the NextTokens x, and adds them to the state
template <typename Self, Policy P>
class ModuleBase {
public:
    using DecodeCache = Cache<Self>;

    const P& policy() const { return policy_; }

    /// Gradients of all parameters, filled with zeros.
    auto make_gradients() const { return zeros_like_parameters(policy_, self()); }

    /// Returns the gradients of the inputs, and adds those of the parameters to `gradients`. If `saved` is moved in,
    /// its tensors are freed once they are read, saved.out first, and gradients reuse their memory: then d_out must not
    /// be saved.out. Throws ValueError unless `saved` comes from forward of this module and is not used up. saved.out
    /// may be moved away before. `into`, of the type that is returned, may hold the tensors to return, which are then
    /// written to.
    template <typename Saved, Viewable D, typename Gradients, typename... Into>
    auto backward(Saved&& saved, const D& d_out, Gradients& gradients, Into... into) const {
        static_assert(std::same_as<std::remove_cvref_t<Saved>, typename Self::Activations>,
                      "colt5: `saved` must be what forward of this module returned");
        static_assert(std::same_as<Gradients, typename Self::Gradients>,
                      "colt5: `gradients` must be those that make_gradients() of this module returns");
        self().expect_backward(saved, d_out, gradients, std::as_const(into)...);
        if constexpr (std::is_lvalue_reference_v<Saved> || std::is_const_v<std::remove_reference_t<Saved>>) {
            return self().compute_gradients(std::as_const(saved), d_out, gradients, std::move(into)...);
        } else {
            const void *const of_d = d_out.const_view().data(), *const of_out = saved.out.const_view().data();
            expect_value(of_d == nullptr || of_d != of_out, "d_out",
                         "another tensor than the output that is handed over", "that output");
            auto taken = std::move(saved);
            return self().compute_gradients(taken, d_out, gradients, std::move(into)...);
        }
    }

    /// A cache to decode `batch` sequences with, of up to max_length tokens each. Its tensors take
    /// Self::cache_bytes(batch, max_length) bytes.
    DecodeCache make_cache(Index batch, Index max_length) const { return {self(), batch, max_length}; }

    /// Computes the next tokens of the sequences of a cache: tokens (b, m, d)  →  (b, m, d). Of sequence b, the first
    /// lengths[b] tokens are its next ones, the others are padding; without lengths, all m are. Outputs at padding are
    /// meaningless. `out` may hold the tensor to return, which is then written to.
    ///
    /// The outputs are those that the module gives at these tokens for whole sequences without a mask, whatever the
    /// number of tokens of a call and whatever the other sequences are: on the CPU bit for bit, or with a BLAS up to
    /// rounding; on a GPU bit for bit in float and double for sequences of up to 2048 tokens, otherwise up to rounding.
    ///
    /// Throws ValueError, before anything is written, when a sequence gets more than max_length tokens. If an exception
    /// comes later, such as OutOfMemory, the cache is half-written, and further calls throw.
    template <Viewable X, typename M = Self, typename Out = typename M::Out>
    Out decode(DecodeCache& cache, const X& tokens, std::span<const Index> lengths = {}, Out out = {}) const {
        const auto x = expect<TokensView<const typename Out::value_type>, P>("tokens", tokens);
        expect_shape("tokens", x.shape(), {cache.batch(), dynamic, Self::model_dim});
        if (out) expect_shape("out", out.shape(), x.shape());
        self().expect_parameters();
        const auto& next = cache.next(policy_, x.extent(1), lengths);
        return cache.go_on(next, [&] { return self().decode_next(cache.state, next, x, std::move(out)); });
    }
    /// The same with lengths in braces.
    template <Viewable X>
    auto decode(DecodeCache& cache, const X& tokens, std::initializer_list<Index> lengths) const {
        return decode(cache, tokens, std::span(lengths.begin(), lengths.size()));
    }

protected:
    explicit ModuleBase(const P& policy) : policy_(policy) {}

private:
    const Self& self() const { return static_cast<const Self&>(*this); }

    P policy_;
};

}  // namespace colt5
