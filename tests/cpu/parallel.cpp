// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
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
