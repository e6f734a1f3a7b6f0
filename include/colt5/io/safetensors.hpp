// SPDX-License-Identifier: MIT
#pragma once

// Tensors in files, in the format of https://github.com/huggingface/safetensors:
//
//     8 bytes        N, the size of the header, little-endian
//     N bytes        JSON: {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, …,
//                           "__metadata__": {"key": "value", …}}, padded with spaces
//     the rest       the tensors, little-endian and row-major, without gaps
//
// Needs nlohmann-json, which nothing else in the library does; therefore <colt5/colt5.hpp> leaves it out.

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <initializer_list>
#include <map>
#include <memory>
#include <optional>
#include <span>
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
#include <colt5/io/safetensors_header.hpp>

namespace colt5 {

/// A file to read tensors from. Opening reads and checks the header; a tensor's data is read when it is asked for.
/// Reading is safe from several threads at once. Every method throws FileError, which names the file, the tensor and,
/// where two values disagree, both.
///
///     SafetensorsFile file("model.safetensors");
///     for (const auto& [name, entry] : file.entries()) …           // entry.dtype, entry.shape
///     std::vector<float> weight = file.read<float>("to_q.weight");  // row-major
class SafetensorsFile {
public:
    explicit SafetensorsFile(const std::filesystem::path& path) : file_(path) {
        constexpr std::uint64_t prefix = sizeof(std::uint64_t);
        if (file_.size() < prefix)
            fail({"has ", std::to_string(file_.size()), " bytes, but the size of the header alone takes ",
                  std::to_string(prefix)});
        std::uint64_t header_bytes = 0;
        file_.read_at(0, std::as_writable_bytes(std::span(&header_bytes, 1)));
        if (header_bytes > detail::largest_safetensors_header)
            fail_header(header_bytes, {"the header claims ", std::to_string(header_bytes), " bytes; the format allows ",
                                       std::to_string(detail::largest_safetensors_header)});
        if (header_bytes > file_.size() - prefix)
            fail_header(header_bytes, {"the header claims ", std::to_string(header_bytes), " bytes, but the file has ",
                                       std::to_string(file_.size() - prefix), " after the size of the header"});

        std::string header(static_cast<std::size_t>(header_bytes), '\0');
        file_.read_at(prefix, std::as_writable_bytes(std::span(header)));
        if (!header.starts_with('{'))
            fail_header(header_bytes, {"the header must be a JSON object that begins with `{`"});
        // The parser would take a zero byte for the end.
        if (header.find('\0') != std::string::npos) fail({"the header is not valid JSON: it holds a zero byte"});
        detail::SafetensorsHeaderParser parser(path);
        nlohmann::json::sax_parse(header, &parser);
        entries_ = std::move(parser.entries);
        metadata_ = std::move(parser.metadata);
        data_begin_ = prefix + header_bytes;
        detail::check_safetensors_layout(path, entries_, file_.size() - data_begin_);
    }

    const std::filesystem::path& path() const { return file_.path(); }
    /// All tensors, by name.
    const SafetensorsEntries& entries() const { return entries_; }
    const SafetensorsMetadata& metadata() const { return metadata_; }
    bool contains(const std::string& name) const { return entries_.contains(name); }

    const SafetensorsEntry& entry(const std::string& name) const {
        const auto found = entries_.find(name);
        if (found == entries_.end()) fail({"has no tensor ", detail::backquoted(name)});
        return found->second;
    }

    /// The bytes as they stand in the file.
    std::vector<std::byte> read_bytes(const std::string& name) const {
        const SafetensorsEntry& tensor = entry(name);
        std::vector<std::byte> bytes(tensor.bytes());
        file_.read_at(data_begin_ + tensor.begin, bytes);
        return bytes;
    }

    /// The elements in row-major order, converted to T:
    /// F64, F32, F16 and BF16 to double, float, float16 and bfloat16, rounded where the result is narrower;
    /// integers and BOOL to integers and bool, if T can hold every value (bool: 0 and 1), otherwise FileError.
    /// There is no conversion between the two groups.
    template <typename T>
    std::vector<T> read(const std::string& name) const {
        // Before memory is asked for: nothing bounds the number of elements of an unknown type.
        if (!dtype_converts_to<T>(entry(name).dtype)) fail_conversion<T>(name);
        const std::size_t size = entry(name).size();
        if constexpr (std::same_as<T, bool>) {  // std::vector<bool> has no contiguous elements
            const auto values = std::make_unique<bool[]>(size);
            read_into(name, std::span(values.get(), size));
            return std::vector<bool>(values.get(), values.get() + size);
        } else {
            std::vector<T> values(size);
            read_into(name, std::span(values));
            return values;
        }
    }

    /// The same into memory of the caller; FileError when the tensor has another number of elements.
    template <typename T>
    void read_into(const std::string& name, std::span<T> values) const {
        const SafetensorsEntry& tensor = entry(name);
        if (tensor.size() != values.size())
            fail({"tensor ", detail::backquoted(name), " has ", std::to_string(tensor.size()), " elements, but ",
                  std::to_string(values.size()), " are wanted"});
        detail::read_elements(
            tensor.dtype, tensor.dtype_text, values,
            [&](std::uint64_t offset, std::span<std::byte> bytes) {
                file_.read_at(data_begin_ + tensor.begin + offset, bytes);
            },
            [&](std::string_view what) {
                fail({"tensor ", detail::backquoted(name), " ", what});
            });
    }

private:
    [[noreturn]] void fail(std::initializer_list<std::string_view> what) const {
        detail::throw_file_error(path(), detail::concat(what));
    }
    /// Says what the file looks like, if it is of another kind, or else `what` is wrong with its header of so many
    /// bytes.
    [[noreturn]] void fail_header(std::uint64_t header_bytes, std::initializer_list<std::string_view> what) const {
        constexpr std::uint64_t longest = 64;
        std::string beginning(static_cast<std::size_t>(std::min(longest, file_.size())), '\0');
        file_.read_at(0, std::as_writable_bytes(std::span(beginning)));
        const std::string_view kind = detail::other_file_kind(beginning, header_bytes);
        if (kind.empty()) fail(what);
        fail({kind});
    }

    template <typename T>
    [[noreturn]] void fail_conversion(const std::string& name) const {
        fail({"tensor ", detail::backquoted(name), " holds ", detail::printable(entry(name).dtype_text),
              ", which does not convert to ", dtype_name(dtype_of<T>())});
    }

    detail::InputFile file_;
    std::uint64_t data_begin_ = 0;
    SafetensorsEntries entries_;
    SafetensorsMetadata metadata_;
};

/// What a tensor in a file is called and looks like.
struct SafetensorsSpec {
    std::string name;
    DType dtype{};
    std::vector<Index> shape;
};

/// Writes a file tensor by tensor, so that only one of them need be in memory at a time. The file appears under its
/// name when `commit` returns; if that is never reached, what was there before stays and nothing else is left behind.
///
///     SafetensorsWriter writer("model.safetensors", {{"weight", DType::f32, {2, 3}}}, {{"format", "pt"}});
///     writer.write("weight", std::as_bytes(std::span(values)));
///     writer.commit();
///
/// Throws FileError, which names the file, when the system refuses, and ValueError when the caller does not keep to
/// the announced tensors.
class SafetensorsWriter {
public:
    SafetensorsWriter(const std::filesystem::path& path, const std::vector<SafetensorsSpec>& tensors,
                      const SafetensorsMetadata& metadata = {})
        : file_(path) {
        // Larger elements first: every tensor is then aligned for readers that map the file into memory. Otherwise in
        // the given order, which is that of the pointers.
        std::vector<const SafetensorsSpec*> in_order;
        for (const SafetensorsSpec& tensor : tensors) in_order.push_back(&tensor);
        std::sort(in_order.begin(), in_order.end(), [](const auto* a, const auto* b) {
            return std::pair(dtype_size(b->dtype), a) < std::pair(dtype_size(a->dtype), b);
        });

        std::string header = "{";
        const auto field = [&](const std::string& name) -> std::string& {
            if (header.size() > 1) header += ',';
            return header += json_string(name) + ':';
        };
        if (!metadata.empty()) {
            field(std::string(detail::safetensors_metadata_key)) += '{';
            for (const auto& [key, value] : metadata)
                header += detail::concat({header.ends_with('{') ? "" : ",", json_string(key), ":", json_string(value)});
            header += '}';
        }
        std::uint64_t end = 0;
        for (const SafetensorsSpec* tensor : in_order) {
            const Pending pending = place(*tensor, end);
            end = pending.end;
            if (!pending_.emplace(tensor->name, pending).second)
                throw ValueError(detail::concat({"colt5: two tensors are called ", detail::backquoted(tensor->name)}));
            field(tensor->name) +=
                detail::concat({"{\"dtype\":\"", dtype_name(tensor->dtype), "\",\"shape\":", json_list(tensor->shape),
                                ",\"data_offsets\":", json_list(std::vector{pending.begin, pending.end}), "}"});
        }
        write_header(header + '}');
    }

    /// The elements of one tensor, row-major; in any order of tensors, each once.
    void write(const std::string& name, std::span<const std::byte> bytes) {
        const auto found = pending_.find(name);
        if (found == pending_.end())
            throw ValueError(detail::concat(
                {"colt5: tensor ", detail::backquoted(name), " was not announced, or is written already"}));
        const auto [begin, end] = found->second;
        expect_value(
            bytes.size() == end - begin, "bytes",
            detail::concat({"the ", std::to_string(end - begin), " bytes of tensor ", detail::backquoted(name)}),
            bytes.size());
        file_.write_at(data_begin_ + begin, bytes);
        pending_.erase(found);
    }

    void commit() {
        if (!pending_.empty())
            throw ValueError(detail::concat(
                {"colt5: tensor ", detail::backquoted(pending_.begin()->first), " has not been written"}));
        file_.commit();
    }

private:
    struct Pending {
        std::uint64_t begin, end;
    };

    static Pending place(const SafetensorsSpec& tensor, std::uint64_t begin) {
        if (tensor.name == detail::safetensors_metadata_key)
            throw ValueError(detail::concat({"colt5: no tensor can be called ", detail::backquoted(tensor.name)}));
        expect_value(tensor.dtype != DType::unknown, "dtype", "one that the library knows", "DType::unknown");
        for (const Index extent : tensor.shape)
            expect_value(extent >= 0, "shape", "non-negative in every dimension", detail::list_string(tensor.shape));
        const std::optional<std::uint64_t> bytes = detail::tensor_bytes(tensor.dtype, tensor.shape);
        expect_value(bytes.has_value(), "shape", "of a size that fits into memory", detail::list_string(tensor.shape));
        expect_value(*bytes <= detail::largest_count - begin, "tensors", "of a size that fits into a file",
                     "more than 2^63 - 1 bytes");
        return {begin, begin + *bytes};
    }

    static std::string json_string(const std::string& text) {
        try {
            return nlohmann::json(text).dump();
        } catch (const nlohmann::json::exception& error) {
            throw ValueError(detail::concat({"colt5: names and metadata must be UTF-8: ", error.what()}));
        }
    }
    template <typename Number>
    static std::string json_list(const std::vector<Number>& numbers) {
        std::string text = "[";
        for (const Number number : numbers) text.append(text.size() > 1 ? "," : "").append(std::to_string(number));
        return text + ']';
    }

    void write_header(std::string text) {
        constexpr std::size_t alignment = 8;
        text.resize(round_up(text.size(), alignment), ' ');
        expect_value(text.size() <= detail::largest_safetensors_header, "tensors",
                     "so few that the header has at most 100000000 bytes", text.size());
        const std::uint64_t header_bytes = text.size();
        file_.write_at(0, std::as_bytes(std::span(&header_bytes, 1)));
        file_.write_at(sizeof(header_bytes), std::as_bytes(std::span(text)));
        data_begin_ = sizeof(header_bytes) + header_bytes;
    }

    detail::AtomicFile file_;
    std::map<std::string, Pending> pending_;
    std::uint64_t data_begin_ = 0;
};

/// A tensor on the host, to be saved; refers to elements that someone else owns.
struct SafetensorsTensor {
    SafetensorsSpec spec;
    std::span<const std::byte> bytes;

    /// Of any View or Tensor of float, double, bool or integers.
    template <Viewable V>
    SafetensorsTensor(std::string name, const V& tensor) {
        const auto view = tensor.const_view();
        spec = {std::move(name), dtype_of<typename V::value_type>(), {view.shape().begin(), view.shape().end()}};
        bytes = std::as_bytes(std::span(view.data(), static_cast<std::size_t>(view.size())));
    }
    SafetensorsTensor(SafetensorsSpec what, std::span<const std::byte> elements)
        : spec(std::move(what)), bytes(elements) {}
};

/// Writes a file at once and as a whole or not at all (see SafetensorsWriter).
///
///     save_safetensors("batch.safetensors", {{"tokens", tokens}, {"mask", mask}}, {{"source", "bible"}});
inline void save_safetensors(const std::filesystem::path& path, const std::vector<SafetensorsTensor>& tensors,
                             const SafetensorsMetadata& metadata = {}) {
    std::vector<SafetensorsSpec> specs;
    for (const SafetensorsTensor& tensor : tensors) specs.push_back(tensor.spec);
    SafetensorsWriter writer(path, specs, metadata);
    for (const SafetensorsTensor& tensor : tensors) writer.write(tensor.spec.name, tensor.bytes);
    writer.commit();
}

}  // namespace colt5
