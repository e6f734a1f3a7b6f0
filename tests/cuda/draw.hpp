// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include <colt5/core/random.hpp>
#include <colt5/core/scalar.hpp>
#include <colt5/core/tensor.hpp>
#include <colt5/core/view.hpp>

#include "cases.hpp"

/// What cases draw from a seed, and the record of what they compute.
namespace cases {

using namespace colt5;

/// The nearest number of a precision.
inline double rounded(Precision precision, double value) {
    switch (precision) {
        case Precision::fp64:
            return value;
        case Precision::bf16:
            return static_cast<double>(bfloat16(value));
        case Precision::fp16:
            return static_cast<double>(float16(value));
        default:
            return static_cast<double>(static_cast<float>(value));
    }
}
/// The precision of logits, gradients of parameters and the like.
inline Precision accumulated(Precision precision) {
    return precision == Precision::fp64 ? Precision::fp64 : Precision::fp32;
}

/// Collects what a case computes.
template <typename P>
struct Recorder {
    explicit Recorder(const P& policy_) : policy(policy_) {}
    template <typename V>
    void operator()(const std::string& name, const V& tensor, Kind kind = Kind::rounded) {
        Result& result = results[name];
        result.kind = std::integral<typename V::value_type> ? Kind::exact : kind;
        for (const auto& value : to_host(policy, tensor)) result.values.push_back(static_cast<double>(value));
    }
    template <typename V>
    void in_float(const std::string& name, const V& tensor) {
        (*this)(name, tensor, Kind::in_float);
    }
    void holds(const std::string& name, bool whether) { results[name] = {Kind::exact, {whether ? 1.0 : 0.0}}; }

    const P& policy;
    Results results;
};

/// Draws shapes and values from a seed: the same on every policy.
template <typename T, typename P>
class Draw {
public:
    Draw(const P& policy, const Setting& setting)
        : policy_(policy),
          precision_(setting.precision),
          seeds_(Seed{setting.seed}),
          shapes_(seeds_.next()),
          seed_(setting.seed),
          rounding_(setting.rounding),
          moves_(Seed{setting.draw}) {}

    Index size(Index least, Index most) {
        return least + static_cast<Index>(shapes_.uniform(drawn_++) * static_cast<double>(most - least + 1));
    }
    bool chance(double probability) { return shapes_.uniform(drawn_++) < probability; }
    /// From 1 to `most`, as often between 1 and 10 as between 100 and 1000; less where each takes many elements.
    Index length(Index most, Index elements_of_each = 1) {
        most = std::max<Index>(1, std::min(most, (sanitized() ? 50'000 : 250'000) / elements_of_each));
        const double highest = std::log(static_cast<double>(sanitized() ? std::min<Index>(most, 150) : most) + 1);
        return std::max<Index>(1, static_cast<Index>(std::exp(shapes_.uniform(drawn_++) * highest)));
    }
    /// Up to 128, mostly a multiple of 8.
    Index dim_head() { return chance(0.75) ? 8 * size(1, 16) : size(1, 128); }

    /// In T, of the setting's precision.
    template <std::size_t Rank>
    auto values(const std::array<Index, Rank>& shape, double deviation = 1) {
        auto drawn = tokens(shape, deviation);
        if (rounding_ > 0) move(drawn);
        return drawn;
    }
    /// What a router sees: a setting's rounding does not move it.
    template <std::size_t Rank>
    auto tokens(const std::array<Index, Rank>& shape, double deviation = 1) {
        return normal<T>(shape, deviation, precision_, std::make_index_sequence<Rank>{});
    }
    /// In the type of logits and of gradients of parameters.
    template <std::size_t Rank>
    auto sums(const std::array<Index, Rank>& shape, double deviation = 1) {
        return normal<accumulate_t<T>>(shape, deviation, accumulated(precision_), std::make_index_sequence<Rank>{});
    }
    /// Real tokens first, as padding leaves them; now and then a sequence has none.
    Tensor<bool, P, dynamic, dynamic> mask(Index batch, Index length) {
        std::vector<Index> real;
        for (Index b = 0; b < batch; ++b) real.push_back(size(0, 4) == 0 ? 0 : size(length / 2, length));
        Tensor<bool, P, dynamic, dynamic> mask(policy_, {batch, length});
        fill_with(policy_, mask, [&](std::size_t i) {
            const auto at = static_cast<Index>(i);
            return at % length < real[static_cast<std::size_t>(at / length)];
        });
        return mask;
    }
    /// A mask in half of the cases, no mask in the others.
    Tensor<bool, P, dynamic, dynamic> optional_mask(Index batch, Index length) {
        auto drawn = mask(batch, length);
        return chance(0.5) ? Tensor<bool, P, dynamic, dynamic>() : std::move(drawn);
    }
    Tensor<TokenIndex, P, dynamic, dynamic> indices(Index batch, Index k, Index length) {
        Tensor<TokenIndex, P, dynamic, dynamic> indices(policy_, {batch, k});
        fill_with(policy_, indices, [&](std::size_t) { return size(0, length - 1); });
        return indices;
    }
    /// A module with parameters of the setting's precision.
    template <typename Module>
    Module made() {
        Module drawn{policy_, Seed{seed_}};
        Module::each_parameter(
            [&](const std::string& name, auto& parameter) {
                const auto values = to_host(policy_, parameter);
                fill_with(policy_, parameter,
                          [&](std::size_t i) { return rounded(precision_, static_cast<double>(values[i])); });
                if (rounding_ > 0 && !name.ends_with("routing_token")) move(parameter);
            },
            "", drawn);
        return drawn;
    }
    /// Gives the gradients of a module random values.
    template <typename Module, typename Gradients>
    void fill_gradients(Gradients& gradients) {
        Module::each_parameter(
            [&](const std::string&, auto& gradient) { fill_normal_of(gradient, 1, accumulated(precision_)); }, "",
            gradients);
    }

private:
    template <typename Scalar, std::size_t... I>
    auto normal(const std::array<Index, sizeof...(I)>& shape, double deviation, Precision precision,
                std::index_sequence<I...>) {
        Tensor<Scalar, P, (static_cast<void>(I), dynamic)...> tensor(policy_, shape);
        fill_normal_of(tensor, deviation, precision);
        return tensor;
    }
    template <typename Values>
    void move(Values& values) {
        const auto unmoved = to_host(policy_, values);
        fill_with(policy_, values, [&](std::size_t i) {
            return static_cast<double>(unmoved[i]) * (1 + rounding_ * (2 * moves_.uniform(moved_++) - 1));
        });
    }
    template <typename Result>
    void fill_normal_of(Result& tensor, double deviation, Precision precision) {
        const Random random = seeds_.next();
        fill_with(policy_, tensor, [&](std::size_t i) { return rounded(precision, deviation * random.normal(i)); });
    }

    const P& policy_;
    Precision precision_;
    SeedSequence seeds_;
    Random shapes_;
    std::uint64_t seed_, drawn_ = 0;
    double rounding_;
    Random moves_;
    std::uint64_t moved_ = 0;
};

template <typename P, typename V>
bool all_zero(const P& policy, const V& tensor) {
    const auto values = to_host(policy, tensor);
    return std::all_of(values.begin(), values.end(), [](const auto& x) { return static_cast<double>(x) == 0; });
}

template <typename P, typename A, typename B>
bool same_bits(const P& policy, const A& a, const B& b) {
    const auto of_a = to_host(policy, a), of_b = to_host(policy, b);
    const auto same = [](const auto& x, const auto& y) { return static_cast<double>(x) == static_cast<double>(y); };
    return std::equal(of_a.begin(), of_a.end(), of_b.begin(), of_b.end(), same);
}

}  // namespace cases
