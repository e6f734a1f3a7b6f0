// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <array>

#include <colt5/cpu/linear.hpp>
#include <colt5/cpu/projected_local_attention.hpp>

#include "support/tensors.hpp"

using namespace colt5;
using namespace support;

TEST_CASE("projected_local_attention: the gradient is that of its steps") {
    const Cpu policy(2);
    constexpr Index heads = 2, dim_head = 5, out = 3;
    const auto weight = normal<double>(policy, std::array{out, heads * dim_head}, 1);
    for (const auto& size : {std::array<Index, 2>{1, 1}, {70, 3}, {300, 64}, {700, 300}})
        for (const Index batch : {1, 2})
            for (const bool masked : {false, true})
                for (const MaskedRows masked_rows : {MaskedRows::zero, MaskedRows::window_mean}) {
                    const Index length = size[0], reach = size[1];
                    if (is_slow && length == 700 && batch == 2) continue;  // as slow as all the others together
                    CAPTURE(length);
                    CAPTURE(reach);
                    CAPTURE(batch);
                    CAPTURE(masked);
                    CAPTURE(static_cast<int>(masked_rows));
                    const LocalAttention attention{reach, masked_rows};
                    const auto kv = normal<double>(policy, std::array{batch, length, Index{2}, heads, dim_head}, 2);
                    const auto hidden = random_mask(policy, std::array{batch, length}, 3);
                    const Mask mask = masked ? Mask(hidden) : Mask();
                    // All queries, or for a batch of one also those from a third of the tokens on.
                    for (const Index first : {Index{0}, batch == 1 ? length / 3 : Index{0}}) {
                        const Index queries = length - first;
                        const auto q = normal<double>(policy, std::array{batch, queries, heads, dim_head}, 4);
                        const Index carried =
                            first > 0 ? std::min(length, first + attention.halo()) - attention.window_begin(first) : 0;
                        const auto d_y = normal<double>(policy, std::array{batch, queries, out}, 5);
                        const auto shape =
                            std::array{batch, attention.window(first, queries, length), Index{3}, heads, dim_head};
                        auto expected = filled<double>(policy, shape, 1.0), d_qkv = filled<double>(policy, shape, 1.0);
                        auto expected_d_weight = filled<double>(policy, weight.shape(), 2.0);
                        auto d_weight = filled<double>(policy, weight.shape(), 2.0);

                        const auto saved = local_attention_forward(policy, attention, q, kv, mask, first);
                        const auto merged = saved.out.view().reshape(std::array{batch, queries, heads * dim_head});
                        const auto d_out = linear_vjp(policy, d_y, merged, weight, expected_d_weight.view());
                        local_attention_vjp(policy, expected.view(), attention, saved, d_out.view().reshape(q.shape()),
                                            q, kv, mask, first, carried);

                        projected_local_attention_vjp(policy, d_qkv.view(), attention, d_y, q, kv, mask, first, carried,
                                                      weight, d_weight.view());
                        CHECK(relative_error(d_qkv, expected) <= 1e-13);
                        CHECK(relative_error(d_weight, expected_d_weight) <= 1e-13);
                    }
                }
}
