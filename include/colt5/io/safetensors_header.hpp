// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <map>
#include <optional>
#include <set>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <colt5/core/error.hpp>
#include <colt5/io/dtype.hpp>
#include <colt5/io/file.hpp>

namespace colt5 {

/// One tensor of a file: what it is, and the bytes [begin, end) that it occupies, counted from the end of the header.
struct SafetensorsEntry {
    DType dtype{};
    std::vector<Index> shape;
    std::uint64_t begin = 0, end = 0;

    std::size_t bytes() const { return static_cast<std::size_t>(end - begin); }
    std::size_t size() const { return bytes() / dtype_size(dtype); }
};

using SafetensorsEntries = std::map<std::string, SafetensorsEntry>;
using SafetensorsMetadata = std::map<std::string, std::string>;

namespace detail {

/// The limit that the reference implementation of the format sets.
inline constexpr std::uint64_t largest_safetensors_header = 100'000'000;

inline constexpr std::string_view safetensors_metadata_key = "__metadata__";

/// In backquotes and, for messages that stay readable whatever a file holds, not longer than 200 bytes.
inline std::string backquoted(std::string_view text) {
    constexpr std::size_t longest = 200;
    if (text.size() <= longest) return "`" + std::string(text) + "`";
    return "`" + std::string(text.substr(0, longest)) + "…` (" + std::to_string(text.size()) + " bytes)";
}

/// "(2, 512)"; "()" for a single number.
template <typename Extent>
std::string list_string(const std::vector<Extent>& numbers) {
    std::string text = "(";
    for (std::size_t i = 0; i < numbers.size(); ++i) text += (i > 0 ? ", " : "") + std::to_string(numbers[i]);
    return text += ')';
}

/// Bytes of a tensor; nothing when that number does not fit.
template <typename Extent>
std::optional<std::uint64_t> tensor_bytes(DType dtype, const std::vector<Extent>& shape) {
    constexpr auto largest = static_cast<std::uint64_t>(std::numeric_limits<Index>::max());
    std::uint64_t bytes = dtype_size(dtype);
    for (const Extent signed_or_unsigned : shape) {
        const auto extent = static_cast<std::uint64_t>(signed_or_unsigned);
        if (extent > largest || (extent > 0 && bytes > largest / extent)) return std::nullopt;
        bytes *= extent;
    }
    return bytes;
}

/// Reads the JSON of a header event by event, without a document in memory, and refuses whatever the format does not
/// have, repeated keys included, where it stands.
class SafetensorsHeaderParser : public nlohmann::json_sax<nlohmann::json> {
public:
    explicit SafetensorsHeaderParser(const std::filesystem::path& path) : path_(path) {}

    SafetensorsEntries entries;
    SafetensorsMetadata metadata;

    bool null() override { unexpected("null"); }
    bool boolean(bool) override { unexpected("true or false"); }
    bool number_integer(number_integer_t value) override { unexpected("the number " + std::to_string(value)); }
    bool number_unsigned(number_unsigned_t value) override {
        if (place_ != Place::numbers) unexpected("the number " + std::to_string(value));
        numbers().push_back(value);
        return true;
    }
    bool number_float(number_float_t, const string_t& text) override { unexpected("the number " + text); }
    bool string(string_t& value) override {
        if (place_ == Place::metadata) {
            metadata[key_] = std::move(value);
        } else if (place_ == Place::fields && key_ == "dtype") {
            const std::optional<DType> dtype = parse_dtype(value);
            if (!dtype) fail(tensor() + ": unknown dtype " + backquoted(value));
            fields_.dtype = dtype;
        } else {
            unexpected("the string " + backquoted(value));
        }
        return true;
    }
    bool binary(binary_t&) override { unexpected("binary data"); }

    bool start_object(std::size_t) override {
        if (place_ == Place::start) {
            place_ = Place::names;
        } else if (place_ == Place::names) {
            place_ = name_ == safetensors_metadata_key ? Place::metadata : Place::fields;
            keys_.clear();
            fields_ = {};
        } else {
            unexpected("an object");
        }
        return true;
    }
    bool key(string_t& value) override {
        std::set<std::string>& seen = place_ == Place::names ? names_ : keys_;
        if (!seen.insert(value).second)
            fail(backquoted(value) + " appears twice in " + (place_ == Place::names ? "the header" : tensor()));
        if (place_ == Place::fields && value != "dtype" && value != "shape" && value != "data_offsets")
            fail(tensor() + ": unknown field " + backquoted(value));
        (place_ == Place::names ? name_ : key_) = std::move(value);
        return true;
    }
    bool end_object() override {
        if (place_ == Place::fields) entries.emplace(name_, finished_entry());
        place_ = place_ == Place::names ? Place::end : Place::names;
        return true;
    }
    bool start_array(std::size_t) override {
        if (place_ != Place::fields || key_ == "dtype") unexpected("an array");
        place_ = Place::numbers;
        numbers().clear();
        return true;
    }
    bool end_array() override {
        place_ = Place::fields;
        return true;
    }
    bool parse_error(std::size_t, const std::string&, const nlohmann::detail::exception& error) override {
        fail(std::string("the header is not valid JSON: ") + error.what());
    }

private:
    enum class Place { start, names, metadata, fields, numbers, end };
    struct Fields {
        std::optional<DType> dtype;
        std::vector<std::uint64_t> shape, data_offsets;
    };

    [[noreturn]] void fail(const std::string& what) const { throw_file_error(path_, what); }
    [[noreturn]] void unexpected(const std::string& found) const {
        const auto in_tensor = [&](const char* expected) { fail(tensor() + ": " + expected + ", but is " + found); };
        if (place_ == Place::start) fail("the header must be a JSON object, but is " + found);
        if (place_ == Place::names) in_tensor("must be an object");
        if (place_ == Place::metadata) fail("the metadata " + backquoted(key_) + " must be a string, but is " + found);
        if (place_ == Place::fields && key_ == "dtype") in_tensor("`dtype` must be a string");
        in_tensor(key_ == "shape" ? "`shape` must be an array of numbers >= 0"
                                  : "`data_offsets` must be an array of two numbers >= 0");
        fail("unreachable");
    }

    std::string tensor() const { return "tensor " + backquoted(name_); }
    std::vector<std::uint64_t>& numbers() { return key_ == "shape" ? fields_.shape : fields_.data_offsets; }

    SafetensorsEntry finished_entry() const {
        for (const char* field : {"dtype", "shape", "data_offsets"})
            if (!keys_.contains(field)) fail(tensor() + ": no field `" + field + "`");
        const std::vector<std::uint64_t>& offsets = fields_.data_offsets;
        if (offsets.size() != 2)
            fail(tensor() + ": `data_offsets` must be an array of two numbers >= 0, but has " +
                 std::to_string(offsets.size()));
        const auto range = "[" + std::to_string(offsets[0]) + ", " + std::to_string(offsets[1]) + ")";
        if (offsets[1] < offsets[0]) fail(tensor() + ": the bytes " + range + " end before they begin");

        const std::string what = std::string(dtype_name(*fields_.dtype)) + " of shape " + list_string(fields_.shape);
        const std::optional<std::uint64_t> bytes = tensor_bytes(*fields_.dtype, fields_.shape);
        if (!bytes) fail(tensor() + ": " + what + " has more bytes than a number can count");
        if (*bytes != offsets[1] - offsets[0])
            fail(tensor() + ": " + what + " has " + std::to_string(*bytes) + " bytes, but `data_offsets` " + range +
                 " have " + std::to_string(offsets[1] - offsets[0]));

        SafetensorsEntry entry{*fields_.dtype, {}, offsets[0], offsets[1]};
        for (const std::uint64_t extent : fields_.shape) entry.shape.push_back(static_cast<Index>(extent));
        return entry;
    }

    const std::filesystem::path& path_;
    Place place_ = Place::start;
    std::string name_, key_;              // the latest key on the first and on the second level
    std::set<std::string> names_, keys_;  // all keys so far
    Fields fields_;
};

/// The tensors must cover the data from its first to its last byte, none twice.
inline void check_safetensors_layout(const std::filesystem::path& path, const SafetensorsEntries& entries,
                                     std::uint64_t data_bytes) {
    std::vector<const SafetensorsEntries::value_type*> in_order;
    for (const auto& named : entries) in_order.push_back(&named);
    std::sort(in_order.begin(), in_order.end(), [](const auto* a, const auto* b) {
        return std::pair(a->second.begin, a->second.end) < std::pair(b->second.begin, b->second.end);
    });

    const auto range = [](std::uint64_t begin, std::uint64_t end) {
        return "[" + std::to_string(begin) + ", " + std::to_string(end) + ")";
    };
    std::uint64_t covered = 0;
    const SafetensorsEntries::value_type* previous = nullptr;
    for (const auto* named : in_order) {
        const auto& [name, entry] = *named;
        const std::string here = "tensor " + backquoted(name) + " has the bytes " + range(entry.begin, entry.end);
        if (entry.end > data_bytes)
            throw_file_error(path, here + ", but only " + std::to_string(data_bytes) + " bytes follow the header");
        if (entry.begin < covered)
            throw_file_error(path, here + ", which overlap " + range(previous->second.begin, previous->second.end) +
                                       " of tensor " + backquoted(previous->first));
        if (entry.begin > covered)
            throw_file_error(path, "the bytes " + range(covered, entry.begin) + " before tensor " + backquoted(name) +
                                       " belong to no tensor");
        covered = entry.end;
        previous = named;
    }
    if (covered != data_bytes)
        throw_file_error(path, "the bytes " + range(covered, data_bytes) + " at the end belong to no tensor");
}

}  // namespace detail
}  // namespace colt5
