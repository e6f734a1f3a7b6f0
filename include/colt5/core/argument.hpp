// SPDX-License-Identifier: MIT
#pragma once

#include <concepts>
#include <string_view>
#include <type_traits>
#include <utility>

#include <colt5/core/error.hpp>
#include <colt5/core/view.hpp>

/// Arguments of modules: what is wrong with one is said at compile time, or in a message that names it.
namespace colt5 {

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

/// The same for a view that is kept beyond the call, such as in a pass: a temporary tensor would be gone by then, and
/// does not compile.
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

}  // namespace colt5
