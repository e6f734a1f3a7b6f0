// SPDX-License-Identifier: MIT
#pragma once

#include <any>
#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include <colt5/core/tensor.hpp>
#include <colt5/module/module.hpp>

namespace colt5 {

/// What a Stack saves for backward.
enum class Checkpoints {
    none,   ///< the activations of all layers
    layers  ///< the output of each layer; backward recomputes the activations, which costs one more forward pass
};

/// What a layer's training noise depends on: with the same state the layer draws the same noise. It is the numbers that
/// files hold, such as the number of calls, and where the noise comes from, such as without_noise.
struct NoiseState {
    std::vector<std::uint64_t> numbers;
    std::vector<std::any> noises;

    /// Visitors of each_parameter, which save the state of a layer and give it back.
    struct Saver {
        NoiseState& to;

        template <typename... T>
        void operator()(const std::string&, const T&...) const {}
        void state(const std::string&, std::uint64_t number) const { to.numbers.push_back(number); }
        template <typename Noise>
        void noise(const std::string&, const Noise& noise) const {
            to.noises.emplace_back(noise);
        }
    };
    struct Restorer {
        const NoiseState& from;
        mutable std::size_t number = 0, noise_number = 0;

        template <typename... T>
        void operator()(const std::string&, const T&...) const {}
        void state(const std::string&, std::uint64_t& value) const { value = from.numbers[number++]; }
        template <typename Noise>
        void noise(const std::string&, Noise& value) const {
            value = std::any_cast<const Noise&>(from.noises[noise_number++]);
        }
    };
};

/// Layers of one type, such as blocks, applied one after the other:  x = layer(x). The compiler instantiates the code
/// of one layer, whatever the depth. The names of parameters begin with layers.0., layers.1. and so on.
template <typename Layer, std::size_t depth>
class Stack : public ModuleBase<Stack<Layer, depth>, typename Layer::Out::PolicyType> {
    using P = typename Layer::Out::PolicyType;
    using Base = ModuleBase<Stack, P>;
    friend Base;
    static_assert(depth >= 1, "colt5: the depth of a Stack must be at least 1");

public:
    using Out = typename Layer::Out;        // (b, n, d)
    using Counts = typename Layer::Counts;  // of each layer

    std::array<Layer, depth> layers;
    Checkpoints checkpoints = Checkpoints::none;  // what forward saves; may change between calls

    struct Gradients {
        using Module = Stack;
        std::array<typename Layer::Gradients, depth> layers;
    };

    /// What backward reads. The tokens and the mask must outlive it.
    struct Activations {
        Out out;                                            // (b, n, d)
        std::vector<typename Layer::Activations> layers;    // of each layer; empty with checkpoints
        std::vector<Out> outs;                              // with checkpoints: of each layer but the last
        std::vector<NoiseState> states;                     // with checkpoints: of each layer before it ran
        TokensView<const typename Out::value_type> tokens;  // (b, n, d)
        Mask mask;
        Counts counts;
        ActivationsOrigin origin;

        /// Calls f(prefix + the router's name, Routing) for each router. With checkpoints no Routing is saved, and f is
        /// not called.
        template <typename F>
        void each_routing(F&& f, const std::string& prefix = "") const {
            for (std::size_t i = 0; i < layers.size(); ++i) layers[i].each_routing(f, prefix + name_of_layer(i));
        }
        /// Calls f(prefix + the router's name, RouterView) for each router. With checkpoints f is not called.
        template <typename F>
        void each_router(F&& f, const std::string& prefix = "") const {
            for (std::size_t i = 0; i < layers.size(); ++i) layers[i].each_router(f, prefix + name_of_layer(i));
        }
    };

    explicit Stack(const P& policy, Seeds seeds = {}) : Stack(policy, seeds, std::make_index_sequence<depth>()) {}

    /// tokens (b, n, d), mask (b, n) or absent  →  (b, n, d). Saves nothing. `out` may hold the tensor to return, which
    /// is then written to.
    template <Viewable X>
    Out operator()(const X& tokens, Argument<Mask, P> mask = {}, const Counts& counts = {}, Out out = {}) const {
        if constexpr (depth == 1) {
            return layers[0](tokens, mask, counts, std::move(out));
        } else {
            if (out) expect_shape("out", out.shape(), tokens.shape());
            Out x = layers[0](tokens, mask, counts);
            for (std::size_t i = 1; i + 1 < depth; ++i) x = layers[i](x, mask, counts);
            return layers[depth - 1](x, mask, counts, std::move(out));
        }
    }

    /// The same, with what backward reads.
    template <typename X>
    Activations forward(X&& tokens, Kept<Mask, P> mask = {}, const Counts& counts = {}, Out given = {}) const {
        static_assert(outlives_call<X>,
                      "colt5: backward reads the tokens again: give the tensor a name, a temporary is gone by then");
        Activations saved;
        saved.mask = mask;
        saved.counts = counts;
        saved.tokens = expect<TokensView<const typename Out::value_type>, P>("tokens", tokens);
        if (given) expect_shape("out", given.shape(), tokens.shape());
        expect_parameters();  // of all layers, before the first one counts a call
        if (checkpoints == Checkpoints::layers) {
            for (std::size_t i = 0; i < depth; ++i) {
                saved.states.push_back(state_of(layers[i]));
                auto out = std::move(run(saved, i, given).out);
                (i + 1 < depth ? saved.outs.emplace_back() : saved.out) = std::move(out);
            }
        } else {
            saved.layers.reserve(depth);
            for (std::size_t i = 0; i < depth; ++i) saved.layers.push_back(run(saved, i, given));
            saved.out = std::move(saved.layers.back().out);
        }
        saved.origin = {this->policy(), identity(), saved.tokens};
        return saved;
    }

    void expect_parameters() const {
        if constexpr (requires(const Layer& layer) { layer.expect_parameters(); })
            for (const Layer& layer : layers) layer.expect_parameters();
    }

    /// What decode reads of earlier tokens in each layer.
    struct DecodeState {
        std::array<DecodeStateOf<Layer>, depth> layers;

        template <typename F, typename... States>
        static void each_tensor(F&& f, const std::string& prefix, States&... states) {
            for (std::size_t i = 0; i < depth; ++i)
                DecodeStateOf<Layer>::each_tensor(f, prefix + name_of_layer(i), states.layers[i]...);
        }
    };
    static constexpr Index model_dim = Layer::model_dim;
    /// depth times what a layer takes
    static constexpr Index cache_bytes(Index batch, Index max_length) {
        return static_cast<Index>(depth) * Layer::cache_bytes(batch, max_length);
    }
    DecodeState make_decode_state(Index batch, Index max_length) const {
        DecodeState state;
        for (std::size_t i = 0; i < depth; ++i) state.layers[i] = layers[i].make_decode_state(batch, max_length);
        return state;
    }
    Out decode_next(DecodeState& state, const NextTokens<P>& next,
                    const TokensView<const typename Out::value_type>& tokens, Out out) const {
        Out x;
        for (std::size_t i = 0; i < depth; ++i) {
            Out to = i + 1 == depth ? std::move(out) : Out();
            x = layers[i].decode_next(state.layers[i], next, i == 0 ? tokens : x.const_view(), std::move(to));
        }
        return x;
    }

    template <typename F, typename... M>
    static void each_parameter(F&& f, const std::string& prefix, M&... m) {
        for (std::size_t i = 0; i < depth; ++i)
            Layer::each_parameter(f, name_for<F>(prefix, name_of_layer(i)), m.layers[i]...);
    }

private:
    template <std::size_t... i>
    Stack(const P& policy, Seeds& seeds, std::index_sequence<i...>)
        : Base(policy), layers{(static_cast<void>(i), Layer(policy, seeds))...} {}

    static std::string name_of_layer(std::size_t i) { return "layers." + std::to_string(i) + "."; }

    /// The address of a parameter, which moving the module does not change.
    const void* identity() const {
        const void* first = nullptr;
        Layer::each_parameter(EachTensor{[&](const auto& parameter) {
                                  if (first == nullptr) first = parameter.data();
                              }},
                              "", layers[0]);
        return first;
    }

    static NoiseState state_of(const Layer& layer) {
        NoiseState state;
        Layer::each_parameter(typename NoiseState::Saver{state}, "", layer);
        return state;
    }
    /// Gives a layer the state of an earlier call, while it lives.
    class StateOfCall {
    public:
        StateOfCall(const Layer& layer, const NoiseState& state) : layer_(layer), now_(state_of(layer)) { set(state); }
        StateOfCall(const StateOfCall&) = delete;
        StateOfCall& operator=(const StateOfCall&) = delete;
        ~StateOfCall() { set(now_); }

    private:
        void set(const NoiseState& state) const {
            Layer::each_parameter(typename NoiseState::Restorer{state}, "", layer_);
        }
        const Layer& layer_;
        NoiseState now_;
    };

    /// Forward of layer i, whose input is the saved output of layer i − 1, or the tokens. The last layer writes to
    /// `given`, if that is not empty.
    template <typename Saved>
    typename Layer::Activations run(const Saved& saved, std::size_t i, Out& given) const {
        Out to = i + 1 == depth ? std::move(given) : Out();
        if (i == 0) return layers[0].forward(saved.tokens, saved.mask, saved.counts, std::move(to));
        const Out& x = saved.layers.empty() ? saved.outs[i - 1] : saved.layers[i - 1].out;
        return layers[i].forward(x, saved.mask, saved.counts, std::move(to));
    }

    template <Viewable D>
    void expect_backward(const Activations& saved, const D& d_out, const Gradients& gradients,
                         const Out& into = {}) const {
        saved.origin.expect(this->policy(), identity(), saved.tokens);
        if (!is_like<Stack>(*this, gradients)) expect_like<Stack>("gradients", *this, gradients);
        expect<TokensView<const typename Out::value_type>, P>("d_out", d_out);
        expect_shape("d_out", d_out.shape(), saved.tokens.shape());
        if (into) expect_shape("d_tokens", into.shape(), saved.tokens.shape());
    }

    /// Returns d_tokens (b, n, d).
    template <typename SomeActivations, Viewable D>
    Out compute_gradients(SomeActivations& saved, const D& d_out, Gradients& gradients, Out given = {}) const {
        detail::release(saved.out);
        Out d_x, none;
        for (std::size_t i = depth; i-- > 0;) {
            const auto through = [&](auto&& of_layer) {
                using Saved = decltype(of_layer);
                Out into = i == 0 ? std::move(given) : Out();
                if (i + 1 == depth)
                    d_x =
                        layers[i].backward(std::forward<Saved>(of_layer), d_out, gradients.layers[i], std::move(into));
                else
                    d_x = layers[i].backward(std::forward<Saved>(of_layer), d_x, gradients.layers[i], std::move(into));
            };
            if (saved.layers.empty()) {
                auto again = [&] {  // with the noise of its forward
                    const StateOfCall state(layers[i], saved.states[i]);
                    return run(saved, i, none);
                }();
                detail::release(again.out);
                through(std::move(again));
                if (i > 0) detail::release(saved.outs[i - 1]);
            } else {
                through(detail::forward_part(saved.layers[i]));
            }
        }
        return d_x;
    }
};

}  // namespace colt5
