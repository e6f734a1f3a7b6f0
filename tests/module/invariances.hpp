// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "module/checks.hpp"

/// What holds for every module whatever its router: one sequence does not see another, padding is not seen, and bits do
/// not depend on threads.
namespace support {

using colt5::RouterType, colt5::Seed, colt5::TransformerBlockConfig;

constexpr TransformerBlockConfig invariance_config(RouterType type) {
    return {.dim = 12,
            .num_heavy_attn_tokens_q = 20,
            .num_heavy_attn_tokens_kv = 70,
            .num_routed_kv = 2,
            .num_heavy_ff_tokens = 30,
            .light_dim_head = 6,
            .light_heads = 2,
            .light_window_size = 16,
            .heavy_dim_head = 7,
            .heavy_heads = 2,
            .router_straight_through = false,
            .router_type = type};
}

/// Long enough for several tiles, panels and segments of every kernel; less for Sinkhorn, whose work is slots × tokens.
template <typename Block>
constexpr Index longest = Block::Attention::QRouter::picks_repeat ? 200 : 1300;

/// Every router of a block starts its noise again from one seed, with the number of the first sample of a batch;
/// without Sinkhorn routing there is none.
template <typename Block>
void restart_noise(const Block& block, Index first_sample = 0) {
    if constexpr (Block::Attention::QRouter::picks_repeat) {
        std::uint64_t seed = 11;
        for (auto* const noise : {&block.conditional_ff.router.noise, &block.conditional_attn.q_router.noise,
                                  &block.conditional_attn.kv_router.noise}) {
            *noise = std::remove_pointer_t<decltype(noise)>::seeded(Seed{seed++});
            noise->first_sample = first_sample;
        }
    }
}

template <typename Block>
struct Results {
    typename Block::Out out, d_tokens;
    typename Block::Gradients gradients;
};
template <typename Block>
Results<Block> run(const Block& block, const typename Block::Out& x, const typename Block::Out& d_out, Mask mask) {
    const auto saved = block.forward(x, mask);
    auto gradients = block.make_gradients();
    auto d_tokens = block.backward(saved, d_out, gradients);
    return {copy_of(block.policy(), saved.out), std::move(d_tokens), std::move(gradients)};
}
template <typename Block>
void check_same_bits(const Results<Block>& a, const Results<Block>& b) {
    CHECK(same_bits(a.out, b.out));
    CHECK(same_bits(a.d_tokens, b.d_tokens));
    Block::each_parameter(
        [](const std::string& name, const auto& of_a, const auto& of_b) {
            CAPTURE(name);
            CHECK(same_bits(of_a, of_b));
        },
        "", a.gradients, b.gradients);
}

/// A batch gives each sequence the bits that it gets alone, in evaluation and in training: outputs and gradients of the
/// tokens. Where training draws noise, a sample has the number that it has in the batch.
template <typename Block>
void check_batched_equals_alone() {
    using T = typename Block::Out::value_type;
    const Cpu policy(2);
    const Block block(policy, Seed{1});
    for (const Index length : {Index{1}, Index{25}, Index{150}, longest<Block>}) {
        CAPTURE(length);
        const std::array<Index, 3> shape{3, length, 12};
        const auto x = normal<T>(policy, shape, 0), d_out = normal<T>(policy, shape, 1);
        const auto some = mask_of_lengths(policy, {length, length * 2 / 3, 0}, length);
        for (const Mask mask : {Mask(), some.const_view()}) {
            restart_noise(block);
            const auto together = run(block, x, d_out, mask);
            const auto evaluated = block(x, mask);
            CHECK(same_bits(block(x, mask), evaluated));
            without_noise(block, [&] { CHECK(same_bits(block(x, mask), block.forward(x, mask).out)); });
            CHECK(all_finite(together.out));
            CHECK(all_finite(together.d_tokens));
            for (Index b = 0; b < 3; ++b) {
                CAPTURE(b);
                restart_noise(block, b);
                const auto x_alone = copy_of(policy, sequence(x, b)), d_alone = copy_of(policy, sequence(d_out, b));
                const auto alone = run(block, x_alone, d_alone, mask ? sequence(mask, b) : Mask());
                CHECK(same_bits(alone.out, sequence(together.out, b)));
                CHECK(same_bits(alone.d_tokens, sequence(together.d_tokens, b)));
                CHECK(same_bits(block(x_alone, mask ? sequence(mask, b) : Mask()), sequence(evaluated, b)));
            }
        }
    }
}

/// What stands in masked tokens changes no bit of a real one. Appending masked tokens changes no bit of its output, and
/// gradients by rounding at most.
template <typename Block>
void check_padding_is_not_seen() {
    using T = typename Block::Out::value_type;
    const double tolerance = std::is_same_v<T, double> ? 1e-12 : 2e-5;
    const Cpu policy(2);
    const Block block(policy, Seed{1});
    for (const Index length : {10, 150}) {
        CAPTURE(length);
        const std::array<Index, 3> shape{2, length, 12};
        const auto x = normal<T>(policy, shape, 0), d_out = normal<T>(policy, shape, 1);
        restart_noise(block);
        const auto unpadded = run(block, x, d_out, {});
        for (const Index padding : {1, 13, 100}) {
            CAPTURE(padding);
            const Index longer = length + padding;
            const auto mask = mask_of_lengths(policy, {length, length}, longer);
            auto d_longer = resized(policy, d_out, longer);
            for (Index b = 0; b < 2; ++b)  // nobody asks what becomes of padding
                std::fill_n(d_longer.view()[b][length].data(), padding * 12, T(0));
            restart_noise(block);
            const auto padded = run(block, resized(policy, x, longer), d_longer, mask.const_view());
            restart_noise(block);
            const auto other = run(block, resized(policy, x, longer, 77), d_longer, mask.const_view());
            for (Index b = 0; b < 2; ++b) {
                const auto real = [&](const auto& tensor) {
                    return colt5::MatrixView<const T>(tensor.const_view()[b].data(), {length, 12});
                };
                // How a BLAS rounds a row depends on the number of rows.
                CHECK((colt5::cpu::uses_blas ? relative_error(real(padded.out), real(unpadded.out)) <= tolerance
                                             : same_bits(real(padded.out), real(unpadded.out))));
                CHECK(relative_error(real(padded.d_tokens), real(unpadded.d_tokens)) <= tolerance);
                CHECK(same_bits(real(padded.out), real(other.out)));
                CHECK(same_bits(real(padded.d_tokens), real(other.d_tokens)));
                CHECK(all_zero(
                    colt5::MatrixView<const T>(padded.d_tokens.const_view()[b][length].data(), {padding, 12})));
            }
            Block::each_parameter(
                [&](const std::string& name, const auto& of_padded, const auto& of_other, const auto& of_unpadded) {
                    CAPTURE(name);
                    CHECK(same_bits(of_padded, of_other));
                    CHECK(relative_error(of_padded, of_unpadded) <= 10 * tolerance);
                },
                "", padded.gradients, other.gradients, unpadded.gradients);
        }
    }
}

/// What masked tokens hold, finite or not, changes no bit of what zeros there give: of outputs and all gradients where
/// d_out is 0 there. Outputs of masked tokens see large numbers alone.
template <typename Module, typename Restart>
void check_padding_may_hold_anything(const Module& module, const Restart& restart) {
    using T = typename Module::Out::value_type;
    using limits = std::numeric_limits<T>;
    const Cpu& policy = module.policy();
    for (const Index length : {40, 190}) {
        CAPTURE(length);
        auto mask = random_mask(policy, std::array<Index, 2>{2, length}, 5);
        std::fill_n(mask.view()[1].data() + 3, length - 3, false);  // fewer real tokens than are routed
        auto x = normal<T>(policy, std::array<Index, 3>{2, length, 12}, 0), d_out = normal<T>(policy, x.shape(), 1);
        const auto fill_padding = [&](typename Module::Out& tokens, T value) {
            for (Index i = 0; i < mask.size(); ++i)
                if (!mask.data()[i]) std::fill_n(tokens.data() + i * 12, 12, value);
        };
        fill_padding(d_out, 0);
        const auto evaluate = [&] {
            restart();
            return module(x, mask.const_view());
        };
        const auto train = [&] {
            restart();
            return run(module, x, d_out, mask.const_view());
        };
        fill_padding(x, 0);
        const auto expected = evaluate();
        const auto expected_training = train();
        for (const T poison : {limits::quiet_NaN(), limits::infinity(), -limits::infinity(), T(3e38)}) {
            CAPTURE(poison);
            fill_padding(x, poison);
            auto out = evaluate();
            auto training = train();
            if (std::isfinite(poison))
                for (Index i = 0; i < mask.size(); ++i)
                    if (!mask.data()[i]) {
                        std::copy_n(expected.data() + i * 12, 12, out.data() + i * 12);
                        std::copy_n(expected_training.out.data() + i * 12, 12, training.out.data() + i * 12);
                    }
            CHECK(same_bits(out, expected));
            check_same_bits(training, expected_training);
        }
    }
}
/// The same for a block, whose second half sees what the first makes of padding, and for both halves.
template <typename Block>
void check_padding_may_hold_anything() {
    for (const bool recompute : {false, true}) {
        CAPTURE(recompute);
        const Cpu policy(2, {.tokens_at_a_time = 64, .recompute = recompute});
        const Block block(policy, Seed{1});
        const auto restart = [&] { restart_noise(block); };
        check_padding_may_hold_anything(block, restart);
        check_padding_may_hold_anything(block.conditional_attn, restart);
        check_padding_may_hold_anything(block.conditional_ff, restart);
    }
}

/// A policy whose tensors are full of NaN until something is written to them.
inline Cpu poisoned(int threads) {
    const Cpu policy(threads);
    filled<double>(policy, std::array<Index, 1>{1 << 21}, std::numeric_limits<double>::quiet_NaN());
    return policy;
}

/// The same bits from run to run, with 1, 2 and 3 threads, whatever was in memory before.
template <typename Block>
void check_threads_change_nothing() {
    using T = typename Block::Out::value_type;
    const Cpu one(1), two = poisoned(2), three = poisoned(3);
    const std::array<Index, 3> shape{3, longest<Block>, 12};
    const auto x = normal<T>(one, shape, 0), d_out = normal<T>(one, shape, 1);
    const auto some = mask_of_lengths(one, {longest<Block>, 150, 9}, longest<Block>);
    const Block by_one(one, Seed{1}), by_two(two, Seed{1}), by_three(three, Seed{1});
    for (const Mask mask : {Mask(), some.const_view()}) {
        const auto run_again = [&](const Block& block) {
            restart_noise(block);
            return run(block, x, d_out, mask);
        };
        const auto expected = run_again(by_one);
        check_same_bits(run_again(by_one), expected);
        check_same_bits(run_again(by_two), expected);
        check_same_bits(run_again(by_three), expected);
        check_same_bits(run_again(by_two), expected);
    }
}

}  // namespace support
