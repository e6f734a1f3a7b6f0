// SPDX-License-Identifier: MIT
#pragma once

#include <string>
#include <vector>

#include <colt5/core/random.hpp>

#include "picture.hpp"

namespace image_demo {

inline constexpr int side = 256;  ///< of a mosaic, in pixels
inline constexpr int classes = 8;

/// Mosaics of four photos each: which photo is each pixel of? Training crops the left of the photos, testing the right.
class Photos {
public:
    /// Photos of Debian's and Ubuntu's package lomiri-wallpapers-16.04 in `folder`. Throws UserError.
    explicit Photos(const std::string& folder);

    struct Mosaic {
        Picture picture{side, side};
        std::vector<int> photo_of{};  // of each pixel
    };
    /// The mosaic of a number.
    Mosaic mosaic(std::uint64_t number, bool for_test) const;

private:
    std::vector<Picture> photos_;
};

}  // namespace image_demo
