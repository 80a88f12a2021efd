// XXH3-64 with seed 0 and the default secret, written from its public specification.
//
// Inputs of up to 240 bytes are summed here at once. Longer ones are 64-byte stripes gathered into
// eight accumulators; copy.cpp does that while it copies, and `finish_long` ends it here.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if !defined(__SIZEOF_INT128__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "needs a 64-bit little-endian machine; the pure-Python twin serves others"
#endif

namespace kvcache::xxh3 {

using u8 = std::uint8_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;

constexpr std::size_t short_bytes_max = 240;
constexpr std::size_t stripe_bytes = 64;
constexpr std::size_t block_stripes = 16;
constexpr std::size_t lane_count = 8;
constexpr std::size_t scramble_offset = 128;
constexpr std::size_t last_offset = 121;

constexpr u64 prime32_1 = 0x9E3779B1, prime32_2 = 0x85EBCA77, prime32_3 = 0xC2B2AE3D;
constexpr u64 prime64_1 = 0x9E3779B185EBCA87, prime64_2 = 0xC2B2AE3D27D4EB4F;
constexpr u64 prime64_3 = 0x165667B19E3779F9, prime64_4 = 0x85EBCA77C2B2AE63;
constexpr u64 prime64_5 = 0x27D4EB2F165667C5;
constexpr u64 prime_mx1 = 0x165667919E3779F9, prime_mx2 = 0x9FB21C651E98DF25;

alignas(64) constexpr u8 secret[192] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

constexpr u64 first_lanes[lane_count] = {prime32_3, prime64_1, prime64_2, prime64_3,
                                         prime64_4, prime32_2, prime64_5, prime32_1};

inline u32 read32(const u8* at) {
    u32 value;
    std::memcpy(&value, at, sizeof value);
    return value;
}

inline u64 read64(const u8* at) {
    u64 value;
    std::memcpy(&value, at, sizeof value);
    return value;
}

inline u64 rotate_left(u64 value, int bits) { return value << bits | value >> (64 - bits); }

inline u64 fold_product(u64 left, u64 right) {
    const auto product = static_cast<unsigned __int128>(left) * right;
    return static_cast<u64>(product) ^ static_cast<u64>(product >> 64);
}

inline u64 avalanche(u64 hash) {
    hash = (hash ^ hash >> 37) * prime_mx1;
    return hash ^ hash >> 32;
}

inline u64 avalanche_64(u64 hash) {
    hash = (hash ^ hash >> 33) * prime64_2;
    hash = (hash ^ hash >> 29) * prime64_3;
    return hash ^ hash >> 32;
}

inline u64 mix16(const u8* at, std::size_t key) {
    return fold_product(read64(at) ^ read64(secret + key), read64(at + 8) ^ read64(secret + key + 8));
}

inline u64 sum_to_16(const u8* at, std::size_t bytes) {
    if (bytes > 8) {
        const u64 low = read64(at) ^ read64(secret + 24) ^ read64(secret + 32);
        const u64 high = read64(at + bytes - 8) ^ read64(secret + 40) ^ read64(secret + 48);
        return avalanche(bytes + __builtin_bswap64(low) + high + fold_product(low, high));
    }
    if (bytes >= 4) {
        u64 hash = read32(at + bytes - 4) + (static_cast<u64>(read32(at)) << 32);
        hash ^= read64(secret + 8) ^ read64(secret + 16);
        hash ^= rotate_left(hash, 49) ^ rotate_left(hash, 24);
        hash *= prime_mx2;
        hash = (hash ^ ((hash >> 35) + bytes)) * prime_mx2;
        return hash ^ hash >> 28;
    }
    if (bytes > 0) {
        const u32 joined = static_cast<u32>(at[0]) << 16 | static_cast<u32>(at[bytes >> 1]) << 24 |
                           static_cast<u32>(at[bytes - 1]) | static_cast<u32>(bytes) << 8;
        return avalanche_64(joined ^ read32(secret) ^ read32(secret + 4));
    }
    return avalanche_64(read64(secret + 56) ^ read64(secret + 64));
}

inline u64 sum_to_128(const u8* at, std::size_t bytes) {
    u64 hash = bytes * prime64_1;
    for (std::size_t pair = (bytes - 1) / 32 + 1; pair-- > 0;)
        hash += mix16(at + 16 * pair, 32 * pair) + mix16(at + bytes - 16 * (pair + 1), 32 * pair + 16);
    return avalanche(hash);
}

inline u64 sum_to_240(const u8* at, std::size_t bytes) {
    u64 hash = bytes * prime64_1;
    for (std::size_t i = 0; i < 8; ++i) hash += mix16(at + 16 * i, 16 * i);
    hash = avalanche(hash);
    for (std::size_t i = 8; i < bytes / 16; ++i) hash += mix16(at + 16 * i, 16 * (i - 8) + 3);
    return avalanche(hash + mix16(at + bytes - 16, 136 - 17));
}

// REQUIRES: bytes <= short_bytes_max.
inline u64 sum_short(const u8* at, std::size_t bytes) {
    if (bytes <= 16) return sum_to_16(at, bytes);
    return bytes <= 128 ? sum_to_128(at, bytes) : sum_to_240(at, bytes);
}

inline u64 finish_long(const u64* lanes, std::size_t bytes) {
    u64 hash = bytes * prime64_1;
    for (std::size_t i = 0; i < lane_count; i += 2) {
        const u8* key = secret + 11 + 8 * i;
        hash += fold_product(lanes[i] ^ read64(key), lanes[i + 1] ^ read64(key + 8));
    }
    return avalanche(hash);
}

}  // namespace kvcache::xxh3
