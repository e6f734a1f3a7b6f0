// SPDX-License-Identifier: MIT
#include <colt5/io/safetensors.hpp>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <doctest/doctest.h>

#include "io/temporary_folder.hpp"

using namespace colt5;

namespace {

/// A file with this header and so many bytes of data, which count up from zero.
std::string file_content(const std::string& header, std::size_t data_bytes) {
    const std::uint64_t size = header.size();
    std::string content(sizeof(size), '\0');
    std::memcpy(content.data(), &size, sizeof(size));
    content += header;
    for (std::size_t i = 0; i < data_bytes; ++i) content += static_cast<char>(i);
    return content;
}

/// What opening the file says after its name, or "opens".
std::string complaint(const std::string& content) {
    const TemporaryFolder folder;
    const auto path = folder / "hostile.safetensors";
    write_file(path, content);
    const std::string message = message_of<FileError>([&] { SafetensorsFile file(path); });
    const std::string beginning = "colt5: " + path.string() + ": ";
    if (message.empty()) return "opens";
    CHECK(message.starts_with(beginning));
    return message.substr(std::min(beginning.size(), message.size()));
}
std::string complaint(const std::string& header, std::size_t data_bytes) {
    return complaint(file_content(header, data_bytes));
}

template <typename T>
SafetensorsTensor tensor(const std::string& name, const std::vector<Index>& shape, const std::vector<T>& values) {
    return {{name, dtype_of<T>(), shape}, std::as_bytes(std::span(values))};
}

/// The tensor `x` of a file with one tensor.
template <typename Stored>
SafetensorsFile one_tensor(const TemporaryFolder& folder, DType dtype, const std::vector<Stored>& values) {
    const auto path = folder / "one.safetensors";
    save_safetensors(path, {{{"x", dtype, {static_cast<Index>(values.size())}}, std::as_bytes(std::span(values))}});
    return SafetensorsFile(path);
}

}  // namespace

TEST_CASE("safetensors: what is saved comes back bit for bit") {
    const TemporaryFolder folder;
    const auto path = folder / "a.safetensors";
    const std::vector<float> floats{1.5f, -0.0f, std::numeric_limits<float>::denorm_min(), 3e38f, -7, 1e-20f};
    const std::vector<double> doubles{0.1, std::numeric_limits<double>::infinity()};
    const std::vector<std::int64_t> integers{-1, std::numeric_limits<std::int64_t>::max()};
    const bool flags[] = {true, false, true};
    save_safetensors(path,
                     {{"flags", View<const bool, dynamic>(flags, {3})},
                      tensor("a \"quoted\" näme\n", {2, 3}, floats),
                      tensor("doubles", {2}, doubles),
                      tensor("integers", {1, 2, 1}, integers),
                      tensor("scalar", {}, std::vector<std::uint16_t>{65535}),
                      tensor("empty", {0, 4}, std::vector<float>{})},
                     {{"config", "{\"dim\": 32}"}, {"format", "pt"}});

    const SafetensorsFile file(path);
    CHECK(file.path() == path);
    CHECK(file.metadata() == SafetensorsMetadata{{"config", "{\"dim\": 32}"}, {"format", "pt"}});
    CHECK(file.entries().size() == 6);
    CHECK(file.contains("doubles"));
    CHECK_FALSE(file.contains("__metadata__"));
    CHECK(file.entry("integers").dtype == DType::i64);
    CHECK(file.entry("integers").shape == std::vector<Index>{1, 2, 1});
    CHECK(file.read<float>("a \"quoted\" näme\n") == floats);
    CHECK(std::signbit(file.read<float>("a \"quoted\" näme\n")[1]));
    CHECK(file.read<double>("doubles") == doubles);
    CHECK(file.read<std::int64_t>("integers") == integers);
    CHECK(file.read<bool>("flags") == std::vector<bool>{true, false, true});
    CHECK(file.read<std::uint16_t>("scalar") == std::vector<std::uint16_t>{65535});
    CHECK(file.entry("scalar").shape.empty());
    CHECK(file.read<float>("empty").empty());
    CHECK(file.read_bytes("flags") == std::vector<std::byte>{std::byte{1}, std::byte{0}, std::byte{1}});
    CHECK(folder.number_of_files() == 1);
}

TEST_CASE("safetensors: the bytes of a file are those of the format") {
    const TemporaryFolder folder;
    save_safetensors(folder / "a", {tensor("small", {3}, std::vector<std::uint8_t>{7, 8, 9}),
                                    tensor("large", {1}, std::vector<std::int32_t>{0x01020304})});
    // Larger elements first, the header padded with spaces to a multiple of 8.
    const std::string header = R"({"large":{"dtype":"I32","shape":[1],"data_offsets":[0,4]},)"
                               R"("small":{"dtype":"U8","shape":[3],"data_offsets":[4,7]}})";
    const std::string padded = header + std::string((8 - header.size() % 8) % 8, ' ');
    CHECK(read_file(folder / "a") == file_content(padded, 0) + "\x04\x03\x02\x01\x07\x08\x09");
}

TEST_CASE("safetensors: an empty file of no tensors") {
    const TemporaryFolder folder;
    save_safetensors(folder / "a", {});
    CHECK(SafetensorsFile(folder / "a").entries().empty());
}

TEST_CASE("safetensors: floating-point numbers convert exactly") {
    const TemporaryFolder folder;
    constexpr float infinity = std::numeric_limits<float>::infinity();
    const auto bf16 = one_tensor<std::uint16_t>(folder, DType::bf16, {0x3F80, 0x0001, 0xFF80, 0x8000, 0x7FC0});
    const auto from_bf16 = bf16.read<float>("x");
    CHECK(from_bf16[0] == 1.0f);
    CHECK(from_bf16[1] == 0x1p-133f);
    CHECK(from_bf16[2] == -infinity);
    CHECK(std::bit_cast<std::uint32_t>(from_bf16[3]) == 0x80000000u);
    CHECK(std::isnan(from_bf16[4]));
    CHECK(bf16.read<double>("x")[1] == 0x1p-133);

    const auto half = one_tensor<std::uint16_t>(folder, DType::f16, {0x3555, 0x03FF, 0x7C00, 0xFE00});
    const auto from_half = half.read<double>("x");
    CHECK(from_half[0] == 1365.0 / 4096);
    CHECK(from_half[1] == 1023 * 0x1p-24);
    CHECK(from_half[2] == static_cast<double>(infinity));
    CHECK(std::isnan(from_half[3]));

    const auto single = one_tensor<float>(folder, DType::f32, {0.1f, std::numeric_limits<float>::denorm_min()});
    CHECK(single.read<double>("x") == std::vector<double>{static_cast<double>(0.1f), 0x1p-149});

    const auto wide = one_tensor<double>(folder, DType::f64, {0.1, 1e300, -1e-300, 1 + 0x1p-24});
    CHECK(wide.read<float>("x") == std::vector<float>{0.1f, infinity, 0.0f, 1.0f});  // rounded to nearest, even
}

TEST_CASE("safetensors: a conversion of more elements than one piece of the reader") {
    const TemporaryFolder folder;
    std::vector<float> values(200'001);
    for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i);
    const auto file = one_tensor(folder, DType::f32, values);
    CHECK(file.read<double>("x") == std::vector<double>(values.begin(), values.end()));
}

TEST_CASE("safetensors: integers convert where they fit, and say where they do not") {
    const TemporaryFolder folder;
    const auto integers = one_tensor<std::int64_t>(folder, DType::i64, {0, 1, -128, 300});
    CHECK(integers.read<std::int16_t>("x") == std::vector<std::int16_t>{0, 1, -128, 300});
    CHECK(message_of<FileError>([&] {
              integers.read<std::int8_t>("x");
          }).ends_with("tensor `x` holds 300 at position 3, which I8 cannot hold"));
    CHECK(message_of<FileError>([&] {
              integers.read<std::uint64_t>("x");
          }).ends_with("tensor `x` holds -128 at position 2, which U64 cannot hold"));

    const auto flags = one_tensor<std::uint8_t>(folder, DType::boolean, {0, 1, 2});
    CHECK(flags.read<std::uint8_t>("x") == std::vector<std::uint8_t>{0, 1, 2});
    CHECK(message_of<FileError>([&] {
              flags.read<bool>("x");
          }).ends_with("tensor `x` holds 2 at position 2, which BOOL cannot hold"));
    CHECK(one_tensor<std::uint8_t>(folder, DType::u8, {1, 0}).read<bool>("x") == std::vector<bool>{true, false});
    CHECK(one_tensor<std::uint64_t>(folder, DType::u64, {1}).read<int>("x") == std::vector<int>{1});
    CHECK(one_tensor<std::int16_t>(folder, DType::i16, {-5}).read<int>("x") == std::vector<int>{-5});
    CHECK(one_tensor<std::uint32_t>(folder, DType::u32, {4000000000}).read<std::int64_t>("x")[0] == 4000000000);
}

TEST_CASE("safetensors: what has no conversion") {
    const TemporaryFolder folder;
    CHECK(message_of<FileError>([&] {
              one_tensor<std::int64_t>(folder, DType::i64, {1}).read<float>("x");
          }).ends_with("tensor `x` holds I64, which does not convert to F32"));
    CHECK(message_of<FileError>([&] {
              one_tensor<float>(folder, DType::f32, {1}).read<int>("x");
          }).ends_with("tensor `x` holds F32, which does not convert to I32"));
    const auto eight = one_tensor<std::uint8_t>(folder, DType::f8_e4m3, {1});
    CHECK(message_of<FileError>([&] {
              eight.read<float>("x");
          }).ends_with("tensor `x` holds F8_E4M3, which does not convert to F32"));
    CHECK(eight.read_bytes("x") == std::vector<std::byte>{std::byte{1}});

    std::vector<float> two(2);
    const auto file = one_tensor<float>(folder, DType::f32, {1, 2, 3});
    CHECK(message_of<FileError>([&] {
              file.read_into("x", std::span(two));
          }).ends_with("tensor `x` has 3 elements, but 2 are wanted"));
    CHECK(message_of<FileError>([&] { file.read<float>("y"); }).ends_with("has no tensor `y`"));
}

TEST_CASE("safetensors: only the tensor asked for is read") {
    const TemporaryFolder folder;
    // 1 TiB of zeros that take no space on the disk, and one number behind them.
    constexpr std::uint64_t large = std::uint64_t{1} << 40;
    const std::string content =
        file_content(R"({"a":{"dtype":"U8","shape":[1099511627776],"data_offsets":[0,1099511627776]},)"
                     R"("b":{"dtype":"U8","shape":[1],"data_offsets":[1099511627776,1099511627777]}})",
                     0);
    write_file(folder / "a", content);
    std::error_code unsupported;
    std::filesystem::resize_file(folder / "a", content.size() + large, unsupported);
    if (unsupported) return;
    std::ofstream(folder / "a", std::ios::binary | std::ios::app) << 'x';
    CHECK(SafetensorsFile(folder / "a").read<int>("b") == std::vector<int>{'x'});
}

TEST_CASE("safetensors: a file that ends anywhere is refused") {
    const std::string whole =
        file_content(R"({"__metadata__":{"k":"v"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})", 8);
    REQUIRE(complaint(whole) == "opens");
    for (std::size_t size = 0; size < whole.size(); ++size) CHECK(complaint(whole.substr(0, size)) != "opens");
    CHECK(complaint(whole.substr(0, 7)) == "has 7 bytes, but the size of the header alone takes 8");
    CHECK(complaint(whole.substr(0, 50)) ==
          "the header claims 79 bytes, but the file has 42 after the size of the header");
    CHECK(complaint(whole.substr(0, whole.size() - 1)) ==
          "tensor `a` has the bytes [0, 8), but only 7 bytes follow the header");
}

TEST_CASE("safetensors: a header of an impossible size") {
    const std::string limit = "; the format allows 100000000";
    CHECK(complaint(std::string(8, '\xFF')) == "the header claims 18446744073709551615 bytes" + limit);
    CHECK(complaint(std::string("\x01\xE1\xF5\x05\0\0\0\0", 8)) == "the header claims 100000001 bytes" + limit);
    CHECK(complaint(std::string("\x00\xE1\xF5\x05\0\0\0\0", 8)) ==
          "the header claims 100000000 bytes, but the file has 0 after the size of the header");
}

TEST_CASE("safetensors: a header that is not JSON, or not an object") {
    CHECK(complaint("", 0) == "the header must be a JSON object that begins with `{`");
    CHECK(complaint(" {}", 0) == "the header must be a JSON object that begins with `{`");
    CHECK(complaint("[]", 0) == "the header must be a JSON object that begins with `{`");
    CHECK(complaint("{}", 0) == "opens");
    CHECK(complaint("{}  ", 0) == "opens");
    CHECK(complaint("{", 0).starts_with("the header is not valid JSON: "));
    CHECK(complaint("{}{}", 0).starts_with("the header is not valid JSON: "));
    CHECK(complaint(std::string("{}\0", 3), 0).starts_with("the header is not valid JSON: "));
    CHECK(complaint("{\"\xFF\":{}}", 0).starts_with("the header is not valid JSON: "));
    CHECK(complaint(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},})", 1)
              .starts_with("the header is not valid JSON: "));
    CHECK(complaint(R"({"a":)" + std::string(1'000'000, '['), 0) == "tensor `a`: must be an object, but is an array");
}

TEST_CASE("safetensors: fields of the wrong kind") {
    CHECK(complaint(R"({"a":3})", 0) == "tensor `a`: must be an object, but is the number 3");
    CHECK(complaint(R"({"a":null})", 0) == "tensor `a`: must be an object, but is null");
    CHECK(complaint(R"({"__metadata__":"x"})", 0) == "tensor `__metadata__`: must be an object, but is the string `x`");
    CHECK(complaint(R"({"__metadata__":{"k":true}})", 0) == "the metadata `k` must be a string, but is true or false");
    CHECK(complaint(R"({"a":{"dtype":["F32"]}})", 0) == "tensor `a`: `dtype` must be a string, but is an array");
    CHECK(complaint(R"({"a":{"dtype":null}})", 0) == "tensor `a`: `dtype` must be a string, but is null");
    CHECK(complaint(R"({"a":{"strides":[1]}})", 0) == "tensor `a`: unknown field `strides`");
    const std::string shape = "tensor `a`: `shape` must be an array of numbers >= 0, but is ";
    CHECK(complaint(R"({"a":{"shape":2}})", 0) == shape + "the number 2");
    CHECK(complaint(R"({"a":{"shape":"2"}})", 0) == shape + "the string `2`");
    CHECK(complaint(R"({"a":{"shape":[-1]}})", 0) == shape + "the number -1");
    CHECK(complaint(R"({"a":{"shape":[1.5]}})", 0) == shape + "the number 1.5");
    CHECK(complaint(R"({"a":{"shape":[2e0]}})", 0) == shape + "the number 2e0");
    CHECK(complaint(R"({"a":{"shape":[-0]}})", 0) == shape + "the number 0");
    CHECK(complaint(R"({"a":{"shape":[null]}})", 0) == shape + "null");
    CHECK(complaint(R"({"a":{"shape":[NaN]}})", 0).starts_with("the header is not valid JSON: "));
    CHECK(complaint(R"({"a":{"shape":[1e999]}})", 0).starts_with("the header is not valid JSON: "));
    CHECK(complaint("{\"a\xFF\":{}}", 0).starts_with("the header is not valid JSON: "));
    CHECK(complaint(R"({"\ud800":{}})", 0).starts_with("the header is not valid JSON: "));
    CHECK(complaint(R"({"a":)" + std::string(1'000'000, '['), 0) == "tensor `a`: must be an object, but is an array");
    CHECK(complaint(R"({"a":{"shape":)" + std::string(1'000'000, '['), 0) == shape + "an array");
    CHECK(complaint(R"({"a":{"shape":[18446744073709551616]}})", 0) == shape + "the number 18446744073709551616");
    CHECK(complaint(R"({"a":{"shape":[[1]]}})", 0) == shape + "an array");
    CHECK(complaint(R"({"a":{"shape":{}}})", 0) == shape + "an object");
    const std::string offsets = "tensor `a`: `data_offsets` must be an array of two numbers >= 0, but ";
    CHECK(complaint(R"({"a":{"data_offsets":[0,"8"]}})", 0) == offsets + "is the string `8`");
    CHECK(complaint(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0]}})", 1) == offsets + "has 1");
    CHECK(complaint(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1,2]}})", 1) == offsets + "has 3");
    CHECK(complaint(R"({"a":{"shape":[1],"data_offsets":[0,1]}})", 1) == "tensor `a`: no field `dtype`");
    CHECK(complaint(R"({"a":{"dtype":"U8","data_offsets":[0,1]}})", 1) == "tensor `a`: no field `shape`");
    CHECK(complaint(R"({"a":{"dtype":"U8","shape":[1]}})", 1) == "tensor `a`: no field `data_offsets`");
}

TEST_CASE("safetensors: names that appear twice") {
    const std::string a = R"("a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]})";
    CHECK(complaint("{" + a + "," + a + "}", 1) == "`a` appears twice in the header");
    CHECK(complaint(R"({"__metadata__":{},"__metadata__":{}})", 0) == "`__metadata__` appears twice in the header");
    CHECK(complaint(R"({"a":{"dtype":"U8","dtype":"U8"}})", 1) == "`dtype` appears twice in tensor `a`");
}

TEST_CASE("safetensors: bytes that do not fit the shape") {
    CHECK(complaint(R"({"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,20]}})", 20) ==
          "tensor `a`: F32 of shape (2, 3) has 24 bytes, but `data_offsets` [0, 20) have 20");
    CHECK(complaint(R"({"a":{"dtype":"U8","shape":[],"data_offsets":[0,0]}})", 0) ==
          "tensor `a`: U8 of shape () has 1 bytes, but `data_offsets` [0, 0) have 0");
    CHECK(complaint(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[1,0]}})", 1) ==
          "tensor `a`: the bytes [1, 0) end before they begin");
    // 2⁶⁴ + 8 bytes are 8 to a product that overflows.
    CHECK(complaint(R"({"a":{"dtype":"F64","shape":[2305843009213693953],"data_offsets":[0,8]}})", 8) ==
          "tensor `a`: F64 of shape (2305843009213693953) has more bytes than a number can count");
    CHECK(complaint(R"({"a":{"dtype":"U8","shape":[4294967296,4294967296],"data_offsets":[0,0]}})", 0) ==
          "tensor `a`: U8 of shape (4294967296, 4294967296) has more bytes than a number can count");
    CHECK(complaint(R"({"a":{"dtype":"U8","shape":[0,18446744073709551615],"data_offsets":[0,0]}})", 0) ==
          "tensor `a`: U8 of shape (0, 18446744073709551615) has more bytes than a number can count");
}

TEST_CASE("safetensors: bytes that overlap, leave a hole or lie outside") {
    const auto two = [](const std::string& a, const std::string& b, std::size_t bytes) {
        return complaint(R"({"a":{"dtype":"U8","shape":[4],"data_offsets":)" + a +
                             R"(},"b":{"dtype":"U8","shape":[4],"data_offsets":)" + b + "}}",
                         bytes);
    };
    CHECK(two("[0,4]", "[4,8]", 8) == "opens");
    CHECK(two("[4,8]", "[0,4]", 8) == "opens");
    CHECK(two("[0,4]", "[3,7]", 7) == "tensor `b` has the bytes [3, 7), which overlap [0, 4) of tensor `a`");
    CHECK(two("[0,4]", "[0,4]", 4) == "tensor `b` has the bytes [0, 4), which overlap [0, 4) of tensor `a`");
    CHECK(two("[0,4]", "[5,9]", 9) == "the bytes [4, 5) before tensor `b` belong to no tensor");
    CHECK(two("[2,6]", "[6,10]", 10) == "the bytes [0, 2) before tensor `a` belong to no tensor");
    CHECK(two("[0,4]", "[4,8]", 9) == "the bytes [8, 9) at the end belong to no tensor");
    CHECK(two("[0,4]", "[4,8]", 7) == "tensor `b` has the bytes [4, 8), but only 7 bytes follow the header");
    CHECK(two("[0,4]", "[18446744073709551610,18446744073709551614]", 8) ==
          "tensor `b` has the bytes [18446744073709551610, 18446744073709551614), but only 8 bytes follow the header");
}

TEST_CASE("safetensors: a tensor of a type that the library does not know") {
    const std::string known = R"("a":{"dtype":"U8","shape":[2],"data_offsets":[3,5]})";
    const TemporaryFolder folder;
    const auto path = folder / "a";
    write_file(path, file_content(R"({"__metadata__":{"format":"pt"},)" + known +
                                      R"(,"scale":{"dtype":"F8_E8M0","shape":[3],"data_offsets":[0,3]},)"
                                      R"("packed":{"dtype":"F4\n","shape":[2,4],"data_offsets":[5,9]}})",
                                  9));
    const SafetensorsFile file(path);
    CHECK(file.metadata().at("format") == "pt");
    CHECK(file.read<int>("a") == std::vector<int>{3, 4});
    const SafetensorsEntry& scale = file.entry("scale");
    CHECK(scale.dtype == DType::unknown);
    CHECK(scale.dtype_text == "F8_E8M0");
    CHECK(scale.shape == std::vector<Index>{3});
    CHECK(scale.size() == 3);
    CHECK(file.entry("packed").size() == 8);  // not the number of bytes
    CHECK(file.entry("packed").bytes() == 4);
    CHECK(file.read_bytes("scale") == std::vector<std::byte>{std::byte{0}, std::byte{1}, std::byte{2}});
    CHECK(message_of<FileError>([&] {
              file.read<float>("scale");
          }).ends_with(": tensor `scale` holds F8_E8M0, which does not convert to F32"));
    CHECK(message_of<FileError>([&] {
              file.read<std::uint8_t>("packed");
          }).ends_with(": tensor `packed` holds F4\\x0A, which does not convert to U8"));

    // What can be checked still is.
    const auto strange = [&](const std::string& shape, const std::string& offsets, std::size_t bytes) {
        return complaint(
            "{" + known + R"(,"s":{"dtype":"F8_E8M0","shape":)" + shape + R"(,"data_offsets":)" + offsets + "}}",
            bytes);
    };
    CHECK(strange("[1]", "[0,3]", 5) == "opens");
    write_file(path, file_content(R"({"x":{"dtype":"F4","shape":[4611686018427387904],"data_offsets":[0,0]}})", 0));
    CHECK(SafetensorsFile(path).entry("x").size() == std::size_t{1} << 62);
    CHECK(message_of<FileError>([&] {
              SafetensorsFile(path).read<float>("x");
          }).ends_with(": tensor `x` holds F4, which does not convert to F32"));

    CHECK(strange("[1]", "[0,4]", 5) == "tensor `a` has the bytes [3, 5), which overlap [0, 4) of tensor `s`");
    CHECK(strange("[1]", "[0,2]", 5) == "the bytes [2, 3) before tensor `a` belong to no tensor");
    CHECK(strange("[1]", "[5,9]", 8).starts_with("the bytes [0, 3) before tensor `a`"));
    CHECK(strange("[1]", "[3,0]", 5) == "tensor `s`: the bytes [3, 0) end before they begin");
    CHECK(strange("[-1]", "[0,3]", 5).ends_with("but is the number -1"));
    CHECK(strange("[4294967296,4294967296]", "[0,3]", 5) ==
          "tensor `s`: F8_E8M0 of shape (4294967296, 4294967296) has more bytes than a number can count");

    CHECK(message_of<ValueError>([&] {
              SafetensorsWriter(path, {{"a", DType::unknown, {1}}});
          }) == "colt5: `dtype` must be one that the library knows, but is DType::unknown");
    CHECK(SafetensorsFile(path).contains("x"));
}

TEST_CASE("safetensors: a file of another kind is called by its name") {
    const auto of = [](const std::string& beginning) { return complaint(beginning + std::string(100, '\7')); };
    const auto says = [](const std::string& message, const std::string& words) {
        CHECK(message.size() < 300);
        CHECK(message.find('\n') == std::string::npos);
        return message.find(words) != std::string::npos;
    };
    using namespace std::string_literals;
    CHECK(says(of("PK\3\4\0\0\10\10\0\0"s), "a zip archive with a pickle in it, as torch.save writes"));
    CHECK(says(of("PK\3\4\0\0\0\0\0\0"s), "as torch.save writes"));  // 67 MB, were it the size of a header
    CHECK(says(of("\x80\2\x8A\nl\xFC\x9C\x46\xF9 j\xA8P\x19."s), "a Python pickle"));
    CHECK(says(of("\x80\4\x95\x10\0\0\0\0\0\0\0}"s), "a Python pickle"));
    CHECK(says(of("GGUF\3\0\0\0"s), "a GGUF file"));
    CHECK(says(of("\x89HDF\r\n\x1A\n"), "an HDF5 file"));
    CHECK(says(of("\x93NUMPY\1\0"s), "a NumPy array"));
    CHECK(says(of("\x1F\x8B\x08\0\x10\x20\x30\x65"s), "compressed with gzip"));
    CHECK(says(of("version https://git-lfs.github.com/spec/v1\noid sha256:"), "is a Git LFS pointer"));
    CHECK(says(of("{\n  \"metadata\": {"), "looks like JSON"));
    CHECK(says(of("\n\n<!DOCTYPE html>\n<html>"), "looks like a web page"));
    CHECK(says(of("\xEF\xBB\xBF<html lang=\"en\">"), "looks like a web page"));
    // The size of a header of ours may begin like one of the shorter marks.
    CHECK(of("\x80\2\0\0\0\0\0\0"s).starts_with("the header claims 640 bytes, but the file has 100"));
    CHECK(of("<\0\0\0\0\0\0\0"s) == "the header must be a JSON object that begins with `{`");
}

TEST_CASE("safetensors: messages stay short, on one line, and whole characters") {
    const std::size_t many = 1'000'000;
    const auto short_complaint = [](const std::string& header) {
        const std::string message = complaint(header, 0);
        CHECK(message.size() < 800);
        CHECK(message.find('\n') == std::string::npos);
        return message;
    };
    CHECK(short_complaint(R"({")" + std::string(many, 'x') + R"(":3})").find("…` (1000000 bytes)") !=
          std::string::npos);
    CHECK(short_complaint(R"({"a\nb":3})") == "tensor `a\\x0Ab`: must be an object, but is the number 3");
    std::string umlauts = "x";  // so that the limit falls within a character
    for (int i = 0; i < 200; ++i) umlauts += "ä";
    CHECK(short_complaint(R"({")" + umlauts + R"(":3})").starts_with("tensor `" + umlauts.substr(0, 199) + "…` ("));
    short_complaint(R"({"a":{"shape":[)" + std::string(many, '1') + "]}}");
    short_complaint(R"({"a":{"shape":[)" + std::string(many, '1') + "x]}}");
    short_complaint(R"({"a":)" + std::string(many, 'x'));
    short_complaint(R"({"a":{"dtype":")" + std::string(many, 'x') + R"(","shape":[],"data_offsets":[1,0]}})");
    short_complaint(R"({"__metadata__":{")" + std::string(many, 'x') + R"(":3}})");
    std::string shape = "1";
    for (std::size_t i = 1; i < many; ++i) shape += ",1";
    CHECK(short_complaint(R"({"a":{"dtype":"F32","shape":[)" + shape + R"(],"data_offsets":[0,0]}})") ==
          "tensor `a`: F32 of shape (1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, …: 1000000 numbers) has 4 bytes, "
          "but `data_offsets` [0, 0) have 0");
}

TEST_CASE("safetensors: a damaged file is refused or read, and never more than that") {
    const TemporaryFolder folder;
    const auto path = folder / "a";
    save_safetensors(
        path,
        {tensor("weight", {2, 3}, std::vector<float>(6, 1.0f)), tensor("steps", {}, std::vector<std::int64_t>{5}),
         tensor("empty", {0, 4}, std::vector<bfloat16>{})},
        {{"format", "pt"}});
    const std::string whole = read_file(path);
    const std::string bytes = std::string("{}[]\",:-0129eE.\\u\xFF\x80", 20) + '\0';
    std::mt19937 random(1);
    const auto below = [&](std::size_t limit) {
        return std::uniform_int_distribution<std::size_t>(0, limit - 1)(random);
    };
    int opened = 0;
    for (int round = 0; round < 2000; ++round) {
        std::string damaged = whole;
        for (std::size_t changes = 1 + below(2); changes > 0; --changes) {
            const std::size_t at = below(damaged.size());
            const std::size_t kind = below(4);
            if (kind == 0) damaged[at] = bytes[below(bytes.size())];
            if (kind == 1) damaged.erase(at, 1 + below(4));
            if (kind == 2) damaged.insert(at, damaged.substr(below(damaged.size()), 1 + below(40)));
            if (kind == 3) damaged.resize(std::max<std::size_t>(at, 1));
        }
        // Mostly with a header of the right size, so that what follows is looked at.
        if (const auto end = damaged.rfind('}'); below(4) > 0 && end != std::string::npos && end >= 8) {
            const std::uint64_t size = end + 1 - 8;
            std::memcpy(damaged.data(), &size, sizeof(size));
        }
        write_file(path, damaged);
        try {
            const SafetensorsFile file(path);
            ++opened;
            for (const auto& [name, entry] : file.entries()) {
                CHECK(file.read_bytes(name).size() == entry.bytes());
                std::size_t size = entry.size();
                try {
                    size = file.read<double>(name).size();
                } catch (const FileError&) {
                    CHECK(entry.dtype != DType::f64);
                }
                CHECK(size == entry.size());
            }
        } catch (const FileError& error) {
            CHECK(std::string_view(error.what()).size() < 1000);
        }
    }
    CHECK(opened > 10);
    CHECK(opened < 1900);
}

TEST_CASE("safetensors: the writer keeps its caller to what was announced") {
    const TemporaryFolder folder;
    const auto path = folder / "a";
    const std::vector<float> values{1, 2};
    const auto bytes = std::as_bytes(std::span(values));
    write_file(path, "old");
    {
        SafetensorsWriter writer(path, {{"a", DType::f32, {2}}, {"b", DType::f32, {2}}});
        CHECK(message_of<ValueError>([&] { writer.write("a", bytes.first(4)); }) ==
              "colt5: `bytes` must be the 8 bytes of tensor `a`, but is 4");
        writer.write("b", bytes);
        CHECK(message_of<ValueError>([&] { writer.write("b", bytes); }) ==
              "colt5: tensor `b` was not announced, or is written already");
        CHECK(message_of<ValueError>([&] { writer.write("c", bytes); }) ==
              "colt5: tensor `c` was not announced, or is written already");
        CHECK(message_of<ValueError>([&] { writer.commit(); }) == "colt5: tensor `a` has not been written");
    }
    CHECK(read_file(path) == "old");

    using Specs = std::vector<SafetensorsSpec>;
    const auto refusal = [&](const Specs& specs) {
        return message_of<ValueError>([&] { SafetensorsWriter writer(path, specs); });
    };
    CHECK(refusal({{"a", DType::f32, {1}}, {"a", DType::f64, {2}}}) == "colt5: two tensors are called `a`");
    CHECK(refusal({{"__metadata__", DType::f32, {1}}}) == "colt5: no tensor can be called `__metadata__`");
    CHECK(refusal({{"a", DType::f32, {2, -1}}}) ==
          "colt5: `shape` must be non-negative in every dimension, but is (2, -1)");
    CHECK(refusal({{"a", DType::f32, {Index{1} << 62}}}) ==
          "colt5: `shape` must be of a size that fits into memory, but is (4611686018427387904)");
    CHECK(refusal({{"a", DType::u8, {std::numeric_limits<Index>::max()}}, {"b", DType::u8, {1}}}) ==
          "colt5: `tensors` must be of a size that fits into a file, but is more than 2^63 - 1 bytes");
    CHECK(refusal({{"\xFF", DType::f32, {1}}}).starts_with("colt5: names and metadata must be UTF-8: "));
    CHECK(read_file(path) == "old");
    CHECK(folder.number_of_files() == 1);
}
