// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <tuple>
#include <type_traits>

#include <colt5/colt5.hpp>

// Users write templates around the modules. However a configuration depends on a template parameter, it names the same
// module as a constant does, and compiles.

using namespace colt5;

namespace {

constexpr FeedForwardConfig feed_forward(Index dim, RouterType type = RouterType::coor_descent) {
    return {.dim = dim, .num_heavy_tokens = 2, .router_type = type};
}
constexpr AttentionConfig attention(Index dim, RouterType type = RouterType::coor_descent) {
    return {.dim = dim,
            .num_heavy_tokens_q = 2,
            .num_heavy_tokens_kv = 2,
            .light_dim_head = 4,
            .light_heads = 2,
            .light_window_size = 4,
            .heavy_dim_head = 4,
            .heavy_heads = 2,
            .router_type = type};
}
constexpr CrossAttentionConfig cross_attention(Index dim, RouterType type = RouterType::coor_descent) {
    return {.dim = dim, .num_tokens_q = 2, .num_tokens_kv = 2, .dim_head = 4, .heads = 2, .router_type = type};
}
constexpr TransformerBlockConfig block(Index dim, RouterType type = RouterType::coor_descent) {
    return {.dim = dim,
            .num_heavy_attn_tokens_q = 2,
            .num_heavy_attn_tokens_kv = 2,
            .num_heavy_ff_tokens = 2,
            .light_dim_head = 4,
            .light_heads = 2,
            .light_window_size = 4,
            .heavy_dim_head = 4,
            .heavy_heads = 2,
            .router_type = type};
}

template <typename Module>
bool constructs() {
    const Cpu policy{1};
    return Module(policy).policy().threads() == 1;
}

#define FORMS(NAMESPACE, Module, Config, make)                                                                    \
    namespace NAMESPACE {                                                                                         \
    using Expected = Module<make(8), float, Cpu>;                                                                 \
    template <typename Form>                                                                                      \
    constexpr bool same = std::is_same_v<Form, Expected>;                                                         \
    /* a function of a parameter; with a constructor */                                                           \
    template <Index dim>                                                                                          \
    struct Function {                                                                                             \
        explicit Function(const Cpu& policy) : module(policy) {}                                                  \
        Module<make(dim), float, Cpu> module;                                                                     \
    };                                                                                                            \
    /* the configuration is the parameter */                                                                      \
    template <Config config>                                                                                      \
    struct Value {                                                                                                \
        Module<config, float, Cpu> module;                                                                        \
    };                                                                                                            \
    template <auto config>                                                                                        \
    struct Deduced {                                                                                              \
        Module<config, float, Cpu> module;                                                                        \
    };                                                                                                            \
    /* made from the fields of another one */                                                                     \
    constexpr Config widened(Config config, Index dim) {                                                          \
        config.dim = dim;                                                                                         \
        return config;                                                                                            \
    }                                                                                                             \
    template <Config config>                                                                                      \
    struct Derived {                                                                                              \
        Module<widened(config, 2 * config.dim), float, Cpu> module;                                               \
    };                                                                                                            \
    /* a static member, of the class itself, of another, of a parameter */                                        \
    template <Index dim>                                                                                          \
    struct Member {                                                                                               \
        static constexpr Config config = make(dim);                                                               \
        Module<config, float, Cpu> module;                                                                        \
    };                                                                                                            \
    template <Index dim>                                                                                          \
    struct OfAnother {                                                                                            \
        Module<Member<dim>::config, float, Cpu> module;                                                           \
    };                                                                                                            \
    template <typename Traits>                                                                                    \
    struct OfTraits {                                                                                             \
        Module<Traits::config, float, Cpu> module;                                                                \
    };                                                                                                            \
    /* an alias, a variable template */                                                                           \
    template <Index dim>                                                                                          \
    using Alias = Module<make(dim), float, Cpu>;                                                                  \
    template <Index dim>                                                                                          \
    struct OfAlias {                                                                                              \
        Alias<dim> module;                                                                                        \
    };                                                                                                            \
    template <Index dim>                                                                                          \
    constexpr Config variable = make(dim);                                                                        \
    template <Index dim>                                                                                          \
    struct OfVariable {                                                                                           \
        Module<variable<dim>, float, Cpu> module;                                                                 \
    };                                                                                                            \
    /* a base, nested classes, a pack, a specialization */                                                        \
    template <Index dim>                                                                                          \
    struct Base : Module<make(dim), float, Cpu> {                                                                 \
        using Module<make(dim), float, Cpu>::Module;                                                              \
    };                                                                                                            \
    template <Index dim>                                                                                          \
    struct Outer {                                                                                                \
        struct Inner {                                                                                            \
            Module<make(dim), float, Cpu> module;                                                                 \
        };                                                                                                        \
        template <typename Scalar>                                                                                \
        struct InnerTemplate {                                                                                    \
            Module<make(dim), Scalar, Cpu> module;                                                                \
        };                                                                                                        \
    };                                                                                                            \
    template <Index... dims>                                                                                      \
    using Pack = std::tuple<Module<make(dims), float, Cpu>...>;                                                   \
    template <typename>                                                                                           \
    struct ConfigOf;                                                                                              \
    template <Config c, typename Scalar, typename P, template <RouterConfig, typename, typename> class R>         \
    struct ConfigOf<Module<c, Scalar, P, R>> {                                                                    \
        Module<widened(c, c.dim), Scalar, P, R> module;                                                           \
    };                                                                                                            \
    /* the other parameters, and the router */                                                                    \
    template <typename Scalar, typename P>                                                                        \
    struct Types {                                                                                                \
        Module<make(8), Scalar, P> module;                                                                        \
    };                                                                                                            \
    template <RouterType type>                                                                                    \
    struct Routed {                                                                                               \
        Module<make(8, type), float, Cpu> module;                                                                 \
    };                                                                                                            \
    /* in functions */                                                                                            \
    template <Index dim>                                                                                          \
    auto local(const Cpu& policy) {                                                                               \
        constexpr Config config = make(dim);                                                                      \
        return Module<config, float, Cpu>(policy);                                                                \
    }                                                                                                             \
    template <Index dim>                                                                                          \
    bool lambda() {                                                                                               \
        return [&]<Index inner>(std::integral_constant<Index, inner>) {                                           \
            return constructs<Module<make(inner), float, Cpu>>() && constructs<Module<make(dim), float, Cpu>>();  \
        }(std::integral_constant<Index, dim>());                                                                  \
    }                                                                                                             \
    static_assert(same<decltype(Function<8>::module)>);                                                           \
    static_assert(same<decltype(Value<make(8)>::module)> && same<decltype(Deduced<make(8)>::module)>);            \
    static_assert(same<decltype(Derived<make(4)>::module)>);                                                      \
    static_assert(same<decltype(Member<8>::module)> && same<decltype(OfAnother<8>::module)>);                     \
    static_assert(same<decltype(OfTraits<Member<8>>::module)>);                                                   \
    static_assert(same<Alias<8>> && same<decltype(OfAlias<8>::module)> && same<decltype(OfVariable<8>::module)>); \
    static_assert(std::is_base_of_v<Expected, Base<8>>);                                                          \
    static_assert(same<decltype(Outer<8>::Inner::module)>);                                                       \
    static_assert(same<decltype(Outer<8>::InnerTemplate<float>::module)>);                                        \
    static_assert(same<std::tuple_element_t<1, Pack<4, 8>>>);                                                     \
    static_assert(same<decltype(ConfigOf<Expected>::module)> && same<decltype(Types<float, Cpu>::module)>);       \
    static_assert(same<decltype(Routed<RouterType::coor_descent>::module)>);                                      \
    static_assert(!same<decltype(Routed<RouterType::sinkhorn>::module)>);                                         \
    static_assert(same<decltype(local<8>(std::declval<const Cpu&>()))>);                                          \
    bool all() {                                                                                                  \
        const Cpu policy{1};                                                                                      \
        return lambda<8>() && constructs<Base<8>>() && Function<8>(policy).module.policy().threads() == 1;        \
    }                                                                                                             \
    }

FORMS(feed_forwards, ConditionalRoutedFeedForward, FeedForwardConfig, feed_forward)
FORMS(attentions, ConditionalRoutedAttention, AttentionConfig, attention)
FORMS(cross_attentions, ConditionalRoutedCrossAttention, CrossAttentionConfig, cross_attention)
FORMS(blocks, ConditionalRoutedTransformerBlock, TransformerBlockConfig, block)

}  // namespace

TEST_CASE("modules: a configuration may depend on template parameters") {
    CHECK(feed_forwards::all());
    CHECK(attentions::all());
    CHECK(cross_attentions::all());
    CHECK(blocks::all());
}
