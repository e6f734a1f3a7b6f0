// SPDX-License-Identifier: MIT
#pragma once

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

#include <colt5/core/error.hpp>

namespace colt5::detail {

[[noreturn]] inline void throw_file_error(const std::filesystem::path& path, std::string_view what) {
    throw FileError("colt5: " + path.string() + ": " + std::string(what));
}

/// Appends the system's own words for the error number.
[[noreturn]] inline void throw_system_error(const std::filesystem::path& path, std::string_view what, int error) {
    throw_file_error(path, std::string(what) + ": " + std::generic_category().message(error));
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
            if (got < 0) throw_system_error(path_, "cannot be read at byte " + std::to_string(offset), errno);
            if (got == 0)
                throw_file_error(path_, "ends at byte " + std::to_string(offset) + " although it had " +
                                            std::to_string(size_) + " bytes when it was opened");
            offset += static_cast<std::uint64_t>(got);
            bytes = bytes.subspan(static_cast<std::size_t>(got));
        }
    }

private:
    std::filesystem::path path_;
    Descriptor descriptor_;
    std::uint64_t size_ = 0;
};

/// A file that appears under its name as a whole or not at all: written under a temporary name in the same folder, and
/// renamed by `commit`. Without `commit`, the destructor removes it and what was there before stays.
class AtomicFile {
public:
    explicit AtomicFile(std::filesystem::path path) : path_(std::move(path)) {
        std::error_code ignored;
        if (std::filesystem::is_directory(path_, ignored)) throw_file_error(path_, "is a directory");
        static std::atomic<unsigned> counter{0};
        do {
            const std::string unique = std::to_string(::getpid()) + "-" + std::to_string(counter++);
            temporary_ = folder() / (".colt5-" + unique + ".tmp");
            descriptor_ = Descriptor(::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666));
        } while (!descriptor_ && errno == EEXIST);
        if (!descriptor_) throw_system_error(path_, "cannot be created", errno);
    }
    AtomicFile(const AtomicFile&) = delete;
    AtomicFile& operator=(const AtomicFile&) = delete;
    ~AtomicFile() {
        if (!committed_) ::unlink(temporary_.c_str());
    }

    const std::filesystem::path& path() const { return path_; }

    void write_at(std::uint64_t offset, std::span<const std::byte> bytes) {
        while (!bytes.empty()) {
            const ssize_t put = ::pwrite(descriptor_.get(), bytes.data(), bytes.size(), static_cast<off_t>(offset));
            if (put < 0 && errno == EINTR) continue;
            if (put < 0) throw_system_error(path_, "cannot be written at byte " + std::to_string(offset), errno);
            offset += static_cast<std::uint64_t>(put);
            bytes = bytes.subspan(static_cast<std::size_t>(put));
        }
    }

    /// Nothing may be written afterwards.
    void commit() {
        if (::fsync(descriptor_.get()) != 0) throw_system_error(path_, "cannot be flushed to the disk", errno);
        if (!descriptor_.close()) throw_system_error(path_, "cannot be closed", errno);
        if (::rename(temporary_.c_str(), path_.c_str()) != 0)
            throw_system_error(path_, "cannot be put in place", errno);
        committed_ = true;
        // The new name survives a power failure once the folder is on the disk; not every file system can do that.
        const Descriptor folder_descriptor(::open(folder().c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
        if (folder_descriptor) ::fsync(folder_descriptor.get());
    }

private:
    std::filesystem::path folder() const { return path_.has_parent_path() ? path_.parent_path() : "."; }

    std::filesystem::path path_, temporary_;
    Descriptor descriptor_;
    bool committed_ = false;
};

}  // namespace colt5::detail
