// SPDX-License-Identifier: MIT
#pragma once

// Parameters of modules in safetensors files, under the names of the PyTorch package's state_dict.

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <initializer_list>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include <colt5/core/error.hpp>
#include <colt5/core/parameters.hpp>
#include <colt5/core/policy.hpp>
#include <colt5/core/random.hpp>
#include <colt5/core/tensor.hpp>
#include <colt5/core/view.hpp>
#include <colt5/io/dtype.hpp>
#include <colt5/io/file.hpp>
#include <colt5/io/safetensors.hpp>

namespace colt5 {

struct LoadOptions {
    /// Where the module stands in a larger model: with "encoder.layers.3", the parameter `to_q.weight` is read from
    /// `encoder.layers.3.to_q.weight`, and tensors elsewhere in the file are left alone. Empty: the file is the module.
    std::string prefix = {};
};

namespace detail {

/// "a" + "b" → "a.b"; an empty prefix, or one that ends in a dot already, adds none.
inline std::string joined_name(const std::string& prefix, const std::string& name) {
    return prefix.empty() || prefix.ends_with('.') ? prefix + name : prefix + "." + name;
}

/// What a ParameterLoader accepts.
enum class Loading {
    convert,  ///< other floating-point types; state and buffers may be missing. Messages list all that is wrong
    resume    ///< exactly what was saved. Messages have one line
};

/// Loads several objects from one file, all of them or none: `add` and `add_values` check names and shapes, `finish`
/// reports what is wrong, or reads all data and only then assigns. What stands in the file beside an object, under its
/// prefix, must be named by one of the calls, in any order.
template <Policy P>
class ParameterLoader {
public:
    ParameterLoader(const P& policy, const SafetensorsFile& file, Loading loading = Loading::convert)
        : policy_(policy), file_(file), loading_(loading) {}

    /// `Module` visits the parameters of `object`: a module, or something of the same structure such as gradients.
    template <typename Module, typename Object>
    void add(Object& object, const std::string& prefix) {
        beginnings_.push_back(joined_name(prefix, ""));
        Module::each_parameter(
            StateVisitor{
                [&](const std::string& name, auto& tensor) { add_tensor(joined_name(prefix, name), tensor); },
                [&](const std::string& name, std::uint64_t& number) { add_state(joined_name(prefix, name), number); },
                [&](const std::string& name, auto& buffer) { add_buffer(joined_name(prefix, name), buffer); }},
            "", object);
    }

    /// A number that must be there.
    template <typename Number>
    void add_number(const std::string& name, Number& number) {
        add_number(name, number, "", [](Number) { return true; });
    }
    /// The same, and unless `is_valid(number)` finish throws a FileError, which says that it must be `valid`.
    template <typename Number, typename IsValid>
    void add_number(const std::string& name, Number& number, std::string_view valid, IsValid is_valid) {
        const auto check = [this, name, valid, is_valid](const std::vector<Number>& values) {
            if (!is_valid(values[0]))
                throw_file_error(file_.path(), concat({"tensor ", backquoted(name), " must be ", valid, ", but is ",
                                                       value_string(values[0])}));
        };
        add_values<Number>(
            name, {}, [&number](const std::vector<Number>& values) { number = values[0]; }, check);
    }

    /// One tensor of the file, to be handed to `assign` as a vector of T.
    template <typename T, typename Assign>
    void add_values(const std::string& name, const std::vector<Index>& shape, Assign assign) {
        add_values<T>(name, shape, assign, [](const std::vector<T>&) {});
    }
    /// The same after `check`, which gets the vector and may throw.
    template <typename T, typename Assign, typename Check>
    void add_values(const std::string& name, const std::vector<Index>& shape, Assign assign, Check check) {
        expected_.insert(name);
        if (!file_.contains(name)) {
            add_problem({"tensor ", backquoted(name), " is missing"});
            return;
        }
        const SafetensorsEntry& entry = file_.entry(name);
        if (entry.shape != shape)
            add_problem({"tensor ", backquoted(name), " must have shape ", list_string(shape), ", but has ",
                         list_string(entry.shape)});
        else if (!dtype_converts_to<T>(entry.dtype))
            add_problem({"tensor ", backquoted(name), " must convert to ", dtype_name(dtype_of<T>()), ", but holds ",
                         printable(entry.dtype_text)});
        else if (loading_ == Loading::resume && is_file_float<T> && entry.dtype != dtype_of<T>())
            add_problem({"tensor ", backquoted(name), " must be ", dtype_name(dtype_of<T>()), ", but is ",
                         printable(entry.dtype_text)});
        else
            readers_.push_back([this, name, assign, check]() -> Assignment {
                auto read = file_.read<T>(name);
                check(read);
                return [assign, values = std::move(read)] { assign(values); };
            });
    }

    void finish() {
        for (const auto& named : file_.entries()) {
            const std::string& name = named.first;
            if (expected_.contains(name)) continue;
            if (loading_ == Loading::resume)
                add_problem({"tensor ", backquoted(name), " is unexpected: no part of the run has it"});
            else if (std::any_of(beginnings_.begin(), beginnings_.end(),
                                 [&](const std::string& b) { return name.starts_with(b); }))
                add_problem({"tensor ", backquoted(name), " is unexpected: the module has no such parameter"});
        }
        if (problems_ > 0 && loading_ == Loading::resume) {
            const std::string more = problems_ > 1 ? concat({", and ", std::to_string(problems_ - 1), " more"}) : "";
            throw_file_error(file_.path(), problem_list_.substr(3, problem_list_.find('\n', 3) - 3) + more);
        }
        if (problems_ > 0) {
            if (problems_ > most_problems)
                problem_list_ += concat({"\n  and ", std::to_string(problems_ - most_problems), " more"});
            throw_file_error(file_.path(), problems_ > 1 ? problem_list_ : problem_list_.substr(3));
        }
        std::vector<Assignment> assignments;
        for (const Reader& read : readers_) assignments.push_back(read());
        for (const Assignment& assign : assignments) assign();
    }

private:
    using Assignment = std::function<void()>;
    using Reader = std::function<Assignment()>;

    /// A message lists no more of them.
    static constexpr std::size_t most_problems = 20;

    void add_problem(std::initializer_list<std::string_view> what) {
        if (++problems_ <= most_problems) problem_list_.append("\n  ").append(concat(what));
    }

    /// Unless a run is resumed, a number stays as it is where the file has none.
    void add_state(const std::string& name, std::uint64_t& number) {
        if (loading_ == Loading::resume || file_.contains(name)) add_number(name, number);
    }
    /// Likewise.
    template <typename Buffer>
    void add_buffer(const std::string& name, Buffer& buffer) {
        if (loading_ == Loading::resume || file_.contains(name)) add_tensor(name, buffer);
    }
    template <typename T, Index... Extents>
    void add_tensor(const std::string& name, Tensor<T, P, Extents...>& tensor) {
        add_values<T>(name, {tensor.shape().begin(), tensor.shape().end()},
                      [this, &tensor](const std::vector<T>& values) {
                          if constexpr (std::same_as<T, bool>)  // a vector of them has no data()
                              fill_with(policy_, tensor, [&](std::size_t i) { return values[i] ? 1.0 : 0.0; });
                          else
                              upload(policy_, tensor.data(), values.data(), values.size() * sizeof(T));
                      });
    }

    const P& policy_;
    const SafetensorsFile& file_;
    Loading loading_;
    std::vector<std::string> beginnings_;  // of the names that belong to the objects
    std::set<std::string> expected_;
    std::size_t problems_ = 0;
    std::string problem_list_;  // the first of them, each on a line
    std::vector<Reader> readers_;
};

/// Saves several objects to one file, one tensor at a time.
template <Policy P>
class ParameterSaver {
public:
    explicit ParameterSaver(const P& policy) : policy_(policy) {}

    template <typename Module, typename Object>
    void add(const Object& object, const std::string& prefix) {
        Module::each_parameter(
            StateVisitor{
                [&](const std::string& name, const auto& tensor) { add_tensor(joined_name(prefix, name), tensor); },
                [&](const std::string& name, std::uint64_t number) { add_number(joined_name(prefix, name), number); },
                [&](const std::string& name, const auto& buffer) { add_tensor(joined_name(prefix, name), buffer); }},
            "", object);
    }

    template <typename Number>
    requires std::is_arithmetic_v<Number>
    void add_number(const std::string& name, Number number) {
        specs_.push_back({name, dtype_of<Number>(), {}});
        writes_.push_back(
            [name, number](SafetensorsWriter& writer) { writer.write(name, std::as_bytes(std::span(&number, 1))); });
    }

    void save(const std::filesystem::path& path, const SafetensorsMetadata& metadata) const {
        SafetensorsWriter writer(path, specs_, metadata);
        for (const auto& write : writes_) write(writer);
        writer.commit();
    }

private:
    template <typename T, Index... Extents>
    void add_tensor(const std::string& name, const Tensor<T, P, Extents...>& tensor) {
        specs_.push_back({name, dtype_of<T>(), {tensor.shape().begin(), tensor.shape().end()}});
        writes_.push_back([this, name, &tensor](SafetensorsWriter& writer) {
            const std::vector<T> values = to_host(policy_, tensor);
            if constexpr (std::same_as<T, bool>) {  // likewise
                const std::vector<unsigned char> bytes(values.begin(), values.end());
                writer.write(name, std::as_bytes(std::span(bytes)));
            } else {
                writer.write(name, std::as_bytes(std::span(values)));
            }
        });
    }

    const P& policy_;
    std::vector<SafetensorsSpec> specs_;
    std::vector<std::function<void(SafetensorsWriter&)>> writes_;
};

}  // namespace detail

/// Reads every parameter of `module` from the file under its name, converting F64, F32, F16 and BF16 to the module's
/// scalar, and the state of routers that draw noise, such as `router.noise.seed` and `router.noise.calls` (U64), where
/// the file has it: a checkpoint of PyTorch has none, and the state stays as it was. So do buffers that the file does
/// not have, such as `rotary_emb.inv_freq`. If any tensor is missing, unexpected, or of another shape or kind, throws
/// one FileError that lists them all, and the module stays as it was.
///
///     load_parameters(policy, "block.safetensors", block);
///     load_parameters(policy, "model.safetensors", block, {.prefix = "layers.0"});
template <Policy P, typename Module>
void load_parameters(const P& policy, const SafetensorsFile& file, Module& module, const LoadOptions& options = {}) {
    detail::ParameterLoader<P> loader(policy, file);
    loader.template add<Module>(module, options.prefix);
    loader.finish();
}
template <Policy P, typename Module>
void load_parameters(const P& policy, const std::filesystem::path& path, Module& module,
                     const LoadOptions& options = {}) {
    load_parameters(policy, SafetensorsFile(path), module, options);
}

/// Saves every parameter of `module` under its name, in the module's scalar, and the state beside them, which PyTorch's
/// load_state_dict passes over with strict=False; atomically (see SafetensorsWriter). A run that loads it, and the
/// optimizer (see io/adamw.hpp), goes on as if it had not stopped.
template <Policy P, typename Module>
void save_parameters(const P& policy, const std::filesystem::path& path, const Module& module,
                     const SafetensorsMetadata& metadata = {}) {
    detail::ParameterSaver<P> saver(policy);
    saver.template add<Module>(module, "");
    saver.save(path, metadata);
}

}  // namespace colt5
