// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <limits>

#include <colt5/core/tensor.hpp>
#include <colt5/expr/expr.hpp>
#include <colt5/op/gather.hpp>
#include <colt5/op/linear.hpp>

namespace colt5 {

/// Settings of linear_cross_entropy.
struct CrossEntropy {
    /// The number of logits of a chunk of tokens, which are in memory at once. A chunk has at least one token.
    Index logits_at_a_time = Index{1} << 22;
};

/// The losses, and the gradient of x.
template <typename Scalar, Policy P>
struct CrossEntropyGradients {
    MatrixTensor<accumulate_t<Scalar>, P> losses;  // (b, n)
    TokensTensor<Scalar, P> d_x;                   // (b, n, d)
};

namespace detail {

/// Throws ValueError for a number of classes out of its range and, on the CPU, for a target of `classes` or more.
template <Policy P, typename T>
void expect_targets([[maybe_unused]] const T& targets, Index classes) {
    expect_value(classes >= 1 && classes < (1 << 24), "weight", "of 1 to 2^24 - 1 classes", classes);
    if constexpr (!cleans_as_it_reads<P>) {  // on a GPU, the host would have to wait for them
        const auto all = targets.const_view();
        for (Index i = 0; i < all.size(); ++i)
            if (all.data()[i] >= classes)
                expect_value(false, "targets", concat({"below the number of classes, ", value_string(classes)}),
                             all.data()[i]);
    }
}

/// Cross-entropy of one chunk of tokens after the other. The memory of a chunk's logits is free again for the next.
template <Policy P, typename Scalar>
class LinearCrossEntropy {
    using Logit = accumulate_t<Scalar>;
    using Targets = MatrixView<const TokenIndex>;

public:
    template <typename X, typename W, typename T>
    LinearCrossEntropy(const P& policy, const X& x, const W& weight, const T& targets, VectorView<const Scalar> bias,
                       const CrossEntropy& how)
        : policy_(policy),
          x_(x.const_view().rows()),
          weight_(weight.const_view()),
          targets_(targets.const_view()),
          bias_(bias) {
        static_assert(X::rank == 3, "colt5: `x` must be tokens (b, n, d)");
        static_assert(are_indices<T>, "colt5: `targets` must be of TokenIndex");
        expect_shape("weight", weight.shape(), {dynamic, x.extent(2)});
        expect_shape("targets", targets.shape(), {x.extent(0), x.extent(1)});
        if (bias) expect_shape("bias", bias.shape(), {classes()});
        expect_targets<P>(targets, classes());
        expect_value(how.logits_at_a_time >= 1, "logits_at_a_time", ">= 1", how.logits_at_a_time);
        rows_at_a_time_ = std::clamp(how.logits_at_a_time / classes(), Index{1}, std::max(Index{1}, x_.extent(0)));
    }

    /// Assigns the losses, and calls for each chunk
    ///
    ///     body(first row, rows, logits (1, rows, V), targets (rows), log of the sum of exponentials (rows), is_target)
    ///
    /// is_target is an expression (rows, V), true at the column of each target. Targets are numbers of type Logit here:
    /// classes are fewer than 2^24, so that float holds each exactly.
    template <typename Body>
    void each_chunk(MatrixView<Logit> losses, const Body& body) const {
        for (Index first = 0; first < x_.extent(0); first += rows_at_a_time_) {
            const Index rows = std::min(rows_at_a_time_, x_.extent(0) - first);
            const auto logits = logits_of(tokens(x_, first, rows));
            VectorTensor<Logit, P> target(policy_, {rows}), log_sum(policy_, {rows});
            assign(policy_, target, cast<Logit>(VectorView<const TokenIndex>(targets_.data() + first, {rows})));
            assign(policy_, log_sum, row_log_sum_exp(logits));
            const auto is_target = column_numbers<Logit>() == column(target);
            const auto loss = column(log_sum) - row_sum(select(is_target, logits, Logit(0)));
            assign(policy_, VectorView<Logit>(losses.data() + first, {rows}),
                   select(column(target) < Logit(0), Logit(0),
                          select(column(target) < static_cast<Logit>(classes()), loss, nan_)));
            body(first, rows, logits, target, log_sum, is_target);
        }
    }

    /// In Logit: rounding a large logit to 16 bits would change its exponential by some per cent.
    TokensTensor<Logit, P> logits_of(TokensView<const Scalar> x) const {
        TokensTensor<Logit, P> logits(policy_, {x.extent(0), x.extent(1), classes()});
        if constexpr (std::same_as<Logit, Scalar>) {
            linear(policy_, logits.view(), x, weight_, bias_);
        } else {
            linear(policy_, logits.view(), x, weight_);
            if (bias_) assign(policy_, logits, logits + row(bias_));
        }
        return logits;
    }

    Index classes() const { return weight_.extent(0); }
    /// The rows [first, first + rows) of tokens or of their gradients, seen as a batch of one sequence.
    template <typename T>
    static TokensView<T> tokens(MatrixView<T> all, Index first, Index rows) {
        return all.range(first, rows).reshape(std::array{Index{1}, rows, all.extent(1)});
    }

private:
    static constexpr Logit nan_ = std::numeric_limits<Logit>::quiet_NaN();

    const P& policy_;
    MatrixView<const Scalar> x_, weight_;
    Targets targets_;
    VectorView<const Scalar> bias_;
    Index rows_at_a_time_ = 1;
};

}  // namespace detail

/// The loss of each token of a language model or classifier: a linear map to logits z, then cross-entropy.
///
///     losses = log Σ_v exp(z_v) − z_target     z = x · weightᵀ + bias
///     x (b, n, d), weight (V, d), targets (b, n), bias (V) or absent  →  (b, n), in accumulate_t<Scalar>
///
/// A token with a negative target, such as PyTorch's −100, is ignored: its loss is 0. A target of V or more is an
/// error. On the CPU it throws ValueError; on a GPU the loss and its gradients are NaN. Of all logits,
/// only those of one chunk of tokens are in memory at once; see CrossEntropy.
template <Policy P, Viewable X, Viewable W, Viewable T>
MatrixTensor<accumulate_t<typename X::value_type>, P> linear_cross_entropy(
    const P& policy, const X& x, const W& weight, const T& targets, VectorView<const typename X::value_type> bias = {},
    const CrossEntropy& how = {}) {
    using Scalar = typename X::value_type;
    const detail::LinearCrossEntropy<P, Scalar> chunks(policy, x, weight, targets, bias, how);
    MatrixTensor<accumulate_t<Scalar>, P> losses(policy, targets.shape());
    chunks.each_chunk(losses.view(), [](const auto&...) {});
    return losses;
}

/// Losses and vector-Jacobian product in one pass, which computes the logits once. A chunk's gradient of the logits is
/// held together with its logits, in Scalar: as much memory in float and double, half as much in 16-bit types. d_bias
/// may be absent.
///
///     d_losses (b, n), such as 1 / (b · n) for the mean  →  losses, d_x,  d_weight += …,  d_bias += …
template <Policy P, Viewable D, Viewable X, Viewable W, Viewable T>
CrossEntropyGradients<typename X::value_type, P> linear_cross_entropy_vjp(
    const P& policy, const D& d_losses, const X& x, const W& weight, const T& targets,
    MatrixView<accumulate_t<typename X::value_type>> d_weight, VectorView<const typename X::value_type> bias = {},
    VectorView<accumulate_t<typename X::value_type>> d_bias = {}, const CrossEntropy& how = {}) {
    using Scalar = typename X::value_type;
    using Logit = accumulate_t<Scalar>;
    using Loss = detail::LinearCrossEntropy<P, Scalar>;
    const Loss chunks(policy, x, weight, targets, bias, how);
    expect_shape("d_losses", d_losses.shape(), targets.shape());
    expect_shape("d_weight", d_weight.shape(), weight.shape());
    if (d_bias) expect_shape("d_bias", d_bias.shape(), {chunks.classes()});
    CrossEntropyGradients<Scalar, P> result{{policy, targets.shape()}, {policy, x.shape()}};
    const Logit* const d_all = d_losses.const_view().data();
    chunks.each_chunk(result.losses.view(), [&](Index first, Index rows, const auto& logits, const auto& target,
                                                const auto& log_sum, const auto& is_target) {
        TokensTensor<Scalar, P> d_logits(policy, logits.shape());
        const VectorView<const Logit> d(d_all + first, {rows});
        assign(policy, d_logits,
               select(column(target) < Logit(0), Logit(0),
                      select(column(target) < static_cast<Logit>(chunks.classes()),
                             (exp(logits - column(log_sum)) - cast<Logit>(is_target)) * column(d),
                             std::numeric_limits<Logit>::quiet_NaN())));
        detail::linear_vjp_into(policy, Loss::tokens(result.d_x.view().rows(), first, rows), d_logits,
                                Loss::tokens(x.const_view().rows(), first, rows), weight, d_weight, d_bias);
    });
    return result;
}

}  // namespace colt5
