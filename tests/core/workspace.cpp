// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <limits>
#include <memory>
#include <new>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <colt5/core/random.hpp>
#include <colt5/core/tensor.hpp>
#include <colt5/core/workspace.hpp>
#include <colt5/cpu/policy.hpp>

using namespace colt5;

namespace {

/// What a memory was asked for.
struct Ledger {
    std::size_t size = 0;
    int requests = 0;
    bool full = false;
};

/// A range of 32 MiB of which a test sees every request.
class CountedMemory {
public:
    explicit CountedMemory(Ledger* ledger) : ledger_(ledger), range_(new (std::align_val_t{256}) std::byte[capacity]) {}
    std::byte* begin() const { return range_.get(); }
    void resize(std::size_t bytes) {
        if (ledger_->full || bytes > capacity) throw std::bad_alloc();
        ledger_->size = bytes;
        ++ledger_->requests;
    }

private:
    static constexpr std::size_t capacity = std::size_t{32} << 20;
    struct Free {
        void operator()(std::byte* range) const { ::operator delete[](range, std::align_val_t{256}); }
    };
    Ledger* ledger_;
    std::unique_ptr<std::byte[], Free> range_;
};
using CountedWorkspace = Workspace<CountedMemory>;

/// One that can be asked for every block on its own.
class SeparateMemory : public CountedMemory {
public:
    SeparateMemory(Ledger* ledger, int* live) : CountedMemory(ledger), live_(live) {}
    bool separate() const { return true; }
    void* allocate(std::size_t bytes) const {
        ++*live_;
        return ::operator new(bytes);
    }
    void deallocate(void* data) const {
        --*live_;
        ::operator delete(data);
    }

private:
    int* live_;
};

/// Ranges of 4 MiB, or as many as one block needs, of which there are some.
class ShortMemory {
public:
    explicit ShortMemory(std::size_t capacity = std::size_t{4} << 20)
        : capacity_(capacity), range_(new (std::align_val_t{256}) std::byte[capacity]) {
        ++ranges;
    }
    ShortMemory(ShortMemory&& other) noexcept : capacity_(other.capacity_), range_(std::move(other.range_)) {}
    ~ShortMemory() {
        if (range_) --ranges;
    }
    std::byte* begin() const { return range_.get(); }
    std::size_t capacity() const { return capacity_; }
    void resize(std::size_t bytes) {
        if (bytes > capacity_) throw std::bad_alloc();
    }
    static ShortMemory more(std::size_t bytes, std::size_t) {
        if (ranges == 3) throw OutOfMemory("no more than three");
        return ShortMemory(std::max(bytes, std::size_t{4} << 20));
    }
    static inline int ranges = 0;

private:
    struct Free {
        void operator()(std::byte* range) const { ::operator delete[](range, std::align_val_t{256}); }
    };
    std::size_t capacity_;
    std::unique_ptr<std::byte[], Free> range_;
};

/// Runs `body` in a child process; whether it returned true there.
template <typename Body>
bool in_child(Body&& body) {
    const pid_t child = fork();
    if (child == 0) {
        bool good = false;
        try {
            good = body();
        } catch (const std::exception& error) {
            std::fputs(error.what(), stderr);
        }
        _exit(good ? 0 : 1);
    }
    int status = 1;
    waitpid(child, &status, 0);
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

constexpr std::size_t step = CountedWorkspace::growth_step, grain = CountedWorkspace::granularity;

}  // namespace

TEST_CASE("workspace: the range grows by steps, and only when nothing fits") {
    Ledger ledger;
    CountedWorkspace workspace(CountedMemory{&ledger});
    CHECK(ledger.requests == 0);
    void* const small = workspace.allocate(10);
    CHECK(workspace.statistics().reserved == step);
    CHECK(workspace.statistics().in_use == grain);
    void* const large = workspace.allocate(3 * step);
    CHECK(large == static_cast<std::byte*>(small) + grain);  // the free end of the range is part of it
    CHECK(workspace.statistics().reserved == 4 * step);
    CHECK(workspace.statistics().reserved == ledger.size);
    CHECK(workspace.statistics().in_use == 3 * step + grain);
    CHECK(workspace.statistics().system_allocations == 2);
    CHECK(ledger.requests == 2);
    workspace.deallocate(small);
    workspace.deallocate(large);
    CHECK(workspace.statistics().in_use == 0);
    CHECK(workspace.statistics().peak == 3 * step + grain);
    CHECK(workspace.allocate(4 * step) == small);  // it was kept, in one piece
    CHECK(ledger.requests == 2);
}

TEST_CASE("workspace: blocks are aligned and do not overlap") {
    Ledger ledger;
    CountedWorkspace workspace(CountedMemory{&ledger});
    std::vector<std::pair<std::byte*, std::size_t>> blocks;
    for (const std::size_t bytes : {0u, 1u, 255u, 256u, 257u, 4096u, 1u << 20, 100u}) {
        auto* const data = static_cast<std::byte*>(workspace.allocate(bytes));
        CHECK(reinterpret_cast<std::uintptr_t>(data) % grain == 0);
        for (const auto& [other, size] : blocks) {
            CHECK(other != data);
            CHECK((data + bytes <= other || other + size <= data));
        }
        std::memset(data, 1, bytes);
        blocks.emplace_back(data, bytes);
    }
}

TEST_CASE("workspace: reuses what was freed, the smallest block that fits") {
    Ledger ledger;
    CountedWorkspace workspace(CountedMemory{&ledger});
    void* const large = workspace.allocate(8 * grain);
    void* const wall = workspace.allocate(grain);
    void* const small = workspace.allocate(2 * grain);
    void* const other_wall = workspace.allocate(grain);
    workspace.deallocate(large);
    workspace.deallocate(small);
    CHECK(workspace.allocate(2 * grain) == small);  // although `large` comes first
    CHECK(workspace.allocate(3 * grain) == large);
    CHECK(workspace.allocate(5 * grain) == static_cast<std::byte*>(large) + 3 * grain);  // the rest of it
    static_cast<void>(wall);
    static_cast<void>(other_wall);
    CHECK(workspace.statistics().system_allocations == 1);
}

TEST_CASE("workspace: merges free neighbours on both sides") {
    for (const auto& order : {std::vector<std::size_t>{0, 1, 2}, {2, 1, 0}, {0, 2, 1}, {1, 0, 2}}) {
        Ledger ledger;
        CountedWorkspace workspace(CountedMemory{&ledger});
        std::vector<void*> blocks;
        for (int i = 0; i < 3; ++i) blocks.push_back(workspace.allocate(step / 4));
        void* const wall = workspace.allocate(step / 4);  // the range is full
        for (const std::size_t i : order) workspace.deallocate(blocks[i]);
        CHECK(workspace.allocate(3 * step / 4) == blocks[0]);
        CHECK(workspace.statistics().system_allocations == 1);
        workspace.deallocate(wall);
    }
}

TEST_CASE("workspace: a second pass over the same shapes asks the system for nothing") {
    Ledger ledger;
    CountedWorkspace workspace(CountedMemory{&ledger});
    const auto pass = [&] {  // requests of many sizes, freed in another order, some held for long
        const Random random(Seed{4});
        std::vector<void*> held;
        for (std::uint64_t i = 0; i < 500; ++i) {
            held.push_back(workspace.allocate(static_cast<std::size_t>(random.uniform(2 * i) * 300000)));
            if (held.size() < 20) continue;
            const auto victim = static_cast<std::ptrdiff_t>(random.uniform(2 * i + 1) * 20);
            workspace.deallocate(held[static_cast<std::size_t>(victim)]);
            held.erase(held.begin() + victim);
        }
        for (void* const data : held) workspace.deallocate(data);
    };
    pass();
    const auto first = workspace.statistics();
    CHECK(first.in_use == 0);
    CHECK(first.peak > 1000000);
    pass();
    CHECK(workspace.statistics().system_allocations == first.system_allocations);
    CHECK(workspace.statistics().reserved == first.reserved);
    CHECK(workspace.statistics().peak == first.peak);
}

TEST_CASE("workspace: the peak can be reset, and the free end of the range released") {
    Ledger ledger;
    CountedWorkspace workspace(CountedMemory{&ledger});
    void* const kept = workspace.allocate(grain);
    void* const large = workspace.allocate(5 * step);
    workspace.release_unused();
    CHECK(workspace.statistics().reserved == 6 * step);  // the end is in use
    workspace.deallocate(large);
    CHECK(workspace.statistics().peak == 5 * step + grain);
    workspace.reset_peak();
    CHECK(workspace.statistics().peak == grain);
    workspace.release_unused();
    CHECK(workspace.statistics().reserved == step);
    CHECK(ledger.size == step);
    std::memset(kept, 1, grain);
    workspace.deallocate(kept);
    workspace.release_unused();
    CHECK(workspace.statistics().reserved == 0);
    CHECK(ledger.size == 0);
    CHECK(workspace.allocate(2 * step) == kept);
}

TEST_CASE("workspace: when there is no memory nothing has changed") {
    Ledger ledger;
    CountedWorkspace workspace(CountedMemory{&ledger});
    void* const block = workspace.allocate(step);
    ledger.full = true;
    CHECK_THROWS_AS(workspace.allocate(1), std::bad_alloc);
    CHECK(workspace.statistics().in_use == step);
    CHECK(workspace.statistics().reserved == step);
    workspace.deallocate(block);
    CHECK(workspace.allocate(1) == block);
}

TEST_CASE("host memory: pages can be written up to the end, come back zeroed, and there is an end to them") {
    HostMemory memory;
    memory.resize(100000);
    std::memset(memory.begin(), 1, 100000);
    memory.resize(10);
    CHECK(memory.begin()[9] == std::byte{1});
    memory.resize(100000);
    CHECK(memory.begin()[99999] == std::byte{0});
    CHECK(reinterpret_cast<std::uintptr_t>(memory.begin()) % 4096 == 0);
    CHECK_THROWS_AS(memory.resize(std::size_t{1} << 60), OutOfMemory);
    CHECK(memory.begin()[9] == std::byte{1});
}

TEST_CASE("workspace: pointers that it does not hold are ignored") {
    Ledger ledger;
    CountedWorkspace workspace(CountedMemory{&ledger});
    void* const block = workspace.allocate(1);
    int other = 0;
    workspace.deallocate(&other);
    workspace.deallocate(nullptr);
    CHECK(workspace.statistics().in_use == grain);
    workspace.deallocate(block);
    workspace.deallocate(block);
    CHECK(workspace.statistics().in_use == 0);
}

TEST_CASE("workspace: several threads may share it") {
    Cpu::Workspace workspace;
    const auto work = [&workspace](unsigned char tag, bool& intact) {
        for (std::size_t i = 1; i < 400; ++i) {
            auto* const data = static_cast<unsigned char*>(workspace.allocate(i * 37));
            std::memset(data, tag, i * 37);
            std::this_thread::yield();
            for (std::size_t j = 0; j < i * 37; ++j) intact = intact && data[j] == tag;
            workspace.deallocate(data);
        }
    };
    bool intact = true, other_intact = true;
    std::thread thread([&] { work(1, other_intact); });
    work(2, intact);
    thread.join();
    CHECK(intact);
    CHECK(other_intact);
    CHECK(workspace.statistics().in_use == 0);
}

TEST_CASE("workspace: a memory can be asked for every block on its own") {
    Ledger ledger;
    int live = 0;
    Workspace<SeparateMemory> workspace(SeparateMemory{&ledger, &live});
    void* const a = workspace.allocate(10);
    void* const b = workspace.allocate(0);
    std::memset(a, 1, 10);
    CHECK(live == 2);
    CHECK(workspace.statistics().in_use == 10);
    workspace.deallocate(nullptr);
    workspace.deallocate(a);
    workspace.deallocate(b);
    CHECK(live == 0);
    CHECK(workspace.statistics().in_use == 0);
    CHECK(workspace.statistics().peak == 10);
    CHECK(ledger.requests == 0);
    {
        Workspace<SeparateMemory> other(SeparateMemory{&ledger, &live});
        other.allocate(10);
        CHECK(live == 1);
    }
    CHECK(live == 0);  // gone with their workspace
}

TEST_CASE("workspace: sizes that would overflow when they are rounded up are out of memory") {
    constexpr std::size_t most = std::numeric_limits<std::size_t>::max();
    Ledger ledger;
    CountedWorkspace workspace{CountedMemory(&ledger)};
    void* const small = workspace.allocate(100);
    const auto before = workspace.statistics();
    for (const std::size_t bytes :
         {most, most - 1, most - 255, most - 256, most - (std::size_t{1} << 20), most / 2 + 1}) {
        CAPTURE(bytes);
        const std::string message = "colt5: out of memory: " + std::to_string(bytes) + " bytes were asked for at once";
        CHECK_THROWS_WITH_AS(workspace.allocate(bytes), message.c_str(), OutOfMemory);
    }
    CHECK_THROWS_AS(workspace.allocate(most / 2), std::bad_alloc);  // of the memory
    CHECK_THROWS_AS(Cpu(1).workspace()->allocate(most / 2), OutOfMemory);
    CHECK(workspace.statistics().in_use == before.in_use);
    CHECK(workspace.statistics().reserved == before.reserved);
    CHECK(ledger.requests == 1);
    workspace.deallocate(small);
}

TEST_CASE("workspace: further ranges follow where the first cannot grow, and go when they are empty") {
    {
        Workspace<ShortMemory> workspace;
        std::vector<void*> blocks;
        for (int i = 0; i < 3; ++i) blocks.push_back(workspace.allocate(3 * step));  // one fits into a range
        CHECK(ShortMemory::ranges == 3);
        CHECK(workspace.statistics().reserved == 9 * step);
        CHECK(workspace.statistics().system_allocations == 3);
        for (void* const block : blocks) std::memset(block, 1, 3 * step);
        CHECK_THROWS_AS(workspace.allocate(2 * step), OutOfMemory);
        CHECK(workspace.statistics().in_use == 9 * step);
        void* const end = workspace.allocate(step);  // the last range has room
        CHECK(end == static_cast<std::byte*>(blocks[2]) + 3 * step);
        workspace.deallocate(blocks[0]);
        CHECK(workspace.allocate(2 * step) == blocks[0]);  // the first one, too
        workspace.deallocate(blocks[0]);
        workspace.deallocate(blocks[1]);
        CHECK_THROWS_AS(workspace.allocate(4 * step), OutOfMemory);  // free, but in two ranges
        workspace.deallocate(end);
        workspace.deallocate(blocks[2]);
        workspace.release_unused();
        CHECK(ShortMemory::ranges == 1);
        CHECK(workspace.statistics().reserved == 0);
        blocks[1] = workspace.allocate(7 * step);  // more than the first range has
        CHECK(ShortMemory::ranges == 2);
        std::memset(blocks[1], 1, 7 * step);
        workspace.deallocate(blocks[1]);
    }
    CHECK(ShortMemory::ranges == 0);
}

TEST_CASE("workspace: time grows with the number of blocks, not with its square") {
    const auto seconds = [](std::size_t count) {
        Ledger ledger;
        double least = 1e9;
        for (int turn = 0; turn < 3; ++turn) {
            CountedWorkspace workspace(CountedMemory{&ledger});
            std::vector<void*> blocks(count);
            const std::clock_t begin = std::clock();
            for (std::size_t i = 0; i < count; ++i) blocks[i] = workspace.allocate(grain);
            for (std::size_t i = 0; i < count; i += 2) workspace.deallocate(blocks[i]);  // nothing to join
            for (std::size_t i = 1; i < count; i += 2) workspace.deallocate(blocks[i]);
            least = std::min(least, static_cast<double>(std::clock() - begin) / CLOCKS_PER_SEC);
        }
        return least;
    };
    CHECK(seconds(120000) < 100 * seconds(7500));  // 16 times as many: 256 times as long if each looked at all
}

TEST_CASE("host memory: several policies live where a process may only have so many addresses") {
    if (is_sanitized) return;  // its shadow takes terabytes
    CHECK(in_child([] {
        const rlim_t some = rlim_t{1} << 30;
        const rlimit limit{some, some};
        if (setrlimit(RLIMIT_AS, &limit) != 0) return false;
        const Cpu first(1), second(1), third(1);
        bool good = true;
        for (const Cpu* const policy : {&first, &second, &third}) {
            VectorTensor<float, Cpu> a(*policy, {Index{25} << 20}), b(*policy, {Index{25} << 20});  // 100 MiB each
            a.data()[a.size() - 1] = b.data()[0] = 1;
            good = good && a.data()[a.size() - 1] == 1;
            const auto before = policy->workspace()->statistics().system_allocations;
            a = {};
            a = {*policy, {Index{25} << 20}};
            good = good && policy->workspace()->statistics().system_allocations == before;
        }
        try {
            const VectorTensor<float, Cpu> much(first, {Index{250} << 20});
            return false;
        } catch (const OutOfMemory& error) {
            return good && std::string(error.what()).find("RLIMIT_AS") != std::string::npos;
        }
    }));
}

TEST_CASE("allocations: a policy can give every tensor memory of its own, filled with NaN") {
    const Cpu policy(1, Cpu::usual_plan, Allocations::separate_with_nan);
    const VectorTensor<float, Cpu> a(policy, {100});
    const VectorTensor<double, Cpu> b(policy, {3});
    for (Index i = 0; i < a.size(); ++i) CHECK(a.data()[i] != a.data()[i]);
    CHECK(b.data()[2] != b.data()[2]);
    CHECK(reinterpret_cast<std::uintptr_t>(b.data()) % 256 == 0);
    CHECK(policy.workspace()->statistics().in_use == 424);
}

TEST_CASE("allocations: COLT5_ALLOCATIONS chooses them for policies that say nothing") {
    const char* const before = std::getenv("COLT5_ALLOCATIONS");
    const std::string kept = before == nullptr ? "" : before;
    unsetenv("COLT5_ALLOCATIONS");
    CHECK(default_allocations() == (is_sanitized ? Allocations::separate : Allocations::together));
    setenv("COLT5_ALLOCATIONS", "separate_with_nan", 1);
    const VectorTensor<float, Cpu> a(Cpu(1), {1});
    CHECK(a.data()[0] != a.data()[0]);
    setenv("COLT5_ALLOCATIONS", "together", 1);
    CHECK(default_allocations() == Allocations::together);
    setenv("COLT5_ALLOCATIONS", "apart", 1);
    CHECK_THROWS_WITH_AS(
        Cpu(1), "colt5: `COLT5_ALLOCATIONS` must be together, separate or separate_with_nan, but is apart", ValueError);
    if (before == nullptr)
        unsetenv("COLT5_ALLOCATIONS");
    else
        setenv("COLT5_ALLOCATIONS", kept.c_str(), 1);
}

TEST_CASE("allocations: AddressSanitizer sees what leaves a tensor, and what comes after it") {
    if (!is_sanitized) return;
    const auto is_reported = [](auto&& access) {
        return !in_child([&] {
            std::freopen("/dev/null", "w", stderr);
            const Cpu policy(1);
            VectorTensor<float, Cpu> a(policy, {63}), b(policy, {63});
            access(a, b);
            return true;
        });
    };
    using Tensor = VectorTensor<float, Cpu>;
    CHECK_FALSE(is_reported([](Tensor& a, Tensor&) { const_cast<volatile float*>(a.data())[62] = 1; }));
    CHECK(is_reported([](Tensor& a, Tensor&) { const_cast<volatile float*>(a.data())[63] = 1; }));
    CHECK(is_reported([](Tensor& a, Tensor& b) {
        volatile float* const stale = b.data();
        b = {};
        a.data()[0] = stale[0];
    }));
}
