// SPDX-License-Identifier: MIT
#pragma once

// The C interface of one module on memory of others, which colt5/library.py calls. The generated file that includes
// this one defines in namespace colt5_python: Policy, ModuleOfCall, and CountsOfCall, the module's numbers of tokens
// for one call.

#include <optional>
#include <type_traits>
#include <unordered_set>

#include "call.hpp"

#include <colt5/io/dlpack.hpp>

namespace colt5_python {

/// What calls of a module are made of.
template <typename Module, typename Counts>
struct Bridge {
    using Out = typename Module::Out;
    using Scalar = typename Out::value_type;
    using Shape = typename Out::Shape;
    static constexpr bool is_cross = requires { typename Module::InputGradients; };
    static constexpr std::size_t num_inputs = is_cross ? 2 : 1;
    using Tokens = typename Out::ConstViewType;
    using Mask = std::conditional_t<Out::rank == 4, colt5::MapMask, colt5::Mask>;

    /// A module whose parameters and gradients are bound to memory of the call that has it.
    struct Context : ContextOfPlace {
        Module module;
        typename Module::Gradients gradients;

        explicit Context(const Place& place_) : ContextOfPlace(place_), module(policy) {}

        void bind_parameters(Arguments& arguments) {
            Module::each_parameter(
                [&](const std::string&, auto& parameter) {
                    using Parameter = std::remove_cvref_t<decltype(parameter)>;
                    parameter = Parameter::adopt(arguments.template pointer<typename Parameter::value_type>(),
                                                 parameter.shape());
                },
                "", module);
        }
        void bind_gradients(Arguments& arguments) {
            Module::each_parameter(
                [&](const std::string&, const auto& parameter, auto& gradient) {
                    using Gradient = std::remove_cvref_t<decltype(gradient)>;
                    gradient =
                        Gradient::adopt(arguments.template pointer<typename Gradient::value_type>(), parameter.shape());
                },
                "", module, gradients);
        }
        /// Noise of training, by `seed`, or with `evaluates` that of evaluation.
        void set_noise(std::uint64_t seed, bool evaluates) {
            std::uint64_t router = 0;
            Module::each_parameter(SetNoise{seed, evaluates, router}, "", module);
        }

    private:
        struct SetNoise {
            std::uint64_t seed;
            bool evaluates;
            std::uint64_t& router;

            template <typename... T>
            void operator()(const std::string&, T&...) const {}
            template <typename Noise>
            void noise(const std::string&, Noise& noise) const {
                noise.seed = colt5::Seed{seed + router++};
                noise.calls = 0;
                noise.evaluates = evaluates;
            }
        };
    };

    /// What backward reads, behind a handle, which is the address of `content`: that of the tensor that PyTorch sees.
    struct alignas(256) Saved {
        std::uint8_t content = 0;
        bool is_used = false;
        Place place;  // of the forward pass, and its context, in whose workspace the activations are
        const Context* context;
        std::array<Shape, num_inputs> shapes;
        typename Module::Activations activations;
    };

    /// Where tokens, masks and parameters are now: PyTorch may have moved them since forward.
    template <typename M, typename Activations>
    static void rebind(const M& module, Activations& saved, const std::array<Tokens, num_inputs>& tokens,
                       const std::array<Mask, num_inputs>& masks) {
        if constexpr (is_cross) {
            if (!saved.clean_x) saved.x = tokens[0];
            if (!saved.clean_context) saved.context = tokens[1];
            saved.mask = masks[0];
            saved.context_mask = masks[1];
            saved.origin = colt5::ActivationsOrigin(module.policy(), module.identity(), saved.x, saved.context);
        } else if constexpr (requires { saved.grid; }) {  // its own copy of the maps
            const auto& attention = module.attention;
            saved.attention.origin =
                colt5::ActivationsOrigin(module.policy(), attention.identity(), saved.attention.tokens);
        } else if constexpr (requires { saved.attn; }) {
            rebind(module.conditional_attn, saved.attn, tokens, masks);
            rebind(module.conditional_ff, saved.ff, {saved.ff.tokens}, masks);
        } else if constexpr (requires { saved.clean_copy; }) {
            if (!saved.clean_copy) saved.tokens = tokens[0];
            saved.mask = masks[0];
            saved.origin = colt5::ActivationsOrigin(module.policy(), module.identity(), saved.tokens);
        } else {
            saved.tokens = tokens[0];
            saved.origin = colt5::ActivationsOrigin(module.policy(), module.identity(), saved.tokens);
        }
    }

    /// The handles that are in use.
    class Handles {
    public:
        static Handles& all() {
            static Handles& handles = *new Handles;
            return handles;
        }
        std::int64_t add(std::unique_ptr<Saved> saved) {
            const std::lock_guard lock(mutex_);
            live_.insert(saved.get());
            return static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(saved.release()));
        }
        /// Null if the handle is not in use.
        Saved* find(const void* handle) {
            const std::lock_guard lock(mutex_);
            return live_.count(handle) > 0 ? static_cast<Saved*>(const_cast<void*>(handle)) : nullptr;
        }
        void remove(const void* handle) {
            std::unique_ptr<Saved> saved;
            const std::lock_guard lock(mutex_);
            if (live_.erase(handle) > 0) saved.reset(static_cast<Saved*>(const_cast<void*>(handle)));
        }

    private:
        std::mutex mutex_;
        std::unordered_set<const void*> live_;
    };

    struct Inputs {
        std::array<Shape, num_inputs> shapes;
        std::array<Tokens, num_inputs> tokens;
        std::array<Mask, num_inputs> masks;  // absent: null

        explicit Inputs(Arguments& arguments) {
            for (std::size_t i = 0; i < num_inputs; ++i) {
                const auto* const data = arguments.pointer<const Scalar>();
                shapes[i] = arguments.template shape<Out::rank>();
                tokens[i] = Tokens(data, shapes[i]);
                const auto* const mask = arguments.pointer<const bool>();
                const auto of_mask = arguments.template shape<Out::rank - 1>();
                if (mask != nullptr) masks[i] = Mask(mask, of_mask);
            }
        }
    };

    static std::int64_t forward(Arguments arguments) {
        const Lease<Context> context{Place(arguments)};
        const bool save = arguments.number() != 0, evaluates = arguments.number() != 0;
        context->set_noise(static_cast<std::uint64_t>(arguments.number()), evaluates);
        const Inputs inputs(arguments);
        const auto& tokens = inputs.tokens;
        const auto& masks = inputs.masks;
        Counts counts;
        arguments.read(counts);
        auto out = Out::adopt(arguments.pointer<Scalar>(), inputs.shapes[0]);
        context->bind_parameters(arguments);
        const Module& run = context->module;

        // Noise of training is drawn by forward alone.
        const auto finish = [&](typename Module::Activations activations) -> std::int64_t {
            if (!save) return 0;
            activations.out = {};  // it is the caller's, and backward does not read it
            return Handles::all().add(std::unique_ptr<Saved>(
                new Saved{0, false, context->place, context.get(), inputs.shapes, std::move(activations)}));
        };
        const bool with_forward = save || !evaluates;
        using colt5::Residual;
        if constexpr (is_cross) {
            if (with_forward)
                return finish(run.forward(tokens[0], tokens[1], masks[0], masks[1], counts, std::move(out)));
            run(tokens[0], tokens[1], masks[0], masks[1], counts, std::move(out));
        } else if constexpr (requires { run(tokens[0], masks[0], counts, Residual::none, std::move(out)); }) {
            if (with_forward) return finish(run.forward(tokens[0], masks[0], counts, Residual::none, std::move(out)));
            run(tokens[0], masks[0], counts, Residual::none, std::move(out));
        } else {
            if (with_forward) return finish(run.forward(tokens[0], masks[0], counts, std::move(out)));
            run(tokens[0], masks[0], counts, std::move(out));
        }
        return 0;
    }

    static std::int64_t backward(Arguments arguments) {
        const Place place(arguments);
        Saved* const saved = Handles::all().find(arguments.pointer<const void>());
        const bool keep = arguments.number() != 0;
        colt5::expect_value(saved != nullptr, "saved", "what forward has saved", "a copy of it");
        colt5::expect_value(!saved->is_used, "saved", "what forward has saved",
                            "used up: an earlier backward pass has freed it");
        // Memory that is freed must not go to a workspace whose streams do not wait for this call. So what can free
        // activations is the context that made them; another one, as in another CUDA graph, only reads them.
        const bool has_streams = colt5::HasSideStream<Policy>, is_there = saved->place == place;
        const Lease<Context> context(place, has_streams && is_there ? saved->context : nullptr);
        const Inputs inputs(arguments);
        colt5::expect_value(inputs.shapes == saved->shapes, "inputs", "those of forward", "of other shapes");
        const Tokens d_out(arguments.pointer<const Scalar>(), inputs.shapes[0]);
        std::array<Out, num_inputs> d_inputs;
        for (std::size_t i = 0; i < num_inputs; ++i)
            d_inputs[i] = Out::adopt(arguments.pointer<Scalar>(), inputs.shapes[i]);
        context->bind_parameters(arguments);
        context->bind_gradients(arguments);
        rebind(context->module, saved->activations, inputs.tokens, inputs.masks);
        const auto run = [&](auto&& activations) {
            using Activations = decltype(activations);
            if constexpr (is_cross)
                context->module.backward(
                    std::forward<Activations>(activations), d_out, context->gradients,
                    typename Module::InputGradients{std::move(d_inputs[0]), std::move(d_inputs[1])});
            else
                context->module.backward(std::forward<Activations>(activations), d_out, context->gradients,
                                         std::move(d_inputs[0]));
        };
        saved->is_used = !keep;
        if (keep || (has_streams && !is_there))
            run(std::as_const(saved->activations));
        else
            run(std::move(saved->activations));
        return 0;
    }
};

using BridgeOfCall = Bridge<ModuleOfCall, CountsOfCall>;

}  // namespace colt5_python

/// The parameters in the order in which calls take them, a line each: name, tab, extents with spaces between them.
COLT5_EXPORT std::int64_t colt5_parameters(const std::int64_t* arguments) {
    using namespace colt5_python;
    return guarded([&]() -> std::int64_t {
        Arguments place(arguments);
        const Lease<BridgeOfCall::Context> context{Place(place)};
        std::string lines;
        ModuleOfCall::each_parameter(
            [&](const std::string& name, const auto& parameter) {
                lines += name + '\t';
                for (const Index extent : parameter.shape()) lines += std::to_string(extent) + ' ';
                lines += '\n';
            },
            "", context->module);
        message() = lines;
        return 0;
    });
}

/// place (4), save, evaluates, seed; of each input: data, shape, mask or 0, its shape; counts; out; parameters
COLT5_EXPORT std::int64_t colt5_forward(const std::int64_t* arguments) {
    using namespace colt5_python;
    return guarded([&] { return BridgeOfCall::forward(Arguments(arguments)); });
}

/// place (4), handle, keep; of each input: data, shape, mask or 0, its shape; d_out; of each input: its gradient;
/// parameters; their gradients, which are added to
COLT5_EXPORT std::int64_t colt5_backward(const std::int64_t* arguments) {
    using namespace colt5_python;
    return guarded([&] { return BridgeOfCall::backward(Arguments(arguments)); });
}

/// A DLPack tensor of one byte at the handle's address; whoever deletes it releases the handle.
COLT5_EXPORT void* colt5_as_tensor(std::int64_t handle) {
    namespace dlpack = colt5::dlpack;
    static std::int64_t one[1] = {1};
    void* const address = reinterpret_cast<void*>(static_cast<std::uintptr_t>(handle));
    const auto free = [](dlpack::DLManagedTensor* tensor) {
        colt5_python::BridgeOfCall::Handles::all().remove(tensor->manager_ctx);
        delete tensor;
    };
    constexpr auto type = colt5::detail::dlpack_type<std::uint8_t>();
    return new dlpack::DLManagedTensor{{address, {dlpack::kDLCPU, 0}, 1, type, one, one, 0}, address, free};
}

COLT5_EXPORT std::int64_t colt5_release_memory(const std::int64_t*) {
    return colt5_python::guarded([]() -> std::int64_t {
        colt5_python::Contexts<colt5_python::BridgeOfCall::Context>::all().release_memory();
        return 0;
    });
}
