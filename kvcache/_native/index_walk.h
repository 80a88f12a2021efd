// One question: for each worker's rank, how many leading blocks of a query does it hold, in the union of
// its tiers, and how many of these in each tier.
//
// The walk goes from chain to chain and from span to span, and does nothing while the holder set stays
// the same. Where it changes, only the bits that changed cost something. Most rows hold their blocks in the
// same tiers until they end, and then where they end says all; of the others (`odd`) a holder's count is the
// sum of the places where its bit went off, less those where it went on.

#pragma once

#include <algorithm>
#include <array>
#include <cstring>
#include <numeric>
#include <vector>

#include "index_runs.h"

namespace kvcache::index {

// A set of workers, for as long as a call takes.
class Chosen {
public:
    void assign(const u32* workers, u32 count) {
        std::size_t room = 8;
        while (room < 2 * static_cast<std::size_t>(count)) room *= 2;
        slots_.assign(room, 0);
        for (u32 i = 0; i < count; ++i) slots_[slot_of(workers[i])] = workers[i] + 1ull;
    }
    bool contains(u32 worker) const { return slots_[slot_of(worker)] != 0; }

private:
    // Its own, or the empty one where it would be.
    std::size_t slot_of(u32 worker) const {
        std::size_t at = worker * 0x9E3779B97F4A7C15 >> 32;
        while (slots_[at & (slots_.size() - 1)] != 0 && slots_[at & (slots_.size() - 1)] != worker + 1ull) ++at;
        return at & (slots_.size() - 1);
    }

    std::vector<u64> slots_;  // A worker and one; 0 is empty.
};

// What a question wants beside its blocks.
struct Wanted {
    u32 tiers = 0xF;                     // A mask of those that count.
    const Chosen* candidates = nullptr;  // Only these workers; null: all.
    u32 limit = 0xFFFFFFFF;              // At most so many answers.
};

constexpr u32 column_count = 3 + tier_count;  // Worker, rank, blocks, and the blocks in each tier.
using Columns = std::array<u32*, column_count>;

class Walk {
public:
    void start(const u64* query, u32 count, const Wanted& wanted);

    // Goes on for at most `steps` chains; false when there is more to go. REQUIRES: nobody wrote since `start`.
    bool advance(const Runs& runs, u32 steps);

    // How many answers, and they themselves. REQUIRES: `advance` returned true, and nobody wrote since.
    u32 answer_count() const { return std::min(first_rows_, wanted_.limit); }
    void answer(const Runs& runs, const Columns& columns);

private:
    struct Live {
        u32 at;          // Of the set's words.
        u64 first;       // The lowest bit of each row that held the first block.
        u64 first_bits;  // The holders then.
        u64 rows;        // Of `first`: those that held all so far.
        u64 bits;        // The holders, now.
        u64 odd;         // Of `first`: those whose tiers changed before they ended.
    };

    bool take(const Runs& runs, u32 set, u32 place);
    void begin(const Runs& runs, u32 set);
    bool change(const Sets& sets, u32 set, u32 place);
    void turn(u32 number, Live& live, u64 bits, u32 place);
    void end(u32 number, const Live& live, u64 rows, u32 place);
    void answer_all(const Runs& runs, const Columns& columns) const;
    void answer_tier(u32 tier, const u32* blocks, u32* column) const;
    void answer_odd_tier(u32 tier, const u32* blocks, u32* column) const;
    void answer_best(const Runs& runs, const Columns& columns);

    const u64* query_ = nullptr;
    u32 count_ = 0;
    Wanted wanted_;
    u32 place_ = 0;
    u32 set_ = 0;
    u32 live_rows_ = 0;
    u32 first_rows_ = 0;  // How many held the first block.
    bool any_odd_ = false;
    std::vector<Live> live_;
    std::vector<u32> ends_;    // By row of `live_`, once it has ended; in an answer all have.
    std::vector<u32> counts_;  // By holder of `live_`; of odd rows only.
    std::vector<u32> all_;     // Answers of which the best are wanted.
    std::vector<u32> order_;
};

constexpr u64 row_bits = 0x1111111111111111;

// The lowest bit of each row that has any.
inline u64 rows_of(u64 bits) { return (bits | bits >> 1 | bits >> 2 | bits >> 3) & row_bits; }

// How many rows, which have one bit each. Any processor does this quickly, but not all count bits.
inline u32 count_of(u64 rows) {
    const u64 pairs = (rows | rows >> 3) & 0x0303030303030303;
    return static_cast<u32>(((pairs & 0x0101010101010101) + (pairs >> 1 & 0x0101010101010101)) * 0x0101010101010101 >> 56);
}

// Those of the bits whose rows are of candidates.
inline u64 chosen_bits(const Runs& runs, const Chosen& candidates, u32 at, u64 bits) {
    for (u64 rows = rows_of(bits); rows != 0; rows &= rows - 1) {
        const u32 bit = static_cast<u32>(__builtin_ctzll(rows));
        if (!candidates.contains(runs.workers()[at * word_rows + bit / tier_count])) bits &= ~(0xFull << bit);
    }
    return bits;
}

inline void Walk::start(const u64* query, u32 count, const Wanted& wanted) {
    query_ = query;
    count_ = count;
    wanted_ = wanted;
    place_ = set_ = live_rows_ = first_rows_ = 0;
    any_odd_ = false;
    live_.clear();
    if (count > 0) __builtin_prefetch(query + count - 1);  // The first that is compared, as a rule.
}

inline bool Walk::advance(const Runs& runs, u32 steps) {
    for (; place_ < count_; --steps) {
        if (steps == 0) return false;
        const Place at = runs.find(query_[place_]);
        if (!at) return true;
        const Chain& chain = runs.chain(at.chain);
        const u32 left = count_ - place_;
        for (const u32 leaves : {chain.fork, chain.length})  // What is looked up next, as a rule.
            if (leaves > at.offset && leaves - at.offset < left) runs.prefetch(query_[place_ + leaves - at.offset]);
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
    const u64 mask = row_bits * (wanted_.tiers & 0xF);
    for (const Word* word = runs.sets().begin(set); word != runs.sets().end(set); ++word) {
        u64 bits = word->bits & mask & runs.serving()[word->at];
        if (wanted_.candidates != nullptr) bits = chosen_bits(runs, *wanted_.candidates, word->at, bits);
        if (bits == 0) continue;
        __builtin_prefetch(runs.workers().data() + word->at * word_rows);  // For the answer.
        __builtin_prefetch(runs.ranks().data() + word->at * word_rows);
        const u64 rows = rows_of(bits);
        live_.push_back({word->at, rows, bits, rows, bits, 0});
        live_rows_ += count_of(rows);
    }
    first_rows_ = live_rows_;
    if (ends_.size() < live_.size() * word_rows) ends_.resize(live_.size() * word_rows);
}

inline bool Walk::change(const Sets& sets, u32 set, u32 place) {
    const u64 mask = row_bits * (wanted_.tiers & 0xF);
    const Word* word = sets.begin(set);
    const Word* const last = sets.end(set);
    for (u32 i = 0; i < live_.size(); ++i) {
        Live& live = live_[i];
        if (live.rows == 0) continue;
        while (word != last && word->at < live.at) ++word;
        const u64 all = word != last && word->at == live.at ? word->bits : 0;
        const u64 bits = all & mask & live.rows * 0xF;
        if (bits != live.bits) turn(i, live, bits, place);
    }
    return live_rows_ > 0;
}

// From `place` on the holders are `bits`, and not what they were.
inline void Walk::turn(u32 number, Live& live, u64 bits, u32 place) {
    const u64 ended = live.rows & ~rows_of(bits);
    const u64 odd = rows_of(bits ^ live.bits) & ~(ended & ~live.odd);
    if (odd != 0) {
        if (!any_odd_) counts_.assign(live_.size() * 64, 0);
        any_odd_ = true;
        live.odd |= odd;
        for (u64 off = live.bits & ~bits & odd * 0xF; off != 0; off &= off - 1)
            counts_[number * 64 + static_cast<u32>(__builtin_ctzll(off))] += place;
        for (u64 on = bits & ~live.bits; on != 0; on &= on - 1)
            counts_[number * 64 + static_cast<u32>(__builtin_ctzll(on))] -= place;
    }
    live.bits = bits;
    live_rows_ -= count_of(ended);
    end(number, live, ended, place);
    live.rows ^= ended;
}

// These rows end at `place`.
inline void Walk::end(u32 number, const Live& live, u64 rows, u32 place) {
    u32* ends = ends_.data() + number * word_rows;
    if (rows == live.first) {  // All at once, as a rule.
        for (u32 i = 0; i < word_rows; ++i) ends[i] = place;
        return;
    }
    for (; rows != 0; rows &= rows - 1) ends[static_cast<u32>(__builtin_ctzll(rows)) / tier_count] = place;
}

inline void Walk::answer(const Runs& runs, const Columns& columns) {
    if (answer_count() == 0) return;
    for (u32 i = 0; i < live_.size(); ++i) end(i, live_[i], live_[i].rows, place_);
    if (first_rows_ <= wanted_.limit) {
        answer_all(runs, columns);
    } else {
        answer_best(runs, columns);
    }
}

inline void Walk::answer_all(const Runs& runs, const Columns& columns) const {
    u32 made = 0;
    for (u32 i = 0; i < live_.size(); ++i) {
        const Live& live = live_[i];
        const u32* workers = runs.workers().data() + live.at * word_rows;
        const u32* ranks = runs.ranks().data() + live.at * word_rows;
        const u32* ends = ends_.data() + i * word_rows;
        for (u64 rows = live.first; rows != 0; rows &= rows - 1, ++made) {
            const u32 bit = static_cast<u32>(__builtin_ctzll(rows));
            columns[0][made] = workers[bit / tier_count];
            columns[1][made] = ranks[bit / tier_count];
            columns[2][made] = ends[bit / tier_count];
        }
    }
    for (u32 tier = 0; tier < tier_count; ++tier) answer_tier(tier, columns[2], columns[3 + tier]);
}

inline void Walk::answer_tier(u32 tier, const u32* blocks, u32* column) const {
    u64 some = 0;
    u64 not_all = 0;
    for (const Live& live : live_) {
        some |= live.first_bits >> tier & row_bits;
        not_all |= (live.first_bits >> tier & row_bits) ^ live.first;
    }
    if (any_odd_ || (some != 0 && not_all != 0)) return answer_odd_tier(tier, blocks, column);
    if (some == 0) std::memset(column, 0, first_rows_ * sizeof *column);
    if (some != 0) std::memcpy(column, blocks, first_rows_ * sizeof *column);
}

inline void Walk::answer_odd_tier(u32 tier, const u32* blocks, u32* column) const {
    u32 made = 0;
    for (u32 i = 0; i < live_.size(); ++i) {
        const Live& live = live_[i];
        for (u64 rows = live.first; rows != 0; rows &= rows - 1, ++made) {
            const u32 bit = static_cast<u32>(__builtin_ctzll(rows));
            const bool odd = (live.odd >> bit & 1) != 0;
            const u64 bits = odd ? live.bits : live.first_bits;
            column[made] = (bits >> (bit + tier) & 1) != 0 ? blocks[made] : 0;
            if (odd) column[made] += counts_[i * 64 + bit + tier];
        }
    }
}

// The first `limit` by blocks, then by worker and rank.
inline void Walk::answer_best(const Runs& runs, const Columns& columns) {
    all_.resize(std::size_t{column_count} * first_rows_);
    Columns all;
    for (u32 i = 0; i < column_count; ++i) all[i] = all_.data() + std::size_t{i} * first_rows_;
    answer_all(runs, all);
    order_.resize(first_rows_);
    std::iota(order_.begin(), order_.end(), 0);
    const auto better = [&](u32 one, u32 other) {
        if (all[2][one] != all[2][other]) return all[2][one] > all[2][other];
        return all[0][one] != all[0][other] ? all[0][one] < all[0][other] : all[1][one] < all[1][other];
    };
    std::partial_sort(order_.begin(), order_.begin() + wanted_.limit, order_.end(), better);
    for (u32 i = 0; i < column_count; ++i)
        for (u32 at = 0; at < wanted_.limit; ++at) columns[i][at] = all[i][order_[at]];
}

}  // namespace kvcache::index
