// SPDX-License-Identifier: MIT
#pragma once

// Zip archives as numpy.savez writes them (PKWARE's APPNOTE.TXT 6.3): stored entries and, where COLT5_USE_ZLIB is
// defined for every file of the program, which then needs zlib (-lz), deflated ones. No encryption, one disk; sizes of
// 64 bits.

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <initializer_list>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(COLT5_USE_ZLIB)
#include <zlib.h>
#endif

#include <colt5/core/error.hpp>
#include <colt5/io/elements.hpp>
#include <colt5/io/file.hpp>

namespace colt5::detail {

/// The CRC-32 of zip, of polynomial 0xEDB88320.
class Crc32 {
public:
    void add(std::span<const std::byte> bytes) {
        for (const std::byte byte : bytes)
            sum_ = table[(sum_ ^ std::to_integer<std::uint32_t>(byte)) & 0xFFu] ^ (sum_ >> 8);
    }
    std::uint32_t value() const { return ~sum_; }

private:
    static constexpr std::array<std::uint32_t, 256> table = [] {
        std::array<std::uint32_t, 256> sums{};
        for (std::uint32_t i = 0; i < 256; ++i) {
            std::uint32_t sum = i;
            for (int bit = 0; bit < 8; ++bit) sum = (sum >> 1) ^ ((sum & 1u) != 0 ? 0xEDB88320u : 0u);
            sums[i] = sum;
        }
        return sums;
    }();
    std::uint32_t sum_ = ~std::uint32_t{0};
};

inline constexpr std::uint32_t zip_local = 0x04034B50, zip_central = 0x02014B50, zip_end = 0x06054B50,
                               zip_end_64 = 0x06064B50, zip_locator_64 = 0x07064B50;
inline constexpr std::size_t zip_local_bytes = 30, zip_central_bytes = 46, zip_end_bytes = 22, zip_end_64_bytes = 56,
                             zip_locator_64_bytes = 20;
/// In a field of 16 or 32 bits: the number is in a record of 64 bits.
inline constexpr std::uint16_t zip_elsewhere_16 = 0xFFFF;
inline constexpr std::uint32_t zip_elsewhere_32 = 0xFFFFFFFF;

struct ZipEntry {
    std::string name;
    bool is_deflated = false;
    std::uint32_t crc = 0;
    std::uint64_t begin = 0, packed = 0, size = 0;  // [begin, begin + packed) in the file; bytes when unpacked
};

/// An archive to read from. Opening reads and checks the directory; throws FileError.
class ZipFile {
public:
    explicit ZipFile(const std::filesystem::path& path) : file_(path) { read_directory(find_directory()); }

    const std::filesystem::path& path() const { return file_.path(); }
    const std::vector<ZipEntry>& entries() const { return entries_; }

    /// The bytes of an entry, unpacked, of the right checksum.
    std::vector<std::byte> read(const ZipEntry& entry) const {
        std::vector<std::byte> packed(static_cast<std::size_t>(entry.packed));
        file_.read_at(entry.begin, packed);
        std::vector<std::byte> bytes = entry.is_deflated ? inflate(entry, packed) : std::move(packed);
        Crc32 crc;
        crc.add(bytes);
        if (crc.value() != entry.crc)
            fail({"entry ", backquoted(entry.name), " has the checksum ", std::to_string(crc.value()),
                  ", but the directory says ", std::to_string(entry.crc)});
        return bytes;
    }

private:
    struct Directory {
        std::uint64_t begin, bytes, entries;
    };

    [[noreturn]] void fail(std::initializer_list<std::string_view> what) const {
        throw_file_error(path(), concat(what));
    }
    std::vector<std::byte> read(std::uint64_t offset, std::uint64_t bytes) const {
        std::vector<std::byte> result(static_cast<std::size_t>(bytes));
        file_.read_at(offset, result);
        return result;
    }
    template <typename Number>
    static Number number(std::span<const std::byte> bytes, std::size_t offset) {
        Number value;
        std::memcpy(&value, bytes.subspan(offset, sizeof(Number)).data(), sizeof(Number));
        return value;
    }

    /// From the record at the end of the file, behind which only its comment stands.
    Directory find_directory() const {
        const std::uint64_t size = file_.size();
        const std::uint64_t tail_bytes = std::min<std::uint64_t>(size, zip_end_bytes + zip_elsewhere_16);
        const std::vector<std::byte> tail = read(size - tail_bytes, tail_bytes);
        for (std::size_t begin = tail.size() + 1; begin-- > 0;) {
            const std::span<const std::byte> end = std::span(tail).subspan(begin);
            if (end.size() >= zip_end_bytes && number<std::uint32_t>(end, 0) == zip_end &&
                number<std::uint16_t>(end, 20) == end.size() - zip_end_bytes)
                return directory(end, size - end.size());
        }
        fail({"is no zip archive, or its end is missing: no record of it in the last ", std::to_string(tail_bytes),
              " bytes"});
    }
    Directory directory(std::span<const std::byte> end, std::uint64_t end_begin) const {
        Directory result{number<std::uint32_t>(end, 16), number<std::uint32_t>(end, 12),
                         number<std::uint16_t>(end, 10)};
        if (number<std::uint32_t>(end, 4) != 0 || number<std::uint16_t>(end, 8) != result.entries)
            fail({"is one of several disks of a zip archive"});
        if (end_begin >= zip_locator_64_bytes) {
            const auto locator = read(end_begin - zip_locator_64_bytes, zip_locator_64_bytes);
            if (number<std::uint32_t>(locator, 0) == zip_locator_64) {
                const auto at = number<std::uint64_t>(locator, 8);
                if (at > end_begin || end_begin - at < zip_end_64_bytes + zip_locator_64_bytes)
                    fail({"the record of 64 bits claims to be at byte ", std::to_string(at),
                          ", but must end before byte ", std::to_string(end_begin - zip_locator_64_bytes)});
                const auto end_64 = read(at, zip_end_64_bytes);
                if (number<std::uint32_t>(end_64, 0) != zip_end_64)
                    fail({"has no record of 64 bits at byte ", std::to_string(at)});
                result = {number<std::uint64_t>(end_64, 48), number<std::uint64_t>(end_64, 40),
                          number<std::uint64_t>(end_64, 32)};
            }
        }
        if (result.begin > end_begin || result.bytes > end_begin - result.begin)
            fail({"the directory claims ", std::to_string(result.bytes), " bytes from byte ",
                  std::to_string(result.begin), " on, but must end before byte ", std::to_string(end_begin)});
        if (result.entries > result.bytes / zip_central_bytes)
            fail({"the directory claims ", std::to_string(result.entries), " entries in ", std::to_string(result.bytes),
                  " bytes"});
        return result;
    }

    void read_directory(const Directory& directory) {
        const std::vector<std::byte> bytes = read(directory.begin, directory.bytes);
        std::span<const std::byte> rest = bytes;
        std::set<std::string> names;
        for (std::uint64_t i = 0; i < directory.entries; ++i) {
            if (rest.size() < zip_central_bytes || number<std::uint32_t>(rest, 0) != zip_central)
                fail({"entry ", std::to_string(i), " of ", std::to_string(directory.entries),
                      " is missing in the directory"});
            const std::size_t name_bytes = number<std::uint16_t>(rest, 28),
                              extra_bytes = number<std::uint16_t>(rest, 30),
                              comment_bytes = number<std::uint16_t>(rest, 32);
            if (rest.size() - zip_central_bytes < name_bytes + extra_bytes + comment_bytes)
                fail({"entry ", std::to_string(i), " is cut off in the directory"});
            ZipEntry entry;
            entry.name = text(rest.subspan(zip_central_bytes, name_bytes));
            entry.is_deflated = method(rest, entry.name) == 8;
            entry.crc = number<std::uint32_t>(rest, 16);
            entry.packed = number<std::uint32_t>(rest, 20);
            entry.size = number<std::uint32_t>(rest, 24);
            std::uint64_t local = number<std::uint32_t>(rest, 42);
            read_sizes_of_64_bits(entry, local, rest.subspan(zip_central_bytes + name_bytes, extra_bytes));
            find_data(entry, local, directory.begin);
            if (!names.insert(entry.name).second) fail({"two entries are called ", backquoted(entry.name)});
            entries_.push_back(std::move(entry));
            rest = rest.subspan(zip_central_bytes + name_bytes + extra_bytes + comment_bytes);
        }
    }

    static std::string text(std::span<const std::byte> bytes) {
        return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
    }
    std::uint16_t method(std::span<const std::byte> central, const std::string& name) const {
        if ((number<std::uint16_t>(central, 8) & 1u) != 0) fail({"entry ", backquoted(name), " is encrypted"});
        const auto method = number<std::uint16_t>(central, 10);
        if (method != 0 && method != 8)
            fail({"entry ", backquoted(name), " is packed by method ", std::to_string(method),
                  "; stored (0) and deflated (8) ones can be read"});
        return method;
    }
    /// The extra field 1 has, in this order, those numbers that are elsewhere.
    void read_sizes_of_64_bits(ZipEntry& entry, std::uint64_t& local, std::span<const std::byte> extra) const {
        while (extra.size() >= 4) {
            const std::size_t bytes = number<std::uint16_t>(extra, 2);
            if (bytes > extra.size() - 4) fail({"entry ", backquoted(entry.name), " has a broken extra field"});
            std::span<const std::byte> field = extra.subspan(4, bytes);
            if (number<std::uint16_t>(extra, 0) == 1)
                for (std::uint64_t* const value : {&entry.size, &entry.packed, &local}) {
                    if (*value != zip_elsewhere_32) continue;
                    if (field.size() < 8) fail({"entry ", backquoted(entry.name), " has no size of 64 bits"});
                    *value = number<std::uint64_t>(field, 0);
                    field = field.subspan(8);
                }
            extra = extra.subspan(4 + bytes);
        }
    }
    /// The data stand behind the local header, whose extra field may be of another size.
    void find_data(ZipEntry& entry, std::uint64_t local, std::uint64_t end) const {
        if (local > end || end - local < zip_local_bytes)
            fail({"entry ", backquoted(entry.name), " claims to be at byte ", std::to_string(local),
                  ", but the directory is at byte ", std::to_string(end)});
        const auto header = read(local, zip_local_bytes);
        const std::size_t name_bytes = number<std::uint16_t>(header, 26),
                          extra_bytes = number<std::uint16_t>(header, 28);
        entry.begin = local + zip_local_bytes + name_bytes + extra_bytes;
        if (number<std::uint32_t>(header, 0) != zip_local || entry.begin > end)
            fail({"entry ", backquoted(entry.name), " is not at byte ", std::to_string(local)});
        if (const auto name = text(read(local + zip_local_bytes, name_bytes)); name != entry.name)
            fail({"entry ", backquoted(entry.name), " is called ", backquoted(name), " at byte ",
                  std::to_string(local)});
        if (entry.packed > end - entry.begin)
            fail({"entry ", backquoted(entry.name), " claims ", std::to_string(entry.packed), " bytes, but there are ",
                  std::to_string(end - entry.begin), " before the directory"});
        if (!entry.is_deflated && entry.packed != entry.size)
            fail({"entry ", backquoted(entry.name), " is stored in ", std::to_string(entry.packed), " bytes, but has ",
                  std::to_string(entry.size)});
        constexpr std::uint64_t largest_ratio = 1032;  // of deflate
        if (entry.size / largest_ratio > entry.packed)
            fail({"entry ", backquoted(entry.name), " claims ", std::to_string(entry.size), " bytes, deflated to ",
                  std::to_string(entry.packed)});
    }

    std::vector<std::byte> inflate([[maybe_unused]] const ZipEntry& entry,
                                   [[maybe_unused]] std::span<const std::byte> packed) const {
#if defined(COLT5_USE_ZLIB)
        std::vector<std::byte> bytes(static_cast<std::size_t>(entry.size));
        z_stream stream{};
        if (::inflateInit2(&stream, -MAX_WBITS) != Z_OK) throw OutOfMemory("colt5: out of memory: zlib has none");
        // zlib counts in 32 bits.
        constexpr std::size_t most = std::size_t{1} << 30;
        std::span<std::byte> to = bytes;
        int status = Z_OK;
        do {
            if (stream.avail_in == 0 && !packed.empty()) {
                stream.next_in = const_cast<Bytef*>(reinterpret_cast<const Bytef*>(packed.data()));
                stream.avail_in = static_cast<uInt>(std::min(most, packed.size()));
                packed = packed.subspan(stream.avail_in);
            }
            const auto room = std::min(most, to.size());
            stream.next_out = reinterpret_cast<Bytef*>(to.data());
            stream.avail_out = static_cast<uInt>(room);
            status = ::inflate(&stream, Z_NO_FLUSH);
            to = to.subspan(room - stream.avail_out);
        } while (status == Z_OK);
        const bool is_whole = status == Z_STREAM_END && stream.avail_in == 0 && packed.empty() && to.empty();
        ::inflateEnd(&stream);
        if (!is_whole)
            fail({"entry ", backquoted(entry.name), " does not inflate to its ", std::to_string(entry.size), " bytes"});
        return bytes;
#else
        fail({"entry ", backquoted(entry.name),
              " is deflated, which needs -DCOLT5_USE_ZLIB and -lz; numpy.savez stores what numpy.savez_compressed "
              "deflates"});
#endif
    }

    InputFile file_;
    std::vector<ZipEntry> entries_;
};

/// Writes an archive of stored entries, as a whole or not at all (see AtomicFile). The same entries give the same
/// bytes: all are of 1980-01-01.
class ZipWriter {
public:
    explicit ZipWriter(const std::filesystem::path& path) : file_(path) {}

    /// An entry of these bytes, one piece after the other.
    void add(const std::string& name, std::initializer_list<std::span<const std::byte>> pieces) {
        expect_value(name.size() < zip_elsewhere_16, "name", "of less than 65535 bytes", name.size());
        Crc32 crc;
        std::uint64_t size = 0;
        for (const auto& piece : pieces) {
            crc.add(piece);
            size += piece.size();
        }
        const std::uint64_t local = end_;
        Record header;
        header.put(zip_local);
        put_common(header, name, crc.value());
        header.put(std::uint16_t{20});  // bytes of the extra field
        header.put(name);
        header.put(std::uint16_t{1}, std::uint16_t{16}, size, size);
        write(header.bytes);
        for (const auto& piece : pieces) write(piece);

        central_.put(zip_central, version);
        put_common(central_, name, crc.value());
        central_.put(std::uint16_t{28}, std::uint16_t{0}, std::uint16_t{0}, std::uint16_t{0}, std::uint32_t{0},
                     zip_elsewhere_32);
        central_.put(name);
        central_.put(std::uint16_t{1}, std::uint16_t{24}, size, size, local);
        ++entries_;
    }

    void commit() {
        const std::uint64_t begin = end_, bytes = central_.bytes.size();
        write(central_.bytes);
        const std::uint64_t end_64 = end_;
        Record end;
        end.put(zip_end_64, std::uint64_t{zip_end_64_bytes - 12}, version, version, std::uint32_t{0}, std::uint32_t{0},
                entries_, entries_, bytes, begin);
        end.put(zip_locator_64, std::uint32_t{0}, end_64, std::uint32_t{1});
        const auto entries = static_cast<std::uint16_t>(std::min<std::uint64_t>(entries_, zip_elsewhere_16));
        end.put(zip_end, std::uint16_t{0}, std::uint16_t{0}, entries, entries, zip_elsewhere_32, zip_elsewhere_32,
                std::uint16_t{0});
        write(end.bytes);
        file_.commit();
    }

private:
    static constexpr std::uint16_t version = 45;  // knows sizes of 64 bits

    struct Record {
        std::vector<std::byte> bytes;
        template <typename... Numbers>
        requires(std::is_integral_v<Numbers>&&...) void put(Numbers... numbers) {
            (put_bytes(std::as_bytes(std::span(&numbers, 1))), ...);
        }
        void put(const std::string& text) { put_bytes(std::as_bytes(std::span(text))); }
        void put_bytes(std::span<const std::byte> more) { bytes.insert(bytes.end(), more.begin(), more.end()); }
    };

    /// What the two headers of an entry share: versions, flags, method, time, checksum, sizes, size of the name.
    static void put_common(Record& record, const std::string& name, std::uint32_t crc) {
        constexpr std::uint16_t utf8 = 0x800, stored = 0, midnight = 0, first_of_january_1980 = 0x21;
        record.put(version, utf8, stored, midnight, first_of_january_1980, crc, zip_elsewhere_32, zip_elsewhere_32,
                   static_cast<std::uint16_t>(name.size()));
    }
    void write(std::span<const std::byte> bytes) {
        file_.write_at(end_, bytes);
        end_ += bytes.size();
    }

    AtomicFile file_;
    Record central_;
    std::uint64_t end_ = 0, entries_ = 0;
};

}  // namespace colt5::detail
