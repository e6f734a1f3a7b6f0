// SPDX-License-Identifier: MIT
#pragma once

// A whole training run in one safetensors file, so that it can stop at any moment and go on bit for bit.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <type_traits>

#include <nlohmann/json.hpp>

#include <colt5/core/parameters.hpp>
#include <colt5/core/policy.hpp>
#include <colt5/io/adamw.hpp>
#include <colt5/io/parameters.hpp>
#include <colt5/io/safetensors.hpp>
#include <colt5/optim/adamw.hpp>
#include <colt5/optim/loss_scale.hpp>
#include <colt5/optim/moving_average.hpp>

namespace colt5 {

/// Where a run stands. Only the program that trains changes it.
struct TrainingPosition {
    std::uint64_t step = 0;    ///< steps done: where the learning-rate schedule goes on
    std::uint64_t data = 0;    ///< where the data go on, in a unit of the program: bytes, batches, epochs
    std::uint64_t stream = 0;  ///< the next stream of random numbers that the program draws (see core/random.hpp)
};

/// How a part of a run is named in the file. The parameters of a TrainableModule, and the state of its noise, are
/// `model.NAME`. The other prefixes are `optimizer.` (AdamW), `position.` (TrainingPosition), `average.`
/// (MovingAverage) and `loss_scale.` (LossScale). Specialize it for a type of your own, with
///
///     name                      constant, std::string_view: the prefix without the dot
///     add(file, prefix, part)   where prefix is name. Calls file.add<Module>(object, prefix), whose object has the
///                               parameters of Module, and file.add_number(prefix + ".number", number). To save, `part`
///                               is const
template <typename Part>
struct TrainingPart {
    static_assert(TrainableModule<Part>,
                  "colt5: a part of a training run is a module with each_parameter(f, prefix, m...) and "
                  "make_gradients(), an AdamW, a TrainingPosition, a MovingAverage, a LossScale, or a type with a "
                  "TrainingPart of its own");
    static constexpr std::string_view name = "model";
    template <typename File, typename M>
    static void add(File& file, const std::string& prefix, M& module) {
        file.template add<Part>(module, prefix);
    }
};
template <typename Module, typename P>
struct TrainingPart<AdamW<Module, P>> {
    static constexpr std::string_view name = "optimizer";
    template <typename File, typename Optimizer>
    static void add(File& file, const std::string& prefix, Optimizer& optimizer) {
        detail::add_optimizer(file, optimizer, optimizer.state(), prefix);
    }
};
template <>
struct TrainingPart<TrainingPosition> {
    static constexpr std::string_view name = "position";
    template <typename File, typename Position>
    static void add(File& file, const std::string& prefix, Position& position) {
        file.add_number(prefix + ".step", position.step);
        file.add_number(prefix + ".data", position.data);
        file.add_number(prefix + ".stream", position.stream);
    }
};

template <typename Module, typename P>
struct TrainingPart<MovingAverage<Module, P>> {
    static constexpr std::string_view name = "average";
    template <typename File, typename Average>
    static void add(File& file, const std::string& prefix, Average& average) {
        average.expect_swapped(false);
        file.add_number(prefix + ".updates", average.state().updates);
        file.template add<Module>(average.state().average, prefix);
    }
};
template <>
struct TrainingPart<LossScale> {
    static constexpr std::string_view name = "loss_scale";
    template <typename File, typename Scale>
    static void add(File& file, const std::string& prefix, Scale& scale) {
        auto& state = scale.state();
        if constexpr (std::is_const_v<Scale>)
            file.add_number(prefix + ".scale", state.scale);
        else
            file.add_number(prefix + ".scale", state.scale, "in the bounds of the options", [&scale](double value) {
                return value >= scale.options().least && value <= scale.options().most;
            });
        file.add_number(prefix + ".finite_steps", state.finite_steps);
        file.add_number(prefix + ".skipped", state.skipped);
    }
};

namespace detail {

inline constexpr std::string_view configuration_key = "configuration";

inline std::string json_text(const nlohmann::json& value) {
    try {
        return value.dump();
    } catch (const nlohmann::json::exception& error) {
        throw ValueError(concat({"colt5: the configuration must be UTF-8: ", error.what()}));
    }
}

/// Throws FileError unless the file has the same configuration.
inline void expect_configuration(const SafetensorsFile& file, const nlohmann::json& configuration) {
    const auto found = file.metadata().find(std::string(configuration_key));
    if (found == file.metadata().end()) throw_file_error(file.path(), "is not a file of save_training");
    const auto saved = nlohmann::json::parse(found->second, nullptr, false);
    if (!saved.is_object()) throw_file_error(file.path(), "has a configuration that is not a JSON object");
    const auto text_of = [](const nlohmann::json& object, const std::string& name) {
        const auto value = object.find(name);
        return value == object.end() ? "absent" : json_text(*value);
    };
    const auto expect_same = [&](const std::string& name) {
        const std::string wanted = text_of(configuration, name), is = text_of(saved, name);
        if (wanted == is) return;
        const auto place = std::mismatch(wanted.begin(), wanted.end(), is.begin(), is.end()).first - wanted.begin();
        const auto shown = [first = static_cast<std::size_t>(place)](const std::string& text) {  // the difference, too
            if (first < 100) return printable(text);
            std::size_t from = first - 20;
            while ((static_cast<unsigned char>(text[from]) & 0xC0) == 0x80) --from;  // not within a character
            return concat({"…", printable(text.substr(from))});
        };
        throw_file_error(file.path(), concat({"configuration ", backquoted(name), " must be ", shown(wanted),
                                              ", but is ", shown(is)}));
    };
    for (const auto& item : configuration.items()) expect_same(item.key());
    for (const auto& item : saved.items()) expect_same(item.key());
}

inline nlohmann::json expect_object(const nlohmann::json& configuration) {
    if (configuration.is_null()) return nlohmann::json::object();
    expect_value(configuration.is_object(), "configuration", "a JSON object", json_text(configuration));
    return configuration;
}

template <typename File, typename... Parts>
void add_parts(File& file, Parts&... parts) {
    const auto add = [&](auto& part) {
        using Part = TrainingPart<std::remove_cvref_t<decltype(part)>>;
        Part::add(file, std::string(Part::name), part);
    };
    (add(parts), ...);
}

}  // namespace detail

/// Saves a run: one or several parts, each with another TrainingPart::name. The file appears as a whole or
/// not at all: a process that is killed at any moment leaves the file that was there before (see SafetensorsWriter).
///
///     const nlohmann::json configuration{{"text", "bible"}, {"batch", 8}};
///     TrainingPosition position;
///     if (std::filesystem::exists(path)) load_training(policy, path, configuration, model, optimizer, position);
///     while (position.step < steps) {
///         optimizer.set_learning_rate(warmup_cosine(position.step, schedule));
///         …                                                             // one step
///         ++position.step;
///         if (position.step % 100 == 0) save_training(policy, path, configuration, model, optimizer, position);
///     }
///
/// `configuration` is what must be the same when the run goes on, but is not in the shapes of parameters. It is a JSON
/// object in the metadata of the file, under `configuration`. The options of an optimizer, such as its learning
/// rate, are not saved. The parameters alone: load_parameters(policy, path, model, {.prefix = "model"}).
///
/// Throws FileError if the system refuses, ValueError for two parts of one name or an average that is swapped in.
template <Policy P, typename... Parts>
void save_training(const P& policy, const std::filesystem::path& path, const nlohmann::json& configuration,
                   const Parts&... parts) {
    detail::ParameterSaver<P> saver(policy);
    detail::add_parts(saver, parts...);
    saver.save(path,
               {{std::string(detail::configuration_key), detail::json_text(detail::expect_object(configuration))}});
}

/// Restores a run, which then goes on bit for bit as if it had not stopped: parameters, the state of their noise, and
/// the other parts. They and the configuration must be those that were saved, in the same scalar types. Otherwise
/// throws FileError, of one line that names both values, and all parts stay as they were.
template <Policy P, typename... Parts>
void load_training(const P& policy, const std::filesystem::path& path, const nlohmann::json& configuration,
                   Parts&... parts) {
    const SafetensorsFile file(path);
    detail::expect_configuration(file, detail::expect_object(configuration));
    detail::ParameterLoader<P> loader(policy, file, detail::Loading::resume);
    detail::add_parts(loader, parts...);
    loader.finish();
}

}  // namespace colt5
