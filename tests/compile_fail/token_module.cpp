// SPDX-License-Identifier: MIT
// cases: 8
// first: colt5:
// expect 1: a branch of Routed must have a constructor (const P& policy, SeedSequence& seeds)
// expect 2: a branch of Routed must have a default-constructible and movable type `Activations`
// expect 3: a branch of Routed must have a default-constructible type `Gradients`
// expect 4: a branch of Routed must have a static function `each_parameter(f, prefix, m...)`
// expect 5: a branch of Routed must have `Activations forward(policy, out, x, save) const`
// expect 6: a branch of Routed must have `Activations forward(policy, out, x, save) const`
// expect 7: RoutedConfig.num_routes must be at least 1
// expect 8: RoutedConfig.sequence_order needs a router that chooses a token once at most
#include "wrong.hpp"

#ifdef COLT5_COMPILE_FAIL_CONTROL
#define COLT5_CASE -1
#endif

using namespace colt5;

/// Hands its tokens on.
struct Heavy {
#if COLT5_CASE == 1
    explicit Heavy(const Cpu&) {}
#else
    Heavy(const Cpu&, SeedSequence&) {}
#endif
#if COLT5_CASE == 2
    struct Activations {
        explicit Activations(int) {}
    };
#else
    struct Activations {};
#endif
#if COLT5_CASE == 3
    struct Gradients {
        explicit Gradients(int) {}
    };
#else
    struct Gradients {};
#endif
#if COLT5_CASE != 4
    template <typename F, typename... M>
    static void each_parameter(F&&, const std::string&, M&...) {}
#endif
#if COLT5_CASE != 5
    Activations forward(const Cpu& policy, TokensView<float> out, TokensView<const float> x, bool) const {
        assign(policy, out, x + 0.0f);
#if COLT5_CASE == 2
        return Activations(0);
#else
        return {};
#endif
    }
#endif
    void backward(const Cpu& policy, const Activations&, TokensView<float> d_x, TokensView<const float> d_out,
#if COLT5_CASE == 6
                  Gradients&) const {
#else
                  TokensView<const float>, Gradients&) const {
#endif
        assign(policy, d_x, d_out + 0.0f);
}
}
;

constexpr RoutedConfig config{.dim = 8,
                              .num_heavy_tokens = 2,
                              .num_routes = COLT5_CASE == 7 ? 0 : 1,
                              .sequence_order = COLT5_CASE == 8,
                              .router_type = COLT5_CASE == 8 ? RouterType::sinkhorn : RouterType::coor_descent};
static_assert(complete<Routed<config, float, Cpu, Heavy>>);
