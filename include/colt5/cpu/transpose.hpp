// SPDX-License-Identifier: MIT
#pragma once

#include <Eigen/Core>

#include <algorithm>

#include <colt5/core/error.hpp>
#include <colt5/cpu/simd.hpp>

namespace colt5::cpu {

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wignored-attributes"  // Eigen's packets as template arguments
/// to (columns, rows) = fromᵀ, where the numbers of rows and columns are divisible by the size of Eigen's packets.
template <typename T>
void transpose(Index rows, Index columns, const T* from, Index stride, T* to, Index to_stride) {
    using namespace Eigen::internal;
    using Packet = typename packet_traits<T>::type;
    constexpr Index size = unpacket_traits<Packet>::size;
    constexpr Index line = std::max(size, Index{64 / sizeof(T)});  // what one row has in a line of the cache
    // A line of every row at a time, and the next but one asked for: rows may be far apart and share a set of the
    // cache.
    for (Index first = 0; first < columns; first += line)
        for (Index i = 0; i < rows; i += size)
            for (Index j = first; j < std::min(columns, first + line); j += size) {
                PacketBlock<Packet, size> block;
                const Index ahead = j + 2 * line < columns ? 2 * line : 0;
                unroll<size>([&](auto r) {
                    __builtin_prefetch(from + (i + r) * stride + j + ahead);
                    block.packet[r] = ploadu<Packet>(from + (i + r) * stride + j);
                });
                ptranspose(block);
                unroll<size>([&](auto c) { pstoreu(to + (j + c) * to_stride + i, block.packet[c]); });
            }
}
#pragma GCC diagnostic pop

}  // namespace colt5::cpu
