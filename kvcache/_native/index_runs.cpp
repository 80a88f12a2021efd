// What changes the runs: rows that come and go, and blocks stored and removed.

#include "index_runs.h"

#include <algorithm>
#include <memory>

namespace kvcache::index {
namespace {

constexpr std::size_t allocation_bytes = 16;  // What the allocator takes for itself, each time.
constexpr u32 loose_blocks_max = 64;          // Each of them may need a span of its own.
constexpr u32 clear_chains = 64;
constexpr u32 prefetch_blocks = 12;
constexpr std::size_t tidy_chains_min = 256;
constexpr u32 probes = 16;

u32 spans_room(u32 count) {
    u32 room = 2 * spans_inside;
    while (room < count) room *= 2;
    return room;
}

std::size_t span_bytes(u32 count) {
    return count <= spans_inside ? 0 : spans_room(count) * sizeof(Span) + allocation_bytes;
}

// The most that one more holder of a run of blocks adds: both ends of the run may be inside a span.
std::size_t spans_growth(u32 count) { return span_bytes(count + 2) - span_bytes(count); }

std::size_t hash_bytes(u32 room) { return room == 0 ? 0 : room * sizeof(u64) + allocation_bytes; }

u32 exact_run(const Chain& chain, u32 offset, const u64* hashes, u32 count) {
    const u32 longest = std::min(chain.length - offset, count);
    u32 run = 1;
    while (run < longest && chain.hashes[offset + run] == hashes[run]) ++run;
    return run;
}

u32 backward_run(const Chain& chain, u32 offset, const u64* hashes, u32 count) {
    const u32 longest = std::min(offset + 1, count);
    u32 run = 1;
    while (run < longest && chain.hashes[offset - run] == hashes[run]) ++run;
    return run;
}

}  // namespace

u32 equal_run(const Chain& chain, u32 offset, const u64* hashes, u32 count) {
    if (!chain.linked) return exact_run(chain, offset, hashes, count);
    const u64* mine = chain.hashes + offset;
    const u32 rest = chain.length - offset;
    u32 unequal = std::min(rest, count) - 1;
    if ((rest <= count ? chain.last : mine[unequal]) == hashes[unequal]) return unequal + 1;
    u32 equal = 0;
    if (const u32 fork = chain.fork - offset; chain.fork > offset && fork <= unequal) {
        if (fork < unequal && mine[fork] == hashes[fork]) {
            equal = fork;
        } else if (mine[fork - 1] == hashes[fork - 1]) {
            return fork;
        } else {
            unequal = fork - 1;
        }
    }
    while (unequal - equal > 2 * probes) {  // Several at once: their cache misses overlap.
        const u32 step = (unequal - equal) / probes;
        u32 steps = 0;
        for (u32 i = 1; i < probes; ++i) steps += mine[equal + i * step] == hashes[equal + i * step];
        if (steps + 1 < probes) unequal = equal + (steps + 1) * step;
        equal += steps * step;
    }
    while (equal + 1 < unequal && mine[equal + 1] == hashes[equal + 1]) ++equal;
    return equal + 1;
}

Runs::Runs(std::size_t bytes_max) : bytes_max_(bytes_max), table_(bytes_, arena_), sets_(bytes_) {}

u32 Runs::open(u32 worker, u32 rank) {
    const Change changing(*this);
    if (free_rows_.empty()) {
        if (rows_.size() == rows_max) return no_row;
        free_rows_.push_back(static_cast<u32>(rows_.size()));
        rows_.emplace_back();
        workers_.push_back(0);
        ranks_.push_back(0);
        serving_.resize((rows_.size() + word_rows - 1) / word_rows, 0);
        bytes_ += sizeof(Row) + 2 * sizeof(u32);
    }
    const u32 number = free_rows_.back();
    free_rows_.pop_back();
    Row& row = rows_[number];
    workers_[number] = worker;
    ranks_[number] = rank;
    ++row.generation;
    row.state = State::shadow;
    return number;
}

u32 Runs::serve(u32 number) {
    const Change changing(*this);
    Row& row = rows_[number];
    if (row.state == State::serving) return no_row;
    const auto [entry, fresh] = answering_.try_emplace(rank_key(number), number);
    const u32 former = fresh ? no_row : entry->second;
    if (!fresh) retire(former);
    answering_[rank_key(number)] = number;
    row.state = State::serving;
    serving_[number / word_rows] |= 0xFull << number % word_rows * tier_count;
    return former;
}

void Runs::retire(u32 number) {
    Row& row = rows_[number];
    if (row.state == State::serving) answering_.erase(rank_key(number));
    row.state = State::shadow;
    ++row.generation;
    serving_[number / word_rows] &= ~(0xFull << number % word_rows * tier_count);
}

void Runs::free(u32 number) {
    rows_[number].state = State::free;
    free_rows_.push_back(number);
}

// How many of `count` blocks more it is certain fit: all, or a half, a quarter and so on; else none.
u32 Runs::fitting(u32 holder, u32 count, Place previous, Place at) const {
    while (count > 0 && !has_room(holder, count, previous, at)) count /= 2;
    return count;
}

// Whether it is certain that `count` blocks more fit, whatever has to grow for them: those at `at`, where they
// are known, else new ones behind `previous`.
bool Runs::has_room(u32 holder, u32 count, Place previous, Place at) const {
    const std::vector<u32>& owned = rows_[holder / tier_count].chains[holder % tier_count];
    const std::size_t lists = (owned.capacity() + count) * sizeof(u32);
    const std::size_t sets = count * (2 * (sets_.words_max() + 1) * sizeof(Word) + 512);
    const std::size_t numbers = std::max<std::size_t>(1, pages_.size() * page_chains);
    const bool has_chains = count <= free_chains_.size() + numbers - chains_made_;
    const std::size_t pages = has_chains ? 0 : (count / page_chains + 1) * page_chains * sizeof(Chain);
    const Place changed = at ? at : previous;
    std::size_t grown = 0;
    if (changed) grown += spans_growth(chain(changed.chain).span_count);
    if (changed && !at) grown += chain(changed.chain).length / 4 * sizeof(u64);
    const std::size_t chains = count * (4 * sizeof(u64) + 4 * sizeof(Span)) + grown + pages + 1024;
    return bytes_ + table_.growth(count) + chains + lists + sets <= bytes_max_;
}

u32 Runs::store(u32 holder, const u64* hashes, u32 count, const u64* parent, bool linked) {
    const Change changing(*this);
    Place previous = parent != nullptr ? find(*parent) : Place{};
    for (u32 i = 0; i < std::min(count, prefetch_blocks); ++i) table_.prefetch(hashes[i]);
    for (u32 i = 0; i < count;) {
        const Place at = find(hashes[i]);
        const u32 sure = fitting(holder, count - i, previous, at);
        if (sure == 0) return count - i;
        if (at) {
            const u32 run = exact_run(chain(at.chain), at.offset, hashes + i, sure);
            change(at.chain, at.offset, at.offset + run, holder, true);
            previous = {at.chain, at.offset + run - 1};
            i += run;
        } else {
            const u32 number = chain_after(previous, linked);
            i += append(number, holder, hashes + i, sure);
            previous = {number, chain(number).length - 1};
        }
    }
    return 0;
}

u32 Runs::remove(u32 holder, const u64* hashes, u32 count) {
    const Change changing(*this);
    u32 removed = 0;
    for (u32 i = 0; i < count;) {
        const Place at = find(hashes[i]);
        if (!at) {
            ++i;
            continue;
        }
        const Chain& there = chain(at.chain);
        u32 run = exact_run(there, at.offset, hashes + i, count - i);
        u32 from = at.offset;
        if (run == 1) {
            run = backward_run(there, at.offset, hashes + i, count - i);
            from = at.offset + 1 - run;
        }
        const u32 changed = change(at.chain, from, from + run, holder, false);
        if (changed > 0) settle(at.chain);
        removed += changed;
        i += run;
    }
    return removed;
}

bool Runs::clear_some(u32 holder) {
    const Change changing(*this);
    Row& row = rows_[holder / tier_count];
    const u32 tier = holder % tier_count;
    std::vector<u32>& chains = row.chains[tier];
    for (u32 i = 0; i < clear_chains && !chains.empty(); ++i) {
        const u32 number = chains.back();
        chains.pop_back();
        if (chain(number).length == 0) continue;
        if (change(number, 0, chain(number).length, holder, false) > 0) settle(number);
    }
    if (!chains.empty()) return true;
    bytes_ -= chains.capacity() * sizeof(u32);
    std::vector<u32>().swap(chains);
    row.tidy_at[tier] = 0;
    return false;
}

Chain* Runs::new_page() {
    void* page = arena_.take<Chain>(page_chains + 1);
    std::size_t bytes = (page_chains + 1) * sizeof(Chain);
    auto* chains = static_cast<Chain*>(std::align(alignof(Chain), page_chains * sizeof(Chain), page, bytes));
    std::uninitialized_default_construct_n(chains, page_chains);
    return chains;
}

u32 Runs::new_chain(bool linked) {
    if (free_chains_.empty()) {
        if (chains_made_ == chains_max) throw std::bad_alloc();
        if (chains_made_ / page_chains >= pages_.size()) {
            pages_.push_back(new_page());
            bytes_ += page_chains * sizeof(Chain);
        }
        free_chains_.push_back(chains_made_++);
    }
    const u32 number = free_chains_.back();
    free_chains_.pop_back();
    Chain& made = chain(number);
    made = Chain{};
    made.linked = linked ? 1 : 0;
    made.ghosts = 0;
    return number;
}

// A chain whose end is the block before, and that takes more; else a new one.
u32 Runs::chain_after(Place previous, bool linked) {
    if (previous) {
        const Chain& there = chain(previous.chain);
        const u32 longest = linked ? chain_blocks_max : loose_blocks_max;
        const bool fits = (there.linked != 0) == linked && there.length < longest;
        if (fits && previous.offset + 1 == there.length) return previous.chain;
        if (previous.offset + 1 < there.length) chain(previous.chain).fork = previous.offset + 1;
    }
    return new_chain(linked);
}

// Takes new blocks as long as there are, and the chain has places. Returns how many.
u32 Runs::append(u32 number, u32 holder, const u64* hashes, u32 count) {
    Chain& target = chain(number);
    const u32 longest = target.linked != 0 ? chain_blocks_max : loose_blocks_max;
    const u32 start = target.length;
    count = std::min(count, longest - start);
    if (target.room < start + count)
        resize(target, std::min(longest, start == 0 ? count : std::max(start + count, start + start / 4)));
    if (start == 0) target.first = hashes[0];
    u32 taken = 0;
    do {
        if (taken + prefetch_blocks < count) table_.prefetch(hashes[taken + prefetch_blocks]);
        target.hashes[target.length] = hashes[taken];
        table_.insert(hashes[taken], {number, target.length++});
    } while (++taken < count && !find(hashes[taken]));
    target.last = target.hashes[target.length - 1];
    scratch_.clear();
    for (const Span& span : target) push_span(span.end, span.set);
    push_span(target.length, sets_.with(0, holder, true));
    set_spans(target);
    account(target, start, target.length, holder, true);
    own(number, holder);
    return taken;
}

// Puts the holder into the sets of [from, to), or takes it out. Returns for how many blocks that is new.
u32 Runs::change(u32 number, u32 from, u32 to, u32 holder, bool held) {
    Chain& target = chain(number);
    scratch_.clear();
    u32 changed = 0;
    u32 start = 0;
    for (const Span& span : target) {
        const u32 first = std::max(start, from);
        const u32 last = std::min(span.end, to);
        if (first >= last) {
            push_span(span.end, span.set);
        } else {
            const u32 set = sets_.with(span.set, holder, held);
            if (first > start) push_span(first, span.set);
            push_span(last, set);
            if (last < span.end) push_span(span.end, span.set);
            if (set != span.set) {
                changed += last - first;
                account(target, first, last, holder, held);
                if (span.set == 0) target.ghosts -= last - first, ghosts_ -= last - first;
                if (set == 0) target.ghosts += last - first, ghosts_ += last - first;
            }
        }
        start = span.end;
    }
    set_spans(target);
    if (held && changed > 0) own(number, holder);
    return changed;
}

void Runs::account(const Chain& chain, u32 from, u32 to, u32 holder, bool held) {
    Digest& digest = rows_[holder / tier_count].digests[holder % tier_count];
    u64 sum = 0;
    for (u32 i = from; i < to; ++i) {
        sum += chain.hashes[i];
        digest.joined_xor ^= chain.hashes[i];
    }
    digest.sum += held ? sum : -sum;
    digest.count += held ? to - from : -static_cast<u64>(to - from);
}

// Into `scratch_`, with its reference; joined with the one before where that is the same set.
void Runs::push_span(u32 end, u32 set) {
    if (!scratch_.empty() && scratch_.back().set == set) {
        scratch_.back().end = end;
        return;
    }
    sets_.keep(set);
    scratch_.push_back({end, set});
}

// What is in `scratch_` becomes the chain's spans.
void Runs::set_spans(Chain& target) {
    const u32 count = static_cast<u32>(scratch_.size());
    for (const Span& span : target) sets_.release(span.set);
    const bool moves = span_bytes(count) != span_bytes(target.span_count);
    if (moves) {
        bytes_ += span_bytes(count) - span_bytes(target.span_count);
        if (target.span_count > spans_inside) arena_.give(target.spans.many);
        if (count > spans_inside) target.spans.many = arena_.take<Span>(spans_room(count));
    }
    std::copy(scratch_.begin(), scratch_.end(), count > spans_inside ? target.spans.many : target.spans.few);
    target.span_count = count;
}

void Runs::own(u32 number, u32 holder) {
    Row& row = rows_[holder / tier_count];
    std::vector<u32>& chains = row.chains[holder % tier_count];
    if (!chains.empty() && chains.back() == number) return;
    const std::size_t before = chains.capacity();
    chains.push_back(number);
    bytes_ += (chains.capacity() - before) * sizeof(u32);
    if (chains.size() > std::max(tidy_chains_min, row.tidy_at[holder % tier_count]))
        tidy(row, holder % tier_count, holder);
}

// Leaves each chain in which it holds something once. Done when the list has doubled: constant a call.
void Runs::tidy(Row& row, u32 tier, u32 holder) {
    std::vector<u32>& chains = row.chains[tier];
    std::sort(chains.begin(), chains.end());
    chains.erase(std::unique(chains.begin(), chains.end()), chains.end());
    const auto gone = [&](u32 number) {
        const Chain& each = chain(number);
        if (each.length == 0) return true;
        return std::none_of(each.begin(), each.end(),
                            [&](const Span& span) { return sets_.contains(span.set, holder); });
    };
    chains.erase(std::remove_if(chains.begin(), chains.end(), gone), chains.end());
    row.tidy_at[tier] = 2 * chains.size();
}

// Cuts ghosts off its end, and all of them out where they are too many.
void Runs::settle(u32 number) {
    Chain& target = chain(number);
    const Span last = target.end()[-1];
    if (last.set == 0) {
        const u32 length = target.span_count == 1 ? 0 : target.end()[-2].end;
        for (u32 i = length; i < target.length; ++i) {
            if (i + prefetch_blocks < target.length) table_.prefetch(target.hashes[i + prefetch_blocks]);
            table_.erase(target.hashes[i], {number, i});
        }
        target.ghosts -= target.length - length;
        ghosts_ -= target.length - length;
        target.length = length;
        if (length == 0) return free_chain(number);
        target.last = target.hashes[length - 1];
        if (target.fork >= length) target.fork = 0;
        scratch_.clear();
        for (const Span& span : target)
            if (span.end <= length) push_span(span.end, span.set);
        set_spans(target);
    }
    if (target.ghosts > target.length / 2) return split(number);
    if (target.room > 2 * target.length + 16) resize(target, target.length + target.length / 8);
}

void Runs::split(u32 number) {
    Chain& whole = chain(number);
    u32 piece = 0;
    u32 start = 0;
    for (u32 i = 0; i < whole.span_count; ++i) {
        const Span span = whole.begin()[i];
        if (span.set == 0) {
            for (u32 at = start; at < span.end; ++at) table_.erase(whole.hashes[at], {number, at});
            piece = 0;
            start = span.end;
            continue;
        }
        if (piece == 0) piece = new_chain(whole.linked != 0);
        Chain& target = chain(piece);
        resize(target, target.length + span.end - start);
        for (u32 at = start; at < span.end; ++at) {
            table_.move(whole.hashes[at], {number, at}, {piece, target.length});
            target.hashes[target.length++] = whole.hashes[at];
        }
        target.first = target.hashes[0];
        target.last = target.hashes[target.length - 1];
        scratch_.clear();
        for (const Span& each : target) push_span(each.end, each.set);
        push_span(target.length, span.set);
        set_spans(target);
        for (const Word* word = sets_.begin(span.set); word != sets_.end(span.set); ++word)
            for (u64 bits = word->bits; bits != 0; bits &= bits - 1)
                own(piece, word->at * 64 + static_cast<u32>(__builtin_ctzll(bits)));
        start = span.end;
    }
    ghosts_ -= whole.ghosts;
    free_chain(number);
}

void Runs::resize(Chain& target, u32 room) {
    u64* hashes = arena_.take<u64>(room);
    std::copy(target.hashes, target.hashes + target.length, hashes);
    bytes_ += hash_bytes(room);
    bytes_ -= hash_bytes(target.room);
    arena_.give(target.hashes);
    target.hashes = hashes;
    target.room = room;
}

void Runs::free_chain(u32 number) {
    Chain& target = chain(number);
    scratch_.clear();
    set_spans(target);
    bytes_ -= hash_bytes(target.room);
    arena_.give(target.hashes);
    target = Chain{};
    target.ghosts = 0;
    target.linked = 0;
    free_chains_.push_back(number);
}

}  // namespace kvcache::index
