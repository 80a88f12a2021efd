#include "copy.h"

#if defined(__x86_64__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC's own header, on purpose undefined there.
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#endif

namespace kvcache {
namespace {

using namespace xxh3;

// Hardware prefetchers stop at the end of a page; this asks for the next page's bytes in time. It is
// a hint and no load: past the end of the source it does nothing.
constexpr std::size_t prefetch_bytes = 4096;

enum class Write { none, cached, streaming };

// The compiler may neither load the value again nor take it from elsewhere.
inline u64 load_once(const u8* at) {
    u64 value = read64(at);
    __asm__ volatile("" : "+r"(value));
    return value;
}

inline void add_lane(u64* lanes, std::size_t lane, u64 value, std::size_t key) {
    const u64 keyed = value ^ read64(secret + key + 8 * lane);
    lanes[lane ^ 1] += value;
    lanes[lane] += (keyed & 0xFFFFFFFF) * (keyed >> 32);
}

inline void scramble(u64* lanes) {
    for (std::size_t lane = 0; lane < lane_count; ++lane) {
        const u64 folded = lanes[lane] ^ lanes[lane] >> 47;
        lanes[lane] = (folded ^ read64(secret + scramble_offset + 8 * lane)) * prime32_1;
    }
}

template <Write write>
void portable(u64* lanes, const u8* source, u8* target, std::size_t stripes, std::size_t first) {
    u64 sums[lane_count];
    std::memcpy(sums, lanes, sizeof sums);
    for (std::size_t stripe = first; stripe < first + stripes; ++stripe) {
        const std::size_t key = stripe % block_stripes;
        __builtin_prefetch(source + prefetch_bytes);
        for (std::size_t lane = 0; lane < lane_count; ++lane) {
            const u64 value = load_once(source + 8 * lane);
            if constexpr (write == Write::cached) std::memcpy(target + 8 * lane, &value, sizeof value);
            add_lane(sums, lane, value, 8 * key);
        }
        if (key == block_stripes - 1) scramble(sums);
        source += stripe_bytes;
        if constexpr (write != Write::none) target += stripe_bytes;
    }
    std::memcpy(lanes, sums, sizeof sums);
}

#if defined(__x86_64__)

#define AVX2 __attribute__((target("avx2"), always_inline)) inline
#define AVX512 __attribute__((target("avx512f")))

AVX2 __m256i load_256(const void* at, int half) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(at) + half);
}

AVX2 void store_256(void* at, int half, __m256i value) {
    _mm256_storeu_si256(static_cast<__m256i*>(at) + half, value);
}

// The low 64 bits of lane times prime32_1.
AVX2 __m256i scramble_256(__m256i sums, int half) {
    const __m256i prime = _mm256_set1_epi64x(static_cast<long long>(prime32_1));
    const __m256i folded = _mm256_xor_si256(sums, _mm256_srli_epi64(sums, 47));
    const __m256i keyed = _mm256_xor_si256(folded, load_256(secret + scramble_offset, half));
    const __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(keyed, 32), prime);
    return _mm256_add_epi64(_mm256_mul_epu32(keyed, prime), _mm256_slli_epi64(high, 32));
}

template <Write write>
__attribute__((target("avx2"))) void avx2(u64* lanes, const u8* source, u8* target, std::size_t stripes,
                                          std::size_t first) {
    __m256i sums[2] = {load_256(lanes, 0), load_256(lanes, 1)};
    for (std::size_t stripe = first; stripe < first + stripes; ++stripe) {
        const std::size_t key = stripe % block_stripes;
        __builtin_prefetch(source + prefetch_bytes);
        for (int half = 0; half < 2; ++half) {
            __m256i value = load_256(source, half);
            __asm__ volatile("" : "+x"(value));
            if constexpr (write == Write::cached) store_256(target, half, value);
            if constexpr (write == Write::streaming)
                _mm256_stream_si256(reinterpret_cast<__m256i*>(target) + half, value);
            const __m256i keyed = _mm256_xor_si256(value, load_256(secret + 8 * key, half));
            const __m256i product = _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32));
            sums[half] = _mm256_add_epi64(sums[half], _mm256_shuffle_epi32(value, 0x4E));
            sums[half] = _mm256_add_epi64(sums[half], product);
            if (key == block_stripes - 1) sums[half] = scramble_256(sums[half], half);
        }
        source += stripe_bytes;
        if constexpr (write != Write::none) target += stripe_bytes;
    }
    store_256(lanes, 0, sums[0]);
    store_256(lanes, 1, sums[1]);
}

template <Write write>
AVX512 void avx512(u64* lanes, const u8* source, u8* target, std::size_t stripes, std::size_t first) {
    const __m512i prime = _mm512_set1_epi64(static_cast<long long>(prime32_1));
    __m512i sums = _mm512_loadu_si512(lanes);
    for (std::size_t stripe = first; stripe < first + stripes; ++stripe) {
        const std::size_t key = stripe % block_stripes;
        __builtin_prefetch(source + prefetch_bytes);
        __m512i value = _mm512_loadu_si512(source);
        __asm__ volatile("" : "+v"(value));
        if constexpr (write == Write::cached) _mm512_storeu_si512(target, value);
        if constexpr (write == Write::streaming)
            _mm512_stream_si512(reinterpret_cast<__m512i*>(target), value);
        const __m512i keyed = _mm512_xor_si512(value, _mm512_loadu_si512(secret + 8 * key));
        const __m512i product = _mm512_mul_epu32(keyed, _mm512_srli_epi64(keyed, 32));
        sums = _mm512_add_epi64(sums, _mm512_shuffle_epi32(value, _MM_PERM_BADC));
        sums = _mm512_add_epi64(sums, product);
        if (key == block_stripes - 1) {
            const __m512i folded = _mm512_xor_si512(sums, _mm512_srli_epi64(sums, 47));
            const __m512i scrambled = _mm512_xor_si512(folded, _mm512_loadu_si512(secret + scramble_offset));
            const __m512i high = _mm512_mul_epu32(_mm512_srli_epi64(scrambled, 32), prime);
            sums = _mm512_add_epi64(_mm512_mul_epu32(scrambled, prime), _mm512_slli_epi64(high, 32));
        }
        source += stripe_bytes;
        if constexpr (write != Write::none) target += stripe_bytes;
    }
    _mm512_storeu_si512(lanes, sums);
}

#pragma GCC diagnostic pop
#endif

// A short chunk, or what is left of a long one: read once into `window`, stored from there.
template <Write write>
void take(u8* window, const u8* source, u8* target, std::size_t bytes) {
    std::memcpy(window, source, bytes);
    __asm__ volatile("" : : "r"(window) : "memory");
    if constexpr (write != Write::none) std::memcpy(target, window, bytes);
}

// The last stripe ends with the chunk and so overlaps the one before, unless 64 divides the chunk.
// In that case nothing may be loaded twice: the last two stripes go through a window.
template <Write write>
u64 pass_long(Kernel kernel, const u8* source, u8* target, std::size_t bytes) {
    alignas(64) u64 lanes[lane_count];
    alignas(64) u8 window[2 * stripe_bytes];
    std::memcpy(lanes, first_lanes, sizeof lanes);
    const std::size_t stripes = (bytes - 1) / stripe_bytes;
    const std::size_t rest = bytes - stripes * stripe_bytes;
    const std::size_t overlapped = rest == stripe_bytes ? 0 : 1;
    const std::size_t direct = (stripes - overlapped) * stripe_bytes;
    kernel(lanes, source, target, stripes - overlapped, 0);
    if constexpr (write != Write::none) target += direct;
    take<write>(window, source + direct, target, bytes - direct);
    if (overlapped) portable<Write::none>(lanes, window, nullptr, 1, stripes - 1);
    const u8* last = window + (bytes - direct) - stripe_bytes;
    for (std::size_t lane = 0; lane < lane_count; ++lane)
        add_lane(lanes, lane, read64(last + 8 * lane), last_offset);
    return finish_long(lanes, bytes);
}

template <Write write>
u64 pass_short(const u8* source, u8* target, std::size_t bytes) {
    u8 window[short_bytes_max];
    take<write>(window, source, target, bytes);
    return sum_short(window, bytes);
}

}  // namespace

std::vector<Level> available_levels() {
    std::vector<Level> levels;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f"))
        levels.push_back({"avx512", avx512<Write::cached>, avx512<Write::streaming>, avx512<Write::none>});
    if (__builtin_cpu_supports("avx2"))
        levels.push_back({"avx2", avx2<Write::cached>, avx2<Write::streaming>, avx2<Write::none>});
#endif
    levels.push_back({"portable", portable<Write::cached>, nullptr, portable<Write::none>});
    return levels;
}

u64 copy_chunk(const Level& level, Stores stores, const u8* source, u8* target, std::size_t bytes) {
    if (bytes <= short_bytes_max) return pass_short<Write::cached>(source, target, bytes);
    const bool aligned = reinterpret_cast<std::uintptr_t>(target) % stripe_bytes == 0;
    const bool streams = stores == Stores::streaming && level.streaming != nullptr && aligned;
    return pass_long<Write::cached>(streams ? level.streaming : level.cached, source, target, bytes);
}

u64 sum_chunk(const Level& level, const u8* source, std::size_t bytes) {
    if (bytes <= short_bytes_max) return pass_short<Write::none>(source, nullptr, bytes);
    return pass_long<Write::none>(level.sum, source, nullptr, bytes);
}

void finish_stores() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

}  // namespace kvcache
