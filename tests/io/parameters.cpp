// SPDX-License-Identifier: MIT
#include <colt5/io/parameters.hpp>

#include <algorithm>
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

/// A (2, 3) module with a tensor that is not trained.
struct WithBuffer : TinyModule<> {
    VectorTensor<float, Cpu> frequencies;

    WithBuffer() : TinyModule<>(::policy, 2, 3), frequencies(policy, {2}) { fill(policy, frequencies, 0.5); }
    template <typename Visit, typename... Objects>
    static void each_parameter(Visit&& visit, const std::string& prefix, Objects&... objects) {
        TinyModule<>::each_parameter(visit, prefix, objects...);
        if constexpr (requires { visit.buffer(prefix, objects.frequencies...); })
            visit.buffer(prefix + "frequencies", objects.frequencies...);
    }
};

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

TEST_CASE("parameters: a message lists some of very many problems") {
    const TemporaryFolder folder;
    std::vector<SafetensorsSpec> specs;
    for (int i = 0; i < 12'365; ++i) specs.push_back({"tensor." + std::to_string(i), DType::f32, {0}});
    write_zeros(folder / "a", specs);
    const std::string message = complaint(folder / "a");
    CHECK(message.starts_with("\n  tensor `to_q.weight` is missing\n  tensor `norm.gamma` is missing\n  tensor `"));
    CHECK(message.ends_with("\n  and 12347 more"));
    CHECK(std::count(message.begin(), message.end(), '\n') == 21);
}

TEST_CASE("parameters: a tensor of an unknown type is in the way of nothing but itself") {
    const TemporaryFolder folder;
    const TinyModule<> saved(policy, 1, 2);
    const auto file_with = [&](const std::string& strange) {
        const std::string header = R"({"layers.0.to_q.weight":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]},)"
                                   R"("layers.0.norm.gamma":{"dtype":"F32","shape":[2],"data_offsets":[8,16]},")" +
                                   strange + R"(":{"dtype":"F8_E8M0","shape":[4],"data_offsets":[16,20]}})";
        const std::uint64_t size = header.size();
        std::string content(reinterpret_cast<const char*>(&size), sizeof(size));
        content += header;
        content.append(reinterpret_cast<const char*>(saved.weight.data()), 8);
        content.append(reinterpret_cast<const char*>(saved.gamma.data()), 8);
        write_file(folder / "a", content + "\x7F\x7F\x7F\x7F");
    };
    file_with("layers.1.scale");
    TinyModule<> loaded(policy, 1, 2);
    fill(policy, loaded.weight, 0);
    load_parameters(policy, folder / "a", loaded, {.prefix = "layers.0"});
    CHECK(all_values(loaded) == all_values(saved));

    file_with("to_q.weight");
    CHECK(complaint(folder / "a").find("tensor `to_q.weight` must have shape (2, 3), but has (4)") !=
          std::string::npos);
    const SafetensorsFile file(folder / "a");
    detail::ParameterLoader<Cpu> loader(policy, file);
    loader.add_values<float>("to_q.weight", {4}, [](const std::vector<float>&) {});
    CHECK(message_of<FileError>([&] {
              loader.finish();
          }).ends_with(": tensor `to_q.weight` must convert to F32, but holds F8_E8M0"));
}

TEST_CASE("parameters: numbers beside parameters come back exactly, all or nothing") {
    const TemporaryFolder folder;
    const TinyModule<> saved(policy, 2, 3);
    constexpr std::uint64_t seed = 0xFFFF'FFFF'FFFF'FFFF;
    detail::ParameterSaver<Cpu> saver(policy);
    saver.template add<TinyModule<>>(saved, "block");
    saver.add_number("block.seed", seed);
    saver.add_number("block.calls", std::int64_t{-3});
    saver.save(folder / "a", {});

    const SafetensorsFile file(folder / "a");
    CHECK(file.entry("block.seed").dtype == DType::u64);
    TinyModule<> loaded(policy, 2, 3);
    fill(policy, loaded.weight, 0);
    std::uint64_t loaded_seed = 0, calls = 7;
    const auto load = [&](auto call) {
        detail::ParameterLoader<Cpu> loader(policy, file);
        loader.template add<TinyModule<>>(loaded, "block");
        loader.template add_values<std::uint64_t>("block.seed", {},
                                                  [&](const auto& values) { loaded_seed = values[0]; });
        call(loader);
        loader.finish();
    };
    const auto before = all_values(loaded);
    CHECK(message_of<FileError>([&] {
              load([](auto&) {});
          }).ends_with("tensor `block.calls` is unexpected: the module has no such parameter"));
    CHECK(message_of<FileError>([&] {
              load([&](auto& loader) {
                  loader.template add_values<std::uint64_t>("block.calls", {}, [&](const auto& v) { calls = v[0]; });
              });
          }).ends_with("tensor `block.calls` holds -3 at position 0, which U64 cannot hold"));
    CHECK(all_values(loaded) == before);
    CHECK(loaded_seed == 0);
    CHECK(calls == 7);
    std::int64_t signed_calls = 0;
    load([&](auto& loader) {
        loader.template add_values<std::int64_t>("block.calls", {}, [&](const auto& v) { signed_calls = v[0]; });
    });
    CHECK(all_values(loaded) == all_values(saved));
    CHECK(loaded_seed == seed);
    CHECK(signed_calls == -3);
}

TEST_CASE("parameters: buffers come back, too, and stay as they were where a file has none") {
    const TemporaryFolder folder;
    WithBuffer saved, loaded;
    fill(policy, saved.frequencies, 0.25);
    save_parameters(policy, folder / "a", saved);
    CHECK(SafetensorsFile(folder / "a").entry("frequencies").shape == std::vector<Index>{2});
    load_parameters(policy, folder / "a", loaded);
    CHECK(to_host(policy, loaded.frequencies) == std::vector<float>{0.25f, 0.25f});

    save_parameters(policy, folder / "b", static_cast<const TinyModule<>&>(saved));
    fill(policy, loaded.frequencies, 0.75);
    load_parameters(policy, folder / "b", loaded);
    CHECK(to_host(policy, loaded.frequencies) == std::vector<float>{0.75f, 0.75f});

    write_zeros(
        folder / "c",
        {{"to_q.weight", DType::f32, {2, 3}}, {"norm.gamma", DType::f32, {3}}, {"frequencies", DType::f32, {3}}});
    CHECK(message_of<FileError>([&] {
              load_parameters(policy, folder / "c", loaded);
          }).ends_with("tensor `frequencies` must have shape (2), but has (3)"));
    CHECK(to_host(policy, loaded.frequencies) == std::vector<float>{0.75f, 0.75f});
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
