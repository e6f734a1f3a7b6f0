// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <deque>
#include <functional>
#include <iterator>
#include <limits>
#include <map>
#include <memory_resource>
#include <mutex>
#include <set>
#include <string>
#include <utility>

#include <colt5/core/error.hpp>
#include <colt5/core/view.hpp>

namespace colt5 {

/// What a workspace holds and held, in bytes; `system_allocations` counts how often it asked the system for more.
struct WorkspaceStatistics {
    std::size_t in_use = 0, peak = 0, reserved = 0, system_allocations = 0;
};

/// An allocator that keeps freed blocks and reuses them: adjacent free ones merge, and the smallest one that fits
/// serves a request. Requests that repeat those of earlier calls ask the system for nothing; in the second call, which
/// finds the range longer, blocks may still lie elsewhere, and the range may grow once more. A request takes O(log
/// blocks).
///
/// Blocks lie in a range of addresses that grows and shrinks at its end, so that free neighbours in it can merge. If a
/// range may run out (see `capacity`), there are several. `Memory` supplies the first range: `std::byte* begin()`,
/// aligned to 256 bytes and the same for ever, and `void resize(std::size_t)`, which moves its end, or throws and
/// changes nothing when there is no memory; it may keep more than the range needs. It may also have `capacity()`, the
/// size beyond which its range cannot grow, and a static function `more(bytes, held)`. That returns a Memory with a
/// new, empty range that can grow to at least `bytes`, or throws; `held` is the size of all ranges so far. The
/// workspace calls it when a request does not fit in the last range. Blocks are aligned to 256 bytes. Safe to call from
/// several threads.
///
/// If `Memory` has `bool separate()` and it returns true, every block comes from `allocate(bytes)` and goes back by
/// `deallocate(data)`, without reuse, as AddressSanitizer and its like need.
template <typename Memory>
class Workspace {
public:
    static constexpr std::size_t granularity = 256;
    static constexpr std::size_t growth_step = std::size_t{1} << 20;

    explicit Workspace(Memory memory = Memory()) { ranges_.push_back({std::move(memory)}); }
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;
    ~Workspace() {
        if constexpr (can_be_separate)
            if (memory().separate())
                for (const auto& [data, block] : blocks_) memory().deallocate(data);
    }

    /// Throws OutOfMemory, or what `Memory` throws.
    void* allocate(std::size_t bytes) {
        if (bytes > std::numeric_limits<std::size_t>::max() / 2)  // rounded up it might be small
            throw OutOfMemory(colt5::detail::concat(
                {"colt5: out of memory: ", std::to_string(bytes), " bytes were asked for at once"}));
        const std::lock_guard lock(mutex_);
        if constexpr (can_be_separate)
            if (memory().separate()) return allocate_separately(bytes);
        bytes = std::max(granularity, round_up(bytes, granularity));
        auto smallest = free_.lower_bound({bytes, nullptr});
        const auto block = smallest != free_.end() ? blocks_.find(smallest->begin) : grow(bytes);
        if (block->second.bytes > bytes) {  // the rest stays free
            add_free(block->first + bytes, block->second.bytes - bytes, block->second.range);
            const auto own = free_.find({block->second.bytes, block->first});
            block->second.bytes = bytes;
            block->second.free_node = free_.extract(own);
        } else {
            block->second.free_node = free_.extract({bytes, block->first});
        }
        count_in_use(bytes);
        return block->first;
    }

    /// Ignores what is not one of its blocks.
    void deallocate(void* data) {
        const std::lock_guard lock(mutex_);
        if constexpr (can_be_separate)
            if (memory().separate()) return deallocate_separately(data);
        const auto block = blocks_.find(static_cast<std::byte*>(data));
        if (block == blocks_.end() || block->second.is_free()) return;
        statistics_.in_use -= block->second.bytes;
        set_free(block, block->second.bytes);
        const auto next = std::next(block);
        if (next != blocks_.end() && can_merge(next, block)) merge(block, next);
        if (block != blocks_.begin() && can_merge(block, std::prev(block))) merge(std::prev(block), block);
    }

    /// Hands what lies behind the last block in use of each range back to the system, in whole steps of growth_step.
    /// Memory may keep a part of it (that of Cuda gives back whole pieces, each as large as the growth that made it);
    /// statistics count what was asked for.
    void release_unused() {
        const std::lock_guard lock(mutex_);
        for (auto range = ranges_.rbegin(); range != ranges_.rend(); ++range) {
            const auto last = last_block(*range);
            if (last == blocks_.end() || !last->second.is_free()) continue;
            const auto offset = static_cast<std::size_t>(last->first - range->memory.begin());
            const std::size_t end = round_up(offset, growth_step);
            if (end >= range->reserved) continue;
            range->memory.resize(end);
            statistics_.reserved -= range->reserved - end;
            range->reserved = end;
            auto entry = free_.extract({last->second.bytes, last->first});
            if (end == offset) {
                blocks_.erase(last);
            } else {
                last->second.bytes = entry.value().bytes = end - offset;
                free_.insert(std::move(entry));
            }
        }
        while (ranges_.size() > 1 && ranges_.back().reserved == 0) ranges_.pop_back();
    }

    WorkspaceStatistics statistics() const {
        const std::lock_guard lock(mutex_);
        return statistics_;
    }
    void reset_peak() {
        const std::lock_guard lock(mutex_);
        statistics_.peak = statistics_.in_use;
    }

private:
    struct Range {
        Memory memory;
        std::size_t reserved = 0;
    };
    /// A free block, by its size.
    struct Free {
        std::size_t bytes;
        std::byte* begin;
        bool operator<(const Free& other) const {
            return bytes != other.bytes ? bytes < other.bytes : std::less<>()(begin, other.begin);
        }
    };
    using FreeBlocks = std::pmr::set<Free>;
    struct Block {
        std::size_t bytes, range;
        /// While the block is in use, the node of its entry in `free_`, so that giving it back allocates nothing; empty
        /// while it is free.
        typename FreeBlocks::node_type free_node;
        bool is_free() const { return free_node.empty(); }
    };
    using Blocks = std::pmr::map<std::byte*, Block>;  // they cover the ranges, or are separate
    using Iterator = typename Blocks::iterator;

    static constexpr bool can_be_separate = requires(const Memory& memory) { memory.separate(); };
    static constexpr bool can_have_more = requires(const Memory& memory) {
        memory.capacity();
        Memory::more(std::size_t{}, std::size_t{});
    };

    Memory& memory() { return ranges_.front().memory; }

    void count_in_use(std::size_t bytes) {
        statistics_.in_use += bytes;
        statistics_.peak = std::max(statistics_.peak, statistics_.in_use);
    }
    void* allocate_separately(std::size_t bytes) {
        void* const data = memory().allocate(std::max(bytes, std::size_t{1}));
        try {
            blocks_.emplace(static_cast<std::byte*>(data), Block{bytes, 0, {}});
        } catch (...) {
            memory().deallocate(data);
            throw;
        }
        ++statistics_.system_allocations;
        count_in_use(bytes);
        return data;
    }
    void deallocate_separately(void* data) {
        const auto at = blocks_.find(static_cast<std::byte*>(data));
        if (at == blocks_.end()) return;
        statistics_.in_use -= at->second.bytes;
        blocks_.erase(at);
        memory().deallocate(data);
    }

    /// Adds a free block, or throws and changes nothing when there is no memory for it.
    Iterator add_free(std::byte* begin, std::size_t bytes, std::size_t range) {
        const auto entry = free_.insert({bytes, begin}).first;
        try {
            return blocks_.emplace(begin, Block{bytes, range, {}}).first;
        } catch (...) {
            free_.erase(entry);
            throw;
        }
    }
    /// Makes a block in use free, of `bytes` bytes.
    void set_free(Iterator block, std::size_t bytes) {
        block->second.bytes = bytes;
        block->second.free_node.value() = {bytes, block->first};
        free_.insert(std::move(block->second.free_node));
    }
    bool can_merge(Iterator next, Iterator block) const {
        return next->second.is_free() && block->second.is_free() && next->second.range == block->second.range;
    }
    /// Of two free neighbours, the first takes over the second.
    void merge(Iterator block, Iterator next) {
        auto entry = free_.extract({block->second.bytes, block->first});
        free_.erase({next->second.bytes, next->first});
        entry.value().bytes = block->second.bytes += next->second.bytes;
        free_.insert(std::move(entry));
        blocks_.erase(next);
    }
    /// The last block of the range, or blocks_.end() if it has none.
    Iterator last_block(const Range& range) {
        if (range.reserved == 0) return blocks_.end();
        return std::prev(blocks_.upper_bound(range.memory.begin() + (range.reserved - 1)));
    }
    /// Moves the end of a range, or adds one, so that its last block is free and fits.
    Iterator grow(std::size_t bytes) {
        auto* range = &ranges_.back();
        auto last = last_block(*range);
        bool extends = last != blocks_.end() && last->second.is_free();
        std::size_t offset = range->reserved - (extends ? last->second.bytes : 0);
        std::size_t end = round_up(offset + bytes, growth_step);
        if constexpr (can_have_more)
            if (end > range->memory.capacity()) {
                ranges_.push_back({Memory::more(round_up(bytes, growth_step), statistics_.reserved)});
                range = &ranges_.back();
                extends = false;
                offset = 0;
                end = round_up(bytes, growth_step);
            }
        const std::size_t before = range->reserved;
        range->memory.resize(end);
        range->reserved = end;
        statistics_.reserved += end - before;
        ++statistics_.system_allocations;
        if (!extends) {
            try {
                return add_free(range->memory.begin() + offset, end - offset, ranges_.size() - 1);
            } catch (...) {  // no memory for the node
                range->memory.resize(before);
                range->reserved = before;
                statistics_.reserved -= end - before;
                throw;
            }
        }
        auto entry = free_.extract({last->second.bytes, last->first});
        last->second.bytes = entry.value().bytes = end - offset;
        free_.insert(std::move(entry));
        return last;
    }

    std::pmr::unsynchronized_pool_resource nodes_;  // of the two trees
    std::deque<Range> ranges_;
    Blocks blocks_{&nodes_};
    FreeBlocks free_{&nodes_};
    WorkspaceStatistics statistics_;
    mutable std::mutex mutex_;
};

}  // namespace colt5
