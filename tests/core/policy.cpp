// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <array>
#include <cstdint>

#include <colt5/core/policy.hpp>

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

TEST_CASE("policy: 0 threads means one per hardware thread; fewer is an error") {
    CHECK(Cpu().threads() >= 1);
    CHECK(Cpu(1).threads() == 1);
    CHECK_THROWS_WITH_AS(Cpu(-1), "colt5: `threads` must be >= 0, but is -1", ValueError);
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
