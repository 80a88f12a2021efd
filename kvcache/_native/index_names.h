// Naming blocks by their tokens, for Python: kvcache.index.name_blocks and kvcache/sequence.py.

#pragma once

#include <algorithm>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "index_python.h"
#include "index_tokens.h"

namespace kvcache::index {

constexpr u64 public_seed = 1337;
constexpr std::size_t quick_bytes = 1u << 16;  // Summing more releases the interpreter's lock.

// The bytes of each block's tokens, and what is appended to them.
class Blocks {
public:
    Blocks(const Items<u32>& tokens, u32 block_tokens, const std::vector<std::string_view>& extra)
        : at_(reinterpret_cast<const u8*>(tokens.data())), step_(block_tokens * sizeof(u32)), extra_(extra) {
        if (block_tokens == 0) throw Refusal{"bad_prefix", "a block of no tokens"};
        count_ = tokens.count() / block_tokens;
    }

    std::size_t count() const { return count_; }
    std::size_t bytes() const { return count_ * step_; }

    u64 sum(std::size_t block, u64 seed) {
        const u8* at = at_ + block * step_;
        if (block >= extra_.size() || extra_[block].empty()) return seeded_sum(at, step_, seed);
        joined_.assign(at, at + step_);
        joined_.insert(joined_.end(), extra_[block].begin(), extra_[block].end());
        return seeded_sum(joined_.data(), joined_.size(), seed);
    }

private:
    const u8* at_;
    std::size_t step_;
    std::size_t count_;
    const std::vector<std::string_view>& extra_;
    std::vector<u8> joined_;
};

// `name(i)` of each of `count`, in order, for `bytes` that have to be read.
template <typename Name>
std::vector<u64> named(std::size_t count, std::size_t bytes, Name name) {
    std::optional<py::gil_scoped_release> released;
    if (bytes > quick_bytes) released.emplace();
    std::vector<u64> names(count);
    for (std::size_t i = 0; i < count; ++i) names[i] = name(i);
    return names;
}

inline std::vector<u64> names_of(const Items<u32>& tokens, u32 block_tokens, u64 root) {
    const std::vector<std::string_view> nothing;
    Blocks blocks(tokens, block_tokens, nothing);
    return named(blocks.count(), blocks.bytes(), [&](std::size_t i) { return root = blocks.sum(i, root); });
}

inline py::object name_blocks(py::handle tokens, u32 block_tokens, u64 root) {
    return view_of(names_of(Items<u32>(tokens), block_tokens, root));
}

inline std::vector<std::string_view> views_of(const py::sequence& extra) {
    std::vector<std::string_view> views;
    for (const py::handle each : extra) {
        if (!PyBytes_Check(each.ptr())) throw Refusal{"bad_prefix", "what is appended to a block is no bytes"};
        views.emplace_back(PyBytes_AS_STRING(each.ptr()), static_cast<std::size_t>(PyBytes_GET_SIZE(each.ptr())));
    }
    return views;
}

// One after the other: `before` is the sequence hash so far, if there is one.
inline u64 chained(std::optional<u64>& before, u64 local) {
    if (before) {
        const u64 pair[2] = {*before, local};
        local = seeded_sum(reinterpret_cast<const u8*>(pair), sizeof pair, public_seed);
    }
    before = local;
    return local;
}

inline py::object local_hashes(py::handle tokens, u32 block_tokens, const py::sequence& extra) {
    const Items<u32> items(tokens);
    const auto views = views_of(extra);
    Blocks blocks(items, block_tokens, views);
    return view_of(named(blocks.count(), blocks.bytes(), [&](std::size_t i) { return blocks.sum(i, public_seed); }));
}

inline py::object chain_locals(py::handle locals, std::optional<u64> parent) {
    const Items<u64> items(locals);
    return view_of(named(items.count(), items.count() * sizeof(u64),
                         [&](std::size_t i) { return chained(parent, items.data()[i]); }));
}

inline py::object sequence_hashes(py::handle tokens, u32 block_tokens, const py::sequence& extra,
                                  std::optional<u64> parent) {
    const Items<u32> items(tokens);
    const auto views = views_of(extra);
    Blocks blocks(items, block_tokens, views);
    return view_of(named(blocks.count(), blocks.bytes(),
                         [&](std::size_t i) { return chained(parent, blocks.sum(i, public_seed)); }));
}

}  // namespace kvcache::index
