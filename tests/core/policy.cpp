// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <sched.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>

#include <colt5/cpu/policy.hpp>

using namespace colt5;

TEST_CASE("policy: Cpu is a policy, and its copies share a workspace") {
    CHECK(Policy<Cpu>);
    CHECK_FALSE(Policy<int>);
    const Cpu policy(3), other(3);
    const Cpu copy = policy;
    CHECK(copy.threads() == 3);
    CHECK(copy.workspace() == policy.workspace());
    CHECK(other.workspace() != policy.workspace());
}

namespace {
/// What `Cpu().threads()` is in a process that may use one processor, or that has this OMP_NUM_THREADS.
int threads_where(bool one_processor, const char* omp_num_threads) {
    std::array<int, 2> ends{};
    if (pipe(ends.data()) != 0) return -1;
    const pid_t child = fork();
    if (child == 0) {
        if (one_processor) {
            cpu_set_t may_use, one;
            sched_getaffinity(0, sizeof may_use, &may_use);
            CPU_ZERO(&one);
            std::size_t first = 0;
            while (!CPU_ISSET(first, &may_use)) ++first;
            CPU_SET(first, &one);
            sched_setaffinity(0, sizeof one, &one);
        }
        if (omp_num_threads == nullptr)
            unsetenv("OMP_NUM_THREADS");
        else
            setenv("OMP_NUM_THREADS", omp_num_threads, 1);
        dup2(ends[1], 3);
        std::freopen("/dev/null", "w", stdout);
        setenv("COLT5_TEST_TELL_THREADS", "1", 1);
        execl("/proc/self/exe", "test_core", "-tc=policy: tells its threads", "-ns", static_cast<char*>(nullptr));
        _exit(1);
    }
    close(ends[1]);
    int told = -1;
    if (read(ends[0], &told, sizeof told) != static_cast<ssize_t>(sizeof told)) told = -1;
    close(ends[0]);
    waitpid(child, nullptr, 0);
    return told;
}
}  // namespace

TEST_CASE("policy: tells its threads" * doctest::skip()) {  // what threads_where starts in a process of its own
    if (std::getenv("COLT5_TEST_TELL_THREADS") == nullptr) return;
    const int threads = Cpu().threads();
    REQUIRE(write(3, &threads, sizeof threads) == static_cast<ssize_t>(sizeof threads));
}

TEST_CASE("policy: 0 threads means one per processor that the process may use, or what OMP_NUM_THREADS says") {
    CHECK(Cpu(1).threads() == 1);
    CHECK(Cpu().threads() >= 1);
#if defined(_OPENMP)
    cpu_set_t may_use;
    sched_getaffinity(0, sizeof may_use, &may_use);
    CHECK(threads_where(false, nullptr) == CPU_COUNT(&may_use));
    CHECK(threads_where(false, "3") == 3);
#endif
    CHECK(threads_where(true, nullptr) == 1);
}

TEST_CASE("policy: fewer threads than 0, or more than the system gives, are an error") {
    CHECK_THROWS_WITH_AS(Cpu(-1), "colt5: `threads` must be >= 0, but is -1", ValueError);
    CHECK_THROWS_AS(Cpu(100000000), ValueError);
    if (is_sanitized) return;
    const pid_t child = fork();
    if (child == 0) {  // stacks for a few threads
        const rlim_t some = rlim_t{256} << 20;
        const rlimit limit{some, some};
        setrlimit(RLIMIT_AS, &limit);
        try {
            const Cpu policy(500);
            _exit(1);
        } catch (const ValueError& error) {
            _exit(std::string(error.what()).find("that the system gives, but is 500") == std::string::npos);
        }
    }
    int status = 1;
    waitpid(child, &status, 0);
    CHECK(WIFEXITED(status));
    CHECK(WEXITSTATUS(status) == 0);
}

TEST_CASE("policy: upload and download copy, and take nothing from nowhere") {
    const Cpu policy(1);
    const std::array<int, 3> from{1, 2, 3};
    std::array<int, 3> there{}, back{};
    upload(policy, there.data(), from.data(), sizeof(from));
    download(policy, back.data(), there.data(), sizeof(from));
    CHECK(back == from);
    upload(policy, nullptr, nullptr, 0);
    download(policy, nullptr, nullptr, 0);
}

TEST_CASE("policy: memory of the host is aligned to 64 bytes") {
    const Cpu policy(1);
    for (const std::size_t bytes : {1u, 100u, 5000u}) {
        void* const data = policy.workspace()->allocate(bytes);
        CHECK(reinterpret_cast<std::uintptr_t>(data) % 64 == 0);
    }
}
