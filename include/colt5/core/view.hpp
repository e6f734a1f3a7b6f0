// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

#include <colt5/core/error.hpp>
#include <colt5/core/macros.hpp>

/// Sizes, shapes and views, and the checks of arguments, which throw.
namespace colt5 {

/// Sizes and indices are signed, as in Eigen: differences of indices are meaningful and loops need no casts.
using Index = std::ptrdiff_t;

/// ⌈a / b⌉ for a ≥ 0 and b > 0 of any size.
COLT5_HOST_DEVICE constexpr Index divide_up(Index a, Index b) {
    return a / b + (a % b != 0 ? 1 : 0);
}
/// The smallest multiple of `unit` that is not below n ≥ 0.
COLT5_HOST_DEVICE constexpr Index round_up(Index n, Index unit) {
    return divide_up(n, unit) * unit;
}
template <std::unsigned_integral N>
constexpr N round_up(N n, N unit) {
    return n / unit * unit + (n % unit != 0 ? unit : N{0});
}

/// "(2, any, 512)": dimensions that may take any value are negative.
[[gnu::noinline]] inline std::string shape_string(std::span<const Index> shape) {
    std::string text = "(";
    for (std::size_t i = 0; i < shape.size(); ++i) {
        if (i > 0) text += ", ";
        text += shape[i] < 0 ? "any" : value_string(shape[i]);
    }
    return text += ')';
}

[[noreturn, gnu::noinline]] inline void throw_shape_error(std::string_view argument, std::span<const Index> expected,
                                                          std::span<const Index> actual) {
    throw ShapeError(detail::concat(
        {"colt5: `", argument, "` must have shape ", shape_string(expected), ", but has ", shape_string(actual)}));
}

namespace detail {
[[gnu::noinline]] constexpr void expect_extents(std::string_view argument, std::span<const Index> actual,
                                                std::span<const Index> expected) {
    for (std::size_t i = 0; i < actual.size(); ++i)
        if (expected[i] >= 0 && expected[i] != actual[i]) throw_shape_error(argument, expected, actual);
}
[[gnu::noinline]] inline void expect_extents(std::string_view prefix, std::string_view name,
                                             std::span<const Index> actual, std::span<const Index> expected) {
    for (std::size_t i = 0; i < actual.size(); ++i)
        if (expected[i] != actual[i]) throw_shape_error(std::string(prefix).append(name), expected, actual);
}
[[noreturn, gnu::noinline]] inline void throw_value_error(std::string_view argument, std::string_view condition,
                                                          std::string_view value) {
    throw ValueError(concat({"colt5: `", argument, "` must be ", condition, ", but is ", value}));
}
template <typename Value>
[[noreturn, gnu::noinline]] void throw_value_error_of(std::string_view argument, std::string_view condition,
                                                      const Value& value) {
    throw_value_error(argument, condition, value_string(value));
}
}  // namespace detail

/// Throws ShapeError unless `actual` equals `expected`, where negative expected dimensions match anything.
template <std::size_t Rank>
constexpr void expect_shape(std::string_view argument, const std::array<Index, Rank>& actual,
                            const std::array<Index, Rank>& expected) {
    detail::expect_extents(argument, actual, expected);
}

/// The same for an argument called `prefix` + `name`, which are put together only when it is wrong.
template <std::size_t Rank>
void expect_shape(std::string_view prefix, std::string_view name, const std::array<Index, Rank>& actual,
                  const std::array<Index, Rank>& expected) {
    detail::expect_extents(prefix, name, actual, expected);
}

/// Throws ValueError: "colt5: `argument` must be CONDITION, but is VALUE".
template <typename Value>
void expect_value(bool holds, std::string_view argument, std::string_view condition, const Value& value) {
    if (holds) return;
    if constexpr (std::convertible_to<const Value&, std::string_view>)
        detail::throw_value_error(argument, condition, value);
    else
        detail::throw_value_error_of(argument, condition, value);
}

/// The bytes of a tensor of this shape. Throws ValueError when an extent is negative, or when there are 2^63 bytes or
/// more, where an extent of 0 counts as 1: the strides of an empty tensor are numbers, too.
[[gnu::noinline]] constexpr Index expect_bytes(std::string_view argument, std::span<const Index> shape,
                                               std::size_t bytes_of_element) {
    auto bytes = static_cast<Index>(bytes_of_element);
    bool is_empty = false, fits = true;
    for (const Index extent : shape) {
        if (extent < 0) expect_value(false, argument, "non-negative in every dimension", extent);
        is_empty = is_empty || extent == 0;
        fits = fits && !__builtin_mul_overflow(bytes, extent == 0 ? 1 : extent, &bytes);
    }
    if (!fits) expect_value(false, argument, "of less than 2^63 bytes", shape_string(shape));
    return is_empty ? 0 : bytes;
}

/// first + count <= size, without overflow.
constexpr bool is_range_of(Index first, Index count, Index size) {
    return first >= 0 && count >= 0 && first <= size && count <= size - first;
}

/// Marks an extent that is known at run time only.
inline constexpr Index dynamic = -1;

namespace detail {
/// The number of elements before slice `first`. Throws ValueError when there are no such slices.
[[gnu::noinline]] constexpr Index expect_range(Index first, Index count, std::span<const Index> shape) {
    if (!is_range_of(first, count, shape[0]))
        throw ValueError(concat({"colt5: `range` must be within ", std::to_string(shape[0]), " slices, but is ",
                                 std::to_string(count), " from slice ", std::to_string(first), " on"}));
    Index before = first;
    for (const Index extent : shape.subspan(1)) before *= extent;
    return before;
}
/// Throws ShapeError or ValueError as View::reshape says.
[[gnu::noinline]] constexpr void expect_same_size(std::span<const Index> shape, std::span<const Index> from,
                                                  std::size_t bytes_of_element) {
    Index size = 1;
    for (const Index extent : from) size *= extent;
    if (expect_bytes("reshape", shape, bytes_of_element) != size * static_cast<Index>(bytes_of_element))
        throw_shape_error("reshape", shape, from);
}
}  // namespace detail

/// Non-owning, contiguous, row-major tensor. Each extent is a number known at compile time, or `dynamic`.
///
///     View<const float, dynamic, dynamic, 512> tokens(data, {batch, n, 512});   // (b, n, d)
///
/// Copying is cheap and shallow; constness of the elements is in `T`. A view without data (default-constructed)
/// converts to false and stands for an optional argument that is not given. Converting a dynamic extent to a static one
/// checks it at run time and throws ShapeError; two different static extents do not convert.
template <typename T, Index... Extents>
class View {
public:
    static constexpr std::size_t rank = sizeof...(Extents);
    static constexpr std::array<Index, rank> extents{Extents...};
    static_assert(rank > 0, "colt5::View needs at least one extent");
    static_assert(((Extents >= 0 || Extents == dynamic) && ...), "colt5::View extents are numbers >= 0 or dynamic");

    using element_type = T;
    using value_type = std::remove_const_t<T>;
    using Shape = std::array<Index, rank>;

    constexpr View() = default;

    /// Throws ShapeError when `shape` contradicts a static extent, ValueError when it has a negative entry or too many
    /// elements.
    constexpr View(T* data, const Shape& shape) : data_(data), shape_(shape) {
        expect_extents("view", shape);
        expect_bytes("view", shape, sizeof(T));
    }

    template <typename U, Index... Others>
    requires(sizeof...(Others) == rank && std::convertible_to<U (*)[], T (*)[]> &&
             ((Others == Extents || Others == dynamic || Extents == dynamic) &&
              ...)) constexpr View(const View<U, Others...>& other)
        : data_(other.data()), shape_(other.shape()) {
        if (data_ != nullptr) expect_extents("view", shape_);
    }

    /// Returns `shape`. Throws ShapeError when it contradicts a static extent.
    static constexpr const Shape& expect_extents(std::string_view argument, const Shape& shape) {
        if constexpr (((Extents != dynamic) || ...)) expect_shape(argument, shape, extents);
        return shape;
    }

    COLT5_HOST_DEVICE constexpr T* data() const { return data_; }
    COLT5_HOST_DEVICE constexpr const Shape& shape() const { return shape_; }
    COLT5_HOST_DEVICE constexpr Index extent(std::size_t axis) const { return shape_[axis]; }
    COLT5_HOST_DEVICE constexpr Index size() const {
        Index product = 1;
        for (std::size_t i = 0; i < rank; ++i) product *= shape_[i];
        return product;
    }
    COLT5_HOST_DEVICE constexpr explicit operator bool() const { return data_ != nullptr; }

    /// The element at (i, j, …); unchecked.
    template <std::convertible_to<Index>... Indices>
    requires(sizeof...(Indices) == rank) COLT5_HOST_DEVICE constexpr T& operator()(Indices... index) const {
        Index offset = 0;
        std::size_t axis = 0;
        ((offset = offset * shape_[axis++] + static_cast<Index>(index)), ...);
        return data_[offset];
    }

    /// The i-th slice along the first axis: a view of one rank less, or an element of a vector; unchecked.
    COLT5_HOST_DEVICE constexpr decltype(auto) operator[](Index i) const {
        if constexpr (rank == 1)
            return (data_[i]);
        else
            return slice(i, std::make_index_sequence<rank - 1>{});
    }

    /// The slices [first, first + count) along the first axis, all extents dynamic. Absent views stay absent. Throws
    /// ValueError when there are no such slices.
    constexpr auto range(Index first, Index count) const {
        auto part = view();
        if (data_ == nullptr) return part;
        const Index before = detail::expect_range(first, count, shape_);
        Shape shape = shape_;
        shape[0] = count;
        return decltype(part)::unchecked(data_ + before, shape);
    }

    /// All leading axes merged: (rows, last). A vector becomes one row.
    COLT5_HOST_DEVICE constexpr auto rows() const {
        const Index columns = shape_[rank - 1];
        Index count = 1;
        for (std::size_t i = 0; i + 1 < rank; ++i) count *= shape_[i];
        return View<T, dynamic, extents[rank - 1]>::unchecked(data_, {count, columns});
    }

    /// The same elements under another shape of the same size; throws ShapeError when it is not, ValueError when an
    /// entry is negative.
    template <std::size_t Rank>
    constexpr auto reshape(const std::array<Index, Rank>& shape) const {
        return reshape_to(shape, std::make_index_sequence<Rank>{});
    }

    /// The same view with every extent dynamic, which is what operations take.
    COLT5_HOST_DEVICE constexpr auto view() const { return erased<T>(std::make_index_sequence<rank>{}); }
    COLT5_HOST_DEVICE constexpr auto const_view() const { return erased<const T>(std::make_index_sequence<rank>{}); }

    /// A view of a shape that the caller vouches for: the constructor that device code may call.
    COLT5_HOST_DEVICE static constexpr View unchecked(T* data, const Shape& shape) {
        View view;
        view.data_ = data;
        view.shape_ = shape;
        return view;
    }

private:
    template <std::size_t... Axes>
    COLT5_HOST_DEVICE constexpr auto slice(Index i, std::index_sequence<Axes...>) const {
        Index stride = 1;
        for (std::size_t axis = 1; axis < rank; ++axis) stride *= shape_[axis];
        return View<T, extents[Axes + 1]...>::unchecked(data_ + i * stride, {shape_[Axes + 1]...});
    }
    template <typename U, std::size_t... Axes>
    COLT5_HOST_DEVICE constexpr auto erased(std::index_sequence<Axes...>) const {
        return View<U, (static_cast<void>(Axes), dynamic)...>::unchecked(data_, shape_);
    }
    template <std::size_t Rank, std::size_t... Axes>
    constexpr auto reshape_to(const std::array<Index, Rank>& shape, std::index_sequence<Axes...>) const {
        detail::expect_same_size(shape, shape_, sizeof(T));
        return View<T, (static_cast<void>(Axes), dynamic)...>::unchecked(data_, shape);
    }

    T* data_ = nullptr;
    Shape shape_{};
};

template <typename T>
using VectorView = View<T, dynamic>;  // (n)
template <typename T>
using MatrixView = View<T, dynamic, dynamic>;  // (rows, columns)
template <typename T>
using TokensView = View<T, dynamic, dynamic, dynamic>;  // (b, n, d)

/// Key-padding mask (b, n): true marks a real token. A default-constructed Mask means that every token is real.
using Mask = View<const bool, dynamic, dynamic>;

/// Position of a token in its sequence.
using TokenIndex = std::int32_t;

/// Whether elements are positions of tokens.
template <typename Indices>
inline constexpr bool are_indices = std::same_as<typename Indices::value_type, TokenIndex>;

/// Throws ValueError when a sequence has more tokens than a TokenIndex can tell apart.
inline void expect_length(std::string_view argument, Index length) {
    expect_value(length <= std::numeric_limits<TokenIndex>::max(), argument, "of at most 2^31 - 1 tokens a sequence",
                 length);
}

/// Anything with views: View itself and Tensor.
template <typename T>
concept Viewable = requires(const T& t) {
    t.const_view();
    t.shape();
    typename T::value_type;
};

/// Whether operands of one operation have one scalar type.
template <typename X, typename... Others>
inline constexpr bool same_scalar = (std::same_as<typename X::value_type, typename Others::value_type> && ...);

/// Whether an operation can write its result to an argument `const V&`: a view of elements that are not const. A tensor
/// that is const has none.
template <typename V>
inline constexpr bool is_output = !std::is_const_v<typename decltype(std::declval<const V&>().view())::element_type>;

/// Converts to `Wanted`, or throws a ShapeError that names the argument; a wrong rank or a contradicting static extent
/// does not compile.
template <typename Wanted, typename Given>
Wanted expect(std::string_view argument, const Given& given) {
    const auto view = given.view();
    static_assert(std::is_same_v<typename Wanted::value_type, typename Given::value_type>,
                  "colt5: this argument has the wrong scalar type");
    static_assert(decltype(view)::rank == Wanted::rank, "colt5: this argument has the wrong number of dimensions");
    if constexpr (std::is_constructible_v<Wanted, decltype(view)>) {  // otherwise the assertions have said it all
        expect_shape(argument, view.shape(), Wanted::extents);
        return Wanted(view);
    }
}

}  // namespace colt5
