// SPDX-License-Identifier: MIT
/// Where colt5-attention 0.2.3 is wrong, and this library is not, as far as it shows in a whole module. Of the router:
/// score ties, the router's gradient at the default initialization, precision and length of rows are in
/// tests/router/coordinate_descent_router.cpp; keys from the context and Sinkhorn routing of cross attention in
/// conditional_routed_cross_attention.cpp.
#include "golden/golden.hpp"
#include "module/checks.hpp"

using namespace colt5;
using namespace support;

namespace {

constexpr TransformerBlockConfig with(RouterType type) {
    return {.dim = 6,
            .num_heavy_attn_tokens_q = 8,
            .num_heavy_attn_tokens_kv = 9,
            .num_routed_kv = 2,
            .num_heavy_ff_tokens = 10,
            .light_dim_head = 3,
            .light_heads = 2,
            .light_window_size = 8,
            .heavy_dim_head = 3,
            .heavy_heads = 2,
            .router_type = type};
}
constexpr TransformerBlockConfig by_descent = with(RouterType::coor_descent),
                                 by_softmax = with(RouterType::cum_softmax), by_sinkhorn = with(RouterType::sinkhorn);
using DescentBlock = ConditionalRoutedTransformerBlock<by_descent, double, Cpu>;
using SoftmaxBlock = ConditionalRoutedTransformerBlock<by_softmax, double, Cpu>;
using SinkhornBlock = ConditionalRoutedTransformerBlock<by_sinkhorn, double, Cpu>;

template <typename Block>
void expect_finite(const Block& block, const typename Block::Activations& saved,
                   const TokensTensor<double, Cpu>& d_out) {
    CHECK(all_finite(saved.out));
    auto gradients = block.make_gradients();
    CHECK(all_finite(block.backward(saved, d_out, gradients)));
    Block::each_parameter(
        [](const std::string& name, const auto& gradient) {
            CAPTURE(name);
            CHECK(all_finite(gradient));
        },
        "", gradients);
}

}  // namespace

TEST_CASE("reference: several routes in a batch gather from their own sample") {
    const Cpu policy(2);
    const DescentBlock block(policy, Seed{1});
    const auto x = normal<double>(policy, std::array<Index, 3>{3, 30, 6}, 0);
    const auto out = block.conditional_attn(x);
    auto other = support::copy_of(policy, x);
    for (Index i = 0; i < 30 * 6; ++i) other.view()[0].data()[i] *= -2;
    const auto after = block.conditional_attn(other);
    CHECK_FALSE(same_bits(after.const_view()[0], out.const_view()[0]));
    for (Index b = 1; b < 3; ++b) {
        CHECK(same_bits(after.const_view()[b], out.const_view()[b]));  // another sample is none of its business
        CHECK(same_bits(block.conditional_attn(sequence(x, b)), sequence(out, b)));
    }
}

TEST_CASE_TEMPLATE("reference: masked tokens never get heavy output, whether n <= k or not", Block, DescentBlock,
                   SoftmaxBlock, SinkhornBlock) {
    const Cpu policy(2);
    const Block block(policy, Seed{1});
    for (const Index length : {5, 8, 30}) {
        CAPTURE(length);
        const auto x = normal<double>(policy, std::array<Index, 3>{2, length, 6}, 0);
        const auto mask = mask_of_lengths(policy, {3, 0}, length);
        const auto attn = block.conditional_attn(x, mask.const_view());
        const auto light_attn = block.conditional_attn.light_attn(policy, x, mask.const_view());
        const auto ff = block.conditional_ff(x, mask.const_view());
        const auto light_ff = block.conditional_ff.light_ff(policy, x);
        for (Index b = 0; b < 2; ++b)
            for (Index i = 0; i < length; ++i) {
                const bool real = mask.const_view()(b, i);
                if (real && length == 30) continue;  // may or may not be chosen
                // Sinkhorn may leave a real token out.
                if (real && Block::FeedForward::TokenRouter::picks_repeat) continue;
                CHECK(same_bits(attn.const_view()[b][i], light_attn.const_view()[b][i]) != real);
                CHECK(same_bits(ff.const_view()[b][i], light_ff.const_view()[b][i]) != real);
            }
    }
}

TEST_CASE("reference: a length that is no multiple of the window attends to no padding") {
    const Cpu policy(2);
    const DescentBlock block(policy, Seed{1});
    for (const Index length : {3, 9, 30}) {
        // Tokens that the reference pads with are zeros that take part; here they must have no weight, so that a mask
        // of real tokens changes nothing, and neither does real padding that is masked.
        const auto x = normal<double>(policy, std::array<Index, 3>{2, length, 6}, 0);
        const auto all = mask_of_lengths(policy, {length, length}, length);
        const auto out = block.conditional_attn.light_attn(policy, x, {});
        CHECK(same_bits(block.conditional_attn.light_attn(policy, x, all.const_view()), out));
        const auto longer = resized(policy, x, 40);
        const auto mask = mask_of_lengths(policy, {length, length}, 40);
        const auto padded = block.conditional_attn.light_attn(policy, longer, mask.const_view());
        for (Index b = 0; b < 2; ++b) {
            const MatrixView<const double> real(padded.const_view()[b].data(), {length, 6});
            CHECK(relative_error(real, out.const_view()[b]) <= 1e-13);
        }
    }
}

TEST_CASE_TEMPLATE("reference: a fully masked sample gives zeros and no gradient, and nothing is NaN", Block,
                   DescentBlock, SoftmaxBlock, SinkhornBlock) {
    const Cpu policy(2);
    const Block block(policy, Seed{1});
    for (const Index length : {1, 5, 30}) {
        CAPTURE(length);
        const auto x = normal<double>(policy, std::array<Index, 3>{2, length, 6}, 0);
        const auto d_out = normal<double>(policy, x.shape(), 1);
        const auto mask = mask_of_lengths(policy, {0, length}, length);
        const auto saved = block.conditional_attn.forward(x, mask.const_view());
        auto gradients = block.conditional_attn.make_gradients();
        const auto d_x = block.conditional_attn.backward(saved, d_out, gradients);
        CHECK(all_zero(saved.out.const_view()[0]));
        CHECK(all_zero(d_x.const_view()[0]));
        CHECK_FALSE(all_zero(d_x.const_view()[1]));
        expect_finite(block, block.forward(x, mask.const_view()), d_out);

        const auto none = mask_of_lengths(policy, {0, 0}, length);
        const auto nothing = block.conditional_attn.forward(x, none.const_view());
        auto zeros = block.conditional_attn.make_gradients();
        CHECK(all_zero(nothing.out));
        CHECK(all_zero(block.conditional_attn.backward(nothing, d_out, zeros)));
        Block::Attention::each_parameter([](const std::string&, const auto& gradient) { CHECK(all_zero(gradient)); },
                                         "", zeros);
        expect_finite(block, block.forward(x, none.const_view()), d_out);
    }
}

TEST_CASE_TEMPLATE("reference: a sequence shorter than the window, and than k, works", Block, DescentBlock,
                   SoftmaxBlock, SinkhornBlock) {
    const Cpu policy(2);
    const Block block(policy, Seed{1});
    for (const Index length : {1, 2, 3, 7}) {
        CAPTURE(length);
        const auto x = normal<double>(policy, std::array<Index, 3>{2, length, 6}, 0);
        const auto saved = block.forward(x);
        CHECK(saved.out.shape() == x.shape());
        expect_finite(block, saved, x);
        if constexpr (!Block::FeedForward::TokenRouter::picks_repeat) {  // every token is chosen, at score 1
            const auto ff = block.conditional_ff(x);
            auto expected = block.conditional_ff.light_ff(policy, x);
            const auto heavy = block.conditional_ff.heavy_ff(policy, x);
            for (Index i = 0; i < x.size(); ++i) expected.data()[i] += heavy.data()[i];
            CHECK(relative_error(ff, expected) <= 1e-13);
        }
    }
}

TEST_CASE("reference: parameters without a part in the loss have no gradient, parameters with one do") {
    const Cpu policy(2);
    const DescentBlock block(policy, Seed{1});
    const auto x = normal<double>(policy, std::array<Index, 3>{2, 30, 6}, 0, 0.3);
    const auto saved = block.forward(x);
    auto gradients = block.make_gradients();
    block.backward(saved, x, gradients);
    DescentBlock::each_parameter(
        [](const std::string& name, const auto& gradient) {
            CAPTURE(name);
            CHECK_FALSE(all_zero(gradient));
        },
        "", gradients);
}

TEST_CASE("golden: where a file expects nothing but zeros, zeros pass and anything else fails") {
    const std::vector<double> zeros{0, 0}, noise{0, 1e-100};
    for (const auto error : {golden::largest_error, golden::norm_error}) {
        CHECK(error(zeros, zeros) == 0);
        CHECK(error(noise, zeros) == std::numeric_limits<double>::infinity());
        CHECK(error({NAN, 0}, zeros) > 1);
        CHECK(error({1, 2}, {1, 2}) == 0);
        CHECK(error({1, 3}, {1, 2}) < 1);
    }
}
