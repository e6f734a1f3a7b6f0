// SPDX-License-Identifier: MIT
// Trains a small segmenter on mosaics of real photos, 256 x 256 pixels, each pixel a token, and draws which pixels its
// routers choose. `./dev demo image --help` lists the options.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <iostream>
#include <string>

#include <colt5/io/routing_page.hpp>

#include "segmenter.hpp"

namespace {

using namespace image_demo;

constexpr const char* usage = R"(usage: ./dev demo image [--quick] [OPTION...]

Trains a segmenter on mosaics of four photos each: which of eight photos is each pixel of? Training sees the left of the
photos, the test the right.

  --quick          300 steps instead of 1500
  --steps N        another number of steps
  --photos FOLDER  where the photos of the package lomiri-wallpapers-16.04 are; /usr/share/backgrounds by default
  --png FILE       where the picture goes; build/demo_image.png by default
)";

struct Options {
    int steps = 1500;
    std::string photos = "/usr/share/backgrounds", png = "build/demo_image.png";
    bool help = false;
};

Options parse_options(int count, char** arguments) {
    Options options;
    for (int i = 1; i < count; ++i) {
        const std::string option = arguments[i];
        const auto value = [&] {
            if (i + 1 == count) throw UserError(option + " needs a value");
            return std::string(arguments[++i]);
        };
        if (option == "--help") {
            options.help = true;
        } else if (option == "--quick") {
            options.steps = 300;
        } else if (option == "--steps") {
            options.steps = std::atoi(value().c_str());
            if (options.steps < 1) throw UserError("--steps must be at least 1");
        } else if (option == "--photos") {
            options.photos = value();
        } else if (option == "--png") {
            options.png = value();
        } else {
            throw UserError("unknown option " + option + "; --help lists them");
        }
    }
    return options;
}

Segmenter::Tokens colors_of(const colt5::Cpu& policy, const Picture& picture) {
    Segmenter::Tokens colors(policy, {1, side * side, 3});
    for (std::size_t i = 0; i < picture.pixels.size(); ++i)
        for (std::size_t c = 0; c < 3; ++c) colors.data()[3 * i + c] = 4 * picture.pixels[i][c] - 2;
    return colors;
}

struct Answer {
    double loss = 0, accuracy = 0;
    std::vector<int> photo_of{};
};
/// The mean cross entropy of logits (1, n, classes), and its gradient to `d_logits`.
Answer judge(const Segmenter::Tokens& logits, const std::vector<int>& wanted, Segmenter::Tokens& d_logits) {
    Answer answer;
    const double share = 1 / static_cast<double>(wanted.size());
    for (std::size_t i = 0; i < wanted.size(); ++i) {
        const float* const row = logits.data() + i * classes;
        float* const d_row = d_logits.data() + i * classes;
        const float* const best = std::max_element(row, row + classes);
        double sum = 0;
        for (int c = 0; c < classes; ++c) sum += std::exp(static_cast<double>(row[c] - *best));
        for (int c = 0; c < classes; ++c) {
            const double p = std::exp(static_cast<double>(row[c] - *best)) / sum;
            d_row[c] = static_cast<float>((p - (c == wanted[i] ? 1 : 0)) * share);
            if (c == wanted[i]) answer.loss -= std::log(std::max(p, 1e-30)) * share;
        }
        answer.photo_of.push_back(static_cast<int>(best - row));
        if (answer.photo_of.back() == wanted[i]) answer.accuracy += share;
    }
    return answer;
}

/// From left to right: the mosaic; which photo the segmenter takes each pixel for; the routed pixels of the last layer:
/// queries red, keys and values yellow, feedforward blue.
Picture draw(const colt5::Cpu& policy, const Photos::Mosaic& mosaic, const std::vector<int>& photo_of,
             const Segmenter::Activations& saved) {
    constexpr std::array<Color, classes> palette{{{0.9f, 0.3f, 0.2f},
                                                  {0.2f, 0.6f, 0.9f},
                                                  {0.5f, 0.2f, 0.6f},
                                                  {0.9f, 0.8f, 0.2f},
                                                  {0.2f, 0.7f, 0.3f},
                                                  {0.5f, 0.5f, 0.5f},
                                                  {0.9f, 0.5f, 0.8f},
                                                  {0.1f, 0.2f, 0.4f}}};
    constexpr int scale = 2, gap = 8;
    Picture routed(side, side);
    for (std::size_t i = 0; i < routed.pixels.size(); ++i)
        for (std::size_t c = 0; c < 3; ++c) routed.pixels[i][c] = 0.5f * mosaic.picture.pixels[i][c];
    const auto paint = [&](const auto& of_layer) {
        for (const auto& panel : routing_panels(policy, of_layer, 0, side * side, side)) {
            const Color color = panel.title == "q_router"    ? Color{1, 0.2f, 0.2f}
                                : panel.title == "kv_router" ? Color{1, 1, 0.2f}
                                                             : Color{0.3f, 0.6f, 1};
            for (std::size_t i = 0; i < panel.scores.size(); ++i)
                if (panel.scores[i] > 0) routed.pixels[i] = color;
        }
    };
    paint(saved.layers.back().second);
    paint(saved.layers.back().first);
    Picture all(3 * scale * side + 2 * gap, scale * side);
    for (int y = 0; y < all.height; ++y)
        for (int x = 0; x < scale * side; ++x) {
            const int from_x = x / scale, from_y = y / scale;
            const int photo = photo_of[static_cast<std::size_t>(from_y * side + from_x)];
            all.at(x, y) = mosaic.picture.at(from_x, from_y);
            all.at(x + scale * side + gap, y) = palette[static_cast<std::size_t>(photo)];
            all.at(x + 2 * (scale * side + gap), y) = routed.at(from_x, from_y);
        }
    return all;
}

void run(const Options& options) {
    const auto start = std::chrono::steady_clock::now();
    const Photos photos(options.photos);
    const colt5::Cpu policy;
    Segmenter segmenter(policy, colt5::SeedSequence(colt5::Seed{0}));
    colt5::AdamW optimizer(policy, segmenter, {.lr = 3e-3});
    auto gradients = segmenter.make_gradients();
    Segmenter::Tokens d_logits(policy, {1, side * side, classes});
    std::printf("Training on mosaics of 4 of %d photos, %d pixels each; the heavy branch takes 1 in %td of them.\n",
                classes, side * side, side * side / attention_config.num_heavy_tokens_q);
    Answer mean;
    constexpr int report = 20;
    for (int step = 1; step <= options.steps; ++step) {
        const auto mosaic = photos.mosaic(static_cast<std::uint64_t>(step), false);
        auto saved = segmenter.forward(colors_of(policy, mosaic.picture));
        const Answer answer = judge(saved.out, mosaic.photo_of, d_logits);
        mean.loss += answer.loss / report;
        mean.accuracy += answer.accuracy / report;
        zero_gradients(policy, gradients);
        segmenter.backward(std::move(saved), d_logits, gradients);
        clip_gradient_norm(policy, gradients, 1.0);
        const double progress = static_cast<double>(step) / options.steps;
        optimizer.set_learning_rate(3e-3 * std::min(1.0, 2 * (1 - progress) + 0.02));
        optimizer.step(segmenter, gradients);
        if (step % report != 0) continue;
        const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
        std::printf("step %4d: loss %.3f, %4.1f %% of the pixels right (%.0f s)\n", step, mean.loss,
                    100 * mean.accuracy, elapsed.count());
        std::fflush(stdout);
        mean = {};
    }

    constexpr int tests = 10;
    double accuracy = 0;
    for (int i = 0; i < tests; ++i) {
        const auto mosaic = photos.mosaic(static_cast<std::uint64_t>(i), true);
        const auto saved = segmenter.forward(colors_of(policy, mosaic.picture));
        const Answer answer = judge(saved.out, mosaic.photo_of, d_logits);
        accuracy += answer.accuracy / tests;
        if (i == 0) write_png(options.png, draw(policy, mosaic, answer.photo_of, saved));
    }
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    std::printf("%d mosaics of the other side of the photos: %.1f %% of the pixels right, by chance %.1f %%.\n", tests,
                100 * accuracy, 100.0 / classes);
    std::printf(
        "A mosaic, what was seen in it, and its routed pixels (queries red, keys yellow, feedforward blue): %s (%.0f "
        "s)\n",
        options.png.c_str(), elapsed.count());
}

}  // namespace

int main(int count, char** arguments) {
    try {
        const Options options = parse_options(count, arguments);
        if (options.help)
            std::cout << usage;
        else
            run(options);
        return 0;
    } catch (const UserError& error) {
        std::cerr << "demo image: " << error.what() << '\n';
        return 2;
    } catch (const std::exception& error) {
        std::cerr << "demo image: " << error.what() << '\n';
        return 1;
    }
}
