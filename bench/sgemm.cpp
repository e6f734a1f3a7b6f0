// SPDX-License-Identifier: MIT
// What multiplies matrices at which rate on this machine. For each line on the standard input, makes one product with
// each and prints `NAME GFLOPS` for all of them in one line; the argument is the number of threads, which share out the
// rows. With COLT5_USE_BLAS, that is OpenBLAS, which OPENBLAS_NUM_THREADS=1 keeps on each thread.
#include <chrono>
#include <iostream>
#include <string>

#include <Eigen/Core>

#include <colt5/core/random.hpp>
#include <colt5/cpu/eigen.hpp>
#include <colt5/cpu/linear.hpp>

namespace {

constexpr colt5::Index size = 2048;

template <typename Product>
void report(const char* name, const Product& product) {
    using Clock = std::chrono::steady_clock;
    const auto begin = Clock::now();
    product();
    const std::chrono::duration<double> seconds = Clock::now() - begin;
    std::cout << name << ' ' << 2e-9 * size * size * size / seconds.count() << ' ';
}

}  // namespace

int main(int argc, char** argv) {
    const colt5::Cpu policy(argc > 1 ? std::stoi(argv[1]) : 0);
    colt5::TokensTensor<float, colt5::Cpu> x(policy, {1, size, size}), y(policy, {1, size, size});
    colt5::MatrixTensor<float, colt5::Cpu> weight(policy, {size, size});
    fill_normal(policy, x, colt5::Random(colt5::Seed{1}));
    fill_normal(policy, weight, colt5::Random(colt5::Seed{2}));

    const colt5::Index parts = policy.threads(), rows = size / parts;
    const auto in_parts = [&](auto&& product) {  // product(first row, rows) on each thread
        parallel_for(policy, parts, [&](colt5::Index i) {
            const colt5::Index first = i * rows;
            product(first, i + 1 < parts ? rows : size - first);
        });
    };
    for (std::string line; std::getline(std::cin, line); std::cout << std::endl) {
#if defined(COLT5_USE_BLAS)
        report("OpenBLAS", [&] {
            in_parts([&](colt5::Index first, colt5::Index count) {
                colt5::cpu::blas_gemm(false, true, count, size, size, 1.0f, x.data() + first * size, size,
                                      weight.data(), size, y.data() + first * size, size);
            });
        });
#else
        Eigen::setNbThreads(1);
        report("Eigen", [&] {
            in_parts([&](colt5::Index first, colt5::Index count) {
                y.matrix().middleRows(first, count).noalias() =
                    x.matrix().middleRows(first, count) * weight.matrix().transpose();
            });
        });
        report("colt5", [&] { linear(policy, y.view(), x, weight); });
#endif
    }
}
