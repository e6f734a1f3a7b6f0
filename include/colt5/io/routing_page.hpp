// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <ostream>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include <colt5/core/error.hpp>
#include <colt5/core/tensor.hpp>
#include <colt5/router/router_view.hpp>

/// A picture of what the routers of a forward pass have chosen, as an HTML file that needs no other.
namespace colt5 {

/// One route of one router, for one sample.
struct RoutingPanel {
    std::string title;           // the router's name, and the route if there are several
    std::vector<double> scores;  // of each token; 0 where it is not chosen
};

/// An image of one pixel for each token: red, green and blue of each pixel, row by row.
struct RoutedImage {
    Index height, width;
    std::span<const std::uint8_t> rgb;
};

namespace detail {

inline std::string two_decimals(double value) {
    std::array<char, 16> text{};
    std::snprintf(text.data(), text.size(), "%.2f", value);
    return text.data();
}

/// How strongly a chosen token is colored.
inline double strength(double score) {
    return 0.15 + 0.75 * std::clamp(score, 0.0, 1.0);
}

inline constexpr std::array<std::array<int, 3>, 6> panel_colors{
    {{242, 153, 0}, {18, 181, 203}, {161, 66, 244}, {24, 128, 56}, {217, 48, 37}, {26, 115, 232}}};

inline void write_base64(std::ostream& out, std::string_view bytes) {
    constexpr std::string_view digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    for (std::size_t i = 0; i < bytes.size(); i += 3) {
        std::uint32_t group = 0;
        const std::size_t count = std::min<std::size_t>(3, bytes.size() - i);
        for (std::size_t j = 0; j < 3; ++j)
            group = group << 8 | (j < count ? static_cast<unsigned char>(bytes[i + j]) : std::uint32_t{0});
        for (std::size_t j = 0; j < 4; ++j) out << (j <= count ? digits[group >> (18 - 6 * j) & 63] : '=');
    }
}

/// A bitmap file of 24 bits a pixel.
inline std::string bitmap(Index height, Index width, std::span<const std::uint8_t> rgb) {
    const Index row = (3 * width + 3) / 4 * 4;
    std::string file = "BM";
    const auto number = [&](Index value, int bytes) {
        for (int i = 0; i < bytes; ++i) file += static_cast<char>(value >> (8 * i) & 0xFF);
    };
    for (const Index field : {54 + row * height, Index{0}, Index{54}, Index{40}, width, height}) number(field, 4);
    number(1, 2);
    number(24, 2);
    for (const Index field : {Index{0}, row * height, Index{2835}, Index{2835}, Index{0}, Index{0}}) number(field, 4);
    for (Index y = height - 1; y >= 0; --y) {
        for (Index x = 0; x < width; ++x)
            for (const Index c : {2, 1, 0})
                file += static_cast<char>(rgb[static_cast<std::size_t>((y * width + x) * 3 + c)]);
        file.append(static_cast<std::size_t>(row - 3 * width), '\0');
    }
    return file;
}

/// Throws ValueError if no router of a sample is one of `length` tokens.
template <typename Activations>
void expect_routed_tokens(const Activations& saved, [[maybe_unused]] Index sample, Index length) {
    if constexpr (requires { saved.call_of(sample); }) {
        const auto* const call = saved.call_of(sample).first;
        if (call != nullptr) expect_routed_tokens(call->activations, 0, length);
    } else if constexpr (!requires { saved.grid; }) {
        Index other = length;
        bool fits = false;
        saved.each_router([&](const std::string&, const auto& view) {
            if (view.logits) other = view.logits.extent(2);
            fits = fits || !view.logits || other == length;
        });
        expect_value(fits || other == length, "picture", "of as many tokens as the sample, " + value_string(other),
                     length);
    }
}

}  // namespace detail

/// What goes into the <style> of a page with panels.
inline constexpr std::string_view routing_panel_style = R"(
.grid { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 20px 22px; margin-top: 12px }
.panel h3 { font-size: 14px; margin: 0 0 4px }
.panel pre { margin: 0; padding: 9px 10px; border: 1px solid #e8eaed; border-radius: 6px; color: #9aa0a6; overflow-x: auto;
             font: 10.4px/1.52 "DejaVu Sans Mono", Menlo, Consolas, monospace }
.panel p { font-size: 12.5px; margin: 5px 0 0; color: #5f6368 }
.panel img { width: 100%; image-rendering: pixelated }
pre i { font-style: normal; color: #dadce0 }
pre s { text-decoration: none; color: #202124; border-radius: 2px; background: rgb(var(--c) / var(--a)) }
@media (max-width: 960px) { .grid { grid-template: none / minmax(0, 1fr); grid-auto-flow: row } }
)";

/// Text in UTF-8 as HTML. A line's end is shown; control characters, and bytes that are no character alone, are dots.
inline std::string html_of(std::string_view text) {
    std::string html;
    for (const char c : text) {
        const auto code = static_cast<unsigned char>(c);
        if (c == '<')
            html += "&lt;";
        else if (c == '>')
            html += "&gt;";
        else if (c == '&')
            html += "&amp;";
        else if (c == '\n')
            html += "<i>↵</i>";
        else if (code < 0x20 || code == 0x7F || (code > 0x7F && text.size() == 1))
            html += "<i>·</i>";
        else
            html += c;
    }
    return html;
}

/// What the routers of a forward pass have chosen of one sample of `length` tokens: `saved` is what forward of a module
/// returned, or of Ragged; `sample` is then the number of a sequence. Routers whose logits are of another length, such
/// as that of a context, are left out. Tokens of maps come row by row, `width` a row. Waits for the policy. Throws
/// ValueError if there is no such sample, and if maps have another width or number of tokens.
template <Policy P, typename Activations>
std::vector<RoutingPanel> routing_panels(const P& policy, const Activations& saved, Index sample, Index length,
                                         [[maybe_unused]] Index width = 0) {
    constexpr bool of_map = requires {
        saved.grid.position(Index{});
    };  // as a sequence of windows
    std::vector<RoutingPanel> panels;
    if constexpr (requires { saved.call_of(sample); }) {
        const auto [call, place] = saved.call_of(sample);
        return call == nullptr ? panels : routing_panels(policy, call->activations, place, length);
    }
    if constexpr (of_map) {
        expect_value(width == saved.grid.width, "width", "that of the maps, " + value_string(saved.grid.width), width);
        const Index pixels = saved.grid.height * saved.grid.width;
        expect_value(length == pixels, "length", "the number of tokens of a map, " + value_string(pixels), length);
    }
    saved.each_router([&](const std::string& name, const auto& view) {
        const Index rows = view.indices.extent(0), routes = view.indices.extent(1), picks = view.indices.extent(2);
        Index batch = rows;
        if constexpr (of_map) batch = saved.tokens.extent(0);
        expect_value(sample >= 0 && sample < batch, "sample", "one of the batch", sample);
        if (!of_map && view.logits && view.logits.extent(2) != length) return;
        const Index sequences = rows / batch;  // of a sample: one, or as many as there are windows
        const auto indices = to_host(policy, view.indices);
        const auto scores = to_host(policy, view.scores);
        for (Index r = 0; r < routes; ++r) {
            RoutingPanel panel{name, std::vector<double>(static_cast<std::size_t>(length), 0.0)};
            if (routes > 1) panel.title += ", route " + std::to_string(r + 1);
            for (Index row = sample * sequences; row < (sample + 1) * sequences; ++row)
                for (Index i = 0; i < picks; ++i) {
                    const auto at = static_cast<std::size_t>((row * routes + r) * picks + i);
                    Index token = indices[at];
                    if constexpr (of_map) {
                        token += (row - sample * sequences) * (saved.grid.tokens() / sequences);
                        if (!saved.grid.contains(saved.grid.position(token))) continue;  // padding
                        const auto [y, x] = saved.grid.position(token);
                        token = y * width + x;
                    }
                    if (!is_range_of(token, 1, length)) continue;
                    double& score = panel.scores[static_cast<std::size_t>(token)];
                    score = std::max(score, static_cast<double>(scores[at]));
                }
            panels.push_back(std::move(panel));
        }
    });
    return panels;
}

/// A panel as HTML: tokens as they are given, in HTML, so many a line, those that are chosen shaded by their score.
inline void write_panel(std::ostream& out, const RoutingPanel& panel, std::span<const std::string> tokens,
                        std::size_t color = 0, std::size_t tokens_per_line = 64, std::string_view caption = "") {
    expect_value(tokens.size() == panel.scores.size(), "tokens", "as many as the panel has scores",
                 static_cast<Index>(tokens.size()));
    const auto& [red, green, blue] = detail::panel_colors[color % detail::panel_colors.size()];
    out << "<div class=\"panel\" style=\"--c:" << red << ' ' << green << ' ' << blue << "\"><h3>"
        << html_of(panel.title) << "</h3><pre>";
    for (std::size_t i = 0; i < tokens.size(); ++i) {
        if (i > 0 && i % tokens_per_line == 0) out << '\n';
        if (panel.scores[i] > 0)
            out << "<s style=\"--a:" << detail::two_decimals(detail::strength(panel.scores[i])) << "\">" << tokens[i]
                << "</s>";
        else
            out << tokens[i];
    }
    out << "</pre>";
    if (!caption.empty()) out << "<p>" << caption << "</p>";
    out << "</div>\n";
}

/// The same of an image: half as bright where it is not chosen, and colored where it is.
inline void write_panel(std::ostream& out, const RoutingPanel& panel, const RoutedImage& image, std::size_t color = 0) {
    expect_value(
        image.height >= 1 && image.width >= 1 && image.height * image.width == static_cast<Index>(panel.scores.size()),
        "image", "of as many pixels as the panel has scores", image.height * image.width);
    expect_value(image.rgb.size() == 3 * panel.scores.size(), "image.rgb", "three numbers a pixel",
                 static_cast<Index>(image.rgb.size()));
    std::vector<std::uint8_t> pixels(image.rgb.size());
    for (std::size_t i = 0; i < pixels.size(); ++i) {
        const double score = panel.scores[i / 3], share = score > 0 ? detail::strength(score) : 0;
        const int shade = detail::panel_colors[color % detail::panel_colors.size()][i % 3];
        pixels[i] = static_cast<std::uint8_t>(std::lround((1 - share) * 0.5 * image.rgb[i] + share * shade));
    }
    out << "<div class=\"panel\"><h3>" << html_of(panel.title) << "</h3><img alt=\"\" src=\"data:image/bmp;base64,";
    detail::write_base64(out, detail::bitmap(image.height, image.width, pixels));
    out << "\"></div>\n";
}

/// A page with a panel for each route of each router, of one sample of a batch. `saved` is what forward of a module
/// or Ragged returned, `picture` the sample: a RoutedImage, or text of one byte for each token, or its tokens as HTML
/// (std::span<const std::string>). Throws ValueError if it has another number of tokens than the sample, or an image
/// another width than the maps.
template <Policy P, typename Activations, typename Picture>
void write_routing_page(std::ostream& out, const P& policy, const Activations& saved, const Picture& picture,
                        Index sample = 0) {
    const auto write = [&](const auto& tokens, Index length, Index width) {
        detail::expect_routed_tokens(saved, sample, length);
        const auto panels = routing_panels(policy, saved, sample, length, width);
        out << "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>routed tokens</title><style>"
            << "body { margin: 24px; font: 15px/1.5 system-ui, sans-serif }" << routing_panel_style
            << "</style></head><body><div class=\"grid\">\n";
        std::size_t color = 0;
        for (const RoutingPanel& panel : panels) write_panel(out, panel, tokens, color++);
        out << "</div></body></html>\n";
    };
    if constexpr (std::is_same_v<Picture, RoutedImage>) {
        write(picture, picture.height * picture.width, picture.width);
    } else if constexpr (std::is_convertible_v<const Picture&, std::string_view>) {
        std::vector<std::string> tokens;
        for (const char& byte : std::string_view(picture)) tokens.push_back(html_of({&byte, 1}));
        write(std::span<const std::string>(tokens), static_cast<Index>(tokens.size()), 0);
    } else {
        const std::span<const std::string> tokens(picture);
        write(tokens, static_cast<Index>(tokens.size()), 0);
    }
}

}  // namespace colt5
