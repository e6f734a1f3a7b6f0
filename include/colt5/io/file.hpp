// SPDX-License-Identifier: MIT
#pragma once

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

#include <colt5/core/error.hpp>

namespace colt5::detail {

/// For messages that stay readable whatever a file holds: at most the first `longest` bytes of the text, on one line,
/// with control characters as \xNN.
inline std::string printable(std::string_view text, std::size_t longest = 200) {
    const std::size_t all = text.size();
    if (all > longest) {
        std::size_t cut = longest;
        while (cut > 0 && (static_cast<unsigned char>(text[cut]) & 0xC0) == 0x80) --cut;  // not within a character
        text = text.substr(0, cut);
    }
    std::string line;
    for (const char character : text) {
        const auto code = static_cast<unsigned char>(character);
        if (code >= 0x20 && code != 0x7F) {
            line += character;
        } else {
            constexpr std::string_view digits = "0123456789ABCDEF";
            line.append("\\x").append(1, digits[code / 16]).append(1, digits[code % 16]);
        }
    }
    return all > longest ? line + "…" : line;
}

[[noreturn]] inline void throw_file_error(const std::filesystem::path& path, std::string_view what) {
    throw FileError(concat({"colt5: ", printable(path.native(), 4096), ": ", what}));
}

/// Appends the system's own words for the error number.
[[noreturn]] inline void throw_system_error(const std::filesystem::path& path, std::string_view what, int error) {
    throw_file_error(path, concat({what, ": ", std::generic_category().message(error)}));
}

/// The system's functions would take a zero byte for the end of the name.
inline void expect_no_zero_byte(const std::filesystem::path& path) {
    if (path.native().find('\0') != std::string::npos) throw_file_error(path, "holds a zero byte");
}

/// Owns a POSIX file descriptor.
class Descriptor {
public:
    Descriptor() = default;
    explicit Descriptor(int number) : number_(number) {}
    Descriptor(Descriptor&& other) noexcept : number_(std::exchange(other.number_, -1)) {}
    Descriptor& operator=(Descriptor&& other) noexcept {
        std::swap(number_, other.number_);
        return *this;
    }
    ~Descriptor() {
        if (number_ >= 0) ::close(number_);
    }

    int get() const { return number_; }
    explicit operator bool() const { return number_ >= 0; }
    /// Closes now, for callers who want to know whether that worked.
    bool close() { return ::close(std::exchange(number_, -1)) == 0; }

private:
    int number_ = -1;
};

/// A regular file to read from at any offset, also from several threads at once.
class InputFile {
public:
    explicit InputFile(std::filesystem::path path) : path_(std::move(path)) {
        expect_no_zero_byte(path_);
        // Without O_NONBLOCK, opening a pipe by mistake would wait for its writer.
        descriptor_ = Descriptor(::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
        if (!descriptor_) throw_system_error(path_, "cannot be opened", errno);
        struct stat status {};
        if (::fstat(descriptor_.get(), &status) != 0) throw_system_error(path_, "cannot be examined", errno);
        if (!S_ISREG(status.st_mode)) throw_file_error(path_, "is not a regular file");
        size_ = static_cast<std::uint64_t>(status.st_size);
    }

    const std::filesystem::path& path() const { return path_; }
    std::uint64_t size() const { return size_; }

    /// Fills `bytes` from `offset` on, or throws FileError.
    void read_at(std::uint64_t offset, std::span<std::byte> bytes) const {
        while (!bytes.empty()) {
            const ssize_t got = ::pread(descriptor_.get(), bytes.data(), bytes.size(), static_cast<off_t>(offset));
            if (got < 0 && errno == EINTR) continue;
            if (got < 0) {
                const int error = errno;
                throw_system_error(path_, concat({"cannot be read at byte ", std::to_string(offset)}), error);
            }
            if (got == 0)
                throw_file_error(path_, concat({"ends at byte ", std::to_string(offset), " although it had ",
                                                std::to_string(size_), " bytes when it was opened"}));
            offset += static_cast<std::uint64_t>(got);
            bytes = bytes.subspan(static_cast<std::size_t>(got));
        }
    }

private:
    std::filesystem::path path_;
    Descriptor descriptor_;
    std::uint64_t size_ = 0;
};

/// A file that appears under its name as a whole or not at all: `commit` puts what was written in place of what was
/// there before, with the same owner, where the system allows it, and the same permissions (without those of a group
/// that it cannot keep). Without `commit`, what was there before stays. Symbolic links are followed, also to a file
/// that does not exist yet; FileError for anything else than a regular file.
///
/// The data are written to a file in the same folder that has no name until `commit`, and so vanishes with a process
/// that is killed. A killed process leaves a temporary file behind if the file system has no such files, or if it was
/// killed within `commit`. A writer holds a lock on its temporary file, which ends with its process; the next
/// AtomicFile in the folder removes the temporary files that nobody has locked.
class AtomicFile {
public:
    explicit AtomicFile(std::filesystem::path path, bool unnamed_if_possible = true) : path_(std::move(path)) {
        find_target();
        remove_stale_files();
        if (!unnamed_if_possible || !create_unnamed()) create_named();
    }
    AtomicFile(const AtomicFile&) = delete;
    AtomicFile& operator=(const AtomicFile&) = delete;
    ~AtomicFile() {
        if (!temporary_.empty()) ::unlink(temporary_.c_str());
    }

    const std::filesystem::path& path() const { return path_; }

    void write_at(std::uint64_t offset, std::span<const std::byte> bytes) {
        while (!bytes.empty()) {
            const ssize_t put = ::pwrite(descriptor_.get(), bytes.data(), bytes.size(), static_cast<off_t>(offset));
            if (put < 0 && errno == EINTR) continue;
            if (put < 0) {
                const int error = errno;
                throw_system_error(path_, concat({"cannot be written at byte ", std::to_string(offset)}), error);
            }
            offset += static_cast<std::uint64_t>(put);
            bytes = bytes.subspan(static_cast<std::size_t>(put));
        }
    }

    /// Nothing may be written afterwards.
    void commit() {
        if (previous_) take_over_owner_and_mode();
        if (::fsync(descriptor_.get()) != 0) throw_system_error(path_, "cannot be flushed to the disk", errno);
        if (temporary_.empty()) give_name();
        if (::rename(temporary_.c_str(), target_.c_str()) != 0)
            throw_system_error(path_, "cannot be put in place", errno);
        temporary_.clear();
        descriptor_.close();  // Not before: that frees the lock. fsync has reported what a close could report.
        // The new name survives a power failure once the folder is on the disk; not every file system can do that.
        const Descriptor folder_descriptor(::open(folder().c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
        if (folder_descriptor) ::fsync(folder_descriptor.get());
    }

private:
    static std::filesystem::path folder_of(const std::filesystem::path& path) {
        return path.has_parent_path() ? path.parent_path() : ".";
    }
    std::filesystem::path folder() const { return folder_of(target_); }

    /// Follows symbolic links by name, because `rename` does not, and examines what is there.
    void find_target() {
        expect_no_zero_byte(path_);
        struct stat status {};
        if (::stat(path_.c_str(), &status) == 0) {
            if (S_ISDIR(status.st_mode)) throw_file_error(path_, "is a directory");
            if (!S_ISREG(status.st_mode)) throw_file_error(path_, "is not a regular file");
            previous_ = status;
        } else if (errno != ENOENT) {
            throw_system_error(path_, "cannot be created", errno);
        }
        constexpr int most_links = 40;
        target_ = path_;
        for (int links = 0;; ++links) {
            std::error_code error;
            const std::filesystem::path next = std::filesystem::read_symlink(target_, error);
            if (error) break;
            if (links == most_links) throw_system_error(path_, "cannot be created", ELOOP);
            target_ = folder_of(target_) / next;
        }
        // A link of /proc, such as /dev/stdout, need not lead to the file by its name.
        if (previous_ && (::stat(target_.c_str(), &status) != 0 || status.st_ino != previous_->st_ino ||
                          status.st_dev != previous_->st_dev))
            throw_file_error(path_, "is a link to a file without a name");
        if (!target_.has_filename()) throw_file_error(path_, "is not the name of a file");
    }

    /// A file that becomes private must not have been readable before.
    mode_t first_mode() const { return previous_ ? 0600 : 0666; }

    bool create_unnamed() {
#ifdef O_TMPFILE
        descriptor_ = Descriptor(::open(folder().c_str(), O_WRONLY | O_TMPFILE | O_CLOEXEC, first_mode()));
        if (!descriptor_ || ::access(descriptor_path().c_str(), F_OK) != 0) return false;
        lock();
        return true;
#else
        return false;
#endif
    }

    void create_named() {
        struct stat status {};
        do {
            do {
                temporary_ = unique_name();
                descriptor_ =
                    Descriptor(::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, first_mode()));
            } while (!descriptor_ && errno == EEXIST);
            if (!descriptor_) {
                const int error = errno;
                temporary_.clear();
                throw_system_error(path_, "cannot be created", error);
            }
            lock();
            // Once more if it was taken for a stale file before it was locked.
        } while (::fstat(descriptor_.get(), &status) == 0 && status.st_nlink == 0);
    }

    /// Gives the file of `create_unnamed` a name in the folder.
    void give_name() {
        std::filesystem::path name;
        do {
            name = unique_name();
            if (::linkat(AT_FDCWD, descriptor_path().c_str(), AT_FDCWD, name.c_str(), AT_SYMLINK_FOLLOW) == 0) {
                temporary_ = name;
                return;
            }
        } while (errno == EEXIST);
        throw_system_error(path_, "cannot be put in place", errno);
    }

    std::string descriptor_path() const {
        return concat({"/proc/self/fd/", std::to_string(descriptor_.get())});
    }

    /// Where the file system knows no locks, stale files stay.
    void lock() {
        while (::flock(descriptor_.get(), LOCK_EX) != 0 && errno == EINTR) {
        }
    }

    static constexpr std::string_view temporary_prefix = ".colt5-", temporary_suffix = ".tmp";

    std::filesystem::path unique_name() const {
        static std::atomic<unsigned> counter{0};
        return folder() /
               concat({temporary_prefix, std::to_string(::getpid()), "-", std::to_string(counter++), temporary_suffix});
    }
    static bool is_temporary_name(std::string_view name) {
        if (!name.starts_with(temporary_prefix) || !name.ends_with(temporary_suffix)) return false;
        name.remove_prefix(temporary_prefix.size());
        name.remove_suffix(temporary_suffix.size());
        return name.find_first_not_of("0123456789-") == std::string_view::npos;
    }

    void remove_stale_files() const {
        std::error_code error;
        std::filesystem::directory_iterator file(folder(), error), end;
        for (; !error && file != end; file.increment(error)) {
            const std::filesystem::path& name = file->path();
            if (!is_temporary_name(name.filename().native())) continue;
            const Descriptor descriptor(::open(name.c_str(), O_RDWR | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC));
            if (descriptor && ::flock(descriptor.get(), LOCK_EX | LOCK_NB) == 0) ::unlink(name.c_str());
        }
    }

    /// Who could not read the old file cannot read the new one: if its group cannot be kept, the group of the new file
    /// may do what others may.
    void take_over_owner_and_mode() {
        const int descriptor = descriptor_.get();
        mode_t mode = previous_->st_mode & 0777;
        if (::fchown(descriptor, previous_->st_uid, previous_->st_gid) != 0 &&
            ::fchown(descriptor, static_cast<uid_t>(-1), previous_->st_gid) != 0)
            mode = (mode & 0707) | (mode & 0007) << 3;
        ::fchmod(descriptor, mode);
    }

    std::filesystem::path path_, target_;  // what the caller named, and where the links lead
    std::optional<struct stat> previous_;
    std::filesystem::path temporary_;  // empty while there is no name
    Descriptor descriptor_;
};

}  // namespace colt5::detail
