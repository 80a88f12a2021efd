"""Loading to a device, as an operation: the rules of ``operations``, and one more.

A block that cannot be had from HBM, for whatever reason, is had from below: it is leased again without HBM,
and copied from host memory. So a flipped byte, a slab that is gone or a device that will not copy from it
costs time, and the node withdraws from HBM what was reported.

The sum: 512 MiB take 10 ms on the link; before the first of its bytes and after the last, 0.5 ms of Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import groupby
from typing import Final

from kvcache.client import leasing, remote
from kvcache.client.checks import batches
from kvcache.client.hbm import DeviceBlocks
from kvcache.client.link import Context
from kvcache.client.operations import split_sums, verified
from kvcache.client.steps import Operation, work
from kvcache.client.store import LEASE_MS, LEASE_WAIT_MS, Grant, Lease
from kvcache.errors import BadInput
from kvcache.wire import HBM

LOAD_BYTES: Final = 512 << 20
"""What is loaded in one step: an interrupt waits for no more."""


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


# --- load ---------------------------------------------------------------------------------------------


def _from_hbm(
    context: Context, held: Lease, grant: Grant, positions: Sequence[int], into: DeviceBlocks, at: int
) -> Operation[set[int]]:
    """Blocks of this grant, which goes to ``into`` from ``at`` on. Returns the positions that failed."""
    failed: set[int] = set()
    spec = held.handle.spec
    for part in batches(positions, max(1, LOAD_BYTES // spec.block_bytes)):
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
        most = LOAD_BYTES // spec.block_bytes if is_mapped else remote.blocks_a_call(spec.block_bytes)
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
