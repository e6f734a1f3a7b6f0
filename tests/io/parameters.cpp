// SPDX-License-Identifier: MIT
#include <colt5/io/parameters.hpp>

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include <doctest/doctest.h>

#include "io/temporary_folder.hpp"
#include "optim/tiny_module.hpp"

using namespace colt5;

namespace {

const Cpu policy{1};

/// Writes tensors of zeros.
void write_zeros(const std::filesystem::path& path, const std::vector<SafetensorsSpec>& specs) {
    SafetensorsWriter writer(path, specs);
    for (const SafetensorsSpec& spec : specs) {
        std::size_t bytes = dtype_size(spec.dtype);
        for (const Index extent : spec.shape) bytes *= static_cast<std::size_t>(extent);
        writer.write(spec.name, std::vector<std::byte>(bytes));
    }
    writer.commit();
}

template <typename Object>
std::vector<double> all_values(const Object& object) {
    std::vector<double> values;
    TinyModule<>::each_parameter(
        [&](const std::string&, const auto& tensor) {
            values.insert(values.end(), tensor.data(), tensor.data() + tensor.size());
        },
        "", object);
    return values;
}

/// The exception of loading the file into a (2, 3) module, after its name; the module must stay as it was.
std::string complaint(const std::filesystem::path& path, const LoadOptions& options = {}) {
    TinyModule<> module(policy, 2, 3);
    const auto before = all_values(module);
    const std::string message = message_of<FileError>([&] { load_parameters(policy, path, module, options); });
    CHECK(all_values(module) == before);
    const std::string beginning = "colt5: " + path.string() + ": ";
    CHECK(message.starts_with(beginning));
    return message.substr(std::min(beginning.size(), message.size()));
}

}  // namespace

TEST_CASE("parameters: a module comes back bit for bit, under the names of its state_dict") {
    const TemporaryFolder folder;
    const TinyModule<> saved(policy, 5, 3);
    save_parameters(policy, folder / "a", saved, {{"format", "pt"}});

    const SafetensorsFile file(folder / "a");
    CHECK(file.metadata() == SafetensorsMetadata{{"format", "pt"}});
    CHECK(file.entries().size() == 2);
    CHECK(file.entry("to_q.weight").shape == std::vector<Index>{5, 3});
    CHECK(file.entry("norm.gamma").dtype == DType::f32);

    TinyModule<> loaded(policy, 5, 3);
    fill(policy, loaded.weight, 0);
    fill(policy, loaded.gamma, 0);
    load_parameters(policy, folder / "a", loaded);
    CHECK(all_values(loaded) == all_values(saved));
}

TEST_CASE("parameters: every floating-point type converts to the module's scalar") {
    const TemporaryFolder folder;
    const std::vector<std::uint16_t> bf16{0x3F80, 0x4000}, half{0x3C00, 0xC000};
    save_safetensors(folder / "a", {{{"to_q.weight", DType::bf16, {1, 2}}, std::as_bytes(std::span(bf16))},
                                    {{"norm.gamma", DType::f16, {2}}, std::as_bytes(std::span(half))}});
    TinyModule<double> doubles(policy, 1, 2);
    load_parameters(policy, folder / "a", doubles);
    CHECK(all_values(doubles) == std::vector<double>{1, 2, 1, -2});

    save_parameters(policy, folder / "b", doubles);
    CHECK(SafetensorsFile(folder / "b").entry("norm.gamma").dtype == DType::f64);
    TinyModule<float> floats(policy, 1, 2);
    load_parameters(policy, folder / "b", floats);
    CHECK(all_values(floats) == std::vector<double>{1, 2, 1, -2});
}

TEST_CASE("parameters: everything that is wrong is reported, and nothing changes") {
    const TemporaryFolder folder;
    write_zeros(folder / "a", {{"to_q.weight", DType::f32, {3, 2}},
                               {"norm.gamma", DType::i64, {3}},
                               {"norm.beta", DType::f32, {3}},
                               {"to_k.weight", DType::f32, {1}}});
    CHECK(complaint(folder / "a") ==
          "\n  tensor `to_q.weight` must have shape (2, 3), but has (3, 2)"
          "\n  tensor `norm.gamma` must convert to F32, but holds I64"
          "\n  tensor `norm.beta` is unexpected: the module has no such parameter"
          "\n  tensor `to_k.weight` is unexpected: the module has no such parameter");

    write_zeros(folder / "b", {{"to_q.weight", DType::f32, {2, 3}}});
    CHECK(complaint(folder / "b") == "tensor `norm.gamma` is missing");

    write_zeros(folder / "c", {{"to_q.weight", DType::f32, {2, 3}}, {"norm.gamma", DType::f32, {3, 1}}});
    CHECK(complaint(folder / "c") == "tensor `norm.gamma` must have shape (3), but has (3, 1)");

    CHECK(complaint(folder / "d") == "cannot be opened: No such file or directory");
}

TEST_CASE("parameters: a read that fails late changes nothing either") {
    const TemporaryFolder folder;
    const TinyModule<> saved(policy, 2, 3);
    save_parameters(policy, folder / "a", saved);
    const SafetensorsFile file(folder / "a");
    std::filesystem::resize_file(folder / "a", std::filesystem::file_size(folder / "a") - 1);

    TinyModule<> module(policy, 2, 3);
    fill(policy, module.weight, 7);
    const auto before = all_values(module);
    CHECK_THROWS_AS(load_parameters(policy, file, module), FileError);
    CHECK(all_values(module) == before);
}

TEST_CASE("parameters: a module out of a larger checkpoint") {
    const TemporaryFolder folder;
    const TinyModule<> saved(policy, 2, 3);
    const std::vector<float> other{1, 2};
    save_safetensors(folder / "a", {{"layers.1.to_q.weight", saved.weight},
                                    {"layers.1.norm.gamma", saved.gamma},
                                    {"layers.10.to_q.weight", VectorView<const float>(other.data(), {2})},
                                    {"to_q.weight", VectorView<const float>(other.data(), {2})}});
    for (const std::string prefix : {"layers.1", "layers.1."}) {
        TinyModule<> loaded(policy, 2, 3);
        fill(policy, loaded.weight, 0);
        load_parameters(policy, folder / "a", loaded, {.prefix = prefix});
        CHECK(all_values(loaded) == all_values(saved));
    }
    CHECK(complaint(folder / "a", {.prefix = "layers.2"}) ==
          "\n  tensor `layers.2.to_q.weight` is missing\n  tensor `layers.2.norm.gamma` is missing");
    CHECK(complaint(folder / "a", {.prefix = "layers"}).find("tensor `layers.1.norm.gamma` is unexpected") !=
          std::string::npos);
}
