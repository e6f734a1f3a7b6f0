// SPDX-License-Identifier: MIT
#include "module/checks.hpp"

/// What happens to those who use a module in the wrong way: one line that says what is wrong, and nothing has changed.

using namespace colt5;
using namespace support;

namespace {

constexpr Index dim = 8;
constexpr TransformerBlockConfig block_config{.dim = dim,
                                              .num_heavy_attn_tokens_q = 3,
                                              .num_heavy_attn_tokens_kv = 4,
                                              .num_heavy_ff_tokens = 3,
                                              .light_dim_head = 4,
                                              .light_heads = 2,
                                              .light_window_size = 4,
                                              .heavy_dim_head = 4,
                                              .heavy_heads = 2};
using Block = ConditionalRoutedTransformerBlock<block_config, double, Cpu>;
using Attention = Block::Attention;
using Feed = Block::FeedForward;
using Two = Stack<Block, 2>;
constexpr CrossAttentionConfig cross_config{
    .dim = dim, .num_tokens_q = 3, .num_tokens_kv = 4, .dim_head = 4, .heads = 2};
using Cross = ConditionalRoutedCrossAttention<cross_config, double, Cpu>;
using Tokens = HostTensor<double, 3>;

/// Cross attention of tokens over themselves is called as the other modules are.
template <typename Module, typename X>
auto forward(const Module& module, X&& x, Kept<Mask, Cpu> mask = {}) {
    if constexpr (std::same_as<Module, Cross>)
        return module.forward(x, x, mask, mask);
    else
        return module.forward(x, mask);
}
template <typename Module, typename X>
auto infer(const Module& module, const X& x, Mask mask = {}) {
    if constexpr (std::same_as<Module, Cross>)
        return module(x, x, mask, mask);
    else
        return module(x, mask);
}

/// The message of a call that throws and leaves the gradients as they were.
template <typename Error, typename Module, typename Call>
std::string refusal(typename Module::Gradients& gradients, const Module& module, const Call& call) {
    std::vector<double> before, after;
    const auto values_of = [&](std::vector<double>& values) {
        Module::each_parameter(
            [&](const std::string&, const auto& tensor) {
                values.insert(values.end(), tensor.data(), tensor.data() + tensor.size());
            },
            "", gradients);
    };
    values_of(before);
    std::string message;
    try {
        call();
    } catch (const Error& error) {
        message = error.what();
    }
    values_of(after);
    CHECK(after == before);
    static_cast<void>(module);
    return message;
}

constexpr const char* used_up =
    "colt5: `saved` must be what forward returned, but is used up: it was handed to backward, or moved from";

}  // namespace

TEST_CASE_TEMPLATE("misuse: activations that are used up, and some that forward never returned", Module, Block,
                   Attention, Feed, Cross) {
    const Cpu policy(1);
    const Module module(policy, Seed{1});
    const auto x = normal<double>(policy, std::array<Index, 3>{2, 12, dim}, 0),
               d_out = normal<double>(policy, x.shape(), 1);
    auto gradients = module.make_gradients();
    auto saved = forward(module, x);
    if constexpr (!std::same_as<Module, Cross>) {
        module.backward(std::move(saved), d_out, gradients);
        CHECK(refusal<ValueError>(gradients, module, [&] { module.backward(saved, d_out, gradients); }) == used_up);
        CHECK(refusal<ValueError>(gradients, module, [&] { module.backward(std::move(saved), d_out, gradients); }) ==
              used_up);
        saved = forward(module, x);
    }
    const auto taken = std::move(saved);
    CHECK(refusal<ValueError>(gradients, module, [&] { module.backward(saved, d_out, gradients); }) == used_up);
    module.backward(taken, d_out, gradients);
    module.backward(taken, d_out, gradients);  // what is lent can be used again
    const typename Module::Activations none{};
    CHECK(refusal<ValueError>(gradients, module, [&] { module.backward(none, d_out, gradients); }) == used_up);
}

TEST_CASE_TEMPLATE("misuse: activations of another module of the same type", Module, Block, Attention, Feed, Cross) {
    const Cpu policy(1);
    Module module(policy, Seed{1}), other(policy, Seed{1});
    const auto x = normal<double>(policy, std::array<Index, 3>{2, 12, dim}, 0),
               d_out = normal<double>(policy, x.shape(), 1);
    auto gradients = module.make_gradients();
    auto saved = forward(other, x);
    const char* const message = "colt5: `saved` must be of this module, but is of another one of its type";
    CHECK(refusal<ValueError>(gradients, module, [&] { module.backward(saved, d_out, gradients); }) == message);
    CHECK(refusal<ValueError>(gradients, module, [&] { module.backward(std::move(saved), d_out, gradients); }) ==
          message);
    const Module moved = std::move(other);  // is still the one
    moved.backward(std::move(saved), d_out, gradients);
}

TEST_CASE_TEMPLATE("misuse: activations that are handed over with their own output as d_out", Module, Block, Attention,
                   Feed) {
    const Cpu policy(1);
    const Module module(policy, Seed{1});
    const auto x = normal<double>(policy, std::array<Index, 3>{2, 12, dim}, 0);
    auto gradients = module.make_gradients();
    auto saved = forward(module, x);
    const char* const message =
        "colt5: `d_out` must be another tensor than the output that is handed over, but is that output";
    CHECK(refusal<ValueError>(gradients, module, [&] { module.backward(std::move(saved), saved.out, gradients); }) ==
          message);
    const auto view = saved.out.const_view();
    CHECK(refusal<ValueError>(gradients, module, [&] { module.backward(std::move(saved), view, gradients); }) ==
          message);
    const auto d = module.backward(saved, saved.out, gradients);  // of what is lent, it may be
    CHECK(all_finite(d));
}

TEST_CASE_TEMPLATE("misuse: a tensor for the gradient of another shape", Module, Block, Attention, Feed, Two) {
    const Cpu policy(1);
    const Module module(policy, Seed{1});
    const auto x = normal<double>(policy, std::array<Index, 3>{2, 12, dim}, 0),
               d_out = normal<double>(policy, x.shape(), 1);
    auto gradients = module.make_gradients();
    auto saved = forward(module, x);
    CHECK(refusal<ShapeError>(
              gradients, module,
              [&] {
                  module.backward(std::move(saved), d_out, gradients, typename Module::Out(policy, {2, 13, dim}));
              }) == "colt5: `d_tokens` must have shape (2, 12, " + std::to_string(dim) + "), but has (2, 13, " +
                        std::to_string(dim) + ")");
    module.backward(std::move(saved), d_out, gradients);  // it was not used up
}

TEST_CASE_TEMPLATE("misuse: gradients that nobody has made", Module, Block, Attention, Feed, Cross) {
    const Cpu policy(1);
    const Module module(policy, Seed{1});
    const auto x = normal<double>(policy, std::array<Index, 3>{2, 12, dim}, 0),
               d_out = normal<double>(policy, x.shape(), 1);
    typename Module::Gradients none;
    auto gradients = module.make_gradients();
    const auto saved = forward(module, x);
    const std::string message = refusal<ValueError>(gradients, module, [&] { module.backward(saved, d_out, none); });
    CHECK(message.starts_with("colt5: `gradients."));
    CHECK(message.ends_with("` must be a tensor, as of make_gradients(), but is empty"));
}

TEST_CASE_TEMPLATE("misuse: a view of null has a name", Module, Block, Attention, Feed, Cross) {
    const Cpu policy(1);
    const Module module(policy, Seed{1});
    const auto x = normal<double>(policy, std::array<Index, 3>{2, 12, dim}, 0);
    auto gradients = module.make_gradients();
    const TokensView<const double> null(nullptr, {2, 12, dim});
    const Mask null_mask(nullptr, {2, 12});
    const std::string of_tokens = std::string("colt5: `") + (std::same_as<Module, Cross> ? "x" : "tokens") +
                                  "` must be a view of data, but is null";
    CHECK(refusal<ValueError>(gradients, module, [&] { infer(module, null); }) == of_tokens);
    CHECK(refusal<ValueError>(gradients, module, [&] { forward(module, null); }) == of_tokens);
    const char* const of_mask = "colt5: `mask` must be a view of data, but is null";
    CHECK(refusal<ValueError>(gradients, module, [&] { infer(module, x, null_mask); }) == of_mask);
    CHECK(refusal<ValueError>(gradients, module, [&] { forward(module, x, null_mask); }) == of_mask);
    const auto saved = forward(module, x);
    CHECK(refusal<ValueError>(gradients, module, [&] { module.backward(saved, null, gradients); }) ==
          "colt5: `d_out` must be a view of data, but is null");
    if constexpr (std::same_as<Module, Cross>) {
        CHECK(refusal<ValueError>(gradients, module, [&] { module(x, null); }) ==
              "colt5: `context` must be a view of data, but is null");
        CHECK(refusal<ValueError>(gradients, module, [&] { module(x, x, {}, null_mask); }) ==
              "colt5: `context_mask` must be a view of data, but is null");
    }
    const TokensView<const double> empty(nullptr, {0, 12, dim});  // has no data, and needs none
    CHECK(infer(module, empty).size() == 0);
}

TEST_CASE_TEMPLATE("activations: routing has one name whichever module it comes from", Module, Block, Attention, Feed,
                   Cross) {
    const Cpu policy(1);
    const Module module(policy, Seed{1});
    const auto x = normal<double>(policy, std::array<Index, 3>{2, 12, dim}, 0);
    const auto saved = forward(module, x);
    std::vector<std::string> routed, routers;
    saved.each_routing([&](const std::string& name, const Routing<double, Cpu>& routing) {
        routed.push_back(name + ".routing_token");
        CHECK(routing.indices.extent(0) == 2);
        CHECK(routing.scores.shape() == routing.indices.shape());
    });
    Module::each_parameter(
        [&](const std::string& name, const auto&) {
            if (name.ends_with("routing_token")) routers.push_back(name);
        },
        "", module);
    CHECK(routed == routers);
}
