// One question: for each worker's rank, how many leading blocks of a query does it hold, in the union of
// its tiers, and how many of these in each tier.
//
// The walk goes from chain to chain and from span to span, and does nothing while the holder set stays
// the same. Where it changes, only the bits that changed cost something: a holder's count is the sum of
// the places where its bit went off, less those where it went on; a row ends where all its tiers are off.

#pragma once

#include <algorithm>
#include <vector>

#include "index_runs.h"

namespace kvcache::index {

struct Answer {
    u32 worker;
    u32 rank;
    u32 blocks;
    u32 tiers[tier_count];
};

// A set of workers, for as long as a call takes.
class Chosen {
public:
    void assign(const u32* workers, u32 count) {
        std::size_t room = 8;
        while (room < 2 * static_cast<std::size_t>(count)) room *= 2;
        slots_.assign(room, 0);
        for (u32 i = 0; i < count; ++i) *slot_of(workers[i]) = workers[i] + 1ull;
    }
    bool contains(u32 worker) const { return *slot_of(worker) != 0; }

private:
    // Its own, or the empty one where it would be.
    const u64* slot_of(u32 worker) const {
        std::size_t at = worker * 0x9E3779B97F4A7C15 >> 32;
        for (;; ++at) {
            const u64& slot = slots_[at & (slots_.size() - 1)];
            if (slot == 0 || slot == worker + 1ull) return &slot;
        }
    }
    u64* slot_of(u32 worker) { return const_cast<u64*>(static_cast<const Chosen*>(this)->slot_of(worker)); }

    std::vector<u64> slots_;  // A worker and one; 0 is empty.
};

// What a question wants beside its blocks.
struct Wanted {
    u32 tiers;                 // A mask of those that count.
    const Chosen* candidates;  // Only these workers; null: all.
    u32 limit;                 // At most so many answers.
};

class Walk {
public:
    void start(const u64* query, u32 count, const Wanted& wanted);

    // Goes on for at most `steps` chains; false when there is more to go. REQUIRES: nobody wrote since `start`.
    bool advance(const Runs& runs, u32 steps);

    // REQUIRES: `advance` returned true.
    void answer(const Runs& runs, std::vector<Answer>& answers) const;

private:
    static u64 chosen(const Runs& runs, const Chosen& candidates, u32 at, u64 bits);
    static bool better(const Answer& one, const Answer& other);
    struct Live {
        u32 at;     // Of the set's words.
        u64 first;  // The lowest bit of each row that held the first block.
        u64 rows;   // The same of those that held all so far.
        u64 bits;   // The holders, now.
    };

    bool take(const Runs& runs, u32 set, u32 place);
    void begin(const Runs& runs, u32 set);
    bool change(const Sets& sets, u32 set, u32 place);

    const u64* query_ = nullptr;
    u32 count_ = 0;
    u32 place_ = 0;
    u32 set_ = 0;
    u32 live_rows_ = 0;
    u32 first_rows_ = 0;  // How many held the first block.
    u64 mask_ = 0;
    const Chosen* candidates_ = nullptr;
    u32 limit_ = 0;
    std::vector<Live> live_;
    std::vector<u32> ends_;    // By row of `live_`, once it has ended.
    std::vector<u32> counts_;  // By holder of `live_`.
};

constexpr u64 row_bits = 0x1111111111111111;

// The lowest bit of each row that has any.
inline u64 rows_of(u64 bits) { return (bits | bits >> 1 | bits >> 2 | bits >> 3) & row_bits; }

inline void Walk::start(const u64* query, u32 count, const Wanted& wanted) {
    query_ = query;
    count_ = count;
    place_ = set_ = live_rows_ = first_rows_ = 0;
    mask_ = row_bits * (wanted.tiers & 0xF);
    candidates_ = wanted.candidates;
    limit_ = wanted.limit;
    live_.clear();
    if (count > 0) __builtin_prefetch(query + count - 1);  // The first that is compared, as a rule.
}

inline bool Walk::advance(const Runs& runs, u32 steps) {
    for (; place_ < count_; --steps) {
        if (steps == 0) return false;
        const Place at = runs.find(query_[place_]);
        if (!at) return true;
        const Chain& chain = runs.chain(at.chain);
        const u32 end = at.offset + equal_run(chain, at.offset, query_ + place_, count_ - place_);
        const Span* span = chain.begin();
        if (chain.span_count > 1)
            span = std::upper_bound(span, chain.end(), at.offset,
                                    [](u32 offset, const Span& each) { return offset < each.end; });
        for (u32 from = at.offset; from < end; ++span) {
            if (!take(runs, span->set, place_)) return true;
            const u32 to = std::min(span->end, end);
            place_ += to - from;
            from = to;
        }
    }
    return true;
}

// From `place` on this set holds the blocks. False when no row goes on.
inline bool Walk::take(const Runs& runs, u32 set, u32 place) {
    if (place > 0 && set == set_) return true;
    set_ = set;
    if (place > 0) return change(runs.sets(), set, place);
    begin(runs, set);
    return live_rows_ > 0;
}

inline void Walk::begin(const Runs& runs, u32 set) {
    for (const Word* word = runs.sets().begin(set); word != runs.sets().end(set); ++word) {
        u64 bits = word->bits & mask_ & runs.serving()[word->at];
        if (candidates_ != nullptr) bits = chosen(runs, *candidates_, word->at, bits);
        if (bits == 0) continue;
        live_.push_back({word->at, rows_of(bits), rows_of(bits), bits});
        live_rows_ += static_cast<u32>(__builtin_popcountll(rows_of(bits)));
    }
    first_rows_ = live_rows_;
    ends_.resize(live_.size() * word_rows);
    counts_.assign(live_.size() * 64, 0);
}

// Those of the bits whose rows are of candidates.
inline u64 Walk::chosen(const Runs& runs, const Chosen& candidates, u32 at, u64 bits) {
    for (u64 rows = rows_of(bits); rows != 0; rows &= rows - 1) {
        const u32 bit = static_cast<u32>(__builtin_ctzll(rows));
        if (!candidates.contains(runs.names()[at * word_rows + bit / tier_count].worker)) bits &= ~(0xFull << bit);
    }
    return bits;
}

inline bool Walk::change(const Sets& sets, u32 set, u32 place) {
    const Word* word = sets.begin(set);
    const Word* const last = sets.end(set);
    for (std::size_t i = 0; i < live_.size(); ++i) {
        Live& live = live_[i];
        if (live.rows == 0) continue;
        while (word != last && word->at < live.at) ++word;
        const u64 all = word != last && word->at == live.at ? word->bits : 0;
        const u64 bits = all & mask_ & live.rows * 0xF;
        const u64 changed = bits ^ live.bits;
        if (changed == 0) continue;
        for (u64 off = changed & live.bits; off != 0; off &= off - 1)
            counts_[i * 64 + static_cast<u32>(__builtin_ctzll(off))] += place;
        for (u64 on = changed & bits; on != 0; on &= on - 1)
            counts_[i * 64 + static_cast<u32>(__builtin_ctzll(on))] -= place;
        u64 ended = live.rows & ~rows_of(bits);
        live.rows ^= ended;
        live.bits = bits;
        for (; ended != 0; ended &= ended - 1, --live_rows_)
            ends_[i * word_rows + static_cast<u32>(__builtin_ctzll(ended)) / tier_count] = place;
    }
    return live_rows_ > 0;
}

inline void Walk::answer(const Runs& runs, std::vector<Answer>& answers) const {
    std::size_t made_count = answers.size();
    answers.resize(made_count + first_rows_);
    for (std::size_t i = 0; i < live_.size(); ++i) {
        const Live& live = live_[i];
        for (u64 rows = live.first; rows != 0; rows &= rows - 1) {
            const u32 bit = static_cast<u32>(__builtin_ctzll(rows));
            const Name& name = runs.names()[live.at * word_rows + bit / tier_count];
            const bool whole = (live.rows >> bit & 1) != 0;
            Answer& made = answers[made_count++];
            made.worker = name.worker;
            made.rank = name.rank;
            made.blocks = whole ? place_ : ends_[i * word_rows + bit / tier_count];
            for (u32 tier = 0; tier < tier_count; ++tier)
                made.tiers[tier] =
                    counts_[i * 64 + bit + tier] + ((live.bits >> (bit + tier) & 1) != 0 ? place_ : 0);
        }
    }
    if (first_rows_ <= limit_) return;
    const auto first = answers.end() - first_rows_;
    std::partial_sort(first, first + limit_, answers.end(), better);
    answers.erase(first + limit_, answers.end());
}

inline bool Walk::better(const Answer& one, const Answer& other) {
    if (one.blocks != other.blocks) return one.blocks > other.blocks;
    return one.worker != other.worker ? one.worker < other.worker : one.rank < other.rank;
}

}  // namespace kvcache::index
