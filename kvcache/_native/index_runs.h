// Who holds which leading blocks: run-compressed chains over interned holder sets.
//
//   chain = the hashes of blocks that follow one another + spans (end, holder set) that cover it
//   table: hash -> (chain, offset), one entry a block
//
// A hash names all blocks before it, so a chain is accepted whole by comparing its last hash with the
// query's, and where they differ the last equal one is searched for. No parent is looked up: a child
// told before its parent, a hole and its refill are only spans.
//
// A block that nobody holds any more is a ghost: cut off where the chain ends, kept inside it until more
// than half of the chain is ghosts, and then the chain is split into what is alive. So ghosts are never
// more than the blocks held.
//
// A change for which there is no memory in the middle is not undone: from then on every call throws.
//
// Nothing here locks. The caller lets many read or one write.

#pragma once

#include <cstddef>
#include <exception>
#include <new>
#include <unordered_map>
#include <vector>

#include "index_sets.h"
#include "index_table.h"

namespace kvcache::index {

constexpr u32 run_blocks_max = 16384;  // As `kvcache.index.RUN_BLOCKS_MAX`.

struct Span {
    u32 end;
    u32 set;
};

constexpr u32 spans_inside = 2;

// One cache line: a chain is accepted whole without looking at its hashes.
struct alignas(64) Chain {
    u64* hashes = nullptr;
    u64 first = 0;  // Of its hashes.
    u64 last = 0;
    u32 length = 0;  // 0: the number is free.
    u32 room = 0;
    union {
        Span few[spans_inside];
        Span* many;
    } spans{};
    u32 span_count = 0;
    u32 ghosts : 31;
    u32 linked : 1;  // Its blocks follow one another; else each has to be compared.
    u32 fork = 0;    // Where a prefix that was told last leaves it; 0: none does.

    const Span* begin() const { return span_count <= spans_inside ? spans.few : spans.many; }
    const Span* end() const { return begin() + span_count; }
};

// Of what one tier of one row holds; the sums are of hashes.
struct Digest {
    u64 count = 0;
    u64 joined_xor = 0;
    u64 sum = 0;
};

enum class State : u8 { free, shadow, serving };

struct Row {
    u32 generation = 0;
    State state = State::free;
    Digest digests[tier_count];
    std::vector<u32> chains[tier_count];  // At least those in which it holds something.
    std::size_t tidy_at[tier_count] = {};
};

struct Counts {
    u64 blocks, ghosts, members, chains, spans, sets, rows;
};

class Runs {
public:
    explicit Runs(std::size_t bytes_max);
    Runs(const Runs&) = delete;
    Runs& operator=(const Runs&) = delete;

    std::size_t bytes() const { return bytes_; }
    std::size_t bytes_max() const { return bytes_max_; }
    Counts counts() const;

    // A new generation of a worker's rank, that answers nothing until `serve`.
    u32 open(u32 worker, u32 rank);
    // It answers. Returns the row that answered for this rank before, which must be emptied; else `no_row`.
    u32 serve(u32 row);
    // It answers no more; empty it, then `free` it.
    void retire(u32 row);
    void free(u32 row);

    static constexpr u32 no_row = 0xFFFFFFFF;
    static constexpr u32 rows_max = 1u << 20;

    const std::vector<Row>& rows() const { return rows_; }
    const std::vector<u32>& workers() const { return workers_; }
    const std::vector<u32>& ranks() const { return ranks_; }
    const std::vector<u64>& serving() const { return serving_; }

    // Returns how many of the last blocks were refused, because they might not fit into `bytes_max`.
    u32 store(u32 holder, const u64* hashes, u32 count, const u64* parent, bool linked);
    // Returns how many of them it held.
    u32 remove(u32 holder, const u64* hashes, u32 count);
    // Empties some chains of the holder; false when it holds nothing.
    bool clear_some(u32 holder);
    // The hashes it holds.
    std::vector<u64> held(u32 holder) const;
    // The same as runs of blocks that follow one another, as long as can be but for `run_blocks_max`.
    void runs(u32 holder, std::vector<u64>& hashes, std::vector<u16>& lengths) const;

    void prefetch(u64 hash) const { table_.prefetch(hash); }
    Place find(u64 hash) const {
        return table_.find(hash, [&](Place at) {
            const Chain& there = chain(at.chain);
            if (at.offset != 0) return there.hashes[at.offset] == hash;
            if (there.span_count <= spans_inside) sets_.prefetch(there.spans.few[0].set);  // Needed next.
            return there.first == hash;
        });
    }
    const Chain& chain(u32 number) const { return pages_[number / page_chains][number % page_chains]; }
    const Sets& sets() const { return sets_; }

    // Throws std::logic_error naming the invariant that does not hold. Takes time as what is held.
    void check() const;

    // Throws std::bad_alloc when a change was left half done, because the system had no memory for the rest.
    // To be called before anything is read; what changes something does so by itself.
    void require_whole() const {
        if (torn_) throw std::bad_alloc();
    }

private:
    static constexpr u32 page_chains = 1024;

    // For as long as a change takes.
    class Change {
    public:
        explicit Change(Runs& runs) : runs_(runs), unwinding_(std::uncaught_exceptions()) { runs.require_whole(); }
        ~Change() {
            if (std::uncaught_exceptions() > unwinding_) runs_.torn_ = true;
        }
        Change(const Change&) = delete;
        Change& operator=(const Change&) = delete;

    private:
        Runs& runs_;
        const int unwinding_;
    };

    template <typename Each>
    void each_piece(u32 holder, Each each) const;
    Chain& chain(u32 number) { return pages_[number / page_chains][number % page_chains]; }
    u32 fitting(u32 holder, u32 count, Place previous, Place at) const;
    bool has_room(u32 holder, u32 count, Place previous, Place at) const;
    Chain* new_page();
    u32 new_chain(bool linked);
    u32 chain_after(Place previous, bool linked);
    u32 append(u32 number, u32 holder, const u64* hashes, u32 count);
    u32 change(u32 number, u32 from, u32 to, u32 holder, bool held);
    void account(const Chain& chain, u32 from, u32 to, u32 holder, bool held);
    void push_span(u32 end, u32 set);
    void set_spans(Chain& chain);
    void own(u32 number, u32 holder);
    void tidy(Row& row, u32 tier, u32 holder);
    void settle(u32 number);
    void split(u32 number);
    void resize(Chain& chain, u32 room);
    u64 rank_key(u32 row) const { return static_cast<u64>(workers_[row]) << 32 | ranks_[row]; }
    void free_chain(u32 number);

    std::size_t bytes_ = 0;
    std::size_t bytes_max_;
    Arena arena_;
    std::vector<Chain*> pages_;
    std::vector<u64> serving_;  // Bits of holders, 64 a word.
    std::vector<u32> workers_;  // By row, apart: a match reads nothing else of it.
    std::vector<u32> ranks_;
    Table table_;
    Sets sets_;
    std::vector<u32> free_chains_;
    u32 chains_made_ = 1;
    u64 ghosts_ = 0;
    std::vector<Row> rows_;
    std::vector<u32> free_rows_;
    std::unordered_map<u64, u32> answering_;
    std::vector<Span> scratch_;
    bool torn_ = false;
};

// How many blocks from `hashes` on are those of the chain from `offset` on. REQUIRES: the first is.
u32 equal_run(const Chain& chain, u32 offset, const u64* hashes, u32 count);

}  // namespace kvcache::index
