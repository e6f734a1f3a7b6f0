// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <limits>

#include <colt5/schedule/chunks.hpp>

using namespace colt5;

namespace {

constexpr Index most = std::numeric_limits<Index>::max();

/// Whether chunks follow each other without gaps and are as long as they are to be.
void check_chunks(Index tokens_at_a_time, Index batch, Index length, Index least) {
    CAPTURE(tokens_at_a_time);
    CAPTURE(batch);
    CAPTURE(length);
    CAPTURE(least);
    const Chunks chunks(MemoryPlan{tokens_at_a_time, true}, batch, length, least);
    Index sequence = 0, first = 0, short_chunks = 0;
    for (Index i = 0; i < chunks.count(); ++i) {
        const Chunk chunk = chunks[i];
        CHECK(chunk.sequence == sequence);
        CHECK(chunk.first == first);
        CHECK(chunk.sequences >= 1);
        CHECK(chunk.sequences <= chunks.sequences());
        CHECK(chunk.tokens <= chunks.tokens());
        CHECK((chunk.tokens >= 1 || length == 0));
        CHECK((chunk.sequences == 1 || chunk.tokens == length));  // whole sequences, or chunk of one
        short_chunks += !chunk.is_last && chunk.tokens < least ? 1 : 0;
        first += chunk.tokens;
        CHECK(chunk.is_last == (first == length));
        if (chunk.is_last) {
            sequence += chunk.sequences;
            first = 0;
        }
    }
    CHECK(sequence == batch);
    CHECK(first == 0);
    CHECK(short_chunks == 0);
}

}  // namespace

TEST_CASE("Chunks: cover a batch in order, and none is shorter than the least that is asked for") {
    for (const Index tokens_at_a_time : {Index{1}, Index{2}, Index{7}, Index{40}, Index{41}, Index{64}, Index{1000}})
        for (const Index batch : {0, 1, 2, 5})
            for (const Index length : {0, 1, 2, 11, 41, 42, 43, 82, 83, 84, 200})
                for (const Index least : {1, 2, 21, 42, 300}) check_chunks(tokens_at_a_time, batch, length, least);
}

TEST_CASE("Chunks: of about as many tokens as the plan says, where nothing forbids it") {
    CHECK(Chunks({100, true}, 2, 250).tokens() == 84);
    CHECK(Chunks({100, true}, 2, 250).count() == 6);
    CHECK(Chunks({100, true}, 20, 30).sequences() == 3);
    CHECK(Chunks({100, true}, 20, 30).count() == 7);
    CHECK(Chunks({40, true}, 1, 200, 42).tokens() == 50);
    CHECK(Chunks({1, true}, 1, 43, 42).count() == 1);
}

TEST_CASE("Chunks: plans, lengths and batches of any size do not overflow") {
    for (const Index tokens_at_a_time : {Index{1}, Index{2048}, most / 2 + 1, most - 1, most})
        for (const Index least : {Index{0}, Index{1}, most / 3, most})
            for (const Index batch : {Index{0}, Index{1}, Index{3}}) check_chunks(tokens_at_a_time, batch, 5, least);
    for (const Index tokens_at_a_time : {Index{1} << 62, most}) {
        const Chunks chunks({tokens_at_a_time, true}, Index{1} << 40, (Index{1} << 20) + 1);
        CHECK(chunks.tokens() == (Index{1} << 20) + 1);
        CHECK(chunks.sequences() == std::min(Index{1} << 40, tokens_at_a_time / chunks.tokens()));
        CHECK(chunks[chunks.count() - 1].sequence + chunks[chunks.count() - 1].sequences == Index{1} << 40);
    }
    CHECK(Chunks({1, true}, 1, most, 1).count() == most);
    CHECK(Chunks({most, true}, 1, most, most).count() == 1);
}
