// SPDX-License-Identifier: MIT
#pragma once

#include <functional>
#include <iterator>
#include <vector>

#include <colt5/colt5.hpp>

#include "check.hpp"
#include "run.hpp"

/// The golden files on the CPU. Their metadata have become configurations by configure.py.
namespace golden {

/// Calls `run` with a double and with a float.
template <typename Run>
void check_in_both_precisions(const char* path, const Run& run) {
    File file = read_file(path);
    SUBCASE("double") {
        check_results(file, run(file, double{}, {}), in_double);
    }
    SUBCASE("float") {
        std::function<Arrays(const Variation&)> run_in_double;
        if (is_of_version_0_11(path))
            run_in_double = [&](const Variation& variation) { return run(file, double{}, variation); };
        check_results(file, run(file, float{}, {}), in_float, run_in_double);
    }
}

inline void check_coordinate_descent(const char* path, const colt5::CoordinateDescent& descent, double k) {
    check_in_both_precisions(path, [&]<typename Scalar>(File& file, Scalar, const Variation&) {
        return run_coordinate_descent<Scalar>(colt5::Cpu{1}, file, descent, k);
    });
}

inline void check_topk(const char* path, Index k, const colt5::TopkOptions& options) {
    check_in_both_precisions(path, [&]<typename Scalar>(File& file, Scalar, const Variation&) {
        return run_topk<Scalar>(colt5::Cpu{1}, file, k, options);
    });
}

template <template <typename, typename> typename Module>
void check_module(const char* path) {
    check_in_both_precisions(path, [&]<typename Scalar>(File& file, Scalar, const Variation& variation) {
        return run_module<Module<Scalar, colt5::Cpu>>(colt5::Cpu{1}, file, variation);
    });
}

/// Compares the output of the first sample alone, or of its first `tokens`: what the reference computes for the others
/// is wrong.
template <template <typename, typename> typename Module>
void check_first_sample(const char* path, Index tokens = colt5::dynamic) {
    File file = read_file(path);
    const auto check = [&]<typename Scalar>(Scalar, const Tolerance& tolerance) {
        const Arrays results = run_module<Module<Scalar, colt5::Cpu>>(colt5::Cpu{1}, file, {});
        const auto first_of = [tokens](const Array& array) {
            const Index count = tokens == colt5::dynamic ? array.shape[1] : tokens;
            return std::vector<double>(
                array.values.begin(),
                array.values.begin() + std::ssize(array.values) / (array.shape[0] * array.shape[1]) * count);
        };
        const Array &actual = results.at("out.y"), &expected = file.use("out.y");
        REQUIRE(actual.shape == expected.shape);
        CHECK(tolerance.error(first_of(actual), first_of(expected)) <= tolerance.output);
        CHECK(actual.values == results.at("out.y, inference").values);
    };
    SUBCASE("double") {
        check(double{}, in_double);
    }
    SUBCASE("float") {
        check(float{}, in_float);
    }
}

}  // namespace golden
