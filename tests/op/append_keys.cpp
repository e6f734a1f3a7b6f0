// SPDX-License-Identifier: MIT
#include <colt5/op/append_keys.hpp>

#include <doctest/doctest.h>

#include <array>
#include <string>

#include <colt5/cpu.hpp>
#include <colt5/op/copy_tokens.hpp>

#include "support/tensors.hpp"

using namespace colt5;
using namespace support;

TEST_CASE("append_keys: the live keys of each route, behind those that it has, up to the capacity") {
    const Cpu policy(2);
    constexpr Index batch = 2, routes = 2, capacity = 7, width = 3, count = 4;
    for (const Index null_keys : {0, 1}) {
        RoutedKeys<float, Cpu> keys(policy, batch, routes, capacity, width, null_keys);
        std::array<Index, 4> filled{};
        const std::array<std::array<Index, 4>, 4> lives{{{1, 0, 4, 2}, {0, 0, 2, 4}, {4, 1, 3, 3}, {1, 4, 4, 0}}};
        for (std::size_t step = 0; step < lives.size(); ++step) {
            const auto kv = normal<float>(policy, std::array{batch, routes, count, width}, step);
            const auto scale = normal<float>(policy, std::array{batch, routes, count}, 10 + step);
            HostTensor<TokenIndex, 3> positions(policy, {batch, routes, count});
            HostTensor<bool, 3> live(policy, {batch, routes, count});
            for (Index row = 0; row < batch * routes; ++row)
                for (Index i = 0; i < count; ++i) {
                    positions.data()[row * count + i] =
                        static_cast<TokenIndex>(100 * static_cast<Index>(step) + 10 * i + row);
                    live.data()[row * count + i] = i < lives[step][static_cast<std::size_t>(row)];
                }
            append_keys(policy, keys, kv, scale, positions, live);
            for (Index row = 0; row < batch * routes; ++row) {
                Index& at = filled[static_cast<std::size_t>(row)];
                for (Index i = 0; i < lives[step][static_cast<std::size_t>(row)] && at < capacity; ++i, ++at) {
                    const Index to = row * (null_keys + capacity) + null_keys + at;
                    for (Index e = 0; e < width; ++e)
                        CHECK(keys.kv.data()[to * width + e] == kv.data()[(row * count + i) * width + e]);
                    CHECK(keys.value_scale.data()[to] == scale.data()[row * count + i]);
                    CHECK(keys.positions.data()[row * capacity + at] == positions.data()[row * count + i]);
                }
                CHECK(keys.counts.data()[row] == at);
            }
        }
        for (Index row = 0; row < batch * routes; ++row)
            for (Index i = filled[static_cast<std::size_t>(row)]; i < capacity; ++i) {
                CHECK(keys.positions.data()[row * capacity + i] == RoutedKeys<float, Cpu>::no_position);
                CHECK(keys.kv.data()[(row * (null_keys + capacity) + null_keys + i) * width] == 0);
            }
        Index bytes = 0;
        RoutedKeys<float, Cpu>::each_tensor(
            [&](const std::string&, const auto& tensor) {
                bytes += tensor.size() * static_cast<Index>(sizeof(*tensor.data()));
            },
            "", keys);
        CHECK(bytes == RoutedKeys<float, Cpu>::bytes(batch, routes, capacity, width, null_keys));
        CHECK(keys.null_keys() == null_keys);
    }
}

TEST_CASE("append_keys: errors name the argument and both shapes") {
    const Cpu policy(1);
    RoutedKeys<float, Cpu> keys(policy, 1, 2, 5, 3, 0);
    const auto kv = normal<float>(policy, std::array<Index, 4>{1, 2, 4, 2}, 0);
    const auto scale = normal<float>(policy, std::array<Index, 3>{1, 2, 4}, 0);
    CHECK_THROWS_WITH_AS(append_keys(policy, keys, kv, scale, {}, {}),
                         "colt5: `kv` must have shape (1, 2, any, 3), but has (1, 2, 4, 2)", ShapeError);
}

TEST_CASE("copy_tokens: a part of each sequence") {
    const Cpu policy(2);
    const auto from = normal<float>(policy, std::array<Index, 3>{3, 5, 2}, 0);
    auto to = filled<float>(policy, std::array<Index, 3>{3, 9, 2}, 7);
    copy_tokens(policy, to.view(), 4, from, 1, 3);
    for (Index b = 0; b < 3; ++b)
        for (Index i = 0; i < 9; ++i)
            for (Index e = 0; e < 2; ++e) CHECK(to.view()(b, i, e) == (i >= 4 && i < 7 ? from.view()(b, i - 3, e) : 7));
    copy_tokens(policy, to.view(), 9, from, 0, 0);
    CHECK_THROWS_WITH_AS(copy_tokens(policy, to.view(), 7, from, 0, 3),
                         "colt5: `to_first` must be within 9 tokens, but is 3 tokens from 7 on", ValueError);
    CHECK_THROWS_WITH_AS(copy_tokens(policy, to.view(), 0, from, 3, 3),
                         "colt5: `from_first` must be within 5 tokens, but is 3 tokens from 3 on", ValueError);
}
