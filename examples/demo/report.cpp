// SPDX-License-Identifier: MIT
#include "report.hpp"

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>

#include <colt5/io/routing_page.hpp>

#include "models.hpp"

namespace demo {
namespace {

/// printf into a string.
[[gnu::format(printf, 1, 2)]] std::string format(const char* pattern, ...) {
    std::va_list arguments, again;
    va_start(arguments, pattern);
    va_copy(again, arguments);
    std::string text(static_cast<std::size_t>(std::vsnprintf(nullptr, 0, pattern, arguments)), '\0');
    std::vsnprintf(text.data(), text.size() + 1, pattern, again);
    va_end(again);
    va_end(arguments);
    return text;
}

constexpr std::array<const char*, 3> model_colors{"#0b57d0", "#c5221f", "#80868b"};
constexpr double share_of_notes = static_cast<double>(notes * note_length) / static_cast<double>(full_length);

constexpr const char* style = R"(
body { margin: 0 auto; padding: 28px 32px 48px; max-width: 1500px; color: #202124; background: #fff;
       font: 15px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif }
h1 { font-size: 26px; margin: 0 0 6px } h2 { font-size: 19px; margin: 30px 0 4px } h3 { font-size: 14px; margin: 0 0 4px }
p { margin: 4px 0 12px; max-width: 980px; color: #3c4043 }
code { font-family: "DejaVu Sans Mono", Menlo, Consolas, monospace; font-size: 90%; background: #f1f3f4; padding: 1px 4px;
       border-radius: 3px }
.top { display: flex; flex-wrap: wrap; gap: 40px; align-items: center }
table { border-collapse: collapse } th { font-weight: 600; color: #5f6368; font-size: 13px }
th, td { padding: 7px 14px; text-align: right; border-bottom: 1px solid #e8eaed } th:first-child, td:first-child { text-align: left; padding-left: 0 }
.dot { display: inline-block; width: 11px; height: 11px; border-radius: 50%; margin-right: 9px }
pre b { color: #202124; border-bottom: 1.5px solid #202124 }
pre u { text-decoration: none; font-weight: 700; color: #188038 } pre u.wrong { color: #d93025 }
@media (max-width: 1400px) { .grid { grid-template: repeat(3, auto) / repeat(2, minmax(0, 1fr)); grid-auto-flow: column } }
@media (max-width: 960px) { .grid { grid-template: none / minmax(0, 1fr); grid-auto-flow: row } }
details summary { cursor: pointer; font-size: 19px; font-weight: 600; margin: 30px 0 4px }
)";

/// The document in lines of 64 bytes: routed bytes shaded by their score, notes and questions underlined, and in the
/// questions the digits that the model answers.
void write_panel(std::ostream& out, const Result& result, std::size_t layer, std::size_t kind) {
    const Batch& document = result.document;
    const Routed& routed = result.routed[layer][kind];
    std::vector<bool> marked(full_length, false);
    std::fill(marked.end() - notes * note_length, marked.end(), true);
    for (const Index begin : document.note_places)
        std::fill(marked.begin() + begin, marked.begin() + begin + note_length, true);

    std::vector<std::string> bytes;
    for (std::size_t i = 0; i < static_cast<std::size_t>(full_length); ++i) {
        const char byte = static_cast<char>(document.bytes[i]);
        std::string text = colt5::html_of({&byte, 1});
        const auto answer =
            std::find(document.answer_places.begin(), document.answer_places.end(), static_cast<Index>(i));
        if (answer != document.answer_places.end()) {
            const auto j = static_cast<std::size_t>(answer - document.answer_places.begin());
            const bool right = result.predicted[j] - '0' == document.answer_digits[j];
            text = std::string("<u") + (right ? ">" : " class=\"wrong\">") + result.predicted[j] + "</u>";
        }
        if (marked[i]) text = "<b>" + text + "</b>";
        bytes.push_back(std::move(text));
    }
    const colt5::RoutingPanel panel{format("layer %zu: %s", layer + 1, kind_names[kind]),
                                    std::vector<double>(routed.scores.begin(), routed.scores.end())};
    colt5::write_panel(
        out, panel, bytes, kind, 64,
        format("%.0f %% of the routed bytes in questions, %.0f %% in notes (by chance %.0f %% and %.0f %%)",
               100 * routed.in_questions, 100 * routed.in_notes, 100 * share_of_notes, 100 * share_of_notes));
}

void write_panels(std::ostream& out, const Result& result) {
    out << "<div class=\"grid\">\n";
    for (std::size_t layer = 0; layer < layers; ++layer)
        for (std::size_t kind = 0; kind < kind_names.size(); ++kind) write_panel(out, result, layer, kind);
    out << "</div>\n";
}

void write_curves(std::ostream& out, const std::vector<Result>& results) {
    constexpr double width = 560, height = 270, left = 46, right = 16, top = 14, bottom = 40;
    double last = 1, highest = std::log(10.0);
    for (const Result& result : results)
        for (const Point& point : result.curve) {
            last = std::max(last, point.step);
            highest = std::max(highest, std::min(point.loss, 3.0));
        }
    highest = std::ceil(2 * highest) / 2;
    const auto x = [&](double step) { return left + (width - left - right) * step / last; };
    const auto y = [&](double loss) {
        return height - bottom - (height - top - bottom) * std::min(loss, highest) / highest;
    };

    out << format("<svg width=\"%.0f\" height=\"%.0f\" font-size=\"12\" fill=\"#5f6368\">\n", width, height);
    for (double loss = 0; loss <= highest + 1e-9; loss += 0.5)
        out << format(
            "<path d=\"M%.1f %.1fH%.1f\" stroke=\"#e8eaed\"/><text x=\"%.1f\" y=\"%.1f\" "
            "text-anchor=\"end\">%.1f</text>\n",
            left, y(loss), width - right, left - 8, y(loss) + 4, loss);
    for (int i = 0; i <= 4; ++i)
        out << format("<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"middle\">%.0f</text>\n", x(last * i / 4),
                      height - bottom + 18, last * i / 4);
    out << format("<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"middle\">step</text>\n", x(last / 2), height - 4);
    out << format("<path d=\"M%.1f %.1fH%.1f\" stroke=\"#9aa0a6\" stroke-dasharray=\"3 4\"/>", left, y(std::log(10.0)),
                  width - right)
        << format("<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"end\">loss of a guess, ln 10</text>\n", width - right,
                  y(std::log(10.0)) + 16);
    for (std::size_t i = results.size(); i-- > 0;) {  // the first one on top
        out << "<path fill=\"none\" stroke-width=\"2\" stroke-linejoin=\"round\" stroke=\"" << model_colors[i]
            << "\" d=\"";
        const auto& curve = results[i].curve;
        const std::size_t stride = std::max<std::size_t>(1, curve.size() / 400);
        for (std::size_t j = 0; j < curve.size(); j += stride)
            out << (j == 0 ? 'M' : 'L') << format("%.1f %.1f", x(curve[j].step), y(curve[j].loss));
        out << "\"/>\n";
    }
    out << "</svg>\n";
}

void write_table(std::ostream& out, const std::vector<Result>& results) {
    out << "<table><tr><th>router</th><th>digits right</th><th>loss</th><th>heavy tokens</th><th>tokens/s, one "
           "core</th></tr>\n";
    for (std::size_t i = 0; i < results.size(); ++i) {
        const Result& result = results[i];
        out << "<tr><td><span class=\"dot\" style=\"background:" << model_colors[i] << "\"></span>" << result.name
            << format(
                   "</td><td><strong>%.1f %%</strong></td><td>%.3f</td><td>%.1f "
                   "%%</td><td>%.0f</td></tr>\n",
                   100 * result.accuracy, result.loss, 100 * result.heavy_share, result.tokens_per_second);
    }
    out << "</table>\n";
}

/// What to say of a training that was too short for the task, or nothing.
std::string too_short(const std::vector<Result>& results) {
    if (results.front().accuracy > 0.2) return {};
    return format(
        "%zu steps are too few: the learned router is still near a guess, as the others are. The task takes some "
        "hundred\nsteps; without --quick and --steps there are %td.",
        results.front().curve.size(), Settings().steps);
}

}  // namespace

void print_table(std::ostream& out, const std::vector<Result>& results) {
    out << format("\n%-17s %12s %8s %14s %20s\n", "on new documents", "digits right", "loss", "heavy tokens",
                  "tokens/s on a core");
    for (const Result& result : results)
        out << format("%-17s %10.1f %% %8.3f %12.1f %% %20.0f\n", result.name.c_str(), 100 * result.accuracy,
                      result.loss, 100 * result.heavy_share, result.tokens_per_second);
    out << format("%-17s %10.1f %% %8.3f\n", "a guess", 10.0, std::log(10.0));
    if (const std::string warning = too_short(results); !warning.empty()) out << '\n' << warning << "\n\n";
    out << "Random routing and light only are chance baselines that cannot solve the task by construction: chance "
           "seldom\n"
           "routes a digit's note and its question together, and the light branch does not see that far.\n\n";

    out << format(
        "Where the learned router sends the heavy branch (by chance: %.0f %% in questions, %.0f %% in notes)\n",
        100 * share_of_notes, 100 * share_of_notes);
    for (std::size_t layer = 0; layer < layers; ++layer)
        for (std::size_t kind = 0; kind < kind_names.size(); ++kind) {
            const Routed& routed = results.front().routed[layer][kind];
            out << format("  layer %zu, %-16s %4.0f %% in questions, %3.0f %% in notes\n", layer + 1, kind_names[kind],
                          100 * routed.in_questions, 100 * routed.in_notes);
        }
    out << '\n';
}

void write_page(std::ostream& out, const std::vector<Result>& results, const std::string& text_name) {
    out << "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">"
           "<meta name=\"viewport\" content=\"width=device-width\"><title>colt5: what learned routing "
           "routes</title><style>"
        << colt5::routing_panel_style << style << "</style></head><body>\n<h1>What learned routing routes</h1>\n"
        << format(
               R"(<p>Documents of %td bytes from %s hide %td notes such as <code>&lt;K=4821&gt;</code>; at the
end each is asked for, <code>&lt;K?....&gt;</code>. In a layer, light attention sees %td bytes to either side; only the
heavy branch, which takes 1 byte in %td, can carry digits from a far note to its question. The three models differ in the
router alone: all start with the same weights and train for %zu steps on the same documents, which grow to that length.
The table is of text that they were not trained on.</p>
<p>Random routing and light only are baselines that cannot solve the task by construction: chance seldom routes a
digit's note and its question together, and the light branch does not see that far. They stay near a guess, of which 1
in 10 is right; what they have above it are the lucky picks and the notes that happen to lie close to their question.</p>
)",
               full_length, colt5::html_of(text_name).c_str(), notes, light_window / 2, full_length / heavy_tokens,
               results.front().curve.size())
        << (too_short(results).empty() ? "" : "<p><strong>" + too_short(results) + "</strong></p>\n")
        << "<div class=\"top\"><div>";
    write_table(out, results);
    out << "</div><div>";
    write_curves(out, results);
    out << "</div></div>\n<h2>A document, as the learned router sees it</h2>\n"
           "<p>Shaded bytes take the heavy branch, the darker the higher their score. Notes and questions are "
           "underlined. The model reads dots in the questions; shown are its answers, right ones green. A note is read "
           "by attention: the task gives the feedforward router no reason to prefer notes, and it may choose fewer of "
           "their bytes than chance would.</p>\n";
    write_panels(out, results[0]);
    out << "<details><summary>The same document under random routing</summary>\n";
    write_panels(out, results[1]);
    out << "</details>\n</body></html>\n";
}

}  // namespace demo
