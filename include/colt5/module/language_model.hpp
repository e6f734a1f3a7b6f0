// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <span>
#include <string>
#include <utility>

#include <colt5/module/embedding.hpp>
#include <colt5/module/head.hpp>
#include <colt5/module/module.hpp>

namespace colt5 {

struct LanguageModelConfig {
    Index vocabulary;  ///< 256 for bytes
    Index dim;         ///< d of the layers
    bool tied = true;  ///< the head uses the embedding's weight, otherwise its own
};

/// Embedding, layers and head. `Layers` is a Stack of blocks, or any module (b, n, d) → (b, n, d). With
/// RouterType::causal, blocks see no later token, so targets can be the next tokens. With other routers, train as BERT
/// does: replace some ids by a [MASK] id and predict these, with a negative target for all others (this is not the
/// padding mask).
///
///     LanguageModel<Stack<Block, 6>> model(policy, {.vocabulary = 256, .dim = 512});
///     const auto losses = model.add_gradients(ids, targets, d_losses, gradients);   // (b, n), and a step's gradients
///     const auto logits = model.logits(ids);                                        // (b, n, V)
///
/// Ids are in [0, V) (see Embedding). A negative target has no loss. Names of parameters:
/// `embedding.weight`, those of the layers, `head.norm.gamma` and, if it is not tied, `head.weight`.
template <typename Layers>
class LanguageModel {
public:
    using Out = typename Layers::Out;
    using Scalar = typename Out::value_type;
    using P = typename Out::PolicyType;
    using Counts = typename Layers::Counts;
    using Sum = accumulate_t<Scalar>;

    Embedding<Scalar, P> embedding;
    Layers layers;
    Head<Scalar, P> head;

    struct Gradients {
        using Module = LanguageModel;
        typename Embedding<Scalar, P>::Gradients embedding;
        typename Layers::Gradients layers;
        typename Head<Scalar, P>::Gradients head;
    };

    /// A tied weight is initialized with standard deviation 1 / √dim, so that the standard deviation of the logits is
    /// about 1; an embedding that is not tied, with standard deviation 1.
    LanguageModel(const P& policy, const LanguageModelConfig& config, Seeds seeds = {})
        : embedding(policy, seeds, config.vocabulary, config.dim,
                    config.tied ? 1 / std::sqrt(static_cast<double>(config.dim)) : 1),
          layers(policy, seeds),
          head(config.tied ? Head<Scalar, P>(policy, config.dim)
                           : Head<Scalar, P>(policy, seeds, config.vocabulary, config.dim)),
          policy_(policy) {
        if constexpr (requires { Layers::model_dim; })
            expect_value(config.dim == Layers::model_dim, "dim",
                         detail::concat({"that of the layers, ", std::to_string(Layers::model_dim)}), config.dim);
    }

    const P& policy() const { return policy_; }
    Gradients make_gradients() const { return zeros_like_parameters(policy_, *this); }

    /// ids (b, n)  →  (b, n, V), for evaluation: without dropout and training noise.
    template <Viewable Ids>
    auto logits(const Ids& ids, Mask mask = {}, const Counts& counts = {}) const {
        return head.logits(policy_, layers(embedding(policy_, ids), mask, counts), tied_weight());
    }
    /// A cache of the layers for `decode`, see module/cache.hpp.
    auto make_cache(Index batch, Index max_length) const { return layers.make_cache(batch, max_length); }
    /// The next ids (b, m) of the sequences of a cache  →  logits (b, m, V), as for whole sequences. The first
    /// lengths[b] ids of sequence b are its next ones, the others padding in [0, V). Errors as `decode` of ModuleBase.
    template <typename Cache, Viewable Ids>
    auto decode(Cache& cache, const Ids& ids, std::span<const Index> lengths = {}) const {
        expect_shape("ids", ids.shape(), {cache.batch(), dynamic});
        layers.expect_parameters();
        const auto x = embedding(policy_, ids);  // (b, m, d)
        const auto& next = cache.next(policy_, x.extent(1), lengths);
        return cache.go_on(next, [&] {
            const auto out = layers.decode_next(cache.state, next, x.const_view(), {});
            return head.logits(policy_, out, tied_weight());
        });
    }
    /// Cross-entropy, for evaluation: ids and targets (b, n)  →  (b, n).
    template <Viewable Ids, Viewable Targets>
    auto losses(const Ids& ids, const Targets& targets, Mask mask = {}, const Counts& counts = {}) const {
        return head.losses(policy_, layers(embedding(policy_, ids), mask, counts), targets.const_view(), tied_weight());
    }
    /// Forward and backward of a training step: returns the losses (b, n), and adds the gradients of
    /// Σ d_losses ∘ losses. Throws before anything is touched, calls of noise included, when an argument or a parameter
    /// does not fit or, on the CPU, an id or a target is not in its range.
    template <Viewable Ids, Viewable Targets, Viewable D>
    MatrixTensor<Sum, P> add_gradients(const Ids& ids, const Targets& targets, const D& d_losses, Gradients& gradients,
                                       Mask mask = {}, const Counts& counts = {}) const {
        expect_like<LanguageModel>("gradients", *this, gradients);
        expect_shape("targets", targets.shape(),
                     ids.shape());  // before anything counts a call, as routers with noise and dropout do
        expect_shape("d_losses", d_losses.shape(), ids.shape());
        head.expect_parameters("head.", embedding.weight.extent(1));
        detail::expect_targets<P>(targets, (is_tied() ? embedding.weight : head.weight).extent(0));
        const auto x = embedding(policy_, ids);  // (b, n, d)
        auto saved = layers.forward(x, mask, counts);
        const Out out = std::move(saved.out);  // (b, n, d)
        auto result = head.backward(policy_, d_losses, out, targets.const_view(), gradients.head, tied_weight(),
                                    is_tied() ? gradients.embedding.weight.view() : MatrixView<Sum>());
        const Out d_x = layers.backward(std::move(saved), result.d_x, gradients.layers);  // (b, n, d)
        embedding.backward(policy_, d_x, ids, gradients.embedding);
        return std::move(result.losses);
    }

    template <typename F, typename... M>
    static void each_parameter(F&& f, const std::string& prefix, M&... m) {
        Embedding<Scalar, P>::each_parameter(f, name_for<F>(prefix, "embedding."), m.embedding...);
        Layers::each_parameter(f, prefix, m.layers...);
        Head<Scalar, P>::each_parameter(f, name_for<F>(prefix, "head."), m.head...);
    }

private:
    bool is_tied() const { return !head.weight; }
    MatrixView<const Scalar> tied_weight() const {
        return is_tied() ? embedding.weight.const_view() : MatrixView<const Scalar>();
    }

    P policy_;
};

}  // namespace colt5
