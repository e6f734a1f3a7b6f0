// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <concepts>
#include <cstddef>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <colt5/core/tensor.hpp>
#include <colt5/core/view.hpp>
#include <colt5/module/ragged_base.hpp>
#include <colt5/module/token_count.hpp>
#include <colt5/schedule/concurrent_streams.hpp>
#include <colt5/schedule/sequences.hpp>

/// Modules on batches of sequences of different lengths.
namespace colt5 {

/// A module on sequences of different lengths. It computes each as if it were alone and had no padding, so a batch
/// costs what its real tokens cost. Outputs and the gradients of tokens are those of each sequence alone, bit for bit,
/// unless a router or dropout draws noise in training.
///
///     const Ragged ragged(block);                                             // the block must outlive it
///     auto out = ragged(tokens, cu_seqlens, {.num_heavy_ff_tokens = TokenRatio{1.0 / 16}});
///     auto saved = ragged.forward(tokens, cu_seqlens);
///     auto d_tokens = ragged.backward(std::move(saved), d_out, gradients);    // gradients of block.make_gradients()
///
/// Tokens are packed or padded. Packed tokens are (total, d), and `lengths` are the cumulative lengths (0, n_0,
/// n_0 + n_1, …, total), known as cu_seqlens. Padded tokens are (b, n, d), with the padding at the end of each
/// sequence, and `lengths` are (n_0, …, n_{b-1}). Both kinds of lengths are on the host: cumulative_lengths(lengths)
/// computes cu_seqlens, and lengths_of(policy, mask) computes lengths. A sequence may be empty. Outputs and gradients
/// of tokens have the shape of the tokens, with 0 at padding. Neither tokens nor d_out are read at padding.
///
/// `counts` says how many tokens are routed. It is a list in braces, as above, of a TokenCount for each name in the
/// module's Counts; or the module's Counts; or a function from the length of a sequence to the module's Counts, such as
/// config::colt5_tokens, which may be called several times. Arguments after `counts`, such as Residual::tokens, go to
/// the module.
///
/// Sequences of equal length are the batch of one call of the module. If they do not follow each other in memory, with
/// no padding between them, their tokens are copied before the call and their results behind it; forward keeps that
/// copy of the tokens. The saved activations of all calls are kept. Calls are made in the order of the first sequence
/// of each length. A router that draws noise in training counts these calls, and numbers the samples within each; an
/// empty sequence is in no call.
///
/// On the CPU, the workspace is that of the largest call, and gradients of parameters are added call by call. On a GPU,
/// up to four calls run at the same time, each in a workspace of its own (see ConcurrentStreams, and
/// Cuda::Options::concurrent_streams); backward then has gradients of parameters for each of the four, which it adds up
/// in the end. Each call costs at least the time to launch its kernels, which exceeds the time to compute a few
/// thousand tokens: so let there be few different lengths, or, where the same lengths come again, capture the calls
/// into a CUDA graph.
///
/// `saved.call_of(i)` finds what was saved for sequence i; `saved.each_router(f)` calls f for each router of each call,
/// and routing_panels (io/routing_page.hpp) takes `saved` and the number of a sequence.
///
/// The module is routed attention, routed feedforward, a block, Routed, or one of your own. Yours needs policy(), the
/// types Out, Counts and Activations, and the functions module(x, mask, counts, out), module.forward(x, mask, counts,
/// out) and module.backward(activations, d_out, gradients, d_x). Ragged passes an absent mask, and as the last argument
/// the tensor to write to. On a GPU, calls of forward run at the same time, so no call may write to tensors of the
/// module. Calls of backward do so if the module has make_gradients() and each_parameter; backward may then add only to
/// what each_parameter visits. Cross attention has a specialization, below.
template <typename Module>
class Ragged : public detail::RaggedBase<Module> {
    using Base = detail::RaggedBase<Module>;
    using typename Base::ModuleCounts, typename Base::P, typename Base::Rows, typename Base::Scalar;
    template <std::size_t rank>
    using Tensor = typename Base::template Tensor<rank>;

public:
    using typename Base::Counts;

    /// What one call of the module saved. Its output is not here: it is in rows of Activations::out.
    struct Call {
        SequenceGroup sequences;
        TokensTensor<Scalar, P> tokens;  // (count, length, d), if the sequences do not follow each other in memory
        typename Module::Activations activations;
    };
    /// What backward reads. The tokens must outlive it, the lengths need not. `rank` is that of the tokens.
    template <std::size_t rank>
    struct Activations : detail::RaggedCalls<Call, 1> {
        Tensor<rank> out;
        typename Tensor<rank>::Shape shape{};
        ActivationsOrigin origin;
    };

    explicit Ragged(const Module& module) : Base(module) {}
    explicit Ragged(const Module&&) = delete;  // give the module a name

    /// The output. Saves nothing. Throws ValueError when the lengths do not fit the tokens, and what the module throws.
    template <Viewable X, typename By = Counts, typename... Options>
    Tensor<X::rank> operator()(const X& tokens, std::span<const Index> lengths, const By& counts = {},
                               const Options&... options) const {
        const Rows x = detail::expect_rows<Scalar, P>("tokens", tokens);
        return detail::with_plan<1>([&](auto& plan) {
            plan.make(SequenceRows("", lengths, tokens.shape()));
            expect_counts(plan, counts);
            RowsOfGroups<Tensor<X::rank>> out(this->policy(), tokens.shape(), plan.rows());
            ConcurrentStreams streams(this->policy(), plan.size());
            for (std::size_t i = 0; i < plan.size(); ++i) {
                const SequenceGroup group = plan.group(i);
                streams.enter(group.rows());
                const auto of_call = detail::counts_for<ModuleCounts>(counts, group.length);
                TokensTensor<Scalar, P> copy;
                const auto part = group.of(this->policy(), x, copy);
                if constexpr (takes_residual && sizeof...(Options) == 0)
                    out.put(group, this->module()(part, {}, of_call, Residual::none, out.part(group)));
                else
                    out.put(group, this->module()(part, {}, of_call, options..., out.part(group)));
            }
            streams.join();
            return out.finish();
        });
    }

    /// The same, with what backward reads.
    template <typename X, typename By = Counts, typename... Options>
    auto forward(X&& tokens, std::span<const Index> lengths, const By& counts = {}, const Options&... options) const {
        Activations<std::remove_cvref_t<X>::rank> saved;
        forward_into(saved, std::forward<X>(tokens), lengths, counts, options...);
        return saved;
    }

    /// The same, into `saved`, whose former activations are freed; backward may have used them up before. A second call
    /// with the same lengths asks the system for no memory.
    template <std::size_t rank, typename X, typename By = Counts, typename... Options>
    void forward_into(Activations<rank>& saved, X&& tokens, std::span<const Index> lengths, const By& counts = {},
                      const Options&... options) const {
        static_assert(outlives_call<X>,
                      "colt5: backward reads the tokens again: give the tensor a name, a temporary is gone by then");
        static_assert(std::remove_cvref_t<X>::rank == rank, "colt5: `saved` is for packed tokens, or for padded ones");
        const Rows x = detail::expect_rows<Scalar, P>("tokens", tokens);
        saved.origin = {};
        saved.calls.clear();
        saved.out = {};
        const SequenceRows sequences("", lengths, tokens.shape());
        saved.plan.make(sequences);
        expect_counts(saved.plan, counts);
        RowsOfGroups<Tensor<rank>> out(this->policy(), tokens.shape(), saved.plan.rows());
        saved.calls.reserve(saved.plan.size());
        ConcurrentStreams streams(this->policy(), saved.plan.size());
        for (std::size_t i = 0; i < saved.plan.size(); ++i) {
            const SequenceGroup group = saved.plan.group(i);
            streams.enter(group.rows());
            const auto of_call = detail::counts_for<ModuleCounts>(counts, group.length);
            TokensTensor<Scalar, P> copy;
            const auto part = group.of(this->policy(), x, copy);
            const auto add = [&](typename Module::Activations&& activations) {
                out.put(group, activations.out);
                activations.out = {};
                saved.calls.push_back({group, std::move(copy), std::move(activations)});
            };
            if constexpr (takes_residual && sizeof...(Options) == 0)
                add(this->module().forward(part, {}, of_call, Residual::none, out.part(group)));
            else
                add(this->module().forward(part, {}, of_call, options..., out.part(group)));
        }
        streams.join();
        saved.out = out.finish();
        saved.shape = tokens.shape();
        saved.sequences = sequences.size();
        saved.origin = this->origin();
    }

    /// Returns the gradient of the tokens, and adds those of the parameters to `gradients`. If `saved` is moved in, its
    /// tensors are freed once they are read, saved.out first. Throws what backward of the module throws.
    template <typename Saved, Viewable D, typename Gradients>
    auto backward(Saved&& saved, const D& d_out, Gradients& gradients) const {
        static_assert(std::same_as<std::remove_cvref_t<Saved>, Activations<D::rank>>,
                      "colt5: `saved` must be what forward returned for tokens of the rank of `d_out`");
        return detail::with_saved<Saved>(saved, [&](auto& taken) {
            const Rows d = this->begin_backward(taken, d_out);
            RowsOfGroups<Tensor<D::rank>> d_tokens(this->policy(), d_out.shape(), taken.plan.rows());
            detail::GradientsOfStreams<Module, Gradients> of_streams(this->module(), gradients, taken.plan.size());
            ConcurrentStreams streams(this->policy(), taken.plan.size());
            for (auto& [sequences, tokens, activations] : taken.calls) {
                auto& of_stream = of_streams.enter(streams, sequences.rows());
                TokensTensor<Scalar, P> copy;
                d_tokens.put(sequences, this->module().backward(detail::forward_part(activations),
                                                                sequences.of(this->policy(), d, copy), of_stream,
                                                                d_tokens.part(sequences)));
                if constexpr (!std::is_const_v<std::remove_reference_t<decltype(taken)>>) tokens = {};
            }
            streams.join();
            of_streams.add_up();
            return d_tokens.finish();
        });
    }

private:
    static constexpr bool takes_residual = std::is_invocable_v<const Module&, TokensView<const Scalar>, Mask,
                                                               ModuleCounts, Residual, typename Module::Out>;

    /// Checks the counts of all calls before the first is made.
    template <typename By>
    static void expect_counts(const SequencePlan<1>& plan, const By& counts) {
        for (std::size_t i = 0; i < plan.size(); ++i)
            static_cast<void>(detail::counts_for<ModuleCounts>(counts, plan.group(i).length));
    }
};

/// Cross attention on sequences of different lengths, each with a context of a length of its own. x may be packed and
/// the context padded, or the reverse. A function `counts` takes both lengths:
///
///     const Ragged ragged(cross);
///     auto out = ragged(x, cu_seqlens, context, context_cu_seqlens, {.num_tokens_kv = TokenRatio{1.0 / 8}});
///     auto saved = ragged.forward(x, cu_seqlens, context, context_cu_seqlens);
///     auto [d_x, d_context] = ragged.backward(std::move(saved), d_out, gradients);
///
/// If a sequence of x is empty, the gradient of its context is 0.
template <typename Module>
requires requires {
    typename Module::InputGradients;
}
class Ragged<Module> : public detail::RaggedBase<Module> {
    using Base = detail::RaggedBase<Module>;
    using typename Base::ModuleCounts, typename Base::P, typename Base::Rows, typename Base::Scalar;
    template <std::size_t rank>
    using Tensor = typename Base::template Tensor<rank>;

public:
    using typename Base::Counts;

    struct Call {
        SequenceGroup sequences, contexts;
        TokensTensor<Scalar, P> x, context;  // if the sequences, or the contexts, do not follow each other in memory
        typename Module::Activations activations;
    };
    /// What backward reads. x and the context must outlive it, the lengths need not.
    template <std::size_t rank, std::size_t context_rank>
    struct Activations : detail::RaggedCalls<Call, 2> {
        Tensor<rank> out;
        typename Tensor<rank>::Shape shape{};
        typename Tensor<context_rank>::Shape context_shape{};
        ActivationsOrigin origin;
    };
    template <std::size_t rank, std::size_t context_rank>
    struct InputGradients {
        Tensor<rank> d_x;
        Tensor<context_rank> d_context;
    };

    explicit Ragged(const Module& module) : Base(module) {}
    explicit Ragged(const Module&&) = delete;

    template <Viewable X, Viewable C, typename By = Counts>
    Tensor<X::rank> operator()(const X& x, std::span<const Index> lengths, const C& context,
                               std::span<const Index> context_lengths, const By& counts = {}) const {
        const Rows rows = detail::expect_rows<Scalar, P>("x", x),
                   context_rows = detail::expect_rows<Scalar, P>("context", context);
        return detail::with_plan<2>([&](auto& plan) {
            make(plan, SequenceRows("", lengths, x.shape()), SequenceRows("context_", context_lengths, context.shape()),
                 counts);
            RowsOfGroups<Tensor<X::rank>> out(this->policy(), x.shape(), plan.rows());
            ConcurrentStreams streams(this->policy(), plan.size());
            for (std::size_t i = 0; i < plan.size(); ++i) {
                const SequenceGroup group = plan.group(i), of_context = plan.group(i, 1);
                streams.enter(group.rows() + of_context.rows());
                TokensTensor<Scalar, P> copy, context_copy;
                out.put(group, this->module()(group.of(this->policy(), rows, copy),
                                              of_context.of(this->policy(), context_rows, context_copy), {}, {},
                                              counts_of(counts, group, of_context), out.part(group)));
            }
            streams.join();
            return out.finish();
        });
    }

    /// The same, with what backward reads.
    template <typename X, typename C, typename By = Counts>
    auto forward(X&& x, std::span<const Index> lengths, C&& context, std::span<const Index> context_lengths,
                 const By& counts = {}) const {
        Activations<std::remove_cvref_t<X>::rank, std::remove_cvref_t<C>::rank> saved;
        forward_into(saved, std::forward<X>(x), lengths, std::forward<C>(context), context_lengths, counts);
        return saved;
    }

    /// The same, into `saved`, whose former activations are freed.
    template <std::size_t rank, std::size_t context_rank, typename X, typename C, typename By = Counts>
    void forward_into(Activations<rank, context_rank>& saved, X&& x, std::span<const Index> lengths, C&& context,
                      std::span<const Index> context_lengths, const By& counts = {}) const {
        static_assert(outlives_call<X> && outlives_call<C>,
                      "colt5: backward reads the tokens again: give the tensor a name, a temporary is gone by then");
        static_assert(std::remove_cvref_t<X>::rank == rank && std::remove_cvref_t<C>::rank == context_rank,
                      "colt5: `saved` is for packed tokens, or for padded ones");
        const Rows rows = detail::expect_rows<Scalar, P>("x", x),
                   context_rows = detail::expect_rows<Scalar, P>("context", context);
        saved.origin = {};
        saved.calls.clear();
        saved.out = {};
        const SequenceRows sequences("", lengths, x.shape());
        make(saved.plan, sequences, SequenceRows("context_", context_lengths, context.shape()), counts);
        RowsOfGroups<Tensor<rank>> out(this->policy(), x.shape(), saved.plan.rows());
        saved.calls.reserve(saved.plan.size());
        ConcurrentStreams streams(this->policy(), saved.plan.size());
        for (std::size_t i = 0; i < saved.plan.size(); ++i) {
            const SequenceGroup group = saved.plan.group(i), of_context = saved.plan.group(i, 1);
            streams.enter(group.rows() + of_context.rows());
            TokensTensor<Scalar, P> copy, context_copy;
            auto activations = this->module().forward(group.of(this->policy(), rows, copy),
                                                      of_context.of(this->policy(), context_rows, context_copy), {}, {},
                                                      counts_of(counts, group, of_context), out.part(group));
            out.put(group, activations.out);
            activations.out = {};
            saved.calls.push_back(
                {group, of_context, std::move(copy), std::move(context_copy), std::move(activations)});
        }
        streams.join();
        saved.out = out.finish();
        saved.sequences = sequences.size();
        saved.shape = x.shape();
        saved.context_shape = context.shape();
        saved.origin = this->origin();
    }

    /// Returns the gradients of x and of the context, and adds those of the parameters to `gradients`.
    template <typename Saved, Viewable D, typename Gradients>
    auto backward(Saved&& saved, const D& d_out, Gradients& gradients) const {
        return detail::with_saved<Saved>(saved,
                                         [&](auto& taken) { return compute_gradients(taken, d_out, gradients); });
    }

private:
    template <typename SomeActivations, Viewable D, typename Gradients>
    auto compute_gradients(SomeActivations& saved, const D& d_out, Gradients& gradients) const {
        constexpr std::size_t context_rank = std::tuple_size_v<decltype(saved.context_shape)>;
        static_assert(std::same_as<std::remove_const_t<SomeActivations>, Activations<D::rank, context_rank>>,
                      "colt5: `saved` must be what forward returned for x of the rank of `d_out`");
        const Rows d = this->begin_backward(saved, d_out);
        RowsOfGroups<Tensor<D::rank>> d_x(this->policy(), saved.shape, saved.plan.rows());
        RowsOfGroups<Tensor<context_rank>> d_context(this->policy(), saved.context_shape, saved.plan.rows(1));
        detail::GradientsOfStreams<Module, Gradients> of_streams(this->module(), gradients, saved.plan.size());
        ConcurrentStreams streams(this->policy(), saved.plan.size());
        for (auto& [sequences, contexts, x, context, activations] : saved.calls) {
            auto& of_stream = of_streams.enter(streams, sequences.rows() + contexts.rows());
            TokensTensor<Scalar, P> copy;
            typename Module::InputGradients into{d_x.part(sequences), d_context.part(contexts)};
            const auto d_call = this->module().backward(
                detail::forward_part(activations), sequences.of(this->policy(), d, copy), of_stream, std::move(into));
            d_x.put(sequences, d_call.d_x);
            d_context.put(contexts, d_call.d_context);
            if constexpr (!std::is_const_v<SomeActivations>) {
                x = {};
                context = {};
            }
        }
        streams.join();
        of_streams.add_up();
        return InputGradients<D::rank, context_rank>{d_x.finish(), d_context.finish()};
    }

    template <typename By>
    static ModuleCounts counts_of(const By& counts, const SequenceGroup& group, const SequenceGroup& of_context) {
        return detail::counts_for<ModuleCounts>(counts, group.length, of_context.length);
    }
    /// Makes the plan, and checks the counts of all calls before the first is made.
    template <typename By>
    static void make(SequencePlan<2>& plan, const SequenceRows& sequences, const SequenceRows& contexts,
                     const By& counts) {
        if (contexts.size() != sequences.size())
            expect_value(false, "context",
                         detail::concat({"of as many sequences as x, ", value_string(sequences.size())}),
                         contexts.size());
        plan.make(sequences, contexts);
        for (std::size_t i = 0; i < plan.size(); ++i)
            static_cast<void>(counts_of(counts, plan.group(i), plan.group(i, 1)));
    }
};

}  // namespace colt5
