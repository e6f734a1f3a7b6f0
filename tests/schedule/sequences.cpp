// SPDX-License-Identifier: MIT
#include <colt5/schedule/sequences.hpp>

#include "module/checks.hpp"

using namespace colt5;
using namespace support;

namespace {

using Lengths = std::vector<Index>;

/// Of each run: the number of the first sequence, how many, how long, and the first row.
template <std::size_t rank, typename... Others>
std::vector<Lengths> runs(const Lengths& numbers, const std::array<Index, rank>& shape, const Others&... others) {
    std::vector<Lengths> all;
    each_run(
        [&](const SequenceRun& run, const auto&...) {
            all.push_back({run.first, run.count, run.length, run.first_row});
        },
        SequenceRows("", numbers, shape), others...);
    return all;
}

}  // namespace

TEST_CASE("sequences: those of one length that follow each other in memory are one run") {
    using Packed = std::array<Index, 2>;
    using Padded = std::array<Index, 3>;
    using Runs = std::vector<Lengths>;
    CHECK(runs(Lengths{0}, Packed{0, 4}).empty());
    CHECK(runs(Lengths{0, 5, 10, 10, 10, 15, 17}, Packed{17, 4}) ==
          Runs{{0, 2, 5, 0}, {2, 2, 0, 10}, {4, 1, 5, 10}, {5, 1, 2, 15}});
    CHECK(runs(Lengths{5, 5, 3, 3, 5}, Padded{5, 5, 4}) ==
          Runs{{0, 2, 5, 0}, {2, 1, 3, 10}, {3, 1, 3, 15}, {4, 1, 5, 20}});
    CHECK(runs(Lengths{}, Padded{0, 5, 4}).empty());

    // A run has the same sequences of all that are given.
    const Lengths other{0, 1, 2, 3, 6};
    CHECK(runs(Lengths{0, 5, 10, 15, 20}, Packed{20, 4}, SequenceRows("", other, Packed{6, 4})) ==
          Runs{{0, 3, 5, 0}, {3, 1, 5, 15}});
}

TEST_CASE("sequences: rows that no run writes become 0") {
    const Cpu policy(1, Cpu::usual_plan, Allocations::separate_with_nan);
    const std::array<Index, 3> shape{3, 4, 2};
    RowsInOrder<TokensTensor<double, Cpu>> rows(policy, shape);
    const Lengths lengths{2, 0, 3};
    each_run(
        [&](const SequenceRun& run) {
            auto part = rows.next(run);
            CHECK(part.shape() == std::array<Index, 3>{1, run.length, 2});
            fill(policy, part, static_cast<double>(run.first + 1));
        },
        SequenceRows("", lengths, shape));
    const auto tensor = rows.finish();
    for (Index b = 0; b < 3; ++b)
        for (Index i = 0; i < 4; ++i)
            for (Index j = 0; j < 2; ++j)
                CHECK(tensor.const_view()(b, i, j) ==
                      (i < lengths[static_cast<std::size_t>(b)] ? static_cast<double>(b + 1) : 0.0));
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
