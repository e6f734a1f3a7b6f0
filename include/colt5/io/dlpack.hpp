// SPDX-License-Identifier: MIT
#pragma once

// Tensors shared with NumPy, PyTorch, JAX, CuPy and others without a copy, by DLPack:
// https://dmlc.github.io/dlpack/latest/c_api.html, versions 1.x and the unversioned struct of before.
//
//     auto tokens = from_dlpack<TokensView<const float>>(policy, managed);   // theirs; keeps their owner alive
//     auto* managed = to_dlpack(policy, std::move(out));                     // ours; the deleter frees it

#include <algorithm>
#include <array>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>

#include <colt5/core/error.hpp>
#include <colt5/core/policy.hpp>
#include <colt5/core/scalar.hpp>
#include <colt5/core/tensor.hpp>
#include <colt5/core/view.hpp>

namespace colt5 {

/// The structs of DLPack's ABI under their own names, written from its specification. A pointer to one of
/// <dlpack/dlpack.h> has the same layout and is cast to ours.
namespace dlpack {

struct DLPackVersion {
    std::uint32_t major, minor;
};
struct DLDevice {
    std::int32_t device_type, device_id;
};
struct DLDataType {
    std::uint8_t code, bits;
    std::uint16_t lanes;
};
struct DLTensor {
    void* data;
    DLDevice device;
    std::int32_t ndim;
    DLDataType dtype;
    std::int64_t* shape;
    std::int64_t* strides;  // in elements; null: contiguous and row-major
    std::uint64_t byte_offset;
};
struct DLManagedTensor {
    DLTensor dl_tensor;
    void* manager_ctx;
    void (*deleter)(DLManagedTensor*);
};
struct DLManagedTensorVersioned {
    DLPackVersion version;
    void* manager_ctx;
    void (*deleter)(DLManagedTensorVersioned*);
    std::uint64_t flags;
    DLTensor dl_tensor;
};

enum DLDeviceType : std::int32_t { kDLCPU = 1, kDLCUDA = 2, kDLCUDAHost = 3, kDLCUDAManaged = 13 };
enum DLDataTypeCode : std::uint8_t { kDLInt = 0, kDLUInt = 1, kDLFloat = 2, kDLBfloat = 4, kDLBool = 6 };
/// Of `flags`.
inline constexpr std::uint64_t read_only = 1;
/// What we write, the first with the versioned struct, and the major version that we read.
inline constexpr DLPackVersion version{1, 0};

}  // namespace dlpack

namespace detail {

template <typename Managed>
inline constexpr bool is_versioned = std::same_as<Managed, dlpack::DLManagedTensorVersioned>;
template <typename Managed>
concept DLPackManaged = is_versioned<Managed> || std::same_as<Managed, dlpack::DLManagedTensor>;

template <typename T>
constexpr dlpack::DLDataType dlpack_type() {
    static_assert(std::floating_point<T> || HalfPrecision<T> || std::integral<T>,
                  "colt5: DLPack shares float, double, bfloat16, float16, bool and integers");
    const auto code = std::same_as<T, bool>       ? dlpack::kDLBool
                      : std::same_as<T, bfloat16> ? dlpack::kDLBfloat
                      : !std::integral<T>         ? dlpack::kDLFloat
                      : std::unsigned_integral<T> ? dlpack::kDLUInt
                                                  : dlpack::kDLInt;
    return {code, static_cast<std::uint8_t>(8 * sizeof(T)), 1};
}

/// Where a policy's tensors live: policies of a GPU have a `device()`.
template <Policy P>
dlpack::DLDevice dlpack_device(const P& policy) {
    if constexpr (requires { policy.device(); })
        return {dlpack::kDLCUDA, policy.device()};
    else
        return {dlpack::kDLCPU, 0};
}

/// Whether a policy reads and writes memory of that device.
template <Policy P>
bool dlpack_reaches(const P& policy, const dlpack::DLDevice& device) {
    const dlpack::DLDevice own = dlpack_device(policy);
    if (own.device_type == dlpack::kDLCPU)
        return device.device_type == dlpack::kDLCPU || device.device_type == dlpack::kDLCUDAHost;
    return device.device_type == dlpack::kDLCUDAManaged ||
           (device.device_type == own.device_type && device.device_id == own.device_id);
}

inline std::string dlpack_string(const dlpack::DLDevice& device) {
    return concat({"device type ", std::to_string(device.device_type), ", id ", std::to_string(device.device_id)});
}
inline std::string dlpack_string(const dlpack::DLDataType& type) {
    return concat({"type code ", std::to_string(type.code), ", ", std::to_string(type.bits), " bits, lanes ",
                   std::to_string(type.lanes)});
}

/// Row-major strides in elements; an extent of 0 counts as 1.
template <std::size_t Rank>
std::array<std::int64_t, Rank> dlpack_strides(const std::array<Index, Rank>& shape) {
    std::array<std::int64_t, Rank> strides{};
    std::int64_t stride = 1;
    for (std::size_t axis = Rank; axis-- > 0;) {
        strides[axis] = stride;
        stride *= std::max<Index>(shape[axis], 1);
    }
    return strides;
}

/// The tensor as a view V; throws what `from_dlpack` does.
template <typename V, Policy P>
V dlpack_view(const P& policy, const dlpack::DLTensor& tensor) {
    using T = typename V::element_type;
    if (tensor.ndim != static_cast<std::int32_t>(V::rank) || tensor.shape == nullptr)
        throw ShapeError(concat({"colt5: `managed` must have shape ", shape_string(V::extents), ", but has ",
                                 std::to_string(tensor.ndim), " dimensions"}));
    constexpr dlpack::DLDataType wanted = dlpack_type<typename V::value_type>();
    const dlpack::DLDataType given = tensor.dtype;
    expect_value(given.code == wanted.code && given.bits == wanted.bits && given.lanes == wanted.lanes, "managed",
                 concat({"of ", dlpack_string(wanted)}), dlpack_string(given));
    expect_value(dlpack_reaches(policy, tensor.device), "managed",
                 concat({"on the policy's ", dlpack_string(dlpack_device(policy))}), dlpack_string(tensor.device));

    typename V::Shape shape{};
    std::copy_n(tensor.shape, V::rank, shape.begin());
    expect_shape("managed", shape, V::extents);
    const bool is_empty = expect_bytes("managed", shape, sizeof(T)) == 0;
    if (tensor.strides != nullptr && !is_empty) {
        const std::array<std::int64_t, V::rank> contiguous = dlpack_strides(shape);
        typename V::Shape strides{};
        std::copy_n(tensor.strides, V::rank, strides.begin());
        for (std::size_t axis = 0; axis < V::rank; ++axis)
            if (shape[axis] > 1 && strides[axis] != contiguous[axis])
                expect_value(false, "managed",
                             concat({"contiguous and row-major, with strides ", shape_string(contiguous)}),
                             concat({"of strides ", shape_string(strides)}));
    }
    if (tensor.data == nullptr) {
        expect_value(is_empty, "managed", "a tensor with data", "null");
        return V::unchecked(nullptr, shape);
    }
    auto* const data = static_cast<std::byte*>(tensor.data) + tensor.byte_offset;
    expect_value(reinterpret_cast<std::uintptr_t>(data) % alignof(T) == 0, "managed",
                 concat({"aligned to ", std::to_string(alignof(T)), " bytes"}),
                 concat({"at address ", std::to_string(reinterpret_cast<std::uintptr_t>(data))}));
    return V::unchecked(reinterpret_cast<T*>(data), shape);
}

/// Calls the deleter once, at the end.
template <DLPackManaged Managed>
struct DLPackOwner {
    Managed* managed = nullptr;

    DLPackOwner() = default;
    DLPackOwner(const DLPackOwner&) = delete;
    DLPackOwner& operator=(const DLPackOwner&) = delete;
    ~DLPackOwner() {
        if (managed != nullptr && managed->deleter != nullptr) managed->deleter(managed);
    }
};

/// What we export, in one allocation.
template <DLPackManaged Managed, std::size_t Rank>
struct DLPackExport {
    Managed managed{};
    std::array<std::int64_t, Rank> shape, strides;
    std::shared_ptr<const void> owner;
};

}  // namespace detail

/// A view V, of a tensor in the memory of policy P that someone else owns. The owner lives as long as one of the copies
/// of this handle; a plain view made from it does not keep it alive. Operations and modules take it as a view; where
/// they keep a view beyond the call, the handle needs a name.
template <typename V, Policy P>
class DLPackView : public V {
public:
    using PolicyType = P;

    DLPackView() = default;
    DLPackView(V view, std::shared_ptr<const void> owner) : V(view), owner_(std::move(owner)) {}
    DLPackView(const DLPackView&) = default;  // moves copy, so that no handle is left with a view and no owner
    DLPackView& operator=(const DLPackView&) = default;

private:
    std::shared_ptr<const void> owner_;
};

/// Imports a tensor without a copy; when the last handle goes, its deleter is called, once, from that thread.
///
///     auto tokens = from_dlpack<TokensView<const float>>(policy, managed);   // (b, n, d)
///
/// `managed` is a DLManagedTensor or DLManagedTensorVersioned, contiguous and row-major, of V's scalar type and rank,
/// in memory of the policy's device (pinned host memory counts as the host's, managed memory as any GPU's). Throws
/// ShapeError or ValueError, which print both values, when it is anything else, or read-only and V's elements are not
/// const; `managed` then stays the caller's, who calls its deleter. A capsule of Python is renamed to
/// `used_dltensor_versioned` or `used_dltensor` when this returns.
///
/// On a GPU, the producer's work must come before the policy's: give `policy.stream()` to `__dlpack__(stream=…)`.
/// Before the last handle goes, the policy's work on the memory must be done: `policy.synchronize()`.
template <typename V, Policy P, detail::DLPackManaged Managed>
[[nodiscard]] DLPackView<V, P> from_dlpack(const P& policy, Managed* managed) {
    expect_value(managed != nullptr, "managed", "a tensor", "null");
    if constexpr (detail::is_versioned<Managed>) {
        const auto [major, minor] = managed->version;
        expect_value(major == dlpack::version.major, "managed", "of DLPack version 1.x",
                     detail::concat({"of ", std::to_string(major), ".", std::to_string(minor)}));
        if constexpr (!std::is_const_v<typename V::element_type>)
            expect_value((managed->flags & dlpack::read_only) == 0, "managed",
                         "writable, or imported as a view of const elements", "read-only");
    }
    const V view = detail::dlpack_view<V>(policy, managed->dl_tensor);
    const auto owner = std::make_shared<detail::DLPackOwner<Managed>>();
    owner->managed = managed;  // nothing throws from here on
    return {view, owner};
}

/// Exports a view without a copy; `owner` keeps its elements alive until the deleter is called, from any thread.
/// Elements that are const are exported as read-only. `Managed` is DLManagedTensorVersioned or DLManagedTensor.
///
/// On a GPU, the consumer's work must come after what the policy has queued; workspaces are mapped for their own device
/// only. Throws ValueError for a view of null.
template <detail::DLPackManaged Managed = dlpack::DLManagedTensorVersioned, Policy P, typename T, Index... Extents>
[[nodiscard]] Managed* to_dlpack(const P& policy, const View<T, Extents...>& view, std::shared_ptr<const void> owner) {
    static_assert(detail::is_versioned<Managed> || !std::is_const_v<T>,
                  "colt5: the unversioned DLManagedTensor cannot say that its elements are const");
    const bool is_empty = view.size() == 0;
    expect_value(view || is_empty, "view", "a view of data", "null");
    using Export = detail::DLPackExport<Managed, sizeof...(Extents)>;
    auto result = std::make_unique<Export>();
    std::copy_n(view.shape().begin(), sizeof...(Extents), result->shape.begin());
    result->strides = detail::dlpack_strides(view.shape());
    result->owner = std::move(owner);
    Managed& managed = result->managed;
    if constexpr (detail::is_versioned<Managed>) {
        managed.version = dlpack::version;
        managed.flags = std::is_const_v<T> ? dlpack::read_only : 0;
    }
    managed.manager_ctx = result.get();
    managed.deleter = [](Managed* self) { delete static_cast<Export*>(self->manager_ctx); };
    managed.dl_tensor = {.data = is_empty ? nullptr : const_cast<std::remove_const_t<T>*>(view.data()),
                         .device = detail::dlpack_device(policy),
                         .ndim = static_cast<std::int32_t>(sizeof...(Extents)),
                         .dtype = detail::dlpack_type<std::remove_const_t<T>>(),
                         .shape = result->shape.data(),
                         .strides = result->strides.data(),
                         .byte_offset = 0};
    return &result.release()->managed;
}

/// The same of a tensor, which is moved into what is exported. The memory of an adopted one stays its owner's, who
/// outlives it.
///
///     PyCapsule_New(to_dlpack(policy, std::move(out)), "dltensor_versioned", …)
template <detail::DLPackManaged Managed = dlpack::DLManagedTensorVersioned, typename T, Policy P, Index... Extents>
[[nodiscard]] Managed* to_dlpack(const P& policy, Tensor<T, P, Extents...>&& tensor) {
    const auto owner = std::make_shared<Tensor<T, P, Extents...>>(std::move(tensor));
    return to_dlpack<Managed>(policy, owner->view(), owner);
}

}  // namespace colt5
