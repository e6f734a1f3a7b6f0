// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <colt5/core/tensor.hpp>
#include <colt5/core/view.hpp>
#include <colt5/module/module.hpp>
#include <colt5/module/token_count.hpp>
#include <colt5/schedule/concurrent_streams.hpp>
#include <colt5/schedule/sequences.hpp>

/// What Ragged and its form for cross attention share.
namespace colt5::detail {

/// Packed tokens (total, d), or padded ones (b, n, d).
template <typename Scalar, Policy P, std::size_t rank>
using RaggedTensor = std::conditional_t<rank == 2, MatrixTensor<Scalar, P>, TokensTensor<Scalar, P>>;

/// Checks that tokens are packed or padded ones, in the memory of policy P. Returns all of their rows.
template <typename Scalar, typename P, Viewable X>
MatrixView<const Scalar> expect_rows(const char* argument, const X& tokens) {
    using Wanted = std::conditional_t<X::rank == 2, MatrixView<const Scalar>, TokensView<const Scalar>>;
    return expect<Wanted, P>(argument, tokens).rows();
}

/// The numbers of routed tokens for sequences of given lengths: `counts`, or if that is a function, what it returns.
template <typename Counts, typename By, std::same_as<Index>... Lengths>
Counts counts_for(const By& counts, Lengths... lengths) {
    if constexpr (std::convertible_to<const By&, Counts>) {
        return counts;
    } else {
        static_assert(std::is_invocable_r_v<Counts, const By&, Lengths...>,
                      "colt5: `counts` must be the numbers of tokens that the module takes, or a function that returns "
                      "them for the length of a sequence (for cross attention, for the lengths of x and context)");
        return counts(lengths...);
    }
}

/// What the calls of the module have saved, each for the sequences of one length.
template <typename Call, std::size_t sides>
struct RaggedCalls {
    std::vector<Call> calls;
    SequencePlan<sides> plan;  // which sequences are in which call
    Index sequences = 0;       // of the batch, with those that are empty

    /// The call that computed a sequence, and which sample of that call's batch the sequence is. The call is null if
    /// the sequence is empty. Throws ValueError if there is no such sequence.
    std::pair<const Call*, Index> call_of(Index sequence) const {
        expect_value(sequence >= 0 && sequence < sequences, "sequence", "one of the batch", sequence);
        for (const Call& call : calls) {
            const auto& numbers = call.sequences.numbers;
            const auto found = std::lower_bound(numbers.begin(), numbers.end(), sequence);
            if (found != numbers.end() && *found == sequence) return {&call, found - numbers.begin()};
        }
        return {nullptr, 0};
    }
    /// Calls f(prefix + "calls.0." + the router's name, Routing) for each router of each call.
    template <typename F>
    void each_routing(F&& f, const std::string& prefix = "") const {
        for (std::size_t i = 0; i < calls.size(); ++i) calls[i].activations.each_routing(f, prefix + name_of(i));
    }
    /// Calls f(prefix + "calls.0." + the router's name, RouterView) for each router of each call.
    template <typename F>
    void each_router(F&& f, const std::string& prefix = "") const {
        for (std::size_t i = 0; i < calls.size(); ++i) calls[i].activations.each_router(f, prefix + name_of(i));
    }

private:
    static std::string name_of(std::size_t i) { return concat({"calls.", std::to_string(i), "."}); }
};

/// Calls f(plan) with a plan of its thread, whose memory is used again by later calls.
template <std::size_t sides, typename F>
auto with_plan(F&& f) {
    thread_local SequencePlan<sides> kept;
    auto plan = std::move(kept);  // f may come here again
    auto result = f(plan);
    kept = std::move(plan);
    return result;
}

/// The gradients that the calls of backward add to: those of the caller on the policy's own stream, on the others
/// gradients of their own, so that two calls never add to the same numbers. A module that cannot make gradients is
/// called on one stream after the other instead.
template <typename Module, typename Gradients>
class GradientsOfStreams {
    using P = typename Module::Out::PolicyType;
    static constexpr bool own = HasConcurrentStreams<P> && requires(const Module& module, const Gradients& g) {
        { module.make_gradients() } -> std::same_as<Gradients>;
        Module::each_parameter([](const std::string&, const auto&, const auto&) {}, "", g, g);
    };

public:
    GradientsOfStreams(const Module& module, Gradients& gradients, std::size_t parts)
        : module_(module), gradients_(gradients) {
        if constexpr (own)
            for (std::size_t i = 1; i < ConcurrentStreams<P>::count_for(module.policy(), parts); ++i)
                of_streams_.push_back(module.make_gradients());
    }

    /// Enters the stream of a call of so many tokens, and returns the gradients that it adds to.
    Gradients& enter(ConcurrentStreams<P>& streams, Index tokens) {
        const P& policy = module_.policy();
        if constexpr (own) {
            const std::size_t stream = streams.enter(tokens);
            return stream == 0 ? gradients_ : of_streams_[stream - 1];
        } else if constexpr (HasConcurrentStreams<P>) {
            const auto before = policy.record_event();
            streams.enter(tokens);
            policy.wait_event(before);
        }
        return gradients_;
    }
    /// When the streams have been joined: adds the gradients of all of them to those of the caller.
    void add_up() {
        if constexpr (own) {
            for (const Gradients& of_stream : of_streams_)
                Module::each_parameter(Add{module_.policy()}, "", gradients_, of_stream);
            of_streams_.clear();
        }
    }

private:
    struct Add {
        const P& policy;
        template <typename Sum, typename Gradient>
        void operator()(const std::string&, Sum& sum, const Gradient& gradient) const {
            assign(policy, sum, sum + gradient);
        }
    };

    const Module& module_;
    Gradients& gradients_;
    std::vector<Gradients> of_streams_;
};

/// What the two forms of Ragged have in common.
template <typename Module>
class RaggedBase {
protected:
    using Scalar = typename Module::Out::value_type;
    using P = typename Module::Out::PolicyType;
    using Rows = MatrixView<const Scalar>;
    using ModuleCounts = typename Module::Counts;
    template <std::size_t rank>
    using Tensor = RaggedTensor<Scalar, P, rank>;

public:
    using Counts = CountsByLength<ModuleCounts>;

    const P& policy() const { return module_->policy(); }

protected:
    explicit RaggedBase(const Module& module) : module_(&module) {}
    const Module& module() const { return *module_; }

    /// Marks saved activations as what forward returned, until backward has used them up. It does not say which module
    /// they are of: that is checked by the origin of each call's activations.
    ActivationsOrigin origin() const { return {policy(), identity_of(policy())}; }

    /// Checks saved activations and d_out. If `saved` is not const, frees its output.
    template <typename Saved, Viewable D>
    Rows begin_backward(Saved& saved, const D& d_out) const {
        saved.origin.expect(policy(), identity_of(policy()));
        const Rows d = expect_rows<Scalar, P>("d_out", d_out);
        expect_shape("d_out", d_out.shape(), saved.shape);
        if constexpr (!std::is_const_v<Saved>) {
            expect_value(d.data() == nullptr || d.data() != saved.out.data(), "d_out",
                         "another tensor than the output that is handed over", "that output");
            saved.origin = {};
            saved.out = {};
        }
        return d;
    }

private:
    const Module* module_;
};

/// Calls f with `saved`: as a const reference, unless it was moved in.
template <typename Saved, typename F>
auto with_saved(std::remove_reference_t<Saved>& saved, F&& f) {
    if constexpr (std::is_lvalue_reference_v<Saved>)
        return f(std::as_const(saved));
    else
        return f(saved);
}

}  // namespace colt5::detail
