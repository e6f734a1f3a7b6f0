// SPDX-License-Identifier: MIT
#pragma once

#include <concepts>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

#include <colt5/core/tensor.hpp>
#include <colt5/core/view.hpp>

/// Visitors and checks of the parameters of modules and of their gradients (see module/layers.hpp).
namespace colt5 {

namespace detail {
/// A visitor that does nothing.
struct VisitNothing {
    template <typename... T>
    void operator()(const std::string&, T&...) const {}
};
}  // namespace detail

/// What an optimizer, a loader and a saver need of a module M: its parameters and their names, and its gradients. All
/// modules of the library meet it; a model of one's own meets it with
///
///     M::each_parameter(f, prefix, m...)   static; m... are modules M, or anything with the same members. Calls
///                                          f(prefix + name, tensor...) for each parameter, with that parameter's
///                                          tensor of every m, in the same order each time. A part that is a module
///                                          itself: Part::each_parameter(f, prefix + "part.", m.part...), which also
///                                          visits its state (see StateVisitor)
///     m.make_gradients()                   zeros for each parameter, float for those of 16 bits, in a type with the
///                                          same members: return zeros_like_parameters(policy, m)
///
/// Such a type of gradients says whose they are with `using Module = M;`.
template <typename M>
concept TrainableModule = requires(M& module, const M& same,
                                   decltype(std::declval<const M&>().make_gradients())& gradients) {
    M::each_parameter(detail::VisitNothing(), std::string(), module);
    M::each_parameter(detail::VisitNothing(), std::string(), same, gradients);
};

namespace detail {

/// Whether `Gradients` may be those of `Module`: of it, of its base, or they do not say whose they are.
template <typename Module, typename Gradients>
inline constexpr bool may_be_of = true;
template <typename Module, typename Gradients>
requires requires {
    typename Gradients::Module;
}
inline constexpr bool may_be_of<Module, Gradients> = std::is_base_of_v<typename Gradients::Module, Module>;

template <typename Module, typename Gradients>
struct ModuleOf {
    static_assert(may_be_of<Module, Gradients>, "colt5: these gradients are of another module than the one named");
    using type = Module;
};
template <typename Gradients>
requires requires {
    typename Gradients::Module;
}
struct ModuleOf<void, Gradients> {
    using type = typename Gradients::Module;
};
template <typename Gradients>
requires(!requires { typename Gradients::Module; }) struct ModuleOf<void, Gradients> {
    static_assert(!std::same_as<Gradients, Gradients>,
                  "colt5: these gradients do not say whose they are: name the module, as in "
                  "zero_gradients<Module>(policy, gradients), or give its Gradients a `using Module = …`");
};

}  // namespace detail

/// A visitor of parameters that sees the state of a module, too. Of a call Module::each_parameter(f, prefix, m...)
/// where `f` has a function `state`, every part of the module that has a state calls f.state(prefix + name, number...)
/// for each of its numbers, std::uint64_t: what a run needs beside parameters to go on as if it had not stopped.
/// Likewise f.buffer(prefix + name, tensor...) for each of its buffers: tensors that are not trained.
template <typename OnParameter, typename OnState, typename OnBuffer = detail::VisitNothing>
struct StateVisitor {
    OnParameter on_parameter;
    OnState on_state;
    OnBuffer on_buffer{};

    template <typename... T>
    void operator()(const std::string& name, T&... tensors) const {
        on_parameter(name, tensors...);
    }
    template <typename... T>
    void state(const std::string& name, T&... numbers) const {
        on_state(name, numbers...);
    }
    template <typename... T>
    void buffer(const std::string& name, T&... tensors) const {
        on_buffer(name, tensors...);
    }
};
template <typename OnParameter, typename OnState>
StateVisitor(OnParameter, OnState) -> StateVisitor<OnParameter, OnState>;  // clang 16 does not deduce aggregates
template <typename OnParameter, typename OnState, typename OnBuffer>
StateVisitor(OnParameter, OnState, OnBuffer) -> StateVisitor<OnParameter, OnState, OnBuffer>;

/// Calls f(prefix + name, number...) for each number of the state of some modules, side by side.
template <typename Module, typename F, typename... M>
void each_state(F&& f, const std::string& prefix, M&... m) {
    Module::each_parameter(StateVisitor{[](const std::string&, auto&...) {},
                                        [&](const std::string& name, auto&... numbers) { f(name, numbers...); }},
                           prefix, m...);
}

/// Whose gradients they are: `Module`, or what `Gradients::Module` says where it is void.
template <typename Module, typename Gradients>
using module_of_t = typename detail::ModuleOf<Module, Gradients>::type;

/// A visitor of parameters that wants the names of members: `hidden.weight` where the state_dict says `1.weight`.
template <typename F>
concept NamesMembers = requires {
    typename std::remove_cvref_t<F>::names_members;
};

/// A visitor of parameters that reads no names: long ones need not be composed for it.
template <typename F>
concept IgnoresNames = requires {
    typename std::remove_cvref_t<F>::ignores_names;
};

/// prefix + name + more + end, composed for a visitor of parameters F that reads names. One that IgnoresNames gets
/// `prefix`.
template <typename F>
decltype(auto) name_for(const std::string& prefix, [[maybe_unused]] std::string_view name,
                        [[maybe_unused]] std::string_view more = {}, [[maybe_unused]] std::string_view end = {}) {
    if constexpr (IgnoresNames<F>)
        return (prefix);
    else
        return detail::concat({prefix, name, more, end});
}

/// The first of the modules that each_parameter visits side by side.
template <typename First, typename... Others>
First& first_of(First& first, Others&...) {
    return first;
}

/// The visitor of a function of tensors, which ignores names:
///
///     Module::each_parameter(EachTensor{[&](auto& value, auto& other) { … }}, "", module, gradients);
///
/// A visitor whose type does not depend on the module, such as that of a function of the policy, is compiled once for
/// the parts that modules of several configurations have in common.
template <typename OnTensors>
struct EachTensor {
    using ignores_names = void;
    OnTensors on_tensors;

    template <typename... T>
    [[gnu::noinline]] void operator()(const std::string&, T&... tensors) const {
        on_tensors(tensors...);
    }
};
template <typename OnTensors>
EachTensor(OnTensors) -> EachTensor<OnTensors>;  // clang 16 does not deduce aggregates

namespace detail {
struct IsLike {
    using ignores_names = void;
    bool& same;

    template <typename Parameter, typename Value>
    void operator()(const std::string&, const Parameter& parameter, const Value& value) const {
        same = same && value && value.shape() == parameter.shape();
    }
};
struct ExpectGiven {
    template <typename Value>
    void operator()(const std::string& name, const Value& value) const {
        if (!value) expect_value(false, "gradients." + name, "a tensor, as of make_gradients()", "empty");
    }
};
struct ExpectLike {
    using names_members = void;
    std::string_view argument;

    template <typename Parameter, typename Value>
    void operator()(const std::string& name, const Parameter& parameter, const Value& value) const {
        if (value && value.shape() == parameter.shape()) return;
        const std::string full_name = std::string(argument) + '.' + name;
        expect_value(static_cast<bool>(value), full_name, "a tensor, as of make_gradients()", "empty");
        throw_shape_error(full_name, parameter.shape(), value.shape());
    }
};
}  // namespace detail

/// Whether expect_like would not throw. It allocates no memory: names are not composed for a visitor that IgnoresNames.
template <typename Module, typename Of, typename Other>
bool is_like(const Of& module, const Other& other) {
    bool same = true;
    const detail::IsLike is_like{same};
    Module::each_parameter(is_like, "", module, other);
    return same;
}

/// Throws unless `other`, of the structure of a module, holds a tensor of the same shape for each of `module`.
template <typename Module, typename Of, typename Other>
void expect_like(std::string_view argument, const Of& module, const Other& other) {
    if (is_like<Module>(module, other)) return;
    const detail::ExpectLike expect{argument};
    Module::each_parameter(expect, "", module, other);
}

/// Throws if any of `gradients` is empty, as those are that make_gradients() has not made.
template <typename Module, typename Gradients>
void expect_gradients(const Gradients& gradients) {
    const detail::ExpectGiven expect_given;
    Module::each_parameter(expect_given, "", gradients);
}

}  // namespace colt5
