// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <limits>

#include <colt5/module/parts.hpp>

using namespace colt5;

namespace {

constexpr Index most = std::numeric_limits<Index>::max();

/// Whether parts follow each other without gaps and are as long as they are to be.
void check_parts(Index tokens_at_a_time, Index batch, Index length, Index least) {
    CAPTURE(tokens_at_a_time);
    CAPTURE(batch);
    CAPTURE(length);
    CAPTURE(least);
    const Parts parts(MemoryPlan{tokens_at_a_time, true}, batch, length, least);
    Index sequence = 0, first = 0, short_parts = 0;
    for (Index i = 0; i < parts.count(); ++i) {
        const Part part = parts[i];
        CHECK(part.sequence == sequence);
        CHECK(part.first == first);
        CHECK(part.sequences >= 1);
        CHECK(part.sequences <= parts.sequences());
        CHECK(part.tokens <= parts.tokens());
        CHECK((part.tokens >= 1 || length == 0));
        CHECK((part.sequences == 1 || part.tokens == length));  // whole sequences, or part of one
        short_parts += !part.is_last && part.tokens < least ? 1 : 0;
        first += part.tokens;
        CHECK(part.is_last == (first == length));
        if (part.is_last) {
            sequence += part.sequences;
            first = 0;
        }
    }
    CHECK(sequence == batch);
    CHECK(first == 0);
    CHECK(short_parts == 0);
}

}  // namespace

TEST_CASE("Parts: cover a batch in order, and none is shorter than the least that is asked for") {
    for (const Index tokens_at_a_time : {Index{1}, Index{2}, Index{7}, Index{40}, Index{41}, Index{64}, Index{1000}})
        for (const Index batch : {0, 1, 2, 5})
            for (const Index length : {0, 1, 2, 11, 41, 42, 43, 82, 83, 84, 200})
                for (const Index least : {1, 2, 21, 42, 300}) check_parts(tokens_at_a_time, batch, length, least);
}

TEST_CASE("Parts: of about as many tokens as the plan says, where nothing forbids it") {
    CHECK(Parts({100, true}, 2, 250).tokens() == 84);
    CHECK(Parts({100, true}, 2, 250).count() == 6);
    CHECK(Parts({100, true}, 20, 30).sequences() == 3);
    CHECK(Parts({100, true}, 20, 30).count() == 7);
    CHECK(Parts({40, true}, 1, 200, 42).tokens() == 50);
    CHECK(Parts({1, true}, 1, 43, 42).count() == 1);
}

TEST_CASE("Parts: plans, lengths and batches of any size do not overflow") {
    for (const Index tokens_at_a_time : {Index{1}, Index{2048}, most / 2 + 1, most - 1, most})
        for (const Index least : {Index{0}, Index{1}, most / 3, most})
            for (const Index batch : {Index{0}, Index{1}, Index{3}}) check_parts(tokens_at_a_time, batch, 5, least);
    for (const Index tokens_at_a_time : {Index{1} << 62, most}) {
        const Parts parts({tokens_at_a_time, true}, Index{1} << 40, (Index{1} << 20) + 1);
        CHECK(parts.tokens() == (Index{1} << 20) + 1);
        CHECK(parts.sequences() == std::min(Index{1} << 40, tokens_at_a_time / parts.tokens()));
        CHECK(parts[parts.count() - 1].sequence + parts[parts.count() - 1].sequences == Index{1} << 40);
    }
    CHECK(Parts({1, true}, 1, most, 1).count() == most);
    CHECK(Parts({most, true}, 1, most, most).count() == 1);
}
