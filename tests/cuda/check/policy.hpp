// SPDX-License-Identifier: MIT
#pragma once

#include <doctest/doctest.h>

#include <colt5/cuda.cuh>

#include <cstddef>
#include <cstdint>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "../module/block.hpp"
#include "../module/cross_attention.hpp"
#include "../module/image.hpp"
#include "../module/ragged.hpp"
#include "../module/routed.hpp"
#include "block_once.hpp"

/// What a policy promises beyond numbers, shown with a block in T: streams, devices, graphs, and what happens when
/// memory ends.
namespace cases {

using namespace colt5;
using colt5::cuda::check;

/// A graph of what `work` does on a stream. Capture fails if it waits for the device. That it asks for no memory is for
/// the caller to check.
class Graph {
public:
    template <typename Work>
    Graph(cudaStream_t stream, const Work& work) : stream_(stream) {
        check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
        work();
        check(cudaStreamEndCapture(stream, &graph_), "cudaStreamEndCapture");
        check(cudaGraphInstantiate(&executable_, graph_, 0), "cudaGraphInstantiate");
    }
    Graph(const Graph&) = delete;
    Graph& operator=(const Graph&) = delete;
    ~Graph() {
        cudaGraphExecDestroy(executable_);
        cudaGraphDestroy(graph_);
    }
    void replay() const {
        check(cudaGraphLaunch(executable_, stream_), "cudaGraphLaunch");
        check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
    }

private:
    cudaStream_t stream_;
    cudaGraph_t graph_ = nullptr;
    cudaGraphExec_t executable_ = nullptr;
};

/// Forward, and forward with backward, are captured and give on new tokens the bits of direct calls.
template <typename T>
void check_graphs() {
    BlockOnce<T> once;
    for (int round = 0; round < 3; ++round) {  // the workspace grows, and cuBLASLt's plans are made
        [[maybe_unused]] const auto out = once.infer();
        [[maybe_unused]] const auto both = once.forward_and_backward();
    }
    const std::size_t allocations = once.policy.statistics().system_allocations;
    TokensTensor<T, Cuda> out;
    typename BlockOnce<T>::Both both;
    const Graph forward(once.policy.stream(), [&] { out = once.infer(); });
    const Graph training(once.policy.stream(), [&] { both = once.forward_and_backward(); });
    CHECK(once.policy.statistics().system_allocations == allocations);
    for (const std::uint64_t seed : {2, 3}) {
        fill_normal(once.policy, once.tokens, Random(Seed{seed}));
        forward.replay();
        CHECK(once.values(out) == once.values(once.infer()));
        training.replay();
        const std::vector<double> replayed = once.values(both);
        CHECK(replayed == once.run());
    }
}

/// The first call of a policy may be captured, too.
template <typename T>
void check_graph_of_first_call() {
    BlockOnce<T> once;
    TokensTensor<T, Cuda> out;
    const Graph forward(once.policy.stream(), [&] { out = once.infer(); });
    forward.replay();
    const BlockOnce<T> other;
    CHECK(once.values(out) == other.values(other.infer()));
}

/// The same for calls of any module: `infer` gives its output, `train` the output and the gradient of the tokens.
template <typename X, typename Gradients, typename Infer, typename Train>
void check_graphs_of_calls(const Cuda& policy, X& tokens, Gradients& gradients, const Infer& infer,
                           const Train& train) {
    using Module = typename Gradients::Module;
    const auto run = [&] {
        zero_gradients<Module>(policy, gradients);
        return train();
    };
    const auto values = [&](const auto& both) {
        std::vector<std::vector<double>> all{numbers(policy, both.first), numbers(policy, both.second)};
        Module::each_parameter(
            [&](const std::string&, const auto& gradient) { all.push_back(numbers(policy, gradient)); }, "", gradients);
        return all;
    };
    fill_normal(policy, tokens, Random(Seed{1}));
    for (int round = 0; round < 3; ++round) {
        [[maybe_unused]] const auto out = infer();
        [[maybe_unused]] const auto both = run();
    }
    const std::size_t allocations = policy.statistics().system_allocations;
    decltype(infer()) out;
    decltype(train()) both;
    const Graph forward(policy.stream(), [&] { out = infer(); });
    const Graph training(policy.stream(), [&] { both = run(); });
    CHECK(policy.statistics().system_allocations == allocations);
    for (const std::uint64_t seed : {2, 3}) {
        CAPTURE(seed);
        fill_normal(policy, tokens, Random(Seed{seed}));
        forward.replay();
        CHECK(numbers(policy, out) == numbers(policy, infer()));
        training.replay();
        const auto replayed = values(both);
        CHECK(replayed == values(run()));
    }
}

/// The same for a module of tokens, or of maps, and perhaps of a context.
template <typename Module, typename X, typename... Others>
void check_graphs_of(const Cuda& policy, X tokens, const Others&... others) {
    const Module module(policy, Seed{1});
    auto gradients = module.make_gradients();
    check_graphs_of_calls(
        policy, tokens, gradients, [&] { return module(tokens, others...); },
        [&] {
            auto saved = module.forward(tokens, others...);
            auto d = module.backward(saved, saved.out, gradients);
            if constexpr (requires { d.d_context; })
                return std::pair(std::move(saved.out), std::move(d.d_x));
            else
                return std::pair(std::move(saved.out), std::move(d));
        });
}

template <typename T>
void check_graphs_of_modules() {
    const Cuda policy;
    const auto tokens = [&](Index length) { return TokensTensor<T, Cuda>(policy, {2, length, 48}); };
    check_graphs_of<ConditionalRoutedAttention<attention_with_null_tokens, T, Cuda>>(policy, tokens(300));
    check_graphs_of<ConditionalRoutedAttention<attention_with_rotary, T, Cuda>>(policy, tokens(300));
    check_graphs_of<ConditionalRoutedAttention<attention_with_query_routes, T, Cuda>>(policy, tokens(300));
    check_graphs_of<ConditionalRoutedAttention<query_routes_with_bias, T, Cuda>>(policy, tokens(300));
    check_graphs_of<ConditionalRoutedTransformerBlock<of_paper, T, Cuda>>(policy, tokens(300));
    check_graphs_of<ConditionalRoutedTransformerBlock<by_descent_in_blocks, T, Cuda>>(policy, tokens(300));
    check_graphs_of<ConditionalRoutedFeedForward<gated_config, T, Cuda>>(policy, tokens(300));
    check_graphs_of<ExpertChoice<T, Cuda>>(policy, tokens(300));
    auto context = tokens(450);
    fill_normal(policy, context, Random(Seed{5}));
    check_graphs_of<ConditionalRoutedCrossAttention<cross_with_query_routes, T, Cuda>>(policy, tokens(100), context);
    check_graphs_of<ConditionalRoutedCrossAttention<cross_conditioned, T, Cuda>>(policy, tokens(100), context);
    check_graphs_of<ConditionalRoutedCrossAttention<cross_in_blocks, T, Cuda>>(policy, tokens(100), context);
    check_graphs_of<ConditionalRoutedImageAttention<over_map, T, Cuda>>(policy,
                                                                        MapTensor<T, Cuda>(policy, {2, 17, 19, 48}));
    check_graphs_of<ConditionalRoutedImageAttention<per_window, T, Cuda>>(policy,
                                                                          MapTensor<T, Cuda>(policy, {2, 48, 17, 19}));

    using Attention = ConditionalRoutedAttention<attention_with_rotary, T, Cuda>;
    const Attention attention(policy, Seed{1});
    auto gradients = attention.make_gradients();
    const Ragged ragged(attention);
    MatrixTensor<T, Cuda> packed(policy, {140, 48});
    const std::vector<Index> offsets{0, 30, 37, 67, 67, 110, 140};  // three of 30, which do not follow each other
    check_graphs_of_calls(
        policy, packed, gradients, [&] { return ragged(packed, offsets); },
        [&] {
            auto saved = ragged.forward(packed, offsets);
            auto d = ragged.backward(saved, saved.out, gradients);
            return std::pair(std::move(saved.out), std::move(d));
        });
}

/// Ragged gives the same bits on any number of streams, also after their free memory has gone back to the system.
template <typename T>
void check_concurrent_streams() {
    using Attention = ConditionalRoutedAttention<attention_with_rotary, T, Cuda>;
    const std::vector<Index> offsets{0, 30, 37, 67, 67, 110, 140, 340};
    std::vector<double> expected;
    for (const std::size_t streams : {std::size_t{1}, std::size_t{2}, std::size_t{4}}) {
        CAPTURE(streams);
        const Cuda policy({.concurrent_streams = streams});
        const Attention attention(policy, Seed{1});
        MatrixTensor<T, Cuda> packed(policy, {340, 48});
        fill_normal(policy, packed, Random(Seed{2}));
        auto gradients = attention.make_gradients();
        const Ragged ragged(attention);
        const auto call = [&] {
            const auto saved = ragged.forward(packed, offsets);
            std::vector<double> all = numbers(policy, saved.out);
            for (const double number : numbers(policy, ragged.backward(saved, saved.out, gradients)))
                all.push_back(number);
            return all;
        };
        if (expected.empty()) expected = call();
        CHECK(call() == expected);
        policy.synchronize();
        policy.release_unused();
        CHECK(call() == expected);
    }
    for (const std::size_t streams : {std::size_t{0}, std::size_t{5}})
        CHECK_THROWS_AS(Cuda({.concurrent_streams = streams}), ValueError);
}

/// The same for routing over a row that more blocks share than fit into a cluster.
inline void check_graph_of_long_row() {
    const Cuda policy;
    TokensTensor<float, Cuda> logits(policy, {1, 1, 600'000});
    const CoordinateDescent descent;
    const auto route = [&] {
        return std::pair(top_k(policy, logits, {}, 1000),
                         coordinate_descent_forward(policy, descent, 1000.0, logits, {}).scores);
    };
    fill_normal(policy, logits, Random(Seed{1}));
    auto routed = route();
    const Graph graph(policy.stream(), [&] { routed = route(); });
    fill_normal(policy, logits, Random(Seed{2}));
    graph.replay();
    const auto directly = route();
    CHECK(to_host(policy, routed.first) == to_host(policy, directly.first));
    CHECK(to_host(policy, routed.second) == to_host(policy, directly.second));
}

/// A second call of the same shape asks the system for nothing.
template <typename T>
void check_allocations() {
    BlockOnce<T> once;
    const auto allocations = [&] { return once.policy.statistics().system_allocations; };
    once.infer();
    once.forward_and_backward();
    const std::size_t before = allocations();
    once.infer();
    once.forward_and_backward();
    CHECK(allocations() == before);
}

/// Policies side by side on one device, each with its own stream, give the bits of one alone.
template <typename T>
void check_streams() {
    const std::vector<double> expected = BlockOnce<T>().run();

    SUBCASE("from one thread, in turns") {
        BlockOnce<T> a, b;
        for (int i = 0; i < 3; ++i) {
            const auto of_a = a.forward_and_backward(), of_b = b.forward_and_backward();
            CHECK(a.values(of_a) == expected);
            CHECK(b.values(of_b) == expected);
        }
    }
    SUBCASE("from two threads at the same time") {
        int equal[2] = {0, 0};
        std::vector<std::thread> threads;
        for (int t = 0; t < 2; ++t)
            threads.emplace_back([&, t] {
                BlockOnce<T> once;
                for (int i = 0; i < 20; ++i) equal[t] += once.run() == expected;
            });
        for (std::thread& thread : threads) thread.join();
        CHECK(equal[0] == 20);
        CHECK(equal[1] == 20);
    }
    SUBCASE("on a stream of the caller's") {
        cudaStream_t stream = nullptr;
        check(cudaStreamCreate(&stream), "cudaStreamCreate");
        {
            BlockOnce<T> once(Cuda({.stream = stream}));
            CHECK(once.policy.stream() == stream);
            CHECK(once.run() == expected);
        }
        CHECK(cudaStreamSynchronize(stream) == cudaSuccess);  // it is still the caller's
        check(cudaStreamDestroy(stream), "cudaStreamDestroy");
    }
}

/// Tensors go from policy to policy by `transfer`, whatever their devices.
template <typename T>
void check_devices() {
    int devices = 0;
    check(cudaGetDeviceCount(&devices), "cudaGetDeviceCount");
    BlockOnce<T> first;
    const std::vector<double> expected = first.run();

    const Cuda other({.device = devices - 1});
    const auto moved = transfer(first.policy, other, first.tokens);
    CHECK(first.values(first.tokens) == BlockOnce<T>(other).values(moved));

    if (devices < 2) {
        MESSAGE("skipped: a block on a second device, for there is one");
        return;
    }
    BlockOnce<T> second(other);
    CHECK(second.run() == expected);
    CHECK(second.values(second.infer()) == second.values(second.block(moved)));
    int current = -1;
    check(cudaGetDevice(&current), "cudaGetDevice");
    CHECK(current == 0);
}

/// The message of the exception that `call` throws, or nothing.
template <typename Exception, typename Call>
std::string message_of(const Call& call) {
    try {
        call();
    } catch (const Exception& error) {
        return error.what();
    }
    return {};
}

inline std::size_t free_memory() {
    std::size_t free = 0, total = 0;
    check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
    return free;
}

/// When memory ends in the middle of a block, the error says so, nothing leaks and the policy goes on working.
template <typename T>
void check_out_of_memory() {
    const std::vector<double> expected = BlockOnce<T>().run();  // also loads the kernels
    check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    const std::size_t free_before = free_memory();
    {
        BlockOnce<T> once;
        CHECK(once.run() == expected);
        const std::size_t in_use = once.policy.statistics().in_use;

        const std::string of_tensor = message_of<OutOfMemory>([&] {
            TokensTensor<float, Cuda>(once.policy, {1 << 10, 1 << 20, 1 << 10});
        });
        CAPTURE(of_tensor);
        CHECK(of_tensor.find("out of memory on device 0") != std::string::npos);
        CHECK(of_tensor.find(" MiB are free") != std::string::npos);
        CHECK(of_tensor.find("a tensor of shape (1024, 1048576, 1024), 4398046511104 bytes") != std::string::npos);
        CHECK(once.policy.statistics().in_use == in_use);

        {
            // Something else takes all but 512 MiB, of which the tokens are a quarter.
            const Cuda greedy;
            const VectorTensor<std::uint8_t, Cuda> taken(greedy,
                                                         {static_cast<Index>(free_memory()) - (Index{512} << 20)});
            const Index length = (Index{128} << 20) / (2 * small_block.dim * static_cast<Index>(sizeof(T)));
            TokensTensor<T, Cuda> many(once.policy, {2, length, small_block.dim});
            set_zero(once.policy, many);
            const std::size_t with_many = once.policy.statistics().in_use;
            CHECK(message_of<OutOfMemory>([&] {
                      const auto saved = once.block.forward(many);
                      once.block.backward(saved, saved.out, once.gradients);
                  }).find("out of memory on device 0") != std::string::npos);
            CHECK(once.policy.statistics().in_use == with_many);
        }
        CHECK(once.policy.statistics().in_use == in_use);
        CHECK(once.run() == expected);
    }
    CHECK(free_memory() >= free_before);
}

/// Arguments that are found to be wrong in the middle of a block leave nothing behind.
template <typename T>
void check_exceptions() {
    BlockOnce<T> once;
    const std::vector<double> expected = once.run();
    const std::size_t in_use = once.policy.statistics().in_use;

    CHECK_THROWS_AS(once.block(once.tokens, {}, {.num_heavy_attn_tokens_kv = 0}), ValueError);
    CHECK_THROWS_AS(once.block.forward(once.tokens, {}, {.num_heavy_ff_tokens = -1}), ValueError);  // after attention
    const TokensTensor<T, Cuda> other(once.policy, {1, 300, small_block.dim});
    {
        const auto saved = once.block.forward(once.tokens);
        CHECK_THROWS_AS(once.block.backward(saved, other, once.gradients), ShapeError);
    }
    constexpr AttentionConfig wide{.dim = 64,
                                   .num_heavy_tokens_q = 8,
                                   .num_heavy_tokens_kv = 8,
                                   .light_dim_head = 16,
                                   .light_heads = 4,
                                   .heavy_dim_head = 136,
                                   .heavy_heads = 1};
    {
        const ConditionalRoutedAttention<wide, T, Cuda> attention{once.policy};
        const std::size_t with_attention = once.policy.statistics().in_use;
        CHECK_THROWS_WITH_AS(attention.forward(once.tokens),
                             "colt5: `dim_head` must be at most 128 on a GPU, but is 136", ValueError);
        CHECK(once.policy.statistics().in_use == with_attention);
    }
    CHECK(once.policy.statistics().in_use == in_use + 300 * small_block.dim * sizeof(T));
    CHECK(once.run() == expected);
}

/// A clone computes what the block does.
template <typename T>
void check_clone() {
    const BlockOnce<T> once;
    const typename BlockOnce<T>::Block copy = clone(once.policy, once.block);
    CHECK(once.values(copy(once.tokens)) == once.values(once.infer()));
}

/// Options are looked at. A call that CUDA refuses is reported with its name, file and line.
inline void check_errors() {
    int devices = 0;
    check(cudaGetDeviceCount(&devices), "cudaGetDeviceCount");
    for (const int device : {-1, devices}) {
        const std::string expected =
            "colt5: `device` must be from 0 to " + std::to_string(devices - 1) + ", but is " + std::to_string(device);
        CHECK_THROWS_WITH_AS(Cuda({.device = device}), expected.c_str(), ValueError);
    }
    CHECK_THROWS_WITH_AS(Cuda({.memory_plan = {.tokens_at_a_time = 0, .recompute = false}}),
                         "colt5: `tokens_at_a_time` must be >= 1, but is 0", ValueError);

    const std::string message = message_of<CudaError>([] { check(cudaSetDevice(1000), "cudaSetDevice"); });
    CAPTURE(message);
    CHECK(message.find("cudaSetDevice failed: invalid device ordinal") != std::string::npos);
    CHECK(message.find("check/policy.hpp:") != std::string::npos);
    CHECK(message_of<CudaError>([] {
              check(CUBLAS_STATUS_NOT_SUPPORTED, "cublasLtMatmul");
          }).find("cublasLtMatmul failed: ") != std::string::npos);
    BlockOnce<float>().run();  // and no error is left for the next call
}

}  // namespace cases
