// SPDX-License-Identifier: MIT
#include <colt5/io/file.hpp>

#include <sys/resource.h>
#include <sys/stat.h>

#include <csignal>
#include <span>
#include <string>
#include <vector>

#include <doctest/doctest.h>

#include "io/temporary_folder.hpp"

using namespace colt5;
using colt5::detail::AtomicFile;
using colt5::detail::InputFile;

namespace {

std::span<const std::byte> bytes_of(const std::string& text) {
    return std::as_bytes(std::span(text));
}

}  // namespace

TEST_CASE("file: reads anywhere, and says where it ended") {
    const TemporaryFolder folder;
    write_file(folder / "a", "0123456789");
    const InputFile file(folder / "a");
    CHECK(file.size() == 10);
    std::string text(4, ' ');
    file.read_at(3, std::as_writable_bytes(std::span(text)));
    CHECK(text == "3456");

    std::filesystem::resize_file(folder / "a", 5);
    CHECK(message_of<FileError>([&] { file.read_at(3, std::as_writable_bytes(std::span(text))); }) ==
          "colt5: " + (folder / "a").string() + ": ends at byte 5 although it had 10 bytes when it was opened");
}

TEST_CASE("file: what cannot be read") {
    const TemporaryFolder folder;
    CHECK(message_of<FileError>([&] { InputFile(folder / "none"); }) ==
          "colt5: " + (folder / "none").string() + ": cannot be opened: No such file or directory");
    CHECK(message_of<FileError>([&] { InputFile(folder / ""); }).ends_with("is not a regular file"));
    REQUIRE(::mkfifo((folder / "pipe").c_str(), 0600) == 0);  // must not wait for a writer either
    CHECK(message_of<FileError>([&] { InputFile(folder / "pipe"); }).ends_with("is not a regular file"));
}

TEST_CASE("file: appears with commit, and as a whole") {
    const TemporaryFolder folder;
    write_file(folder / "a", "old");
    {
        AtomicFile file(folder / "a");
        file.write_at(3, bytes_of("content"));
        file.write_at(0, bytes_of("new"));
        CHECK(read_file(folder / "a") == "old");
        CHECK(folder.number_of_files() == 2);
        file.commit();
    }
    CHECK(read_file(folder / "a") == "newcontent");
    CHECK(folder.number_of_files() == 1);
}

TEST_CASE("file: without commit, the old file stays and nothing else") {
    const TemporaryFolder folder;
    write_file(folder / "a", "old");
    {
        AtomicFile file(folder / "a");
        file.write_at(0, bytes_of("half of it"));
    }
    CHECK(read_file(folder / "a") == "old");
    CHECK(folder.number_of_files() == 1);
}

TEST_CASE("file: a name left over by another process is not overwritten") {
    const TemporaryFolder folder;
    std::vector<std::filesystem::path> taken;
    {
        const AtomicFile probe(folder / "a");
        const std::string name = std::filesystem::directory_iterator(folder / "")->path().filename().string();
        const auto dash = name.rfind('-');
        const int next = std::stoi(name.substr(dash + 1)) + 1;
        taken.push_back(folder / (name.substr(0, dash + 1) + std::to_string(next) + ".tmp"));
    }
    write_file(taken[0], "theirs");
    AtomicFile file(folder / "a");
    file.write_at(0, bytes_of("ours"));
    file.commit();
    CHECK(read_file(folder / "a") == "ours");
    CHECK(read_file(taken[0]) == "theirs");
}

TEST_CASE("file: what cannot be written") {
    const TemporaryFolder folder;
    CHECK(message_of<FileError>([&] { AtomicFile(folder / ""); }).ends_with("is a directory"));
    CHECK(message_of<FileError>([&] { AtomicFile(folder / "none/a"); }) ==
          "colt5: " + (folder / "none/a").string() + ": cannot be created: No such file or directory");
    write_file(folder / "a", "a file");
    CHECK(message_of<FileError>([&] { AtomicFile(folder / "a/b"); }).ends_with("cannot be created: Not a directory"));
    CHECK(read_file(folder / "a") == "a file");
}

TEST_CASE("file: a directory that takes the name meanwhile is left alone") {
    const TemporaryFolder folder;
    {
        AtomicFile file(folder / "a");
        std::filesystem::create_directory(folder / "a");
        CHECK(message_of<FileError>([&] { file.commit(); }).ends_with("cannot be put in place: Is a directory"));
    }
    CHECK(folder.number_of_files() == 1);
    CHECK(std::filesystem::is_directory(folder / "a"));
}

TEST_CASE("file: a full disk") {
    const TemporaryFolder folder;
    struct rlimit before {};
    REQUIRE(::getrlimit(RLIMIT_FSIZE, &before) == 0);
    const auto previous_handler = std::signal(SIGXFSZ, SIG_IGN);
    const struct rlimit small { 1000, before.rlim_max };
    REQUIRE(::setrlimit(RLIMIT_FSIZE, &small) == 0);
    const std::string message = message_of<FileError>([&] {
        AtomicFile file(folder / "a");
        file.write_at(0, bytes_of(std::string(2000, 'x')));
    });
    REQUIRE(::setrlimit(RLIMIT_FSIZE, &before) == 0);
    std::signal(SIGXFSZ, previous_handler);
    CHECK(message == "colt5: " + (folder / "a").string() + ": cannot be written at byte 1000: File too large");
    CHECK(folder.number_of_files() == 0);
}
