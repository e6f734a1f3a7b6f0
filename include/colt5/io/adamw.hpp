// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <type_traits>

#include <colt5/io/parameters.hpp>
#include <colt5/optim/adamw.hpp>

namespace colt5 {

// The state of AdamW in a safetensors file: `step`, and for each parameter `exp_avg.NAME` and `exp_avg_sq.NAME`, in
// torch's words, and `master.NAME` if there is a master copy. Options are not saved.

namespace detail {
/// Names the state to a ParameterSaver or a ParameterLoader.
template <typename File, typename Module, Policy P, typename State>
void add_optimizer(File& file, const AdamW<Module, P>& optimizer, State& state, const std::string& prefix = "") {
    if constexpr (std::is_const_v<State>)
        file.add_number(joined_name(prefix, "step"), static_cast<std::int64_t>(state.steps));  // torch knows I64
    else
        file.add_number(joined_name(prefix, "step"), state.steps);
    file.template add<Module>(state.mean, joined_name(prefix, "exp_avg"));
    file.template add<Module>(state.square, joined_name(prefix, "exp_avg_sq"));
    if (optimizer.keeps_master()) file.template add<Module>(state.master, joined_name(prefix, "master"));
}
}  // namespace detail

/// Saves the state of an optimizer atomically (see SafetensorsWriter).
template <typename Module, Policy P>
void save_optimizer(const P& policy, const std::filesystem::path& path, const AdamW<Module, P>& optimizer,
                    const SafetensorsMetadata& metadata = {}) {
    detail::ParameterSaver<P> saver(policy);
    detail::add_optimizer(saver, optimizer, optimizer.state());
    saver.save(path, metadata);
}

/// Restores a saved state. If anything in the file does not fit, throws one FileError that lists it all, and the
/// optimizer stays as it was.
template <typename Module, Policy P>
void load_optimizer(const P& policy, const std::filesystem::path& path, AdamW<Module, P>& optimizer) {
    const SafetensorsFile file(path);
    detail::ParameterLoader<P> loader(policy, file);
    detail::add_optimizer(loader, optimizer, optimizer.state());
    loader.finish();
}

}  // namespace colt5
