// SPDX-License-Identifier: MIT
#include <colt5/io/npy.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <colt5/colt5.hpp>

#include <doctest/doctest.h>

#include "io/numpy_files.hpp"
#include "io/temporary_folder.hpp"

using namespace colt5;
using namespace std::string_literals;

namespace {

/// A .npy file of version 1.0 with this header.
std::string npy(const std::string& header, const std::string& data = "") {
    return "\x93NUMPY\1\0"s + static_cast<char>(header.size() % 256) + static_cast<char>(header.size() / 256) + header +
           data;
}
std::string npy(const std::string& descr, const std::string& shape, const std::string& data) {
    return npy("{'descr': '" + descr + "', 'fortran_order': False, 'shape': " + shape + ", }\n", data);
}
template <typename... T>
std::string bytes_of(T... values) {
    std::string bytes;
    (bytes.append(reinterpret_cast<const char*>(&values), sizeof(T)), ...);
    return bytes;
}

/// A file in a folder of its own.
struct File {
    explicit File(std::string_view content) { write_file(path, std::string(content)); }
    TemporaryFolder folder;
    std::filesystem::path path = folder / "a";
};

/// What `use` of the file says after its name, or "".
template <typename Use>
std::string complaint(std::string_view content, const Use& use) {
    const File file(content);
    const std::string message = message_of<FileError>([&] { use(file.path); }),
                      beginning = "colt5: " + file.path.string() + ": ";
    if (message.empty()) return "";
    CHECK(message.starts_with(beginning));
    return message.substr(std::min(beginning.size(), message.size()));
}
std::string complaint(std::string_view content) {
    return complaint(content, [](const auto& path) { const NpyArray array(path); });
}
std::string zip_complaint(std::string_view content) {
    return complaint(content, [](const auto& path) {
        const NpzFile file(path);
        for (const std::string& name : file.names()) file.array(name);
    });
}

template <typename T>
std::vector<T> values(std::string_view content) {
    return NpyArray(File(content).path).read<T>();
}

const std::vector<float> x{1.5f, -2, 3, 0.25f, 5, 6e4f};
const bool mask[] = {true, false, true};

}  // namespace

TEST_CASE("npy: what NumPy writes is read, and what is written are its bytes") {
    const File file(numpy_files::float32);
    const NpyArray array(file.path);
    CHECK(array.path() == file.path);
    CHECK(array.dtype() == DType::f32);
    CHECK(array.shape() == std::vector<Index>{2, 3});
    CHECK(array.size() == 6);
    CHECK(array.read<float>() == x);
    CHECK(array.read<double>() == std::vector<double>(x.begin(), x.end()));

    save_npy(file.path, MatrixView<const float>(x.data(), {2, 3}));
    CHECK(read_file(file.path) == numpy_files::float32);
    CHECK(file.folder.number_of_files() == 1);
    CHECK(array.read<float>() == x);  // the file that was opened
}

TEST_CASE("npy: arrays in Fortran order are transposed") {
    const std::vector<double> read = values<double>(numpy_files::fortran);
    REQUIRE(read.size() == 24);
    for (std::size_t i = 0; i < 24; ++i) CHECK(read[i] == static_cast<double>(i));
    const auto fortran = [](const std::string& shape, const std::string& data) {
        return values<int>(npy("{'descr': '|u1', 'fortran_order': True, 'shape': " + shape + "}", data));
    };
    CHECK(fortran("(3, 2)", "\0\2\4\1\3\5"s) == std::vector{0, 1, 2, 3, 4, 5});
    CHECK(fortran("(3,)", "\1\2\3") == std::vector{1, 2, 3});
    CHECK(fortran("(3, 1)", "\1\2\3") == std::vector{1, 2, 3});
    CHECK(fortran("(2, 0, 3)", "").empty());
    CHECK(fortran("()", "\7") == std::vector{7});
}

TEST_CASE("npy: each type comes back") {
    const TemporaryFolder folder;
    const auto check = [&]<typename T>(const std::vector<T>& saved, std::string_view descr) {
        const auto path = folder / std::string(descr.substr(1));
        save_npy(path, VectorView<const T>(saved.data(), {static_cast<Index>(saved.size())}));
        CHECK(read_file(path).find("{'descr': '" + std::string(descr) +
                                   "', 'fortran_order': False, 'shape': (2,), }") == 10);
        const NpyArray array(path);
        CHECK(array.dtype() == dtype_of<T>());
        const auto read = array.template read<T>();
        CHECK(std::memcmp(read.data(), saved.data(), 2 * sizeof(T)) == 0);
    };
    check(std::vector<double>{0.1, -std::numeric_limits<double>::infinity()}, "<f8");
    check(std::vector<float>{-0.0f, std::numeric_limits<float>::quiet_NaN()}, "<f4");
    check(std::vector<float16>{float16(0.5), float16(65504)}, "<f2");
    check(std::vector<std::int64_t>{-1, std::numeric_limits<std::int64_t>::max()}, "<i8");
    check(std::vector<std::int32_t>{-2, 3}, "<i4");
    check(std::vector<std::int16_t>{-2, 3}, "<i2");
    check(std::vector<std::int8_t>{-2, 3}, "|i1");
    check(std::vector<std::uint64_t>{2, std::numeric_limits<std::uint64_t>::max()}, "<u8");
    check(std::vector<std::uint32_t>{2, 3}, "<u4");
    check(std::vector<std::uint16_t>{2, 3}, "<u2");
    check(std::vector<std::uint8_t>{2, 255}, "|u1");
    save_npy(folder / "b1", View<const bool, dynamic>(mask, {3}));
    CHECK(NpyArray(folder / "b1").read<bool>() == std::vector<bool>{true, false, true});
    CHECK(read_file(folder / "b1").substr(128) == "\1\0\1"s);

    save_npy(folder / "wide", View<const std::uint8_t, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1>(
                                  reinterpret_cast<const std::uint8_t*>("\5"),
                                  {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}));
    CHECK(NpyArray(folder / "wide").shape() == std::vector<Index>(20, 1));
    CHECK(read_file(folder / "wide").size() == 193);
}

TEST_CASE("npy: conversions are those of safetensors") {
    CHECK(values<float>(npy("<f2", "(1,)", bytes_of(std::uint16_t{0x3555}))) == std::vector<float>{1365.0f / 4096});
    CHECK(values<std::uint8_t>(npy("<i8", "(2,)", bytes_of(std::int64_t{0}, std::int64_t{255}))) ==
          std::vector<std::uint8_t>{0, 255});
    const auto convert = [](const std::string& content, auto to) {
        return complaint(content, [&](const auto& path) { NpyArray(path).read<decltype(to)>(); });
    };
    CHECK(convert(npy("<i4", "(2,)", bytes_of(7, -3)), std::uint8_t{}) ==
          "holds -3 at position 1, which U8 cannot hold");
    CHECK(convert(npy("|b1", "(1,)", "\2"), bool{}) == "holds 2 at position 0, which BOOL cannot hold");
    CHECK(convert(npy("<i4", "(1,)", bytes_of(7)), float{}) == "holds <i4, which does not convert to F32");
    CHECK(convert(npy("<f4", "(1,)", bytes_of(7.0f)), int{}) == "holds <f4, which does not convert to I32");
    const File file(npy("|u1", "(3,)", "abc"));
    std::array<int, 2> few{};
    CHECK(message_of<FileError>([&] {
              NpyArray(file.path).read_into(std::span<int>(few));
          }).ends_with(": has 3 elements, but 2 are wanted"));
}

TEST_CASE("npy: arrays as tensors") {
    const Cpu policy;
    const File file(numpy_files::float32);
    const NpyArray array(file.path);
    CHECK(to_host(policy, array.tensor<MatrixTensor<float, Cpu>>(policy)) == x);
    CHECK(array.tensor<Tensor<double, Cpu, 2, 3>>(policy).data()[4] == 5);
    const auto wanted = [&](auto&& call) {
        const std::string message = message_of<FileError>(call);
        return message.substr(std::min(message.size(), message.rfind(": ") + 2));
    };
    CHECK(wanted([&] { array.tensor<TokensTensor<float, Cpu>>(policy); }) ==
          "has shape (2, 3), but (any, any, any) is wanted");
    CHECK(wanted([&] { array.tensor<Tensor<float, Cpu, dynamic, 4>>(policy); }) ==
          "has shape (2, 3), but (any, 4) is wanted");

    MatrixTensor<bool, Cpu> flags(policy, {1, 3});
    std::copy_n(mask, 3, flags.data());
    save_npy(file.path, flags);
    const auto back = NpyArray(file.path).tensor<MatrixTensor<bool, Cpu>>(policy);
    CHECK(std::equal(mask, mask + 3, back.data()));
}

TEST_CASE("npy: headers of other versions and forms") {
    const auto of_version = [](char major, const std::string& header) {
        return "\x93NUMPY"s + major + '\0' + static_cast<char>(header.size()) + "\0\0\0"s + header + "\5";
    };
    const std::string header = "{'shape': (1,), \"fortran_order\": False , 'descr':\t'<u1'}  \n";
    CHECK(values<int>(of_version(2, header)) == std::vector{5});
    CHECK(values<int>(of_version(3, header)) == std::vector{5});
    CHECK(values<int>(npy(header, "\5")) == std::vector{5});
    CHECK(values<int>(npy("{'descr':'|u1','fortran_order':False,'shape':(1L, 1L,)}", "\5")) == std::vector{5});
    CHECK(values<int>(npy("|u1", "()", "\5")) == std::vector{5});
    CHECK(values<int>(npy("|u1", "(4, 0)", "")).empty());
}

TEST_CASE("npy: what is wrong with a file is said in one line") {
    CHECK(complaint("") == "does not begin as a .npy file, with \\x93NUMPY");
    CHECK(complaint("\x93NUMPZ\1\0\0\0") == "does not begin as a .npy file, with \\x93NUMPY");
    CHECK(complaint(numpy_files::stored) == "is a zip archive, as an .npz file; open it with NpzFile");
    CHECK(complaint("\x93NUMPY\4\0\0\0\0\0"s) == "is of version 4.0 of the format; 1.0, 2.0 and 3.0 can be read");
    CHECK(complaint("\x93NUMPY\1\0\xFF\1{"s) == "claims a header of 511 bytes, but ends at byte 11");
    CHECK(complaint("\x93NUMPY\2\0\1\0\x10\0"s + std::string((1 << 20) + 1, ' ')) ==
          "has a header of 1048577 bytes; at most 1048576 can be read");
    CHECK(complaint(npy("<f4", "(2, 3)", "12345")) ==
          "has 5 bytes behind the header, but <f4 of shape (2, 3) takes 24");
    CHECK(complaint(std::string(numpy_files::float32) + "x") ==
          "has 25 bytes behind the header, but <f4 of shape (2, 3) takes 24");
    CHECK(complaint(npy("<f8", "(1152921504606846976,)", "")) ==
          "has 0 bytes behind the header, but <f8 of shape (1152921504606846976) takes 2^63 or more");
    CHECK(complaint(npy("<f8", "(9223372036854775808,)", "")) ==
          "the header has a number of at least 2^63 at its byte 51");
    CHECK(complaint(npy("<f4", "(18446744073709551617,)", "1234")) ==  // 2^64 + 1
          "the header has a number of at least 2^63 at its byte 51");
    CHECK(complaint(npy(">f4", "(1,)", "1234")) == "holds big-endian elements, `>f4`");
    for (const char* descr : {"<U5", "<c8", "|O", "<V2", "|S3", "<f16", "<M8[ns]", "", "f4", "=f4"})
        CHECK(complaint(npy(descr, "(1,)", "1234")) == "holds elements that are not numbers of ours, `"s + descr + "`");
    CHECK(complaint(npy("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,)}", "1234")) ==
          "holds records of several fields, not numbers");

    CHECK(complaint(npy("")) == "the header must have `{` at its byte 0, but has no more");
    CHECK(complaint(npy("{'descr': '|u1', 'shape': ()}", "1")) == "the header has no field `fortran_order`");
    CHECK(complaint(npy("{'descr': '|u1', 'descr': '|u1'}", "1")) == "the header has two fields `descr`");
    CHECK(complaint(npy("{'a\n': 1}")) == "the header has an unknown field `a\\x0A`");
    CHECK(complaint(npy("{'descr")) == "a string in the header does not end: it begins at byte 1");
    CHECK(complaint(npy("{'shape': (2 3)}")) == "the header must have `)` at its byte 13, but has `3`");
    CHECK(complaint(npy("{'shape': (-1,)}")) == "the header must have a number at its byte 11, but has `-`");
    CHECK(complaint(npy("{'fortran_order': 0}")) == "the header must have True or False at its byte 18, but has `0`");
    CHECK(complaint(npy("{'descr': 5}")) == "the header must have a string at its byte 10, but has `5`");
    CHECK(complaint(npy("{}x")) == "the header must have the end at its byte 2, but has `x`");
}

TEST_CASE("npz: what NumPy writes is read") {
    const auto check = [](std::string_view content) {
        const File file(content);
        const NpzFile archive(file.path);
        CHECK(archive.path() == file.path);
        CHECK(archive.names() == std::vector<std::string>{"x", "mask"});
        CHECK(archive.contains("mask"));
        CHECK_FALSE(archive.contains("mask.npy"));
        CHECK(archive.array("x").read<float>() == x);
        CHECK(archive.array("x").shape() == std::vector<Index>{2, 3});
        CHECK(archive.array("mask").read<bool>() == std::vector<bool>{true, false, true});
        CHECK(message_of<FileError>([&] { archive.array("y"); }) ==
              "colt5: " + file.path.string() + ": has no array `y`");
        CHECK(message_of<FileError>([&] { archive.array("x").read<int>(); }) ==
              "colt5: " + file.path.string() + ": array `x` holds <f4, which does not convert to I32");
    };
    check(numpy_files::stored);
#if defined(COLT5_USE_ZLIB)
    check(numpy_files::deflated);
#else
    CHECK(zip_complaint(numpy_files::deflated).starts_with("entry `x.npy` is deflated, which needs -DCOLT5_USE_ZLIB"));
#endif
}

TEST_CASE("npz: what is saved comes back, and the same bytes each time") {
    const TemporaryFolder folder;
    const auto save = [&](const std::string& name) {
        save_npz(folder / name, {{"x", MatrixView<const float>(x.data(), {2, 3})},
                                 {"näme of \"mask\"", View<const bool, dynamic>(mask, {3})},
                                 {"empty", MatrixView<const double>(nullptr, {0, 4})}});
    };
    save("a");
    save("b");
    CHECK(read_file(folder / "a") == read_file(folder / "b"));
    const NpzFile file(folder / "a");
    CHECK(file.names() == std::vector<std::string>{"x", "näme of \"mask\"", "empty"});
    CHECK(file.array("x").read<float>() == x);
    CHECK(file.array("näme of \"mask\"").read<bool>() == std::vector<bool>{true, false, true});
    CHECK(file.array("empty").shape() == std::vector<Index>{0, 4});
    save_npz(folder / "a", {});
    CHECK(NpzFile(folder / "a").names().empty());
    CHECK(file.array("x").read<float>() == x);

    const VectorView<const float> some(x.data(), {6});
    CHECK(message_of<ValueError>([&] {
              save_npz(folder / "b", {{"x", some}, {"x", some}});
          }) == "colt5: two tensors are called `x`");
    CHECK(message_of<ValueError>([&] {
              save_npz(folder / "b", {{"x", some}, {std::string(65535, 'x'), some}});
          }) == "colt5: `name` must be of less than 65535 bytes, but is 65539");
    CHECK(NpzFile(folder / "b").names().size() == 3);  // as it was
    CHECK(folder.number_of_files() == 2);
}

TEST_CASE("npz: what is wrong with an archive is said in one line") {
    const std::string whole(numpy_files::stored);
    const auto spoiled = [&](std::size_t at, const std::string& bytes) {
        return zip_complaint(std::string(whole).replace(at, bytes.size(), bytes));
    };
    const std::size_t directory = whole.find("PK\1\2"), end = whole.rfind("PK\5\6");
    CHECK(zip_complaint("") == "is no zip archive, or its end is missing: no record of it in the last 0 bytes");
    CHECK(zip_complaint(whole.substr(0, whole.size() - 1)).starts_with("is no zip archive, or its end is missing"));
    CHECK(spoiled(end + 4, "\1") == "is one of several disks of a zip archive");
    CHECK(spoiled(end + 8, "\3\0\3\0"s) == "the directory claims 3 entries in 105 bytes");
    CHECK(spoiled(whole.rfind("PK\1\2"), "X") == "entry 1 of 2 is missing in the directory");
    CHECK(spoiled(end + 8, "\xFF\0\xFF\0"s).starts_with("the directory claims 255 entries in "));
    CHECK(spoiled(end + 16, "\xFF\xFF").starts_with("the directory claims "));
    CHECK(spoiled(directory + 8, "\1") == "entry `x.npy` is encrypted");
    CHECK(spoiled(directory + 10, "\x0C") ==
          "entry `x.npy` is packed by method 12; stored (0) and deflated (8) ones can be read");
    CHECK(spoiled(directory + 16, "\1\0\0\0"s).ends_with(", but the directory says 1"));
    CHECK(spoiled(directory + 20, "\1") == "entry `x.npy` is stored in 1 bytes, but has 152");
    CHECK(spoiled(directory + 42, "\1") == "entry `x.npy` is not at byte 1");
    CHECK(spoiled(30, "y") == "entry `x.npy` is called `y.npy` at byte 0");
    CHECK(zip_complaint(whole + "PK\5\6" + std::string(18, '\0')) == "");  // an empty archive behind it
}

TEST_CASE("npy, npz: a damaged file is refused or read, and never more than that") {
    const TemporaryFolder folder;
    save_npz(folder / "ours",
             {{"x", MatrixView<const float>(x.data(), {2, 3})}, {"mask", View<const bool, dynamic>(mask, {3})}});
    const std::vector<std::string> files{std::string(numpy_files::float32), std::string(numpy_files::fortran),
                                         std::string(numpy_files::stored), std::string(numpy_files::deflated),
                                         read_file(folder / "ours")};
    const auto use = [](const NpyArray& array) {
        try {
            const std::size_t size = array.read<double>().size();
            CHECK(size == array.size());
        } catch (const FileError& error) {
            CHECK(std::string_view(error.what()).size() < 1000);
        }
    };
    int opened = 0, tried = 0;
    const auto try_file = [&](const std::string& damaged) {
        const auto path = folder / "a";
        write_file(path, damaged);
        ++tried;
        try {
            if (damaged.starts_with("PK")) {
                const NpzFile file(path);
                ++opened;
                for (const std::string& name : file.names()) use(file.array(name));
            } else {
                const NpyArray array(path);
                ++opened;
                use(array);
            }
        } catch (const FileError& error) {
            CHECK(std::string_view(error.what()).size() < 1000);
        }
    };
    std::mt19937 random(1);
    const auto below = [&](std::size_t limit) {
        return std::uniform_int_distribution<std::size_t>(0, limit - 1)(random);
    };
    const std::string bytes = "{}()'\",:-019LTF<>|PK\1\2\3\4\5\6\7\b\xFF\x7F\0"s;
    for (const std::string& whole : files) {
        for (std::size_t size = 0; size < whole.size(); ++size) try_file(whole.substr(0, size));
        for (int round = 0; round < 300; ++round) {
            std::string damaged = whole;
            for (std::size_t changes = 1 + below(2); changes > 0; --changes) {
                const std::size_t at = below(damaged.size());
                const std::size_t kind = below(4);
                if (kind < 2) damaged[at] = bytes[below(bytes.size())];
                if (kind == 2) damaged.erase(at, 1 + below(4));
                if (kind == 3) damaged.insert(at, damaged.substr(below(damaged.size()), 1 + below(40)));
            }
            try_file(damaged);
        }
    }
    CHECK(opened > 100);
    CHECK(opened < tried - 1000);
}
