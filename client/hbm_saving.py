"""Saving from a device, as operations: into HBM as far as it takes the blocks, else all into host memory.

    HBM     reserve ── device to device, summed there ────────────► commit
    host    reserve ── over the link, summed before it and behind ─► the same sums? commit : abort

Host memory holds whole prefixes, as HBM does: what HBM does not take goes there with what stands before it,
but for what is there already. The store then holds what the better of the two does.

The sum: the link is the limit, 50 GB/s; summing once more behind it takes one core 1 ms for 32 MiB, and finds
what a copy over the link did wrong before anybody reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from kvcache.block import BlockHash
from kvcache.client import remote
from kvcache.client.checks import check_save, joined_hashes
from kvcache.client.hbm import DeviceBlocks, DeviceWriting
from kvcache.client.link import Context
from kvcache.client.operations import blocks_a_batch, count_saved, fill, reserve, unsaved_by
from kvcache.client.steps import Operation, pause, work
from kvcache.client.store import Handle, SaveHints
from kvcache.errors import BadInput, KVCacheError, Unavailable
from kvcache.sums import sum_chunks
from kvcache.wire import HBM, HOST, Reserved

BATCH_BYTES: Final = 256 << 20
"""What is copied in one step: an interrupt waits for no more."""


def save(
    context: Context,
    handle: Handle,
    prefix: Sequence[BlockHash],
    blocks: DeviceBlocks,
    parent: bytes,
    hints: SaveHints,
) -> Operation[int]:
    check_blocks(handle, prefix, blocks, parent)
    if not context.reaches(handle):
        context.tally.add("unsaved_blocks:unavailable", len(prefix))
        return 0
    held, reason = 0, ""
    if takes_hbm(context, hints):
        held, reason = yield from _save_to(HBM, context, handle, prefix, blocks, parent, hints)
        context.tally.add(f"hbm_unsaved_blocks:{reason}", len(prefix) - held)
    if held < len(prefix):
        below, reason = yield from _save_to(HOST, context, handle, prefix, blocks, parent, hints)
        held = max(held, below)
    if held < len(prefix):
        context.tally.add(f"unsaved_blocks:{reason}", len(prefix) - held)
    return held


def check_blocks(handle: Handle, prefix: Sequence[BlockHash], blocks: DeviceBlocks, parent: bytes) -> None:
    """What is to be saved, before anybody is asked. RAISES BadInput."""
    blocks.check(handle.spec)
    joined_hashes(prefix)
    check_save(prefix, range(len(blocks)), parent)


def takes_hbm(context: Context, hints: SaveHints) -> bool:
    """Is HBM to be asked for room? Else host memory alone."""
    mapped = context.link.hbm
    return mapped is not None and not mapped.is_lost and not hints.below


def _save_to(
    tier: str,
    context: Context,
    handle: Handle,
    prefix: Sequence[BlockHash],
    blocks: DeviceBlocks,
    parent: bytes,
    hints: SaveHints,
) -> Operation[tuple[int, str]]:
    """How many leading blocks this tier holds now, and if not all, why. It is asked again for as long as it
    takes some: behind those there may be others that it holds."""
    held, step = 0, blocks_a_step(context, handle, tier)
    while held < len(prefix):
        batch = prefix[held : held + step]
        count, reason = yield from _save_batch(tier, context, handle, batch, blocks, held, parent, hints)
        held += count
        if count < len(batch) and (not count or reason not in ("busy", "full")):
            return held, reason
        parent = batch[count - 1]
    return held, ""


def blocks_a_step(context: Context, handle: Handle, tier: str) -> int:
    """Over the wire they go by way of a buffer, which is no larger than one call's."""
    size = handle.spec.block_bytes
    is_near = tier == HBM or context.link.slab is not None
    most = BATCH_BYTES // size if is_near else remote.blocks_a_call(size)
    return min(blocks_a_batch(handle.spec), max(1, most))


def _save_batch(
    tier: str,
    context: Context,
    handle: Handle,
    batch: Sequence[BlockHash],
    blocks: DeviceBlocks,
    at: int,
    parent: bytes,
    hints: SaveHints,
) -> Operation[tuple[int, str]]:
    """How many leading blocks of the batch, which are those of ``blocks`` from ``at`` on, are held now, and
    if not all, why."""
    try:
        reserved = yield from reserve(handle, batch, parent, hints, tier)
    except (Unavailable, BadInput) as error:
        context.missed(error)
        return 0, unsaved_by(error)
    if reserved.count:
        write = _into_hbm if tier == HBM else _into_host
        writing = write(context, handle, reserved, blocks, at + reserved.start)
        reason = yield from fill(context, reserved, writing, tier)
        if reason:
            return reserved.start, reason
        count_saved(context, handle, reserved.count)
        if tier == HBM:
            context.tally.add("hbm_saved_blocks", reserved.count)
    end = reserved.start + reserved.count
    return end, reserved.reason if reserved.reason in ("busy", "full") else "full"


def _into_hbm(
    context: Context, handle: Handle, reserved: Reserved, blocks: DeviceBlocks, at: int
) -> Operation[bytes]:
    """RAISES BadInput when the device did not copy them: the node lives, and is to be told."""
    mapped = context.link.hbm
    assert mapped is not None
    writing = yield from begun(context, partial(blocks.into_slab, mapped.incarnation, reserved.offsets, at))
    return (yield from written(context, writing, handle))


def _into_host(
    context: Context, handle: Handle, reserved: Reserved, blocks: DeviceBlocks, at: int
) -> Operation[bytes]:
    """Into the map, or by way of a buffer over the wire. RAISES as ``_into_hbm``; Unavailable."""
    spec, slots = handle.spec, mapped_slots(context, handle, reserved)
    views = slots or [memoryview(bytearray(spec.block_bytes)) for _ in range(reserved.count)]
    writing = yield from begun(context, partial(blocks.into_host, views, at))
    meant = yield from written(context, writing, handle)
    if slots:
        found = yield from work(partial(sum_chunks, views, spec.chunk_bytes))
    else:
        pieces = [[view] for view in views]
        found = yield from remote.save(reserved.reservation, pieces, spec.block_bytes, spec.chunk_bytes)
    check_arrived(context, meant, found)
    return found


def mapped_slots(context: Context, handle: Handle, reserved: Reserved) -> list[memoryview]:
    """What was reserved, in the map; none: it is not there."""
    slab = context.link.slab
    if slab is None or not reserved.offsets or min(reserved.offsets) < 0:
        return []
    slab.warm()
    return slab.slots(reserved.offsets, handle.spec.block_bytes)


def begun(context: Context, begin: Callable[[], DeviceWriting]) -> Operation[DeviceWriting]:
    """RAISES BadInput when the device will not copy."""
    made: list[DeviceWriting] = []

    def beginning() -> bytes:
        made.append(begin())
        context.link.writes(made[0])
        return b""

    try:
        yield from work(beginning)
    except KVCacheError as error:
        raise not_copied(error) from error
    return made[0]


def written(context: Context, writing: DeviceWriting, handle: Handle) -> Operation[bytes]:
    """Copy all that is left, and end. Returns the sums. RAISES BadInput as ``begun``, Unavailable as
    ``ended``."""
    try:
        sums = yield from _copied(writing, handle)
    except GeneratorExit:
        raise  # The driver gave up the connection, and ends what the link knows of.
    except BaseException:
        yield from ended(context, writing)
        raise
    yield from ended(context, writing)
    return sums


def ended(context: Context, writing: DeviceWriting) -> Operation[None]:
    """Nothing of it runs any more: only then may the node be told so. RAISES Unavailable when that is not
    known: the reservation ends with the connection, and its slots wait for the end of the process."""
    try:
        yield from work(partial(_end, writing))
    except (KVCacheError, GeneratorExit):
        raise
    except BaseException:  # Who is cancelled waits too.
        yield from ended(context, writing)
        raise
    context.link.wrote(writing)


def _copied(writing: DeviceWriting, handle: Handle) -> Operation[bytes]:
    """RAISES BadInput as ``begun``."""
    try:
        writing.advance(handle.spec.plane_count)
        while not writing.is_done:
            if delay_ns := writing.delay_ns():
                yield from pause(delay_ns)
            else:
                yield from work(writing.go_on)
        return writing.sums()
    except KVCacheError as error:
        raise not_copied(error) from error


def _end(writing: DeviceWriting) -> bytes:
    writing.end()
    return b""


def check_arrived(context: Context, meant: bytes, found: bytes) -> None:
    """RAISES BadInput when the bytes behind the link are not those before it: nobody is to read them."""
    if meant != found:
        context.tally.add("failed_copies")
        raise BadInput("bad_block", "bytes that changed between device and host", "their sums differ")


def not_copied(error: KVCacheError) -> BadInput:
    return BadInput("bad_block", "the device did not copy them", error.what)
