// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <initializer_list>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <colt5/core/error.hpp>
#include <colt5/core/view.hpp>
#include <colt5/io/dtype.hpp>
#include <colt5/io/elements.hpp>
#include <colt5/io/file.hpp>

namespace colt5 {

/// One tensor of a file: what it is, and the bytes [begin, end) that it occupies, counted from the end of the header.
/// A tensor of DType::unknown can be read as bytes only, and nothing says whether those fit its shape.
struct SafetensorsEntry {
    DType dtype{};
    std::string dtype_text;  // as the file spells it
    std::vector<Index> shape;
    std::uint64_t begin = 0, end = 0;

    std::size_t bytes() const { return static_cast<std::size_t>(end - begin); }
    /// The number of elements, by the shape.
    std::size_t size() const {
        std::size_t elements = 1;
        for (const Index extent : shape) elements *= static_cast<std::size_t>(extent);
        return elements;
    }
};

using SafetensorsEntries = std::map<std::string, SafetensorsEntry>;
using SafetensorsMetadata = std::map<std::string, std::string>;

namespace detail {

/// The limit that the reference implementation of the format sets.
inline constexpr std::uint64_t largest_safetensors_header = 100'000'000;

inline constexpr std::string_view safetensors_metadata_key = "__metadata__";

/// "[4, 8)".
inline std::string range_string(std::uint64_t begin, std::uint64_t end) {
    return concat({"[", std::to_string(begin), ", ", std::to_string(end), ")"});
}

/// What to say of a file that begins in this way, which claims a header of so many bytes and has none; empty if nothing
/// comes to mind.
inline std::string_view other_file_kind(std::string_view beginning, std::uint64_t header_bytes) {
    using namespace std::string_view_literals;
    constexpr std::array kinds{
        std::pair("PK\3\4"sv,
                  "looks like a zip archive with a pickle in it, as torch.save writes, not like safetensors; write it "
                  "with safetensors.torch.save_file(model.state_dict(), path)"sv),
        std::pair("\x80\2"sv,
                  "looks like a Python pickle, as torch.save wrote before 1.6, not like safetensors; write it with "
                  "safetensors.torch.save_file(model.state_dict(), path)"sv),
        std::pair("GGUF"sv, "looks like a GGUF file, not like safetensors; convert it first"sv),
        std::pair("\x89HDF\r\n\x1A\n"sv,
                  "looks like an HDF5 file, as h5py and Keras write, not like safetensors; convert it first"sv),
        std::pair("\x93NUMPY"sv,
                  "looks like a NumPy array, not like safetensors; write it with "
                  "safetensors.numpy.save_file({\"name\": array}, path)"sv),
        std::pair("\x1F\x8B"sv, "is compressed with gzip; decompress it first"sv),
        std::pair("version https://git-lfs"sv,
                  "is a Git LFS pointer, not the file that it stands for; `git lfs pull` fetches that"sv),
        std::pair("{"sv,
                  "looks like JSON, not like safetensors; if it is the index of a checkpoint in several files, open "
                  "those that it names"sv),
        std::pair("<"sv,
                  "looks like a web page, not like safetensors: the download went wrong; fetch the file itself, on "
                  "huggingface.co by its address with /resolve/"sv)};
    std::string text(beginning);
    if (text.starts_with("\xEF\xBB\xBF")) text.erase(0, 3);
    text.erase(0, text.find_first_not_of(" \t\r\n"));
    // Protocols 3 to 5 of pickle begin as the second does.
    if (text.size() > 1 && text[0] == '\x80' && text[1] >= '\3' && text[1] <= '\5') text[1] = '\2';
    for (const auto& [magic, kind] : kinds)
        // The size of a header may happen to begin like the shorter ones.
        if (text.starts_with(magic) && (magic.size() >= 4 || header_bytes > largest_safetensors_header)) return kind;
    return {};
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
    bool number_integer(number_integer_t value) override { unexpected_number(std::to_string(value)); }
    bool number_unsigned(number_unsigned_t value) override {
        if (place_ != Place::numbers) unexpected_number(std::to_string(value));
        numbers().push_back(value);
        return true;
    }
    bool number_float(number_float_t, const string_t& text) override { unexpected_number(text); }
    bool string(string_t& value) override {
        if (place_ == Place::metadata) {
            metadata[key_] = std::move(value);
        } else if (place_ == Place::fields && key_ == "dtype") {
            fields_.dtype_text = std::move(value);
        } else {
            unexpected(concat({"the string ", backquoted(value)}));
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
            fail({backquoted(value), " appears twice in ", place_ == Place::names ? "the header" : tensor()});
        if (place_ == Place::fields && value != "dtype" && value != "shape" && value != "data_offsets")
            fail({tensor(), ": unknown field ", backquoted(value)});
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
        fail({"the header is not valid JSON: ", printable(error.what(), 300)});
    }

private:
    enum class Place { start, names, metadata, fields, numbers, end };
    struct Fields {
        std::string dtype_text;
        std::vector<std::uint64_t> shape, data_offsets;
    };

    [[noreturn]] void fail(std::initializer_list<std::string_view> what) const {
        throw_file_error(path_, concat(what));
    }
    [[noreturn]] void unexpected_number(std::string_view digits) const {
        unexpected(concat({"the number ", printable(digits)}));
    }
    [[noreturn]] void unexpected(std::string_view found) const {
        const auto in_tensor = [&](const char* expected) { fail({tensor(), ": ", expected, ", but is ", found}); };
        if (place_ == Place::start) fail({"the header must be a JSON object, but is ", found});
        if (place_ == Place::names) in_tensor("must be an object");
        if (place_ == Place::metadata) fail({"the metadata ", backquoted(key_), " must be a string, but is ", found});
        if (place_ == Place::fields && key_ == "dtype") in_tensor("`dtype` must be a string");
        in_tensor(key_ == "shape" ? "`shape` must be an array of numbers >= 0"
                                  : "`data_offsets` must be an array of two numbers >= 0");
        fail({"unreachable"});
    }

    std::string tensor() const { return concat({"tensor ", backquoted(name_)}); }
    std::vector<std::uint64_t>& numbers() { return key_ == "shape" ? fields_.shape : fields_.data_offsets; }

    SafetensorsEntry finished_entry() const {
        for (const char* field : {"dtype", "shape", "data_offsets"})
            if (!keys_.contains(field)) fail({tensor(), ": no field `", field, "`"});
        const std::vector<std::uint64_t>& offsets = fields_.data_offsets;
        if (offsets.size() != 2)
            fail({tensor(), ": `data_offsets` must be an array of two numbers >= 0, but has ",
                  std::to_string(offsets.size())});
        const std::string range = range_string(offsets[0], offsets[1]);
        if (offsets[1] < offsets[0]) fail({tensor(), ": the bytes ", range, " end before they begin"});

        const DType dtype = parse_dtype(fields_.dtype_text).value_or(DType::unknown);
        const std::string what = concat({printable(fields_.dtype_text), " of shape ", list_string(fields_.shape)});
        const std::optional<std::uint64_t> bytes = tensor_bytes(dtype, fields_.shape);
        if (!bytes) fail({tensor(), ": ", what, " has more bytes than a number can count"});
        if (dtype != DType::unknown && *bytes != offsets[1] - offsets[0])
            fail({tensor(), ": ", what, " has ", std::to_string(*bytes), " bytes, but `data_offsets` ", range, " have ",
                  std::to_string(offsets[1] - offsets[0])});

        SafetensorsEntry entry{dtype, fields_.dtype_text, {}, offsets[0], offsets[1]};
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

    const auto fail = [&](std::initializer_list<std::string_view> what) { throw_file_error(path, concat(what)); };
    std::uint64_t covered = 0;
    const SafetensorsEntries::value_type* previous = nullptr;
    for (const auto* named : in_order) {
        const auto& [name, entry] = *named;
        const auto here = [&, &tensor = *named] {
            return concat({"tensor ", backquoted(tensor.first), " has the bytes ",
                           range_string(tensor.second.begin, tensor.second.end)});
        };
        if (entry.end > data_bytes)
            fail({here(), ", but only ", std::to_string(data_bytes), " bytes follow the header"});
        if (entry.begin < covered)
            fail({here(), ", which overlap ", range_string(previous->second.begin, previous->second.end), " of tensor ",
                  backquoted(previous->first)});
        if (entry.begin > covered)
            fail({"the bytes ", range_string(covered, entry.begin), " before tensor ", backquoted(name),
                  " belong to no tensor"});
        covered = entry.end;
        previous = named;
    }
    if (covered != data_bytes)
        fail({"the bytes ", range_string(covered, data_bytes), " at the end belong to no tensor"});
}

}  // namespace detail
}  // namespace colt5
