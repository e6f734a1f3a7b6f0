// SPDX-License-Identifier: MIT
#pragma once

// The C interface of topk on memory of others, which colt5/topk.py calls. The generated file that includes this one
// defines in namespace colt5_python: Policy and Scalar.

#include <bit>
#include <cstring>

#include "call.hpp"

namespace colt5_python {

/// What both directions read.
struct TopkCall {
    Lease<ContextOfPlace> context;
    colt5::TokensView<const Scalar> x;  // (rows, 1, n)
    colt5::Mask mask;                   // (rows, n), or absent
    Index k;
    colt5::TopkOptions options;

    explicit TopkCall(Arguments& arguments) : context(Place(arguments)) {
        const auto* const data = arguments.pointer<const Scalar>();
        const auto shape = arguments.shape<2>();
        x = {data, {shape[0], 1, shape[1]}};
        if (const auto* const of_mask = arguments.pointer<const bool>()) mask = colt5::Mask(of_mask, shape);
        k = arguments.number();
        const auto real = [&] { return std::bit_cast<double>(static_cast<std::int64_t>(arguments.number())); };
        options.coor_descent_k_ratio = real();
        options.n_iters = static_cast<int>(arguments.number());
        options.eps = real();
        options.eps_init = real();
        options.eps_decay = real();
    }
    auto run() const { return colt5::topk(context->policy, x, k, options, mask); }
};

/// Copies a tensor to memory of the caller.
template <typename Tensor>
void hand_over(const Policy& policy, void* to, const Tensor& from) {
    const auto bytes = static_cast<std::size_t>(from.size()) * sizeof(*from.data());
    if (bytes == 0) return;
#if defined(CUDART_VERSION)
    colt5::cuda::check(cudaMemcpyAsync(to, from.data(), bytes, cudaMemcpyDeviceToDevice, policy.stream()),
                       "cudaMemcpyAsync");
#else
    static_cast<void>(policy);
    std::memcpy(to, from.data(), bytes);
#endif
}

}  // namespace colt5_python

/// place (4); x, its shape (2), mask or 0, k, options (5); of (rows, k): values, indices, coor_descent_values, gates
COLT5_EXPORT std::int64_t colt5_forward(const std::int64_t* numbers) {
    using namespace colt5_python;
    return guarded([&]() -> std::int64_t {
        Arguments arguments(numbers);
        const TopkCall call(arguments);
        const auto result = call.run();
        const auto& policy = call.context->policy;
        hand_over(policy, arguments.pointer<void>(), result.values);
        hand_over(policy, arguments.pointer<void>(), result.indices);
        hand_over(policy, arguments.pointer<void>(), result.coor_descent_values);
        hand_over(policy, arguments.pointer<void>(), result.gates);
        return 0;
    });
}

/// The same up to the options; of (rows, k): gradients of values, of coor_descent_values, of gates; d_x (rows, n)
COLT5_EXPORT std::int64_t colt5_backward(const std::int64_t* numbers) {
    using namespace colt5_python;
    return guarded([&]() -> std::int64_t {
        Arguments arguments(numbers);
        const TopkCall call(arguments);
        const auto saved = call.run();
        const auto given = [&] {
            return colt5::TokensView<const Scalar>(arguments.pointer<const Scalar>(), saved.values.shape());
        };
        const auto d_values = given(), d_coor_descent_values = given(), d_gates = given();
        const auto& policy = call.context->policy;
        hand_over(policy, arguments.pointer<void>(),
                  colt5::topk_vjp(policy, saved, d_values, call.x, call.k, call.options, call.mask, d_gates,
                                  d_coor_descent_values));
        return 0;
    });
}

COLT5_EXPORT std::int64_t colt5_release_memory(const std::int64_t*) {
    return colt5_python::guarded([]() -> std::int64_t {
        colt5_python::Contexts<colt5_python::ContextOfPlace>::all().release_memory();
        return 0;
    });
}
