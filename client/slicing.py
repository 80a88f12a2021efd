"""Loading some heads of every block: the chunks that cover them are taken and verified, the rest is left.

    sums of the blocks' chunks ◄── node          verified by the lease's checksums, as for whole blocks
    chunks that cover the heads ─► scratch ─► caller's memory        (straight there when they fit exactly)

A block comes out with all its sums when the chunks that were taken have theirs, and with none otherwise: so
one check, in ``operations``, decides about whole blocks and parts alike.

The sum: one round trip for 2 MiB of sums (of 64 planes of one chunk each: 4,096 blocks). Over the map, half
of the heads take 0.8 of the time of whole blocks where they are whole chunks; 1.5 where a plane is one chunk,
as all of it is read and the half is copied twice (benchmarks/bench_slices.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from kvcache.client.checks import batches, check_reply
from kvcache.client.local import Slab
from kvcache.client.remote import TRANSFER_BYTES
from kvcache.client.steps import Operation, ask, work
from kvcache.errors import BadInput
from kvcache.slices import Slice
from kvcache.sums import SUM_BYTES, copy_and_sum, sum_chunks
from kvcache.wire import PIECES_MAX, SUMS_BYTES_MAX, Blocks, ChunkSums, Read, Sums

if TYPE_CHECKING:
    from typing_extensions import Buffer

SCRATCH_BYTES: Final = 2 << 20


@dataclass(frozen=True, slots=True)
class Run:
    """Blocks ``first`` and on of a lease: at ``offsets`` in the slab, or, without one, over the wire."""

    cut: Slice
    lease_id: int
    first: int
    into: Sequence[Sequence[memoryview]]
    slab: Slab | None
    offsets: Sequence[int]


def flat_slices(blocks: Sequence[Sequence[Buffer]], cut: Slice) -> list[list[memoryview]]:
    """Each block's pieces as flat byte views. RAISES BadInput when they do not make up the slice."""
    flat: list[list[memoryview]] = []
    for index, block in enumerate(blocks):
        try:
            views = [memoryview(piece).cast("B") for piece in block]
        except (TypeError, ValueError) as error:
            raise BadInput(
                "bad_block", f"a piece of block {index} cannot be used", str(error), "pass contiguous memory"
            ) from error
        if sum(map(len, views)) != cut.block_bytes or any(len(view) % cut.length for view in views):
            raise BadInput(
                "bad_block",
                f"block {index} has pieces of {[len(view) for view in views][:8]} bytes",
                f"{cut.count} heads of a block have {cut.block_bytes} bytes, {cut.length} in each plane",
                "pass room for the slice, in one piece or plane by plane",
            )
        if any(view.readonly for view in views):
            raise BadInput("bad_block", f"block {index} is read-only", "it is to be loaded into")
        flat.append(views)
    return flat


def load(run: Run) -> Operation[list[bytes]]:
    """Fill. Returns for each block all its sums, as the node tells them, if what was taken has them; else
    nothing. RAISES Unavailable; BadInput when the node refuses, or (bad_block) memory overlaps."""
    if run.slab is not None:
        run.slab.warm()
    cover, spec = run.cut.cover, run.cut.spec
    sums_bytes = spec.chunk_count * SUM_BYTES
    told: list[bytes] = []
    for part in batches(range(len(run.into)), max(1, SUMS_BYTES_MAX // sums_bytes)):
        reply = yield from ask(ChunkSums, Sums(run.lease_id, run.first + part[0], len(part)))
        check_reply(len(reply.sums) == len(part) * sums_bytes, "not one sum a chunk")
        told += [reply.sums[at : at + sums_bytes] for at in range(0, len(reply.sums), sums_bytes)]
    taken: list[bytes] = []
    scratch = _scratch(run)
    for part in batches(range(len(run.into)), _blocks_a_step(run)):
        sums = yield from _fill(run, part, scratch)
        taken += [sums[at : at + cover.sums_bytes] for at in range(0, len(sums), cover.sums_bytes)]
    return [sums if found == cover.sums_of(sums) else b"" for sums, found in zip(told, taken, strict=True)]


def _blocks_a_step(run: Run) -> int:
    cover = run.cut.cover
    most = TRANSFER_BYTES if run.cut.is_exact else SCRATCH_BYTES
    return max(1, min(most // cover.block_bytes, PIECES_MAX // cover.spec.plane_count))


def _scratch(run: Run) -> memoryview:
    """Room for the covering chunks of one step; none where they go straight to the caller's memory."""
    cover = run.cut.cover
    count = 0 if run.cut.is_exact else min(_blocks_a_step(run), len(run.into))
    return memoryview(bytearray(count * cover.block_bytes))


def _fill(run: Run, part: Sequence[int], scratch: memoryview) -> Operation[bytes]:
    """Blocks ``part`` of the run. Returns the sums of the chunks that were taken."""
    cover, chunk_bytes = run.cut.cover, run.cut.spec.chunk_bytes
    into = run.into[part[0] : part[-1] + 1]
    room = scratch[: len(part) * cover.block_bytes]
    if run.slab is None:
        pieces = [piece for block in into for piece in block] if run.cut.is_exact else [room]
        request = Read(run.lease_id, run.first + part[0], len(part), cover.offset, cover.length)
        reply = yield from ask(Blocks, request, (), pieces)
        check_reply(reply.count == len(part), f"{len(part)} blocks were asked for, {reply.count} came")
        return (yield from work(lambda: _kept(run, sum_chunks(pieces, chunk_bytes), room, into)))
    slots = run.slab.slots(run.offsets[part[0] : part[-1] + 1], cover.spec.block_bytes)
    sources = _cut([cover.pieces(slot) for slot in slots], cover.length)
    pieces = _cut(into if run.cut.is_exact else [[room]], cover.length)
    return (yield from work(lambda: _kept(run, copy_and_sum(sources, pieces, chunk_bytes), room, into)))


def _kept(run: Run, sums: bytes, room: memoryview, into: Sequence[Sequence[memoryview]]) -> bytes:
    """What is wanted of the scratch, into the caller's memory. Returns ``sums``, those of the scratch."""
    if room:
        cut, cover = run.cut, run.cut.cover
        lead = cut.offset - cover.offset
        wanted = [room[at : at + cut.length] for at in range(lead, len(room), cover.length)]
        copy_and_sum(wanted, _cut(into, cut.length), cut.length)
    return sums


def _cut(blocks: Sequence[Sequence[memoryview]], length: int) -> list[memoryview]:
    """The pieces of blocks in pieces of ``length``."""
    pieces = [piece for block in blocks for piece in block]
    return [piece[at : at + length] for piece in pieces for at in range(0, len(piece), length)]
