// SPDX-License-Identifier: MIT
#include <colt5/io/routing_page.hpp>

#include <algorithm>
#include <sstream>
#include <string>
#include <vector>

#include <doctest/doctest.h>

#include <colt5/colt5.hpp>
#include <colt5/module/conditional_routed_image_attention.hpp>
#include <colt5/module/ragged.hpp>

#include "support/tensors.hpp"

using namespace colt5;
using namespace support;

namespace {

constexpr RoutedConfig experts_config{.dim = 8, .num_heavy_tokens = 4, .num_routes = 2};
using Experts = Routed<experts_config, float, Cpu, SizedFeedForward<8, 9, float, Cpu>>;

std::size_t count(const std::string& page, const std::string& text) {
    std::size_t found = 0;
    for (auto at = page.find(text); at != std::string::npos; at = page.find(text, at + 1)) ++found;
    return found;
}

}  // namespace

TEST_CASE("routing_panels: the scores of each route, where its tokens are") {
    const Cpu policy(1);
    const Experts experts(policy, Seed{1});
    const auto x = normal<float>(policy, std::array<Index, 3>{2, 12, 8}, 0);
    const auto saved = experts.forward(x);
    const auto panels = routing_panels(policy, saved, 1, 12);
    REQUIRE(panels.size() == 2);
    CHECK(panels[0].title == "router, route 1");
    CHECK(panels[1].title == "router, route 2");
    for (std::size_t r = 0; r < 2; ++r) {
        std::vector<double> expected(12, 0.0);
        for (Index i = 0; i < 4; ++i)
            expected[static_cast<std::size_t>(saved.routed.routing.indices.const_view()(1, static_cast<Index>(r), i))] =
                1;
        CHECK(panels[r].scores == expected);
    }
    CHECK(routing_panels(policy, saved, 1, 13).empty());  // its router is of other tokens
    CHECK_THROWS_WITH_AS(routing_panels(policy, saved, 2, 12), "colt5: `sample` must be one of the batch, but is 2",
                         ValueError);
}

TEST_CASE("routing_panels: of activations without their output, and of a ragged batch") {
    const Cpu policy(1);
    const Experts experts(policy, Seed{1});
    const auto x = normal<float>(policy, std::array<Index, 3>{2, 12, 8}, 0);
    auto saved = experts.forward(x);
    const auto scores_of = [](const std::vector<RoutingPanel>& panels) {
        std::vector<std::vector<double>> scores;
        for (const auto& panel : panels) scores.push_back(panel.scores);
        return scores;
    };
    const auto expected = scores_of(routing_panels(policy, saved, 1, 12));
    REQUIRE(expected.size() == 2);
    saved.out = {};  // a caller may have moved it away
    CHECK(scores_of(routing_panels(policy, saved, 1, 12)) == expected);

    const Ragged ragged(experts);
    const auto tokens = normal<float>(policy, std::array<Index, 2>{29, 8}, 1);
    const std::vector<Index> offsets{0, 7, 17, 17, 24, 29};
    const auto of_ragged = ragged.forward(tokens, offsets);
    for (const Index i : {0, 1, 3, 4}) {
        CAPTURE(i);
        const auto at = static_cast<std::size_t>(i);
        const Index length = offsets[at + 1] - offsets[at];
        const TokensView<const float> alone(tokens.const_view()[offsets[at]].data(), {1, length, 8});
        CHECK(scores_of(routing_panels(policy, of_ragged, i, length)) ==
              scores_of(routing_panels(policy, experts.forward(alone), 0, length)));
    }
    CHECK(routing_panels(policy, of_ragged, 2, 0).empty());
    CHECK_THROWS_WITH_AS(routing_panels(policy, of_ragged, 5, 7),
                         "colt5: `sequence` must be one of the batch, but is 5", ValueError);
    std::vector<std::string> names;
    of_ragged.each_router([&](const std::string& name, const auto& view) {
        names.push_back(name);
        CHECK(view.indices.extent(0) == (names.size() == 1 ? 2 : 1));
    });
    CHECK(names == std::vector<std::string>{"calls.0.router", "calls.1.router", "calls.2.router"});
    std::ostringstream page;
    write_routing_page(page, policy, of_ragged, "abcdefg", 3);
    CHECK(count(page.str(), "<div class=\"panel\"") == 2);
    CHECK_THROWS_WITH_AS(write_routing_page(page, policy, of_ragged, "abc", 3),
                         "colt5: `picture` must be of as many tokens as the sample, 7, but is 3", ValueError);
}

TEST_CASE("write_routing_page: text, with its routed bytes shaded") {
    const Cpu policy(1);
    const Experts experts(policy, Seed{1});
    const auto x = normal<float>(policy, std::array<Index, 3>{1, 12, 8}, 0);
    const auto saved = experts.forward(x);
    std::ostringstream out;
    write_routing_page(out, policy, saved, "a<b>&\n\xC3 wxyz");
    const std::string page = out.str();
    CHECK(page.starts_with("<!DOCTYPE html>"));
    CHECK(page.ends_with("</body></html>\n"));
    CHECK(count(page, "<div class=\"panel\"") == 2);
    CHECK(count(page, "<s style=\"--a:0.90\">") == 8);  // four tokens of score 1 in each
    CHECK(count(page, "</s>") == 8);
    for (const char* const shown : {"&lt;", "&gt;", "&amp;", "<i>↵</i>", "<i>·</i>"}) CHECK(count(page, shown) == 2);

    const std::vector<std::string> words(12, "word ");
    std::ostringstream of_words;
    write_routing_page(of_words, policy, saved, words);
    CHECK(count(of_words.str(), "word ") == 24);
    CHECK(count(of_words.str(), ">word </s>") == 8);
    const std::vector<std::string> few(3, "word ");
    std::ostringstream nothing;
    const char* const other_length = "colt5: `picture` must be of as many tokens as the sample, 12, but is 3";
    CHECK_THROWS_WITH_AS(write_routing_page(nothing, policy, saved, few), other_length, ValueError);
    CHECK_THROWS_WITH_AS(write_routing_page(nothing, policy, saved, "abc"), other_length, ValueError);
    CHECK(nothing.str().empty());
    CHECK_THROWS_AS(write_panel(nothing, RoutingPanel{"router", {0, 1}}, few), ValueError);
}

TEST_CASE("write_panel: an image as a bitmap within the page") {
    const std::vector<std::uint8_t> rgb{10, 20, 30, 40, 50, 60};
    std::ostringstream out;
    write_panel(out, RoutingPanel{"q_router", {0, 1}}, RoutedImage{1, 2, rgb});
    const std::string page = out.str();
    const std::string marker = "base64,";
    const auto begin = page.find(marker) + marker.size(), end = page.find('"', begin);
    const std::string base64 = page.substr(begin, end - begin);
    std::vector<std::uint8_t> bytes;
    std::uint32_t bits = 0;
    int held = 0;
    for (const char c : base64) {
        if (c == '=') break;
        const std::string digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        bits = bits << 6 | static_cast<std::uint32_t>(digits.find(c));
        held += 6;
        if (held >= 8) {
            held -= 8;
            bytes.push_back(static_cast<std::uint8_t>(bits >> held));
        }
    }
    REQUIRE(bytes.size() == 54 + 8);  // rows are of a multiple of four bytes
    CHECK(base64.size() % 4 == 0);
    CHECK((bytes[0] == 'B' && bytes[1] == 'M'));
    CHECK((bytes[2] == 62 && bytes[10] == 54 && bytes[18] == 2 && bytes[22] == 1 && bytes[28] == 24));
    const std::vector<int> pixels(bytes.begin() + 54, bytes.end());
    // Blue, green, red: half as bright, and for the chosen one a tenth of that and nine tenths of (242, 153, 0).
    CHECK(pixels == std::vector<int>{15, 10, 5, 3, 140, 220, 0, 0});
    CHECK_THROWS_AS(write_panel(out, RoutingPanel{"q_router", {0, 1}}, RoutedImage{2, 2, rgb}), ValueError);
    CHECK_THROWS_AS(write_panel(out, RoutingPanel{"q_router", {0, 1}}, RoutedImage{2, 1, {rgb.data(), 3}}), ValueError);
}

TEST_CASE("routing_panels: tokens of windows are put back into their map") {
    static constexpr ImageAttentionConfig config{.dim = 8,
                                                 .num_heavy_tokens_q = 6,
                                                 .num_heavy_tokens_kv = 5,
                                                 .light_dim_head = 4,
                                                 .light_heads = 1,
                                                 .light_window_size = 4,
                                                 .heavy_dim_head = 4,
                                                 .heavy_heads = 1};
    const Cpu policy(1);
    const auto check = [&](const auto& attention) {
        const auto maps = normal<float>(policy, std::array<Index, 4>{2, 6, 7, 8}, 0);
        const auto saved = attention.forward(maps);
        const auto panels = routing_panels(policy, saved, 1, 42, 7);
        REQUIRE(panels.size() == 2);
        CHECK(panels[0].title == "q_router");
        const std::vector<std::uint8_t> rgb(3 * 42, 100);
        std::ostringstream page;
        CHECK_THROWS_WITH_AS(write_routing_page(page, policy, saved, RoutedImage{7, 6, rgb}),
                             "colt5: `width` must be that of the maps, 7, but is 6", ValueError);
        CHECK_THROWS_WITH_AS(write_routing_page(page, policy, saved, RoutedImage{5, 7, rgb}),
                             "colt5: `length` must be the number of tokens of a map, 42, but is 35", ValueError);
        CHECK_THROWS_WITH_AS(routing_panels(policy, saved, 2, 42, 7),
                             "colt5: `sample` must be one of the batch, but is 2", ValueError);
        CHECK(page.str().empty());
        write_routing_page(page, policy, saved, RoutedImage{6, 7, rgb}, 1);
        CHECK(count(page.str(), "<img") == 2);
        std::size_t at = 0;
        saved.each_routing([&](const std::string&, const auto& routing) {
            std::vector<double> expected(42, 0.0);
            const Index rows = routing.indices.extent(0) / 2;
            for (Index row = rows; row < 2 * rows; ++row)
                for (Index i = 0; i < routing.indices.extent(2); ++i) {
                    const auto [y, x] = saved.position(row, routing.indices.const_view()(row, 0, i));
                    if (y < 6 && x < 7)
                        expected[static_cast<std::size_t>(y * 7 + x)] = routing.scores.const_view()(row, 0, i);
                }
            CHECK(panels[at++].scores == expected);
        });
    };
    check(ConditionalRoutedImageAttention<config, float, Cpu>(policy, Seed{1}));
    static constexpr ImageAttentionConfig per_window = [] {
        ImageAttentionConfig windows = config;
        windows.routing_scope = RoutingScope::window;
        return windows;
    }();
    check(ConditionalRoutedImageAttention<per_window, float, Cpu>(policy, Seed{1}));
}
