// SPDX-License-Identifier: MIT
#include "text.hpp"

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <sstream>
#include <string_view>
#include <utility>
#include <vector>

namespace demo {
namespace {

/// Undoes Unix `compress` in block mode with codes of up to 16 bits, without its three bytes of header. Codes grow
/// from 9 bits on; they are written in groups of eight, and a change of width drops the rest of a group.
std::string uncompress(std::string_view packed) {
    constexpr std::size_t clear = 256, first_free = 257, most = std::size_t{1} << 16;
    struct Entry {
        std::size_t prefix;
        char last;
    };
    std::vector<Entry> table(first_free);
    for (std::size_t i = 0; i < 256; ++i) table[i].last = static_cast<char>(i);

    std::string text, word;
    std::size_t width = 9, bit = 0, group = 0;
    bool has_previous = false;
    std::size_t previous = 0;
    const auto start_group = [&] {
        const std::size_t bits = 8 * width;
        bit = group + (bit - group + bits - 1) / bits * bits;
        group = bit;
    };
    while (true) {
        if (table.size() == std::size_t{1} << width && width < 16) {
            start_group();
            ++width;
        }
        if (bit + width > 8 * packed.size()) return text;
        std::size_t code = 0;
        for (std::size_t i = 0; i < width; ++i, ++bit)
            code |= static_cast<std::size_t>((static_cast<unsigned char>(packed[bit / 8]) >> (bit % 8)) & 1) << i;

        if (code == clear) {
            start_group();
            table.resize(first_free);
            width = 9;
            has_previous = false;
            continue;
        }
        // The only code that may be new is the next one: the previous word and its own first letter again.
        const bool is_new = code == table.size() && has_previous;
        if (code > table.size() || (code == table.size() && !is_new)) throw UserError("damaged");
        word.clear();
        for (std::size_t c = is_new ? previous : code;; c = table[c].prefix) {
            word.push_back(table[c].last);
            if (c < 256) break;
        }
        const char first = word.back();
        text.append(word.rbegin(), word.rend());
        if (is_new) text.push_back(first);
        if (has_previous && table.size() < most) table.push_back({previous, first});
        previous = code;
        has_previous = true;
    }
}

/// The file of bible-kjv: a big-endian header with the number of the last window at byte 88 and, from byte 92 on, where
/// the windows begin. Each is compressed by itself; the header that all would have in common is stored once.
constexpr std::string_view bible_magic = "EC02Compressed Data File";

std::string unpack_bible(std::string_view file) {
    const auto number = [&](std::size_t at) {
        std::uint32_t value = 0;
        for (std::size_t i = 0; i < 4; ++i) value = value << 8 | static_cast<unsigned char>(file.at(at + i));
        return std::size_t{value};
    };
    std::string text;
    const std::size_t last = number(88);
    for (std::size_t i = 0; i <= last; ++i) {
        const std::size_t begin = number(92 + 4 * i);
        const std::size_t end = i < last ? number(96 + 4 * i) : file.size();
        if (begin > end || end > file.size()) throw UserError("damaged");
        text += uncompress(file.substr(begin, end - begin));
    }
    return text;
}

}  // namespace

std::string read_text(const std::string& path) {
    const std::string advice = path == bible_file ? "; install the package bible-kjv-text, or name a text file" : "";
    std::ifstream file(path, std::ios::binary);
    if (!file) throw UserError("cannot read " + path + ": " + std::strerror(errno) + advice);
    std::ostringstream contents;
    if (!(contents << file.rdbuf())) throw UserError("cannot read " + path + ": it is empty or not a file" + advice);
    const std::string bytes = std::move(contents).str();
    if (!bytes.starts_with(bible_magic)) return bytes;
    try {
        return unpack_bible(bytes);
    } catch (const std::exception&) {
        throw UserError(path + " is damaged; install the package bible-kjv-text again, or name a text file");
    }
}

}  // namespace demo
