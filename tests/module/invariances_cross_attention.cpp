// SPDX-License-Identifier: MIT
#include "module/checks.hpp"

using namespace colt5;
using namespace support;

namespace {

constexpr CrossAttentionConfig config{
    .dim = 12, .num_tokens_q = 70, .num_tokens_kv = 40, .dim_head = 7, .heads = 2, .kv_routing_tokens = 2};
constexpr CrossAttentionConfig conditioned_config = [] {
    CrossAttentionConfig conditioned = config;
    conditioned.condition_kv_routing_on_queries = true;
    return conditioned;
}();
template <typename Scalar>
using Cross = ConditionalRoutedCrossAttention<config, Scalar, Cpu>;
template <typename Scalar>
using Conditioned = ConditionalRoutedCrossAttention<conditioned_config, Scalar, Cpu>;

template <typename Module>
using ScalarOf = typename Module::Out::value_type;

template <typename Module>
struct Results {
    typename Module::Out out;
    typename Module::InputGradients inputs;
    typename Module::Gradients gradients;
};
template <typename Module, typename T = ScalarOf<Module>>
Results<Module> run(const Module& cross, const TokensTensor<T, Cpu>& x, const TokensTensor<T, Cpu>& context,
                    const TokensTensor<T, Cpu>& d_out, Mask mask, Mask context_mask) {
    const auto saved = cross.forward(x, context, mask, context_mask);
    auto gradients = cross.make_gradients();
    auto inputs = cross.backward(saved, d_out, gradients);
    return {support::copy_of(cross.policy(), saved.out), std::move(inputs), std::move(gradients)};
}

}  // namespace

TEST_CASE_TEMPLATE("invariances, cross attention: batched equals one at a time, bit for bit", Module, Cross<float>,
                   Cross<double>, Conditioned<float>, Conditioned<double>) {
    using T = ScalarOf<Module>;
    const Cpu policy(2);
    const Module cross(policy, Seed{1});
    for (const Index queries : {5, 150})
        for (const Index keys : {6, 300}) {
            CAPTURE(queries);
            CAPTURE(keys);
            const auto x = normal<T>(policy, std::array<Index, 3>{3, queries, 12}, 0);
            const auto d_out = normal<T>(policy, x.shape(), 1);
            const auto context = normal<T>(policy, std::array<Index, 3>{3, keys, 12}, 2);
            const auto some = mask_of_lengths(policy, {queries, queries / 2, 0}, queries);
            const auto some_keys = mask_of_lengths(policy, {keys / 3, 0, keys}, keys);
            for (const bool masked : {false, true}) {
                const Mask mask = masked ? some.const_view() : Mask();
                const Mask context_mask = masked ? some_keys.const_view() : Mask();
                const auto together = run(cross, x, context, d_out, mask, context_mask);
                CHECK(same_bits(cross(x, context, mask, context_mask), together.out));
                for (Index b = 0; b < 3; ++b) {
                    const auto of = [&](const auto& tensor) { return support::copy_of(policy, sequence(tensor, b)); };
                    const auto alone = run(cross, of(x), of(context), of(d_out), mask ? sequence(mask, b) : Mask(),
                                           context_mask ? sequence(context_mask, b) : Mask());
                    CHECK(same_bits(alone.out, sequence(together.out, b)));
                    CHECK(same_bits(alone.inputs.d_x, sequence(together.inputs.d_x, b)));
                    CHECK(same_bits(alone.inputs.d_context, sequence(together.inputs.d_context, b)));
                }
            }
        }
}

TEST_CASE_TEMPLATE("invariances, cross attention: padding of queries or context never changes a real token", Module,
                   Cross<double>, Conditioned<double>) {
    const Cpu policy(2);
    const Module cross(policy, Seed{1});
    for (const Index queries : {5, 100})
        for (const Index keys : {6, 100}) {
            CAPTURE(queries);
            CAPTURE(keys);
            const auto x = normal<double>(policy, std::array<Index, 3>{2, queries, 12}, 0);
            const auto d_out = normal<double>(policy, x.shape(), 1);
            const auto context = normal<double>(policy, std::array<Index, 3>{2, keys, 12}, 2);
            const auto unpadded = run(cross, x, context, d_out, {}, {});
            for (const Index padding : {3, 80}) {
                CAPTURE(padding);
                const auto mask = mask_of_lengths(policy, {queries, queries}, queries + padding);
                const auto context_mask = mask_of_lengths(policy, {keys, keys}, keys + padding);
                const auto with_padding = [&](std::uint64_t stream) {
                    return run(cross, resized(policy, x, queries + padding, stream),
                               resized(policy, context, keys + padding, stream),
                               resized(policy, d_out, queries + padding), mask.const_view(), context_mask.const_view());
                };
                const auto padded = with_padding(5), other = with_padding(6);
                // Length, padding included, decides whether tokens are routed. Those routed without need score 1 as
                // well, but scores have gradients.
                const bool same_routing =
                    (queries > 70) == (queries + padding > 70) && (keys > 40) == (keys + padding > 40);
                for (Index b = 0; b < 2; ++b) {
                    const auto error = [&](const auto& a, const auto& e, Index length) {
                        return relative_error(MatrixView<const double>(a.const_view()[b].data(), {length, 12}),
                                              MatrixView<const double>(e.const_view()[b].data(), {length, 12}));
                    };
                    CHECK(error(padded.out, unpadded.out, queries) <= 1e-12);
                    if (!same_routing) continue;
                    CHECK(error(padded.inputs.d_x, unpadded.inputs.d_x, queries) <= 1e-12);
                    CHECK(error(padded.inputs.d_context, unpadded.inputs.d_context, keys) <= 1e-12);
                }
                // Nothing of a masked token is read: all bits are the same, those of its own rows as well.
                CHECK(same_bits(padded.out, other.out));
                CHECK(same_bits(padded.inputs.d_x, other.inputs.d_x));
                CHECK(same_bits(padded.inputs.d_context, other.inputs.d_context));
                Module::each_parameter(
                    [&](const std::string& name, const auto& of_padded, const auto& of_other, const auto& of_unpadded) {
                        CAPTURE(name);
                        CHECK(same_bits(of_padded, of_other));
                        if (same_routing) CHECK(relative_error(of_padded, of_unpadded) <= 1e-11);
                    },
                    "", padded.gradients, other.gradients, unpadded.gradients);
            }
        }
}

TEST_CASE_TEMPLATE("invariances, cross attention: padding of queries or context may hold anything", Module,
                   Cross<float>, Cross<double>, Conditioned<float>, Conditioned<double>) {
    using T = ScalarOf<Module>;
    using limits = std::numeric_limits<T>;
    const Cpu policy(2);
    const Module cross(policy, Seed{1});
    for (const Index queries : {20, 100})
        for (const Index keys : {30, 100}) {
            CAPTURE(queries);
            CAPTURE(keys);
            auto x = normal<T>(policy, std::array<Index, 3>{2, queries, 12}, 0),
                 d_out = normal<T>(policy, x.shape(), 1);
            auto context = normal<T>(policy, std::array<Index, 3>{2, keys, 12}, 2);
            const auto mask = mask_of_lengths(policy, {queries / 2, 4}, queries);
            const auto context_mask = mask_of_lengths(policy, {4, keys / 2}, keys);
            const auto fill_padding = [](TokensTensor<T, Cpu>& tokens, Mask of, T value) {
                for (Index i = 0; i < of.size(); ++i)
                    if (!of.data()[i]) std::fill_n(tokens.data() + i * 12, 12, value);
            };
            fill_padding(d_out, mask, 0);
            const auto with_padding = [&](T value) {
                fill_padding(x, mask, value);
                fill_padding(context, context_mask, value);
                return run(cross, x, context, d_out, mask.const_view(), context_mask.const_view());
            };
            const auto expected = with_padding(0);
            for (const T poison : {limits::quiet_NaN(), limits::infinity(), -limits::infinity(), T(3e38)}) {
                CAPTURE(poison);
                const auto actual = with_padding(poison);
                CHECK(same_bits(cross(x, context, mask.const_view(), context_mask.const_view()), expected.out));
                CHECK(same_bits(actual.out, expected.out));
                CHECK(same_bits(actual.inputs.d_x, expected.inputs.d_x));
                CHECK(same_bits(actual.inputs.d_context, expected.inputs.d_context));
                Module::each_parameter(
                    [](const std::string& name, const auto& of_actual, const auto& of_expected) {
                        CAPTURE(name);
                        CHECK(same_bits(of_actual, of_expected));
                    },
                    "", actual.gradients, expected.gradients);
            }
        }
}

TEST_CASE_TEMPLATE("invariances, cross attention: the same bits from run to run and with any number of threads", Module,
                   Cross<float>, Cross<double>, Conditioned<float>, Conditioned<double>) {
    using T = ScalarOf<Module>;
    const Cpu one(1);
    const auto x = normal<T>(one, std::array<Index, 3>{2, 300, 12}, 0);
    const auto d_out = normal<T>(one, x.shape(), 1);
    const auto context = normal<T>(one, std::array<Index, 3>{2, 1100, 12}, 2);
    const auto context_mask = mask_of_lengths(one, {1100, 500}, 1100);
    const auto expected = run(Module(one, Seed{1}), x, context, d_out, {}, context_mask.const_view());
    for (const int threads : {1, 2, 3}) {
        CAPTURE(threads);
        const Module cross(Cpu(threads), Seed{1});
        const auto again = run(cross, x, context, d_out, {}, context_mask.const_view());
        CHECK(same_bits(again.out, expected.out));
        CHECK(same_bits(again.inputs.d_x, expected.inputs.d_x));
        CHECK(same_bits(again.inputs.d_context, expected.inputs.d_context));
        Module::each_parameter(
            [](const std::string& name, const auto& now, const auto& then) {
                CAPTURE(name);
                CHECK(same_bits(now, then));
            },
            "", again.gradients, expected.gradients);
    }
}
