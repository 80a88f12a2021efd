"""What is said to a peer for one group of blocks, and how its answer is judged.

    take_lease ─► Leased, with a checksum a block ─► export ─► Exported, with a ticket and all chunk sums
    judge: what came has the chunk sums that were told ─► these have the checksum ─► which is of this key

The sum: 10 us a message beside the round trip; 2 us a block to judge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvcache.block import HASH_BYTES, BlockSpec, NamespaceId, StorageKey
from kvcache.channel import AsyncChannel
from kvcache.clock import NS_PER_MS
from kvcache.errors import BadInput
from kvcache.slices import ChunkRange
from kvcache.sums import SUM_BYTES, block_checksum
from kvcache.wire import Export, Exported, Leased, Reply, TakeLease

SPARE_NS = 250 * NS_PER_MS
"""So much later than the time of a group is over do its calls end by themselves."""
WAIT_PARTS = 2
"""One of so many parts of the time left may be spent at the peer, until the blocks are in its memory."""
CHECKSUM_BYTES = 16
FAILURES = ("lost", "late", "refused", "gone")


@dataclass(frozen=True, slots=True)
class Wanted:
    """Blocks of one path that are to be brought together; with ``only``, these chunks of each.

    ``behind``: the blocks before them, first to last, where the peer may have to read them from a disk: it
    takes none into memory without those before it."""

    tenant: str
    namespace: NamespaceId
    spec: BlockSpec
    keys: Sequence[StorageKey]
    only: ChunkRange | None = None
    behind: Sequence[StorageKey] = ()

    @property
    def part(self) -> ChunkRange:
        return self.only or ChunkRange(self.spec, 0, self.spec.plane_bytes)


@dataclass(frozen=True, slots=True)
class Arrived:
    """Leading blocks that came whole, each with its checksum and chunk sums; how many were given by the peer;
    and the positions of those whose bytes were not theirs."""

    blocks: list[tuple[bytes, bytes]]
    given: int
    wrong: list[int]


class FetchFailed(Exception):
    """Nothing came. ``reason`` is one of ``FAILURES``."""

    def __init__(self, reason: str, why: str) -> None:
        assert reason in FAILURES, reason
        self.reason = reason
        super().__init__(why)


async def take_lease(channel: AsyncChannel, wanted: Wanted, now_ns: int, deadline_ns: int) -> Leased:
    """RAISES KVCacheError."""
    left_ns = max(0, deadline_ns - now_ns)
    keys = (*wanted.behind, *wanted.keys)
    request = TakeLease(
        wanted.namespace,
        b"".join(key[HASH_BYTES:] for key in keys),
        duration_ms=(left_ns + SPARE_NS) // NS_PER_MS,
        wait_ms=left_ns // NS_PER_MS // WAIT_PARTS,
    )
    leased = await channel.call(request, deadline_ns + SPARE_NS)
    if not isinstance(leased, Leased) or leased.count > len(keys):
        raise _nonsense(leased)
    if len(leased.checksums) != leased.count * CHECKSUM_BYTES or bool(leased.lease) != bool(leased.count):
        raise _nonsense(leased)
    return leased


async def export(
    channel: AsyncChannel, wanted: Wanted, leased: Leased, via: str, deadline_ns: int
) -> Exported | None:
    """None: none of those wanted is leased. RAISES KVCacheError."""
    part, start = wanted.part, len(wanted.behind)
    count = leased.count - start
    if count <= 0:
        return None
    request = Export(leased.lease, start, count, via, offset=part.offset, length=part.length)
    exported = await channel.call(request, deadline_ns + SPARE_NS)
    if not isinstance(exported, Exported):
        raise _nonsense(exported)
    if len(exported.sums) != count * wanted.spec.chunk_count * SUM_BYTES:
        raise _nonsense(exported)
    return exported


def judge(wanted: Wanted, leased: Leased, exported: Exported, came: bytes) -> Arrived:
    """``came``: the chunk sums of all that arrived, block after block."""
    spec, part = wanted.spec, wanted.part
    step, step_came = spec.chunk_count * SUM_BYTES, part.sums_bytes
    checksums = leased.checksums[len(wanted.behind) * CHECKSUM_BYTES :]
    given = len(checksums) // CHECKSUM_BYTES
    good: list[tuple[bytes, bytes]] = []
    wrong: list[int] = []
    for at, key in enumerate(wanted.keys[:given]):
        sums = exported.sums[at * step : (at + 1) * step]
        told = checksums[at * CHECKSUM_BYTES : (at + 1) * CHECKSUM_BYTES]
        checksum = block_checksum(key, spec.block_bytes, spec.chunk_bytes, sums)
        if checksum != told or part.sums_of(sums) != came[at * step_came : (at + 1) * step_came]:
            wrong.append(at)
        elif not wrong:
            good.append((checksum, sums))
    return Arrived(good, given, wrong)


def nothing(leased: Leased) -> FetchFailed:
    """Why there are none of those wanted."""
    if leased.coming:
        return FetchFailed("late", "the peer has not read these blocks from its disk in time")
    return FetchFailed("gone", "the peer has none of these blocks any more")


def _nonsense(reply: Reply) -> BadInput:
    return BadInput(
        "bad_message", f"the peer answered with {reply!r:.100}", "that is no answer to what was asked"
    )
