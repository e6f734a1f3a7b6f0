// SPDX-License-Identifier: MIT
// cases: 18
// expect: a temporary is gone by then
#include "wrong.hpp"

using colt5::Cpu, colt5::Mask, colt5::TokensTensor;
constexpr colt5::TransformerBlockConfig config{
    .dim = 8, .num_heavy_attn_tokens_q = 2, .num_heavy_attn_tokens_kv = 2, .num_heavy_ff_tokens = 2};
using Block = colt5::ConditionalRoutedTransformerBlock<config, float, Cpu>;
constexpr colt5::CrossAttentionConfig cross_config{.dim = 8, .num_tokens_q = 2, .num_tokens_kv = 2};
using Cross = colt5::ConditionalRoutedCrossAttention<cross_config, float, Cpu>;
using Noise = colt5::GumbelNoise<float>;

using Tokens = TokensTensor<float, Cpu>;
using MaskTensor = colt5::MatrixTensor<bool, Cpu>;

#ifdef COLT5_COMPILE_FAIL_CONTROL
#define COLT5_CASE -1
#endif

/// A name in the right program, and in all cases but one of the wrong one.
template <int number, typename T>
decltype(auto) temporary(const T& tensor) {
    if constexpr (COLT5_CASE == number)
        return T(Cpu(), tensor.shape());
    else
        return (tensor);
}
template <int number, typename T>
decltype(auto) constant_temporary(const T& tensor) {
    using Result = std::conditional_t<COLT5_CASE == number, const T, const T&>;
    struct Made {
        static Result of(const T& t) {
            if constexpr (COLT5_CASE == number)
                return T(Cpu(), t.shape());
            else
                return t;
        }
    };
    return Made::of(tensor);
}

void modules(const Block& block, const Cross& cross, const Tokens& x, const MaskTensor& mask,
             std::span<const colt5::Index> lengths) {
    block.forward(temporary<1>(x), mask);
    block.forward(x, temporary<2>(mask));
    block.conditional_ff.forward(temporary<3>(x), mask);
    block.conditional_ff.forward(x, temporary<4>(mask));
    block.conditional_attn.forward(temporary<5>(x), mask);
    block.conditional_attn.forward(x, temporary<6>(mask));
    cross.forward(temporary<7>(x), x, mask, mask);
    cross.forward(x, temporary<8>(x), mask, mask);
    cross.forward(x, x, temporary<9>(mask), mask);
    cross.forward(x, x, mask, temporary<10>(mask));
    block.forward(constant_temporary<11>(x), mask);
    block.forward(x, constant_temporary<12>(mask));
    cross.forward(x, constant_temporary<13>(x));
    Noise::given(temporary<14>(x));
    Noise::given(constant_temporary<15>(x));
    const colt5::Ragged ragged(block);
    const colt5::Ragged ragged_cross(cross);
    ragged.forward(temporary<16>(x), lengths);
    ragged_cross.forward(temporary<17>(x), lengths, x, lengths);
    ragged_cross.forward(x, lengths, temporary<18>(x), lengths);

    // What is not kept may be a temporary, and a view is one always.
    block(Tokens(Cpu(), {1, 2, 8}), MaskTensor(Cpu(), {1, 2}));
    cross(Tokens(Cpu(), {1, 2, 8}), Tokens(Cpu(), {1, 2, 8}), MaskTensor(Cpu(), {1, 2}), MaskTensor(Cpu(), {1, 2}));
    ragged(Tokens(Cpu(), {1, 2, 8}), lengths);
    ragged.forward(x.const_view(), lengths);
    block.forward(x.const_view(), mask.const_view());
    block.forward(x, Mask(mask));
    block.forward(x, {}, {.num_heavy_ff_tokens = 1});
    block.forward(x, {mask.data(), {1, 2}});
    Noise::given(x.const_view());
}
