// SPDX-License-Identifier: MIT
// cases: 3
// expect: colt5: these gradients do not say whose they are: name the module, as in zero_gradients<Module>
#include "wrong.hpp"

struct Model {
    struct Gradients {
#ifdef COLT5_COMPILE_FAIL_CONTROL
        using Module = Model;
#endif
        colt5::VectorTensor<float, colt5::Cpu> weight;
    };
    template <typename F, typename... M>
    static void each_parameter(F&& f, const std::string& prefix, M&... m) {
        f(prefix + "weight", m.weight...);
    }
};

#ifdef COLT5_COMPILE_FAIL_CONTROL
#define COLT5_CASE -1
#endif

template <int number>
using Named = std::conditional_t<COLT5_CASE == number || COLT5_CASE == -1, void, Model>;

void use(const colt5::Cpu& policy, Model::Gradients& gradients) {
    colt5::zero_gradients<Named<1>>(policy, gradients);
    colt5::clip_gradient_norm<Named<2>>(policy, gradients, 1);
    colt5::gradient_norm<Named<3>>(policy, gradients);
}
