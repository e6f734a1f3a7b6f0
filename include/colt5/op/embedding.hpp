// SPDX-License-Identifier: MIT
#pragma once

#include <array>

#include <colt5/core/tensor.hpp>

namespace colt5 {

template <typename P>
void embedding_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `embedding` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}
template <typename P>
void embedding_vjp_kernel(const P&, ...) {
    static_assert(has_kernel<P>,
                  "colt5: no `embedding_vjp` kernel for this policy: include <colt5/cpu.hpp> or <colt5/cuda.cuh>");
}

namespace detail {
inline void expect_id(TokenIndex id, Index vocabulary, const char* argument = "ids") {
    if (id < 0 || id >= vocabulary)
        expect_value(false, argument, concat({"in a vocabulary of ", value_string(vocabulary)}), id);
}

/// ids (b, n) as (b · n). On the CPU, throws ValueError for an id out of its range.
template <Policy P, typename Ids>
VectorView<const TokenIndex> flat_ids(const Ids& ids, Index vocabulary, const char* argument = "ids") {
    static_assert(are_indices<Ids> && Ids::rank == 2, "colt5: `ids` must be TokenIndex (b, n)");
    expect_length(argument, ids.size());
    const auto flat = ids.const_view().reshape(std::array{ids.size()});
    if constexpr (!cleans_as_it_reads<P>)  // on a GPU, the host would have to wait for them
        for (Index i = 0; i < flat.size(); ++i) expect_id(flat.data()[i], vocabulary, argument);
    return flat;
}
}  // namespace detail

/// Throws ValueError, which names the id and the vocabulary, unless all ids are in [0, vocabulary). On a GPU, the host
/// waits for them.
template <Policy P, Viewable Ids>
void expect_ids(const P& policy, const Ids& ids, Index vocabulary) {
    static_assert(are_indices<Ids>, "colt5: `ids` must be of TokenIndex");
    for (const TokenIndex id : to_host(policy, ids)) detail::expect_id(id, vocabulary);
}

/// The row of a table for each token id:
///
///     out[b, i] = weight[ids[b, i]]     weight (V, d), ids (b, n) in [0, V)  →  (b, n, d)
///
/// For an id out of range, the CPU throws ValueError, which names it and V. On a GPU its row is NaN and it has no
/// gradient; expect_ids finds such ids.
template <Policy P, Viewable W, Viewable Ids>
TokensTensor<typename W::value_type, P> embedding(const P& policy, const W& weight, const Ids& ids) {
    using T = typename W::value_type;
    static_assert(W::rank == 2, "colt5: `weight` must be a matrix (vocabulary, d)");
    const auto flat = detail::flat_ids<P>(ids, weight.extent(0));
    TokensTensor<T, P> out(policy, {ids.extent(0), ids.extent(1), weight.extent(1)});
    embedding_kernel(policy, out.view().rows(), MatrixView<const T>(weight.const_view()), flat);
    return out;
}

/// The gradient of the weight, from d_out (b, n, d):  d_weight[v] += Σ d_out[b, i] over all ids[b, i] = v,
/// in float or double; on the CPU in the order of the tokens, on a GPU in another fixed order. Ids as above.
template <Policy P, Viewable D, Viewable Ids>
void embedding_vjp(const P& policy, MatrixView<accumulate_t<typename D::value_type>> d_weight, const D& d_out,
                   const Ids& ids) {
    using T = typename D::value_type;
    static_assert(D::rank == 3, "colt5: `d_out` must be (b, n, d)");
    const auto flat = detail::flat_ids<P>(ids, d_weight.extent(0));
    expect_shape("d_out", d_out.shape(), {ids.extent(0), ids.extent(1), d_weight.extent(1)});
    embedding_vjp_kernel(policy, d_weight, MatrixView<const T>(d_out.const_view().rows()), flat);
}

}  // namespace colt5
