// SPDX-License-Identifier: MIT
#pragma once

#include <string>
#include <string_view>
#include <utility>

#include <colt5/module/layers.hpp>
#include <colt5/op/cross_entropy.hpp>
#include <colt5/op/linear.hpp>

namespace colt5 {

/// The end of a language model: a norm, and a linear map to the logits of a vocabulary, with their cross-entropy.
///
///     logits = rms_norm(x) · weightᵀ     x (b, n, d), weight (V, d)  →  (b, n, V)
///
/// The weight is the head's own, or tied to another, as to that of an Embedding: then each call is given that one, and
/// backward its gradient. Of all logits, `losses` and `backward` hold one chunk at a time (see linear_cross_entropy).
template <typename Scalar, Policy P>
struct Head {
    using Sum = accumulate_t<Scalar>;
    using Gradients = Head<Sum, P>;
    using Weight = MatrixView<const Scalar>;
    using Targets = MatrixView<const TokenIndex>;

    RMSNorm<Scalar, P> norm;
    MatrixTensor<Scalar, P> weight;  // (V, d); empty: tied

    Head() = default;
    /// Tied.
    Head(const P& policy, Index dim) : norm(policy, dim) {}
    /// With a weight of its own, initialized as torch.nn.Linear.
    Head(const P& policy, SeedSequence& seeds, Index vocabulary, Index dim)
        : norm(policy, dim), weight(policy, {vocabulary, dim}) {
        fill_linear_uniform(policy, weight, seeds.next(), dim);
    }

    /// Throws ShapeError, which names the parameter with `prefix` before its name, when one does not fit tokens of
    /// `dim` numbers.
    void expect_parameters(std::string_view prefix, Index dim) const {
        expect_shape(prefix, "norm.gamma", norm.gamma.shape(), {dim});
        if (weight) expect_shape(prefix, "weight", weight.shape(), {weight.extent(0), dim});
    }

    template <Viewable X>
    TokensTensor<Scalar, P> logits(const P& policy, const X& x, Weight tied = {}) const {
        return linear(policy, norm(policy, x), weight_or(tied));
    }
    /// The loss of each token, for its target in [0, V), or 0 where that is negative; see linear_cross_entropy.
    template <Viewable X>
    MatrixTensor<Sum, P> losses(const P& policy, const X& x, Targets targets, Weight tied = {},
                                const CrossEntropy& how = {}) const {
        return linear_cross_entropy(policy, norm(policy, x), weight_or(tied), targets, {}, how);
    }
    /// Losses and their gradient of x in one pass, from d_losses (b, n), such as 1 / (b · n) for the mean. Adds the
    /// gradients of the parameters, or of the tied weight to d_tied.
    template <Viewable D, Viewable X>
    CrossEntropyGradients<Scalar, P> backward(const P& policy, const D& d_losses, const X& x, Targets targets,
                                              Gradients& gradients, Weight tied = {}, MatrixView<Sum> d_tied = {},
                                              const CrossEntropy& how = {}) const {
        const Weight used = weight_or(tied);
        expect_value(static_cast<bool>(d_tied) == static_cast<bool>(tied), "d_tied", tied ? "there" : "absent",
                     d_tied ? "there" : "absent");
        if (tied) expect_shape("d_tied", d_tied.shape(), tied.shape());
        auto result = linear_cross_entropy_vjp(policy, d_losses, norm(policy, x), used, targets,
                                               weight ? gradients.weight.view() : d_tied, {}, {}, how);
        result.d_x = norm.backward(policy, result.d_x, x, gradients.norm);
        return result;
    }

    template <typename F, typename... M>
    static void each_parameter(F&& f, const std::string& prefix, M&... m) {
        RMSNorm<Scalar, P>::each_parameter(f, name_for<F>(prefix, "norm."), m.norm...);
        if (first_of(m...).weight) f(name_for<F>(prefix, "weight"), m.weight...);
    }

private:
    Weight weight_or(Weight tied) const {
        expect_value(static_cast<bool>(weight) != static_cast<bool>(tied), "tied",
                     weight ? "absent, since the head has a weight" : "a weight, since the head has none",
                     tied ? "there" : "absent");
        if (tied) expect_shape("tied", tied.shape(), {dynamic, norm.gamma.extent(0)});
        return weight ? weight.const_view() : tied;
    }
};

}  // namespace colt5
