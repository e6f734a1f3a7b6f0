// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <limits>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include <colt5/core/error.hpp>

namespace colt5 {

/// What a workspace holds and held, in bytes; `system_allocations` counts how often it asked the system for more.
struct WorkspaceStatistics {
    std::size_t in_use = 0, peak = 0, reserved = 0, system_allocations = 0;
};

/// Memory that grows once: freed blocks are kept and reused, adjacent free ones merge, and the smallest one that fits
/// serves a request. After one pass over some shapes, a second pass over the same shapes asks the system for nothing.
///
/// All blocks lie in one range of addresses whose end moves, so that free memory is never cut up by the order of
/// requests to the system. `Memory` supplies the range: `std::byte* begin()`, aligned to 256 bytes and the same for
/// ever, and `void resize(std::size_t)`, which moves its end and throws, with nothing changed, when there is no memory.
/// Blocks are aligned to 256 bytes. Safe to call from several threads.
///
/// A `Memory` with `separate()`, `allocate(bytes)` and `deallocate(data)` can be asked for every block on its own,
/// which tools that look for stray accesses need.
template <typename Memory>
class Workspace {
public:
    static constexpr std::size_t granularity = 256;
    static constexpr std::size_t growth_step = std::size_t{1} << 20;

    explicit Workspace(Memory memory = Memory()) : memory_(std::move(memory)) { blocks_.reserve(256); }
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;

    /// Throws OutOfMemory, or what `Memory` throws.
    void* allocate(std::size_t bytes) {
        if (bytes > std::numeric_limits<std::size_t>::max() / 2)  // rounded up it might be small
            throw OutOfMemory(colt5::detail::concat(
                {"colt5: out of memory: ", std::to_string(bytes), " bytes were asked for at once"}));
        const std::lock_guard lock(mutex_);
        if constexpr (can_be_separate)
            if (memory_.separate()) return allocate_separately(bytes);
        bytes = std::max(granularity, round_up(bytes, granularity));
        std::size_t best = find_free(bytes);
        if (best == blocks_.size()) best = grow(bytes);
        if (blocks_[best].bytes > bytes) {  // the rest stays free
            const Block rest{blocks_[best].offset + bytes, blocks_[best].bytes - bytes, true};
            blocks_.insert(blocks_.begin() + static_cast<std::ptrdiff_t>(best) + 1, rest);
        }
        blocks_[best].bytes = bytes;
        blocks_[best].free = false;
        count_in_use(bytes);
        return memory_.begin() + blocks_[best].offset;
    }

    void deallocate(void* data) {
        const std::lock_guard lock(mutex_);
        if constexpr (can_be_separate)
            if (memory_.separate()) return deallocate_separately(data);
        const auto at = std::find_if(blocks_.begin(), blocks_.end(), [&](const Block& block) {
            return !block.free && memory_.begin() + block.offset == data;
        });
        if (at == blocks_.end()) return;
        statistics_.in_use -= at->bytes;
        at->free = true;
        const auto i = static_cast<std::size_t>(at - blocks_.begin());
        join_with_next(i);
        if (i > 0) join_with_next(i - 1);
    }

    /// Hands what lies behind the last block in use back to the system.
    void release_unused() {
        const std::lock_guard lock(mutex_);
        if (blocks_.empty() || !blocks_.back().free) return;
        const std::size_t end = round_up(blocks_.back().offset, growth_step);
        if (end >= statistics_.reserved) return;
        memory_.resize(end);
        statistics_.reserved = end;
        blocks_.back().bytes = end - blocks_.back().offset;
        if (blocks_.back().bytes == 0) blocks_.pop_back();
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
    struct Block {  // they cover the range, in order
        std::size_t offset, bytes;
        bool free;
    };

    static constexpr bool can_be_separate = requires(const Memory& memory) { memory.separate(); };

    void count_in_use(std::size_t bytes) {
        statistics_.in_use += bytes;
        statistics_.peak = std::max(statistics_.peak, statistics_.in_use);
    }
    void* allocate_separately(std::size_t bytes) {
        void* const data = memory_.allocate(std::max(bytes, std::size_t{1}));
        separate_[data] = bytes;
        ++statistics_.system_allocations;
        count_in_use(bytes);
        return data;
    }
    void deallocate_separately(void* data) {
        const auto at = separate_.find(data);
        if (at == separate_.end()) return;
        statistics_.in_use -= at->second;
        separate_.erase(at);
        memory_.deallocate(data);
    }

    static std::size_t round_up(std::size_t bytes, std::size_t unit) { return (bytes + unit - 1) / unit * unit; }

    std::size_t find_free(std::size_t bytes) const {
        std::size_t best = blocks_.size();
        for (std::size_t i = 0; i < blocks_.size(); ++i) {
            const bool fits = blocks_[i].free && blocks_[i].bytes >= bytes;
            if (fits && (best == blocks_.size() || blocks_[i].bytes < blocks_[best].bytes)) best = i;
        }
        return best;
    }
    /// Moves the end of the range so that its last block is free and fits.
    std::size_t grow(std::size_t bytes) {
        const bool extends = !blocks_.empty() && blocks_.back().free;
        const std::size_t offset = extends ? blocks_.back().offset : statistics_.reserved;
        const std::size_t end = round_up(offset + bytes, growth_step);
        blocks_.reserve(blocks_.size() + 2);
        memory_.resize(end);
        statistics_.reserved = end;
        ++statistics_.system_allocations;
        if (!extends) blocks_.push_back({offset, 0, true});
        blocks_.back().bytes = end - offset;
        return blocks_.size() - 1;
    }
    void join_with_next(std::size_t i) {
        if (i + 1 >= blocks_.size() || !blocks_[i].free || !blocks_[i + 1].free) return;
        blocks_[i].bytes += blocks_[i + 1].bytes;
        blocks_.erase(blocks_.begin() + static_cast<std::ptrdiff_t>(i) + 1);
    }

    Memory memory_;
    std::vector<Block> blocks_;
    std::map<void*, std::size_t> separate_;
    WorkspaceStatistics statistics_;
    mutable std::mutex mutex_;
};

}  // namespace colt5
