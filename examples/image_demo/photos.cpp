// SPDX-License-Identifier: MIT
#include "photos.hpp"

#include <array>
#include <numeric>
#include <utility>

namespace image_demo {

namespace {

constexpr int width = 1024;       // of a photo
constexpr int train_width = 740;  // its left; the rest is for tests
constexpr int least_cut = 64;     // of a mosaic: no part is smaller

constexpr std::array<const char*, classes> files{
    "Bridge_by_Sander_Klootwijk.jpg",     "Dragonfly_by_Bolly.jpg",         "Wine_by_Jakkub_Mede.jpg",
    "analogpattern_by_Peter_Nerlich.jpg", "greentock_by_Peter_Nerlich.jpg", "picosdeeuropa_by_Aitzol_Berasategi.jpg",
    "seeding_by_Clements_Engelhardt.jpg", "sunset_by_Aitzol_Berasategi.jpg"};

}  // namespace

Photos::Photos(const std::string& folder) {
    for (const char* const file : files) {
        photos_.push_back(read_picture(folder + "/" + file, width));
        if (photos_.back().height < side) throw UserError(folder + "/" + file + " is too flat");
    }
}

Photos::Mosaic Photos::mosaic(std::uint64_t number, bool for_test) const {
    const colt5::Random random(colt5::Seed{number}, for_test ? 1 : 0);
    std::uint64_t drawn = 0;
    const auto below = [&](int count) { return static_cast<int>(random.uniform(drawn++) * count); };
    std::array<int, classes> order{};
    std::iota(order.begin(), order.end(), 0);
    for (std::size_t i = 0; i < 4; ++i)
        std::swap(order[i], order[i + static_cast<std::size_t>(below(classes - static_cast<int>(i)))]);
    const int cut_x = least_cut + below(side - 2 * least_cut), cut_y = least_cut + below(side - 2 * least_cut);
    Mosaic mosaic;
    mosaic.photo_of.resize(static_cast<std::size_t>(side) * side);
    for (int part = 0; part < 4; ++part) {
        const int photo = order[static_cast<std::size_t>(part)];
        const Picture& from = photos_[static_cast<std::size_t>(photo)];
        const int left = part % 2 == 0 ? 0 : cut_x, right = part % 2 == 0 ? cut_x : side;
        const int top = part / 2 == 0 ? 0 : cut_y, bottom = part / 2 == 0 ? cut_y : side;
        const int begin = for_test ? train_width : 0, end = for_test ? width : train_width;
        const int shift_x = begin + below(end - begin - (right - left)), shift_y = below(from.height - (bottom - top));
        for (int y = top; y < bottom; ++y)
            for (int x = left; x < right; ++x) {
                mosaic.picture.at(x, y) = from.at(shift_x + x - left, shift_y + y - top);
                mosaic.photo_of[static_cast<std::size_t>(y * side + x)] = photo;
            }
    }
    return mosaic;
}

}  // namespace image_demo
