// SPDX-License-Identifier: MIT
#pragma once

#include <string>

#include <colt5/core/parameters.hpp>
#include <colt5/core/random.hpp>
#include <colt5/core/tensor.hpp>
#include <colt5/op/embedding.hpp>

namespace colt5 {

/// A learned vector for each token id, or byte, initialized as torch.nn.Embedding with a normal distribution:
///
///     out[b, i] = weight[ids[b, i]]     ids (b, n) in [0, vocabulary)  →  (b, n, d)
///
/// A tied head is linear_cross_entropy(policy, x, embedding.weight, targets), with its gradient added to that of the
/// embedding. An id out of range is a ValueError, and on a GPU a row of NaN (see op/embedding.hpp).
template <typename Scalar, Policy P>
struct Embedding {
    using Sum = accumulate_t<Scalar>;
    using Gradients = Embedding<Sum, P>;

    MatrixTensor<Scalar, P> weight;  // (vocabulary, d)

    Embedding() = default;
    /// `deviation` is the standard deviation of the initial weights.
    /// Throws ValueError unless vocabulary and dim are at least 1.
    Embedding(const P& policy, SeedSequence& seeds, Index vocabulary, Index dim, double deviation = 1) {
        expect_value(vocabulary >= 1, "vocabulary", ">= 1", vocabulary);
        expect_value(dim >= 1, "dim", ">= 1", dim);
        weight = {policy, {vocabulary, dim}};
        fill_normal(policy, weight, seeds.next(), deviation);
    }

    template <Viewable Ids>
    TokensTensor<Scalar, P> operator()(const P& policy, const Ids& ids) const {
        return embedding(policy, weight, ids);
    }
    /// Adds the gradient of the weight, from d_out (b, n, d).
    template <Viewable D, Viewable Ids>
    void backward(const P& policy, const D& d_out, const Ids& ids, Gradients& gradients) const {
        expect_shape("gradients.weight", gradients.weight.shape(), weight.shape());
        embedding_vjp(policy, gradients.weight.view(), d_out, ids);
    }

    template <typename F, typename... M>
    static void each_parameter(F&& f, const std::string& prefix, M&... m) {
        f(name_for<F>(prefix, "weight"), m.weight...);
    }
};

}  // namespace colt5
