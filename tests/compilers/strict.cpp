// SPDX-License-Identifier: MIT
// What a strict user writes: everything that is public, after headers and macros of others, with all warnings as
// errors.
// `./dev compilers` says with which compilers and flags.
#include <complex.h>
#include <sys/sysmacros.h>
#include <termios.h>

#include <cstdio>

#define EIGEN_DEFAULT_TO_ROW_MAJOR
#define min(a, b) ((a) < (b) ? (a) : (b))
#define max(a, b) ((a) > (b) ? (a) : (b))

#include <colt5/colt5.hpp>
#include <colt5/io/adamw.hpp>
#include <colt5/io/dlpack.hpp>
#include <colt5/io/npy.hpp>
#include <colt5/io/parameters.hpp>
#include <colt5/io/safetensors.hpp>
#include <colt5/io/training.hpp>

#include <filesystem>
#include <utility>
#include <vector>

#if defined(_Complex_I) && !defined(I)
#error "the headers have removed a macro of <complex.h>"
#endif

using namespace colt5;

namespace {

int failures = 0;

void expect(bool holds, const char* what) {
    if (holds) return;
    std::printf("failed: %s\n", what);
    ++failures;
}

constexpr Index dim = 16;

template <RouterType type>
constexpr TransformerBlockConfig config{.dim = dim,
                                        .num_heavy_attn_tokens_q = 4,
                                        .num_heavy_attn_tokens_kv = 4,
                                        .num_routed_kv = 2,
                                        .num_heavy_ff_tokens = 4,
                                        .light_dim_head = 8,
                                        .light_heads = 2,
                                        .light_window_size = 4,
                                        .heavy_dim_head = 8,
                                        .heavy_heads = 2,
                                        .router_type = type};
constexpr FeedForwardConfig feed_forward_config{
    .dim = dim, .num_heavy_tokens = 4, .router_type = RouterType::cum_softmax};
constexpr CrossAttentionConfig cross_config{
    .dim = dim, .num_tokens_q = 4, .num_tokens_kv = 4, .dim_head = 8, .heads = 2};

/// Routes the first tokens.
template <RouterConfig router_config, typename Scalar, typename P>
struct FirstTokens {
    using Logit = accumulate_t<Scalar>;
    static constexpr bool picks_repeat = false;
    struct Gradients {
        MatrixTensor<Logit, P> routing_token;
    };
    struct Activations {
        Routing<Logit, P> routing;
    };
    MatrixTensor<Scalar, P> routing_token;

    FirstTokens(const P& policy, SeedSequence& seeds)
        : routing_token(policy, {router_config.num_routing_tokens, router_config.dim}) {
        fill_normal(policy, routing_token, seeds.next());
    }
    auto route(const P& policy, TokensView<const Scalar> x, Mask mask, Index k) const {
        auto logits = route_logits(policy, x, routing_token, 0.25);
        auto indices = top_k(policy, logits, mask, k);
        auto scores = pick_scores(policy, logits.const_view(), indices, mask);
        return Routing<Logit, P>{std::move(indices), std::move(scores)};
    }
    Activations forward(const P& policy, TokensView<const Scalar> x, Mask mask, Index k) const {
        return {route(policy, x, mask, k)};
    }
    void backward(const P& policy, const Activations& saved, TokensView<const Logit> d_scores,
                  TokensView<const Scalar> x, Mask mask, TokensView<Scalar> d_x, Gradients& gradients) const {
        route_logits_vjp(policy, d_x, gradients.routing_token.view(),
                         place_scores(policy, d_scores, saved.routing.indices, mask, x.extent(1)), x, routing_token,
                         0.25);
    }
    template <typename F, typename... R>
    static void each_parameter(F&& f, const std::string& prefix, R&... routers) {
        f(prefix + "routing_token", routers.routing_token...);
    }
};

/// One step of training, saved and loaded.
template <typename Module, typename... Context>
void train(const Cpu& policy, Mask mask, const Context&... context) {
    using Scalar = typename Module::Out::value_type;
    Module module{policy, Seed{1}};
    AdamW optimizer(policy, module, {.lr = 1e-3, .decays = [](auto name) { return !name.ends_with("gamma"); }});
    TokensTensor<Scalar, Cpu> tokens(policy, {mask.extent(0), mask.extent(1), dim});
    fill_normal(policy, tokens, Random(Seed{2}));
    auto gradients = module.make_gradients();
    zero_gradients<Module>(policy, gradients);
    auto saved = [&] {
        if constexpr (sizeof...(Context) == 0)
            return module.forward(tokens, mask);
        else
            return module.forward(tokens, context..., mask);
    }();
    auto d_out = tensor_like(policy, saved.out);
    assign(policy, d_out, saved.out - tokens);
    module.backward(std::move(saved), d_out, gradients);
    expect(clip_gradient_norm<Module>(policy, gradients, 1.0) >= 0, "a norm of gradients");
    optimizer.set_learning_rate(warmup_cosine(3, {.peak = 1e-3, .warmup = 2, .total = 10}));
    optimizer.step(module, gradients);

    const auto folder = std::filesystem::temp_directory_path();
    const auto path = folder / "colt5_strict.safetensors", state = folder / "colt5_strict_state.safetensors";
    save_parameters(policy, path, module, {{"made by", "strict"}});
    load_parameters(policy, path, module);
    save_optimizer(policy, state, optimizer);
    load_optimizer(policy, state, optimizer);
    expect(SafetensorsFile(path).metadata().at("made by") == "strict", "metadata");
    std::filesystem::remove(path);
    std::filesystem::remove(state);
    expect(count_parameters(module) > 0, "parameters");
}

void modules(const Cpu& policy, Mask mask) {
    train<ConditionalRoutedTransformerBlock<config<RouterType::coor_descent>, float, Cpu>>(policy, mask);
    train<ConditionalRoutedTransformerBlock<config<RouterType::sinkhorn>, double, Cpu>>(policy, mask);
    train<ConditionalRoutedFeedForward<feed_forward_config, float, Cpu>>(policy, mask);
    train<ConditionalRoutedFeedForward<feed_forward_config, double, Cpu, FirstTokens>>(policy, mask);
    TokensTensor<float, Cpu> context(policy, {mask.extent(0), 7, dim});
    fill_normal(policy, context, Random(Seed{3}));
    train<ConditionalRoutedCrossAttention<cross_config, float, Cpu>>(policy, mask, context);
}

template <typename Scalar>
void expressions(const Cpu& policy) {
    MatrixTensor<Scalar, Cpu> x(policy, {5, dim}), y(policy, {5, dim});
    VectorTensor<Scalar, Cpu> gamma(policy, {dim}), norms(policy, {5});
    Tensor<bool, Cpu, dynamic> flags(policy, {5});
    fill_linear_uniform(policy, x, Random(Seed{4}), dim);
    fill(policy, gamma, 1.5);
    fill_with(policy, flags, [](std::size_t i) { return i % 2 == 0; });
    assign(policy, y, exp(x - row_log_sum_exp(x)) + Scalar(2) * relu(x) / (Scalar(1) + abs(x)));
    assign(policy, y, y + log(square(x) + Scalar(1)) - sqrt(abs(x)) * tanh(-x) + erf(x) * gelu(x));
    assign(policy, y, y * sigmoid(x) + silu(x) + reciprocal(x + Scalar(9)) + pow(abs(x), Scalar(2)));
    assign(policy, y, (min)((max)(y, Scalar(-1)), Scalar(1)) * row(gamma));
    assign(policy, y, select(x < y && !(x == y), x, select(x >= y || x != y, y, Scalar(0))));
    assign(policy, y, select(x <= y, x, y) + select(x > y, x, y) - cast<Scalar>(x > y));
    assign(policy, y, select(column(flags), y - row_mean(y), y / row_norm(y) * row_max(y)) + row_min(y) + row_sum(y));
    assign(policy, norms, row_norm(x));
    y = x.matrix() * Scalar(2);
    assign(policy, y, y + x.matrix().cwiseAbs().eval());
    expect(y.matrix().rows() == 5 && norms.vector().size() == 5, "Eigen maps");
    const Eigen::Matrix<Scalar, Eigen::Dynamic, Eigen::Dynamic> product = x.matrix().transpose() * x.matrix();
    expect(product.rows() == dim, "a product of Eigen");

    const auto values = to_host(policy, x);
    const auto same = from_host<MatrixTensor<Scalar, Cpu>>(policy, {5, dim}, values);
    const auto copy = transfer(policy, Cpu{1}, same);
    expect(to_host(policy, copy) == values, "a copy");
    MatrixTensor<bfloat16, Cpu> half(policy, {5, dim});
    MatrixTensor<float16, Cpu> other_half(policy, {5, dim});
    assign(policy, half, cast<float>(x));
    assign(policy, other_half, half * 2.0f);
    expect(static_cast<float>(half.view()(0, 1)) * 2.0f == static_cast<float>(other_half.view()(0, 1)), "16 bits");
}

template <typename Scalar>
void operations(const Cpu& policy, Mask mask) {
    const Index batch = mask.extent(0), length = mask.extent(1), heads = 2, dim_head = 8;
    TokensTensor<Scalar, Cpu> x(policy, {batch, length, dim}), d(policy, {batch, length, dim});
    VectorTensor<Scalar, Cpu> gamma(policy, {dim}), d_gamma(policy, {dim}), d_bias(policy, {dim});
    MatrixTensor<Scalar, Cpu> weight(policy, {dim, dim}), d_weight(policy, {dim, dim});
    fill_normal(policy, x, Random(Seed{5}));
    fill_normal(policy, d, Random(Seed{6}), 0.5);
    fill_normal(policy, weight, Random(Seed{7}));
    fill(policy, gamma, 1.0);
    set_zero(policy, d_gamma);
    set_zero(policy, d_bias);
    set_zero(policy, d_weight);

    auto y = linear(policy, x, weight, gamma.const_view());
    auto d_x = linear_vjp(policy, d, x, weight, d_weight.view(), d_bias.view());
    d_x = linear_vjp(policy, d, std::move(d_x), weight, d_weight.view(), d_bias.view());
    y = layer_norm(policy, x, gamma, gamma);
    d_x = layer_norm_vjp(policy, d, x, gamma, d_gamma.view(), d_bias.view());
    y = rms_norm(policy, x, gamma);
    d_x = rms_norm_vjp(policy, d, x, gamma, d_gamma.view());
    const RMSNormParameters<const Scalar> norm{gamma.const_view()};
    y = norm_linear(policy, x, norm, weight);
    norm_linear_vjp(policy, d_x.view(), d, x, norm, weight, RMSNormParameters<Scalar>{d_gamma.view()}, d_weight.view());
    const FeedForwardParameters<const Scalar> parameters{norm, weight.const_view(), gamma.const_view(),
                                                         weight.const_view(), gamma.const_view()};
    y = feed_forward(policy, x, parameters);
    feed_forward_vjp(policy, d_x.view(), d, x, {}, parameters,
                     FeedForwardParameters<Scalar>{
                         {d_gamma.view()}, d_weight.view(), d_bias.view(), d_weight.view(), d_bias.view()});
    y = gelu_forward(policy, x);
    gelu_vjp(policy, d_x, x);
    y = softmax(policy, x);
    d_x = softmax_vjp(policy, d, y);
    scale(policy, d_x, 0.5);
    expect(sum_of_squares(policy, d_x) >= 0, "a sum of squares");

    const auto q = x.view().reshape(std::array<Index, 4>{batch, length, heads, dim_head});
    Tensor<Scalar, Cpu, dynamic, dynamic, dynamic, dynamic, dynamic> kv(policy, {batch, length, 2, heads, dim_head});
    fill_normal(policy, kv, Random(Seed{8}));
    const LocalAttention local{.reach = 2};
    const auto near = local_attention_forward(policy, local, q, kv, mask);
    const auto d_qkv = local_attention_vjp(policy, local, near, q, q, kv, mask);
    expect(d_qkv.extent(2) == 3, "gradients of queries, keys and values");
    Tensor<Scalar, Cpu, dynamic, dynamic, dynamic, dynamic, dynamic, dynamic> routed(policy,
                                                                                     {batch, 1, 3, heads, 2, dim_head});
    fill_normal(policy, routed, Random(Seed{9}));
    const auto dense = dense_attention_forward(policy, q, routed, {}, {});
    const auto d_dense = dense_attention_vjp(policy, dense, q, q, routed, {}, {});
    expect(d_dense.d_q.shape() == q.shape(), "gradients of queries");

    MatrixTensor<Scalar, Cpu> token(policy, {1, dim});
    fill_normal(policy, token, Random(Seed{10}), 0.25);
    const auto logits = route_logits(policy, x, token);
    const CoordinateDescent descent{.n_iters = 5, .eps = 0.5, .eps_init = 2, .eps_decay = 0.75};
    const auto soft = coordinate_descent_forward(policy, descent, 3, logits, mask);
    const auto d_soft = coordinate_descent_vjp(policy, descent, 3, soft, soft.scores, logits, mask);
    expect(d_soft.d_logits.shape() == logits.shape(), "gradients of logits");
    const auto picks = top_k(policy, logits, mask, 3);
    const auto ranked = cumulative_softmax(policy, 1.0, logits, picks, mask);
    const auto d_ranked = cumulative_softmax_vjp(policy, 1.0, ranked, logits, picks, mask);
    expect(d_ranked.shape() == logits.shape(), "gradients of logits");
    const auto noise = gumbel_noise<Scalar>(policy, Random(Seed{11}), batch, 3, length);
    const auto slots = sinkhorn_forward(policy, Sinkhorn{}, logits, noise.const_view(), mask, 3);
    const auto d_slots =
        sinkhorn_vjp(policy, Sinkhorn{}, slots, slots.scores, slots.indices, logits, noise.const_view(), mask);
    expect(d_slots.shape() == logits.shape(), "gradients of logits");
    const auto indices = single_route(picks);
    const auto rows = gather(policy, x, indices);
    scatter(policy, Scatter::mean, y.view(), rows, indices);
    gather_vjp(policy, y.view(), scatter_vjp(policy, Scatter::add, d, indices), indices);
    const auto real = gather_mask(policy, mask, picks);
    const auto picked = pick_scores(policy, logits.const_view(), picks, mask);
    const auto placed = place_scores(policy, picked, picks, mask, length);
    expect(real.shape() == picked.shape() && placed.shape() == logits.shape(), "shapes of picks");

    const auto path = std::filesystem::temp_directory_path() / "colt5_strict_tensors.safetensors";
    save_safetensors(path, {{"x", x}, {"mask", mask}}, {{"made by", "strict"}});
    const SafetensorsFile file(path);
    expect(file.contains("x") && file.read<Scalar>("x") == to_host(policy, x), "a file");
    std::filesystem::remove(path);

    save_npz(path, {{"x", x}, {"mask", mask}});
    expect(NpzFile(path).array("x").read<Scalar>() == to_host(policy, x), "an .npz file");
    save_npy(path, x);
    expect(to_host(policy, NpyArray(path).tensor<TokensTensor<Scalar, Cpu>>(policy)) == to_host(policy, x),
           "a .npy file");
    std::filesystem::remove(path);

    const auto shared = from_dlpack<TokensView<Scalar>>(policy, to_dlpack(policy, transfer(policy, policy, x)));
    expect(to_host(policy, shared) == to_host(policy, x), "a tensor by DLPack");
}

}  // namespace

int main() {
    try {
        const Cpu policy{2};
        Tensor<bool, Cpu, dynamic, dynamic> real(policy, {2, 9});
        fill_with(policy, real, [](std::size_t i) { return i % 9 < 7; });
        const Mask mask = real.const_view();
        modules(policy, mask);
        expressions<float>(policy);
        expressions<double>(policy);
        operations<float>(policy, mask);
        operations<double>(policy, mask);
        expect(policy.workspace()->statistics().in_use > 0, "statistics");
    } catch (const Error& error) {
        std::printf("%s\n", error.what());
        return 1;
    }
    return failures;
}
