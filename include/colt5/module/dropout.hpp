// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <string>

#include <colt5/core/parameters.hpp>
#include <colt5/core/random.hpp>
#include <colt5/core/tensor.hpp>
#include <colt5/op/dropout.hpp>

namespace colt5 {

/// Where dropout takes its random numbers from.
struct DropoutNoise {
    enum class Source { seeded, none };

    Source source = Source::seeded;
    Seed seed{};
    std::uint64_t calls = 0;  ///< of forward so far; files hold it and the seed
    bool evaluates = false;   ///< if true, nothing is dropped, in training either

    bool is_on() const { return source == Source::seeded && !evaluates; }
    /// The random numbers of the next call.
    Random random() const { return Random(Seed{seed.value + (calls >> 32)}, calls & 0xFFFFFFFF); }
};

/// Dropout of a residual branch, in training only:  out = x + branch · keep / (1 − rate). It has no parameters. Its
/// state is a seed and the number of calls; files that hold the state of routers hold it, too (see io/parameters.hpp).
/// without_noise switches it off.
class Dropout {
public:
    /// What backward needs: the random numbers of the call.
    struct Activations {
        Random random{Seed{}};
        bool is_on = false;
    };

    /// Every call of forward adds 1 to noise.calls: threads must not call it at the same time.
    mutable DropoutNoise noise;
    double rate;

    /// Throws ValueError unless the rate is in [0, 1).
    Dropout(SeedSequence& seeds, double rate_) : noise{.seed = seeds.next_seed()}, rate(rate_) {
        expect_value(rate >= 0 && rate < 1, "dropout", "in [0, 1)", rate);
    }

    /// Whether anything is dropped; otherwise do not call `forward`.
    bool is_on() const { return noise.is_on() && rate > 0; }

    /// out = x + dropout(out), for `out` (b, n, d) of the branch and the residual x (b, n, d). Masked tokens of x may
    /// hold anything.
    template <Policy P, typename T>
    Activations forward(const P& policy, TokensView<T> out, TokensView<const T> x, Mask mask = {}) const {
        const Activations saved{noise.random(), true};
        dropout(policy, out, out, DropoutMask{saved.random, rate}, x, mask);
        ++noise.calls;
        return saved;
    }
    /// From d_out (b, n, d), the gradient of the sum: the gradient of the branch's output (b, n, d).
    template <Policy P, Viewable D>
    auto backward(const P& policy, const Activations& saved, const D& d_out) const {
        using T = typename D::value_type;
        TokensTensor<T, P> d_branch(policy, {d_out.extent(0), d_out.extent(1), d_out.extent(2)});
        dropout(policy, d_branch.view(), d_out, DropoutMask{saved.random, rate});
        return d_branch;
    }

    template <typename F, typename... D>
    static void each_parameter(F&& f, const std::string& prefix, D&... dropouts) {
        if constexpr (requires { f.state(prefix, dropouts.noise.calls...); }) {
            f.state(name_for<F>(prefix, "noise.seed"), dropouts.noise.seed.value...);
            f.state(name_for<F>(prefix, "noise.calls"), dropouts.noise.calls...);
        }
        if constexpr (requires { f.noise(prefix, dropouts.noise...); })
            f.noise(name_for<F>(prefix, "noise"), dropouts.noise...);
    }
};

/// In place of Dropout where the configuration has none.
struct NoDropout {
    struct Activations {
        static constexpr bool is_on = false;
    };
    static constexpr bool is_on() { return false; }

    NoDropout(SeedSequence&, double) {}

    template <typename F, typename... D>
    static void each_parameter(F&&, const std::string&, D&...) {}
};

}  // namespace colt5
