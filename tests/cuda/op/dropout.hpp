// SPDX-License-Identifier: MIT
#pragma once

#include <array>

#include <colt5/op/dropout.hpp>

#include "../draw.hpp"

/// Cases of op/dropout.hpp.
namespace cases {

template <typename T, typename P>
Results dropout_case(const P& policy, const Setting& setting) {
    Draw<T, P> draw(policy, setting);
    Recorder record(policy);
    const Index batch = draw.size(1, 5), dim = draw.chance(0.5) ? 8 * draw.size(1, 40) : draw.size(1, 200);
    const Index length = draw.length(4000, batch * dim);
    const auto x = draw.values(std::array{batch, length, dim}), residual = draw.values(x.shape());
    const auto mask = draw.optional_mask(batch, length);
    const DropoutMask drop{Random(Seed{setting.seed}, 3), draw.chance(0.2) ? 0 : 0.3};
    auto out = tensor_like(policy, x);
    dropout(policy, out.view(), x, drop);
    record("product", out);
    dropout(policy, out.view(), x, drop, residual.const_view(), mask.const_view());
    record("sum", out);
    dropout(policy, out.view(), out, drop, residual.const_view());
    record("in place", out);
    return record.results;
}

}  // namespace cases
