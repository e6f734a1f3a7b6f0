// SPDX-License-Identifier: MIT
/// Sequences of different lengths in one batch, packed or padded.
#include <colt5/module/paper.hpp>

#include <numeric>

#include "module/checks.hpp"

using namespace colt5;
using namespace support;

namespace {

using Lengths = std::vector<Index>;

constexpr Index dim = 10;  // rows of float are not aligned to more than 8 bytes
constexpr TransformerBlockConfig block_with(RouterType type) {
    return {.dim = dim,
            .num_heavy_attn_tokens_q = 20,
            .num_heavy_attn_tokens_kv = 30,
            .num_routed_kv = 2,
            .num_heavy_ff_tokens = 25,
            .light_dim_head = 6,
            .light_heads = 2,
            .light_window_size = 16,
            .heavy_dim_head = 6,
            .heavy_heads = 2,
            .router_straight_through = false,
            .router_type = type};
}
constexpr TransformerBlockConfig of_paper = [] {
    TransformerBlockConfig config = block_with(RouterType::coor_descent);
    config.feed_forward = FeedForwardType::gated;
    config.multiply_keys_by_score = config.use_relative_position_bias = true;
    return config;
}();
constexpr TransformerBlockConfig of_later_versions = [] {
    TransformerBlockConfig config = block_with(RouterType::cum_softmax);
    config.use_null_kv = config.use_null_q_tokens = config.multiply_queries_by_score = true;
    config.rotary_emb = config.light_rotary_emb = true;
    config.num_routed_q = 2;
    return config;
}();
constexpr TransformerBlockConfig in_blocks = [] {
    TransformerBlockConfig config = block_with(RouterType::coor_descent);
    config.router_kwargs.route_block_size = 32;
    config.attends_to_padding = true;
    config.masked_rows = MaskedRows::window_mean;
    return config;
}();
constexpr RoutedConfig routed_config{.dim = dim, .num_heavy_tokens = 15, .num_routes = 2, .sequence_order = true};
constexpr CrossAttentionConfig cross_config{.dim = dim,
                                            .num_tokens_q = 20,
                                            .num_tokens_kv = 25,
                                            .dim_head = 6,
                                            .heads = 2,
                                            .router_straight_through = false,
                                            .kv_routing_tokens = 2,
                                            .use_null_q_tokens = true};
constexpr CrossAttentionConfig cross_conditioned = [] {
    CrossAttentionConfig config = cross_config;
    config.condition_kv_routing_on_queries = config.use_null_kv = config.use_relative_position_bias = true;
    config.q_routing_tokens = 2;
    return config;
}();

template <typename T, TransformerBlockConfig config>
using Block = ConditionalRoutedTransformerBlock<config, T, Cpu>;
template <typename T>
using DescentBlock = Block<T, block_with(RouterType::coor_descent)>;
template <typename T>
using SinkhornBlock = Block<T, block_with(RouterType::sinkhorn)>;
template <typename T>
using Experts = Routed<routed_config, T, Cpu, SizedFeedForward<dim, 20, T, Cpu>>;
template <typename T>
using BlockForSome = Routed<routed_config, T, Cpu, AsBranch<DescentBlock<T>>, SizedFeedForward<dim, 4, T, Cpu>>;
template <typename T, CrossAttentionConfig config = cross_config>
using Cross = ConditionalRoutedCrossAttention<config, T, Cpu>;

template <typename Module>
using ScalarOf = typename Module::Out::value_type;

/// Sequences `first`, … of packed tokens (total, d) as a batch.
template <typename V>
auto packed_part(const V& tokens, Index first_row, Index length) {
    using T = typename V::value_type;
    return TokensView<const T>(tokens.const_view()[first_row].data(), {1, length, tokens.extent(1)});
}
/// Padded tokens (b, n, d), where the padding is NaN.
template <Viewable V, typename T = typename V::value_type>
HostTensor<T, 3> padded(const Cpu& policy, const V& packed, const Lengths& lengths, Index longest) {
    auto tokens = filled<T>(policy, std::array{static_cast<Index>(lengths.size()), longest, packed.extent(1)}, NAN);
    const T* from = packed.data();
    for (std::size_t b = 0; b < lengths.size(); ++b) {
        const Index count = lengths[b] * packed.extent(1);
        std::copy_n(from, count, tokens.view()[static_cast<Index>(b)].data());
        from += count;
    }
    return tokens;
}
/// Packed rows followed by zeros where padded ones have padding.
template <Viewable V, Viewable Packed, typename T = typename V::value_type>
bool is_padded_with_zeros(const V& tokens, const Packed& packed, const Lengths& lengths) {
    const T* from = packed.data();
    for (std::size_t b = 0; b < lengths.size(); ++b) {
        const Index real = lengths[b] * packed.extent(1), all = tokens.extent(1) * packed.extent(1);
        const T* const row = tokens.const_view()[static_cast<Index>(b)].data();
        if (real > 0 && std::memcmp(row, from, static_cast<std::size_t>(real) * sizeof(T)) != 0) return false;
        if (!std::all_of(row + real, row + all, [](T x) { return x == 0; })) return false;
        from += real;
    }
    return true;
}

template <typename Module>
void check_same_gradients(const typename Module::Gradients& a, const typename Module::Gradients& b) {
    Module::each_parameter(
        [](const std::string& name, const auto& of_a, const auto& of_b) {
            CAPTURE(name);
            CHECK(same_bits(of_a, of_b));
        },
        "", a, b);
}

/// Numbers of tokens that depend on the length under the names of each module.
template <typename Counts>
Counts half_of(Index length) {
    const Index half = std::max(Index{1}, length / 2);
    if constexpr (requires(Counts c) { c.num_heavy_tokens; })
        return {half};
    else if constexpr (std::same_as<Counts, AttentionCounts>)
        return {half, length};
    else
        return {half, length, half};
}

const Lengths mixed{0, 1, 17, 70, 0, 33, 120, 5, 0};

}  // namespace

TEST_CASE_TEMPLATE("ragged: each sequence is what it is alone, bit for bit", Module, DescentBlock<float>,
                   DescentBlock<double>, SinkhornBlock<float>, Block<float, of_paper>, Block<double, of_later_versions>,
                   Block<float, in_blocks>, DescentBlock<float>::Attention, DescentBlock<double>::FeedForward,
                   Block<float, of_paper>::FeedForward, Experts<float>, Experts<double>, BlockForSome<double>) {
    using T = ScalarOf<Module>;
    using Counts = typename Module::Counts;
    const Cpu policy(2);
    const Module module(policy, Seed{1});
    const Ragged ragged(module);
    const auto offsets = cumulative_lengths(mixed);
    const auto x = normal<T>(policy, std::array{offsets.back(), dim}, 0), d_out = normal<T>(policy, x.shape(), 1);
    const auto padded_x = padded(policy, x, mixed, 130), padded_d = padded(policy, d_out, mixed, 130);
    const auto check = [&](const auto& counts, const auto& counts_of) {
        without_noise(module, [&] {
            const auto out = ragged(x, offsets, counts);
            auto saved = ragged.forward(x, offsets, counts);
            CHECK(same_bits(saved.out, out));
            auto gradients = module.make_gradients(), expected = module.make_gradients();
            const auto d_x = ragged.backward(saved, d_out, gradients);
            for (std::size_t i = 0; i < mixed.size(); ++i) {
                CAPTURE(i);
                if (mixed[i] == 0) continue;
                const auto of = [&](const auto& all) { return packed_part(all, offsets[i], mixed[i]); };
                const auto x_alone = support::copy_of(policy, of(x)), d_alone = support::copy_of(policy, of(d_out));
                const auto alone = module.forward(x_alone, {}, counts_of(mixed[i]));
                CHECK(same_bits(alone.out, of(out)));
                CHECK(same_bits(module.backward(alone, d_alone, expected), of(d_x)));
            }
            check_same_gradients<Module>(gradients, expected);  // no two successive sequences are as long
            auto moved = module.make_gradients();
            CHECK(same_bits(ragged.backward(std::move(saved), d_out, moved), d_x));
            check_same_gradients<Module>(moved, expected);

            CHECK(is_padded_with_zeros(ragged(padded_x, mixed, counts), out, mixed));
            auto of_padded = module.make_gradients();
            const auto saved_padded = ragged.forward(padded_x, mixed, counts);
            CHECK(is_padded_with_zeros(saved_padded.out, out, mixed));
            CHECK(is_padded_with_zeros(ragged.backward(saved_padded, padded_d, of_padded), d_x, mixed));
            check_same_gradients<Module>(of_padded, expected);
        });
    };
    check(CountsByLength<Counts>(), [](Index) { return Counts(); });
    check(half_of<Counts>, half_of<Counts>);
    check(half_of<Counts>(14), [](Index) { return half_of<Counts>(14); });
}

TEST_CASE_TEMPLATE("ragged: cross attention, each sequence is what it is alone, bit for bit", Module, Cross<float>,
                   Cross<double>, Cross<float, cross_conditioned>, Cross<double, cross_conditioned>) {
    using T = ScalarOf<Module>;
    const Cpu policy(2);
    const Module cross(policy, Seed{1});
    const Ragged ragged(cross);
    const Lengths context_lengths{7, 60, 0, 24, 100, 26, 1, 90, 0};
    const auto offsets = cumulative_lengths(mixed), context_offsets = cumulative_lengths(context_lengths);
    const auto x = normal<T>(policy, std::array{offsets.back(), dim}, 0), d_out = normal<T>(policy, x.shape(), 1);
    const auto context = normal<T>(policy, std::array{context_offsets.back(), dim}, 2);
    const auto padded_context = padded(policy, context, context_lengths, 100);
    const CountsByLength<CrossAttentionCounts> by_ratio{TokenRatio{0.25}, TokenRatio{0.5}};
    const auto check = [&](const auto& counts, const auto& counts_of) {
        const auto out = ragged(x, offsets, context, context_offsets, counts);
        auto saved = ragged.forward(x, offsets, context, context_offsets, counts);
        CHECK(same_bits(saved.out, out));
        auto gradients = cross.make_gradients(), expected = cross.make_gradients();
        const auto d = ragged.backward(saved, d_out, gradients);
        for (std::size_t i = 0; i < mixed.size(); ++i) {
            CAPTURE(i);
            const auto of_context = [&](const auto& all) {
                return packed_part(all, context_offsets[i], context_lengths[i]);
            };
            if (mixed[i] == 0) {
                if (context_lengths[i] > 0) CHECK(all_zero(of_context(d.d_context)));
                continue;
            }
            const auto of = [&](const auto& all) { return packed_part(all, offsets[i], mixed[i]); };
            const auto x_alone = support::copy_of(policy, of(x)), d_alone = support::copy_of(policy, of(d_out));
            const auto context_alone = support::copy_of(policy, of_context(context));
            const auto alone = cross.forward(x_alone, context_alone, {}, {}, counts_of(mixed[i], context_lengths[i]));
            CHECK(same_bits(alone.out, of(out)));
            const auto d_of_alone = cross.backward(alone, d_alone, expected);
            CHECK(same_bits(d_of_alone.d_x, of(d.d_x)));
            CHECK(same_bits(d_of_alone.d_context, of_context(d.d_context)));
        }
        check_same_gradients<Module>(gradients, expected);

        const auto of_padded = ragged.forward(x, offsets, padded_context, context_lengths, counts);
        CHECK(same_bits(of_padded.out, out));
        auto moved = cross.make_gradients();
        const auto d_of_padded = ragged.backward(of_padded, d_out, moved);
        CHECK(same_bits(d_of_padded.d_x, d.d_x));
        CHECK(is_padded_with_zeros(d_of_padded.d_context, d.d_context, context_lengths));
        moved = cross.make_gradients();
        CHECK(same_bits(ragged.backward(std::move(saved), d_out, moved).d_context, d.d_context));
        check_same_gradients<Module>(moved, expected);
    };
    check(CountsByLength<CrossAttentionCounts>(), [](Index, Index) { return CrossAttentionCounts(); });
    check(by_ratio, [](Index n, Index m) {
        return CrossAttentionCounts{std::max(Index{1}, n / 4), std::max(Index{1}, m / 2)};
    });
}

TEST_CASE("ragged: gradients, by finite differences" * not_sanitized) {
    const Cpu policy(1);
    constexpr TransformerBlockConfig config = [] {
        TransformerBlockConfig soft = block_with(RouterType::coor_descent);
        soft.router_kwargs.coor_descent = {.n_iters = 20, .score_scale = 0.3};
        return soft;
    }();
    const auto check = [&]<typename Module>(std::type_identity<Module>,
                                            const CountsByLength<typename Module::Counts>& counts) {
        Module module(policy, Seed{1});
        const Ragged ragged(module);
        const Lengths lengths{3, 0, 9, 9, 4}, offsets = cumulative_lengths(lengths);
        auto x = normal<double>(policy, std::array{offsets.back(), dim}, 0);
        const auto d_out = normal<double>(policy, x.shape(), 1);
        auto gradients = module.make_gradients();
        const auto d_x = ragged.backward(ragged.forward(x, offsets, counts), d_out, gradients);
        const auto loss = [&] { return inner(d_out, ragged(x, offsets, counts)); };
        CHECK(gradient_error(d_x, finite_differences(policy, x, loss)) <= gradient_tolerance);
        check_parameter_gradients(policy, module, gradients, loss);
    };
    check(std::type_identity<Block<double, config>::FeedForward>(), {.num_heavy_tokens = TokenRatio{0.5}});
    check(std::type_identity<Block<double, config>::Attention>(),
          {.num_heavy_tokens_q = 3, .num_heavy_tokens_kv = [](Index n) { return (n + 1) / 2; }});

    constexpr CrossAttentionConfig cross_soft = [] {
        CrossAttentionConfig soft = cross_config;
        soft.router_kwargs.coor_descent = {.n_iters = 20, .score_scale = 0.3};
        return soft;
    }();
    Cross<double, cross_soft> cross(policy, Seed{1});
    const Ragged ragged(cross);
    const Lengths offsets = cumulative_lengths(Lengths{3, 0, 9, 9}), context_lengths{5, 4, 12, 12};
    auto x = normal<double>(policy, std::array{offsets.back(), dim}, 0);
    auto context = normal<double>(policy, std::array{Index{4}, Index{12}, dim}, 2);
    const auto d_out = normal<double>(policy, x.shape(), 1);
    const CountsByLength<CrossAttentionCounts> counts{2, TokenRatio{0.5}};
    auto gradients = cross.make_gradients();
    const auto d = ragged.backward(ragged.forward(x, offsets, context, context_lengths, counts), d_out, gradients);
    const auto loss = [&] { return inner(d_out, ragged(x, offsets, context, context_lengths, counts)); };
    CHECK(gradient_error(d.d_x, finite_differences(policy, x, loss)) <= gradient_tolerance);
    CHECK(gradient_error(d.d_context, finite_differences(policy, context, loss)) <= gradient_tolerance);
    check_parameter_gradients(policy, cross, gradients, loss);
}

TEST_CASE("ragged: sequences of one length are one batch, with its noise and its gradients of parameters") {
    const Cpu policy(2);
    const SinkhornBlock<float> module(policy, Seed{1}), other(policy, Seed{1});
    const Ragged ragged(module);
    const auto x = normal<float>(policy, std::array<Index, 3>{3, 40, dim}, 0),
               d_out = normal<float>(policy, x.shape(), 1);
    const auto rows = x.const_view().rows(), d_rows = d_out.const_view().rows();
    for (int step = 0; step < 2; ++step) {
        const auto expected = other.forward(x);
        auto gradients = module.make_gradients(), expected_gradients = other.make_gradients();
        const auto expected_d = other.backward(expected, d_out, expected_gradients);
        if (step == 0) {
            const auto saved = ragged.forward(rows, Lengths{0, 40, 80, 120});
            CHECK(saved.calls.size() == 1);
            CHECK(same_bits(saved.out.const_view().reshape(x.shape()), expected.out));
            CHECK(same_bits(ragged.backward(saved, d_rows, gradients).const_view().reshape(x.shape()), expected_d));
        } else {
            const auto saved = ragged.forward(x, Lengths{40, 40, 40});
            CHECK(saved.calls.size() == 1);
            CHECK(same_bits(saved.out, expected.out));
            CHECK(same_bits(ragged.backward(saved, d_out, gradients), expected_d));
        }
        check_same_gradients<SinkhornBlock<float>>(gradients, expected_gradients);
    }
    // Sequences of different lengths draw noise as if the module were called for one after the other.
    const auto saved = ragged.forward(rows, Lengths{0, 50, 50, 120});
    CHECK(saved.calls.size() == 2);
    CHECK(same_bits(other.forward(packed_part(rows, 0, 50)).out, packed_part(saved.out, 0, 50)));
    CHECK(same_bits(other.forward(packed_part(rows, 50, 70)).out, packed_part(saved.out, 50, 70)));
    CHECK_FALSE(same_bits(ragged(rows, Lengths{0, 50, 50, 120}), saved.out));
}

TEST_CASE_TEMPLATE("ragged: one call for each length, wherever its sequences are", Module, DescentBlock<float>,
                   Block<double, of_later_versions>, Block<float, in_blocks>, DescentBlock<float>::Attention,
                   Experts<float>) {
    using T = ScalarOf<Module>;
    const Cpu policy(2);
    const Module module(policy, Seed{1});
    const Ragged ragged(module);
    const Lengths lengths{40, 17, 40, 0, 17, 3, 40, 40, 0, 17}, offsets = cumulative_lengths(lengths);
    const auto x = normal<T>(policy, std::array{offsets.back(), dim}, 0), d_out = normal<T>(policy, x.shape(), 1);
    auto saved = ragged.forward(x, offsets);
    CHECK(saved.calls.size() == 3);
    CHECK(same_bits(ragged(x, offsets), saved.out));
    auto gradients = module.make_gradients(), others = module.make_gradients(), sorted = module.make_gradients();
    const auto d_x = ragged.backward(saved, d_out, gradients);
    for (std::size_t i = 0; i < lengths.size(); ++i) {
        CAPTURE(i);
        const auto [call, sample] = saved.call_of(static_cast<Index>(i));
        REQUIRE((call != nullptr) == (lengths[i] > 0));
        if (call == nullptr) continue;
        CHECK(call->sequences.numbers[static_cast<std::size_t>(sample)] == static_cast<Index>(i));
        const auto of = [&](const auto& all) { return packed_part(all, offsets[i], lengths[i]); };
        const auto x_alone = support::copy_of(policy, of(x)), d_alone = support::copy_of(policy, of(d_out));
        const auto alone = module.forward(x_alone);
        CHECK(same_bits(alone.out, of(saved.out)));
        CHECK(same_bits(module.backward(alone, d_alone, others), of(d_x)));
    }
    // Gradients of parameters are those of the sequences sorted by length, which follow each other in memory.
    std::vector<std::size_t> order{0, 2, 6, 7, 1, 4, 9, 5};
    HostTensor<T, 2> sorted_x(policy, x.shape()), sorted_d(policy, x.shape());
    Lengths sorted_offsets{0};
    for (const std::size_t i : order) {
        const Index count = lengths[i] * dim;
        std::copy_n(x.data() + offsets[i] * dim, count, sorted_x.data() + sorted_offsets.back() * dim);
        std::copy_n(d_out.data() + offsets[i] * dim, count, sorted_d.data() + sorted_offsets.back() * dim);
        sorted_offsets.push_back(sorted_offsets.back() + lengths[i]);
    }
    const auto of_sorted = ragged.forward(sorted_x, sorted_offsets);
    CHECK(of_sorted.calls.size() == 3);
    ragged.backward(of_sorted, sorted_d, sorted);
    check_same_gradients<Module>(gradients, sorted);
    auto moved = module.make_gradients();
    CHECK(same_bits(ragged.backward(std::move(saved), d_out, moved), d_x));
    check_same_gradients<Module>(moved, gradients);
    CHECK_THROWS_WITH_AS(of_sorted.call_of(8), "colt5: `sequence` must be one of the batch, but is 8", ValueError);
}

TEST_CASE("ragged: cross attention makes one call for each pair of lengths") {
    const Cpu policy(2);
    const Cross<float> cross(policy, Seed{1});
    const Ragged ragged(cross);
    const Lengths lengths{30, 8, 30, 30, 8}, context_lengths{40, 12, 40, 7, 12};
    const auto offsets = cumulative_lengths(lengths), context_offsets = cumulative_lengths(context_lengths);
    const auto x = normal<float>(policy, std::array{offsets.back(), dim}, 0),
               d_out = normal<float>(policy, x.shape(), 1);
    const auto context = normal<float>(policy, std::array{context_offsets.back(), dim}, 2);
    auto saved = ragged.forward(x, offsets, context, context_offsets);
    CHECK(saved.calls.size() == 3);
    CHECK(same_bits(ragged(x, offsets, context, context_offsets), saved.out));
    auto gradients = cross.make_gradients(), others = cross.make_gradients();
    const auto d = ragged.backward(saved, d_out, gradients);
    for (std::size_t i = 0; i < lengths.size(); ++i) {
        CAPTURE(i);
        const auto of = [&](const auto& all) { return packed_part(all, offsets[i], lengths[i]); };
        const auto of_context = [&](const auto& all) {
            return packed_part(all, context_offsets[i], context_lengths[i]);
        };
        const auto alone = cross.forward(of(x), of_context(context));
        CHECK(same_bits(alone.out, of(saved.out)));
        const auto d_alone = cross.backward(alone, of(d_out), others);
        CHECK(same_bits(d_alone.d_x, of(d.d_x)));
        CHECK(same_bits(d_alone.d_context, of_context(d.d_context)));
    }
    auto moved = cross.make_gradients();
    CHECK(same_bits(ragged.backward(std::move(saved), d_out, moved).d_context, d.d_context));
    check_same_gradients<Cross<float>>(moved, gradients);
}

TEST_CASE("ragged: options behind the counts go to the module") {
    const Cpu policy(1);
    const DescentBlock<double>::Attention attention(policy, Seed{1});
    const Ragged ragged(attention);
    const auto x = normal<double>(policy, std::array<Index, 2>{60, dim}, 0),
               d_out = normal<double>(policy, x.shape(), 1);
    const Lengths offsets{0, 20, 60};
    const auto out = ragged(x, offsets, {.num_heavy_tokens_q = 5}, Residual::tokens);
    const auto saved = ragged.forward(x, offsets, {.num_heavy_tokens_q = 5}, Residual::tokens);
    CHECK(same_bits(saved.out, out));
    auto gradients = attention.make_gradients(), expected = attention.make_gradients();
    const auto d_x = ragged.backward(saved, d_out, gradients);
    for (const auto& [first, length] : {std::pair<Index, Index>{0, 20}, {20, 40}}) {
        const auto alone =
            attention.forward(packed_part(x, first, length), {}, {.num_heavy_tokens_q = 5}, Residual::tokens);
        CHECK(same_bits(alone.out, packed_part(out, first, length)));
        CHECK(same_bits(attention.backward(alone, packed_part(d_out, first, length), expected),
                        packed_part(d_x, first, length)));
    }
    check_same_gradients<DescentBlock<double>::Attention>(gradients, expected);
}

TEST_CASE("ragged: no sequences, or none that has a token") {
    const Cpu policy(1);
    const DescentBlock<float> module(policy, Seed{1});
    const Ragged ragged(module);
    auto gradients = module.make_gradients();
    const auto none = normal<float>(policy, std::array<Index, 2>{0, dim}, 0);
    for (const Lengths& offsets : {Lengths{0}, Lengths{0, 0, 0}}) {
        CHECK(ragged(none, offsets).shape() == none.shape());
        CHECK(ragged.backward(ragged.forward(none, offsets), none, gradients).shape() == none.shape());
    }
    const auto padding = filled<float>(policy, std::array<Index, 3>{2, 4, dim}, NAN);
    CHECK(all_zero(ragged(padding, Lengths{0, 0})));
    CHECK(all_zero(ragged.backward(ragged.forward(padding, Lengths{0, 0}), padding, gradients)));
    DescentBlock<float>::each_parameter([](const std::string&, const auto& gradient) { CHECK(all_zero(gradient)); }, "",
                                        gradients);
}

TEST_CASE("ragged: counts are as configured, a number, a ratio or any function of the length") {
    const CountsByLength<TransformerBlockCounts> counts{.num_heavy_attn_tokens_q = TokenRatio{1.0 / 16},
                                                        .num_heavy_attn_tokens_kv = [](Index n) { return n - 1; },
                                                        .num_heavy_ff_tokens = 7};
    CHECK(*counts(160).num_heavy_attn_tokens_q == 10);
    CHECK(*counts(175).num_heavy_attn_tokens_q == 10);
    CHECK(*counts(3).num_heavy_attn_tokens_q == 1);
    CHECK(*counts(160).num_heavy_attn_tokens_kv == 159);
    CHECK(*counts(160).num_heavy_ff_tokens == 7);
    CHECK_FALSE(CountsByLength<TransformerBlockCounts>()(160).num_heavy_ff_tokens);
    CHECK(TokenRatio{1}(5) == 5);
    CHECK_FALSE(TokenCount(3)("k", 0));
    CHECK_THROWS_WITH_AS(
        counts(1), "colt5: `num_heavy_attn_tokens_kv` must be >= 1 for a sequence of 1 tokens, but is 0", ValueError);
    CHECK_THROWS_WITH_AS(TokenRatio{0}(5), "colt5: `ratio` must be > 0 and <= 1, but is 0", ValueError);
    CHECK_THROWS_WITH_AS(TokenRatio{1.5}(5), "colt5: `ratio` must be > 0 and <= 1, but is 1.5", ValueError);

    const Cpu policy(1);
    const Block<float, of_paper> block(policy, Seed{1});
    const Ragged ragged(block);
    const Lengths offsets{0, 40, 200};
    const auto x = normal<float>(policy, std::array<Index, 2>{200, dim}, 0);
    const auto saved = ragged.forward(x, offsets, config::colt5_tokens);
    for (std::size_t i = 0; i < 2; ++i) {
        std::vector<Index> chosen;
        saved.calls[i].activations.each_routing(
            [&](const std::string&, const auto& routing) { chosen.push_back(routing.indices.extent(2)); });
        CHECK(chosen == (i == 0 ? Lengths{2, 2, 5} : Lengths{10, 10, 20}));  // feedforward, queries, keys
    }
}

TEST_CASE("ragged: wrong arguments are named") {
    const Cpu policy(1);
    const DescentBlock<float> module(policy, Seed{1});
    const Ragged ragged(module);
    const auto x = normal<float>(policy, std::array<Index, 2>{9, dim}, 0);
    const auto tokens = normal<float>(policy, std::array<Index, 3>{2, 9, dim}, 0);
    const auto check = [&](const auto& of, const Lengths& lengths, const char* message) {
        CHECK_THROWS_WITH_AS(ragged(of, lengths), message, ValueError);
        CHECK_THROWS_WITH_AS(ragged.forward(of, lengths), message, ValueError);
    };
    check(x, {}, "colt5: `cu_seqlens` must be one number more than there are sequences, but is empty");
    check(x, {1, 9}, "colt5: `cu_seqlens[0]` must be 0, but is 1");
    check(x, {0, 5, 4, 9}, "colt5: `cu_seqlens[2]` must be >= cu_seqlens[1] = 5, but is 4");
    check(x, {0, 5, 8}, "colt5: `cu_seqlens[2]` must be the number of tokens, 9, but is 8");
    check(x, {0, 5, 10}, "colt5: `cu_seqlens[2]` must be the number of tokens, 9, but is 10");
    check(tokens, {9}, "colt5: `lengths` must be one number a sequence, 2, but is 1");
    check(tokens, {9, -1}, "colt5: `lengths[1]` must be between 0 and the padded length, 9, but is -1");
    check(tokens, {10, 3}, "colt5: `lengths[0]` must be between 0 and the padded length, 9, but is 10");
    CHECK_THROWS_WITH_AS(ragged(x, Lengths{0, 9}, TransformerBlockCounts{.num_heavy_ff_tokens = 0}),
                         "colt5: `num_heavy_ff_tokens` must be >= 1, but is 0", ValueError);
    CHECK_THROWS_AS(ragged(normal<float>(policy, std::array<Index, 2>{9, dim + 1}, 0), Lengths{0, 9}), ShapeError);

    const Lengths offsets{0, 4, 9};
    auto gradients = module.make_gradients();
    auto saved = ragged.forward(x, offsets);
    CHECK_THROWS_WITH_AS(ragged.backward(saved, normal<float>(policy, std::array<Index, 2>{8, dim}, 0), gradients),
                         "colt5: `d_out` must have shape (9, 10), but has (8, 10)", ShapeError);
    CHECK_THROWS_WITH_AS(
        ragged.backward(std::move(saved), saved.out, gradients),
        "colt5: `d_out` must be another tensor than the output that is handed over, but is that output", ValueError);
    ragged.backward(std::move(saved), x, gradients);
    const auto used_up = [&](const auto& module_of, const char* message) {
        CHECK_THROWS_WITH_AS(Ragged(module_of).backward(saved, x, gradients), message, ValueError);
    };
    used_up(module,
            "colt5: `saved` must be what forward returned, but is used up: it was handed to backward, or moved from");
    ragged.forward_into(saved, x, offsets);
    const DescentBlock<float> other(policy, Seed{2});
    used_up(other, "colt5: `saved` must be of this module, but is of another one of its type");

    const Cross<float> cross(policy, Seed{1});
    const Ragged ragged_cross(cross);
    CHECK_THROWS_WITH_AS(ragged_cross(x, offsets, tokens, Lengths{9, 10}),
                         "colt5: `context_lengths[1]` must be between 0 and the padded length, 9, but is 10",
                         ValueError);
    CHECK_THROWS_WITH_AS(ragged_cross(x, offsets, x, Lengths{0, 9}),
                         "colt5: `context` must be of as many sequences as x, 2, but is 1", ValueError);
}

TEST_CASE("ragged: a count that is wrong for a later sequence is found before a router counts a call") {
    const Cpu policy(1);
    const SinkhornBlock<float> module(policy, Seed{1});
    const auto x = normal<float>(policy, std::array<Index, 2>{9, dim}, 0);
    CHECK_THROWS_AS(Ragged(module).forward(x, Lengths{0, 5, 9}, {.num_heavy_ff_tokens = [](Index n) { return n - 4; }}),
                    ValueError);
    CHECK(module.conditional_ff.router.noise.calls == 0);
    CHECK(module.conditional_attn.q_router.noise.calls == 0);
}

TEST_CASE("ragged: the workspace is that of the longest sequence, and activations add up") {
    const Cpu policy(1, Cpu::usual_plan, Allocations::together);
    const DescentBlock<float> module(policy, Seed{1});
    const Ragged ragged(module);
    const auto peak_of = [&](const auto& call) {
        policy.workspace()->reset_peak();
        const auto before = policy.workspace()->statistics().in_use;
        call();
        return policy.workspace()->statistics().peak - before;
    };
    const auto x = normal<float>(policy, std::array<Index, 2>{2000 + 1999 + 1998 + 1997, dim}, 0);
    const auto bytes = static_cast<std::size_t>(x.size()) * sizeof(float);
    const Lengths four{0, 2000, 3999, 5997, 7994};
    const auto longest = peak_of([&] { module(packed_part(x, 0, 2000)); });
    CHECK(peak_of([&] { ragged(x, four); }) <= longest + bytes + 4096);
    const auto saved = ragged.forward(x, four);
    const auto others = peak_of([&] { ragged.forward(x, four); });
    const auto in_two = peak_of([&] { ragged.forward(x.const_view().range(0, 3999), Lengths{0, 2000, 3999}); });
    CHECK(others <= 2 * in_two + 4096);
}
