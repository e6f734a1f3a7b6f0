// SPDX-License-Identifier: MIT
// expect: colt5: AdamW needs a module with a static each_parameter(f, prefix, m...) and with make_gradients()
// expect: colt5: MovingAverage needs a module with a static each_parameter(f, prefix, m...) and with make_gradients()
// expect: colt5: a part of a training run is a module with each_parameter(f, prefix, m...) and make_gradients()
// expect: colt5: TransformerBlockConfig.dropout must be in [0, 1)
// expect: colt5: the depth of an EncoderDecoder must be at least 1
#include "wrong.hpp"

#include <colt5/io/training.hpp>

using namespace colt5;

/// A model, or none, as it lacks one of two functions.
struct Model {
    VectorTensor<float, Cpu> weight;

    struct Gradients {
        using Module = Model;
        VectorTensor<float, Cpu> weight;
    };
#ifdef COLT5_COMPILE_FAIL_CONTROL
    Gradients make_gradients() const {
        return zeros_like_parameters(policy, *this);
    }
#endif
    template <typename F, typename... M>
    static void each_parameter(F&& f, const std::string& prefix, M&... m) {
        f(prefix + "weight", m.weight...);
    }
    Cpu policy;
};

constexpr TransformerBlockConfig config{.dim = 8,
                                        .num_heavy_attn_tokens_q = 2,
                                        .num_heavy_attn_tokens_kv = 2,
                                        .num_heavy_ff_tokens = 2,
                                        .dropout = wrong(1.0, 0.5)};
using Block = ConditionalRoutedTransformerBlock<config, float, Cpu>;

void train(const Cpu& policy, Model& model) {
    AdamW<Model> optimizer(policy, model);
    MovingAverage<Model> average(policy, model);
    save_training(policy, "run.safetensors", {}, model);
}
static_assert(complete<Block>);
static_assert(complete<EncoderDecoder<Stack<Block, 1>, wrong(std::size_t{0}, std::size_t{1})>>);
