// SPDX-License-Identifier: MIT
// Needle retrieval in real text: trains a byte-level CoLT5 encoder with learned routing, one with random routing and
// one without the heavy branch, and draws what the routers choose. `./dev demo --help` lists the options.
#include <chrono>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <fstream>
#include <future>
#include <iostream>

#include "models.hpp"
#include "options.hpp"
#include "report.hpp"
#include "text.hpp"

namespace {

void run(const demo::Options& options) {
    const std::string text = demo::read_text(options.text_file);
    if (text.size() < demo::least_text)
        throw demo::UserError(options.text_file + " is too short: it has " + std::to_string(text.size()) +
                              " bytes and must have " + std::to_string(demo::least_text));
    std::ofstream page(options.page_file);
    if (!page) throw demo::UserError("cannot write " + options.page_file);

    const demo::Task task(text, options.settings.seed);
    const std::string name = options.text_file == demo::bible_file
                                 ? "the King James Bible"
                                 : std::filesystem::path(options.text_file).filename().string();
    std::printf("Training on %s: %td notes hidden in %td bytes, 1 byte in %td takes the heavy branch.\n", name.c_str(),
                demo::notes, demo::full_length, demo::full_length / demo::heavy_tokens);
    std::fflush(stdout);
    demo::Progress progress({"learned routing", "random routing", "light only"});
    const auto start = std::chrono::steady_clock::now();
    std::vector<std::future<demo::Result>> trainings;
    for (const auto train : {demo::train_learned, demo::train_random, demo::train_light_only})
        trainings.push_back(std::async(std::launch::async, train, trainings.size(), std::cref(task),
                                       std::cref(options.settings), std::ref(progress)));
    std::vector<demo::Result> results;
    for (auto& training : trainings) results.push_back(training.get());

    demo::print_table(std::cout, results);
    demo::write_page(page, results, name);
    if (!page.flush()) throw demo::UserError("cannot write " + options.page_file);
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    std::cout << "The document with its routed bytes: " << options.page_file << " ("
              << static_cast<int>(elapsed.count()) << " s)\n";
}

}  // namespace

int main(int count, char** arguments) {
    try {
        const demo::Options options = demo::parse_options(count, arguments);
        if (options.help)
            std::cout << demo::usage;
        else
            run(options);
        return 0;
    } catch (const demo::UserError& error) {
        std::cerr << "demo: " << error.what() << '\n';
        return 2;
    } catch (const std::exception& error) {
        std::cerr << "demo: " << error.what() << '\n';
        return 1;
    }
}
