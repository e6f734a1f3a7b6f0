// SPDX-License-Identifier: MIT
#pragma once

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <string>
#include <vector>

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

/// The largest difference, relative to the largest expected entry.
inline double largest_error(const std::vector<double>& actual, const std::vector<double>& expected) {
    double difference = 0, scale = 0;
    for (std::size_t i = 0; i < expected.size(); ++i) {
        const double error = std::abs(actual[i] - expected[i]);
        difference = std::max(difference, std::isnan(error) ? std::numeric_limits<double>::infinity() : error);
        scale = std::max(scale, std::abs(expected[i]));
    }
    return relative(difference, scale);
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

/// Compares every result with the file's; nothing in the file may go without a test.
inline void check_results(File& file, const Arrays& results, const Tolerance& tolerance) {
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
            const double allowed = name.starts_with("out.") ? tolerance.output : tolerance.gradient;
            CHECK(tolerance.error(actual.values, expected.values) <= allowed);
        } else {  // nothing depends on this parameter, such as a routing token when there is nothing to route
            CHECK(std::count(actual.values.begin(), actual.values.end(), 0.0) == std::ssize(actual.values));
        }
    }
    for (const std::string& name : file.unused()) FAIL_CHECK(name << " has not been looked at");
}

}  // namespace golden
