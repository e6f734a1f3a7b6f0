// SPDX-License-Identifier: MIT
#include <colt5/module/encoder_decoder.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include <colt5/io/cache.hpp>

#include "io/temporary_folder.hpp"
#include "module/checks.hpp"
#include "module/decode.hpp"

using namespace colt5;
using namespace support;

namespace {

constexpr TransformerBlockConfig block_config = small_block(), dropped_config = small_block(0.2);
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

/// Ids [first[b], first[b] + count[b]) of each sequence, and 0 behind them.
HostTensor<TokenIndex, 2> ids_of(const Cpu& policy, const HostTensor<TokenIndex, 2>& all,
                                 const std::vector<Index>& first, const std::vector<Index>& count, Index width) {
    auto ids = filled<TokenIndex>(policy, std::array<Index, 2>{all.extent(0), width}, 0);
    for (std::size_t b = 0; b < count.size(); ++b) {
        const auto row = static_cast<Index>(b);
        std::copy_n(all.const_view()[row].data() + first[b], count[b], ids.view()[row].data());
    }
    return ids;
}

/// Decodes sequences to these lengths, `chunk` tokens of each at a time, or different numbers if it is 0. Returns
/// whether all logits are those of whole sequences, `expected`.
template <typename M, typename Logits>
bool decodes(const M& model, typename M::DecodeCache& cache, const HostTensor<TokenIndex, 2>& previous,
             const std::vector<Index>& lengths, Index chunk, const Logits& expected) {
    bool same = true;
    for (Index step = 0; cache.lengths() != lengths; ++step) {
        const std::vector<Index> past = cache.lengths();
        std::vector<Index> counts;
        for (std::size_t b = 0; b < past.size(); ++b)
            counts.push_back(
                std::min(chunk > 0 ? chunk : (step * step + 7 * static_cast<Index>(b)) % 31, lengths[b] - past[b]));
        const Index width = *std::max_element(counts.begin(), counts.end());
        const auto next = ids_of(model.policy(), previous, past, counts, width);
        const bool ragged = std::any_of(counts.begin(), counts.end(), [&](Index count) { return count != width; });
        const auto logits =
            model.decode(cache, next, ragged ? std::span<const Index>(counts) : std::span<const Index>());
        for (std::size_t b = 0; b < past.size(); ++b) {
            const auto row = static_cast<Index>(b);
            same = same && same_outputs(logits.const_view()[row].range(0, counts[b]),
                                        expected.const_view()[row].range(past[b], counts[b]));
        }
    }
    return same;
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

TEST_CASE("EncoderDecoder: a step that throws leaves the noise and the gradients as they were") {
    using Noisy = EncoderDecoder<Stack<ConditionalRoutedTransformerBlock<dropped_config, float, Cpu>, 2>, 2>;
    const Cpu policy(1);
    Noisy model(policy, vocabulary, decoder_config(0.3), Seed{4});
    const Noisy untouched(policy, vocabulary, decoder_config(0.3), Seed{4});
    const auto ids = distinct_ids(policy, 2, 11, 5), previous = distinct_ids(policy, 2, 6, 7),
               targets = distinct_ids(policy, 2, 6, 9), more = distinct_ids(policy, 3, 6, 7);
    auto unknown = distinct_ids(policy, 2, 6, 7);
    unknown.data()[11] = vocabulary;
    const auto d_losses = normal<float>(policy, targets.shape(), 1), d_more = normal<float>(policy, more.shape(), 1);
    auto gradients = model.make_gradients(), expected = model.make_gradients();
    const auto before = noise_state(model);
    CHECK(before.size() == 20);
    const auto throws = [&](const auto& call, const char* message) {
        CHECK_THROWS_WITH_AS(call(), message, Error);
        CHECK(noise_state(model) == before);
    };
    const auto step = [&](const auto& of_previous, const auto& of_targets, const auto& d) {
        return model.add_gradients(ids, of_previous, of_targets, d, gradients);
    };
    throws([&] { step(unknown, targets, d_losses); }, "colt5: `previous` must be in a vocabulary of 23, but is 23");
    throws([&] { step(previous, unknown, d_losses); },
           "colt5: `targets` must be below the number of classes, 23, but is 23");
    throws([&] { step(more, more, d_more); }, "colt5: `previous` must have shape (2, any), but has (3, 6)");
    const auto with_wrong = [&](auto& parameter, const char* message) {
        auto kept = std::move(parameter);
        auto shape = kept.shape();
        ++shape[0];
        parameter = filled<float>(policy, shape, 1);
        auto of_wrong = model.make_gradients();
        throws([&] { model.add_gradients(ids, previous, targets, d_losses, of_wrong); }, message);
        parameter = std::move(kept);
    };
    with_wrong(model.encoder_norm.gamma, "colt5: `encoder_norm.gamma` must have shape (6), but has (7)");
    with_wrong(model.decoder[1].self_attn.to_q.weight,
               "colt5: `decoder.1.self_attn.to_q.weight` must have shape (12, 6), but has (13, 6)");
    with_wrong(model.decoder[1].cross_attn.to_kv.weight,
               "colt5: `decoder.1.cross_attn.to_kv.weight` must have shape (8, 6), but has (9, 6)");
    with_wrong(model.decoder[1].ff.wo.weight,
               "colt5: `decoder.1.ff.wo.weight` must have shape (6, 10), but has (7, 10)");
    with_wrong(model.head.norm.gamma, "colt5: `head.norm.gamma` must have shape (6), but has (7)");
    CHECK(same_bits(step(previous, targets, d_losses),
                    untouched.add_gradients(ids, previous, targets, d_losses, expected)));
    Noisy::each_parameter([&](const std::string&, const auto& a, const auto& b) { CHECK(same_bits(a, b)); }, "",
                          gradients, expected);
}

TEST_CASE("EncoderDecoder: the decoder has the dim of the encoder") {
    const Cpu policy(1);
    auto config = decoder_config();
    config.dim = 8;
    CHECK_THROWS_WITH_AS(Model<float>(policy, vocabulary, config),
                         "colt5: `dim` must be that of the encoder, 6, but is 8", ValueError);
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

TEST_CASE_TEMPLATE("EncoderDecoder: decode gives the logits of whole sequences, bit for bit", T, float, double) {
    const Cpu policy(2, Cpu::usual_plan, Allocations::together);
    const Model<T> model(policy, vocabulary, decoder_config(), Seed{4});
    constexpr Index longest = 300;  // tokens: more than a tile of queries, or of keys
    const auto ids = distinct_ids(policy, 3, 11, 5), previous = distinct_ids(policy, 3, longest, 7);
    const auto mask = mask_of_lengths(policy, {11, 8, 3}, 11);
    const std::vector<Index> lengths{longest, 120, 257};
    for (const bool masked : {true, false}) {
        const Mask of_context = masked ? Mask(mask) : Mask();
        const auto context = model.encode(ids, of_context);
        const auto expected = model.logits(context, of_context, previous);
        for (const Index chunk : {1, 16, 100, 0}) {
            CAPTURE(chunk);
            if (chunk == 1 && !masked) continue;
            auto cache = model.make_cache(context, of_context, longest);
            CHECK(decodes(model, cache, previous, lengths, chunk, expected));
        }
    }
    // A sequence alone, on a policy with other chunks and another number of threads.
    const Cpu other(1, {64, true});
    const Model<T> same(other, vocabulary, decoder_config(), Seed{4});
    HostTensor<TokenIndex, 2> input(other, {1, 11}), output(other, {1, longest});
    std::copy_n(ids.const_view()[1].data(), 11, input.data());
    std::copy_n(previous.const_view()[1].data(), longest, output.data());
    const auto of_input = mask_of_lengths(other, {8}, 11);
    auto cache = same.make_cache(same.encode(input, of_input), of_input, 150);
    const auto whole = model.logits(model.encode(ids, mask), mask, previous);
    CHECK(decodes(same, cache, output, {120}, 3, sequence(whole, 1)));
}

TEST_CASE("EncoderDecoder: a cache is of the stated size, is saved and restored, and errors leave it as it was") {
    const TemporaryFolder folder;
    const Cpu policy(1, Cpu::usual_plan, Allocations::together);
    const Model<float> model(policy, vocabulary, decoder_config(), Seed{4});
    const auto ids = distinct_ids(policy, 2, 11, 5), previous = distinct_ids(policy, 2, 40, 7);
    const auto mask = mask_of_lengths(policy, {11, 8}, 11);
    const auto context = model.encode(ids, mask);
    const auto expected = model.logits(context, mask, previous);
    auto cache = model.make_cache(context, mask, 40);
    // Of two layers with 3 heads of 4: keys and values of 40 tokens, a factor and a position of each, the number of
    // them; one head for 11 tokens of the context, and their mask.
    CHECK(cache.bytes() == 2 * 2 * (40 * (2 * 3 * 4 * 4 + 4 + 4) + 4 + 2 * 11 * 4 * 4) + 2 * 11);
    CHECK(cache.bytes() == model.cache_bytes(2, 11, 40));

    const auto first = ids_of(policy, previous, {0, 0}, {7, 4}, 7);
    const std::vector<Index> lengths{7, 4};
    model.decode(cache, first, lengths);
    save_cache(policy, folder / "cache", cache);
    auto restored = model.make_cache(2, 11, 40);
    load_cache(policy, folder / "cache", restored);
    save_cache(policy, folder / "again", restored);
    CHECK(read_file(folder / "cache") == read_file(folder / "again"));

    const auto next = ids_of(policy, previous, lengths, {1, 1}, 1);
    const auto unchanged = [&](const auto& call, const std::string& message) {
        CHECK_THROWS_WITH_AS(call(), message.c_str(), Error);
        CHECK(cache.lengths() == lengths);
        CHECK(cache.is_whole());
    };
    unchanged([&] { model.decode(cache, previous); },
              "colt5: `length of sequence[0]` must be at most 40, for which the cache was made, but is 47");
    auto unknown = ids_of(policy, previous, {0, 0}, {1, 1}, 1);
    unknown.view()(1, 0) = vocabulary;
    unchanged([&] { model.decode(cache, unknown); }, "colt5: `ids` must be in a vocabulary of 23, but is 23");
    unchanged([&] { model.decode(cache, distinct_ids(policy, 3, 1, 7)); },
              "colt5: `previous` must have shape (2, any), but has (3, 1)");
    auto config = decoder_config();
    config.heads = 6;
    const Model<float> wider(policy, vocabulary, config, Seed{4});
    unchanged([&] { wider.decode(cache, next); },
              "colt5: `cache.decoder.0.self_attn.kv` must have shape (2, 1, 40, 48), but has (2, 1, 40, 24)");
    config.dim_head = 2;
    const Model<float> narrower(policy, vocabulary, config, Seed{4});
    unchanged([&] { narrower.decode(cache, next); },
              "colt5: `cache.decoder.0.cross_attn.kv` must have shape (2, 11, 4), but has (2, 11, 8)");
    const auto refused = [&](auto other, const char* message) {
        save_cache(policy, folder / "before", other);
        try {
            load_cache(policy, folder / "cache", other);
            FAIL("the cache of another configuration was loaded");
        } catch (const FileError& error) {
            CHECK(std::string(error.what()).find(message) != std::string::npos);
        }
        save_cache(policy, folder / "after", other);
        CHECK(read_file(folder / "before") == read_file(folder / "after"));
    };
    refused(model.make_cache(2, 12, 40),
            "tensor `state.decoder.0.cross_attn.kv` must have shape (2, 12, 8), but has (2, 11, 8)");
    refused(model.make_cache(2, 11, 41),
            "tensor `state.decoder.0.self_attn.kv` must have shape (2, 1, 41, 24), but has (2, 1, 40, 24)");
    refused(wider.make_cache(2, 11, 40),
            "tensor `state.decoder.0.self_attn.heads` must be 6 in this configuration, but is 3");
    refused(narrower.make_cache(2, 11, 40),
            "tensor `state.decoder.0.self_attn.heads` must be 6 in this configuration, but is 3");
    CHECK_THROWS_WITH_AS(model.make_cache(context, mask, 0), "colt5: `max_length` must be >= 1, but is 0", ValueError);
    CHECK_THROWS_WITH_AS(model.make_cache(context, mask_of_lengths(policy, {11, 8}, 12), 40),
                         "colt5: `mask` must have shape (2, 11), but has (2, 12)", ShapeError);

    CHECK(decodes(model, restored, previous, {40, 30}, 3, expected));
    CHECK(decodes(model, cache, previous, {12, 9}, 1, expected));
    const auto before = policy.workspace()->statistics().system_allocations;
    CHECK(decodes(model, cache, previous, {40, 37}, 1, expected));
    CHECK(policy.workspace()->statistics().system_allocations == before);
}
