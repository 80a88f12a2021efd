// Memory for the table and the chains in few large pieces, so that the system can map it by huge pages:
// without them a look-up in a large index waits as long for addresses as for data.
//
//   pool = header of a block | its bytes | header | bytes | ... | header of size 0
//
// Two-level segregated fit: free blocks are listed by size class (powers of two, each in `class_steps`
// parts); a block is split where it is too large and joined with free neighbours when it is given back;
// both take constant time. Pools that are free altogether go back to the system. Nothing here locks.

#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <new>
#include <vector>

namespace kvcache::index {

class Arena {
public:
    Arena() = default;
    ~Arena() {
        for (const Pool& pool : pools_) munmap(pool.start, pool.bytes);
    }
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;

    // Of `Item`s that are not made yet. REQUIRES: alignment of at most `header_bytes`.
    template <typename Item>
    Item* take(std::size_t count) {
        return reinterpret_cast<Item*>(bytes_of(taken(count * sizeof(Item))));
    }

    void give(void* taken) {
        if (taken == nullptr) return;
        Block* block = reinterpret_cast<Block*>(static_cast<char*>(taken) - header_bytes);
        used_ -= size_of(block) + header_bytes;
        set_free(block, true);
        Block* next = next_of(block);
        if (is_free(next)) {
            unlist(next);
            grow(block, next);
        }
        if (Block* before = block->before; before != nullptr && is_free(before)) {
            unlist(before);
            grow(before, block);
            block = before;
        }
        list(block);
        if (whole(block) && used_ < held_ / 2) drop_pools();
    }

private:
    static constexpr std::size_t header_bytes = 16;
    static constexpr std::size_t block_bytes_min = 32;  // A free one has its links inside.
    static constexpr std::size_t huge_bytes = 2u << 20;
    static constexpr std::size_t pool_bytes_min = 64u << 10;
    static constexpr std::size_t pool_bytes_max = 32u << 20;
    static constexpr unsigned class_bits = 4;
    static constexpr unsigned class_steps = 1u << class_bits;
    static constexpr unsigned classes = 48;

    struct Block {
        Block* before;     // The one in front of it in memory; null for a pool's first.
        std::size_t size;  // Of its bytes; the lowest bit says that it is free.
        Block* next;       // Of its class; free ones only.
        Block* last;
    };
    struct Pool {
        char* start;
        std::size_t bytes;
    };

    static std::size_t size_of(const Block* block) { return block->size & ~std::size_t{1}; }
    static bool is_free(const Block* block) { return (block->size & 1) != 0; }
    static void set_free(Block* block, bool free) { block->size = size_of(block) | (free ? 1 : 0); }
    static bool whole(const Block* block) {
        return block->before == nullptr && is_free(block) && size_of(next_of(block)) == 0;
    }
    static char* bytes_of(Block* block) { return reinterpret_cast<char*>(block) + header_bytes; }
    static Block* next_of(const Block* block) {
        return reinterpret_cast<Block*>(bytes_of(const_cast<Block*>(block)) + size_of(block));
    }

    static void grow(Block* block, const Block* next) {
        block->size += header_bytes + size_of(next);
        next_of(block)->before = block;
    }

    // Where free blocks of this size are listed.
    static unsigned class_of(std::size_t size) {
        const unsigned power = 63u - static_cast<unsigned>(__builtin_clzll(size));
        return (power << class_bits) + static_cast<unsigned>(size >> (power - class_bits) & (class_steps - 1));
    }

    void list(Block* block) {
        const unsigned at = class_of(size_of(block));
        block->next = heads_[at];
        block->last = nullptr;
        if (block->next != nullptr) block->next->last = block;
        heads_[at] = block;
        full_[at / 64] |= 1ull << at % 64;
    }

    void unlist(Block* block) {
        const unsigned at = class_of(size_of(block));
        if (block->next != nullptr) block->next->last = block->last;
        if (block->last != nullptr) block->last->next = block->next;
        if (block->last == nullptr) heads_[at] = block->next;
        if (heads_[at] == nullptr) full_[at / 64] &= ~(1ull << at % 64);
    }

    // The first block of a class all of whose blocks are large enough.
    Block* found(std::size_t size) {
        const std::size_t step = std::size_t{1} << (63u - static_cast<unsigned>(__builtin_clzll(size)) - class_bits);
        const unsigned first = class_of(size + step - 1);
        for (unsigned at = first / 64; at < std::size(full_); ++at) {
            const std::uint64_t bits = full_[at] & (at == first / 64 ? ~0ull << first % 64 : ~0ull);
            if (bits != 0) return heads_[at * 64 + static_cast<unsigned>(__builtin_ctzll(bits))];
        }
        return nullptr;
    }

    Block* taken(std::size_t bytes) {
        const std::size_t size = std::max(block_bytes_min, (bytes + header_bytes - 1) / header_bytes * header_bytes);
        Block* block = found(size);
        if (block != nullptr) {
            unlist(block);
        } else {
            block = new_pool(size);
        }
        if (size_of(block) >= size + header_bytes + block_bytes_min) split(block, size);
        set_free(block, false);
        used_ += size_of(block) + header_bytes;
        return block;
    }

    void split(Block* block, std::size_t size) {
        const std::size_t rest = size_of(block) - size - header_bytes;
        block->size = size;
        Block* made = next_of(block);
        made->before = block;
        made->size = rest | 1;
        next_of(made)->before = made;
        list(made);
    }

    // One free block that nothing lists, as large as the pool: a quarter of all before, so that little is idle.
    Block* new_pool(std::size_t size) {
        std::size_t bytes = std::clamp(held_ / 4, pool_bytes_min, pool_bytes_max);
        bytes = std::max(bytes, size + 3 * header_bytes);
        const std::size_t step = bytes < huge_bytes / 2 ? pool_bytes_min : huge_bytes;
        bytes = (bytes + step - 1) / step * step;
        char* start = mapped(bytes, step);
        pools_.push_back({start, bytes});
        held_ += bytes;
        auto* block = reinterpret_cast<Block*>(start);
        block->before = nullptr;
        block->size = (bytes - 2 * header_bytes) | 1;
        next_of(block)->before = block;
        next_of(block)->size = 0;
        return block;
    }

    static char* mapped(std::size_t bytes, std::size_t alignment) {
        void* got = mmap(nullptr, bytes + alignment, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (got == MAP_FAILED) throw std::bad_alloc();
        char* start = static_cast<char*>(got);
        const std::size_t before = -reinterpret_cast<std::uintptr_t>(start) & (alignment - 1);
        if (before > 0) munmap(start, before);
        if (alignment > before) munmap(start + before + bytes, alignment - before);
        start += before;
#ifdef MADV_HUGEPAGE
        if (alignment == huge_bytes) madvise(start, bytes, MADV_HUGEPAGE);  // A wish: what it says is no matter.
#endif
        return start;
    }

    // Gives back pools that are free, until half of what is held is used.
    void drop_pools() {
        for (std::size_t i = pools_.size(); i-- > 0 && used_ < held_ / 2;) {
            auto* block = reinterpret_cast<Block*>(pools_[i].start);
            if (!whole(block)) continue;
            unlist(block);
            munmap(pools_[i].start, pools_[i].bytes);
            held_ -= pools_[i].bytes;
            pools_.erase(pools_.begin() + static_cast<std::ptrdiff_t>(i));
        }
    }

    std::vector<Pool> pools_;
    std::size_t held_ = 0;  // In pools.
    std::size_t used_ = 0;  // With headers.
    Block* heads_[classes * class_steps] = {};
    std::uint64_t full_[classes * class_steps / 64] = {};  // Whether a head is there.
};

}  // namespace kvcache::index
