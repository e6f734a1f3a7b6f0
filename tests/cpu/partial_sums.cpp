// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <vector>

#include <colt5/core/random.hpp>
#include <colt5/cpu/parallel.hpp>
#include <colt5/cpu/partial_sums.hpp>

using namespace colt5;

TEST_CASE("PartialSums: added up in order, the same bits for any number of threads; an absent total is left alone") {
    const Index rows = 5 * cpu::rows_per_chunk + 7, columns = 13;
    const Random random(Seed{3});
    std::vector<float> x(static_cast<std::size_t>(rows * columns));
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(random.normal(i));
    const auto column = [&](Index j, float start) {  // chunk by chunk
        float total = start;
        for (Index first = 0; first < rows; first += cpu::rows_per_chunk) {
            float sum = 0;
            for (Index i = first; i < std::min(rows, first + cpu::rows_per_chunk); ++i)
                sum += x[static_cast<std::size_t>(i * columns + j)];
            total += sum;
        }
        return total;
    };
    for (const int threads : {1, 2, 3}) {
        const Cpu policy(threads);
        cpu::PartialSums<float, 3> sums(policy, cpu::row_chunks(rows), columns);
        cpu::for_each_row_chunk(policy, rows, [&](Index chunk, Index begin, Index end) {
            const auto [first, second, third] = sums[chunk];
            cpu::add_rows(x.data() + begin * columns, end - begin, columns, first);
            for (Index j = 0; j < columns; ++j) second[j] += static_cast<float>(end - begin);
            third[0] = 1;
        });
        std::vector<float> totals(2 * static_cast<std::size_t>(columns), 10.0f);
        const VectorView<float> first(totals.data(), {columns}), second(totals.data() + columns, {columns});
        sums.add_to({first, second, VectorView<float>()});
        for (Index j = 0; j < columns; ++j) {
            CHECK(first(j) == column(j, 10.0f));
            CHECK(second(j) == 10.0f + static_cast<float>(rows));
        }
    }
}
