// SPDX-License-Identifier: MIT
#include <colt5/colt5.hpp>
#include <colt5/io/cache.hpp>
#include <colt5/module/language_model.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <string>
#include <type_traits>
#include <vector>

#include "io/temporary_folder.hpp"
#include "module/decode.hpp"

using namespace colt5;
using namespace support;

namespace {

constexpr TransformerBlockConfig block{.dim = 12,
                                       .num_heavy_attn_tokens_q = 60,
                                       .num_heavy_attn_tokens_kv = 60,
                                       .num_heavy_ff_tokens = 60,
                                       .light_dim_head = 4,
                                       .light_heads = 2,
                                       .light_window_size = 16,
                                       .heavy_dim_head = 4,
                                       .heavy_heads = 2,
                                       .router_type = RouterType::causal,
                                       .router_kwargs = {.causal = {.rate = 0.3, .block_size = 16}},
                                       .use_null_kv = true,
                                       .rotary_emb = true};
using Model = Stack<ConditionalRoutedTransformerBlock<block, float, Cpu>, 2>;

template <TransformerBlockConfig config>
using Block = ConditionalRoutedTransformerBlock<config, float, Cpu>;
/// A configuration with another value of a field.
template <typename T>
constexpr TransformerBlockConfig with(T TransformerBlockConfig::*field, std::type_identity_t<T> value,
                                      TransformerBlockConfig config = block) {
    config.*field = value;
    return config;
}
// Settings of attention for which a cache has the same shapes as for `block`.
using Config = TransformerBlockConfig;
constexpr Config more_heads = with(&Config::heavy_dim_head, 2, with(&Config::heavy_heads, 4));
constexpr Config more_light_heads = with(&Config::light_dim_head, 2, with(&Config::light_heads, 4));
constexpr Config not_rotated = with(&Config::rotary_emb, false);
constexpr Config light_rotated = with(&Config::light_rotary_emb, true);
constexpr Config multiplied = with(&Config::multiply_keys_by_score, true);
constexpr Config shorter_window = with(&Config::light_window_size, 14);

/// Tokens [first, first + count) of each sequence.
TokensTensor<float, Cpu> part(const Cpu& policy, const TokensTensor<float, Cpu>& x, Index first, Index count) {
    TokensTensor<float, Cpu> to(policy, {x.extent(0), count, x.extent(2)});
    copy_tokens(policy, to.view(), 0, x, first, count);
    return to;
}

}  // namespace

TEST_CASE("save_cache, load_cache: decoding goes on as if it had not stopped, bit for bit") {
    const TemporaryFolder folder;
    const Cpu policy(2);
    const Model model(policy, Seed{1});
    const auto x = normal<float>(policy, std::array<Index, 3>{2, 300, 12}, 0);
    for (const Index stop : {1, 15, 64, 190}) {
        CAPTURE(stop);
        auto cache = model.make_cache(2, 300);
        model.decode(cache, part(policy, x, 0, stop), {stop, stop / 2});
        save_cache(policy, folder / "cache.safetensors", cache);
        auto restored = model.make_cache(2, 300);
        model.decode(restored, part(policy, x, 200, 70));  // replaced by what the file has
        load_cache(policy, folder / "cache.safetensors", restored);
        CHECK(restored.lengths() == cache.lengths());
        for (const Index count : {1, 40, 3}) {
            const auto tokens = part(policy, x, stop, count);
            CHECK(same_bits(model.decode(restored, tokens), model.decode(cache, tokens)));
        }
        save_cache(policy, folder / "a", cache);
        save_cache(policy, folder / "b", restored);
        CHECK(read_file(folder / "a") == read_file(folder / "b"));
    }
}

TEST_CASE("load_cache: a file that does not fit changes nothing, and the error names both values") {
    const TemporaryFolder folder;
    const Cpu policy(1);
    const Model model(policy, Seed{1});
    const auto x = normal<float>(policy, std::array<Index, 3>{2, 50, 12}, 0);
    const auto save = [&](const char* name, Index batch, Index max_length) {
        auto cache = model.make_cache(batch, max_length);
        save_cache(policy, folder / name, cache);
    };
    save("long", 2, 5000);
    save("longer", 2, 6000);
    save("more", 3, 5000);
    auto cache = model.make_cache(2, 5000);
    model.decode(cache, x);
    save_cache(policy, folder / "before", cache);
    const auto message = [&](const char* name) {
        try {
            load_cache(policy, folder / name, cache);
        } catch (const FileError& error) {
            return std::string(error.what());
        }
        return std::string();
    };
    const auto has = [](const std::string& text, const std::string& what) {
        INFO(text);
        CHECK(text.find(what) != std::string::npos);
        CHECK(std::count(text.begin(), text.end(), '\n') == 0);
    };
    has(message("longer"), "tensor `max_length` must be 5000, but is 6000");
    has(message("more"), "tensor `lengths` must have shape (2), but has (3)");
    has(message("missing"), "missing");
    {
        auto elsewhere = model.make_cache(2, 5000);
        ++elsewhere.state.layers[1].conditional_attn.light_attn.grid_of_queries;
        save_cache(policy, folder / "elsewhere", elsewhere);
        has(message("elsewhere"), "tensor `state.layers.1.conditional_attn.light_attn.grid_of_queries` must be " +
                                      std::to_string(LocalGridOf<Cpu, float>::of({8}).queries) +
                                      " on this backend and processor, but is ");
    }
    {
        auto other = model.make_cache(2, 5000);
        auto& settings = other.state.layers[0].conditional_ff.settings;
        --settings[0];
        save_cache(policy, folder / "fewer", other);
        has(message("fewer"), "num_tokens` must be 60 in this configuration, but is 59");
        ++settings[0];
        settings[4] /= 2;
        save_cache(policy, folder / "eps", other);
        has(message("eps"), "eps` must be 4294967296 in this configuration, but is 2147483648");
    }
    const auto save_with = [&](const char* name, const std::string& tensor, std::size_t at, TokenIndex number) {
        auto other = model.make_cache(2, 5000);
        std::remove_cvref_t<decltype(other.state)>::each_tensor(
            [&]<typename T>(const std::string& of, T& values) {
                using Number = typename T::value_type;
                if constexpr (std::integral<Number> && !std::same_as<Number, bool>)
                    if (of.ends_with(tensor)) values.data()[at] = number;
            },
            "", other.state);
        save_cache(policy, folder / name, other);
    };
    save_with("counts", ".counts", 0, -100);
    has(message("counts"), "counts` has the number -100, which must be from 0 to ");
    save_with("progress", ".progress", 0, 6000);
    has(message("progress"), "progress` has the number 6000, which must be from 0 to 5000 there");
    save_with("left", ".progress", 3, 1000000);
    has(message("left"), "progress` has the number 1000000, which must be from 0 to ");
    save_with("saved", ".progress", 1, -1);
    has(message("saved"), "progress` has the number -1, which must be from 0 to 9007199254740992 there");
    // What `tensor` has no elements of, or no dimensions.
    const auto save_as = [&](const char* name, const std::string& tensor, const std::vector<Index>& shape) {
        const SafetensorsFile good(folder / "long");
        std::vector<std::vector<std::byte>> bytes;
        std::vector<SafetensorsTensor> tensors;
        bytes.reserve(good.entries().size());
        for (const auto& [of, entry] : good.entries()) {
            bytes.push_back(good.read_bytes(of));
            const bool changes = of.ends_with(tensor);
            if (changes) bytes.back().resize(shape.empty() ? sizeof(TokenIndex) : 0);
            tensors.emplace_back(SafetensorsSpec{of, entry.dtype, changes ? shape : entry.shape}, bytes.back());
        }
        save_safetensors(folder / name, tensors);
    };
    save_as("no number", "grid_of_keys", {0});
    has(message("no number"), "grid_of_keys` must have shape (), but has (0)");
    save_as("no dimension", ".positions", {});
    has(message("no dimension"), "positions` must have shape (");
    save_cache(policy, folder / "after", cache);
    CHECK(read_file(folder / "before") == read_file(folder / "after"));
    CHECK(message("long").empty());
    CHECK(cache.lengths() == std::vector<Index>{0, 0});
}

TEST_CASE("load_cache: refuses a file of another configuration whose tensors have the same shapes") {
    const TemporaryFolder folder;
    const Cpu policy(1);
    const Block<block> model(policy, Seed{1});
    const auto x = normal<float>(policy, std::array<Index, 3>{2, 50, 12}, 0);
    auto cache = model.make_cache(2, 60);
    model.decode(cache, x);
    save_cache(policy, folder / "before", cache);
    const auto refused = [&](const std::string& what) {
        std::string text;
        try {
            load_cache(policy, folder / "other", cache);
        } catch (const FileError& error) {
            text = error.what();
        }
        INFO(text);
        CHECK(text.find("tensor `state.conditional_attn." + what) != std::string::npos);
        CHECK(std::count(text.begin(), text.end(), '\n') == 0);
        save_cache(policy, folder / "after", cache);
        CHECK(read_file(folder / "before") == read_file(folder / "after"));
    };
    const auto save = [&](const auto& other) {
        const auto of_other = other.make_cache(2, 60);
        CHECK(of_other.bytes() == cache.bytes());
        save_cache(policy, folder / "other", of_other);
    };
    save(Block<more_heads>(policy));
    refused("heavy_attn.heads` must be 2 in this configuration, but is 4");
    save(Block<more_light_heads>(policy));
    refused("light_attn.heads` must be 2 in this configuration, but is 4");
    save(Block<not_rotated>(policy));
    refused("heavy_attn.rotary_emb` must be 1 in this configuration, but is 0");
    save(Block<light_rotated>(policy));
    refused("light_attn.rotary_emb` must be 0 in this configuration, but is 1");
    save(Block<multiplied>(policy));
    refused("heavy_attn.multiply_keys_by_score` must be 0 in this configuration, but is 1");
    save(Block<shorter_window>(policy));
    refused("light_attn.reach` must be 8 in this configuration, but is 7");

    // A file of an earlier version, which did not have these numbers.
    const SafetensorsFile good(folder / "before");
    std::vector<std::vector<std::byte>> bytes;
    std::vector<SafetensorsTensor> tensors;
    bytes.reserve(good.entries().size());
    for (const auto& [of, entry] : good.entries()) {
        if (of.ends_with(".heads") || of.ends_with(".dim_head") || of.ends_with(".rotary_emb")) continue;
        bytes.push_back(good.read_bytes(of));
        tensors.emplace_back(SafetensorsSpec{of, entry.dtype, entry.shape}, bytes.back());
    }
    save_safetensors(folder / "other", tensors);
    refused("light_attn.heads` is missing");
}

TEST_CASE("LanguageModel: decode gives the logits of whole sequences") {
    const Cpu policy(2);
    const LanguageModel<Model> model(policy, {.vocabulary = 30, .dim = 12}, Seed{4});
    MatrixTensor<TokenIndex, Cpu> ids(policy, {2, 90});
    for (Index i = 0; i < ids.size(); ++i) ids.data()[i] = static_cast<TokenIndex>(i * i % 29);
    const auto expected = model.logits(ids);
    auto cache = model.make_cache(2, 90);
    for (Index first = 0, count; first < 90; first += count) {
        count = std::min(first % 7 + 1, 90 - first);
        MatrixTensor<TokenIndex, Cpu> next(policy, {2, count});
        for (Index b = 0; b < 2; ++b) std::copy_n(&ids.view()(b, first), count, &next.view()(b, 0));
        CHECK(same_outputs(model.decode(cache, next), part(policy, expected, first, count)));
    }
    // Errors leave the cache as it was.
    const std::vector<Index> full{90, 90};
    MatrixTensor<TokenIndex, Cpu> more(policy, {2, 1});
    fill(policy, more, 29);
    CHECK_THROWS_WITH_AS(model.decode(cache, more),
                         "colt5: `length of sequence[0]` must be at most 90, for which the cache was made, but is 91",
                         ValueError);
    fill(policy, more, 30);
    CHECK_THROWS_WITH_AS(model.decode(cache, more), "colt5: `ids` must be in a vocabulary of 30, but is 30",
                         ValueError);
    CHECK(cache.lengths() == full);
    CHECK(cache.is_whole());
}
