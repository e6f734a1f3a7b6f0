// SPDX-License-Identifier: MIT
#include <colt5/schedule/sequences.hpp>

#include "module/checks.hpp"

using namespace colt5;
using namespace support;

namespace {

using Lengths = std::vector<Index>;

/// Of each group and side: the length and whether it is contiguous, the numbers of its sequences, their first rows.
template <typename... Rows>
std::vector<std::vector<Lengths>> groups(const Rows&... rows) {
    SequencePlan<sizeof...(Rows)> plan;
    std::vector<std::vector<Lengths>> all;
    for (int again = 0; again < 2; ++again) {
        all.clear();
        plan.make(rows...);
        for (std::size_t i = 0; i < plan.size(); ++i)
            for (std::size_t side = 0; side < sizeof...(Rows); ++side) {
                const SequenceGroup group = plan.group(i, side);
                all.push_back({{group.length, group.contiguous ? 1 : 0},
                               {group.numbers.begin(), group.numbers.end()},
                               {group.first_rows.begin(), group.first_rows.end()}});
            }
    }
    return all;
}
using Packed = std::array<Index, 2>;
using Padded = std::array<Index, 3>;

}  // namespace

TEST_CASE("sequences: those of one length are one group, in the order of their first ones") {
    using Found = std::vector<std::vector<Lengths>>;
    const auto packed = [](const Lengths& numbers) { return SequenceRows("", numbers, Packed{numbers.back(), 4}); };
    CHECK(groups(packed(Lengths{0})).empty());
    const Lengths mixed{0, 5, 10, 10, 10, 15, 17};
    CHECK(groups(packed(mixed)) == Found{{{5, 1}, {0, 1, 4}, {0, 5, 10}}, {{2, 1}, {5}, {15}}});
    const Lengths scattered{0, 2, 5, 7, 10, 12};
    CHECK(groups(packed(scattered)) == Found{{{2, 0}, {0, 2, 4}, {0, 5, 10}}, {{3, 0}, {1, 3}, {2, 7}}});
    const Lengths padded{5, 5, 3, 3, 5};
    CHECK(groups(SequenceRows("", padded, Padded{5, 5, 4})) ==
          Found{{{5, 0}, {0, 1, 4}, {0, 5, 20}}, {{3, 0}, {2, 3}, {10, 15}}});
    CHECK(groups(SequenceRows("", Lengths{}, Padded{0, 5, 4})).empty());

    // Sequences of a group are equally long on every side.
    const Lengths five{0, 5, 10, 15, 20}, other{0, 1, 2, 3, 6};
    CHECK(groups(packed(five), packed(other)) == Found{{{5, 1}, {0, 1, 2}, {0, 5, 10}},
                                                       {{1, 1}, {0, 1, 2}, {0, 1, 2}},
                                                       {{5, 1}, {3}, {15}},
                                                       {{3, 1}, {3}, {3}}});
}

TEST_CASE("sequences: rows of groups go where they belong, and those of none become 0") {
    const Cpu policy(2, Cpu::usual_plan, Allocations::separate_with_nan);
    const Padded shape{5, 4, 2};
    const Lengths lengths{2, 0, 3, 2, 4};
    SequencePlan<1> plan;
    plan.make(SequenceRows("", lengths, shape));
    CHECK(plan.rows() == 11);
    const auto x = normal<double>(policy, shape, 0);
    RowsOfGroups<TokensTensor<double, Cpu>> rows(policy, shape, plan.rows());
    for (std::size_t g = 0; g < plan.size(); ++g) {
        const SequenceGroup group = plan.group(g);
        TokensTensor<double, Cpu> copy;
        const auto part = group.of(policy, x.const_view().rows(), copy);
        REQUIRE(part.shape() == Padded{group.count(), group.length, 2});
        CHECK((copy.size() > 0) == (group.length == 2));
        auto to = rows.part(group);
        assign(policy, to, as_expression(part) + 1.0);
        rows.put(group, to);
    }
    const auto tensor = rows.finish();
    for (Index b = 0; b < shape[0]; ++b)
        for (Index i = 0; i < shape[1]; ++i)
            for (Index j = 0; j < shape[2]; ++j)
                CHECK(tensor.const_view()(b, i, j) ==
                      (i < lengths[static_cast<std::size_t>(b)] ? x.const_view()(b, i, j) + 1.0 : 0.0));
}

TEST_CASE("sequences: lengths of a mask") {
    const Cpu policy(1);
    const auto mask = mask_of_lengths(policy, {4, 0, 2}, 4);
    CHECK(lengths_of(policy, mask) == Lengths{4, 0, 2});
    CHECK(lengths_of(policy, mask_of_lengths(policy, {0, 0}, 0)) == Lengths{0, 0});
    CHECK(cumulative_lengths(Lengths{4, 0, 2}) == Lengths{0, 4, 4, 6});
    auto hole = mask_of_lengths(policy, {4, 4}, 4);
    hole.view()(1, 2) = false;
    CHECK_THROWS_WITH_AS(lengths_of(policy, hole),
                         "colt5: `mask` must be false behind its first masked token, (1, 2), but is true at (1, 3)",
                         ValueError);
}
