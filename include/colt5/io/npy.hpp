// SPDX-License-Identifier: MIT
#pragma once

// Arrays in NumPy's files: .npy (https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html, versions 1.0
// to 3.0), and .npz, a zip archive of them.
//
//     6 bytes        "\x93NUMPY"
//     2 bytes        version: major, minor
//     2 or 4 bytes   N, the size of the header, little-endian; 4 from version 2.0 on
//     N bytes        {'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }, padded with spaces, and a newline
//     the rest       the elements
//
// Little-endian float64, float32, float16, integers and bool. Deflated arrays of numpy.savez_compressed need zlib: see
// zip.hpp.

#include <algorithm>
#include <array>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <functional>
#include <initializer_list>
#include <limits>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <colt5/core/error.hpp>
#include <colt5/core/policy.hpp>
#include <colt5/core/tensor.hpp>
#include <colt5/core/view.hpp>
#include <colt5/io/dtype.hpp>
#include <colt5/io/elements.hpp>
#include <colt5/io/file.hpp>
#include <colt5/io/zip.hpp>

namespace colt5 {

namespace detail {

inline constexpr std::string_view npy_magic = "\x93NUMPY";

struct NpyType {
    std::string_view descr;  // as NumPy writes it
    DType dtype;
};
inline constexpr std::array<NpyType, 12> npy_types{{{"<f8", DType::f64},
                                                    {"<f4", DType::f32},
                                                    {"<f2", DType::f16},
                                                    {"<i8", DType::i64},
                                                    {"<i4", DType::i32},
                                                    {"<i2", DType::i16},
                                                    {"|i1", DType::i8},
                                                    {"<u8", DType::u64},
                                                    {"<u4", DType::u32},
                                                    {"<u2", DType::u16},
                                                    {"|u1", DType::u8},
                                                    {"|b1", DType::boolean}}};

/// Reads the dictionary of a header; `fail(what)` throws.
template <typename Fail>
class NpyHeaderParser {
public:
    NpyHeaderParser(std::string_view text, const Fail& fail) : text_(text), fail_(fail) { parse(); }

    std::string descr;
    bool is_fortran = false;
    std::vector<Index> shape;

private:
    void parse() {
        std::set<std::string, std::less<>> seen;
        expect('{');
        while (!take('}')) {
            const std::string key = parse_string();
            if (!seen.insert(key).second) fail_(concat({"the header has two fields ", backquoted(key)}));
            expect(':');
            if (key == "descr")
                parse_descr();
            else if (key == "fortran_order")
                is_fortran = parse_bool();
            else if (key == "shape")
                parse_shape();
            else
                fail_(concat({"the header has an unknown field ", backquoted(key)}));
            if (!take(',')) {
                expect('}');
                break;
            }
        }
        skip();
        if (at_ != text_.size()) fail_expected("the end");
        for (const std::string_view key : {"descr", "fortran_order", "shape"})
            if (!seen.contains(key)) fail_(concat({"the header has no field ", backquoted(key)}));
    }

    void skip() { at_ = std::min(text_.find_first_not_of(" \t\r\n", at_), text_.size()); }
    bool take(char wanted) {
        skip();
        if (at_ == text_.size() || text_[at_] != wanted) return false;
        ++at_;
        return true;
    }
    void expect(char wanted) {
        if (!take(wanted)) fail_expected(concat({"`", std::string_view(&wanted, 1), "`"}));
    }
    void fail_expected(std::string_view what) {
        fail_(concat({"the header must have ", what, " at its byte ", std::to_string(at_), ", but has ",
                      at_ == text_.size() ? "no more" : backquoted(text_.substr(at_, 1))}));
    }

    std::string parse_string() {
        skip();
        const char quote = at_ < text_.size() ? text_[at_] : '\0';
        if (quote != '\'' && quote != '"') fail_expected("a string");
        const std::size_t end = text_.find(quote, at_ + 1);
        if (end == std::string_view::npos)
            fail_(concat({"a string in the header does not end: it begins at byte ", std::to_string(at_)}));
        const std::size_t begin = at_ + 1;
        at_ = end + 1;
        return std::string(text_.substr(begin, end - begin));
    }
    void parse_descr() {
        skip();
        if (at_ < text_.size() && text_[at_] == '[') fail_("holds records of several fields, not numbers");
        descr = parse_string();
    }
    bool parse_bool() {
        skip();
        for (const auto& [word, value] : {std::pair("True", true), std::pair("False", false)})
            if (text_.substr(at_).starts_with(word)) {
                at_ += std::string_view(word).size();
                return value;
            }
        fail_expected("True or False");
        return false;
    }
    void parse_shape() {
        expect('(');
        while (!take(')')) {
            shape.push_back(parse_number());
            if (!take(',')) {
                expect(')');
                return;
            }
        }
    }
    Index parse_number() {
        skip();
        const auto is_digit = [&] { return at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9'; };
        if (!is_digit()) fail_expected("a number");
        const std::size_t begin = at_;
        std::uint64_t value = 0;
        for (; is_digit(); ++at_) {
            const auto digit = static_cast<std::uint64_t>(text_[at_] - '0');
            if (value > (largest_count - digit) / 10)
                fail_(concat({"the header has a number of at least 2^63 at its byte ", std::to_string(begin)}));
            value = 10 * value + digit;
        }
        if (at_ < text_.size() && text_[at_] == 'L') ++at_;  // written by Python 2
        return static_cast<Index>(value);
    }

    std::string_view text_;
    const Fail& fail_;
    std::size_t at_ = 0;
};

/// The header, with all that stands before it, as NumPy 2 writes it: the elements begin at a multiple of 64, with room
/// for the first extent to grow to 21 digits.
inline std::string npy_header(DType dtype, const std::vector<Index>& shape) {
    std::string text = "{'descr': '";
    for (const NpyType& type : npy_types)
        if (type.dtype == dtype) text += type.descr;
    text += "', 'fortran_order': False, 'shape': (";
    for (const Index extent : shape) text += concat({text.ends_with('(') ? "" : ", ", std::to_string(extent)});
    text += shape.size() == 1 ? ",), }" : "), }";
    constexpr std::size_t longest_number = 21, before = 10, alignment = 64;
    if (!shape.empty()) text.append(longest_number - std::to_string(shape.front()).size(), ' ');
    const std::size_t blocks = (before + text.size() + 1) / alignment + 1;  // a whole one where nothing is left to fill
    text.resize(blocks * alignment - before - 1, ' ');
    text += '\n';
    expect_value(text.size() <= std::numeric_limits<std::uint16_t>::max(), "shape",
                 "of a header of less than 2^16 bytes", text.size());
    const auto size = static_cast<std::uint16_t>(text.size());
    std::string header(npy_magic);
    header.append({'\1', '\0', static_cast<char>(size & 0xFF), static_cast<char>(size >> 8)});
    return header + text;
}

}  // namespace detail

/// An array of a file. Opening reads and checks the header; the elements are read when they are asked for. Several
/// threads may read at the same time. Every method throws FileError, which names the file and, where two values
/// disagree, both.
///
///     NpyArray array("tokens.npy");                                // array.dtype(), array.shape()
///     std::vector<float> values = array.read<float>();             // row-major
///     auto tokens = array.tensor<TokensTensor<float, Cpu>>(policy);
///
/// Arrays in Fortran order are transposed as they are read.
class NpyArray {
public:
    explicit NpyArray(const std::filesystem::path& path) : path_(path) {
        const auto file = std::make_shared<detail::InputFile>(path);
        open(file->size(), [file](std::uint64_t offset, std::span<std::byte> bytes) { file->read_at(offset, bytes); });
    }

    const std::filesystem::path& path() const { return path_; }
    DType dtype() const { return dtype_; }
    const std::vector<Index>& shape() const { return shape_; }
    std::size_t size() const { return size_; }

    /// The elements in row-major order, converted as SafetensorsFile::read says.
    template <typename T>
    std::vector<T> read() const {
        const auto values = read_all<T>();
        return std::vector<T>(values.get(), values.get() + size_);
    }

    /// The same into memory of the caller; FileError when the array has another number of elements.
    template <typename T>
    void read_into(std::span<T> values) const {
        if (values.size() != size_)
            fail({"has ", std::to_string(size_), " elements, but ", std::to_string(values.size()), " are wanted"});
        const auto in_order_of_file = [&](std::span<T> to) {
            detail::read_elements(
                dtype_, descr_, to,
                [&](std::uint64_t offset, std::span<std::byte> bytes) { read_at_(begin_ + offset, bytes); },
                [&](std::string_view what) { fail({what}); });
        };
        if (!is_fortran_) return in_order_of_file(values);
        const auto stored = std::make_unique<T[]>(size_);
        in_order_of_file({stored.get(), size_});
        transpose(stored.get(), values.data());
    }

    /// As a tensor such as TokensTensor<float, Cpu>; FileError when the array has another rank or static extent.
    template <typename Result, Policy P>
    Result tensor(const P& policy) const {
        typename Result::Shape shape{};
        bool fits = shape_.size() == Result::rank;
        for (std::size_t axis = 0; fits && axis < Result::rank; ++axis) {
            const Index wanted = Result::ViewType::extents[axis];
            shape[axis] = shape_[axis];
            fits = wanted < 0 || wanted == shape[axis];
        }
        if (!fits)
            fail({"has shape ", detail::list_string(shape_), ", but ", shape_string(Result::ViewType::extents),
                  " is wanted"});
        const auto values = read_all<typename Result::value_type>();
        return from_host<Result>(policy, shape, {values.get(), size_});
    }

private:
    friend class NpzFile;
    using ReadAt = std::function<void(std::uint64_t, std::span<std::byte>)>;

    /// An array of an archive.
    NpyArray(const std::filesystem::path& path, const std::string& name, std::vector<std::byte> content)
        : path_(path), subject_(detail::concat({"array ", detail::backquoted(name), " "})) {
        const auto bytes = std::make_shared<std::vector<std::byte>>(std::move(content));
        open(bytes->size(), [bytes](std::uint64_t offset, std::span<std::byte> to) {
            std::copy_n(bytes->begin() + static_cast<std::ptrdiff_t>(offset), to.size(), to.begin());
        });
    }

    [[noreturn]] void fail(std::initializer_list<std::string_view> what) const {
        detail::throw_file_error(path_, subject_ + detail::concat(what));
    }

    void open(std::uint64_t file_bytes, ReadAt read_at) {
        read_at_ = std::move(read_at);
        std::array<std::byte, 12> start{};
        constexpr std::size_t before_size = 8;
        read_at_(0,
                 std::span(start).first(static_cast<std::size_t>(std::min<std::uint64_t>(start.size(), file_bytes))));
        if (std::memcmp(start.data(), detail::npy_magic.data(), detail::npy_magic.size()) != 0)
            fail({std::memcmp(start.data(), "PK\3\4", 4) == 0
                      ? "is a zip archive, as an .npz file; open it with NpzFile"
                      : "does not begin as a .npy file, with \\x93NUMPY"});
        const auto major = std::to_integer<int>(start[6]), minor = std::to_integer<int>(start[7]);
        if (major < 1 || major > 3 || minor != 0)
            fail({"is of version ", std::to_string(major), ".", std::to_string(minor),
                  " of the format; 1.0, 2.0 and 3.0 can be read"});
        const std::size_t bytes_of_size = major == 1 ? 2 : 4;
        std::uint32_t header_bytes = 0;
        std::memcpy(&header_bytes, start.data() + before_size, bytes_of_size);
        begin_ = before_size + bytes_of_size + header_bytes;
        if (begin_ > file_bytes)
            fail({"claims a header of ", std::to_string(header_bytes), " bytes, but ends at byte ",
                  std::to_string(file_bytes)});
        constexpr std::uint32_t largest_header = 1 << 20;
        if (header_bytes > largest_header)
            fail({"has a header of ", std::to_string(header_bytes), " bytes; at most ", std::to_string(largest_header),
                  " can be read"});
        std::string header(header_bytes, '\0');
        read_at_(before_size + bytes_of_size, std::as_writable_bytes(std::span(header)));
        const auto refuse = [this](std::string_view what) { fail({what}); };
        detail::NpyHeaderParser parser(header, refuse);
        descr_ = std::move(parser.descr);
        shape_ = std::move(parser.shape);
        is_fortran_ = parser.is_fortran && shape_.size() > 1;
        find_type();

        const std::optional<std::uint64_t> bytes = detail::tensor_bytes(dtype_, shape_);
        if (!bytes || *bytes != file_bytes - begin_)
            fail({"has ", std::to_string(file_bytes - begin_), " bytes behind the header, but ",
                  detail::printable(descr_), " of shape ", detail::list_string(shape_), " takes ",
                  bytes ? std::to_string(*bytes) : "2^63 or more"});
        size_ = static_cast<std::size_t>(*bytes) / dtype_size(dtype_);
    }

    void find_type() {
        for (const auto& [descr, dtype] : detail::npy_types)
            if (descr.substr(1) == std::string_view(descr_).substr(std::min<std::size_t>(1, descr_.size())) &&
                (descr_[0] == descr[0] || (descr[0] == '|' && descr_[0] == '<')))
                dtype_ = dtype;
        if (dtype_ == DType::unknown)
            fail({descr_.starts_with('>') ? "holds big-endian elements, "
                                          : "holds elements that are not numbers of ours, ",
                  detail::backquoted(descr_)});
    }

    template <typename T>
    std::unique_ptr<T[]> read_all() const {  // std::vector<bool> has no contiguous elements
        auto values = std::make_unique<T[]>(size_);
        read_into(std::span(values.get(), size_));
        return values;
    }

    /// From Fortran order, in which the first index runs fastest, to row-major order.
    template <typename T>
    void transpose(const T* from, T* to) const {
        std::vector<std::size_t> index(shape_.size(), 0);
        std::vector<std::size_t> strides(shape_.size(), 1);
        for (std::size_t axis = 1; axis < shape_.size(); ++axis)
            strides[axis] = strides[axis - 1] * static_cast<std::size_t>(shape_[axis - 1]);
        std::size_t offset = 0;
        for (std::size_t i = 0; i < size_; ++i) {
            to[i] = from[offset];
            for (std::size_t axis = shape_.size(); axis-- > 0;) {
                offset += strides[axis];
                if (++index[axis] < static_cast<std::size_t>(shape_[axis])) break;
                offset -= strides[axis] * index[axis];
                index[axis] = 0;
            }
        }
    }

    std::filesystem::path path_;
    std::string subject_;  // of messages; empty: the file
    ReadAt read_at_;
    std::string descr_;
    DType dtype_ = DType::unknown;
    std::vector<Index> shape_;
    bool is_fortran_ = false;
    std::uint64_t begin_ = 0;
    std::size_t size_ = 0;
};

/// A file of named arrays, as numpy.savez writes it.
///
///     NpzFile file("batch.npz");
///     for (const std::string& name : file.names()) …
///     auto tokens = file.array("tokens").tensor<TokensTensor<float, Cpu>>(policy);
///
/// Opening reads the directory; `array` reads one array as a whole, and checks its checksum. FileError as in NpyArray.
class NpzFile {
public:
    explicit NpzFile(const std::filesystem::path& path) : file_(path) {
        for (const detail::ZipEntry& entry : file_.entries()) names_.push_back(name_of(entry));
    }

    const std::filesystem::path& path() const { return file_.path(); }
    /// In the order of the file, without the ending `.npy`.
    const std::vector<std::string>& names() const { return names_; }
    bool contains(std::string_view name) const { return std::find(names_.begin(), names_.end(), name) != names_.end(); }

    NpyArray array(const std::string& name) const {
        for (const detail::ZipEntry& entry : file_.entries())
            if (name_of(entry) == name) return NpyArray(path(), name, file_.read(entry));
        detail::throw_file_error(path(), detail::concat({"has no array ", detail::backquoted(name)}));
    }

private:
    static std::string name_of(const detail::ZipEntry& entry) {
        constexpr std::string_view ending = ".npy";
        return entry.name.ends_with(ending) ? entry.name.substr(0, entry.name.size() - ending.size()) : entry.name;
    }

    detail::ZipFile file_;
    std::vector<std::string> names_;
};

/// A tensor on the host, to be saved; refers to elements that someone else owns.
struct NpyTensor {
    DType dtype{};
    std::vector<Index> shape;
    std::span<const std::byte> bytes;

    /// Of any View or Tensor of double, float, float16, bool or integers.
    template <Viewable V>
    NpyTensor(const V& tensor) {  // NOLINT: a view of it
        static_assert(!std::same_as<typename V::value_type, bfloat16>,
                      "colt5: NumPy has no bfloat16: save float, or a safetensors file");
        const auto view = tensor.const_view();
        dtype = dtype_of<typename V::value_type>();
        shape.assign(view.shape().begin(), view.shape().end());
        bytes = std::as_bytes(std::span(view.data(), static_cast<std::size_t>(view.size())));
    }
};

/// Writes a .npy file, as a whole or not at all (see SafetensorsWriter).
///
///     save_npy("tokens.npy", tokens);
inline void save_npy(const std::filesystem::path& path, const NpyTensor& tensor) {
    const std::string header = detail::npy_header(tensor.dtype, tensor.shape);
    detail::AtomicFile file(path);
    file.write_at(0, std::as_bytes(std::span(header)));
    file.write_at(header.size(), tensor.bytes);
    file.commit();
}

/// Writes an .npz file of stored arrays, as a whole or not at all. ValueError if two have the same name.
///
///     save_npz("batch.npz", {{"tokens", tokens}, {"mask", mask}});
inline void save_npz(const std::filesystem::path& path, const std::vector<std::pair<std::string, NpyTensor>>& tensors) {
    std::set<std::string_view> names;
    for (const auto& [name, tensor] : tensors)
        if (!names.insert(name).second)
            throw ValueError(detail::concat({"colt5: two tensors are called ", detail::backquoted(name)}));
    detail::ZipWriter writer(path);
    for (const auto& [name, tensor] : tensors) {
        const std::string header = detail::npy_header(tensor.dtype, tensor.shape);
        writer.add(name + ".npy", {std::as_bytes(std::span(header)), tensor.bytes});
    }
    writer.commit();
}

}  // namespace colt5
