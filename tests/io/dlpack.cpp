// SPDX-License-Identifier: MIT
#include <colt5/io/dlpack.hpp>

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <colt5/colt5.hpp>

#include <doctest/doctest.h>

#include "io/temporary_folder.hpp"

using namespace colt5;
using dlpack::DLManagedTensor;
using dlpack::DLManagedTensorVersioned;
using dlpack::DLTensor;

namespace {

/// A policy that says it is on a GPU.
struct OnGpu {
    using Workspace = Cpu::Workspace;
    Cpu host;
    int number;
    const std::shared_ptr<Workspace>& workspace() const { return host.workspace(); }
    const MemoryPlan& memory_plan() const { return host.memory_plan(); }
    int device() const { return number; }
};
void upload(const OnGpu& policy, void* to, const void* from, std::size_t bytes) {
    upload(policy.host, to, from, bytes);
}
void download(const OnGpu& policy, void* to, const void* from, std::size_t bytes) {
    download(policy.host, to, from, bytes);
}

/// Another library: a tensor (2, 3) of float and how often it was deleted.
template <typename Managed>
struct Producer {
    std::array<float, 7> values{9, 1, 2, 3, 4, 5, 6};
    std::array<std::int64_t, 2> shape{2, 3}, strides{3, 1};
    Managed managed{};
    int deleted = 0;

    Producer() {
        if constexpr (std::is_same_v<Managed, DLManagedTensorVersioned>) managed.version = {1, 3};
        managed.manager_ctx = this;
        managed.deleter = [](Managed* self) { ++static_cast<Producer*>(self->manager_ctx)->deleted; };
        managed.dl_tensor = {values.data(), {1, 0}, 2, {2, 32, 1}, shape.data(), strides.data(), 4};
    }
    Producer(const Producer&) = delete;
    Producer& operator=(const Producer&) = delete;
    DLTensor& tensor() { return managed.dl_tensor; }

    /// What the import says, without our name; it must leave the tensor to its owner.
    template <typename V = MatrixView<float>, typename Exception = ValueError, Policy P = Cpu>
    std::string complaint(const P& policy = P{}) {
        const std::string message = message_of<Exception>([&] { return from_dlpack<V>(policy, &managed); });
        CHECK(deleted == 0);
        return message.substr(0, 7) == "colt5: " ? message.substr(7) : message;
    }
};

}  // namespace

TEST_CASE("DLPack: the structs have the layout of the ABI") {
    static_assert(sizeof(DLTensor) == 48 && offsetof(DLTensor, device) == 8 && offsetof(DLTensor, ndim) == 16);
    static_assert(offsetof(DLTensor, dtype) == 20 && offsetof(DLTensor, shape) == 24);
    static_assert(offsetof(DLTensor, strides) == 32 && offsetof(DLTensor, byte_offset) == 40);
    static_assert(sizeof(DLManagedTensor) == 64 && offsetof(DLManagedTensor, manager_ctx) == 48);
    static_assert(offsetof(DLManagedTensor, deleter) == 56);
    static_assert(sizeof(DLManagedTensorVersioned) == 80 && offsetof(DLManagedTensorVersioned, manager_ctx) == 8);
    static_assert(offsetof(DLManagedTensorVersioned, deleter) == 16 && offsetof(DLManagedTensorVersioned, flags) == 24);
    static_assert(offsetof(DLManagedTensorVersioned, dl_tensor) == 32);
}

TEST_CASE_TEMPLATE("DLPack: an imported view keeps its owner until the last handle goes", Managed, DLManagedTensor,
                   DLManagedTensorVersioned) {
    const Cpu policy;
    Producer<Managed> producer;
    {
        DLPackView<MatrixView<float>, Cpu> kept;
        {
            auto view = from_dlpack<MatrixView<float>>(policy, &producer.managed);
            CHECK(view.shape() == std::array<Index, 2>{2, 3});
            CHECK(view.data() == producer.values.data() + 1);  // no copy, and from the byte offset on
            CHECK(view(1, 2) == 6);
            kept = std::move(view);
            CHECK(view.data() == kept.data());
            CHECK(kept[1](0) == 4);
        }
        CHECK(producer.deleted == 0);
        assign(policy, kept, kept * 2.0f);
        CHECK(producer.values == std::array<float, 7>{9, 2, 4, 6, 8, 10, 12});
    }
    CHECK(producer.deleted == 1);

    producer.managed.deleter = nullptr;
    { const auto view = from_dlpack<MatrixView<const float>>(policy, &producer.managed); }
    CHECK(producer.deleted == 1);
}

TEST_CASE("DLPack: handles are arguments like tensors") {
    using Handle = DLPackView<TokensView<const float>, Cpu>;
    static_assert(Viewable<Handle> && lives_on<Handle, Cpu> && !lives_on<Handle, OnGpu>);
    static_assert(!outlives_call<Handle> && outlives_call<const Handle&>);
    constexpr FeedForwardConfig config{.dim = 4, .num_heavy_tokens = 2};
    const Cpu policy;
    const ConditionalRoutedFeedForward<config, float, Cpu> module{policy, Seed{0}};
    TokensTensor<float, Cpu> tokens(policy, {2, 8, 4});
    fill_normal(policy, tokens, Random(Seed{1}));
    const auto expected = module(tokens);
    const auto imported = from_dlpack<TokensView<const float>>(policy, to_dlpack(policy, std::move(tokens)));
    CHECK(to_host(policy, module(imported)) == to_host(policy, expected));
    CHECK(module.forward(imported).out.size() == 64);
}

TEST_CASE("DLPack: strides that say nothing may be anything") {
    const Cpu policy;
    Producer<DLManagedTensor> producer;
    producer.tensor().strides = nullptr;
    CHECK(from_dlpack<MatrixView<float>>(policy, &producer.managed)(1, 0) == 4);
    producer.tensor().strides = producer.strides.data();
    producer.shape = {1, 6};
    producer.strides = {-77, 1};  // there is one row
    CHECK(from_dlpack<MatrixView<float>>(policy, &producer.managed)(0, 5) == 6);
    producer.shape = {0, 3};
    producer.strides = {0, 0};
    producer.tensor().data = nullptr;
    const auto empty = from_dlpack<MatrixView<float>>(policy, &producer.managed);
    CHECK(empty.size() == 0);
    CHECK(producer.deleted == 2);
}

TEST_CASE_TEMPLATE("DLPack: what does not fit is refused, and stays its owner's", Managed, DLManagedTensor,
                   DLManagedTensorVersioned) {
    using Bad = Producer<Managed>;
    const auto complaint_of = [](auto&& spoil) {
        Bad bad;
        spoil(bad);
        return bad.complaint();
    };
    CHECK(complaint_of([](Bad& bad) {
              bad.strides = {1, 2};
          }) == "`managed` must be contiguous and row-major, with strides (3, 1), but is of strides (1, 2)");
    CHECK(complaint_of([](Bad& bad) { bad.strides = {4, 1}; }).ends_with("(3, 1), but is of strides (4, 1)"));
    CHECK(complaint_of([](Bad& bad) {
              bad.tensor().dtype = {2, 64, 1};
          }) == "`managed` must be of type code 2, 32 bits, lanes 1, but is type code 2, 64 bits, lanes 1");
    CHECK(complaint_of([](Bad& bad) {
              bad.tensor().dtype = {0, 32, 1};
          }).ends_with("is type code 0, 32 bits, lanes 1"));
    CHECK(complaint_of([](Bad& bad) {
              bad.tensor().dtype = {2, 32, 4};
          }).ends_with("is type code 2, 32 bits, lanes 4"));
    CHECK(complaint_of([](Bad& bad) {
              bad.tensor().device = {2, 1};
          }) == "`managed` must be on the policy's device type 1, id 0, but is device type 2, id 1");
    CHECK(complaint_of([](Bad& bad) { bad.tensor().data = nullptr; }) ==
          "`managed` must be a tensor with data, but is null");
    CHECK(complaint_of([](Bad& bad) {
              bad.tensor().byte_offset = 2;
          }).find("must be aligned to 4 bytes, but is at address ") != std::string::npos);
    CHECK(complaint_of([](Bad& bad) {
              bad.shape = {-1, 3};
          }) == "`managed` must be non-negative in every dimension, but is -1");
    CHECK(complaint_of([](Bad& bad) {
              bad.shape = {std::int64_t{1} << 40, std::int64_t{1} << 40};
          }) == "`managed` must be of less than 2^63 bytes, but is (1099511627776, 1099511627776)");

    Bad bad;
    CHECK(bad.template complaint<TokensView<float>, ShapeError>() ==
          "`managed` must have shape (any, any, any), but has 2 dimensions");
    CHECK(bad.template complaint<View<float, dynamic, 4>, ShapeError>() ==
          "`managed` must have shape (any, 4), but has (2, 3)");
    bad.tensor().shape = nullptr;
    CHECK(bad.template complaint<MatrixView<float>, ShapeError>() ==
          "`managed` must have shape (any, any), but has 2 dimensions");
    CHECK(message_of<ValueError>([] {
              return from_dlpack<MatrixView<float>>(Cpu{}, static_cast<Managed*>(nullptr));
          }) == "colt5: `managed` must be a tensor, but is null");
}

TEST_CASE("DLPack: versions and the read-only flag") {
    Producer<DLManagedTensorVersioned> producer;
    producer.managed.flags = 3;  // read-only, and a copy
    CHECK(producer.complaint() ==
          "`managed` must be writable, or imported as a view of const elements, but is read-only");
    producer.managed.version = {2, 1};
    CHECK(producer.complaint() == "`managed` must be of DLPack version 1.x, but is of 2.1");
    producer.managed.version = {1, 99};
    CHECK(from_dlpack<MatrixView<const float>>(Cpu{}, &producer.managed)(0, 0) == 1);
    CHECK(producer.deleted == 1);
}

TEST_CASE("DLPack: a policy takes the memory that it reaches") {
    const OnGpu policy{Cpu{}, 3};
    const auto fits = [&](dlpack::DLDevice device, const auto& where) {
        Producer<DLManagedTensor> producer;
        producer.tensor().device = device;
        try {
            { const auto view = from_dlpack<MatrixView<float>>(where, &producer.managed); }
            return producer.deleted == 1;
        } catch (const ValueError&) {
            return false;
        }
    };
    CHECK(fits({dlpack::kDLCUDA, 3}, policy));
    CHECK(fits({dlpack::kDLCUDAManaged, 0}, policy));
    CHECK_FALSE(fits({dlpack::kDLCUDA, 2}, policy));
    CHECK_FALSE(fits({dlpack::kDLCPU, 0}, policy));
    CHECK_FALSE(fits({dlpack::kDLCUDAHost, 0}, policy));
    CHECK(fits({dlpack::kDLCUDAHost, 0}, Cpu{}));
    CHECK_FALSE(fits({dlpack::kDLCUDAManaged, 0}, Cpu{}));
    CHECK_FALSE(fits({10, 0}, Cpu{}));  // ROCm

    const std::vector<float> values{1, 2, 3, 4, 5, 6};
    auto* const managed = to_dlpack(policy, from_host<MatrixTensor<float, OnGpu>>(policy, {2, 3}, values));
    CHECK(managed->dl_tensor.device.device_type == dlpack::kDLCUDA);
    CHECK(managed->dl_tensor.device.device_id == 3);
    CHECK(to_host(policy, from_dlpack<MatrixView<float>>(policy, managed)) == values);
}

TEST_CASE_TEMPLATE("DLPack: an exported tensor lives until it is deleted", Managed, DLManagedTensor,
                   DLManagedTensorVersioned) {
    const Cpu policy;
    const auto in_use = [&] { return policy.workspace()->statistics().in_use; };
    TokensTensor<double, Cpu> tensor(policy, {2, 1, 3});
    fill_normal(policy, tensor, Random(Seed{0}));
    const auto values = to_host(policy, tensor);
    const auto bytes = in_use();
    CHECK(bytes > 0);
    const double* const data = tensor.data();
    auto* const managed = to_dlpack<Managed>(policy, std::move(tensor));
    const DLTensor& exported = managed->dl_tensor;
    CHECK(in_use() == bytes);
    CHECK(exported.data == data);
    CHECK(exported.byte_offset == 0);
    CHECK(exported.ndim == 3);
    CHECK(std::vector<std::int64_t>(exported.shape, exported.shape + 3) == std::vector<std::int64_t>{2, 1, 3});
    CHECK(std::vector<std::int64_t>(exported.strides, exported.strides + 3) == std::vector<std::int64_t>{3, 3, 1});
    CHECK(exported.device.device_type == dlpack::kDLCPU);
    if constexpr (std::is_same_v<Managed, DLManagedTensorVersioned>) {
        CHECK(managed->version.major == 1);
        CHECK(managed->flags == 0);
    }
    {
        const auto back = from_dlpack<TokensView<double>>(policy, managed);
        CHECK(to_host(policy, back) == values);
    }
    CHECK(in_use() == 0);
}

TEST_CASE("DLPack: an exported view keeps what its owner holds, and const elements are read-only") {
    const Cpu policy;
    const auto tensor = std::make_shared<MatrixTensor<float, Cpu>>(policy, std::array<Index, 2>{4, 3});
    auto* const managed = to_dlpack(policy, tensor->const_view().range(1, 2), tensor);
    CHECK(tensor.use_count() == 2);
    CHECK(managed->flags == dlpack::read_only);
    CHECK(managed->dl_tensor.data == tensor->data() + 3);
    managed->deleter(managed);
    CHECK(tensor.use_count() == 1);
    CHECK(message_of<ValueError>([&] {
              return to_dlpack(policy, MatrixView<float>(nullptr, {2, 3}), nullptr);
          }) == "colt5: `view` must be a view of data, but is null");

    auto* const empty = to_dlpack(policy, MatrixTensor<float, Cpu>(policy, {0, 3}));
    CHECK(empty->dl_tensor.data == nullptr);
    CHECK(from_dlpack<MatrixView<float>>(policy, empty).extent(1) == 3);
}

TEST_CASE("DLPack: type codes") {
    const auto code = []<typename T>(T) {
        const Cpu policy;
        auto* const managed = to_dlpack(policy, VectorTensor<T, Cpu>(policy, {1}));
        const dlpack::DLDataType type = managed->dl_tensor.dtype;
        const auto back = from_dlpack<VectorView<T>>(policy, managed);
        CHECK(type.lanes == 1);
        return std::array<int, 2>{type.code, type.bits};
    };
    CHECK(code(double{}) == std::array<int, 2>{2, 64});
    CHECK(code(float{}) == std::array<int, 2>{2, 32});
    CHECK(code(float16{}) == std::array<int, 2>{2, 16});
    CHECK(code(bfloat16{}) == std::array<int, 2>{4, 16});
    CHECK(code(bool{}) == std::array<int, 2>{6, 8});
    CHECK(code(std::int64_t{}) == std::array<int, 2>{0, 64});
    CHECK(code(TokenIndex{}) == std::array<int, 2>{0, 32});
    CHECK(code(std::int8_t{}) == std::array<int, 2>{0, 8});
    CHECK(code(std::uint8_t{}) == std::array<int, 2>{1, 8});
    CHECK(code(std::uint64_t{}) == std::array<int, 2>{1, 64});
}
