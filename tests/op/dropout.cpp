// SPDX-License-Identifier: MIT
#include <colt5/op/dropout.hpp>

#include <array>
#include <cmath>
#include <cstdint>
#include <limits>

#include <doctest/doctest.h>

#include <colt5/cpu/dropout.hpp>

#include "support/tensors.hpp"

using namespace colt5;
using namespace support;

namespace {

bool keeps(const DropoutMask& drop, Index element) {
    const auto words = drop.random.bits(static_cast<std::uint64_t>(element / 4));
    return words[static_cast<std::size_t>(element % 4)] >= drop.rate * 0x1p32;
}

}  // namespace

TEST_CASE_TEMPLATE("dropout: against a loop, with and without a residual", T, float, double) {
    const Cpu policy(2);
    for (const auto& shape : {std::array<Index, 3>{2, 7, 5}, {1, 300, 12}, {3, 1, 1}, {2, 0, 4}, {1, 2, 1000}})
        for (const double rate : {0.0, 0.1, 0.75}) {
            const DropoutMask drop{Random(Seed{5}, 8), rate};
            const auto x = normal<T>(policy, shape, 0), residual = normal<T>(policy, shape, 1);
            auto product = filled<T>(policy, shape, 7), sum = filled<T>(policy, shape, 7);
            dropout(policy, product.view(), x, drop);
            dropout(policy, sum.view(), x, drop, residual.const_view());
            Index dropped = 0;
            for (Index i = 0; i < x.size(); ++i) {
                const T expected = keeps(drop, i) ? static_cast<T>(1 / (1 - rate)) * x.data()[i] : T(0);
                dropped += keeps(drop, i) ? 0 : 1;
                CHECK(product.data()[i] == expected);
                CHECK(sum.data()[i] == residual.data()[i] + expected);
            }
            if (x.size() > 1000)
                CHECK(static_cast<double>(dropped) / static_cast<double>(x.size()) ==
                      doctest::Approx(rate).epsilon(0.1));
            auto in_place = copy_of(policy, x);
            dropout(policy, in_place.view(), in_place, drop, residual.const_view());
            CHECK(same_bits(in_place, sum));
        }
}

TEST_CASE("dropout: what is not finite, in padding, in what is dropped, and elsewhere") {
    const Cpu policy(1);
    const double infinity = std::numeric_limits<double>::infinity(), nan = std::nan("");
    const DropoutMask drop{Random(Seed{5}), 0.5};
    auto x = filled<double>(policy, std::array<Index, 3>{1, 4, 6}, 1);
    auto residual = filled<double>(policy, x.shape(), 2), out = filled<double>(policy, x.shape(), 0);
    for (Index j = 0; j < 6; ++j) {
        x.view()(0, 0, j) = nan;
        residual.view()(0, 1, j) = nan;
        residual.view()(0, 2, j) = -infinity;
    }
    HostTensor<bool, 2> mask(policy, {1, 4});
    for (Index i = 0; i < 4; ++i) mask.data()[i] = i != 1;
    dropout(policy, out.view(), x, drop, residual.const_view(), mask);
    for (Index j = 0; j < 6; ++j) {
        CHECK(std::isnan(out.view()(0, 0, j)) == keeps(drop, j));
        CHECK(out.view()(0, 1, j) == (keeps(drop, 6 + j) ? 2 : 0));
        CHECK(out.view()(0, 2, j) == -infinity);
        CHECK(out.view()(0, 3, j) == (keeps(drop, 18 + j) ? 4 : 2));
    }
}

TEST_CASE("dropout: arguments that do not fit") {
    const Cpu policy(1);
    const auto x = normal<float>(policy, std::array<Index, 3>{1, 4, 6}, 0);
    auto out = normal<float>(policy, std::array<Index, 3>{1, 4, 5}, 0), same = copy_of(policy, x);
    CHECK_THROWS_WITH_AS(dropout(policy, out.view(), x, {Random(Seed{0}), 0.5}),
                         "colt5: `x` must have shape (1, 4, 5), but has (1, 4, 6)", ShapeError);
    CHECK_THROWS_WITH_AS(dropout(policy, same.view(), x, {Random(Seed{0}), 1.0}),
                         "colt5: `rate` must be in [0, 1), but is 1", ValueError);
    CHECK_THROWS_AS(dropout(policy, same.view(), x, {Random(Seed{0}), 0.5}, out.const_view()), ShapeError);
}
