// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/cpu/local_window.hpp>
#include <colt5/cpu/policy.hpp>
#include <colt5/op/local_attention.hpp>

/// What modules ask about the backend at compile time.
namespace colt5 {

template <typename T>
struct LocalGridOf<Cpu, T> {
    static constexpr LocalGrid of(const LocalAttention& attention) {
        using Tile = cpu::LocalTile<T>;
        return {Tile::queries, Tile::one_block(attention.reach, attention.causal ? 0 : attention.reach)
                                   ? Index{cpu::block_rows}
                                   : Tile::keys};
    }
};

}  // namespace colt5
