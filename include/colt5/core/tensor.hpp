// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <concepts>
#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include <colt5/core/error.hpp>
#include <colt5/core/policy.hpp>
#include <colt5/core/scalar.hpp>
#include <colt5/core/view.hpp>

namespace colt5 {

namespace detail {
/// Memory that goes back to its workspace, or an adopted pointer. What it does is not inlined: modules have many
/// tensors.
template <typename Workspace>
class Buffer {
public:
    Buffer() = default;
    explicit Buffer(void* adopted) : data_(adopted) {}
    /// For elements of a shape. Throws ValueError and OutOfMemory as Tensor says.
    [[gnu::noinline]] Buffer(std::shared_ptr<Workspace> workspace, std::span<const Index> shape,
                             std::size_t bytes_of_element)
        : workspace_(std::move(workspace)) {
        const Index bytes = expect_bytes("shape", shape, bytes_of_element);
        try {
            data_ = workspace_->allocate(static_cast<std::size_t>(bytes));
        } catch (const OutOfMemory& error) {
            throw OutOfMemory(concat({error.what(), "; wanted: a tensor of shape ", shape_string(shape), ", ",
                                      std::to_string(bytes), " bytes"}));
        }
    }
    Buffer(Buffer&& other) noexcept
        : workspace_(std::move(other.workspace_)), data_(std::exchange(other.data_, nullptr)) {}
    [[gnu::noinline]] Buffer& operator=(Buffer&& other) noexcept {
        Buffer old(std::move(other));  // what was here goes back to its workspace now
        std::swap(workspace_, old.workspace_);
        std::swap(data_, old.data_);
        return *this;
    }
    [[gnu::noinline]] ~Buffer() {
        if (workspace_ != nullptr && data_ != nullptr) workspace_->deallocate(data_);
    }

    void* data() const { return data_; }

private:
    std::shared_ptr<Workspace> workspace_;  // none of adopted memory
    void* data_ = nullptr;
};
}  // namespace detail

/// Owns a contiguous, row-major tensor in the memory of a policy. Move-only; `transfer` copies.
///
///     Tensor<float, Cpu, dynamic, dynamic, 512> tokens(policy, {batch, n, 512});   // uninitialized
///
/// The memory comes from the policy's workspace and goes back to it, whichever of the two lives longer. An adopted
/// tensor (see `adopt`) uses memory that stays another's. On the host, with <colt5/colt5.hpp> included,
/// `tensor.matrix()` and `tensor.vector()` are Eigen maps (no copy) and `tensor = expression` evaluates an Eigen
/// expression into the tensor.
template <typename T, Policy P, Index... Extents>
class Tensor {
public:
    using ViewType = View<T, Extents...>;
    using ConstViewType = View<const T, Extents...>;
    using value_type = T;
    using PolicyType = P;
    using Shape = typename ViewType::Shape;
    static constexpr std::size_t rank = ViewType::rank;

    Tensor() = default;

    /// Uninitialized. Throws ShapeError when `shape` contradicts a static extent, ValueError when it has a negative
    /// entry or too many elements, OutOfMemory.
    Tensor(const P& policy, const Shape& shape)
        : shape_(ViewType::expect_extents("shape", shape)), buffer_(policy.workspace(), shape, sizeof(T)) {}

    /// A tensor in memory of its caller, who frees it, after the tensor and every one that it is moved to: `shape` in
    /// row-major order where the policy's kernels read and write. Everything that takes a tensor takes it, such as a
    /// module's parameter or the place of a result; what is assigned to it replaces it and leaves that memory alone.
    /// Throws ShapeError and ValueError as the constructor does, and ValueError when `data` is null and not empty.
    ///
    ///     module.weight = MatrixTensor<float, Cpu>::adopt(pointer, module.weight.shape());
    static Tensor adopt(T* data, const Shape& shape) {
        ViewType::expect_extents("shape", shape);
        const Index bytes = expect_bytes("shape", shape, sizeof(T));
        expect_value(data != nullptr || bytes == 0, "data", "a pointer to the tensor's elements", "null");
        Tensor tensor;
        tensor.shape_ = shape;
        tensor.buffer_ = detail::Buffer<typename P::Workspace>(data);
        return tensor;
    }

    Tensor(Tensor&& other) noexcept : shape_(std::exchange(other.shape_, {})), buffer_(std::move(other.buffer_)) {}
    Tensor& operator=(Tensor&& other) noexcept {
        shape_ = std::exchange(other.shape_, {});
        buffer_ = std::move(other.buffer_);
        return *this;
    }

    /// Takes an Eigen expression of the same size as `matrix()`: evaluated in place, without a temporary.
    template <typename Expression>
    requires requires(const ViewType& to, const Expression& e) { assign_eigen(to, e); }
    Tensor& operator=(const Expression& expression) {
        assign_eigen(view(), expression);
        return *this;
    }

    T* data() { return static_cast<T*>(buffer_.data()); }
    const T* data() const { return static_cast<const T*>(buffer_.data()); }
    const Shape& shape() const { return shape_; }
    Index extent(std::size_t axis) const { return shape_[axis]; }
    Index size() const {
        Index product = 1;
        for (const Index extent : shape_) product *= extent;
        return product;
    }
    explicit operator bool() const { return buffer_.data() != nullptr; }

    operator ViewType() { return ViewType::unchecked(data(), shape_); }
    operator ConstViewType() const { return ConstViewType::unchecked(data(), shape_); }

    /// With every extent dynamic, which is what operations take.
    auto view() { return ViewType::unchecked(data(), shape_).view(); }
    auto view() const { return const_view(); }
    auto const_view() const { return ConstViewType::unchecked(data(), shape_).view(); }

    /// Eigen maps, row-major: all leading axes merged into rows, or everything in one vector. Host tensors only.
    auto matrix() { return eigen_matrix(view()); }
    auto matrix() const { return eigen_matrix(const_view()); }
    auto vector() { return eigen_vector(view()); }
    auto vector() const { return eigen_vector(const_view()); }

private:
    Shape shape_{};
    detail::Buffer<typename P::Workspace> buffer_;
};

template <typename T, Policy P>
using VectorTensor = Tensor<T, P, dynamic>;  // (n)
template <typename T, Policy P>
using MatrixTensor = Tensor<T, P, dynamic, dynamic>;  // (rows, columns)
template <typename T, Policy P>
using TokensTensor = Tensor<T, P, dynamic, dynamic, dynamic>;  // (b, n, d)

// Arguments of modules: what is wrong with one is said at compile time, or in a message that names it.

/// Whether what a call is given may be in the memory of policy P: tensors know whose they are, views do not.
template <typename Given, typename P>
inline constexpr bool lives_on = [] {
    if constexpr (requires { typename std::remove_cvref_t<Given>::PolicyType; })
        return std::same_as<typename std::remove_cvref_t<Given>::PolicyType, P>;
    else
        return true;
}();

/// Whether what a call is given, as a forwarding reference, outlives the call: a name, or a view.
template <typename Given>
inline constexpr bool outlives_call =
    std::is_lvalue_reference_v<Given> || std::is_trivially_copyable_v<std::remove_cvref_t<Given>>;

/// Converts an argument to `Wanted`, a view. Throws a ShapeError that names the argument, or a ValueError if it is a
/// view of null; a wrong rank, scalar type or static extent, and a tensor of another policy than P, do not compile.
template <typename Wanted, typename P, typename Given>
Wanted expect(std::string_view argument, const Given& given) {
    static_assert(lives_on<Given, P>,
                  "colt5: this tensor is in the memory of another policy than the module's; see `transfer`");
    const auto view = expect<Wanted>(argument, given);
    expect_value(view || view.size() == 0, argument, "a view of data", "null");
    return view;
}

/// A view V as an argument: of a view, or of a tensor of policy P.
template <typename V, typename P>
class Argument : public V {
public:
    using V::V;
    Argument() = default;
    template <typename Given>
    requires std::convertible_to<Given&&, V> Argument(Given&& given)  // NOLINT: converts as V does
        : V(given) {
        static_assert(lives_on<Given, P>,
                      "colt5: this tensor is in the memory of another policy than the module's; see `transfer`");
    }
};

/// The same for a view that is kept beyond the call, such as in saved activations: a temporary tensor would be gone by
/// then, and does not compile.
template <typename V, typename P>
class Kept : public Argument<V, P> {
public:
    using Argument<V, P>::Argument;
    Kept() = default;
    template <typename Given>
    requires std::convertible_to<Given&&, V> Kept(Given&& given)  // NOLINT: converts as V does
        : Argument<V, P>(std::forward<Given>(given)) {
        static_assert(
            outlives_call<Given>,
            "colt5: a view of this tensor is kept beyond the call: give it a name, a temporary is gone by then");
    }
};

/// An uninitialized tensor of the same type of element and the same shape.
template <Policy P, Viewable V>
auto tensor_like(const P& policy, const V& tensor) {
    return [&]<std::size_t... Axes>(std::index_sequence<Axes...>) {
        return Tensor<typename V::value_type, P, (static_cast<void>(Axes), dynamic)...>(policy, tensor.shape());
    }
    (std::make_index_sequence<V::rank>{});
}

/// A tensor on the policy's side with the values of a host array in row-major order; throws ShapeError on a wrong size.
template <typename Result, Policy P>
Result from_host(const P& policy, const typename Result::Shape& shape,
                 std::span<const typename Result::value_type> values) {
    Result result(policy, shape);
    if (result.size() != static_cast<Index>(values.size()))
        throw_shape_error("values", std::array<Index, 1>{result.size()},
                          std::array<Index, 1>{static_cast<Index>(values.size())});
    upload(policy, result.data(), values.data(), values.size_bytes());
    return result;
}

/// A copy in the memory of another policy, through the host.
template <Policy From, Policy To, Viewable V>
auto transfer(const From& from, const To& to, const V& tensor) {
    using T = typename V::value_type;
    const auto view = tensor.const_view();
    const auto size = static_cast<std::size_t>(view.size());
    const auto values = std::make_unique<T[]>(size);
    download(from, values.get(), view.data(), size * sizeof(T));
    auto copy = tensor_like(to, tensor);
    upload(to, copy.data(), values.get(), size * sizeof(T));
    return copy;
}

/// The values in row-major order, on the host.
template <Policy P, Viewable V>
std::vector<typename V::value_type> to_host(const P& policy, const V& tensor) {
    using T = typename V::value_type;
    const auto view = tensor.const_view();
    const auto size = static_cast<std::size_t>(view.size());
    if constexpr (std::is_same_v<T, bool>) {  // a vector of them has no data()
        const auto values = std::make_unique<bool[]>(size);
        download(policy, values.get(), view.data(), size);
        return std::vector<bool>(values.get(), values.get() + size);
    } else {
        std::vector<T> values(size);
        download(policy, values.data(), view.data(), size * sizeof(T));
        return values;
    }
}

}  // namespace colt5
