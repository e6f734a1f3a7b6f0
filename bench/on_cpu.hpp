// SPDX-License-Identifier: MIT
#pragma once

#include <malloc.h>

#include <chrono>
#include <fstream>
#include <ostream>
#include <stdexcept>
#include <string>
#include <vector>

#include <colt5/colt5.hpp>

/// What measure.hpp needs to know of the CPU.
namespace bench {

using Policy = colt5::Cpu;
using Scalar = float;

inline Policy make_policy(const std::string& threads) {
    return Policy(std::stoi(threads));
}

class Meter {
public:
    static constexpr const char* library =
#if defined(COLT5_USE_BLAS)
        "OpenBLAS"
#else
        "our own kernel"
#endif
#if defined(__AVX512F__)
        " (AVX-512)"
#elif defined(__AVX2__)
        " (AVX2)"
#endif
        ", compiled by "
#if !defined(__clang__)
        "g++ "
#endif
        __VERSION__;

    explicit Meter(const Policy& policy) : policy_(policy) {
        forget_memory();
        before_mib_ = memory_mib("VmRSS");
    }

    void rest() const {}
    void start() {
        forget_memory();
        begin_ = Clock::now();
    }
    void stop(std::ostream& answer) const {
        const double seconds = seconds_since_begin();
        answer << seconds << ' ' << memory_mib("VmHWM") - before_mib_;
    }

    template <typename Once>
    std::vector<double> time(int count, const Once& once) {
        begin_ = Clock::now();
        for (int i = 0; i < count; ++i) once();
        return {seconds_since_begin() / count};
    }
    template <typename Once>
    std::vector<double> replay(int, const Once&) {
        throw std::invalid_argument("there are no CUDA graphs on the CPU");
    }

private:
    using Clock = std::chrono::steady_clock;

    double seconds_since_begin() const {
        return std::chrono::duration<double>(Clock::now() - begin_).count();
    }

    /// A field of /proc/self/status in MiB.
    static double memory_mib(const std::string& field) {
        std::ifstream status("/proc/self/status");
        for (std::string line; std::getline(status, line);)
            if (line.starts_with(field + ":")) return std::stod(line.substr(field.size() + 1)) / 1024;
        throw std::runtime_error("/proc/self/status has no " + field);
    }

    /// Hands free memory back to the system and lets the peak of this process start anew.
    void forget_memory() const {
        policy_.workspace()->release_unused();
        malloc_trim(0);
        std::ofstream("/proc/self/clear_refs") << 5;
    }

    const Policy& policy_;
    double before_mib_;
    Clock::time_point begin_;
};

}  // namespace bench
