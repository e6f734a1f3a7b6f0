// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>
#include <list>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <doctest/doctest.h>

#include "support/tensors.hpp"

/// What tests share that hand wrong shapes to operations and modules.
namespace support {

/// The arguments of one call. They have the shapes that are asked for, but for one extent of one of them.
class Arguments {
public:
    /// One extent of one argument.
    struct Extent {
        std::string argument;
        std::size_t axis;
        Index expected;
        std::string blamed;  // who is named if it is wrong; nobody, if any extent will do
    };

    explicit Arguments(const Cpu& policy) : policy_(policy) {}
    Arguments(const Cpu& policy, const Extent& wrong, Index difference)
        : policy_(policy), wrong_(wrong), difference_(difference) {}

    /// `blamed`: for each axis, the argument that is named if the extent is wrong, as a shape is compared with another;
    /// this one itself unless given, and "" if any extent will do.
    template <typename T, std::size_t rank>
    auto view(const std::string& name, const Index (&shape)[rank], std::vector<std::string> blamed = {}) {
        auto [extents, count] = extents_of(name, shape, std::move(blamed));
        auto& memory = memory_.emplace_back(static_cast<std::size_t>(count) * sizeof(T), byte_of<T>());
        using Owner = HostTensor<std::remove_const_t<T>, rank>;
        using Result = std::conditional_t<std::is_const_v<T>, decltype(std::declval<const Owner&>().const_view()),
                                          decltype(std::declval<Owner&>().view())>;
        return Result(reinterpret_cast<T*>(memory.bytes.data()), extents);
    }
    /// The same for a tensor, such as those of saved activations.
    template <typename T, std::size_t rank>
    HostTensor<T, rank> tensor(const std::string& name, const Index (&shape)[rank],
                               std::vector<std::string> blamed = {}) {
        const auto [extents, count] = extents_of(name, shape, std::move(blamed));
        HostTensor<T, rank> result(policy_, extents);
        std::memset(static_cast<void*>(result.data()), byte_of<T>(), static_cast<std::size_t>(count) * sizeof(T));
        return result;
    }

    const std::vector<Extent>& extents() const { return extents_; }
    /// Whether every view holds what it held at first.
    bool are_untouched() const {
        return std::all_of(memory_.begin(), memory_.end(), [](const Memory& memory) {
            return std::all_of(memory.bytes.begin(), memory.bytes.end(),
                               [&](unsigned char byte) { return byte == memory.filled_with; });
        });
    }

private:
    struct Memory {
        Memory(std::size_t size, unsigned char byte) : bytes(size, byte), filled_with(byte) {}
        std::vector<unsigned char> bytes;
        unsigned char filled_with;
    };
    /// Numbers are 0.7 or 5e-4, indices 0, masks true.
    template <typename T>
    static constexpr unsigned char byte_of() {
        return std::is_same_v<std::remove_const_t<T>, bool> ? 1 : std::is_integral_v<T> ? 0 : 0x3F;
    }
    template <std::size_t rank>
    std::pair<std::array<Index, rank>, Index> extents_of(const std::string& name, const Index (&shape)[rank],
                                                         std::vector<std::string> blamed) {
        blamed.resize(rank, blamed.empty() ? name : std::string());
        std::array<Index, rank> extents;
        Index count = 1;
        for (std::size_t axis = 0; axis < rank; ++axis) {
            extents_.push_back({name, axis, shape[axis], blamed[axis]});
            extents[axis] = shape[axis] + (name == wrong_.argument && axis == wrong_.axis ? difference_ : 0);
            count *= extents[axis];
        }
        return {extents, count};
    }

    const Cpu& policy_;
    Extent wrong_{};
    Index difference_ = 0;
    std::vector<Extent> extents_;
    std::list<Memory> memory_;  // whose addresses stay
};

/// Calls `call(arguments)` with arguments that fit, then with each extent of each of them too small by one and too
/// large by one: an error names an argument, and nothing has been written; or, where any extent will do, there is none.
template <typename Call>
void check_extents(const char* name, Call&& call) {
    CAPTURE(name);
    const Cpu policy(1);
    Arguments fitting(policy);
    CHECK_NOTHROW(call(fitting));
    for (const Arguments::Extent& wrong : fitting.extents())
        for (const Index difference : {Index{-1}, Index{1}}) {
            CAPTURE(wrong.argument);
            CAPTURE(wrong.axis);
            CAPTURE(difference);
            Arguments arguments(policy, wrong, difference);
            std::string message;
            try {
                call(arguments);
            } catch (const colt5::Error& error) {
                message = error.what();
            }
            if (wrong.blamed.empty()) {
                CHECK(message == "");
                continue;
            }
            const std::string expected = "colt5: `" + wrong.blamed + "` must ";
            CHECK(message.substr(0, expected.size()) == expected);
            CHECK(message.find(", but ") != std::string::npos);
            CHECK(arguments.are_untouched());
        }
}

}  // namespace support
