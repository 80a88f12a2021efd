"""Loading to a device and saving from it, as operations: the rules of ``operations``, and one more.

A block that cannot be had from HBM, for whatever reason, is had from below: it is leased again without HBM,
and copied from host memory. So a flipped byte, a slab that is gone or a device that will not copy from it
costs time, and the node withdraws from HBM what was reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import groupby
from typing import Final

from kvcache.block import BlockHash
from kvcache.client import leasing, remote
from kvcache.client.checks import batches, check_save, joined_hashes
from kvcache.client.hbm import DeviceBlocks
from kvcache.client.link import Context
from kvcache.client.operations import (
    blocks_a_batch,
    count_saved,
    fill,
    reserve,
    split_sums,
    unsaved_by,
    verified,
)
from kvcache.client.steps import Operation, work
from kvcache.client.store import LEASE_MS, LEASE_WAIT_MS, Grant, Handle, Lease, SaveHints
from kvcache.errors import BadInput, KVCacheError, Unavailable
from kvcache.wire import HBM, Reserved

BATCH_BYTES: Final = 256 << 20
"""What is copied in one step: an interrupt waits for no more."""


def load(context: Context, held: Lease, into: DeviceBlocks, start: int) -> Operation[frozenset[int]]:
    into.check(held.handle.spec)
    end = start + len(into)
    if start < 0 or end > held.count:
        raise BadInput(
            "bad_lease",
            f"blocks {start} to {end} of a lease of {held.count}",
            "they are not in it",
            "load within the lease",
        )
    failed: set[int] = set()
    for grant in held.grants:
        first, last = max(start, grant.start), min(end, grant.start + grant.count)
        if first >= last:
            continue
        if grant.tier == HBM:
            lost = yield from _from_hbm(context, held, grant, range(first, last), into, first - start)
            context.tally.add("hbm_loaded_blocks", last - first - len(lost))
            failed |= yield from _from_below(context, held, sorted(lost), into, start)
        else:
            failed |= yield from _from_host(context, held, grant, range(first, last), into, first - start)
    loaded = len(into) - len(failed)
    context.tally.add("loaded_blocks", loaded)
    context.tally.add("loaded_bytes", loaded * held.handle.spec.block_bytes)
    return frozenset(failed)


def save(
    context: Context,
    handle: Handle,
    prefix: Sequence[BlockHash],
    blocks: DeviceBlocks,
    parent: bytes,
    hints: SaveHints,
) -> Operation[int]:
    blocks.check(handle.spec)
    joined_hashes(prefix)
    check_save(prefix, range(len(blocks)), parent)
    if context.link.hbm is None or not context.reaches(handle):
        context.tally.add(f"unsaved_blocks:{'unavailable' if context.away else 'no_hbm'}", len(prefix))
        return 0
    held = 0
    step = min(blocks_a_batch(handle.spec), max(1, BATCH_BYTES // handle.spec.block_bytes))
    for batch in batches(prefix, step):
        count, reason = yield from _save_batch(context, handle, batch, blocks, held, parent, hints)
        held += count
        if count < len(batch):
            context.tally.add(f"unsaved_blocks:{reason}", len(prefix) - held)
            break
        parent = batch[-1]
    return held


# --- load ---------------------------------------------------------------------------------------------


def _from_hbm(
    context: Context, held: Lease, grant: Grant, positions: Sequence[int], into: DeviceBlocks, at: int
) -> Operation[set[int]]:
    """Blocks of this grant, which goes to ``into`` from ``at`` on. Returns the positions that failed."""
    failed: set[int] = set()
    spec = held.handle.spec
    for part in batches(positions, max(1, BATCH_BYTES // spec.block_bytes)):
        first = part[0] - grant.start
        offsets = grant.offsets[first : first + len(part)]
        copying = partial(into.load, grant.incarnation, offsets, at + part[0] - positions[0])
        failed |= yield from verified(context, held, grant, part, split_sums(spec, work(copying)))
    return failed


def _from_host(
    context: Context, held: Lease, grant: Grant, positions: Sequence[int], into: DeviceBlocks, at: int
) -> Operation[set[int]]:
    """As ``_from_hbm``, by way of host memory: the map where the block lies in it, else the wire."""
    failed: set[int] = set()
    spec, slab = held.handle.spec, context.link.slab
    steps = [
        (slab is not None and bool(grant.offsets) and grant.offsets[at - grant.start] >= 0, at)
        for at in positions
    ]
    for is_mapped, run in groupby(steps, lambda step: step[0]):
        most = BATCH_BYTES // spec.block_bytes if is_mapped else remote.blocks_a_call(spec.block_bytes)
        for part in batches([position for _, position in run], max(1, most)):
            place = at + part[0] - positions[0]
            bringing = _brought(context, held, grant, part, into, place, is_mapped)
            failed |= yield from verified(context, held, grant, part, split_sums(spec, bringing))
    return failed


def _brought(
    context: Context,
    held: Lease,
    grant: Grant,
    positions: Sequence[int],
    into: DeviceBlocks,
    at: int,
    is_mapped: bool,
) -> Operation[bytes]:
    """The sums of what arrived on the device."""
    spec, slab, first = held.handle.spec, context.link.slab, positions[0] - grant.start
    if is_mapped and slab is not None:
        views = slab.slots(grant.offsets[first : first + len(positions)], spec.block_bytes)
    else:
        views = [memoryview(bytearray(spec.block_bytes)) for _ in positions]
        blocks = [[view] for view in views]
        yield from remote.load(grant.lease_id, first, blocks, spec.block_bytes, spec.chunk_bytes)
    return (yield from work(partial(into.put, views, at)))


def _from_below(
    context: Context, held: Lease, lost: Sequence[int], into: DeviceBlocks, start: int
) -> Operation[set[int]]:
    """What HBM did not give, of the tiers under it. Returns the positions that they did not give either."""
    failed: set[int] = set()
    for _, run in groupby(enumerate(lost), lambda each: each[1] - each[0]):
        positions = [position for _, position in run]
        prefix = held.prefix[positions[0] : positions[-1] + 1]
        below = yield from leasing.lease(context, held.handle, prefix, "", LEASE_MS, LEASE_WAIT_MS)
        try:
            had = yield from _had(context, below, into, positions[0] - start)
        except GeneratorExit:
            raise  # The driver gave up the connection, and with it the lease.
        except BaseException:
            yield from leasing.release(context, below)
            raise
        yield from leasing.release(context, below)
        context.tally.add("fallback_blocks", had)
        failed |= set(positions[had:])
    return failed


def _had(context: Context, below: Lease, into: DeviceBlocks, at: int) -> Operation[int]:
    """How many leading blocks of the lease came, into ``into`` from ``at`` on."""
    had = 0
    for grant in below.grants:
        ours = range(grant.start, grant.start + grant.count)
        missed = yield from _from_host(context, below, grant, ours, into, at + grant.start)
        had += min(missed, default=grant.start + grant.count) - grant.start
        if missed:
            break
    return had


# --- save ---------------------------------------------------------------------------------------------


def _save_batch(
    context: Context,
    handle: Handle,
    batch: Sequence[BlockHash],
    blocks: DeviceBlocks,
    at: int,
    parent: bytes,
    hints: SaveHints,
) -> Operation[tuple[int, str]]:
    """How many leading blocks of the batch, which are those of ``blocks`` from ``at`` on, HBM holds now, and
    if not all, why."""
    try:
        reserved = yield from reserve(handle, batch, parent, hints, HBM)
    except (Unavailable, BadInput) as error:
        context.missed(error)
        return 0, unsaved_by(error)
    if reserved.count:
        writing = _written(context, reserved, blocks, at + reserved.start)
        reason = yield from fill(context, reserved, writing, HBM)
        if reason:
            return reserved.start, reason
        count_saved(context, handle, reserved.count)
        context.tally.add("hbm_saved_blocks", reserved.count)
    end = reserved.start + reserved.count
    return end, reserved.reason if reserved.reason in ("busy", "full") else "full"


def _written(context: Context, reserved: Reserved, blocks: DeviceBlocks, at: int) -> Operation[bytes]:
    """RAISES BadInput when the device did not copy them: the node lives, and is to be told."""
    mapped = context.link.hbm
    assert mapped is not None
    try:
        return (yield from work(partial(blocks.save, mapped.incarnation, reserved.offsets, at)))
    except KVCacheError as error:
        raise BadInput("bad_block", "the device did not copy them", error.what) from error
