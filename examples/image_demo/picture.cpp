// SPDX-License-Identifier: MIT
#include "picture.hpp"

#include <algorithm>
#include <memory>

#include <stb_image.h>
#include <stb_image_write.h>

namespace image_demo {

Picture read_picture(const std::string& path, int width) {
    int columns = 0, rows = 0, channels = 0;
    const std::unique_ptr<stbi_uc, void (*)(void*)> bytes(stbi_load(path.c_str(), &columns, &rows, &channels, 3),
                                                          stbi_image_free);
    if (bytes == nullptr) throw UserError("cannot read " + path + ": " + stbi_failure_reason());
    if (columns < width) throw UserError(path + " is narrower than " + std::to_string(width) + " pixels");
    Picture picture(width, std::max(1, static_cast<int>(static_cast<long>(rows) * width / columns)));
    for (int y = 0; y < picture.height; ++y)
        for (int x = 0; x < width; ++x) {
            const int left = static_cast<int>(static_cast<long>(x) * columns / width);
            const int right = std::max(left + 1, static_cast<int>((static_cast<long>(x) + 1) * columns / width));
            const int top = static_cast<int>(static_cast<long>(y) * rows / picture.height);
            const int bottom = std::max(top + 1, static_cast<int>((static_cast<long>(y) + 1) * rows / picture.height));
            Color& pixel = picture.at(x, y);
            for (int i = top; i < bottom; ++i)
                for (int j = left; j < right; ++j)
                    for (std::size_t c = 0; c < 3; ++c)
                        pixel[c] += static_cast<float>(
                                        bytes.get()[3 * (static_cast<long>(i) * columns + j) + static_cast<long>(c)]) /
                                    255;
            for (float& value : pixel) value /= static_cast<float>((bottom - top) * (right - left));
        }
    return picture;
}

void write_png(const std::string& path, const Picture& picture) {
    std::vector<unsigned char> bytes;
    for (const Color& pixel : picture.pixels)
        for (const float value : pixel)
            bytes.push_back(static_cast<unsigned char>(std::clamp(value * 255 + 0.5f, 0.0f, 255.0f)));
    if (stbi_write_png(path.c_str(), picture.width, picture.height, 3, bytes.data(), 3 * picture.width) == 0)
        throw UserError("cannot write " + path);
}

}  // namespace image_demo
