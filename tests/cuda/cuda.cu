// SPDX-License-Identifier: MIT
#include <colt5/cuda.cuh>

#include "bodies.hpp"

namespace {

using namespace colt5;

constexpr TransformerBlockConfig block_config{.dim = 64,
                                              .num_heavy_attn_tokens_q = 16,
                                              .num_heavy_attn_tokens_kv = 16,
                                              .num_heavy_ff_tokens = 16,
                                              .light_dim_head = 16,
                                              .light_heads = 4,
                                              .heavy_dim_head = 16,
                                              .heavy_heads = 4,
                                              .router_kwargs = {.coor_descent = {.score_scale = 0.125}}};

/// Output and input gradient of a block.
struct Both {
    TokensTensor<float, Cuda> out, d_tokens;
};

struct BlockOnce {
    BlockOnce() : gradients(block.make_gradients()) { fill_normal(policy, tokens, Random(Seed{1})); }
    Both operator()() {
        auto pass = block.forward(tokens);
        auto d_tokens = block.backward(pass, pass.out, gradients);
        return {std::move(pass.out), std::move(d_tokens)};
    }
    std::vector<float> values(const Both& both) {
        auto all = to_host(policy, both.out);
        const auto more = to_host(policy, both.d_tokens);
        all.insert(all.end(), more.begin(), more.end());
        return all;
    }
    Cuda policy;
    ConditionalRoutedTransformerBlock<block_config, float, Cuda> block{policy, Seed{0}};
    TokensTensor<float, Cuda> tokens{policy, {2, 300, block_config.dim}};
    decltype(block)::Gradients gradients;
};

}  // namespace

bool cases::graph_gives_the_same_bits() {
    BlockOnce once;
    once();  // the workspace has grown, and cuBLASLt's plans are made
    const cudaStream_t stream = once.policy.stream();
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    colt5::cuda::check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
    const Both captured = once();
    colt5::cuda::check(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
    colt5::cuda::check(cudaGraphInstantiate(&executable, graph, 0), "cudaGraphInstantiate");
    fill_normal(once.policy, once.tokens, Random(Seed{2}));
    colt5::cuda::check(cudaGraphLaunch(executable, stream), "cudaGraphLaunch");
    once.policy.synchronize();
    const bool same = once.values(captured) == once.values(once());
    cudaGraphExecDestroy(executable);
    cudaGraphDestroy(graph);
    return same;
}

std::size_t cases::allocations_of_a_second_call() {
    BlockOnce once;
    once();
    const std::size_t before = once.policy.workspace()->statistics().system_allocations;
    once();
    return once.policy.workspace()->statistics().system_allocations - before;
}

bool cases::has_gpu() {
    int count = 0;
    return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}

std::vector<cases::Case> cases::on_cuda() {
    return all_cases([](Precision precision) {
        return colt5::Cuda({.math = precision == Precision::tf32 ? colt5::MathMode::tf32 : colt5::MathMode::fp32});
    });
}
