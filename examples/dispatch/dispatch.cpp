// SPDX-License-Identifier: MIT
// One binary for several processors. This program is compiled for any x86-64 and loads block.cpp compiled for the best
// instruction set that the processor has; to show it, it runs all of them and compares.
#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <filesystem>
#include <vector>

namespace {

struct Library {
    const char* name;
    bool supported;
};
using RunBlock = bool(const float* tokens, std::ptrdiff_t n, float* out) noexcept;

/// The best first. Processors have the rest of a level with what is asked for here, which g++ 12 and clang 16 know.
std::vector<Library> libraries() {
    __builtin_cpu_init();
    const bool v2 =
        __builtin_cpu_supports("ssse3") && __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt");
    const bool v3 = v2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    const bool v4 = v3 && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512cd");
    return {{"block_x86-64-v4.so", v4}, {"block_x86-64-v3.so", v3}, {"block_x86-64-v2.so", v2}};
}
RunBlock* load(const std::filesystem::path& path) {
    void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    return library == nullptr ? nullptr : reinterpret_cast<RunBlock*>(dlsym(library, "run_block"));
}

}  // namespace

int main() {
    const auto folder = std::filesystem::read_symlink("/proc/self/exe").parent_path();
    constexpr std::ptrdiff_t n = 2048, dim = 128;
    std::vector<float> tokens(n * dim), first, out(n * dim);
    for (std::size_t i = 0; i < tokens.size(); ++i)
        tokens[i] = static_cast<float>(std::sin(0.37 * static_cast<double>(i)));
    for (const auto& [name, supported] : libraries()) {
        if (!supported) {
            std::printf("%s: not on this processor\n", name);
            continue;
        }
        RunBlock* const run_block = load(folder / name);
        if (run_block == nullptr || !run_block(tokens.data(), n, out.data())) {
            std::printf("%s: failed\n", name);
            return 1;
        }
        const auto begin = std::chrono::steady_clock::now();
        run_block(tokens.data(), n, out.data());
        const std::chrono::duration<double, std::milli> time = std::chrono::steady_clock::now() - begin;
        if (first.empty()) first = out;
        float largest = 0, difference = 0;
        for (std::size_t i = 0; i < out.size(); ++i) {
            largest = std::max(largest, std::abs(first[i]));
            difference = std::max(difference, std::abs(out[i] - first[i]));
        }
        std::printf("%s: %.1f ms, differs from the best by %.1e of the largest number\n", name, time.count(),
                    static_cast<double>(difference / largest));
        if (!(difference <= 1e-5f * largest)) return 1;
    }
}
