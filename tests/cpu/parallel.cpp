// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include <colt5/cpu/parallel.hpp>

using namespace colt5;

TEST_CASE("parallel_for: calls the body once for every index") {
    for (const int threads : {1, 2, 5}) {
        const Cpu policy(threads);
        for (const Index count : {0, 1, 2, 3, 100}) {
            std::vector<int> calls(static_cast<std::size_t>(count), 0);
            parallel_for(policy, count, [&](Index i) { ++calls[static_cast<std::size_t>(i)]; });
            CHECK(calls == std::vector<int>(static_cast<std::size_t>(count), 1));
        }
    }
}

#if defined(_OPENMP)
TEST_CASE("parallel_for: uses as many threads as the policy has") {
    const auto threads_seen = [](int threads) {
        std::vector<std::thread::id> ids(8);
        parallel_for(Cpu(threads), 8, [&](Index i) { ids[static_cast<std::size_t>(i)] = std::this_thread::get_id(); });
        int different = 1;
        for (std::size_t i = 1; i < ids.size(); ++i)
            different += ids[i] == ids[i - 1] ? 0 : 1;  // the schedule is static
        return different;
    };
    CHECK(threads_seen(1) == 1);
    CHECK(threads_seen(2) == 2);
    CHECK(threads_seen(4) == 4);
}
#endif

TEST_CASE("parallel_for: rethrows the first exception after the loop") {
    for (const int threads : {1, 2, 3}) {
        const Cpu policy(threads);
        std::atomic<int> running{0};
        std::string caught;
        try {
            parallel_for(policy, 100, [&](Index i) {
                ++running;
                if (i % 10 == 7) {
                    --running;
                    throw std::runtime_error("index " + std::to_string(i));
                }
                --running;
            });
        } catch (const std::runtime_error& error) {
            caught = error.what();
        }
        CHECK(caught == "index 7");
        CHECK(running == 0);
    }
}

TEST_CASE("parallel_for: a child of fork() does not wait for the threads of its parent") {
    const Cpu policy(2);
    const auto sum = [&policy] {
        std::vector<int> numbers(1000, 0);
        parallel_for(policy, 1000, [&](Index i) { numbers[static_cast<std::size_t>(i)] = static_cast<int>(i); });
        int total = 0;
        for (const int number : numbers) total += number;
        return total;
    };
    CHECK(sum() == 499500);
    const pid_t child = fork();
    if (child == 0) _exit(sum() == 499500 ? 0 : 1);
    int status = 0;
    pid_t ended = 0;
    for (int i = 0; i < 200 && ended == 0; ++i) {
        ended = waitpid(child, &status, WNOHANG);
        if (ended == 0) usleep(50'000);
    }
    if (ended == 0) {
        kill(child, SIGKILL);
        waitpid(child, nullptr, 0);
    }
    CHECK(ended == child);
    CHECK(WIFEXITED(status));
    CHECK(WEXITSTATUS(status) == 0);
    CHECK(sum() == 499500);  // the parent has them still
}

TEST_CASE("for_each_row_chunk: each row once, in chunks that do not depend on the threads") {
    for (const int threads : {1, 3}) {
        const Cpu policy(threads);
        for (const Index rows : {Index{0}, Index{1}, cpu::rows_per_chunk, 3 * cpu::rows_per_chunk + 5}) {
            std::vector<Index> chunk_of(static_cast<std::size_t>(rows), -1);
            cpu::for_each_row_chunk(policy, rows, [&](Index chunk, Index begin, Index end) {
                for (Index row = begin; row < end; ++row) chunk_of[static_cast<std::size_t>(row)] = chunk;
            });
            for (Index row = 0; row < rows; ++row)
                CHECK(chunk_of[static_cast<std::size_t>(row)] == row / cpu::rows_per_chunk);
            CHECK(cpu::row_chunks(rows) == (rows == 0 ? 0 : chunk_of.back() + 1));
        }
    }
}

TEST_CASE("Panels: each row once, in whole tiles but for the last, and none too long for the cache") {
    const Cpu policy(2);
    for (const Index batch : {1, 2, 5})
        for (const Index length : {1, 5, 6, 7, 24, 25, 383, 384, 385, 1000, 1024, 1025, 5000})
            for (const bool contiguous : {true, false})
                for (const bool is_backward : {false, true}) {
                    CAPTURE(batch);
                    CAPTURE(length);
                    CAPTURE(contiguous);
                    CAPTURE(is_backward);
                    const cpu::Panels panels = is_backward ? cpu::backward_blocks(batch, length, contiguous)
                                                           : cpu::panels(batch, length, contiguous);
                    std::vector<std::array<Index, 3>> all(static_cast<std::size_t>(panels.count()));
                    for (Index i = 0; i < panels.count(); ++i)
                        panels.visit(i, [&](Index sequence, Index first, Index rows) {
                            all[static_cast<std::size_t>(i)] = {sequence, first, rows};
                        });
                    std::atomic<Index> calls = 0;
                    panels.for_each(policy, [&](Index, Index, Index) { ++calls; });
                    CHECK(calls == panels.count());
                    Index next = 0;  // row of the batch
                    bool whole = true, short_enough = true;
                    const bool one = contiguous && !cpu::uses_blas;  // the batch is one sequence
                    const Index end = one ? batch * length : length, most = is_backward ? 1024 : cpu::panel_rows;
                    for (const auto& [sequence, first, rows] : all) {
                        CHECK(sequence * length + first == next);
                        whole =
                            whole && first % cpu::tile_rows == 0 && (rows % cpu::tile_rows == 0 || first + rows == end);
                        short_enough = short_enough && rows <= most + cpu::tile_rows;
                        next += rows;
                    }
                    CHECK(next == batch * length);
                    CHECK(whole);
                    CHECK(short_enough);
                }
    CHECK(cpu::panels(1, 0).count() <= 1);
    CHECK(cpu::backward_blocks(3, 0).count() == 0);
}

TEST_CASE("thread_scratch: memory of a thread, one for each use, aligned") {
    struct One;
    struct Other;
    float* const one = cpu::thread_scratch<float, One>(100);
    float* const other = cpu::thread_scratch<float, Other>(100);
    CHECK(reinterpret_cast<std::uintptr_t>(one) % 64 == 0);
    CHECK((one + 100 <= other || other + 100 <= one));
    CHECK(cpu::thread_scratch<float, One>(100) == one);
    float* of_thread = nullptr;
    std::thread([&] {
        of_thread = cpu::thread_scratch<float, One>(100);
        of_thread[99] = 1;
    }).join();
    CHECK(of_thread != one);
    one[0] = 2;
    float* const larger = cpu::thread_scratch<float, One>(1000000);
    larger[999999] = 3;
    CHECK(cpu::thread_scratch<float, One>(1000000) == larger);
}
