// Holder sets, each content kept once: a span of blocks names its set by a number, and two spans have
// the same holders exactly when they have the same number.
//
// A holder is 4 * row + tier, a row one generation of one worker's rank. A set is a bitset without its
// empty words: 16 rows with their 4 tiers share a word, so a set of one holder is one word and a set of a
// thousand rows 64. Set 0 is the empty one.

#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include "index_table.h"

namespace kvcache::index {

constexpr u32 tier_count = 4;
constexpr u32 word_rows = 64 / tier_count;
constexpr u32 words_inside = 7;

struct Word {
    u64 bits;
    u32 at;  // Holders 64 * at and on.
};

class Sets {
public:
    explicit Sets(std::size_t& bytes) : bytes_(bytes), sets_(1), heads_(64, 0) {}
    ~Sets() {
        for (Set& set : sets_) clear(set);
    }
    Sets(const Sets&) = delete;
    Sets& operator=(const Sets&) = delete;

    const Word* begin(u32 set) const { return words_of(sets_[set]); }
    const Word* end(u32 set) const { return begin(set) + sets_[set].count; }

    void prefetch(u32 set) const { __builtin_prefetch(&sets_[set]); }

    bool contains(u32 set, u32 holder) const {
        const Word* word = lower_bound(set, holder / 64);
        return word != end(set) && word->at == holder / 64 && (word->bits >> holder % 64 & 1) != 0;
    }

    // The set with the holder, or without. Nobody refers to a new one yet: see `keep`.
    u32 with(u32 set, u32 holder, bool held) {
        if (contains(set, holder) == held) return set;
        const Word* place = lower_bound(set, holder / 64);
        scratch_.assign(begin(set), place);
        const u64 bit = 1ull << holder % 64;
        if (place != end(set) && place->at == holder / 64) {
            if ((place->bits ^ bit) != 0) scratch_.push_back({place->bits ^ bit, place->at});
            ++place;
        } else {
            scratch_.push_back({bit, holder / 64});
        }
        scratch_.insert(scratch_.end(), place, end(set));
        return scratch_.empty() ? 0 : interned();
    }

    void keep(u32 set) {
        if (set != 0) ++sets_[set].references;
    }

    void release(u32 set) {
        if (set != 0 && --sets_[set].references == 0) forget(set);
    }

    std::size_t count() const { return sets_.size() - 1 - free_.size(); }
    std::size_t words_max() const { return words_max_; }
    u32 references(u32 set) const { return sets_[set].references; }
    std::size_t size() const { return sets_.size(); }

private:
    // Two cache lines, and one for a set of three words: it is read without another miss.
    struct alignas(64) Set {
        u32 count = 0;
        u32 references = 0;
        u32 next = 0;  // In the same bucket.
        u32 sum = 0;
        union {
            Word few[words_inside];
            Word* many;
        } words{};
    };

    static const Word* words_of(const Set& set) { return set.count <= words_inside ? set.words.few : set.words.many; }
    static void clear(Set& set) {
        if (set.count > words_inside) delete[] set.words.many;
        set = Set{};
    }

    const Word* lower_bound(u32 set, u32 at) const {
        const Word* word = begin(set);
        u32 left = sets_[set].count;
        while (left > 0) {
            const u32 half = left / 2;
            if (word[half].at < at) {
                word += half + 1;
                left -= half + 1;
            } else {
                left = half;
            }
        }
        return word;
    }

    u32 interned() {
        u64 hash = scratch_.size();
        for (const Word& word : scratch_) {
            hash = (hash ^ word.bits) * 0x9E3779B97F4A7C15;
            hash = (hash ^ hash >> 32 ^ word.at) * 0xD6E8FEB86659FD93;
        }
        const u32 sum = static_cast<u32>(hash >> 32);
        for (u32 set = heads_[sum & (heads_.size() - 1)]; set != 0; set = sets_[set].next)
            if (sets_[set].sum == sum && same(sets_[set])) return set;
        return made(sum);
    }

    bool same(const Set& set) const {
        if (set.count != scratch_.size()) return false;
        const Word* words = words_of(set);
        for (u32 i = 0; i < set.count; ++i)
            if (words[i].bits != scratch_[i].bits || words[i].at != scratch_[i].at) return false;
        return true;
    }

    u32 made(u32 sum) {
        if (free_.empty()) {
            free_.push_back(static_cast<u32>(sets_.size()));
            sets_.emplace_back();
        }
        const u32 set = free_.back();
        free_.pop_back();
        Set& made = sets_[set];
        made.count = static_cast<u32>(scratch_.size());
        const bool outside = made.count > words_inside;
        if (outside) made.words.many = new Word[made.count];
        std::copy(scratch_.begin(), scratch_.end(), outside ? made.words.many : made.words.few);
        made.sum = sum;
        if (made.count > words_max_) words_max_ = made.count;
        bytes_ += bytes_of(made);
        if (count() > heads_.size()) rebuild();
        u32& head = heads_[sum & (heads_.size() - 1)];
        made.next = head;
        head = set;
        return set;
    }

    void rebuild() {
        std::vector<u32> heads(heads_.size() * 2, 0);
        for (const u32 first : heads_)
            for (u32 set = first; set != 0;) {
                const u32 next = sets_[set].next;
                u32& head = heads[sets_[set].sum & (heads.size() - 1)];
                sets_[set].next = head;
                head = set;
                set = next;
            }
        heads_.swap(heads);
    }

    void forget(u32 set) {
        u32* link = &heads_[sets_[set].sum & (heads_.size() - 1)];
        while (*link != set) link = &sets_[*link].next;
        *link = sets_[set].next;
        bytes_ -= bytes_of(sets_[set]);
        clear(sets_[set]);
        free_.push_back(set);
    }

    // With its bucket, its place in `free_` and what the allocator takes.
    static std::size_t bytes_of(const Set& set) {
        return sizeof(Set) + 24 + (set.count > words_inside ? set.count * sizeof(Word) + 16 : 0);
    }

    std::size_t& bytes_;
    std::vector<Set> sets_;
    std::vector<u32> heads_;  // By sum, a power of two of them.
    std::vector<u32> free_;
    std::vector<Word> scratch_;
    std::size_t words_max_ = 0;
};

}  // namespace kvcache::index
