// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <filesystem>
#include <limits>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <colt5/io/parameters.hpp>
#include <colt5/module/cache.hpp>
#include <colt5/op/causal_top_k_next.hpp>

namespace colt5 {

// A cache of decode in a safetensors file: `lengths`, `max_length`, and the tensors of its state as `state.NAME`.

namespace detail {
/// Names the tensors of a cache to a ParameterSaver or a ParameterLoader.
template <typename State, typename Lengths>
struct TensorsOfCache {
    State& state;
    Lengths& lengths;

    template <typename F, typename Cache>
    static void each_parameter(F&& f, const std::string& prefix, Cache& cache) {
        f(prefix + "lengths", cache.lengths);
        std::remove_const_t<State>::each_tensor(f, prefix + "state.", cache.state);
    }
};
/// Throws FileError where the file has another number for where tokens lie in a cache, or for how they are routed.
struct ExpectSettings {
    const SafetensorsFile& file;

    template <typename T>
    void operator()(const std::string&, const T&) const {}
    void state(const std::string& name, std::uint64_t expected) const {
        if (!file.contains(name) || !file.entry(name).shape.empty()) return;  // an error of the loader
        const bool of_layout = name.ends_with("grid_of_queries") || name.ends_with("grid_of_keys");
        if (const auto number = file.read<std::uint64_t>(name)[0]; number != expected)
            throw_file_error(file.path(),
                             concat({"tensor ", backquoted(name), " must be ", std::to_string(expected),
                                     of_layout ? " on this backend and processor" : " in this configuration",
                                     ", but is ", std::to_string(number)}));
    }
};
/// Throws FileError where the file has a number that no cache of this max_length can have.
struct ExpectNumbers {
    const SafetensorsFile& file;
    std::int64_t max_length;

    template <typename T>
    void operator()(const std::string& name, const T&) const {
        if (!file.contains(name)) return;  // an error of the loader
        if (name == "lengths")
            for (const auto length : file.read<std::int64_t>(name)) expect(name, length, max_length);
        if (name.ends_with(".counts")) {  // of RoutedKeys, whose capacity is that of the positions
            const auto positions = name.substr(0, name.size() - std::string_view("counts").size()) + "positions";
            if (!file.contains(positions) || file.entry(positions).shape.empty()) return;  // likewise
            const std::int64_t capacity = file.entry(positions).shape.back();
            for (const auto count : file.read<TokenIndex>(name)) expect(name, count, capacity);
        }
        if (name.ends_with(".progress")) {
            const auto numbers = file.read<std::int64_t>(name);
            for (std::size_t i = 0; i + CausalProgress::size <= numbers.size(); i += CausalProgress::size) {
                const auto of_row = CausalProgress::load(numbers.data() + i);
                expect(name, of_row.length, max_length);
                expect(name, of_row.budget, std::int64_t{1} << 53);  // the burst is at most 10^6 tokens of 2^32 units
                expect(name, of_row.picks, std::numeric_limits<std::int64_t>::max());
                expect(name, of_row.left, of_row.picks);
            }
        }
    }
    void state(const std::string&, std::uint64_t) const {}

private:
    void expect(const std::string& name, std::int64_t number, std::int64_t most) const {
        if (number >= 0 && number <= most) return;
        throw_file_error(file.path(), concat({"tensor ", backquoted(name), " has the number ", std::to_string(number),
                                              ", which must be from 0 to ", std::to_string(most), " there"}));
    }
};
}  // namespace detail

/// Saves a cache atomically (see SafetensorsWriter). Decoding goes on from the file as if it had not stopped.
template <Policy P, typename Module>
void save_cache(const P& policy, const std::filesystem::path& path, const Cache<Module>& cache,
                const SafetensorsMetadata& metadata = {}) {
    expect_value(cache.is_whole(), "cache", "as a call of decode left it",
                 "half-written: that call threw an exception");
    using Lengths = VectorTensor<std::int64_t, P>;
    const std::vector<std::int64_t> numbers(cache.lengths().begin(), cache.lengths().end());
    const auto lengths = from_host<Lengths>(policy, {cache.batch()}, numbers);
    const detail::TensorsOfCache<const typename Module::DecodeState, const Lengths> tensors{cache.state, lengths};
    detail::ParameterSaver<P> saver(policy);
    saver.add_number("max_length", static_cast<std::int64_t>(cache.max_length()));
    saver.template add<detail::TensorsOfCache<const typename Module::DecodeState, const Lengths>>(tensors, "");
    saver.save(path, metadata);
}

/// Restores a saved cache of the same module, to a cache that was made for as many sequences of the same max_length, on
/// the same backend (on the CPU: with the same vector instructions), whose kernels tell how tokens lie in a cache. If
/// anything in the file does not fit, throws a FileError that names what was expected and what is there, and the cache
/// stays as it was. A file that does not say how many heads its keys have, and whether they are rotated, is of an
/// earlier version: it is refused, since no shape tells them apart.
template <Policy P, typename Module>
void load_cache(const P& policy, const std::filesystem::path& path, Cache<Module>& cache) {
    const SafetensorsFile file(path);
    using Lengths = VectorTensor<std::int64_t, P>;
    Lengths lengths(policy, {cache.batch()});
    detail::TensorsOfCache<typename Module::DecodeState, Lengths> tensors{cache.state, lengths};
    detail::ParameterLoader<P> loader(policy, file, detail::Loading::resume);
    std::int64_t max_length = 0;
    const std::string expected = std::to_string(cache.max_length());
    loader.add_number("max_length", max_length, expected,
                      [&](std::int64_t of_file) { return of_file == static_cast<std::int64_t>(cache.max_length()); });
    loader.template add<decltype(tensors)>(tensors, "");
    decltype(tensors)::each_parameter(detail::ExpectSettings{file}, "", tensors);
    decltype(tensors)::each_parameter(detail::ExpectNumbers{file, static_cast<std::int64_t>(cache.max_length())}, "",
                                      tensors);
    loader.finish();
    const auto numbers = to_host(policy, lengths);
    cache.set_lengths({numbers.begin(), numbers.end()});
}

}  // namespace colt5
