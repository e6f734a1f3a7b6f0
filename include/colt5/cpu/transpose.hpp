// SPDX-License-Identifier: MIT
#pragma once

#include <Eigen/Core>

#include <colt5/core/error.hpp>

namespace colt5::cpu {

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wignored-attributes"  // Eigen's packets as template arguments
/// to (columns, rows) = fromᵀ, where the numbers of rows and columns are divisible by the size of Eigen's packets.
template <typename T>
void transpose(Index rows, Index columns, const T* from, Index stride, T* to, Index to_stride) {
    using namespace Eigen::internal;
    using Packet = typename packet_traits<T>::type;
    constexpr Index size = unpacket_traits<Packet>::size;
    for (Index i = 0; i < rows; i += size)
        for (Index j = 0; j < columns; j += size) {
            PacketBlock<Packet, size> block;
            for (Index r = 0; r < size; ++r) block.packet[r] = ploadu<Packet>(from + (i + r) * stride + j);
            ptranspose(block);
            for (Index c = 0; c < size; ++c) pstoreu(to + (j + c) * to_stride + i, block.packet[c]);
        }
}
#pragma GCC diagnostic pop

}  // namespace colt5::cpu
