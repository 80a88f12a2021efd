"""The one logic of the client: what each operation asks of the node and checks, whoever drives it.

Generators over ``steps``. What the world does wrong ends in less and a counter; what the caller did
wrong is raised as BadInput before anything is sent. Two rules keep bytes right:

* load:  lease -> copy -> sums of what arrived in the caller's memory -> checksum of the key that was
         asked for -> the lease had not expired when the copy ended. Anything else is a failed block.
* save:  reserve -> copy and sum -> commit. Whatever happens between ends in abort, after the copy.

While there is no connection an operation runs all the same, on a link that reaches no node: what it then
answers and counts is written here, too. Leases are taken and given back in ``leasing``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Final

from kvcache.block import HASH_BYTES, BlockHash, BlockSpec, storage_key
from kvcache.client import local, remote, slicing
from kvcache.client.checks import batches, check_reply, check_save, check_wait, flat_blocks, joined_hashes
from kvcache.client.leasing import CHECKSUM_BYTES
from kvcache.client.link import PARENT_GONE, Context
from kvcache.client.steps import Operation, ask
from kvcache.client.store import Grant, Handle, Lease, SaveHints
from kvcache.client.waiting import Patience
from kvcache.errors import BadInput, KVCacheError, Unavailable
from kvcache.slices import Slice
from kvcache.sums import SUM_BYTES, block_checksum
from kvcache.wire import (
    BATCH_BLOCKS_MAX,
    HBM,
    HOST,
    PREFIX_BLOCKS_MAX,
    Abort,
    Commit,
    Committed,
    Done,
    Match,
    Matched,
    Persist,
    Reserve,
    Reserved,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer

COMMIT_SUMS_BYTES_MAX: Final = 2 << 20


def match(context: Context, handle: Handle, prefix: Sequence[BlockHash], hbm: bool = False) -> Operation[int]:
    joined = joined_hashes(prefix)[: PREFIX_BLOCKS_MAX * HASH_BYTES]
    if not joined or not context.reaches(handle):
        return 0
    try:
        reply = yield from ask(Matched, Match(handle.namespace_id, joined, context.tokens_s, hbm))
        check_reply(reply.count * HASH_BYTES <= len(joined), "it matched more blocks than were asked for")
    except (Unavailable, BadInput) as error:
        context.missed(error)
        return 0
    context.tally.add("matched_blocks", reply.count)
    return reply.count


def load(
    context: Context,
    held: Lease,
    into: Sequence[Sequence[Buffer]],
    start: int,
    heads: tuple[int, int] | None = None,
) -> Operation[frozenset[int]]:
    spec = held.handle.spec
    cut = None if heads is None else Slice(spec, *heads)
    blocks = flat_blocks(into, spec, writable=True) if cut is None else slicing.flat_slices(into, cut)
    end = start + len(blocks)
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
        if first < last:
            part = blocks[first - start : last - start]
            failed |= yield from _load_grant(context, held, grant, first, part, cut)
    loaded = len(blocks) - len(failed)
    context.tally.add("loaded_blocks", loaded)
    context.tally.add("loaded_bytes", loaded * (spec if cut is None else cut).block_bytes)
    return frozenset(failed)


def save(
    context: Context,
    handle: Handle,
    prefix: Sequence[BlockHash],
    blocks: Sequence[Sequence[Buffer]],
    parent: bytes,
    hints: SaveHints,
) -> Operation[int]:
    views = flat_blocks(blocks, handle.spec, writable=False)
    joined_hashes(prefix)
    check_save(prefix, views, parent)
    if not context.reaches(handle):
        context.tally.add("unsaved_blocks:unavailable", len(prefix))
        return 0
    held = 0
    for batch in batches(prefix, blocks_a_batch(handle.spec)):
        part = views[held : held + len(batch)]
        count, reason = yield from _save_batch(context, handle, batch, part, parent, hints)
        held += count
        if count < len(batch):
            context.tally.add(f"unsaved_blocks:{reason}", len(prefix) - held)
            break
        parent = batch[-1]
    return held


def persist(context: Context, handle: Handle, prefix: Sequence[BlockHash], wait_ms: int) -> Operation[int]:
    check_wait(wait_ms)
    joined = joined_hashes(prefix)[: PREFIX_BLOCKS_MAX * HASH_BYTES]
    if not joined or not context.reaches(handle):
        return 0
    patience = Patience(context, wait_ms)
    asked, durable = len(joined) // HASH_BYTES, 0
    try:
        while True:
            reply = yield from ask(Matched, Persist(handle.namespace_id, joined, patience.growing_ms()))
            check_reply(reply.count <= asked, "it persisted more blocks than were asked for")
            durable = reply.count
            if durable == asked or patience.over() or not patience.used_up():
                break
            yield from patience.rest()
    except KVCacheError as error:
        context.missed(error)
    context.tally.add("persisted_blocks", durable)
    return durable


# --- load ---------------------------------------------------------------------------------------------


def _load_grant(
    context: Context,
    held: Lease,
    grant: Grant,
    first: int,
    blocks: Sequence[Sequence[memoryview]],
    cut: Slice | None,
) -> Operation[set[int]]:
    """Blocks ``first`` and on of the lease, all of this grant. Returns the positions that failed."""
    if grant.tier == HBM:
        raise BadInput("bad_lease", "blocks in HBM", "they do not go to host memory", "use load_device")
    positions = list(range(first, first + len(blocks)))
    failed: set[int] = set()
    for offset_known, run in groupby(positions, lambda at: _offset(context, grant, at) >= 0):
        part = list(run)
        targets = blocks[part[0] - first : part[-1] + 1 - first]
        failed |= yield from _load_run(context, held, grant, part, targets, offset_known, cut)
    return failed


def _offset(context: Context, grant: Grant, position: int) -> int:
    mapped = context.link.slab is not None and grant.offsets
    return grant.offsets[position - grant.start] if mapped else -1


def _load_run(
    context: Context,
    held: Lease,
    grant: Grant,
    positions: Sequence[int],
    into: Sequence[Sequence[memoryview]],
    mapped: bool,
    cut: Slice | None,
) -> Operation[set[int]]:
    """Consecutive blocks that lie all in the map, or all elsewhere. Returns the positions that failed."""
    slab = context.link.slab if mapped else None
    first = positions[0] - grant.start
    offsets = grant.offsets[first : first + len(positions)] if slab is not None else ()
    if cut is None:
        loading = _load_whole(held, grant, first, into, slab, offsets)
    else:
        loading = slicing.load(slicing.Run(cut, grant.lease_id, first, into, slab, offsets))
    return (yield from verified(context, held, grant, positions, loading))


def verified(
    context: Context,
    held: Lease,
    grant: Grant,
    positions: Sequence[int],
    loading: Operation[Sequence[bytes]],
) -> Operation[set[int]]:
    """Load these positions, all of this grant; ``loading`` returns the sums of each as it arrived. Returns
    those that cannot be relied on, counted. RAISES BadInput when the caller's buffers cannot be used."""
    everything = set(positions)
    if not context.link.owns(held) or not context.link.holds(grant.name):
        context.tally.add(f"failed_blocks:{'unavailable' if context.away else 'lease_lost'}", len(positions))
        return everything
    try:
        found = yield from loading
    except Unavailable as error:
        context.missed(error)
        context.tally.add("failed_blocks:unavailable", len(positions))
        return everything
    except BadInput as error:
        if error.code == "bad_block":
            raise  # Not the node's word: these buffers cannot be copied into.
        reason = "lease_lost" if error.code == "bad_lease" else "refused"
        context.tally.add(f"failed_blocks:{reason}", len(positions))
        return everything
    if context.clock.now_ns() >= grant.expires_ns:
        context.tally.add("failed_blocks:expired", len(positions))
        return everything
    return _wrong(context, held, grant, positions, found)


def split_sums(spec: BlockSpec, summing: Operation[bytes]) -> Operation[Sequence[bytes]]:
    """Those of each block, of all in one."""
    sums = yield from summing
    step = spec.chunk_count * SUM_BYTES
    return [sums[at : at + step] for at in range(0, len(sums), step)]


def _load_whole(
    held: Lease,
    grant: Grant,
    first: int,
    into: Sequence[Sequence[memoryview]],
    slab: local.Slab | None,
    offsets: Sequence[int],
) -> Operation[Sequence[bytes]]:
    """Returns, block by block, the sums of all chunks, as they arrived."""
    spec = held.handle.spec
    if slab is not None:
        summing = local.load(slab, offsets, into, spec.block_bytes, spec.chunk_bytes)
    else:
        summing = remote.load(grant.lease_id, first, into, spec.block_bytes, spec.chunk_bytes)
    return (yield from split_sums(spec, summing))


def _wrong(
    context: Context, held: Lease, grant: Grant, positions: Sequence[int], sums: Sequence[bytes]
) -> set[int]:
    """The positions whose bytes are not those of the block that was asked for: ``sums``, all of one block in
    each entry, do not have its checksum. An empty entry is of bytes that were found wrong before."""
    handle, spec = held.handle, held.handle.spec
    wrong: list[int] = []
    for position, sums_of_block in zip(positions, sums, strict=True):
        at = (position - grant.start) * CHECKSUM_BYTES
        key = storage_key(handle.namespace_id, held.prefix[position])
        found = block_checksum(key, spec.block_bytes, spec.chunk_bytes, sums_of_block)
        if found != grant.checksums[at : at + CHECKSUM_BYTES]:
            wrong.append(position)
    if wrong:
        context.tally.add("failed_blocks:checksum", len(wrong))
        context.link.blame(grant.name, [position - grant.start for position in wrong])
    return set(wrong)


# --- save ---------------------------------------------------------------------------------------------


def blocks_a_batch(spec: BlockSpec) -> int:
    """How many blocks one reservation takes at most: the sums of all must fit the commit."""
    return max(1, min(BATCH_BLOCKS_MAX, COMMIT_SUMS_BYTES_MAX // (spec.chunk_count * SUM_BYTES)))


def reserve(
    handle: Handle, batch: Sequence[BlockHash], parent: bytes, hints: SaveHints, tier: str = HOST
) -> Operation[Reserved]:
    """Room for what of the batch is not held. RAISES Unavailable, BadInput."""
    request = Reserve(
        handle.namespace_id,
        parent,
        b"".join(batch),
        hints.hint,
        hints.priority,
        hints.session,
        hints.gap_ms,
        hints.push if tier == HOST else "",
        hints.keep_ms,
        tier,
    )
    reserved = yield from ask(Reserved, request)
    check_reply(reserved.start + reserved.count <= len(batch), "it reserved more blocks than were asked for")
    check_reply(len(reserved.offsets) in (0, reserved.count), "not one offset a block")
    check_reply(bool(reserved.reservation) == bool(reserved.count), "a reservation without blocks")
    return reserved


def fill(context: Context, reserved: Reserved, writing: Operation[bytes], tier: str = HOST) -> Operation[str]:
    """Commit what ``writing`` writes (it returns the sums), or abort. Returns why not; empty: committed."""
    try:
        sums = yield from writing
        done = yield from ask(Committed, Commit(reserved.reservation, sums, tier))
        check_reply(done.count == reserved.count, "it committed another number of blocks")
    except Unavailable as error:
        context.missed(error)
        return "unavailable"  # The node aborts what the connection had reserved.
    except BadInput:
        yield from abort(reserved.reservation, tier)
        return "refused"
    except GeneratorExit:
        raise  # The driver gave up the connection, and the node aborts.
    except BaseException:
        yield from abort(reserved.reservation, tier)
        raise
    return ""


def abort(reservation: int, tier: str = HOST) -> Operation[None]:
    try:
        yield from ask(Done, Abort(reservation, tier))
    except KVCacheError:
        return  # Ended already, or with the connection.


def count_saved(context: Context, handle: Handle, block_count: int) -> None:
    context.tally.add("saved_blocks", block_count)
    context.tally.add("saved_bytes", block_count * handle.spec.block_bytes)


def _save_batch(
    context: Context,
    handle: Handle,
    batch: Sequence[BlockHash],
    blocks: Sequence[Sequence[memoryview]],
    parent: bytes,
    hints: SaveHints,
) -> Operation[tuple[int, str]]:
    """How many leading blocks of the batch are held now, and if not all, why."""
    try:
        reserved = yield from reserve(handle, batch, parent, hints)
    except (Unavailable, BadInput) as error:
        context.missed(error)
        return 0, unsaved_by(error)
    end = reserved.start + reserved.count
    if reserved.count:
        writing = _written(context, handle, reserved, blocks[reserved.start : end])
        reason = yield from fill(context, reserved, writing)
        if reason:
            return reserved.start, reason
        count_saved(context, handle, reserved.count)
    return end, reserved.reason if reserved.reason in ("busy", "full") else "full"


def _written(
    context: Context, handle: Handle, reserved: Reserved, blocks: Sequence[Sequence[memoryview]]
) -> Operation[bytes]:
    """Write whole blocks, into the map or over the wire. Returns their sums."""
    spec, slab = handle.spec, context.link.slab
    mapped = slab is not None and bool(reserved.offsets) and min(reserved.offsets) >= 0
    if mapped and slab is not None:
        return (yield from local.save(slab, reserved.offsets, blocks, spec.block_bytes, spec.chunk_bytes))
    return (yield from remote.save(reserved.reservation, blocks, spec.block_bytes, spec.chunk_bytes))


def unsaved_by(error: KVCacheError) -> str:
    if isinstance(error, Unavailable):
        return "unavailable"
    return "parent" if error.code == PARENT_GONE else "refused"
