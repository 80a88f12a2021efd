// From a block's hash to its place: chain and offset, 8 bytes a block and some air.
//
//   shard = the top 10 bits of the mixed hash, tag = the next 20, slot = tag | chain | offset
//
// A shard is an array sorted by tag, with gaps: an entry stands at its home or behind it, and no gap is
// between. So a lookup ends at the first larger tag, growing is one pass over the array that reads no
// chain, and erasing leaves no tombstone. A shard grows alone, 1/1024 of the table at a time, from 4/5 full
// to 16/25, and shrinks from 1/2 to 5/8: where what is held only changes, its size does not creep up.
//
// Hashes are mixed by a factor that each table draws for itself, so nobody outside can choose hashes that
// meet in one shard or behind one tag, and make look-ups long.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>

#include "index_arena.h"

namespace kvcache::index {

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;

constexpr int offset_bits = 18;
constexpr int chain_bits = 26;
constexpr int tag_bits = 64 - chain_bits - offset_bits;
constexpr u32 chain_blocks_max = (1u << offset_bits) - 1;
constexpr u32 chains_max = 1u << chain_bits;

// Chain 0 is nowhere, so that no place is the empty slot.
struct Place {
    u32 chain = 0;
    u32 offset = 0;
    explicit operator bool() const { return chain != 0; }
};

class Table {
public:
    Table(std::size_t& bytes, Arena& arena) : bytes_(bytes), arena_(arena), shards_(new Shard[shard_count]{}) {
        bytes_ += shard_count * sizeof(Shard);
    }
    Table(const Table&) = delete;
    Table& operator=(const Table&) = delete;

    void prefetch(u64 hash) const {
        const u64 mixed = mix(hash);
        const Shard& shard = shards_[mixed >> shard_shift];
        if (shard.slots != nullptr) __builtin_prefetch(shard.slots + home(shard, tag_of(mixed)));
    }

    // `same(place)` says whether the block there has this hash: a tag is only a part of it.
    template <typename Same>
    Place find(u64 hash, Same same) const {
        const u64 mixed = mix(hash);
        const Shard& shard = shards_[mixed >> shard_shift];
        if (shard.slots == nullptr) return {};
        const u64 tag = tag_of(mixed);
        for (const u64* at = shard.slots + home(shard, tag); *at != 0 && tag_in(*at) <= tag; ++at)
            if (tag_in(*at) == tag && same(place_in(*at))) return place_in(*at);
        return {};
    }

    // REQUIRES: the hash is not in the table.
    void insert(u64 hash, Place place) {
        const u64 mixed = mix(hash);
        Shard& shard = shards_[mixed >> shard_shift];
        if ((shard.used + 1) * 5ull > shard.homes * 4ull) resize(shard, shard.homes + shard.homes / 4 + 4);
        while (!put(shard, slot_of(tag_of(mixed), place))) resize(shard, shard.homes, shard.air * 2);
        ++shard.used;
    }

    // REQUIRES: the hash is in the table, at `from`.
    void move(u64 hash, Place from, Place to) {
        const u64 mixed = mix(hash);
        *at(shards_[mixed >> shard_shift], slot_of(tag_of(mixed), from)) = slot_of(tag_of(mixed), to);
    }

    // REQUIRES: the hash is in the table, at `from`.
    void erase(u64 hash, Place from) {
        const u64 mixed = mix(hash);
        Shard& shard = shards_[mixed >> shard_shift];
        u64* hole = at(shard, slot_of(tag_of(mixed), from));
        for (u64* next = hole + 1; *next != 0; ++next) {
            if (shard.slots + home(shard, tag_in(*next)) == next) break;
            *hole = *next;
            hole = next;
        }
        *hole = 0;
        --shard.used;
        if (shard.homes > 16 && shard.used * 2ull < shard.homes) resize(shard, shard.homes * 4 / 5);
    }

    u64 used() const {
        u64 count = 0;
        for (u32 i = 0; i < shard_count; ++i) count += shards_[i].used;
        return count;
    }

    // The most bytes that `count` inserts can add: each may make a shard of its own grow.
    std::size_t growth(std::size_t count) const {
        const std::size_t shards = count < shard_count ? count : shard_count;
        return shards * (largest_ * sizeof(u64) / 2 + 256) + count * 16;
    }

private:
    struct Shard {
        u64* slots = nullptr;  // `homes + air` of them; the last is always empty.
        u32 homes = 0;
        u32 air = 0;
        u32 used = 0;
    };

    static constexpr u32 shard_count = 1024;
    static constexpr int shard_shift = 54;

    u64 mix(u64 hash) const { return (hash ^ hash >> 31) * factor_; }
    static u64 drawn() {
        std::random_device random;
        return static_cast<u64>(random()) << 32 | random() | 1;
    }
    static u64 tag_of(u64 mixed) { return mixed >> (shard_shift - tag_bits) & ((1u << tag_bits) - 1); }
    static u64 tag_in(u64 slot) { return slot >> (chain_bits + offset_bits); }
    static u64 home(const Shard& shard, u64 tag) { return tag * shard.homes >> tag_bits; }
    static Place place_in(u64 slot) {
        return {static_cast<u32>(slot >> offset_bits) & (chains_max - 1),
                static_cast<u32>(slot) & ((1u << offset_bits) - 1)};
    }
    static u64 slot_of(u64 tag, Place place) {
        return tag << (chain_bits + offset_bits) | static_cast<u64>(place.chain) << offset_bits | place.offset;
    }
    static u64* at(Shard& shard, u64 slot) {
        u64* at = shard.slots + home(shard, tag_in(slot));
        while (*at != slot) ++at;
        return at;
    }

    // False when the array ends before a gap.
    static bool put(Shard& shard, u64 slot) {
        u64* at = shard.slots + home(shard, tag_in(slot));
        while (*at != 0 && tag_in(*at) <= tag_in(slot)) ++at;
        u64* gap = at;
        while (*gap != 0) ++gap;
        if (gap == shard.slots + shard.homes + shard.air - 1) return false;
        std::memmove(at + 1, at, static_cast<std::size_t>(gap - at) * sizeof *at);
        *at = slot;
        return true;
    }

    void resize(Shard& shard, u32 homes, u32 air = 4) {
        Shard grown{arena_.take<u64>(homes + air), homes, air, shard.used};
        std::memset(grown.slots, 0, (homes + air) * sizeof(u64));
        const u32 room = shard.homes + shard.air;
        u64* end = grown.slots;
        for (u32 i = 0; i < room; ++i) {
            if (shard.slots[i] == 0) continue;
            u64* first = grown.slots + home(grown, tag_in(shard.slots[i]));
            if (end < first) end = first;
            if (end >= grown.slots + homes + air - 1) {
                arena_.give(grown.slots);
                return resize(shard, homes, air * 2);
            }
            *end++ = shard.slots[i];
        }
        bytes_ += (homes + air) * sizeof(u64);
        bytes_ -= room * sizeof(u64);
        if (homes + air > largest_) largest_ = homes + air;
        arena_.give(shard.slots);
        shard = grown;
    }

    std::size_t& bytes_;
    Arena& arena_;
    std::unique_ptr<Shard[]> shards_;
    const u64 factor_ = drawn();
    std::size_t largest_ = 0;
};

}  // namespace kvcache::index
