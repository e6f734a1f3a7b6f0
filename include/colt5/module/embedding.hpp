// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <string>
#include <type_traits>

#include <colt5/core/random.hpp>
#include <colt5/core/tensor.hpp>
#include <colt5/expr/expr.hpp>
#include <colt5/op/gather.hpp>

namespace colt5 {

/// A learned vector for each token id, or byte, initialized as torch.nn.Embedding with a normal distribution:
///
///     out[b, i] = weight[ids[b, i]]     ids (b, n) in [0, vocabulary)  →  (b, n, d)
///
/// A head of the same weight is linear_cross_entropy(policy, x, embedding.weight, targets), with its gradient added to
/// that of the embedding. Throws ValueError when an id is out of its range; on a GPU that is undefined.
template <typename Scalar, Policy P>
struct Embedding {
    using Sum = accumulate_t<Scalar>;
    using Gradients = Embedding<Sum, P>;

    MatrixTensor<Scalar, P> weight;  // (vocabulary, d)

    Embedding() = default;
    /// `deviation` is the standard deviation of the initial weights.
    Embedding(const P& policy, SeedSequence& seeds, Index vocabulary, Index dim, double deviation = 1)
        : weight(policy, {vocabulary, dim}) {
        fill_normal(policy, weight, seeds.next(), deviation);
    }

    template <Viewable Ids>
    TokensTensor<Scalar, P> operator()(const P& policy, const Ids& ids) const {
        const auto indices = flat(ids);
        TokensTensor<Scalar, P> out(policy, {ids.extent(0), ids.extent(1), weight.extent(1)});
        gather(policy, as_sequence(out.view().rows()), as_sequence(weight.const_view()), indices);
        return out;
    }

    /// Adds the gradient of the weight, from d_out (b, n, d).
    template <Viewable D, Viewable Ids>
    void backward(const P& policy, const D& d_out, const Ids& ids, Gradients& gradients) const {
        expect_shape("d_out", d_out.shape(), {ids.extent(0), ids.extent(1), weight.extent(1)});
        expect_shape("gradients.weight", gradients.weight.shape(), weight.shape());
        const auto rows = as_sequence(d_out.const_view().rows());
        const auto into = as_sequence(gradients.weight.view());
        if constexpr (std::is_same_v<Scalar, Sum>) {
            gather_vjp(policy, into, rows, flat(ids));
        } else {
            TokensTensor<Sum, P> in_float(policy, rows.shape());
            assign(policy, in_float, rows);
            gather_vjp(policy, into, in_float, flat(ids));
        }
    }

    template <typename F, typename... M>
    static void each_parameter(F&& f, const std::string& prefix, M&... m) {
        f(prefix + "weight", m.weight...);
    }

private:
    /// Rows as a batch of one sequence.
    template <typename T>
    static TokensView<T> as_sequence(MatrixView<T> rows) {
        return rows.reshape(std::array{Index{1}, rows.extent(0), rows.extent(1)});
    }
    template <typename Ids>
    MatrixView<const TokenIndex> flat(const Ids& ids) const {
        static_assert(are_indices<Ids> && Ids::rank == 2, "colt5: `ids` must be TokenIndex (b, n)");
        const auto view = ids.const_view().reshape(std::array{Index{1}, ids.size()});
        if constexpr (!cleans_as_it_reads<P>)  // elsewhere the host would have to wait for them
            for (Index i = 0; i < view.size(); ++i)
                if (view.data()[i] < 0 || view.data()[i] >= weight.extent(0))
                    expect_value(false, "ids", detail::concat({"in a vocabulary of ", value_string(weight.extent(0))}),
                                 view.data()[i]);
        return view;
    }
};

}  // namespace colt5
