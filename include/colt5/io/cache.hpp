// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

#include <colt5/io/parameters.hpp>
#include <colt5/module/cache.hpp>

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
/// Throws FileError where the file has another number for where tokens lie in a cache.
struct ExpectLayout {
    const SafetensorsFile& file;

    template <typename T>
    void operator()(const std::string&, const T&) const {}
    void state(const std::string& name, std::uint64_t expected) const {
        if (!file.contains(name)) return;  // an error of the loader
        if (const auto number = file.read<std::uint64_t>(name)[0]; number != expected)
            throw_file_error(file.path(), concat({"tensor ", backquoted(name), " must be ", std::to_string(expected),
                                                  " on this backend and processor, but is ", std::to_string(number)}));
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
/// stays as it was.
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
    decltype(tensors)::each_parameter(detail::ExpectLayout{file}, "", tensors);
    loader.finish();
    const auto numbers = to_host(policy, lengths);
    cache.set_lengths({numbers.begin(), numbers.end()});
}

}  // namespace colt5
