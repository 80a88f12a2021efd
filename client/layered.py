"""Saving blocks while they are computed: their planes are copied as they are ready, and the node is told.

    begin (reserve) --> advance (copy, sum, tell the node) ... --> finish (copy the rest, commit)
         |                    |                                        ^
         |                    +--> abort: the slots are given back     |
         +-- no room, no map, connection lost: nothing is copied ------+--> an ordinary save of all

Telling publishes nothing at this node: it lets a peer read ahead, plane after plane, what only ``finish``
publishes here. A peer that has every plane publishes its copy by itself: so tell of what is final. Whatever
goes wrong before ``finish`` costs the head start and no block. The bytes stay in the caller's
memory until ``finish``, which can therefore always fall back to an ordinary save; so it does over the
wire, where blocks go whole.

The sum: an advance is a copy at memory speed and one call to the node, 80 us. So planes are kept until there
are ``STEP_BYTES`` of them (about 1 ms of copying) or ``1 / STEPS_MIN`` of all planes, whichever comes first:
at most ``STEPS_MIN`` calls beside those that their own copies hide. Around a copy Python spends about 1 us a
block and plane. In all, 16 blocks of 2 MiB take about 4 ms, in place of 3 ms in one piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from kvcache.block import BlockHash, BlockSpec
from kvcache.client import operations
from kvcache.client.checks import batches, check_save, flat_blocks, joined_hashes
from kvcache.client.link import Context
from kvcache.client.steps import Operation, ask, work
from kvcache.client.store import Handle, SaveHints
from kvcache.errors import BadInput, KVCacheError, Unavailable
from kvcache.sums import SUM_BYTES, copy_and_sum
from kvcache.wire import Advance, Done, Reserved

if TYPE_CHECKING:
    from typing_extensions import Buffer

STEP_BYTES: Final = 8 << 20
STEPS_MIN: Final = 8


@dataclass(slots=True)
class Draft:
    """One save under way.

    ``is_planar``: each block is in pieces of one plane. ``reserved`` is None when nothing is reserved (any
    more) for it; ``connection`` is the link that holds the reservation. ``sums[i]`` are those of the planes
    of the i-th copy, block-major.
    """

    handle: Handle
    prefix: Sequence[BlockHash]
    blocks: Sequence[list[memoryview]]
    parent: bytes
    hints: SaveHints
    is_planar: bool
    reserved: Reserved | None = None
    connection: int = 0
    tells: bool = True
    told: bool = False
    ready: int = 0
    copied: int = 0
    sums: list[bytes] = field(default_factory=list)
    ended: bool = False


def begin(
    context: Context,
    handle: Handle,
    prefix: Sequence[BlockHash],
    blocks: Sequence[Sequence[Buffer]],
    parent: bytes,
    hints: SaveHints,
) -> Operation[Draft]:
    """RAISES BadInput as ``operations.save``."""
    views = flat_blocks(blocks, handle.spec, writable=False)
    joined_hashes(prefix)
    check_save(prefix, views, parent)
    is_planar = {len(piece) for block in views for piece in block} == {handle.spec.plane_bytes}
    draft = Draft(handle, tuple(prefix), views, parent, hints, is_planar)
    if not prefix or context.link.slab is None or not context.reaches(handle):
        return draft
    batch = next(batches(prefix, operations.blocks_a_batch(handle.spec)))
    try:
        reserved = yield from operations.reserve(handle, batch, parent, hints)
    except (Unavailable, BadInput) as error:
        context.missed(error)
        return draft
    if not reserved.count:
        return draft
    if not reserved.offsets or min(reserved.offsets) < 0:
        yield from operations.abort(reserved.reservation)
        return draft
    draft.reserved, draft.connection = reserved, context.link.number
    return draft


def advance(context: Context, draft: Draft, planes: int) -> Operation[None]:
    """RAISES BadInput when ``planes`` goes back or beyond the block, and when the save has ended."""
    spec = draft.handle.spec
    check_planes(spec, draft.ended, draft.ready, planes)
    draft.ready = planes
    reserved = _reserved(context, draft)
    fresh = planes - draft.copied
    enough = fresh * spec.plane_bytes * (reserved.count if reserved else 0) >= STEP_BYTES
    if reserved is None or not fresh or not (enough or fresh * STEPS_MIN >= spec.plane_count):
        return
    try:
        sums = yield from _copied(context, draft, reserved, planes)
        if draft.tells:
            yield from _tell(context, draft, Advance(reserved.reservation, planes, sums))
    except Unavailable as error:
        context.missed(error)
        draft.reserved = None
    except BadInput:
        draft.reserved = None
        yield from operations.abort(reserved.reservation)
    except GeneratorExit:
        raise  # The driver gave up the connection, and the node aborts.
    except BaseException:
        draft.reserved = None
        yield from operations.abort(reserved.reservation)
        raise


def finish(context: Context, draft: Draft) -> Operation[int]:
    """How many leading blocks are held now. RAISES BadInput when the save has ended."""
    check_planes(draft.handle.spec, draft.ended, draft.ready, draft.ready)
    draft.ended = True
    held, handle = 0, draft.handle
    if reserved := _reserved(context, draft):
        reason = yield from operations.fill(context, reserved, _all_sums(context, draft, reserved))
        if reason:
            context.tally.add(f"unsaved_blocks:{reason}", len(draft.prefix) - reserved.start)
            return reserved.start
        operations.count_saved(context, handle, reserved.count)
        context.tally.add("streamed_blocks", reserved.count if draft.told else 0)
        held = reserved.start + reserved.count
    if held < len(draft.prefix):
        parent = draft.prefix[held - 1] if held else draft.parent
        rest, blocks = draft.prefix[held:], draft.blocks[held:]
        held += yield from operations.save(context, handle, rest, blocks, parent, draft.hints)
    return held


def abort(context: Context, draft: Draft) -> Operation[None]:
    """Does nothing after the end."""
    reserved, draft.ended = None if draft.ended else _reserved(context, draft), True
    if reserved is not None:
        draft.reserved = None
        yield from operations.abort(reserved.reservation)


# --- helpers ------------------------------------------------------------------------------------------


def check_planes(spec: BlockSpec, ended: bool, ready: int, planes: int) -> None:
    """RAISES BadInput when a save that has ended goes on, or ``planes`` goes back or beyond the block."""
    if ended:
        raise BadInput(
            "bad_reservation", "this save has ended", "it was finished or aborted", "begin another"
        )
    if not ready <= planes <= spec.plane_count:
        raise BadInput(
            "bad_block",
            f"{planes} planes after {ready}",
            f"planes only become more, up to {spec.plane_count}",
            "pass how many leading planes of every block are ready",
        )


def _reserved(context: Context, draft: Draft) -> Reserved | None:
    """What is reserved for it still. A reservation ends with its connection, at the node too."""
    if draft.connection != context.link.number:
        draft.reserved = None
    return draft.reserved


def _copied(context: Context, draft: Draft, reserved: Reserved, planes: int) -> Operation[bytes]:
    """Copy the planes up to ``planes`` that were not copied yet; their sums. RAISES Unavailable, BadInput."""
    slab, spec = context.link.slab, draft.handle.spec
    assert slab is not None, "a reservation in the map goes with its connection"
    span = (draft.copied * spec.plane_bytes, planes * spec.plane_bytes)
    blocks = draft.blocks[reserved.start : reserved.start + reserved.count]
    if draft.is_planar:
        sources = [block[draft.copied : planes] for block in blocks]
    else:
        sources = [_cut(block, draft.copied, planes, spec) for block in blocks]
    targets = _targets(slab.slots(reserved.offsets, spec.block_bytes), sources, span)
    flat = [piece for block in sources for piece in block]
    slab.warm()
    sums = yield from work(lambda: copy_and_sum(flat, targets, spec.chunk_bytes))
    draft.sums.append(sums)
    draft.copied = planes
    return sums


def _targets(
    slots: Sequence[memoryview], sources: Sequence[Sequence[memoryview]], span: tuple[int, int]
) -> list[memoryview]:
    """The same span of each slot, cut like the sources."""
    cut: list[memoryview] = []
    for slot, block in zip(slots, sources, strict=True):
        at = span[0]
        for piece in block:
            cut.append(slot[at : at + len(piece)])
            at += len(piece)
        assert at == span[1]
    return cut


def _cut(block: Sequence[memoryview], start: int, end: int, spec: BlockSpec) -> list[memoryview]:
    """The planes from ``start`` to ``end`` of a block, in pieces."""
    cut: list[memoryview] = []
    first_byte, last_byte, at = start * spec.plane_bytes, end * spec.plane_bytes, 0
    for piece in block:
        first, last = max(first_byte - at, 0), min(last_byte - at, len(piece))
        if first < last:
            cut.append(piece[first:last])
        at += len(piece)
    return cut


def _tell(context: Context, draft: Draft, message: Advance) -> Operation[None]:
    """A node that will not hear it loses only the head start. RAISES Unavailable."""
    try:
        yield from ask(Done, message)
        draft.told = True
        context.tally.add("advances")
    except Unavailable:
        raise
    except KVCacheError:
        draft.tells = False
        context.tally.add("refused_advances")


def _all_sums(context: Context, draft: Draft, reserved: Reserved) -> Operation[bytes]:
    """Copy what is missing. Returns the sums of whole blocks. RAISES Unavailable, BadInput."""
    spec = draft.handle.spec
    if draft.copied < spec.plane_count:
        yield from _copied(context, draft, reserved, spec.plane_count)
    steps = [len(sums) // reserved.count for sums in draft.sums]
    assert sum(steps) == spec.chunk_count * SUM_BYTES, "every chunk once"
    return b"".join(
        sums[at * step : (at + 1) * step]
        for at in range(reserved.count)
        for sums, step in zip(draft.sums, steps, strict=True)
    )
