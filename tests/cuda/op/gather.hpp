// SPDX-License-Identifier: MIT
#pragma once

#include <array>

#include <colt5/op/gather.hpp>

#include "../draw.hpp"

/// Cases of op/gather.hpp.
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
    return record.results;
}

}  // namespace cases
