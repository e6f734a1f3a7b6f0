// SPDX-License-Identifier: MIT
#pragma once

#include <concepts>
#include <cstddef>
#include <exception>
#include <limits>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

#include <colt5/core/random.hpp>
#include <colt5/core/tensor.hpp>
#include <colt5/expr/expr.hpp>
#include <colt5/op/gradient_epilogue.hpp>
#include <colt5/op/zero.hpp>
#include <colt5/router/router.hpp>

/// What can be a branch of a routed module.
namespace colt5 {

namespace detail {

/// The arguments of the functions of a branch.
template <typename M, typename Scalar, typename P>
struct BranchArguments {
    const M& branch;
    const P& policy;
    const typename M::Activations& saved;
    TokensView<Scalar> out;
    TokensView<const Scalar> x;
    Mask mask;
    bool save;
    typename M::Gradients& gradients;
};

template <typename M>
concept HasGradients = std::default_initializable<typename M::Gradients>;
template <typename M>
concept HasActivations = std::default_initializable<typename M::Activations> && std::movable<typename M::Activations>;
template <typename M>
concept HasParameters = HasGradients<M> && requires(M& branch, typename M::Gradients& gradients) {
    M::each_parameter(VisitNothing(), std::string(), branch, gradients);
};
template <typename M, typename Scalar, typename P>
concept MapsTokens = requires(const BranchArguments<M, Scalar, P>& a) {
    { a.branch.forward(a.policy, a.out, a.x, a.save) } -> std::same_as<typename M::Activations>;
    a.branch.backward(a.policy, a.saved, a.out, a.x, a.x, a.gradients);
};
template <typename M, typename Scalar, typename P>
concept MapsMaskedTokens = requires(const BranchArguments<M, Scalar, P>& a) {
    { a.branch.forward(a.policy, a.out, a.x, a.mask, a.save) } -> std::same_as<typename M::Activations>;
    a.branch.backward(a.policy, a.saved, a.out, a.x, a.x, a.mask, a.gradients);
};

/// Whether a light branch adds a residual to its output, and an epilogue with `updates` rank-one updates to its
/// gradient.
template <typename M, typename Scalar, typename P, std::size_t updates = 0>
concept HasEpilogue = requires(const BranchArguments<M, Scalar, P>& a,
                               const GradientEpilogue<Scalar, P, updates>& epilogue) {
    a.branch.forward(a.policy, a.out, a.x, a.save, a.x, a.mask);
    a.branch.backward(a.policy, a.saved, a.out, a.x, a.x, a.gradients, epilogue, a.mask);
}
|| requires(const BranchArguments<M, Scalar, P>& a, const GradientEpilogue<Scalar, P, updates>& epilogue) {
    a.branch.forward(a.policy, a.out, a.x, a.mask, a.save, a.x);
    a.branch.backward(a.policy, a.saved, a.out, a.x, a.x, a.mask, a.gradients, epilogue);
};

}  // namespace detail

/// A module that meets this maps tokens (b, n, d) → (b, n, d), and can be the heavy or the light branch of Routed:
///
///     M(policy, seeds)                       draws its parameters from the SeedSequence
///     m.forward(policy, out, x, save)        writes its result for x (b, n, d) to out (b, n, d); returns
///                                            M::Activations: with `save` what backward reads, otherwise empty
///     m.backward(policy, saved, d_x, d_out, x, gradients)
///                                            writes to d_x (b, n, d); adds the gradients of the parameters
///     M::Activations                         default-constructible and movable
///     M::Gradients                           default-constructible, with the same members as the parameters of M
///     M::each_parameter(f, prefix, m...)     m... are modules M or M::Gradients; calls f(prefix + name, tensor...) for
///                                            each parameter, with that parameter's tensor of every m
///
/// A module that looks at several tokens at a time, such as an attention, takes a mask (b, n) behind x, in both
/// functions: forward(policy, out, x, mask, save) and backward(policy, saved, d_x, d_out, x, mask, gradients). It is
/// false at masked tokens, and absent if there are none; it outlives the Activations. Padding in x is finite.
///
/// A light branch may add the residual and the gradients of other branches in its own kernels, as FeedForward and
/// LightAttention do. Its forward then takes a residual behind the arguments above, and its backward a
/// GradientEpilogue. If the branch takes no mask so far, both functions get one as their last argument. On a policy
/// that cleans padding as it reads (see core/policy.hpp), x then comes with its padding as it is, and the branch must
/// treat what is not finite in masked tokens as 0. The backward of such a branch must also accept Activations of a
/// forward without `save`, and recompute what they lack; other branches are called with `save` if a backward follows.
///
/// Work goes to the `policy` of the call, which may be that of a side stream. A module with a policy of its own becomes
/// a branch by AsBranch.
template <typename M, typename Scalar, typename P>
concept TokenModule = Policy<P> && std::constructible_from<M, const P&, SeedSequence&> && detail::HasActivations<M> &&
    detail::HasParameters<M> &&(detail::MapsTokens<M, Scalar, P> || detail::MapsMaskedTokens<M, Scalar, P>);

namespace detail {

/// Says at compile time what of TokenModule is missing.
template <typename M, typename Scalar, typename P>
struct ExpectTokenModule {
    static_assert(std::constructible_from<M, const P&, SeedSequence&>,
                  "colt5: a branch of Routed must have a constructor (const P& policy, SeedSequence& seeds)");
    static_assert(HasActivations<M>,
                  "colt5: a branch of Routed must have a default-constructible and movable type `Activations`");
    static_assert(HasGradients<M>, "colt5: a branch of Routed must have a default-constructible type `Gradients`");
    static_assert(HasParameters<M>,
                  "colt5: a branch of Routed must have a static function `each_parameter(f, prefix, m...)`");
    static_assert(MapsTokens<M, Scalar, P> || MapsMaskedTokens<M, Scalar, P>,
                  "colt5: a branch of Routed must have `Activations forward(policy, out, x, save) const` and "
                  "`backward(policy, saved, d_x, d_out, x, gradients) const`, or both with a mask behind x");
};

}  // namespace detail

/// In the place of a light branch where there is none: the output is the residual, or 0.
template <typename Scalar, Policy P>
struct NoLight {
    struct Activations {};
    struct Gradients {};

    NoLight() = default;
    NoLight(const P&, SeedSequence&) {}

    static void expect_parameters(std::string_view, Index) {}

    /// What is not finite in masked tokens of the residual counts as 0.
    static Activations forward(const P& policy, TokensView<Scalar> out, TokensView<const Scalar> x, Mask mask, bool,
                               TokensView<const Scalar> residual = {}) {
        using Number = accumulate_t<Scalar>;
        expect_shape("out", out.shape(), x.shape());
        if (!residual) {
            set_zero(policy, out);
        } else if (mask) {
            const auto is_finite = abs(as_expression(residual)) <= std::numeric_limits<Number>::max();
            assign(policy, out, select(column(mask) || is_finite, residual, Number(0)));
        } else {
            assign(policy, out, as_expression(residual));
        }
        return {};
    }

    /// d_x = the epilogue's residual, or 0
    static void backward(const P& policy, const Activations&, TokensView<Scalar> d_x, TokensView<const Scalar>,
                         TokensView<const Scalar> x, Mask, Gradients&,
                         const GradientEpilogue<Scalar, P>& epilogue = {}) {
        expect_shape("d_x", d_x.shape(), x.shape());
        if (epilogue.d_residual)
            assign(policy, d_x, as_expression(epilogue.d_residual));
        else
            set_zero(policy, d_x);
    }

    template <typename F, typename... M>
    static void each_parameter(F&&, const std::string&, M&...) {}
};

/// A module with a policy of its own, such as ConditionalRoutedTransformerBlock or Routed itself, as a branch.
template <typename Module>
class AsBranch : public Module {
    using Out = typename Module::Out;
    using Scalar = typename Out::value_type;
    using P = typename Out::PolicyType;

public:
    struct Activations {
        Out tokens;  // (b, n, d)
        typename Module::Activations of_module;
    };

    using Module::Module;

    Activations forward(const P& policy, TokensView<Scalar> out, TokensView<const Scalar> x, Mask mask,
                        bool save) const {
        const InOrder in_order(policy, this->policy());
        Activations saved;
        if (save) {
            saved.tokens = tensor_like(this->policy(), x);
            assign(this->policy(), saved.tokens, as_expression(x));
            saved.of_module = Module::forward(saved.tokens, mask);
            assign(this->policy(), out, as_expression(saved.of_module.out));
            saved.of_module.out = {};
        } else {
            assign(this->policy(), out, as_expression((*this)(x, mask)));
        }
        return saved;
    }
    void backward(const P& policy, const Activations& saved, TokensView<Scalar> d_x, TokensView<const Scalar> d_out,
                  TokensView<const Scalar>, Mask, typename Module::Gradients& gradients) const {
        const InOrder in_order(policy, this->policy());
        assign(this->policy(), d_x, as_expression(Module::backward(saved.of_module, d_out, gradients)));
    }

private:
    /// The constructor makes `second` wait for what `first` has queued so far; the destructor makes `first` wait for
    /// what `second` has queued by then.
    class InOrder {
    public:
        InOrder(const P& first, const P& second) : first_(first), second_(second) { after(second_, first_); }
        InOrder(const InOrder&) = delete;
        InOrder& operator=(const InOrder&) = delete;
        ~InOrder() {
            try {
                after(first_, second_);
            } catch (const std::exception&) {  // a destructor must not throw
            }
        }

    private:
        static void after([[maybe_unused]] const P& one, [[maybe_unused]] const P& other) {
            if constexpr (HasSideStream<P>) one.wait_event(other.record_event());
        }
        const P &first_, &second_;
    };
};

}  // namespace colt5
