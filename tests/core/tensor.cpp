// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <colt5/core/tensor.hpp>
#include <colt5/cpu/policy.hpp>

using namespace colt5;

TEST_CASE("tensor: has a shape, memory aligned to 64 bytes, and views of it") {
    const Cpu policy(1);
    Tensor<float, Cpu, dynamic, dynamic, 5> tensor(policy, {2, 3, 5});
    CHECK(tensor);
    CHECK(tensor.size() == 30);
    CHECK(tensor.extent(1) == 3);
    CHECK(reinterpret_cast<std::uintptr_t>(tensor.data()) % 64 == 0);
    for (Index i = 0; i < 30; ++i) tensor.data()[i] = static_cast<float>(i);
    CHECK(tensor.view()(1, 2, 4) == 29);
    CHECK(std::is_same_v<decltype(tensor.view()), TokensView<float>>);
    CHECK(std::is_same_v<decltype(tensor.const_view()), TokensView<const float>>);
    CHECK(std::is_same_v<decltype(std::as_const(tensor).view()), TokensView<const float>>);
    const View<const float, dynamic, dynamic, 5> view = std::as_const(tensor);
    CHECK(view.data() == tensor.data());
    const View<float, dynamic, dynamic, 5> writable = tensor;
    writable(0, 0, 0) = 7;
    CHECK(tensor.data()[0] == 7);
}

TEST_CASE("tensor: a shape that contradicts the type, or is negative, is an error") {
    const Cpu policy(1);
    using Wide = Tensor<float, Cpu, dynamic, 5>;
    using Matrix = MatrixTensor<float, Cpu>;
    using Bytes = VectorTensor<bool, Cpu>;
    CHECK_THROWS_WITH_AS(Wide(policy, {2, 6}), "colt5: `shape` must have shape (any, 5), but has (2, 6)", ShapeError);
    CHECK_THROWS_WITH_AS(Matrix(policy, {2, -6}), "colt5: `shape` must be non-negative in every dimension, but is -6",
                         ValueError);
    CHECK_THROWS_WITH_AS(Matrix(policy, {Index{1} << 40, Index{1} << 40}),
                         "colt5: `shape` must be of less than 2^63 bytes, but is (1099511627776, 1099511627776)",
                         ValueError);
    for (const auto& shape : {std::array<Index, 2>{0, Index{1} << 62}, {Index{1} << 62, 0}})
        CHECK_THROWS_AS(Matrix(policy, shape), ValueError);  // its strides would overflow
    CHECK_THROWS_AS(Bytes(policy, {std::numeric_limits<Index>::max()}), OutOfMemory);
    CHECK(policy.workspace()->statistics().in_use == 0);
}

TEST_CASE("tensor: default-constructed it is empty; one without elements is not") {
    const Cpu policy(1);
    const MatrixTensor<float, Cpu> absent, no_rows(policy, {0, 4});
    CHECK_FALSE(absent);
    CHECK_FALSE(absent.const_view());
    CHECK(no_rows);
    CHECK(no_rows.size() == 0);
}

TEST_CASE("tensor: moves and does not copy; what was moved from is empty") {
    const Cpu policy(1);
    using Matrix = MatrixTensor<float, Cpu>;
    CHECK(!std::is_copy_constructible_v<Matrix>);
    CHECK(!std::is_copy_assignable_v<Matrix>);
    CHECK(std::is_nothrow_move_constructible_v<Matrix>);
    CHECK(std::is_nothrow_move_assignable_v<Matrix>);
    Matrix first(policy, {2, 3});
    const float* const data = first.data();
    Matrix second = std::move(first);
    CHECK_FALSE(first);
    CHECK(first.size() == 0);
    CHECK(second.data() == data);
    CHECK(second.shape() == std::array<Index, 2>{2, 3});

    Matrix third(policy, {400, 5});
    const auto before = policy.workspace()->statistics().in_use;
    third = std::move(second);  // what it held goes back at once
    CHECK(policy.workspace()->statistics().in_use < before);
    CHECK_FALSE(second);
    CHECK(third.data() == data);
    auto& same = third;
    third = std::move(same);
    CHECK(third.data() == data);
    CHECK(third.shape() == std::array<Index, 2>{2, 3});
}

TEST_CASE("tensor: memory goes back to the workspace, and the policy may die first") {
    std::optional<Cpu> policy(std::in_place, 1);
    const std::weak_ptr<Cpu::Workspace> workspace = policy->workspace();
    {
        VectorTensor<float, Cpu> tensor(*policy, {1000});
        CHECK(workspace.lock()->statistics().in_use >= 4000);
    }
    CHECK(workspace.lock()->statistics().in_use == 0);
    {
        VectorTensor<float, Cpu> survivor(*policy, {1000});
        policy.reset();
        REQUIRE_FALSE(workspace.expired());
        survivor.data()[999] = 1;
        CHECK(workspace.lock()->statistics().in_use >= 4000);
    }
    CHECK(workspace.expired());
}

TEST_CASE("tensor: tensor_like has the type of element and the shape") {
    const Cpu policy(1);
    const std::array<int, 6> values{};
    const auto tensor = tensor_like(policy, View<const int, 2, dynamic>(values.data(), {2, 3}));
    CHECK(std::is_same_v<decltype(tensor), const MatrixTensor<int, Cpu>>);
    CHECK(tensor.shape() == std::array<Index, 2>{2, 3});
}

TEST_CASE("tensor: from the host and back") {
    const Cpu policy(1);
    const std::vector<double> values{1, 2, 3, 4, 5, 6};
    const auto tensor = from_host<MatrixTensor<double, Cpu>>(policy, {2, 3}, values);
    CHECK(tensor.view()(1, 0) == 4);
    CHECK(to_host(policy, tensor) == values);
    CHECK(to_host(policy, tensor.view()[1]) == std::vector<double>{4, 5, 6});
    Tensor<bool, Cpu, 3> flags(policy, {3});
    std::copy_n(std::array{true, false, true}.data(), 3, flags.data());
    CHECK(to_host(policy, flags) == std::vector<bool>{true, false, true});
    CHECK(to_host(policy, MatrixTensor<double, Cpu>(policy, {0, 3})).empty());
    CHECK_THROWS_WITH_AS((from_host<MatrixTensor<double, Cpu>>(policy, {2, 4}, values)),
                         "colt5: `values` must have shape (8), but has (6)", ShapeError);
}

TEST_CASE("tensor: transfer copies to the memory of another policy") {
    const Cpu here(1), there(1);
    Tensor<bool, Cpu, dynamic, dynamic> mask(here, {2, 3});
    for (Index i = 0; i < 6; ++i) mask.data()[i] = i % 2 == 0;
    const auto copy = transfer(here, there, mask);
    CHECK(copy.shape() == mask.shape());
    CHECK(copy.data() != mask.data());
    for (Index i = 0; i < 6; ++i) CHECK(copy.data()[i] == (i % 2 == 0));
    CHECK(there.workspace()->statistics().in_use > 0);
}

TEST_CASE("tensor: without memory for it, the error says what was wanted") {
    const Cpu policy(1);
    std::string message;
    try {
        MatrixTensor<float, Cpu>(policy, {Index{1} << 30, Index{1} << 28});
    } catch (const OutOfMemory& error) {
        message = error.what();
    }
    CAPTURE(message);
    CHECK(message.starts_with("colt5: out of memory: "));
    CHECK(message.ends_with("; wanted: a tensor of shape (1073741824, 268435456), 1152921504606846976 bytes"));
    CHECK(policy.workspace()->statistics().in_use == 0);
}

TEST_CASE("tensor: adopted memory is read and written in place, moved along, and left alone in the end") {
    const Cpu policy(1);
    using Matrix = MatrixTensor<float, Cpu>;
    std::vector<float> values{0, 1, 2, 3, 4, 5};
    {
        Matrix tensor = Matrix::adopt(values.data(), {2, 3});
        CHECK(tensor);
        CHECK(tensor.shape() == std::array<Index, 2>{2, 3});
        CHECK(tensor.view()(1, 2) == 5);
        tensor.view()(0, 1) = 7;
        Matrix moved = std::move(tensor);
        CHECK_FALSE(tensor);
        CHECK(moved.data() == values.data());
        moved = Matrix(policy, {1, 1});  // takes its place, not its memory
        moved.data()[0] = 9;
        const auto of_one = policy.workspace()->statistics().in_use;
        Matrix own(policy, {4, 4});
        own = Matrix::adopt(values.data(), {3, 2});  // what was here goes back to the policy
        CHECK(own.data() == values.data());
        CHECK(of_one > 0);
        CHECK(policy.workspace()->statistics().in_use == of_one);
    }
    CHECK(values == std::vector<float>{0, 7, 2, 3, 4, 5});
    CHECK(policy.workspace()->statistics().in_use == 0);
    const Matrix no_rows = Matrix::adopt(nullptr, {0, 3});
    CHECK(no_rows.size() == 0);
    CHECK_THROWS_WITH_AS(Matrix::adopt(nullptr, {2, 3}),
                         "colt5: `data` must be a pointer to the tensor's elements, but is null", ValueError);
    using Wide = Tensor<float, Cpu, dynamic, 5>;
    CHECK_THROWS_WITH_AS(Wide::adopt(values.data(), {1, 6}), "colt5: `shape` must have shape (any, 5), but has (1, 6)",
                         ShapeError);
    CHECK_THROWS_AS(Matrix::adopt(values.data(), {1, -6}), ValueError);
}
