// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <initializer_list>
#include <map>
#include <string>
#include <vector>

#include <colt5/core/random.hpp>

#include "cases.hpp"
#include "check.hpp"
#include "draw.hpp"
#include "goldens.hpp"

using namespace cases;

namespace {

const char* name_of(Precision precision) {
    switch (precision) {
        case Precision::fp64:
            return "fp64";
        case Precision::fp32:
            return "fp32";
        case Precision::tf32:
            return "tf32";
        case Precision::bf16:
            return "bf16";
        case Precision::fp16:
            return "fp16";
    }
    return "";
}

bool is_half(Precision precision) {
    return precision == Precision::bf16 || precision == Precision::fp16;
}

double norm(const std::vector<double>& values) {
    double squares = 0;
    for (const double value : values) squares += value * value;
    return std::sqrt(squares);
}

double distance(const std::vector<double>& a, const std::vector<double>& b) {
    double squares = 0;
    for (std::size_t i = 0; i < a.size(); ++i) squares += (a[i] - b[i]) * (a[i] - b[i]);
    return std::sqrt(squares);
}

/// ‖a − b‖ / ‖b‖, or ‖a − b‖ where b is 0; NaN if there is one.
double relative_error(const std::vector<double>& a, const std::vector<double>& b) {
    return distance(a, b) / (norm(b) > 0 ? norm(b) : 1);
}

bool is_gradient(const std::string& name) {
    return name.starts_with("d_") || name.starts_with("gradient of ");
}

/// The norm of the largest gradient of a case. A gradient of less than a millionth of it vanishes: its terms cancel, as
/// those of a query that sees one key, and what is left is their rounding. Its errors are held against the largest.
double largest_gradient(const Results& results) {
    double largest = 0;
    for (const auto& [name, result] : results)
        if (is_gradient(name)) largest = std::max(largest, norm(result.values));
    return largest;
}

/// With the environment variable COLT5_ERRORS, prints what has been compared, one line each.
void report(const std::string& what, Precision precision, const std::string& name, double error) {
    static const bool wanted = std::getenv("COLT5_ERRORS") != nullptr;
    if (wanted) std::printf("error %s | %s | %s | %.2e\n", name_of(precision), what.c_str(), name.c_str(), error);
}

std::vector<Case> on_cuda(Precision precision) {
    switch (precision) {
        case Precision::fp64:
            return on_cuda_in_double();
        case Precision::bf16:
            return on_cuda_in_bfloat16();
        case Precision::fp16:
            return on_cuda_in_float16();
        default:
            return on_cuda_in_float();
    }
}

double tolerance(Precision precision, Kind kind) {
    if (kind == Kind::exact) return 0;
    if (precision == Precision::fp64) return 1e-9;
    if (kind == Kind::in_float || precision == Precision::fp32) return 2e-5;
    const double of_rounding = precision == Precision::tf32 ? 1e-3 : precision == Precision::bf16 ? 1e-2 : 2e-3;
    return kind == Kind::amplified ? 3 * of_rounding : of_rounding;
}

/// Half the distance of neighbouring numbers above 1 in which a precision stores or multiplies.
double rounding_of(Precision precision) {
    return std::ldexp(1.0, precision == Precision::bf16 ? -8 : -11);
}

/// What rounding changes is measured by so many runs in double, each with numbers that have moved at random by up to
/// what they may be rounded by.
constexpr std::uint64_t draws_of_rounding = 16;

/// The root mean square of the distances that the results of a case move.
std::map<std::string, double> moved_by_rounding(const Case& on_cpu, Setting setting, const Results& expected) {
    std::map<std::string, double> moved;
    for (setting.draw = 0; setting.draw < draws_of_rounding; ++setting.draw)
        for (const auto& [name, result] : on_cpu.run(setting))
            moved[name] += std::pow(distance(result.values, expected.at(name).values), 2);
    for (auto& [name, squares] : moved) squares = std::sqrt(squares / double{draws_of_rounding});
    return moved;
}

/// Holds a case in a precision against the CPU's double. `of_cpu` are the numbers of the latter. Where a precision of
/// rounded products misses its tolerance, the failure says what their rounding alone moves.
void compare(Precision precision, const Case& on_cpu, const Setting& of_cpu, const Results& actual,
             const Results& expected) {
    const std::string what = on_cpu.name + " " + std::to_string(of_cpu.seed);
    const double largest = largest_gradient(expected);
    std::map<std::string, double> moved;
    for (const auto& [name, result] : actual) {
        CAPTURE(name);
        const std::vector<double>& wanted = expected.at(name).values;
        REQUIRE(result.values.size() == wanted.size());
        const bool vanishes = is_gradient(name) && norm(wanted) < 1e-6 * largest;
        const double error =
            vanishes ? distance(result.values, wanted) / largest : relative_error(result.values, wanted);
        report(what, precision, name, error);
        const double allowed = tolerance(precision, result.kind);
        double rounding_moves = 0;
        const bool rounds = (result.kind == Kind::rounded || result.kind == Kind::amplified) &&
                            precision != Precision::fp64 && precision != Precision::fp32;
        if (rounds && error > allowed && norm(wanted) > 0) {
            Setting setting = of_cpu;
            setting.rounding = rounding_of(precision);
            if (moved.empty()) moved = moved_by_rounding(on_cpu, setting, expected);
            rounding_moves = moved.at(name) / (vanishes ? largest : norm(wanted));
        }
        CAPTURE(rounding_moves);
        CHECK(error <= allowed);
    }
}

/// Holds cases in several precisions of the same inputs against the CPU's double.
void compare_with_cpu(std::initializer_list<Precision> precisions) {
    const auto cpu = on_cpu(), cuda = on_cuda(*precisions.begin());
    REQUIRE(cpu.size() == cuda.size());
    for (std::size_t i = 0; i < cpu.size(); ++i) {
        // What cuBLASLt's products of 16 bits have written, initcheck takes for uninitialized: see README.md.
        if (sanitized("initcheck") && is_half(*precisions.begin()) && cpu[i].is_of_modules) continue;
        const std::uint64_t seeds = sanitized("racecheck") ? 1 : sanitized() ? 2 : cpu[i].seeds;
        for (std::uint64_t seed = 0; seed < seeds; ++seed) {
            CAPTURE(cpu[i].name);
            CAPTURE(seed);
            const Setting of_cpu{*precisions.begin(), seed};
            const Results expected = cpu[i].run(of_cpu);
            for (const Precision precision : precisions) {
                CAPTURE(std::string(name_of(precision)));
                compare(precision, cpu[i], of_cpu, cuda[i].run({precision, seed}), expected);
            }
        }
    }
}

}  // namespace

TEST_SUITE_BEGIN("cases");

TEST_CASE("cuda: double agrees with the CPU" * doctest::skip(!has_gpu())) {
    compare_with_cpu({Precision::fp64});
}
TEST_CASE("cuda: float and tf32 agree with the CPU's double" * doctest::skip(!has_gpu())) {
    compare_with_cpu({Precision::fp32, Precision::tf32});
}
TEST_CASE("cuda: bfloat16 agrees with the CPU's double" * doctest::skip(!has_gpu())) {
    compare_with_cpu({Precision::bf16});
}
TEST_CASE("cuda: float16 agrees with the CPU's double" * doctest::skip(!has_gpu())) {
    compare_with_cpu({Precision::fp16});
}

TEST_CASE("cuda: the same bits run to run" * doctest::skip(!has_gpu() || sanitized())) {
    for (const Precision precision : {Precision::fp32, Precision::bf16})
        for (const Case& one : on_cuda(precision)) {
            CAPTURE(one.name);
            const Results first = one.run({precision, 0}), second = one.run({precision, 0});
            for (const auto& [name, result] : first) {
                CAPTURE(name);
                CHECK(second.at(name).values == result.values);
            }
        }
}

TEST_SUITE_END();
TEST_SUITE_BEGIN("goldens");

TEST_CASE("cuda: goldens in double" * doctest::skip(!has_gpu())) {
    for (const Golden& one : goldens_in_double()) {
        CAPTURE(one.name);
        golden::File file = golden::read_file(one.path);
        golden::check_results(file, one.run(Precision::fp64, file, {}), golden::in_double);
    }
}

TEST_CASE("cuda: goldens in float" * doctest::skip(!has_gpu())) {
    const auto in_double = goldens_in_double(), in_float = goldens_in_float();
    for (std::size_t i = 0; i < in_float.size(); ++i) {
        CAPTURE(in_float[i].name);
        golden::File file = golden::read_file(in_float[i].path);
        std::function<golden::Arrays(const golden::Variation&)> run_in_double;
        if (golden::is_of_version_0_11(in_float[i].path))
            run_in_double = [&](const golden::Variation& variation) {
                return in_double[i].run(Precision::fp64, file, variation);
            };
        golden::check_results(file, in_float[i].run(Precision::fp32, file, {}), golden::in_float, run_in_double);
    }
}

namespace {

/// What is not compared by value.
bool is_routing(const std::string& name) {
    return name.starts_with("routing.");
}

/// What a router of a golden file routes by: its logits are inner products of the rows of an input with its token, or
/// of the rows' directions.
struct RoutedBy {
    RoutedBy(golden::File& file, const std::string& routing) {
        const std::string router = routing.substr(std::string("routing.").size());
        const std::string layers =
            "transformer.layers.";  // of a ViT: transformer.layers.0.1.router routes middle.0.1.out
        input = router.starts_with(layers)
                    ? "middle." + router.substr(layers.size(), router.rfind('.') - layers.size()) + ".out"
                : router.starts_with("conditional_ff")                         ? "middle.out"
                : router.ends_with("kv_router") && file.contains("in.context") ? "in.context"
                                                                               : "in.x";
        token = &file.use("param." + router + ".routing_token");
    }
    std::string input;
    const golden::Array* token;
};

/// Numbers that are added to the inputs of a run in double.
using Nudges = std::map<std::string, std::vector<double>>;

/// Logits in float differ from those in double by their rounding. Where that has made the device route one token before
/// another, adds to the input of the run in double what raises the logit of the one just above that of the other, so
/// that the next run routes as the device. Returns whether there was such a place; more than rounding is an error.
bool nudge_routing(Nudges& nudges, golden::File& file, bool by_cosine, const golden::Arrays& inputs,
                   const golden::Arrays& actual, const golden::Arrays& expected) {
    bool nudged = false;
    for (const auto& [name, array] : expected) {
        if (!is_routing(name) || array.values == actual.at(name).values) continue;
        CAPTURE(name);
        const RoutedBy by(file, name);
        const golden::Array& x = inputs.at(by.input);
        const auto dim = static_cast<std::size_t>(x.shape.back()), length = static_cast<std::size_t>(x.shape[1]);
        const std::size_t routes = by.token->values.size() / dim, k = static_cast<std::size_t>(array.shape.back());
        std::vector<double>& added = nudges[by.input];
        added.resize(x.values.size());
        for (std::size_t row = 0; row < array.values.size() / k; ++row) {
            const double *const of_double = array.values.data() + row * k, *const token = by.token->values.data() +
                                                                                          row % routes * dim;
            const auto place = std::mismatch(of_double, of_double + k, actual.at(name).values.data() + row * k);
            if (place.first == of_double + k) continue;
            const auto first_of = [&](double index) {
                return (row / routes * length + static_cast<std::size_t>(index)) * dim;
            };
            const std::size_t above = first_of(*place.first), chosen = first_of(*place.second);
            const auto length_of = [&](std::size_t first) {
                double sum = 0;
                for (std::size_t j = first; j < first + dim; ++j) {
                    const double value = x.values[j] + added[j];
                    sum += value * value;
                }
                return by_cosine ? std::sqrt(sum) : 1;
            };
            const double of_above = length_of(above), of_chosen = length_of(chosen);
            double gap = 0, terms = 0, square = 0, along = 0;
            for (std::size_t j = 0; j < dim; ++j) {
                const double of_row = (x.values[chosen + j] + added[chosen + j]) / of_chosen;
                gap += ((x.values[above + j] + added[above + j]) / of_above - of_row) * token[j];
                terms += (std::abs(x.values[above + j]) / of_above + std::abs(x.values[chosen + j]) / of_chosen) *
                         std::abs(token[j]);
                square += token[j] * token[j];
                along += of_row * token[j];
            }
            const double slope =
                by_cosine ? (square - along * along) / of_chosen : square;  // of the logit, along token
            CHECK(std::abs(gap) <= 1e-6 * terms);
            const double raise = std::abs(gap) + 1e-12 * terms;
            for (std::size_t j = 0; j < dim; ++j) added[chosen + j] += (gap + raise) * token[j] / slope;
            nudged = true;
        }
    }
    return nudged;
}

/// Holds what a golden file's computation gives in a precision against double, on the same numbers. Both route by the
/// inputs, or, in the second half of a block, by what the first has computed on the device. So they route the same
/// tokens, in the same order, and what is left is the rounding of intermediate results. What that may change is
/// measured, for it depends on the case (gradients of routers are differences of much larger terms): by how far the
/// results in double move when each number of a weight, of a bias and of the gradient of the output moves at random by
/// up to what it may be rounded by. README.md says how `factor` was found.
void compare_golden(const Golden& in_double, const Golden& on_device, Precision precision) {
    constexpr double factor = 4;
    golden::File file = golden::read_file(in_double.path);
    const double rounding = rounding_of(precision);
    golden::Arrays inputs;
    golden::Variation variation{.in_halves = true};
    variation.number = [&](const std::string& name, std::size_t, double value) {
        const double stored = precision == Precision::bf16 ? rounded(precision, value) : value;
        inputs[name].values.push_back(stored);
        return stored;
    };
    const golden::Arrays actual = on_device.run(precision, file, variation);
    variation.middle = &actual;
    for (auto& [name, array] : inputs) array.shape = file.use(name).shape;
    for (const auto& [name, array] : actual)
        if (name.starts_with("middle.")) inputs[name] = array;

    Nudges nudges;
    variation.number = [&](const std::string& name, std::size_t i, double) {
        const auto nudge = nudges.find(name);
        return inputs.at(name).values[i] + (nudge != nudges.end() ? nudge->second[i] : 0);
    };
    golden::Arrays expected = in_double.run(Precision::fp64, file, variation);
    for (int tries = 0; tries < 8 && nudge_routing(nudges, file, in_double.by_cosine, inputs, actual, expected);
         ++tries)
        expected = in_double.run(Precision::fp64, file, variation);

    std::map<std::string, double> squares;  // of the distances that results move, all draws together
    const auto number = variation.number;
    for (std::uint64_t draw = 0; draw < draws_of_rounding; ++draw) {
        const colt5::Random random(colt5::Seed{draw});
        std::uint64_t drawn = 0;
        variation.number = [&](const std::string& name, std::size_t i, double value) {
            const bool routes = name == "in.x" || name == "in.context" || name.ends_with("routing_token") ||
                                (name.starts_with("middle.") && name.ends_with("out"));
            return number(name, i, value) * (routes ? 1 : 1 + rounding * (2 * random.uniform(drawn++) - 1));
        };
        for (const auto& [name, array] : in_double.run(Precision::fp64, file, variation)) {
            const double moved = distance(array.values, expected.at(name).values);
            squares[name] += moved * moved;
        }
    }

    double largest = 0;  // of the gradients' norms
    for (const auto& [name, array] : expected)
        if (name.starts_with("grad.")) largest = std::max(largest, norm(array.values));
    for (const auto& [name, array] : expected) {
        CAPTURE(name);
        const std::vector<double>& values = actual.at(name).values;
        if (is_routing(name)) {
            CHECK(values == array.values);
        } else if (name == "out.y, inference") {
            CHECK(values == actual.at("out.y").values);  // the halves are the block
        } else {
            const double size = std::max(norm(array.values), 1e-6 * largest);  // it may vanish
            const double moved = std::sqrt(squares.at(name) / double{draws_of_rounding});
            const double allowed = factor * (moved + rounding / 2 * size), error = distance(values, array.values);
            report(in_double.name + ", " + std::to_string(error / allowed) + " of what is allowed", precision, name,
                   error / size);
            CHECK(error <= allowed);
        }
    }
}

}  // namespace

TEST_CASE("cuda: goldens in tf32" * doctest::skip(!has_gpu())) {
    const auto in_double = goldens_in_double(), in_float = goldens_in_float();
    for (std::size_t i = 0; i < in_double.size(); ++i) {
        CAPTURE(in_double[i].name);
        compare_golden(in_double[i], in_float[i], Precision::tf32);
    }
}

TEST_CASE("cuda: goldens in bfloat16" * doctest::skip(!has_gpu() || sanitized("initcheck"))) {
    const auto in_double = goldens_in_double(), in_bfloat16 = goldens_in_bfloat16();
    for (std::size_t i = 0; i < in_double.size(); ++i) {
        CAPTURE(in_double[i].name);
        compare_golden(in_double[i], in_bfloat16[i], Precision::bf16);
    }
}

TEST_SUITE_END();
