// Naming the blocks of a prompt for an index: each block's tokens summed by XXH3-64, seeded with the name of
// the block before. One pass names a block and everything before it.
//
// Written from the public specification, like xxh3.h, which has no seed.

#pragma once

#include "xxh3.h"

namespace kvcache::index {

using xxh3::fold_product;
using xxh3::read32;
using xxh3::read64;
using xxh3::u64;
using xxh3::u8;

inline u64 seeded_mix16(const u8* at, std::size_t key, u64 seed) {
    return fold_product(read64(at) ^ (read64(xxh3::secret + key) + seed),
                        read64(at + 8) ^ (read64(xxh3::secret + key + 8) - seed));
}

inline u64 seeded_to_16(const u8* at, std::size_t bytes, u64 seed) {
    using namespace xxh3;
    if (bytes > 8) {
        const u64 low = read64(at) ^ ((read64(secret + 24) ^ read64(secret + 32)) + seed);
        const u64 high = read64(at + bytes - 8) ^ ((read64(secret + 40) ^ read64(secret + 48)) - seed);
        return avalanche(bytes + __builtin_bswap64(low) + high + fold_product(low, high));
    }
    seed ^= static_cast<u64>(__builtin_bswap32(static_cast<u32>(seed))) << 32;
    u64 hash = read32(at + bytes - 4) + (static_cast<u64>(read32(at)) << 32);
    hash ^= (read64(secret + 8) ^ read64(secret + 16)) - seed;
    hash ^= rotate_left(hash, 49) ^ rotate_left(hash, 24);
    hash *= prime_mx2;
    hash = (hash ^ ((hash >> 35) + bytes)) * prime_mx2;
    return hash ^ hash >> 28;
}

inline u64 seeded_to_240(const u8* at, std::size_t bytes, u64 seed) {
    using namespace xxh3;
    u64 hash = bytes * prime64_1;
    if (bytes <= 128) {
        for (std::size_t pair = (bytes - 1) / 32 + 1; pair-- > 0;)
            hash += seeded_mix16(at + 16 * pair, 32 * pair, seed) +
                    seeded_mix16(at + bytes - 16 * (pair + 1), 32 * pair + 16, seed);
        return avalanche(hash);
    }
    for (std::size_t i = 0; i < 8; ++i) hash += seeded_mix16(at + 16 * i, 16 * i, seed);
    hash = avalanche(hash);
    for (std::size_t i = 8; i < bytes / 16; ++i) hash += seeded_mix16(at + 16 * i, 16 * (i - 8) + 3, seed);
    return avalanche(hash + seeded_mix16(at + bytes - 16, 136 - 17, seed));
}

inline void add_stripe(u64* lanes, const u8* at, const u8* key) {
    for (std::size_t lane = 0; lane < xxh3::lane_count; ++lane) {
        const u64 value = read64(at + 8 * lane);
        const u64 keyed = value ^ read64(key + 8 * lane);
        lanes[lane ^ 1] += value;
        lanes[lane] += (keyed & 0xFFFFFFFF) * (keyed >> 32);
    }
}

inline u64 seeded_long(const u8* at, std::size_t bytes, u64 seed) {
    using namespace xxh3;
    u8 key[sizeof secret];
    for (std::size_t i = 0; i < sizeof secret; i += 16) {
        const u64 pair[2] = {read64(secret + i) + seed, read64(secret + i + 8) - seed};
        std::memcpy(key + i, pair, sizeof pair);
    }
    u64 lanes[lane_count];
    std::memcpy(lanes, first_lanes, sizeof lanes);
    const std::size_t stripes = (bytes - 1) / stripe_bytes;
    for (std::size_t i = 0; i < stripes; ++i) {
        add_stripe(lanes, at + stripe_bytes * i, key + 8 * (i % block_stripes));
        if (i % block_stripes != block_stripes - 1) continue;
        for (std::size_t lane = 0; lane < lane_count; ++lane)
            lanes[lane] = (lanes[lane] ^ lanes[lane] >> 47 ^ read64(key + scramble_offset + 8 * lane)) * prime32_1;
    }
    add_stripe(lanes, at + bytes - stripe_bytes, key + last_offset);
    u64 hash = bytes * prime64_1;
    for (std::size_t i = 0; i < lane_count; i += 2)
        hash += fold_product(lanes[i] ^ read64(key + 11 + 8 * i), lanes[i + 1] ^ read64(key + 19 + 8 * i));
    return avalanche(hash);
}

// REQUIRES: at least 4 bytes.
inline u64 seeded_sum(const u8* at, std::size_t bytes, u64 seed) {
    if (bytes <= 16) return seeded_to_16(at, bytes, seed);
    return bytes <= xxh3::short_bytes_max ? seeded_to_240(at, bytes, seed) : seeded_long(at, bytes, seed);
}

}  // namespace kvcache::index
