// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <filesystem>
#include <vector>

#include <colt5/io/parameters.hpp>
#include <colt5/optim/adamw.hpp>

namespace colt5 {

// The state of AdamW in a safetensors file: `step`, and for each parameter `exp_avg.NAME` and `exp_avg_sq.NAME`, in
// torch's words, and `master.NAME` if there is a master copy. Options are not saved.

/// Saves the state of an optimizer atomically (see SafetensorsWriter).
template <typename Module, Policy P>
void save_optimizer(const P& policy, const std::filesystem::path& path, const AdamW<Module, P>& optimizer,
                    const SafetensorsMetadata& metadata = {}) {
    const auto& state = optimizer.state();
    detail::ParameterSaver<P> saver(policy);
    saver.add_number("step", static_cast<std::int64_t>(state.steps));
    saver.template add<Module>(state.mean, "exp_avg");
    saver.template add<Module>(state.square, "exp_avg_sq");
    if (optimizer.keeps_master()) saver.template add<Module>(state.master, "master");
    saver.save(path, metadata);
}

/// Restores a saved state. If anything in the file does not fit, throws one FileError that lists it all, and the
/// optimizer stays as it was.
template <typename Module, Policy P>
void load_optimizer(const P& policy, const std::filesystem::path& path, AdamW<Module, P>& optimizer) {
    const SafetensorsFile file(path);
    auto& state = optimizer.state();
    detail::ParameterLoader<P> loader(policy, file);
    loader.template add_values<std::uint64_t>(
        "step", {}, [&](const std::vector<std::uint64_t>& values) { state.steps = values[0]; });
    loader.template add<Module>(state.mean, "exp_avg");
    loader.template add<Module>(state.square, "exp_avg_sq");
    if (optimizer.keeps_master()) loader.template add<Module>(state.master, "master");
    loader.finish();
}

}  // namespace colt5
