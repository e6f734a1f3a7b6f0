// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <utility>
#include <vector>

#include <colt5/core/error.hpp>

namespace colt5 {

/// What a workspace holds and held, in bytes; `system_allocations` counts the requests that reached the system.
struct WorkspaceStatistics {
    std::size_t in_use = 0, peak = 0, reserved = 0, system_allocations = 0;
};

/// Memory that grows once: freed blocks are kept and reused, adjacent free ones merge, and the smallest one that fits
/// serves a request. After one pass over some shapes, a second pass over the same shapes asks the system for nothing.
///
/// `Memory` supplies `void* allocate(std::size_t)` (throws when there is none) and `void deallocate(void*,
/// std::size_t)`. Blocks are aligned to 256 bytes if the memory is. Safe to call from several threads.
template <typename Memory>
class Workspace {
public:
    static constexpr std::size_t granularity = 256;
    static constexpr std::size_t smallest_chunk = std::size_t{1} << 20;

    explicit Workspace(Memory memory = Memory()) : memory_(std::move(memory)) { blocks_.reserve(256); }
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;
    ~Workspace() {
        for (const Chunk& chunk : chunks_) memory_.deallocate(chunk.data, chunk.bytes);
    }

    void* allocate(std::size_t bytes) {
        const std::lock_guard lock(mutex_);
        bytes = std::max(granularity, (bytes + granularity - 1) / granularity * granularity);
        std::size_t best = find_free(bytes);
        if (best == blocks_.size()) best = grow(bytes);
        if (blocks_[best].bytes > bytes) {  // the rest stays free
            const Block rest{blocks_[best].data + bytes, blocks_[best].bytes - bytes, blocks_[best].chunk, true};
            blocks_.insert(blocks_.begin() + static_cast<std::ptrdiff_t>(best) + 1, rest);
        }
        Block& block = blocks_[best];
        block.bytes = bytes;
        block.free = false;
        statistics_.in_use += bytes;
        statistics_.peak = std::max(statistics_.peak, statistics_.in_use);
        return block.data;
    }

    void deallocate(void* data) {
        const std::lock_guard lock(mutex_);
        const auto at =
            std::find_if(blocks_.begin(), blocks_.end(), [&](const Block& b) { return b.data == data && !b.free; });
        if (at == blocks_.end()) return;
        statistics_.in_use -= at->bytes;
        at->free = true;
        merge(static_cast<std::size_t>(at - blocks_.begin()));
    }

    /// Hands every chunk that holds nothing back to the system.
    void release_unused() {
        const std::lock_guard lock(mutex_);
        std::erase_if(blocks_, [&](const Block& block) {
            const auto chunk =
                std::find_if(chunks_.begin(), chunks_.end(), [&](const Chunk& c) { return c.id == block.chunk; });
            if (!block.free || block.bytes != chunk->bytes) return false;
            memory_.deallocate(chunk->data, chunk->bytes);
            statistics_.reserved -= chunk->bytes;
            chunks_.erase(chunk);
            return true;
        });
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
    struct Block {  // sorted by chunk, then by address
        std::byte* data;
        std::size_t bytes, chunk;
        bool free;
    };
    struct Chunk {
        std::byte* data;
        std::size_t bytes, id;
    };

    std::size_t find_free(std::size_t bytes) const {
        std::size_t best = blocks_.size();
        for (std::size_t i = 0; i < blocks_.size(); ++i)
            if (blocks_[i].free && blocks_[i].bytes >= bytes &&
                (best == blocks_.size() || blocks_[i].bytes < blocks_[best].bytes))
                best = i;
        return best;
    }
    std::size_t grow(std::size_t bytes) {
        const std::size_t size = std::max(bytes, smallest_chunk);
        chunks_.reserve(chunks_.size() + 1);
        blocks_.reserve(blocks_.size() + 2);
        auto* data = static_cast<std::byte*>(memory_.allocate(size));
        chunks_.push_back({data, size, next_chunk_});
        blocks_.push_back({data, size, next_chunk_++, true});
        statistics_.reserved += size;
        ++statistics_.system_allocations;
        return blocks_.size() - 1;
    }
    void merge(std::size_t at) {
        const auto joins = [&](std::size_t left) {
            return left + 1 < blocks_.size() && blocks_[left].free && blocks_[left + 1].free &&
                   blocks_[left].chunk == blocks_[left + 1].chunk;
        };
        const auto join = [&](std::size_t left) {
            blocks_[left].bytes += blocks_[left + 1].bytes;
            blocks_.erase(blocks_.begin() + static_cast<std::ptrdiff_t>(left) + 1);
        };
        if (joins(at)) join(at);
        if (at > 0 && joins(at - 1)) join(at - 1);
    }

    Memory memory_;
    std::vector<Block> blocks_;
    std::vector<Chunk> chunks_;
    std::size_t next_chunk_ = 0;
    WorkspaceStatistics statistics_;
    mutable std::mutex mutex_;
};

}  // namespace colt5
