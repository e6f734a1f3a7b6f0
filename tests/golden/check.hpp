// SPDX-License-Identifier: MIT
#pragma once

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include <colt5/core/random.hpp>
#include <colt5/io/safetensors.hpp>

#include "file.hpp"

/// Compares what run.hpp computes with what a file holds.
namespace golden {

inline File read_file(const std::string& path) {
    const colt5::SafetensorsFile file(path);
    Arrays arrays;
    for (const auto& [name, entry] : file.entries()) {
        Array& array = arrays[name];
        array.shape = entry.shape;
        if (colt5::dtype_converts_to<double>(entry.dtype)) {
            array.values = file.read<double>(name);
        } else {
            for (const auto value : file.read<std::int64_t>(name)) array.values.push_back(static_cast<double>(value));
        }
    }
    return File(std::move(arrays));
}

/// error / scale; where nothing but zeros is expected, 0 or ∞.
inline double relative(double error, double scale) {
    return error == 0 ? 0 : scale == 0 ? std::numeric_limits<double>::infinity() : error / scale;
}

inline double largest(const std::vector<double>& values) {
    double result = 0;
    for (const double value : values) result = std::max(result, std::abs(value));
    return result;
}

/// The largest difference, relative to the largest expected entry.
inline double largest_error(const std::vector<double>& actual, const std::vector<double>& expected) {
    double difference = 0;
    for (std::size_t i = 0; i < expected.size(); ++i) {
        const double error = std::abs(actual[i] - expected[i]);
        difference = std::max(difference, std::isnan(error) ? std::numeric_limits<double>::infinity() : error);
    }
    return relative(difference, largest(expected));
}

/// ‖actual − expected‖ / ‖expected‖
inline double norm_error(const std::vector<double>& actual, const std::vector<double>& expected) {
    double difference = 0, norm = 0;
    for (std::size_t i = 0; i < expected.size(); ++i) {
        difference += (actual[i] - expected[i]) * (actual[i] - expected[i]);
        norm += expected[i] * expected[i];
    }
    return std::sqrt(relative(difference, norm));
}

/// Errors that are allowed, and how they are measured.
struct Tolerance {
    double output, gradient;
    double (*error)(const std::vector<double>& actual, const std::vector<double>& expected) = largest_error;
};

/// In the files, gradients are rounded to float.
inline constexpr Tolerance in_double{1e-9, 1e-6}, in_float{2e-5, 2e-5};

/// Whether a file holds what version 0.11 computes, whose descent ends at ε = 0.03. All others keep their tolerance.
inline bool is_of_version_0_11(std::string_view path) {
    return path.substr(path.rfind('/') + 1).starts_with("head_");
}

/// How far each result moves when float rounds: when every number of the inputs and parameters moves at random by up to
/// half a unit of its last place, and between attention and feedforward of a block, where numbers are sums of larger
/// ones, by up to half a unit of the largest number's last place. The root mean square of largest_error in 16 runs in
/// double.
inline std::map<std::string, double> moved_by_rounding(const std::function<Arrays(const Variation&)>& run_in_double) {
    constexpr std::uint64_t draws = 16;
    const Arrays unmoved = run_in_double({.in_halves = true});
    std::map<std::string, double> moved;
    for (std::uint64_t draw = 0; draw < draws; ++draw) {
        const colt5::Random random(colt5::Seed{draw});
        std::uint64_t drawn = 0;
        Variation variation{.in_halves = true, .middle = &unmoved};
        variation.number = [&](const std::string& name, std::size_t, double value) {
            const double scale = name.starts_with("middle.") ? largest(unmoved.at(name).values) : value;
            return value + scale * std::numeric_limits<float>::epsilon() * (random.uniform(drawn++) - 0.5);
        };
        for (const auto& [name, array] : run_in_double(variation))
            moved[name] += std::pow(largest_error(array.values, unmoved.at(name).values), 2) / double{draws};
    }
    for (auto& entry : moved) entry.second = std::sqrt(entry.second);
    return moved;
}

/// Compares every result with the file's; nothing in the file may go without a test. A gradient may in addition be off
/// by the rounding, in double, of the file's largest gradient: where the reference computes a vanishing one, of 1e-12
/// times the largest, as a sum of terms that cancel, it has theirs. With `run_in_double`, a gradient that misses its
/// tolerance may in addition be off by four times what rounding moves it: where a descent ends at ε = 0.03, the
/// gradient of a routing token has the rounding of the logits 33 times.
inline void check_results(File& file, const Arrays& results, const Tolerance& tolerance,
                          const std::function<Arrays(const Variation&)>& run_in_double = nullptr) {
    constexpr double factor = 4;  // as in ../cuda/README.md
    std::map<std::string, double> moved;
    double largest_gradient = 0;
    for (const auto& result : results)
        if (result.first.starts_with("grad.") && file.contains(result.first))
            largest_gradient = std::max(largest_gradient, largest(file.use(result.first).values));
    const double rounding = std::numeric_limits<double>::epsilon() * largest_gradient;
    for (const auto& result : results) {
        const std::string& name = result.first;
        const Array& actual = result.second;
        INFO(name);
        if (name.starts_with("routing.")) continue;  // the reference gives no indices
        if (name.ends_with(", inference")) {
            CHECK(actual.values == results.at(name.substr(0, name.find(','))).values);
        } else if (file.contains(name)) {
            const Array& expected = file.use(name);
            REQUIRE(actual.shape == expected.shape);
            const bool is_output = name.starts_with("out.");
            const double error = tolerance.error(actual.values, expected.values);
            double allowed = is_output ? tolerance.output : tolerance.gradient;
            if (const double scale = largest(expected.values); !is_output && scale > 0) allowed += rounding / scale;
            if (error > allowed && !is_output && run_in_double) {
                if (moved.empty()) moved = moved_by_rounding(run_in_double);
                allowed += factor * moved.at(name);
            }
            CHECK(error <= allowed);
        } else {  // nothing depends on this parameter, such as a routing token when there is nothing to route
            CHECK(std::count(actual.values.begin(), actual.values.end(), 0.0) == std::ssize(actual.values));
        }
    }
    for (const std::string& name : file.unused()) FAIL_CHECK(name << " has not been looked at");
}

}  // namespace golden
