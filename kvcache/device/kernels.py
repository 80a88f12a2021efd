"""The Triton kernels: copies between pages and slab, and XXH3-64 of chunks. The only file that imports
Triton.

``_copy`` moves bytes in tiles, one program a tile of one plane of one block: ``[piece, word]``, a piece
being bytes that are next to one another on both sides, at most 512 of them, a word up to 8.

``_copy_and_sum`` does it in tiles of whole *rounds* of XXH3 (1 KiB of a chunk, 16 stripes of 64 bytes) and
also sums them: XXH3 adds the stripes of a round in any order and only between rounds mixes what it has, so
rounds are summed apart, 64 bytes a KiB are left in ``partials``, and ``_finish`` chains those, eight chunks
a warp. It serves chunks over 240 bytes, a multiple of 8, with pages whose rows are whole stripes; the rest
is summed by ``kvcache.device.sums_twin``.

The sum: bytes are read once and written once in 16-byte words, 8 of them in flight a thread. A word of 8
bytes costs some 12 integer instructions when it is summed: 20 % of what an H200 has at 2.1 TB/s each way,
so memory is the limit (32 MiB: 16 us), with 6 % more traffic for the partials. ``_finish`` is a chain of 64
short steps for a chunk of 64 KiB, some 3 us however many there are. Figures on a GPU: not measured.

With TRITON_INTERPRET=1 in the environment before this is imported, the same code runs on CPU tensors.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from subprocess import SubprocessError

import torch
import triton
import triton.language as tl
from triton.errors import TritonError

from kvcache.block import BlockSpec
from kvcache.device import sums_twin
from kvcache.device.checks import alignment
from kvcache.device.pages import Moves
from kvcache.errors import Unavailable

TILE_BYTES = 16_384
PIECE_BYTES_MAX = 512
FINISH_CHUNKS = 8
_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}

# Layer ranges and strides do not make another kernel of it: what is known of their alignment is ALIGNED.
_NUMBERS = ["table_stride", "first", "planes", "page_stride", "head_stride", "token_stride"]

# A part of the planes begins anywhere in the list of their addresses.
_POINTERS = ["addresses"]

# What a kernel is to do.
GATHER, SCATTER, ONLY_SUM = 0, 1, 2
_GATHER = tl.constexpr(GATHER)
_ONLY_SUM = tl.constexpr(ONLY_SUM)

# Rows of the constants on the device, each eight u64: those of even lanes, then those of odd ones. The keys
# of the stripes of a round come first.
_LAST_KEY = tl.constexpr(16)
_SCRAMBLE = tl.constexpr(17)
_MERGE = tl.constexpr(18)
_START = tl.constexpr(19)


def gather(moves: Moves, slab: torch.Tensor, first: int, last: int) -> None:
    """As ``kvcache.device.gather.gather``, which has checked the arguments."""
    _launch_copy(moves, slab, first, last, GATHER)


def scatter(moves: Moves, slab: torch.Tensor, first: int, last: int) -> None:
    """As ``kvcache.device.gather.scatter``, which has checked the arguments."""
    _launch_copy(moves, slab, first, last, SCATTER)


def gather_and_sum(moves: Moves, slab: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """As ``kvcache.device.gather.gather_and_sum``. Two launches; more where rows are not whole stripes."""
    if sums_in_passing(moves, slab):
        return _launch_copy_and_sum(moves, slab, first, last, GATHER)
    gather(moves, slab, first, last)
    return _sum_pages(moves, first, last)


def scatter_and_sum(moves: Moves, slab: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """As ``kvcache.device.gather.scatter_and_sum``. Where rows are not whole stripes, what is in the pages
    then is summed."""
    if sums_in_passing(moves, slab):
        return _launch_copy_and_sum(moves, slab, first, last, SCATTER)
    scatter(moves, slab, first, last)
    return _sum_pages(moves, first, last)


def sum_chunks(
    slab: torch.Tensor, offsets: torch.Tensor, aligned: int, spec: BlockSpec, first: int, last: int
) -> torch.Tensor:
    """As ``kvcache.device.sums.sum_chunks``, which has checked the arguments. Two launches."""
    aligned = alignment(aligned, *_places(slab), spec.chunk_bytes)
    if not _can_sum(aligned, spec):
        return sums_twin.sum_in_slab(slab, offsets, spec, first, last)
    return _launch_sum(slab, offsets, offsets, spec, first, last, (0, 0, 0, 1, 1, 1, 1), aligned, ONLY_SUM)


def sums_in_passing(moves: Moves, slab: torch.Tensor) -> bool:
    """Are these bytes summed while they are moved? Else in a pass of their own."""
    cache, spec = moves.cache, moves.spec
    whole = cache.run_bytes % sums_twin.STRIPE_BYTES == 0 and spec.chunk_bytes % sums_twin.STRIPE_BYTES == 0
    return whole and _can_sum(alignment(cache.alignment, moves.alignment, *_places(slab)), spec)


def check(device: torch.device) -> None:
    """Compile some, and sum with them. RAISES Unavailable when that cannot be done, or the sums are wrong."""
    content = torch.arange(512, dtype=torch.int32).to(torch.uint8)
    wanted = sums_twin.sum_chunks(content[None], len(content))
    offsets = torch.zeros(1, dtype=torch.int64, device=device)
    try:
        found = sum_chunks(content.to(device), offsets, 16, BlockSpec(1, 1, 1, len(content)), 0, 1).cpu()
    except RuntimeError as error:
        why = str(error).partition("\n")[0]
        raise Unavailable("unavailable", "Triton cannot be used here", why, "install a C compiler") from error
    if not torch.equal(found, wanted):
        raise Unavailable("unavailable", "Triton cannot be used here", "it gives wrong sums", "update it")


@triton.jit
def _place(
    at, pages, page_stride, head_stride, token_stride,
    ROW: tl.constexpr, PAGE: tl.constexpr, HEAD: tl.constexpr, PER_BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Where words ``at`` of a plane of a block are in the plane of pages: multiples of ``ALIGNED`` words."""
    head = at // HEAD
    in_head = at % HEAD
    in_page = in_head % PAGE
    token = in_page // ROW
    page = tl.load(pages) if PER_BLOCK == 1 else tl.load(pages + in_head // PAGE)
    rows = page * page_stride + head.to(tl.int64) * head_stride + token.to(tl.int64) * token_stride
    # Said here, because what is said of the result of a call is lost when the call is inlined.
    if len(at.shape) == 1:
        return tl.multiple_of(rows + in_page % ROW, [ALIGNED])
    else:  # noqa: RET505 (Triton compiles what stands behind a return.)
        return tl.multiple_of(rows + in_page % ROW, [ALIGNED, ALIGNED])


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_POINTERS)
def _copy(
    slab, addresses, table, table_stride, first, planes, plane_words, page_stride, head_stride, token_stride,
    ROW: tl.constexpr, PAGE: tl.constexpr, HEAD: tl.constexpr, PER_BLOCK: tl.constexpr,
    PIECES: tl.constexpr, PIECE: tl.constexpr, ALIGNED: tl.constexpr, WORD_BYTES: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """Programs: block x plane x tile of ``PIECES`` pieces of ``PIECE`` words. Addresses are multiples of
    ``ALIGNED`` words."""
    tiles = tl.cdiv(plane_words, PIECES * PIECE)
    program = tl.program_id(0)
    plane = first + program // tiles % planes
    row = table + (program // tiles // planes).to(tl.int64) * table_stride
    starts = (program % tiles * PIECES + tl.arange(0, PIECES)) * PIECE
    place = _place(
        starts, row + 1, page_stride, head_stride, token_stride, ROW, PAGE, HEAD, PER_BLOCK, ALIGNED
    )
    words = tl.arange(0, PIECE)
    there = place[:, None] + words[None, :]
    base = tl.load(row) // WORD_BYTES + plane.to(tl.int64) * plane_words
    here = tl.multiple_of(base + starts, [ALIGNED])[:, None] + words[None, :]
    pages = tl.multiple_of(tl.load(addresses + plane).to(slab.dtype), ALIGNED * WORD_BYTES)
    mask = (starts < plane_words)[:, None]
    if KIND == _GATHER:
        tl.store(slab + here, tl.load(pages + there, mask=mask), mask=mask)
    else:
        tl.store(pages + there, tl.load(slab + here, mask=mask), mask=mask)


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_POINTERS)
def _copy_and_sum(
    slab, addresses, table, partials, constants, table_stride, first, planes, plane_chunks, chunk_words,
    page_stride, head_stride, token_stride,
    ROW: tl.constexpr, PAGE: tl.constexpr, HEAD: tl.constexpr, PER_BLOCK: tl.constexpr,
    ROUNDS: tl.constexpr, ALIGNED: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Programs: block x chunk x tile of ``ROUNDS`` rounds. Words are of 8 bytes."""
    rounds = tl.cdiv(chunk_words, 128)
    tiles = tl.cdiv(rounds, ROUNDS)
    program = tl.program_id(0)
    sum_at = program // tiles
    chunk = sum_at % (planes * plane_chunks)
    plane = first + chunk // plane_chunks
    row = table + (sum_at // (planes * plane_chunks)).to(tl.int64) * table_stride

    round_at = program % tiles * ROUNDS + tl.arange(0, ROUNDS)
    stripe = round_at[:, None] * 16 + tl.arange(0, 16)[None, :]
    last = (
        chunk_words - 1
    ) // 8  # The last stripe ends with the chunk, so it may begin within the one before.
    is_last = stripe == last
    in_chunk = tl.where(is_last, chunk_words - 8, stripe * 8)
    mask = stripe <= last
    in_plane = chunk % plane_chunks * chunk_words + in_chunk
    lane = tl.arange(0, 4)[None, None, :, None] * 2 + tl.arange(0, 2)[None, None, None, :]
    base = tl.load(row) // 8 + plane.to(tl.int64) * plane_chunks * chunk_words
    here = slab + (tl.multiple_of(base + in_plane, [ALIGNED, ALIGNED])[:, :, None, None] + lane)
    wide = mask[:, :, None, None]
    if KIND == _ONLY_SUM:
        data = tl.load(here, mask=wide, other=0)
    else:
        place = _place(
            in_plane, row + 1, page_stride, head_stride, token_stride, ROW, PAGE, HEAD, PER_BLOCK, ALIGNED
        )
        pages = tl.multiple_of(tl.load(addresses + plane).to(slab.dtype), 8 * ALIGNED)
        there = pages + (place[:, :, None, None] + lane)
        if KIND == _GATHER:
            data = tl.load(there, mask=wide, other=0)
            tl.store(here, data, mask=wide)
        else:
            data = tl.load(here, mask=wide, other=0)
            tl.store(there, data, mask=wide)

    even, odd = tl.split(data.to(tl.uint64, bitcast=True))
    quarter = tl.arange(0, 4)
    own = constants + tl.arange(0, 16)[None, :, None] * 8 + quarter[None, None, :]
    end = constants + _LAST_KEY * 8 + quarter[None, None, :]
    at_end, whole = is_last[:, :, None], mask[:, :, None]
    even_key = tl.where(at_end, _load_u64(end), _load_u64(own))
    odd_key = tl.where(at_end, _load_u64(end + 4), _load_u64(own + 4))
    even_sum = tl.sum(tl.where(whole, _product(even ^ even_key) + odd, 0), 1)
    odd_sum = tl.sum(tl.where(whole, _product(odd ^ odd_key) + even, 0), 1)
    out = partials + (sum_at.to(tl.int64) * rounds + round_at)[:, None] * 8 + quarter[None, :]
    kept = (round_at < rounds)[:, None]
    tl.store(out, even_sum.to(tl.int64, bitcast=True), mask=kept)
    tl.store(out + 4, odd_sum.to(tl.int64, bitcast=True), mask=kept)


@triton.jit(do_not_specialize=["count", "length"])
def _finish(partials, sums, constants, count, length, ROUNDS: tl.constexpr, CHUNKS: tl.constexpr):
    """Programs: ``CHUNKS`` chunks. Chains the rounds of each and stores its sum."""
    chunk = tl.program_id(0) * CHUNKS + tl.arange(0, CHUNKS)
    mask = chunk < count
    lane = tl.arange(0, 4)
    start = constants + _START * 8 + lane
    even = _load_u64(start)[None, :] + tl.zeros([CHUNKS, 4], tl.uint64)
    odd = _load_u64(start + 4)[None, :] + tl.zeros([CHUNKS, 4], tl.uint64)
    even_key = _load_u64(constants + _SCRAMBLE * 8 + lane)[None, :]
    odd_key = _load_u64(constants + _SCRAMBLE * 8 + 4 + lane)[None, :]
    part = partials + chunk.to(tl.int64)[:, None] * (ROUNDS * 8) + lane[None, :]
    wide = mask[:, None]
    for _ in tl.range(ROUNDS - 1, loop_unroll_factor=8):
        even += tl.load(part, mask=wide, other=0).to(tl.uint64, bitcast=True)
        odd += tl.load(part + 4, mask=wide, other=0).to(tl.uint64, bitcast=True)
        even = (even ^ (even >> 47) ^ even_key) * 0x9E3779B1
        odd = (odd ^ (odd >> 47) ^ odd_key) * 0x9E3779B1
        part += 8
    even += tl.load(part, mask=wide, other=0).to(tl.uint64, bitcast=True)
    odd += tl.load(part + 4, mask=wide, other=0).to(tl.uint64, bitcast=True)
    even ^= _load_u64(constants + _MERGE * 8 + lane)[None, :]
    odd ^= _load_u64(constants + _MERGE * 8 + 4 + lane)[None, :]
    total = tl.sum(even * odd ^ tl.umulhi(even, odd), 1) + length.to(tl.uint64) * 0x9E3779B185EBCA87
    total = (total ^ (total >> 37)) * 0x165667919E3779F9
    total = total ^ (total >> 32)
    tl.store(sums + chunk, total.to(tl.int64, bitcast=True), mask=mask)


@triton.jit
def _product(mixed):
    return (mixed & 0xFFFFFFFF) * (mixed >> 32)


@triton.jit
def _load_u64(at):
    return tl.load(at).to(tl.uint64, bitcast=True)


def _launch_copy(moves: Moves, slab: torch.Tensor, first: int, last: int, kind: int) -> None:
    cache, plane_bytes = moves.cache, moves.spec.plane_bytes
    run = cache.run_bytes
    piece = min(run & -run, PIECE_BYTES_MAX)
    aligned = alignment(piece, cache.alignment, moves.alignment, *_places(slab))
    size = min(aligned, 8)
    pieces = min(TILE_BYTES // piece, triton.next_power_of_2(plane_bytes // piece))
    grid = (moves.block_count * (last - first) * triton.cdiv(plane_bytes, pieces * piece),)
    with _on(slab):
        _copy[grid](
            _in_words(slab, size), cache.addresses, moves.table, moves.table.stride(0), first, last - first,
            plane_bytes // size, *_steps(moves, size),
            pieces, piece // size, aligned // size, size, kind,
        )  # fmt: skip


def _launch_copy_and_sum(moves: Moves, slab: torch.Tensor, first: int, last: int, kind: int) -> torch.Tensor:
    aligned = alignment(moves.cache.alignment, moves.alignment, *_places(slab))
    table, addresses = moves.table, moves.cache.addresses
    return _launch_sum(slab, table, addresses, moves.spec, first, last, _steps(moves, 8), aligned, kind)


def _launch_sum(
    slab: torch.Tensor,
    table: torch.Tensor,
    addresses: torch.Tensor,
    spec: BlockSpec,
    first: int,
    last: int,
    steps: tuple[int, ...],
    aligned: int,
    kind: int,
) -> torch.Tensor:
    per_plane, rounds = (
        spec.plane_bytes // spec.chunk_bytes,
        triton.cdiv(spec.chunk_bytes, sums_twin.ROUND_BYTES),
    )
    count = len(table) * (last - first) * per_plane
    tile = _tile_rounds(rounds)
    constants = _constants(slab.device)
    partials = torch.empty((count, rounds, 8), dtype=torch.int64, device=slab.device)
    sums = torch.empty(count, dtype=torch.int64, device=slab.device)
    with _on(slab):
        _copy_and_sum[(count * triton.cdiv(rounds, tile),)](
            _in_words(slab, 8), addresses, table, partials, constants, table.stride(0), first, last - first,
            per_plane, spec.chunk_bytes // 8, *steps, tile, aligned // 8, kind,
        )  # fmt: skip
        _finish[(triton.cdiv(count, FINISH_CHUNKS),)](
            partials, sums, constants, count, spec.chunk_bytes, rounds, FINISH_CHUNKS, num_warps=1
        )
    return sums.view(len(table), -1)


def _sum_pages(moves: Moves, first: int, last: int) -> torch.Tensor:
    """By way of memory that is nobody else's: others may write to a slab between two looks at it."""
    alone = moves.alone(first, last)
    blocks = torch.empty(alone.end, dtype=torch.uint8, device=alone.cache.device)
    gather(alone, blocks, 0, last - first)
    return sum_chunks(blocks, alone.offsets, alone.alignment, alone.spec, 0, last - first)


def _can_sum(aligned: int, spec: BlockSpec) -> bool:
    return aligned % 8 == 0 and spec.chunk_bytes > sums_twin.SHORT_BYTES_MAX


def _tile_rounds(rounds: int) -> int:
    """How many a program sums: a power of two that leaves little of the last tile empty."""
    widths = (16, 8, 4) if rounds > 2 else (rounds,)
    return min(widths, key=lambda width: (triton.cdiv(rounds, width) * width, -width))


def _steps(moves: Moves, size: int) -> tuple[int, ...]:
    """Strides of page, head and token, and bytes of row, page and head in a block, in words; pages a
    block."""
    cache, per_block = moves.cache, moves.pages_per_block
    row = cache.row_bytes // size
    strides = (cache.page_stride // size, cache.head_stride // size, cache.token_stride // size)
    return (*strides, row, row * cache.page_tokens, row * cache.page_tokens * per_block, per_block)


def _in_words(slab: torch.Tensor, size: int) -> torch.Tensor:
    return slab[: len(slab) // size * size].view(_WORDS[size])


def _places(slab: torch.Tensor) -> tuple[int, int]:
    return slab.data_ptr(), slab.storage_offset()


@contextmanager
def _on(slab: torch.Tensor) -> Iterator[None]:
    """Launches go to the current stream of this device. Triton compiles when it is first asked, with a C
    compiler and files of its own: RAISES RuntimeError for whatever goes wrong, as torch does."""
    try:
        with torch.cuda.device(slab.device) if slab.is_cuda else nullcontext():
            yield
    except (TritonError, SubprocessError, OSError) as error:
        raise RuntimeError(f"Triton: {type(error).__name__}: {error}") from error


@lru_cache(maxsize=64)
def _constants(device: torch.device) -> torch.Tensor:
    rows = [sums_twin.key_words(8 * stripe) for stripe in range(sums_twin.ROUND_STRIPES)]
    rows += [
        sums_twin.key_words(at) for at in (sums_twin.LAST_KEY, sums_twin.SCRAMBLE_KEY, sums_twin.MERGE_KEY)
    ]
    rows.append(list(sums_twin.START))
    words = [sums_twin.signed(word) for row in rows for word in row[0::2] + row[1::2]]
    return torch.tensor(words, dtype=torch.int64).to(device)
