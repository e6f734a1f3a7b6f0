// SPDX-License-Identifier: MIT
/// A second call of the same shape asks the system for no memory: not the workspace, and neither malloc nor new.
#include <atomic>
#include <cstdlib>

#include "module/checks.hpp"

// Counts every request of the whole program where the C library lets us put ourselves in between; sanitizers do so
// themselves.
#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer) || __has_feature(memory_sanitizer)
#define COLT5_SANITIZED
#endif
#endif
#if defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__) && !defined(COLT5_SANITIZED)
namespace {
std::atomic<long> requests{0};
constexpr bool requests_are_counted = true;
}  // namespace
extern "C" {
void* __libc_malloc(std::size_t);
void* __libc_calloc(std::size_t, std::size_t);
void* __libc_realloc(void*, std::size_t);
void* __libc_memalign(std::size_t, std::size_t);

void* malloc(std::size_t bytes) {
    ++requests;
    return __libc_malloc(bytes);
}
void* calloc(std::size_t count, std::size_t bytes) {
    ++requests;
    return __libc_calloc(count, bytes);
}
void* realloc(void* data, std::size_t bytes) {
    ++requests;
    return __libc_realloc(data, bytes);
}
void* aligned_alloc(std::size_t alignment, std::size_t bytes) {
    ++requests;
    return __libc_memalign(alignment, bytes);
}
int posix_memalign(void** data, std::size_t alignment, std::size_t bytes) {
    ++requests;
    *data = __libc_memalign(alignment, bytes);
    return *data != nullptr ? 0 : 12;  // ENOMEM
}
}
#else
namespace {
long requests = 0;
constexpr bool requests_are_counted = false;
}  // namespace
#endif

using namespace colt5;
using namespace support;

namespace {

#if defined(__clang__)
constexpr bool openmp_asks_for_memory = true;  // LLVM's runtime does in every parallel region
#else
constexpr bool openmp_asks_for_memory = false;
#endif

constexpr TransformerBlockConfig with(RouterType type) {
    return {.dim = 16,
            .num_heavy_attn_tokens_q = 40,
            .num_heavy_attn_tokens_kv = 50,
            .num_routed_kv = 2,
            .num_heavy_ff_tokens = 30,
            .light_dim_head = 8,
            .light_heads = 2,
            .light_window_size = 16,
            .heavy_dim_head = 8,
            .heavy_heads = 2,
            .router_type = type,
            .router_kwargs = {.sinkhorn = {.n_iters = 2}}};
}
constexpr TransformerBlockConfig by_descent = [] {
    TransformerBlockConfig config = with(RouterType::coor_descent);
    config.rotary_emb = config.light_rotary_emb = true;
    config.use_null_kv = config.use_null_q_tokens = config.use_relative_position_bias = true;
    config.multiply_keys_by_score = config.multiply_queries_by_score = true;
    return config;
}();
constexpr TransformerBlockConfig by_sinkhorn = [] {
    TransformerBlockConfig config = with(RouterType::sinkhorn);
    config.router_kwargs.route_block_size = 64;
    config.router_kwargs.sinkhorn.cosine_sim_routing = true;
    return config;
}();
constexpr TransformerBlockConfig causal = [] {
    TransformerBlockConfig config = with(RouterType::causal);
    config.use_null_kv = config.use_null_q_tokens = config.use_relative_position_bias = true;
    return config;
}();
constexpr TransformerBlockConfig gated = [] {
    TransformerBlockConfig config = with(RouterType::coor_descent);
    config.feed_forward = FeedForwardType::gated;
    return config;
}();
constexpr CrossAttentionConfig cross_config{.dim = 16,
                                            .num_tokens_q = 40,
                                            .num_tokens_kv = 50,
                                            .dim_head = 8,
                                            .heads = 2,
                                            .kv_routing_tokens = 2,
                                            .condition_kv_routing_on_queries = true,
                                            .use_null_kv = true,
                                            .multiply_keys_by_score = true,
                                            .use_relative_position_bias = true};

/// What `call` asks of the system after two calls of it.
template <typename Call>
void check_allocates_nothing(const Cpu& policy, Call&& call) {
    call();
    call();
    const std::size_t of_workspace = policy.workspace()->statistics().system_allocations;
    const long of_program = requests;
    call();
    CHECK(policy.workspace()->statistics().system_allocations == of_workspace);
    if (policy.threads() == 1 || !openmp_asks_for_memory) CHECK(static_cast<long>(requests) == of_program);
}

std::size_t bytes_in_use(const Cpu& policy) {
    return policy.workspace()->statistics().in_use;
}
/// What a tensor of so many bytes takes of a workspace.
std::size_t rounded(Index bytes) {
    return (static_cast<std::size_t>(bytes) + Cpu::Workspace::granularity - 1) / Cpu::Workspace::granularity *
           Cpu::Workspace::granularity;
}

}  // namespace

TEST_CASE("allocation: requests to the system are counted") {
    const long before = requests;
    ::operator delete(::operator new(800));  // new expressions may be optimized away, these not
    ::operator delete (::operator new (800, std::align_val_t{64}), std::align_val_t{64});
    if (requests_are_counted) CHECK(static_cast<long>(requests) == before + 2);
}

TEST_CASE_TEMPLATE("allocation: a second call of a block allocates nothing, inference keeps nothing", Block,
                   ConditionalRoutedTransformerBlock<by_descent, float, Cpu>,
                   ConditionalRoutedTransformerBlock<by_sinkhorn, double, Cpu>,
                   ConditionalRoutedTransformerBlock<causal, float, Cpu>,
                   ConditionalRoutedTransformerBlock<gated, float, Cpu>) {
    using Scalar = typename Block::Out::value_type;
    for (const int threads : {1, 2}) {
        CAPTURE(threads);
        const Cpu policy(threads, Cpu::usual_plan, Allocations::together);
        const Block block(policy);
        const auto x = normal<Scalar>(policy, std::array<Index, 3>{2, 300, 16}, 0);
        const auto some = mask_of_lengths(policy, {300, 120}, 300);
        auto gradients = block.make_gradients();
        for (const Mask mask : {Mask(), some.const_view()}) {
            check_allocates_nothing(policy, [&] { block(x, mask); });
            check_allocates_nothing(policy, [&] {
                const auto saved = block.forward(x, mask);
                block.backward(saved, x, gradients);
            });
            check_allocates_nothing(policy, [&] { block.backward(block.forward(x, mask), x, gradients); });
            check_allocates_nothing(policy, [&] { block(x, mask, {.num_heavy_ff_tokens = 20}); });
            const std::size_t before = bytes_in_use(policy);
            {
                const auto out = block(x, mask);
                CHECK(bytes_in_use(policy) == before + rounded(x.size() * static_cast<Index>(sizeof(Scalar))));
                const auto saved = block.forward(x, mask);
                CHECK(bytes_in_use(policy) > before + 2 * rounded(x.size() * static_cast<Index>(sizeof(Scalar))));
            }
            CHECK(bytes_in_use(policy) == before);
        }
    }
}

TEST_CASE("allocation: steps of decoding allocate nothing, and the cache does not grow") {
    for (const int threads : {1, 2}) {
        const Cpu policy(threads, Cpu::usual_plan, Allocations::together);
        const ConditionalRoutedTransformerBlock<causal, float, Cpu> block(policy);
        const auto x = normal<float>(policy, std::array<Index, 3>{3, 2, 16}, 0);
        const std::vector<Index> some{1, 0, 2};
        auto cache = block.make_cache(3, 10000);
        const std::size_t before = bytes_in_use(policy);
        const auto steps = [&] {
            for (int step = 0; step < 300; ++step) {
                block.decode(cache, x);
                block.decode(cache, x, some);
            }
        };
        check_allocates_nothing(policy, steps);
        block.decode(cache, x);
        CHECK(bytes_in_use(policy) == before);
    }
}

TEST_CASE("allocation: a second call of cross attention allocates nothing, inference keeps nothing") {
    for (const int threads : {1, 2}) {
        const Cpu policy(threads, Cpu::usual_plan, Allocations::together);
        const ConditionalRoutedCrossAttention<cross_config, float, Cpu> cross(policy);
        const auto x = normal<float>(policy, std::array<Index, 3>{2, 200, 16}, 0);
        const auto context = normal<float>(policy, std::array<Index, 3>{2, 300, 16}, 1);
        const auto context_mask = mask_of_lengths(policy, {300, 120}, 300);
        auto gradients = cross.make_gradients();
        const CrossAttentionCounts unrouted{200, 300};
        for (const CrossAttentionCounts& counts : {CrossAttentionCounts{}, unrouted}) {
            check_allocates_nothing(policy, [&] { cross(x, context, {}, context_mask.const_view(), counts); });
            check_allocates_nothing(policy, [&] {
                const auto saved = cross.forward(x, context, {}, context_mask.const_view(), counts);
                cross.backward(saved, x, gradients);
            });
            const std::size_t before = bytes_in_use(policy);
            const auto out = cross(x, context, {}, context_mask.const_view(), counts);
            CHECK(bytes_in_use(policy) == before + rounded(x.size() * static_cast<Index>(sizeof(float))));
        }
    }
}

TEST_CASE("allocation: a second call of Routed with experts or with a whole block allocates nothing") {
    static constexpr RoutedConfig config{.dim = 16, .num_heavy_tokens = 30, .num_routes = 3, .sequence_order = true};
    using Expert = SizedFeedForward<16, 40, float, Cpu>;
    const auto check = [&]<typename Module>(std::type_identity<Module>) {
        const Cpu policy(2, Cpu::usual_plan, Allocations::together);
        const Module module(policy);
        const auto x = normal<float>(policy, std::array<Index, 3>{2, 300, 16}, 0);
        const auto mask = mask_of_lengths(policy, {300, 120}, 300);
        auto gradients = module.make_gradients();
        check_allocates_nothing(policy, [&] { module(x, mask); });
        check_allocates_nothing(policy, [&] { module.backward(module.forward(x, mask), x, gradients); });
        const std::size_t before = bytes_in_use(policy);
        const auto out = module(x, mask);
        CHECK(bytes_in_use(policy) == before + rounded(x.size() * static_cast<Index>(sizeof(float))));
    };
    check(std::type_identity<Routed<config, float, Cpu, Expert, SizedFeedForward<16, 8, float, Cpu>>>());
    check(std::type_identity<
          Routed<config, float, Cpu, AsBranch<ConditionalRoutedTransformerBlock<by_descent, float, Cpu>>>>());
}

TEST_CASE("allocation: a second call on sequences of the same lengths allocates nothing, inference keeps nothing") {
    using Block = ConditionalRoutedTransformerBlock<by_descent, float, Cpu>;
    const std::vector<Index> lengths{100, 0, 7, 300, 300, 7}, offsets = cumulative_lengths(lengths);
    const CountsByLength<TransformerBlockCounts> counts{TokenRatio{0.25}, [](Index n) { return n / 3 + 1; }, 30};
    for (const int threads : {1, 2}) {
        CAPTURE(threads);
        const Cpu policy(threads, Cpu::usual_plan, Allocations::together);
        const Block block(policy);
        const Ragged ragged(block);
        const auto packed = normal<float>(policy, std::array{offsets.back(), Index{16}}, 0);
        const auto padded = normal<float>(policy, std::array<Index, 3>{6, 300, 16}, 0);
        auto gradients = block.make_gradients();
        const auto check = [&](const auto& x, const std::vector<Index>& numbers) {
            check_allocates_nothing(policy, [&] { ragged(x, numbers, counts); });
            auto saved = ragged.forward(x, numbers, counts);
            check_allocates_nothing(policy, [&] {
                ragged.forward_into(saved, x, numbers, counts);
                ragged.backward(saved, x, gradients);
            });
            check_allocates_nothing(policy, [&] {
                ragged.forward_into(saved, x, numbers, counts);
                ragged.backward(std::move(saved), x, gradients);
            });
            const std::size_t before = bytes_in_use(policy);
            const auto out = ragged(x, numbers, counts);
            CHECK(bytes_in_use(policy) == before + rounded(x.size() * static_cast<Index>(sizeof(float))));
        };
        check(packed, offsets);
        check(padded, lengths);

        const ConditionalRoutedCrossAttention<cross_config, float, Cpu> cross(policy);
        const Ragged ragged_cross(cross);
        auto cross_gradients = cross.make_gradients();
        auto saved = ragged_cross.forward(packed, offsets, padded, lengths);
        check_allocates_nothing(policy, [&] { ragged_cross(packed, offsets, padded, lengths); });
        check_allocates_nothing(policy, [&] {
            ragged_cross.forward_into(saved, packed, offsets, padded, lengths);
            ragged_cross.backward(std::move(saved), packed, cross_gradients);
        });
    }
}
