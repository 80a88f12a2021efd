"""Saving from a device while blocks are computed: as ``layered``, with the device's own copies.

    begin (reserve in HBM, else in host memory) --> advance (queue what is ready) ... --> finish (commit)
         |                                                                                  ^
         +-- no room, no map, the device or the connection lost: nothing is copied ---------+--> save_device

Copies run on between the calls. So the link knows of them: nothing that they could write to is given back,
and no connection is said to have ended its writes, before they have ended. Whatever goes wrong before
``finish`` costs the head start and no block. Peers are told of nothing before that.

The sum: an advance costs the engine's thread 0.1 ms, and none of the waiting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from kvcache.block import BlockHash
from kvcache.client import hbm_saving, operations
from kvcache.client.hbm import DeviceBlocks, DeviceWriting
from kvcache.client.layered import check_planes
from kvcache.client.link import Context
from kvcache.client.steps import Operation, work
from kvcache.client.store import Handle, SaveHints
from kvcache.errors import BadInput, KVCacheError, Unavailable
from kvcache.sums import sum_chunks
from kvcache.wire import HBM, HOST, Reserved


@dataclass(slots=True)
class Draft:
    """One save under way. ``begun`` is None when nothing is reserved (any more) for it. ``unplaced``: the
    device did not say behind what some planes are ready, so nobody may read them."""

    handle: Handle
    prefix: Sequence[BlockHash]
    blocks: DeviceBlocks
    parent: bytes
    hints: SaveHints
    begun: Begun | None = None
    ready: int = 0
    ended: bool = False
    unplaced: bool = False


@dataclass(frozen=True, slots=True)
class Begun:
    """``connection`` is the link that holds the reservation; ``views`` are its slots in host memory."""

    tier: str
    reserved: Reserved
    views: Sequence[memoryview]
    writing: DeviceWriting
    connection: int


def begin(
    context: Context,
    handle: Handle,
    prefix: Sequence[BlockHash],
    blocks: DeviceBlocks,
    parent: bytes,
    hints: SaveHints,
) -> Operation[Draft]:
    """RAISES BadInput as ``hbm_saving.save``."""
    hbm_saving.check_blocks(handle, prefix, blocks, parent)
    draft = Draft(handle, tuple(prefix), blocks, parent, hints)
    if not prefix or not context.reaches(handle):
        return draft
    if hbm_saving.takes_hbm(context, hints):
        yield from _begin_in(HBM, context, draft)
    if draft.begun is None and context.link.slab is not None:
        yield from _begin_in(HOST, context, draft)
    return draft


def advance(context: Context, draft: Draft, planes: int) -> Operation[None]:
    """RAISES BadInput when ``planes`` goes back or beyond the block, and when the save has ended."""
    check_planes(draft.handle.spec, draft.ended, draft.ready, planes)
    draft.ready = planes
    try:
        draft.blocks.follow()  # Also where nothing is begun: whoever finishes may have another stream.
    except Unavailable:
        draft.unplaced = True
        yield from _give_up(context, draft)
    begun = _begun(context, draft)
    if begun is None:
        return
    try:
        begun.writing.advance(planes)
    except Unavailable:
        yield from _give_up(context, draft)


def finish(context: Context, draft: Draft) -> Operation[int]:
    """How many leading blocks are held now. RAISES BadInput when the save has ended."""
    check_planes(draft.handle.spec, draft.ended, draft.ready, draft.ready)
    draft.ended = True
    held, handle, begun = 0, draft.handle, _begun(context, draft)
    if begun is not None:
        reason = yield from operations.fill(
            context, begun.reserved, _written(context, draft, begun), begun.tier
        )
        if not reason:
            count = begun.reserved.count
            operations.count_saved(context, handle, count)
            context.tally.add("streamed_blocks", count)
            context.tally.add("hbm_saved_blocks", count if begun.tier == HBM else 0)
            held = begun.reserved.start + count
    if held < len(draft.prefix) and not draft.unplaced:
        saving = hbm_saving.save(context, handle, draft.prefix, draft.blocks, draft.parent, draft.hints)
        held = max(held, (yield from saving))
    return held


def abort(context: Context, draft: Draft) -> Operation[None]:
    """Does nothing after the end."""
    if not draft.ended:
        draft.ended = True
        yield from _give_up(context, draft)


# --- helpers ------------------------------------------------------------------------------------------


def _begin_in(tier: str, context: Context, draft: Draft) -> Operation[None]:
    """HBM has to take all of the batch: else what is left would go to host memory, and these with it."""
    batch = draft.prefix[: hbm_saving.blocks_a_step(context, draft.handle, tier)]
    try:
        reserved = yield from operations.reserve(draft.handle, batch, draft.parent, draft.hints, tier)
    except (Unavailable, BadInput) as error:
        context.missed(error)
        return
    if not reserved.count:
        return
    try:
        if tier == HBM and reserved.start + reserved.count < len(batch):
            raise BadInput("bad_block", "not all of it", "")
        draft.begun = yield from _writing(tier, context, draft, reserved)
    except KVCacheError:
        yield from operations.abort(reserved.reservation, tier)
    except GeneratorExit:
        raise  # The driver gave up the connection, and the node aborts.
    except BaseException:
        yield from operations.abort(reserved.reservation, tier)
        raise


def _writing(tier: str, context: Context, draft: Draft, reserved: Reserved) -> Operation[Begun]:
    """RAISES BadInput when the device will not copy, or there is no map of the slots."""
    link = context.link
    if tier == HBM:
        assert link.hbm is not None
        begin, views = partial(draft.blocks.into_slab, link.hbm.incarnation, reserved.offsets), []
    else:
        views = hbm_saving.mapped_slots(context, draft.handle, reserved)
        if not views:
            raise BadInput("bad_block", "slots that are not in the map", "")
        begin = partial(draft.blocks.into_host, views)
    writing = yield from hbm_saving.begun(context, partial(begin, reserved.start))
    return Begun(tier, reserved, views, writing, link.number)


def _begun(context: Context, draft: Draft) -> Begun | None:
    """What is reserved for it still. A reservation ends with its connection, which has ended the copies."""
    if draft.begun is not None and draft.begun.connection != context.link.number:
        draft.begun = None
    return draft.begun


def _written(context: Context, draft: Draft, begun: Begun) -> Operation[bytes]:
    """RAISES BadInput when the device did not copy them, or the link brought other bytes."""
    meant = yield from hbm_saving.written(context, begun.writing, draft.handle)
    if begun.tier == HOST:
        found = yield from work(partial(sum_chunks, begun.views, draft.handle.spec.chunk_bytes))
        hbm_saving.check_arrived(context, meant, found)
    return meant


def _give_up(context: Context, draft: Draft) -> Operation[None]:
    begun, draft.begun = _begun(context, draft), None
    if begun is not None:
        try:
            yield from hbm_saving.ended(context, begun.writing)
            yield from operations.abort(begun.reserved.reservation, begun.tier)
        except Unavailable as error:
            context.missed(error)
        except GeneratorExit:
            raise  # As above.
        except BaseException:  # Cancelled: only now has it ended.
            yield from operations.abort(begun.reserved.reservation, begun.tier)
            raise
