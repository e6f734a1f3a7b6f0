// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <cmath>
#include <vector>

#include <colt5/core/random.hpp>
#include <colt5/cpu/gemm.hpp>

using namespace colt5;
using cpu::Op;

namespace {

/// Rows of a matrix, further apart than they are long; what lies between is 777.
template <typename T>
struct Padded {
    Padded(Index rows, Index columns, std::uint64_t stream) : stride(columns + 3) {
        values.assign(static_cast<std::size_t>(std::max(Index{1}, rows * stride)), T(777));
        const Random random(Seed{9}, stream);
        for (Index i = 0; i < rows; ++i)
            for (Index j = 0; j < columns; ++j)
                (*this)(i, j) = static_cast<T>(random.normal(static_cast<std::uint64_t>(i * columns + j)));
    }
    T& operator()(Index i, Index j) { return values[static_cast<std::size_t>(i * stride + j)]; }
    T operator()(Index i, Index j) const { return values[static_cast<std::size_t>(i * stride + j)]; }
    T* data() { return values.data(); }
    const T* data() const { return values.data(); }
    Index stride;
    std::vector<T> values;
};

/// Checks that c is `expected(i, j)`, and that nothing was written between its rows.
template <typename T, typename Expected>
void check(const Padded<T>& c, Index m, Index n, Index k, Expected&& expected) {
    const double tolerance = (std::is_same_v<T, float> ? 1e-6 : 1e-15) * (10 + static_cast<double>(k));
    double worst = 0;
    bool untouched = true;
    for (Index i = 0; i < m; ++i) {
        for (Index j = 0; j < n; ++j) worst = std::max(worst, std::abs(double(c(i, j)) - expected(i, j)));
        for (Index j = n; j < c.stride; ++j) untouched = untouched && c(i, j) == T(777);
    }
    CHECK(worst <= tolerance);
    CHECK(untouched);
}

constexpr Index depth = cpu::GemmTile<float>::depth;
/// Around a tile, a block of the depth, and what is left behind them; a last block of depth one among them.
constexpr Index depths[] = {0, 1, 2, 7, depth - 1, depth, depth + 1, 2 * depth + 1};

}  // namespace

TEST_CASE_TEMPLATE("gemm: adds alpha · op(a) · op(b), in every shape of tails", T, float, double) {
    const Index columns = cpu::GemmTile<T>::columns;
    const auto product = [&]<Op op_a, Op op_b>(std::integral_constant<Op, op_a>, std::integral_constant<Op, op_b>,
                                               Index m, Index n, Index k) {
        CAPTURE(m);
        CAPTURE(n);
        CAPTURE(k);
        const Padded<T> a = op_a == Op::none ? Padded<T>(m, k, 0) : Padded<T>(k, m, 0);
        const Padded<T> b = op_b == Op::none ? Padded<T>(k, n, 1) : Padded<T>(n, k, 1);
        Padded<T> c(m, n, 2);
        const Padded<T> before = c;
        cpu::gemm<op_a, op_b>(m, n, k, T(0.5), a.data(), a.stride, b.data(), b.stride, c.data(), c.stride);
        check(c, m, n, k, [&](Index i, Index j) {
            double sum = before(i, j);
            for (Index s = 0; s < k; ++s)
                sum +=
                    0.5 * double(op_a == Op::none ? a(i, s) : a(s, i)) * double(op_b == Op::none ? b(s, j) : b(j, s));
            return sum;
        });
    };
    const std::integral_constant<Op, Op::none> none;
    const std::integral_constant<Op, Op::transpose> transpose;
    for (const Index k : depths)
        for (const Index m : {Index{1}, Index{6}, Index{13}})
            for (const Index n : {Index{1}, columns, 2 * columns + 5}) {
                product(none, none, m, n, k);
                product(none, transpose, m, n, k);
                product(transpose, none, m, n, k);
            }
}

TEST_CASE_TEMPLATE("PackedMatrix: products with a row and a matrix added, whose rows have a distance of their own", T,
                   float, double) {
    const Cpu policy(2);
    const Index columns = cpu::GemmTile<T>::columns;
    for (const Index rows : {cpu::many_rows, cpu::few_rows})
        for (const Index k : depths)
            for (const Index m : {Index{1}, Index{7}, Index{12}})
                for (const Index n : {Index{3}, columns, 2 * columns + 1}) {
                    CAPTURE(rows);
                    CAPTURE(k);
                    CAPTURE(m);
                    CAPTURE(n);
                    const Padded<T> a(m, k, 0), b(n, k, 1), row(1, n, 2);
                    Padded<T> matrix(m, n + 4, 3), c(m, n, 4);  // not as far apart as the rows of c
                    const cpu::PackedMatrix<Op::transpose, T> packed(policy, k, n, b.data(), b.stride, rows);
                    const auto sum = [&](Index i, Index j) {
                        double total = 0;
                        for (Index s = 0; s < k; ++s) total += double(a(i, s)) * double(b(j, s));
                        return total;
                    };
                    packed.multiply(m, a.data(), a.stride, {}, c.data(), c.stride);
                    check(c, m, n, k, sum);
                    packed.multiply(m, a.data(), a.stride, {row.data(), matrix.data(), matrix.stride}, c.data(),
                                    c.stride);
                    check(c, m, n, k, [&](Index i, Index j) { return sum(i, j) + row(0, j) + matrix(i, j); });
                    const Padded<T> before = c;
                    packed.multiply(m, a.data(), a.stride, {nullptr, c.data(), c.stride}, c.data(), c.stride);
                    check(c, m, n, k, [&](Index i, Index j) { return sum(i, j) + before(i, j); });
                }
}

TEST_CASE_TEMPLATE("PackedMatrix: adds aᵀ · b", T, float, double) {
    const Cpu policy(1);
    const Index columns = cpu::GemmTile<T>::columns;
    for (const Index k : depths)
        for (const Index m : {Index{1}, Index{6}, Index{11}})
            for (const Index n : {Index{2}, 3 * columns + 1}) {
                CAPTURE(k);
                CAPTURE(m);
                CAPTURE(n);
                const Padded<T> a(k, m, 0), b(k, n, 1);
                Padded<T> c(m, n, 2);
                const Padded<T> before = c;
                const cpu::PackedMatrix<Op::none, T> packed(policy, k, n, b.data(), b.stride);
                packed.add_transposed(m, a.data(), a.stride, c.data(), c.stride);
                check(c, m, n, k, [&](Index i, Index j) {
                    double sum = before(i, j);
                    for (Index s = 0; s < k; ++s) sum += double(a(s, i)) * double(b(s, j));
                    return sum;
                });
            }
}

TEST_CASE("PackedMatrix: a row gives the same bits in any panel and for any number of threads" *
          doctest::skip(cpu::uses_blas)) {  // the bits of a BLAS may depend on the number of rows
    const Index k = depth + 1, n = 37, m = 50;
    const Padded<float> a(m, k, 0), b(k, n, 1);
    Padded<float> whole(m, n, 2), single(1, n, 3);
    const Cpu policy(2), other(1);
    cpu::PackedMatrix<Op::none, float>(policy, k, n, b.data(), b.stride)
        .multiply(m, a.data(), a.stride, {}, whole.data(), whole.stride);
    const cpu::PackedMatrix<Op::none, float> few(other, k, n, b.data(), b.stride, 1);
    bool same = true;
    for (Index i = 0; i < m; ++i) {
        few.multiply(1, a.data() + i * a.stride, a.stride, {}, single.data(), single.stride);
        for (Index j = 0; j < n; ++j) same = same && single(0, j) == whole(i, j);
    }
    CHECK(same);
}
