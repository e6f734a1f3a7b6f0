// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <string>
#include <vector>

#include <colt5/op/copy_sequences.hpp>
#include <colt5/op/gather.hpp>

#include "../draw.hpp"

/// Cases of op/gather.hpp and op/copy_sequences.hpp.
namespace cases {

template <typename T, typename P>
Results gather_case(const P& policy, const Setting& setting) {
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    const Index batch = draw.size(1, 9), dim = draw.size(1, 200), length = draw.length(5000, batch * dim);
    const Index k = draw.length(400);
    const auto x = draw.values(std::array{batch, length, dim});
    auto out = draw.values(std::array{batch, length, dim});
    const auto indices = draw.indices(batch, k, length);
    const auto rows = gather(policy, x, indices);
    record("gather", rows);
    for (const Scatter how : {Scatter::add, Scatter::mean}) {
        scatter(policy, how, out.view(), rows, indices);
        record(how == Scatter::add ? "add" : "mean", out);
        record(how == Scatter::add ? "d_rows of add" : "d_rows of mean", scatter_vjp(policy, how, out, indices));
    }
    const auto scale = draw.sums(std::array{batch, k});
    for (const Scatter how : {Scatter::add, Scatter::mean}) {
        scatter(policy, how, out.view(), rows, indices, scale);
        record(how == Scatter::add ? "scaled add" : "scaled mean", out);
    }
    const Index routes = draw.size(2, 4), picks = draw.length(400);
    const auto flat = draw.indices(batch * routes, picks, length);
    const auto of_routes = flat.const_view().reshape(std::array{batch, routes, picks});
    const auto rows_of_routes = draw.values(std::array{batch, routes * picks, dim});
    const auto scale_of_routes = draw.sums(of_routes.shape());
    for (const Scatter how : {Scatter::add, Scatter::mean}) {
        const std::string name = how == Scatter::add ? "add of routes" : "mean of routes";
        scatter(policy, how, out.view(), rows_of_routes, of_routes);
        record(name, out);
        scatter(policy, how, out.view(), rows_of_routes, of_routes, scale_of_routes);
        record("scaled " + name, out);
        record("d_rows of " + name, scatter_vjp(policy, how, out, of_routes));
    }
    // So many picks that a table finds those of a token; either a few of them, or more than a warp has lanes.
    for (const Index most : {Index{9000}, Index{500}, Index{90}}) {
        const Index tokens = draw.size(most / 2, most), many = draw.size(4097, 9000), narrow = draw.size(1, 40);
        const auto at = draw.indices(2, many, tokens);
        const auto d = draw.values(std::array{Index{2}, many, narrow});
        auto sum = draw.values(std::array{Index{2}, tokens, narrow});
        for (const Scatter how : {Scatter::add, Scatter::mean}) {
            auto scales = to_host(policy, draw.sums(at.shape()));
            for (std::size_t i = 0; i < scales.size(); i += 3) scales[i] = 0;
            scatter(policy, how, sum.view(), d, at,
                    from_host<MatrixTensor<accumulate_t<T>, P>>(policy, at.shape(), scales));
            record(how == Scatter::add ? "add of many" : "mean of many", sum);
        }
    }
    // More sequences than one launch takes, from the last to the first, and a row of no sequence behind each.
    const Index sequences = draw.size(1, 700), tokens = draw.size(1, 4);
    const Index columns = draw.chance(0.5) ? 8 * draw.size(1, 4) : draw.size(1, 35);
    std::vector<Index> firsts;
    for (Index i = sequences; i-- > 0;) firsts.push_back(i * (tokens + 1));
    auto all = draw.values(std::array{sequences * (tokens + 1), columns});
    auto part = draw.values(std::array{sequences, tokens, columns});
    scatter_sequences(policy, all.view(), part.const_view(), firsts);
    record("all rows", all, Kind::exact);
    auto other = draw.values(all.shape());
    gather_sequences(policy, part.view(), other.const_view(), firsts);
    record("sequences", part, Kind::exact);
    // A row with a scale of 0 changes nothing, whatever it holds.
    auto scales = to_host(policy, scale);
    auto values = to_host(policy, rows);
    for (std::size_t i = 0; i < scales.size(); i += 3) {
        scales[i] = 0;
        std::fill_n(values.begin() + static_cast<std::ptrdiff_t>(i) * dim, dim, static_cast<T>(INFINITY));
    }
    const auto with_zeros = from_host<MatrixTensor<accumulate_t<T>, P>>(policy, scale.shape(), scales);
    const auto infinite = from_host<TokensTensor<T, P>>(policy, rows.shape(), values);
    for (const Scatter how : {Scatter::add, Scatter::mean}) {
        scatter(policy, how, out.view(), infinite, indices, with_zeros);
        record(how == Scatter::add ? "add with a scale of 0" : "mean with a scale of 0", out);
    }
    return record.results;
}

}  // namespace cases
