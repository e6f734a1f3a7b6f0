// SPDX-License-Identifier: MIT
#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <charconv>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <fstream>
#include <functional>
#include <iostream>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "../../examples/demo/text.hpp"
#include "training.hpp"

namespace experiment {

using demo::UserError;

struct Options {
    std::vector<Task> tasks{Task::denoise, Task::language, Task::retrieve};
    std::vector<Arm> arms{Arm::learned,  Arm::fixed_stride, Arm::random, Arm::frozen,
                          Arm::position, Arm::package,      Arm::light,  Arm::dense};
    std::uint64_t seeds = 3;
    Index steps = 0, length = 0;  // 0: those of the program
    std::string text = demo::bible_file, out = "routing.csv";
    unsigned threads = 0;     // 0: as many as there are processors
    double time_limit = 1e9;  // in seconds; after it, no training begins
    bool help = false;
};

inline constexpr const char* usage = R"(usage: routing [OPTION...]

Trains small byte-level models that differ in who chooses the tokens of the heavy branch, and adds their losses on
held-out text to a CSV file. Trainings that are in this file already are left out.

  --tasks A,B…     of denoise,language,retrieve
  --arms A,B…      of learned,static,random,frozen,position,default,light,dense
  --seeds N        of each arm (3)
  --steps N        of each training
  --length N       tokens of a sequence, a multiple of 1024
  --text FILE      (by default that of Debian's package bible-kjv-text)
  --out FILE       (routing.csv)
  --threads N      trainings at a time, each on one processor (as many as there are); on a GPU it is 1
  --time-limit S   seconds after which no further training begins
  --help           this text
)";

template <typename Enum, std::size_t count>
std::vector<Enum> parse_list(std::string_view option, const std::array<std::string_view, count>& names,
                             std::string_view text) {
    std::vector<Enum> values;
    while (true) {
        const std::string_view word = text.substr(0, text.find(','));
        const auto at = std::find(names.begin(), names.end(), word);
        if (at == names.end()) throw UserError(std::string(option) + " does not know '" + std::string(word) + "'");
        values.push_back(static_cast<Enum>(at - names.begin()));
        if (word.size() == text.size()) return values;
        text.remove_prefix(word.size() + 1);
    }
}

inline Index parse_number(std::string_view option, std::string_view text) {
    Index value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc() || end != text.data() + text.size() || value < 1)
        throw UserError(std::string(option) + " takes a number of at least 1, not '" + std::string(text) + "'");
    return value;
}

inline Options parse_options(int count, char** arguments) {
    Options options;
    for (int i = 1; i < count; ++i) {
        const std::string_view option = arguments[i];
        const auto value = [&] {
            if (i + 1 == count) throw UserError(std::string(option) + " needs a value; see --help");
            return std::string_view(arguments[++i]);
        };
        if (option == "--help")
            options.help = true;
        else if (option == "--tasks")
            options.tasks = parse_list<Task>(option, task_names, value());
        else if (option == "--arms")
            options.arms = parse_list<Arm>(option, arm_names, value());
        else if (option == "--seeds")
            options.seeds = static_cast<std::uint64_t>(parse_number(option, value()));
        else if (option == "--steps")
            options.steps = parse_number(option, value());
        else if (option == "--length")
            options.length = parse_number(option, value());
        else if (option == "--text")
            options.text = value();
        else if (option == "--out")
            options.out = value();
        else if (option == "--threads")
            options.threads = static_cast<unsigned>(parse_number(option, value()));
        else if (option == "--time-limit")
            options.time_limit = static_cast<double>(parse_number(option, value()));
        else
            throw UserError("unknown option '" + std::string(option) + "'; see --help");
    }
    return options;
}

/// The file of results. The lines of a training are one write, so that several programs may share a file.
class Results {
public:
    explicit Results(std::string path) : path_(std::move(path)) {
        std::ifstream file(path_);
        std::string line;
        bool has_header = false;
        while (std::getline(file, line)) {
            has_header = true;
            done_.insert(key_of(line));
        }
        if (!has_header) append(csv_header);
    }
    /// `key` is what a run's lines begin with: task, arm, seed, dim, length and planned steps.
    bool has(const std::string& key) const { return done_.contains(key); }

    void append(const std::string& lines) const {
        const int file = ::open(path_.c_str(), O_WRONLY | O_APPEND | O_CREAT, 0644);
        if (file < 0 || ::write(file, lines.data(), lines.size()) != static_cast<ssize_t>(lines.size()))
            throw UserError("cannot write " + path_);
        ::close(file);
    }

private:
    static std::string key_of(const std::string& line) {
        std::size_t end = 0;
        for (int i = 0; i < 6 && end != std::string::npos; ++i) end = line.find(',', end + (i > 0));
        return line.substr(0, end);
    }
    std::string path_;
    std::set<std::string> done_;
};

/// Prints the operations of the arms. To compare arms, their sums must be about equal.
inline void print_operations(const Options& options, const Size& size, Index steps) {
    std::printf("%-10s %-10s %14s %14s %8s\n", "task", "arm", "mult./token", "mult. in all", "steps");
    for (const Task task : options.tasks)
        for (const Arm arm : options.arms) {
            const bool causal = task == Task::language;
            const Index count = equal_steps(task, size, arm, steps);
            std::printf("%-10s %-10s %14.0f %14.4g %8td\n", task_names[static_cast<std::size_t>(task)].data(),
                        arm_names[static_cast<std::size_t>(arm)].data(),
                        operations_per_token(size, arm, size.length, causal), total_operations(task, size, arm, count),
                        count);
        }
    std::fflush(stdout);
}

/// Calls train(size, run), which returns lines of CSV, from `workers` threads for all runs that the file does not have.
template <typename Train>
void run_all(const Options& options, std::string_view text, Size size, Index default_steps, Index held_out_batches,
             unsigned workers, Train&& train) {
    if (options.length > 0) {
        if (options.length % 1024 != 0) throw UserError("--length must be a multiple of 1024");
        size.length = options.length;
        size.tokens = std::max(size.tokens, size.length);
    }
    if (const auto held_out = static_cast<Index>(text.size() / 8); held_out < size.length + 2)
        throw UserError("the text must have at least " + std::to_string(8 * (size.length + 2)) +
                        " bytes for sequences of " + std::to_string(size.length) + ", but it has " +
                        std::to_string(text.size()));
    workers = std::max(1u, workers);  // the number of processors may be unknown
    const Results results(options.out);
    const Index steps = options.steps > 0 ? options.steps : default_steps;
    print_operations(options, size, steps);
    std::vector<Run> runs;  // one seed after the other, so that early results are of all arms
    for (std::uint64_t seed = 0; seed < options.seeds; ++seed)
        for (const Task task : options.tasks)
            for (const Arm arm : options.arms) {
                const std::string key = std::string(task_names[static_cast<std::size_t>(task)]) + ',' +
                                        std::string(arm_names[static_cast<std::size_t>(arm)]) + ',' +
                                        std::to_string(seed) + ',' + std::to_string(size.dim) + ',' +
                                        std::to_string(size.length) + ',' + std::to_string(steps);
                if (!results.has(key)) runs.push_back({task, arm, seed, steps, held_out_batches});
            }
    const auto start = std::chrono::steady_clock::now();
    const auto seconds = [&] {
        return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    };
    std::atomic<std::size_t> next = 0, done = 0, failed = 0;
    std::mutex mutex;
    const auto work = [&] {
        for (std::size_t i; (i = next++) < runs.size() && seconds() < options.time_limit;) {
            try {
                const std::string lines = train(size, runs[i]);
                const std::lock_guard lock(mutex);
                results.append(lines);
                const std::size_t last = lines.rfind('\n', lines.size() - 2);
                std::printf("[%zu/%zu, %.0f s] %s", ++done, runs.size(), seconds(),
                            lines.substr(last == std::string::npos ? 0 : last + 1).c_str());
                std::fflush(stdout);
            } catch (const std::exception& error) {  // such as OutOfMemory of the dense arm
                const std::lock_guard lock(mutex);
                std::fprintf(stderr, "%s, %s: %s\n", task_names[static_cast<std::size_t>(runs[i].task)].data(),
                             arm_names[static_cast<std::size_t>(runs[i].arm)].data(), error.what());
                ++failed;
            }
        }
    };
    std::vector<std::thread> threads;
    for (unsigned i = 0; i < workers; ++i) threads.emplace_back(work);
    for (auto& thread : threads) thread.join();
    std::printf("%s has %zu more of %zu trainings after %.0f s\n", options.out.c_str(), done.load(), runs.size(),
                seconds());
    if (failed > 0) throw std::runtime_error(std::to_string(failed.load()) + " trainings failed");
}

/// `main` of a program; `run` is called with the options.
template <typename F>
int run_program(int count, char** arguments, F&& run) {
    try {
        const Options options = parse_options(count, arguments);
        if (options.help)
            std::cout << usage;
        else
            run(options);
        return 0;
    } catch (const std::exception& error) {
        std::cerr << "routing: " << error.what() << '\n';
        return 1;
    }
}

}  // namespace experiment
