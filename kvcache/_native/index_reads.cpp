// What only looks: counts, what a holder has, and the check of every invariant.

#include <algorithm>
#include <stdexcept>
#include <unordered_map>

#include "index_runs.h"

namespace kvcache::index {
namespace {

void require(bool holds, const char* invariant) {
    if (!holds) throw std::logic_error(invariant);
}

}  // namespace

Counts Runs::counts() const {
    Counts counts{};
    counts.ghosts = ghosts_;
    counts.blocks = table_.used() - ghosts_;
    counts.chains = chains_made_ - 1 - free_chains_.size();
    for (u32 number = 1; number < chains_made_; ++number) counts.spans += chain(number).span_count;
    counts.sets = sets_.count();
    for (const Row& row : rows_) {
        if (row.state != State::free) ++counts.rows;
        for (const Digest& digest : row.digests) counts.members += digest.count;
    }
    return counts;
}

// Calls `each(first, last, chain)` for the pieces of chains that the holder has, each as long as can be.
template <typename Each>
void Runs::each_piece(u32 holder, Each each) const {
    std::vector<u32> chains = rows_[holder / tier_count].chains[holder % tier_count];
    std::sort(chains.begin(), chains.end());
    chains.erase(std::unique(chains.begin(), chains.end()), chains.end());
    for (const u32 number : chains) {
        const Chain& there = chain(number);
        u32 first = 0;
        u32 last = 0;
        u32 start = 0;
        for (const Span& span : there) {
            if (sets_.contains(span.set, holder)) {
                if (last != start) {
                    if (first < last) each(first, last, there);
                    first = start;
                }
                last = span.end;
            }
            start = span.end;
        }
        if (first < last) each(first, last, there);
    }
}

std::vector<u64> Runs::held(u32 holder) const {
    std::vector<u64> hashes;
    hashes.reserve(rows_[holder / tier_count].digests[holder % tier_count].count);
    each_piece(holder, [&](u32 first, u32 last, const Chain& there) {
        hashes.insert(hashes.end(), there.hashes + first, there.hashes + last);
    });
    return hashes;
}

void Runs::runs(u32 holder, std::vector<u64>& hashes, std::vector<u16>& lengths) const {
    hashes.reserve(rows_[holder / tier_count].digests[holder % tier_count].count);
    each_piece(holder, [&](u32 first, u32 last, const Chain& there) {
        hashes.insert(hashes.end(), there.hashes + first, there.hashes + last);
        const u32 longest = there.linked != 0 ? run_blocks_max : 1;
        for (; first < last; first += std::min(longest, last - first))
            lengths.push_back(static_cast<u16>(std::min(longest, last - first)));
    });
}

void Runs::check() const {
    std::vector<u32> references(sets_.size(), 0);
    std::unordered_map<u32, Digest> digests;
    u64 blocks = 0;
    u64 ghosts = 0;
    for (u32 number = 1; number < chains_made_; ++number) {
        const Chain& each = chain(number);
        require((each.length == 0) == (each.span_count == 0), "a chain has spans exactly when it has blocks");
        u32 start = 0;
        u32 dead = 0;
        u32 former = 0xFFFFFFFF;
        for (const Span& span : each) {
            require(span.end > start && span.set != former, "spans are maximal and in order");
            if (span.set == 0) dead += span.end - start;
            ++references[span.set];
            for (const Word* word = sets_.begin(span.set); word != sets_.end(span.set); ++word)
                for (u64 bits = word->bits; bits != 0; bits &= bits - 1) {
                    Digest& digest = digests[word->at * 64 + static_cast<u32>(__builtin_ctzll(bits))];
                    for (u32 at = start; at < span.end; ++at) {
                        ++digest.count;
                        digest.joined_xor ^= each.hashes[at];
                        digest.sum += each.hashes[at];
                    }
                }
            start = span.end;
            former = span.set;
        }
        require(start == each.length && each.length <= each.room + (each.length == 0), "spans cover a chain");
        require(dead == each.ghosts && dead <= each.length / 2, "ghosts are counted, and at most half");
        require(each.length == 0 || each.end()[-1].set != 0, "a chain ends with a block that is held");
        require(each.length == 0 || (each.first == each.hashes[0] && each.last == each.hashes[each.length - 1]),
                "a chain knows its first and last hash");
        require(each.fork <= each.length, "a fork is inside its chain");
        for (u32 at = 0; at < each.length; ++at) {
            const Place found = find(each.hashes[at]);
            require(found.chain == number && found.offset == at, "the table finds each block in its place");
        }
        blocks += each.length;
        ghosts += dead;
    }
    require(blocks == table_.used() && ghosts == ghosts_, "blocks and ghosts are counted");
    std::size_t live = 0;
    for (u32 set = 1; set < references.size(); ++set) {
        require(references[set] == sets_.references(set), "a set counts the spans that name it");
        live += references[set] != 0;
    }
    require(live == sets_.count(), "a set that no span names is gone");
    for (u32 number = 0; number < rows_.size(); ++number)
        for (u32 tier = 0; tier < tier_count; ++tier) {
            const Digest& told = rows_[number].digests[tier];
            const Digest& found = digests[number * tier_count + tier];
            require(told.count == found.count && told.joined_xor == found.joined_xor && told.sum == found.sum,
                    "a digest is of what is held");
            require(held(number * tier_count + tier).size() == told.count, "a holder finds all it holds");
        }
}

}  // namespace kvcache::index
