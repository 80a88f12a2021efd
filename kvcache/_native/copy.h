// Copying and summing chunks in one pass: each source byte is loaded once, into a register, and that
// register is both summed and stored. So a source that another process changes meanwhile may give
// torn bytes, but never a sum of other bytes than those that were written.

#pragma once

#include <cstddef>
#include <vector>

#include "xxh3.h"

namespace kvcache {

using xxh3::u64;
using xxh3::u8;

// Adds whole stripes of a chunk to `lanes` and stores them; `first` is the index of the first one.
using Kernel = void (*)(u64* lanes, const u8* source, u8* target, std::size_t stripes, std::size_t first);

// What this machine's instructions allow. `streaming` writes past the caches and needs a target
// aligned to 64 bytes; it is null where there is no such thing. `sum` writes nothing.
struct Level {
    const char* name;
    Kernel cached;
    Kernel streaming;
    Kernel sum;
};

enum class Stores { cached, streaming };

// The levels that this processor runs, fastest first. The last is "portable".
std::vector<Level> available_levels();

// The sum of `bytes` bytes at `source`, which are also copied to `target`. REQUIRES: no overlap.
u64 copy_chunk(const Level& level, Stores stores, const u8* source, u8* target, std::size_t bytes);

u64 sum_chunk(const Level& level, const u8* source, std::size_t bytes);

// Streaming stores are ordered with nothing: call this before telling anyone that bytes are there.
void finish_stores();

}  // namespace kvcache
