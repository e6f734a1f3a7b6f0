// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <colt5/cpu.hpp>
#include <colt5/schedule/concurrent_streams.hpp>

#include <cstddef>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

using namespace colt5;

namespace {

/// Writes down what happens in which stream; an event is the stream's letter.
struct Policy3 {
    struct Event {
        char stream = '-';
    };
    static constexpr std::size_t max_streams = 3;

    std::shared_ptr<std::string> log = std::make_shared<std::string>();
    std::shared_ptr<std::size_t> stream = std::make_shared<std::size_t>(0);
    std::size_t used = max_streams, broken = max_streams;  // how many, and one that fails

    char letter() const { return static_cast<char>('a' + *stream); }
    void enter_stream(std::size_t to) const { *stream = to; }
    std::size_t entered_stream() const { return *stream; }
    std::size_t concurrent_streams() const { return used; }
    Event record_event() const {
        if (*stream == broken) throw std::runtime_error("broken");
        *log += std::string(" record ") + letter();
        return {letter()};
    }
    void wait_event(Event event) const {
        if (*stream == broken) throw std::runtime_error("broken");
        *log += std::string(" ") + letter() + " waits for " + event.stream;
    }
    const Policy3& side_policy() const { return *this; }
};
static_assert(HasConcurrentStreams<Policy3> && !HasConcurrentStreams<Cpu>);

/// The streams of parts with so many tokens.
template <typename P>
std::vector<std::size_t> streams_of(const P& policy, const std::vector<Index>& tokens) {
    ConcurrentStreams streams(policy, tokens.size());
    std::vector<std::size_t> all;
    for (const Index each : tokens) all.push_back(streams.enter(each));
    return all;
}

}  // namespace

TEST_SUITE_BEGIN("schedule");

TEST_CASE("concurrent streams: each part goes to the stream with the fewest tokens") {
    const Policy3 policy;
    CHECK(streams_of(policy, {5, 3, 4, 2, 1, 9}) == std::vector<std::size_t>{0, 1, 2, 1, 2, 0});
    CHECK(*policy.stream == 0);
    CHECK(streams_of(policy, {5, 3}) == std::vector<std::size_t>{0, 1});
    CHECK(streams_of(policy, {7}) == std::vector<std::size_t>{0});
    CHECK(streams_of(policy, {}).empty());
    Policy3 narrow;
    narrow.used = 2;
    CHECK(streams_of(narrow, {5, 3, 4}) == std::vector<std::size_t>{0, 1, 1});
    narrow.used = 1;
    CHECK(streams_of(narrow, {5, 3, 4}) == std::vector<std::size_t>{0, 0, 0});
    CHECK(streams_of(Cpu(), {5, 3, 4}) == std::vector<std::size_t>{0, 0, 0});
}

TEST_CASE("concurrent streams: all run after what was queued before, and before what comes behind") {
    const Policy3 policy;
    {
        ConcurrentStreams streams(policy, 5);
        CHECK(*policy.log == " record a b waits for a c waits for a");
        CHECK(*policy.stream == 0);
        policy.log->clear();
        streams.enter(10);
        streams.enter(10);
        CHECK(*policy.stream == 1);
        streams.join();
        CHECK(*policy.log == " record c a waits for c record b a waits for b");
        CHECK(*policy.stream == 0);
        policy.log->clear();
    }
    CHECK(policy.log->empty());  // joined once
}

TEST_CASE("concurrent streams: an exception leaves the policy in its own stream") {
    Policy3 policy;
    CHECK_THROWS([&] {
        ConcurrentStreams streams(policy, 3);
        streams.enter(1);
        streams.enter(1);
        throw std::runtime_error("a part fails");
    }());
    CHECK(*policy.stream == 0);
    {
        ConcurrentStreams streams(policy, 3);
        policy.broken = 2;
        policy.log->clear();
        CHECK_THROWS(streams.join());
        CHECK(*policy.log == " record b a waits for b");  // the others are joined
    }
    CHECK(*policy.stream == 0);
    CHECK_THROWS(ConcurrentStreams(policy, 3));
    CHECK(*policy.stream == 0);
}

TEST_CASE("concurrent streams: the parts of a part stay in its stream") {
    const Policy3 policy;
    ConcurrentStreams streams(policy, 2);
    streams.enter(1);
    streams.enter(1);
    CHECK(streams_of(policy, {5, 3, 4}) == std::vector<std::size_t>{0, 0, 0});
    CHECK(*policy.stream == 1);
}

TEST_SUITE_END();
