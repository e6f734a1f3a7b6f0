// SPDX-License-Identifier: MIT
#include <colt5/module/encoder_decoder.hpp>

#include <cmath>
#include <cstdint>
#include <set>
#include <string>

#include "module/checks.hpp"

using namespace colt5;
using namespace support;

namespace {

constexpr TransformerBlockConfig block_config = small_block();
template <typename T>
using Model = EncoderDecoder<Stack<ConditionalRoutedTransformerBlock<block_config, T, Cpu>, 2>, 2>;
static_assert(TrainableModule<Model<float>>);

constexpr Index vocabulary = 23;
DecoderConfig decoder_config(double dropout = 0) {
    return {.dim = 6,
            .heads = 3,
            .dim_head = 4,
            .dim_hidden = 10,
            .buckets = {.num_buckets = 8, .max_distance = 6},
            .dropout = dropout};
}

HostTensor<TokenIndex, 2> distinct_ids(const Cpu& policy, Index batch, Index length, Index factor) {
    HostTensor<TokenIndex, 2> ids(policy, {batch, length});
    for (Index i = 0; i < ids.size(); ++i) ids.data()[i] = static_cast<TokenIndex>(i * factor % vocabulary);
    return ids;
}

}  // namespace

TEST_CASE("MultiQueryAttention: against loops over heads and keys") {
    const Cpu policy(2);
    SeedSequence seeds{Seed{1}};
    const MultiQueryAttention<double, Cpu> attention(policy, seeds, 6, 3, 4);
    const auto x = normal<double>(policy, std::array<Index, 3>{2, 7, 6}, 0);
    const auto context = normal<double>(policy, std::array<Index, 3>{2, 9, 6}, 1);
    const auto mask = mask_of_lengths(policy, {9, 5}, 9);
    const auto saved = attention.forward(policy, x, context, mask);
    for (Index b = 0; b < 2; ++b)
        for (Index i = 0; i < 7; ++i) {
            const Row q = evaluate(attention.to_q, evaluate(attention.norm, row_of(x, b, i)));
            std::vector<Row> keys, values;
            for (Index j = 0; j < (b == 0 ? 9 : 5); ++j) {
                const Row kv = evaluate(attention.to_kv, row_of(context, b, j));
                keys.push_back(part(kv, 0, 4));
                values.push_back(part(kv, 4, 4));
            }
            Row heads;
            for (Index h = 0; h < 3; ++h)
                for (const double value : attend(part(q, 4 * h, 4), keys, values, Row(keys.size(), 1)))
                    heads.push_back(value);
            const Row expected = evaluate(attention.to_out, heads);
            for (std::size_t j = 0; j < 6; ++j)
                CHECK(saved.out.const_view()(b, i, static_cast<Index>(j)) ==
                      doctest::Approx(expected[j]).epsilon(1e-12));
        }
}

TEST_CASE_TEMPLATE("DecoderLayer: causal, and the sum of its parts", T, float, double) {
    const Cpu policy(2);
    SeedSequence seeds{Seed{1}};
    const DecoderLayer<T, Cpu> layer(policy, seeds, decoder_config());
    auto x = normal<T>(policy, std::array<Index, 3>{2, 12, 6}, 0);
    const auto context = normal<T>(policy, std::array<Index, 3>{2, 9, 6}, 1);
    const auto mask = mask_of_lengths(policy, {9, 5}, 9);
    const auto before = layer.forward(policy, x, context, mask, false);
    for (Index j = 0; j < 6; ++j) x.view()(0, 7, j) += T(1);
    const auto after = layer.forward(policy, x, context, mask, true);
    for (Index i = 0; i < 12; ++i) {
        bool same = true;
        for (Index j = 0; j < 6; ++j)
            same = same && after.out.const_view()(0, i, j) == before.out.const_view()(0, i, j);
        CHECK(same == (i < 7));
    }
    CHECK(same_bits(sequence(after.out, 1), sequence(before.out, 1)));

    // The first token attends to itself alone.
    const auto& attention = layer.self_attn;
    const auto kv = attention.to_kv(policy, attention.norm(policy, x));  // (b, n, h · 2 · dim_head)
    HostTensor<T, 3> value(policy, {2, 1, 12});
    for (Index b = 0; b < 2; ++b)
        for (Index h = 0; h < 3; ++h)
            for (Index e = 0; e < 4; ++e) value.view()(b, 0, 4 * h + e) = kv.const_view()(b, 0, 8 * h + 4 + e);
    const auto attended = attention.to_out(policy, value);
    for (Index b = 0; b < 2; ++b)
        for (Index j = 0; j < 6; ++j)
            CHECK(after.self_attn.out.const_view()(b, 0, j) ==
                  doctest::Approx(static_cast<double>(attended.const_view()(b, 0, j) + x.const_view()(b, 0, j)))
                      .epsilon(std::is_same_v<T, double> ? 1e-12 : 1e-5));
}

TEST_CASE("EncoderDecoder: gradients by finite differences, with and without dropout and mask" * not_sanitized) {
    const Cpu policy(1);
    for (const bool drops : {false, true}) {
        Model<double> model(policy, vocabulary, decoder_config(drops ? 0.3 : 0), Seed{4});
        const auto ids = distinct_ids(policy, 2, 11, 5), previous = distinct_ids(policy, 2, 6, 7);
        auto targets = distinct_ids(policy, 2, 6, 9);
        targets.view()(1, 5) = -100;
        const auto mask = mask_of_lengths(policy, {11, 8}, 11);
        const auto d_losses = normal<double>(policy, targets.shape(), 1);
        const auto start = [&] {
            each_state<Model<double>>(
                [](const std::string& name, std::uint64_t& number) {
                    if (name.ends_with("calls")) number = 2;
                },
                "", model);
        };
        const auto loss = [&] {
            if (!drops) return inner(d_losses, model.losses(model.encode(ids, mask), mask, previous, targets));
            start();
            auto ignored = model.make_gradients();
            return inner(d_losses, model.add_gradients(ids, previous, targets, d_losses, ignored, mask));
        };
        start();
        auto gradients = model.make_gradients();
        const auto losses = model.add_gradients(ids, previous, targets, d_losses, gradients, mask);
        CHECK(losses.const_view()(1, 5) == 0);
        const auto evaluated = model.losses(model.encode(ids, mask), mask, previous, targets);
        CHECK(same_bits(losses, evaluated) == !drops);
        without_noise(model, [&] {
            auto ignored = model.make_gradients();
            CHECK(same_bits(model.add_gradients(ids, previous, targets, d_losses, ignored, mask), evaluated));
        });
        check_parameter_gradients(policy, model, gradients, loss);
    }
}

TEST_CASE("EncoderDecoder: a batch is its samples, padding reaches nothing, names are distinct") {
    const Cpu policy(2);
    const Model<float> model(policy, vocabulary, decoder_config(), Seed{4});
    auto ids = distinct_ids(policy, 2, 11, 5);
    const auto previous = distinct_ids(policy, 2, 6, 7);
    const auto mask = mask_of_lengths(policy, {11, 8}, 11);
    const auto logits = model.logits(model.encode(ids, mask), mask, previous);
    REQUIRE(logits.shape() == std::array<Index, 3>{2, 6, vocabulary});
    for (Index i = 8; i < 11; ++i) ids.view()(1, i) = 0;
    CHECK(same_bits(model.logits(model.encode(ids, mask), mask, previous), logits));
    for (Index b = 0; b < 2; ++b) {
        const auto row = [&](const auto& of) {
            using Element = std::remove_const_t<std::remove_reference_t<decltype(*of.data())>>;
            HostTensor<Element, 2> one(policy, {1, of.extent(1)});
            std::copy_n(of.data() + b * of.extent(1), of.extent(1), one.data());
            return one;
        };
        const auto of_mask = row(mask);
        CHECK(same_bits(model.logits(model.encode(row(ids), of_mask), of_mask, row(previous)), sequence(logits, b)));
    }
    std::set<std::string> names;
    Model<float>::each_parameter([&](const std::string& name, const auto&) { CHECK(names.insert(name).second); }, "",
                                 model);
    for (const char* name : {"embedding.weight", "encoder.layers.1.conditional_ff.router.routing_token",
                             "encoder_norm.gamma", "decoder.1.self_attn.relative_attention_bias.weight",
                             "decoder.0.cross_attn.to_kv.weight", "decoder.0.ff.wi_1.weight", "head.norm.gamma"})
        CHECK(names.contains(name));
    ids.view()(0, 0) = vocabulary;
    CHECK_THROWS_WITH_AS(model.encode(ids), "colt5: `ids` must be in a vocabulary of 23, but is 23", ValueError);
}
