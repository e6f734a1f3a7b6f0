// SPDX-License-Identifier: MIT
#include <colt5/io/file.hpp>

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <filesystem>
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

/// What a test learns of fsync and rename, in order, and what it makes of them.
struct Calls {
    std::vector<std::string> made = {};
    int fsync_error = 0;
    bool rename_kills = false;
};
Calls* calls = nullptr;

struct Listener {
    explicit Listener(Calls& to) { calls = &to; }
    Listener(const Listener&) = delete;
    Listener& operator=(const Listener&) = delete;
    ~Listener() { calls = nullptr; }
};

void save(const std::filesystem::path& path, const std::string& text, bool unnamed_if_possible = true) {
    AtomicFile file(path, unnamed_if_possible);
    file.write_at(0, bytes_of(text));
    file.commit();
}

struct stat status_of(const std::filesystem::path& path) {
    struct stat status {};
    REQUIRE(::lstat(path.c_str(), &status) == 0);
    return status;
}
mode_t mode_of(const std::filesystem::path& path) {
    return status_of(path).st_mode & 07777;
}

bool has_unnamed_files(const TemporaryFolder& folder) {
    return static_cast<bool>(colt5::detail::Descriptor(::open((folder / "").c_str(), O_WRONLY | O_TMPFILE, 0600)));
}

/// Runs `body` in a process of its own, which it is to end by a signal.
template <typename Body>
void expect_killed(Body&& body) {
    const pid_t child = ::fork();
    REQUIRE(child >= 0);
    if (child == 0) {
        body();
        ::_exit(0);
    }
    int status = 0;
    REQUIRE(::waitpid(child, &status, 0) == child);
    REQUIRE(WIFSIGNALED(status));
}

}  // namespace

// In place of the C library's, in the whole program.
extern "C" int fsync(int descriptor) {
    if (calls != nullptr) {
        struct stat status {};
        ::fstat(descriptor, &status);
        calls->made.push_back(S_ISDIR(status.st_mode) ? "sync folder" : "sync " + std::to_string(status.st_size));
        if (calls->fsync_error != 0) {
            errno = calls->fsync_error;
            return -1;
        }
    }
    return static_cast<int>(::syscall(SYS_fsync, descriptor));
}
extern "C" int rename(const char* from, const char* to) noexcept {
    if (calls != nullptr) {
        if (calls->rename_kills) ::raise(SIGKILL);
        calls->made.push_back("rename");
    }
    return static_cast<int>(::syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0));
}

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
    for (const bool unnamed : {true, false}) {
        write_file(folder / "a", "old");
        AtomicFile file(folder / "a", unnamed);
        file.write_at(3, bytes_of("content"));
        file.write_at(0, bytes_of("new"));
        CHECK(read_file(folder / "a") == "old");
        CHECK(folder.number_of_files() == (unnamed && has_unnamed_files(folder) ? 1 : 2));
        file.commit();
        CHECK(read_file(folder / "a") == "newcontent");
        CHECK(folder.number_of_files() == 1);
    }
}

TEST_CASE("file: the data are on the disk before the name, and then the folder") {
    const TemporaryFolder folder;
    for (const bool unnamed : {true, false}) {
        Calls made;
        const Listener listener(made);
        save(folder / "a", "content", unnamed);
        CHECK(made.made == std::vector<std::string>{"sync 7", "rename", "sync folder"});
    }
}

TEST_CASE("file: data that do not reach the disk replace nothing") {
    const TemporaryFolder folder;
    write_file(folder / "a", "old");
    for (const bool unnamed : {true, false}) {
        Calls made{.fsync_error = EIO};
        const Listener listener(made);
        CHECK(message_of<FileError>([&] { save(folder / "a", "new", unnamed); }) ==
              "colt5: " + (folder / "a").string() + ": cannot be flushed to the disk: Input/output error");
        CHECK(made.made == std::vector<std::string>{"sync 3"});
        CHECK(read_file(folder / "a") == "old");
        CHECK(folder.number_of_files() == 1);
    }
}

TEST_CASE("file: a process that is killed while it saves leaves nothing that the next save does not remove") {
    const TemporaryFolder folder;
    write_file(folder / "a", "old");
    for (const bool unnamed : {true, false}) {
        expect_killed([&] {
            AtomicFile file(folder / "a", unnamed);
            file.write_at(0, bytes_of("half of it"));
            ::raise(SIGKILL);
        });
        CHECK(read_file(folder / "a") == "old");
        CHECK(folder.number_of_files() == (unnamed && has_unnamed_files(folder) ? 1 : 2));

        expect_killed([&] {
            Calls made{.rename_kills = true};
            const Listener listener(made);
            save(folder / "a", "whole", unnamed);
        });
        CHECK(read_file(folder / "a") == "old");
        CHECK(folder.number_of_files() == 2);
        save(folder / "b", "new", unnamed);
        CHECK(folder.number_of_files() == 2);
        CHECK(std::filesystem::remove(folder / "b"));
    }
}

TEST_CASE("file: what another writer still writes, and what looks like it, is left alone") {
    const TemporaryFolder folder;
    write_file(folder / ".colt5-notes.tmp", "mine");
    AtomicFile slow(folder / "a", false);
    slow.write_at(0, bytes_of("slow"));
    save(folder / "b", "quick", false);
    CHECK(folder.number_of_files() == 3);
    slow.commit();
    CHECK(read_file(folder / "a") == "slow");
    CHECK(read_file(folder / "b") == "quick");
    CHECK(read_file(folder / ".colt5-notes.tmp") == "mine");
    CHECK(folder.number_of_files() == 3);
}

TEST_CASE("file: what is not a regular file is refused and stays as it was") {
    const TemporaryFolder folder;
    const auto complaint = [&](const std::filesystem::path& path) {
        const std::string message = message_of<FileError>([&] { AtomicFile file(path); });
        CHECK(message.find('\n') == std::string::npos);
        return message;
    };
    REQUIRE(::mkfifo((folder / "pipe").c_str(), 0600) == 0);
    CHECK(complaint(folder / "pipe") == "colt5: " + (folder / "pipe").string() + ": is not a regular file");
    CHECK(S_ISFIFO(status_of(folder / "pipe").st_mode));
    std::filesystem::create_symlink("pipe", folder / "link");
    CHECK(complaint(folder / "link").ends_with("link: is not a regular file"));
    std::filesystem::create_directory(folder / "folder");
    std::filesystem::create_symlink("folder", folder / "way");
    CHECK(complaint(folder / "way").ends_with("way: is a directory"));
    for (const char* device : {"/dev/null", "/dev/full"}) {
        CHECK(complaint(device) == "colt5: " + std::string(device) + ": is not a regular file");
        CHECK(S_ISCHR(status_of(device).st_mode));
    }
    CHECK(folder.number_of_files() == 4);
}

TEST_CASE("file: symbolic links stay, and what they lead to is replaced") {
    const TemporaryFolder folder;
    std::filesystem::create_directory(folder / "runs");
    write_file(folder / "runs/epoch-3", "old");
    std::filesystem::create_symlink("runs/epoch-3", folder / "latest");  // relative to the folder of the link
    std::filesystem::create_symlink(folder / "latest", folder / "best");
    std::filesystem::create_symlink("runs", folder / "way");
    std::filesystem::create_symlink("../runs/epoch-3", folder / "runs/up");
    int count = 0;
    for (const std::string name : {"latest", "best", "way/epoch-3", "way/up"}) {
        const std::string text = "new " + std::to_string(++count);
        save(folder / name, text);
        CHECK(read_file(folder / "runs/epoch-3") == text);
    }
    CHECK(status_of(folder / "runs/epoch-3").st_nlink == 1);
    for (const std::string name : {"latest", "best", "way", "runs/up"})
        CHECK(S_ISLNK(status_of(folder / name).st_mode));

    std::string before = "latest";
    for (int i = 0; i < 20; ++i) {
        const std::string name = "chain " + std::to_string(i);
        std::filesystem::create_symlink(before, folder / name);
        before = name;
    }
    save(folder / before, "far");
    CHECK(read_file(folder / "runs/epoch-3") == "far");

    std::filesystem::create_symlink("runs/epoch-4", folder / "next");
    save(folder / "next", "first");
    CHECK(S_ISLNK(status_of(folder / "next").st_mode));
    CHECK(read_file(folder / "runs/epoch-4") == "first");

    std::filesystem::create_symlink("nowhere/a", folder / "lost");
    CHECK(message_of<FileError>([&] { AtomicFile(folder / "lost"); }) ==
          "colt5: " + (folder / "lost").string() + ": cannot be created: No such file or directory");
    std::filesystem::create_symlink("round", folder / "about");
    std::filesystem::create_symlink("about", folder / "round");
    CHECK(message_of<FileError>([&] { AtomicFile(folder / "round"); }) ==
          "colt5: " + (folder / "round").string() + ": cannot be created: Too many levels of symbolic links");
}

TEST_CASE("file: a file keeps its permissions and its owner, and a new one has those of the process") {
    const TemporaryFolder folder;
    const mode_t before = ::umask(027);
    save(folder / "new", "text");
    ::umask(022);
    for (const mode_t mode : {mode_t{0600}, mode_t{0664}, mode_t{0400}}) {
        write_file(folder / "a", "old");
        REQUIRE(::chmod((folder / "a").c_str(), mode) == 0);
        for (const bool unnamed : {true, false}) {
            save(folder / "a", "new", unnamed);
            CHECK(mode_of(folder / "a") == mode);
        }
        CHECK(std::filesystem::remove(folder / "a"));
    }
    ::umask(before);
    CHECK(mode_of(folder / "new") == 0640);

    write_file(folder / "private", "old");
    REQUIRE(::chmod((folder / "private").c_str(), 0600) == 0);
    {
        const AtomicFile file(folder / "private", false);  // nor may others read it before it has its name
        for (const auto& entry : std::filesystem::directory_iterator(folder / ""))
            if (entry.path().filename().string().starts_with(".colt5-")) CHECK(mode_of(entry.path()) == 0600);
    }
    if (::geteuid() == 0) {
        REQUIRE(::chown((folder / "private").c_str(), 1234, 2345) == 0);
        save(folder / "private", "new");
        CHECK(status_of(folder / "private").st_uid == 1234);
        CHECK(status_of(folder / "private").st_gid == 2345);
        CHECK(mode_of(folder / "private") == 0600);
    }
}

TEST_CASE("file: without the right to keep the group, a new group may do no more than others") {
    if (::geteuid() != 0) return;  // needs two users
    const TemporaryFolder folder;
    REQUIRE(::chmod((folder / "").c_str(), 0777) == 0);
    write_file(folder / "a", "old");
    REQUIRE(::chown((folder / "a").c_str(), 1234, 2345) == 0);
    REQUIRE(::chmod((folder / "a").c_str(), 0664) == 0);
    REQUIRE(::seteuid(1234) == 0);
    std::string message;
    try {
        save(folder / "a", "new");
    } catch (const FileError& error) {
        message = error.what();
    }
    REQUIRE(::seteuid(0) == 0);
    CHECK(message.empty());
    CHECK(read_file(folder / "a") == "new");
    CHECK(status_of(folder / "a").st_gid != 2345);
    CHECK(mode_of(folder / "a") == 0644);

    // And without the right to write into the folder, nothing changes.
    REQUIRE(::chmod((folder / "").c_str(), 0755) == 0);
    REQUIRE(::seteuid(1234) == 0);
    message = message_of<FileError>([&] { save(folder / "a", "newer"); });
    REQUIRE(::seteuid(0) == 0);
    CHECK(message == "colt5: " + (folder / "a").string() + ": cannot be created: Permission denied");
    CHECK(read_file(folder / "a") == "new");
    CHECK(folder.number_of_files() == 1);
}

TEST_CASE("file: names with unusual characters") {
    const TemporaryFolder folder;
    for (const std::string& name : {std::string("with space"), std::string("näme"), std::string("-rf"),
                                    std::string("two\nlines"), std::string("\xFF"), std::string(255, 'x')}) {
        save(folder / name, name);
        CHECK(read_file(folder / name) == name);
    }
    CHECK(folder.number_of_files() == 6);
    const auto complaint = [](const std::filesystem::path& path) {
        return message_of<FileError>([&] { AtomicFile file(path); });
    };
    CHECK(complaint(folder / "two\nlines/a").ends_with("two\\x0Alines/a: cannot be created: Not a directory"));
    CHECK(complaint(folder / std::string(256, 'x')).ends_with("x: cannot be created: File name too long"));
    CHECK(complaint("") == "colt5: : is not the name of a file");
    CHECK(complaint(folder / std::string("a\0b", 3)).ends_with("a\\x00b: holds a zero byte"));
    CHECK(message_of<FileError>([&] {
              InputFile(folder / std::string("with space\0b", 12));
          }).ends_with("holds a zero byte"));
    CHECK(folder.number_of_files() == 6);
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
