// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <functional>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <colt5/core/view.hpp>

namespace golden {

using colt5::Index;

/// A tensor, in double whatever its type was.
struct Array {
    std::vector<Index> shape;
    std::vector<double> values;
};
using Arrays = std::map<std::string, Array>;

/// How a run differs from what its file says.
struct Variation {
    /// What takes the place of the i-th number of an input or a parameter; asked in the same order every time.
    std::function<double(const std::string& name, std::size_t i, double value)> number = nullptr;
    /// Runs a block half by half: the feedforward on what the attention gives, then the attention's backward pass on
    /// what the feedforward's gives. Results have both, as `middle.out` and `middle.grad`; other modules are run as
    /// they are.
    bool in_halves = false;
    /// Results of such a run, whose middle takes the place of its own.
    const Arrays* middle = nullptr;
};

/// What the reference computed: inputs (in.*), parameters (param.*), outputs (out.*) and gradients (grad.*) of
/// sum(output * in.cotangent). Remembers which of them have been used.
class File {
public:
    explicit File(Arrays arrays) : arrays_(std::move(arrays)) {}

    bool contains(const std::string& name) const { return arrays_.contains(name); }
    const Array& use(const std::string& name) {
        used_.insert(name);
        const auto at = arrays_.find(name);
        if (at == arrays_.end()) throw std::out_of_range("the golden file has no `" + name + "`");
        return at->second;
    }
    std::vector<std::string> unused() const {
        std::vector<std::string> names;
        for (const auto& [name, array] : arrays_)
            if (!used_.contains(name)) names.push_back(name);
        return names;
    }

private:
    Arrays arrays_;
    std::set<std::string> used_;
};

}  // namespace golden
