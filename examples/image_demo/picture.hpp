// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <cstddef>
#include <stdexcept>
#include <string>
#include <vector>

namespace image_demo {

/// What the user can put right; printed as one line.
struct UserError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

using Color = std::array<float, 3>;  // red, green, blue, in [0, 1]

struct Picture {
    int width = 0, height = 0;
    std::vector<Color> pixels{};  // row by row

    Picture() = default;
    Picture(int width_, int height_)
        : width(width_),
          height(height_),
          pixels(static_cast<std::size_t>(width_) * static_cast<std::size_t>(height_)) {}
    Color& at(int x, int y) { return pixels[index(x, y)]; }
    const Color& at(int x, int y) const { return pixels[index(x, y)]; }

private:
    std::size_t index(int x, int y) const {
        return static_cast<std::size_t>(y) * static_cast<std::size_t>(width) + static_cast<std::size_t>(x);
    }
};

/// A JPEG or PNG file, scaled down to `width` by means over the pixels. Throws UserError.
Picture read_picture(const std::string& path, int width);

/// Throws UserError.
void write_png(const std::string& path, const Picture& picture);

}  // namespace image_demo
