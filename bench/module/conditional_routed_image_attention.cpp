// SPDX-License-Identifier: MIT
// Square maps x (b, side · side, 512), light windows of 16 × 16 tokens. Number: 0 to route 1024 tokens of the map, 1 to
// route 16 of each window, as the package does.
#include <cmath>

#include "../measure.hpp"

namespace {

constexpr colt5::ImageAttentionConfig with(colt5::RoutingScope scope, colt5::Index routed) {
    return {.dim = 512,
            .num_heavy_tokens_q = routed,
            .num_heavy_tokens_kv = routed,
            .light_window_size = 16,
            .router_kwargs = {.coor_descent = colt5::CoordinateDescentKwargs::version_0_11()},
            .routing_scope = scope,
            .use_null_kv = true,
            .use_null_q_tokens = true};
}
constexpr colt5::ImageAttentionConfig over_map = with(colt5::RoutingScope::map, 1024),
                                      per_window = with(colt5::RoutingScope::window, 16);

template <colt5::ImageAttentionConfig config>
int serve(const bench::Inputs& inputs) {
    colt5::ConditionalRoutedImageAttention<config, bench::Scalar, bench::Policy> module(inputs.policy);
    inputs.load(module);
    const bench::Tokens x = inputs.tokens("x"), d_out = inputs.tokens("d_out");
    const auto side = static_cast<colt5::Index>(std::lround(std::sqrt(static_cast<double>(x.extent(1)))));
    const auto as_maps = [&](const bench::Tokens& tokens) {
        return tokens.const_view().reshape(std::array{tokens.extent(0), side, side, tokens.extent(2)});
    };
    return bench::serve(inputs.policy, [&](bool backward, const bench::Keep& keep) {
        if (!backward) return keep(module(as_maps(x)));
        auto saved = module.forward(as_maps(x));
        auto gradients = module.make_gradients();
        keep(module.backward(std::move(saved), as_maps(d_out), gradients));
    });
}

}  // namespace

int main(int argc, char** argv) {
    const bench::Inputs inputs(argc, argv);
    return inputs.number(0, 0) == 0 ? serve<over_map>(inputs) : serve<per_window>(inputs);
}
