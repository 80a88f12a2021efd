"""A store in memory, behind the blocking interface, and an engine's requests and pages, for tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from kvcache.block import BlockHash, BlockSpec
from kvcache.client.store import NO_HINTS, Grant, Handle, Lease, SaveHints
from kvcache.errors import Unavailable
from kvcache.namespace import Namespace, shape_of
from kvcache.request_hints import UNKNOWN, RequestHints

BLOCK_TOKENS = 4
SPEC = BlockSpec(BLOCK_TOKENS, plane_count=2, head_count=2, head_bytes=16)
TENANT_KEY = b"k" * 32


def namespace(tp_rank: int = 0, tp_size: int = 1) -> Namespace:
    return Namespace(
        model="tiny",
        weights="w1",
        dtype="float32",
        layout="canonical",
        block_tokens=BLOCK_TOKENS,
        shape=shape_of(SPEC),
        tp_rank=tp_rank,
        tp_size=tp_size,
    )


class FakeStore:
    """Keeps what it is given. ``away`` makes every call a miss; ``broken`` names blocks whose load fails.
    Blocks ``on_disk`` are coming when they are leased; ``pass_wait`` is what happens in a wait for them."""

    def __init__(self) -> None:
        self.blocks: dict[tuple[bytes, bytes], bytes] = {}
        self.counts: Counter[str] = Counter()
        self.lease_count = 0
        self.away = False
        self.broken: set[bytes] = set()
        self.block_limit = 1 << 30
        self.leases: dict[int, str] = {}
        self.saves: list[tuple[bytes, int]] = []
        self.closed = False
        self.prefill_tokens_s = 0.0
        self.on_disk: set[bytes] = set()
        self.waits: list[int] = []
        self.pass_wait: Callable[[int], None] = lambda wait_ms: None
        self.node = "node-a"
        self.sources: list[tuple[str, bool]] = []
        self.pushes: list[str] = []
        self.hints: list[RequestHints] = []  # Of leases.
        self.save_hints: list[SaveHints] = []
        self.drafts: list[FakeWriting] = []

    @property
    def counters(self) -> Mapping[str, int]:
        return dict(self.counts)

    def open(self, namespace: Namespace, spec: BlockSpec) -> Handle:
        if self.away:
            raise Unavailable("unavailable", "away")
        root = namespace.root(TENANT_KEY)
        return Handle(namespace, spec, namespace.namespace_id(), root, TENANT_KEY)

    def match(self, handle: Handle, prefix: Sequence[BlockHash]) -> int:
        held = [self.away or (handle.namespace_id, name) not in self.blocks for name in prefix]
        return held.index(True) if True in held else len(held)

    def lease(
        self,
        handle: Handle,
        prefix: Sequence[BlockHash],
        request: str = "",
        duration_ms: int = 30_000,
        wait_ms: int = 2_000,
        source: str = "",
        pushed: bool = False,
        hints: RequestHints = UNKNOWN,
    ) -> Lease:
        self.hints.append(hints)
        self.waits.append(wait_ms)
        self.sources.append((source, pushed))
        found = self.match(handle, prefix)
        self.counts["missed_calls:away"] += self.away
        if wait_ms and self.on_disk.intersection(prefix[:found]):
            self.pass_wait(wait_ms)
        slow = [at for at, name in enumerate(prefix[:found]) if name in self.on_disk]
        count = slow[0] if slow else found
        if not count:
            return Lease(handle, (), (), 1, found)
        self.lease_count += 1
        number = self.lease_count
        self.leases[number] = request
        return Lease(handle, tuple(prefix[:count]), (Grant(number, 0, count, (), b"", 0),), 1, found - count)

    def load(
        self,
        lease: Lease,
        into: Sequence[Sequence[Any]],
        start: int = 0,
        heads: tuple[int, int] | None = None,
    ) -> frozenset[int]:
        assert heads is None
        failed = set()
        for position, pieces in enumerate(into, start):
            name = lease.prefix[position]
            stored = self.blocks.get((lease.handle.namespace_id, name))
            if self.away or stored is None or name in self.broken:
                failed.add(position)
                continue
            at = 0
            for piece in pieces:
                view = memoryview(piece).cast("B")
                view[:] = stored[at : at + len(view)]
                at += len(view)
        self.counts["failed_blocks:checksum"] += len(failed)
        return frozenset(failed)

    def save(
        self,
        handle: Handle,
        prefix: Sequence[BlockHash],
        blocks: Sequence[Sequence[Any]],
        parent: bytes = b"",
        hints: SaveHints = NO_HINTS,
    ) -> int:
        self.saves.append((parent, len(prefix)))
        self.pushes.append(hints.push)
        self.save_hints.append(hints)
        if self.away or (parent and (handle.namespace_id, parent) not in self.blocks):
            return 0
        for index, (name, pieces) in enumerate(zip(prefix, blocks, strict=True)):
            if len(self.blocks) >= self.block_limit and (handle.namespace_id, name) not in self.blocks:
                return index
            self.blocks[handle.namespace_id, name] = b"".join(bytes(piece) for piece in pieces)
        return len(prefix)

    def begin_save(
        self,
        handle: Handle,
        prefix: Sequence[BlockHash],
        blocks: Sequence[Sequence[Any]],
        parent: bytes = b"",
        hints: SaveHints = NO_HINTS,
    ) -> FakeWriting:
        self.drafts.append(FakeWriting(self, handle, prefix, blocks, parent, hints))
        return self.drafts[-1]

    def persist(self, handle: Handle, prefix: Sequence[BlockHash], wait_ms: int = 10_000) -> int:
        return 0

    def release(self, lease: Lease) -> None:
        for grant in lease.grants:
            self.leases.pop(grant.lease_id, None)

    def close(self) -> None:
        self.closed = True


class FakeWriting:
    """Copies planes when they are announced, as they are then, and the rest at the end."""

    def __init__(
        self,
        store: FakeStore,
        handle: Handle,
        prefix: Sequence[BlockHash],
        blocks: Sequence[Sequence[Any]],
        parent: bytes,
        hints: SaveHints,
    ) -> None:
        self._store = store
        self._target = (handle, prefix, parent, hints)
        self._blocks = blocks
        self._copied: list[list[bytes]] = [[] for _ in blocks]
        self.steps: list[int] = []
        self.end = ""

    def advance(self, planes: int) -> None:
        assert not self.end
        self.steps.append(planes)
        self._copy(planes)

    def finish(self) -> int:
        assert not self.end
        self.end = "finished"
        self._copy(SPEC.plane_count)
        handle, prefix, parent, hints = self._target
        return self._store.save(handle, prefix, self._copied, parent, hints)

    def abort(self) -> None:
        self.end = self.end or "aborted"

    def _copy(self, planes: int) -> None:
        for copied, planes_now in zip(self._copied, self._blocks, strict=True):
            copied += [bytes(plane) for plane in planes_now[len(copied) : planes]]


class HandClock:
    def __init__(self) -> None:
        self.ns = 1_000

    def now_ns(self) -> int:
        return self.ns


class FakePages:
    """``count`` pages of two planes each, the engine's KV memory."""

    def __init__(self, count: int = 64) -> None:
        self.memory = [[bytearray(SPEC.plane_bytes) for _ in range(SPEC.plane_count)] for _ in range(count)]

    def planes(self, block_id: int) -> list[bytearray]:
        return self.memory[block_id]

    def fill(self, block_id: int, value: int) -> None:
        for plane in self.memory[block_id]:
            plane[:] = bytes([value]) * len(plane)

    def value(self, block_id: int) -> int:
        (value,) = {byte for plane in self.memory[block_id] for byte in plane}
        return value


@dataclass
class FakeRequest:
    """What is read of an engine's request."""

    request_id: str
    all_token_ids: list[int]
    num_computed_tokens: int = 0
    cache_salt: str | None = None
    lora_request: Any = None
    mm_features: list[Any] = field(default_factory=list)
    prompt_embeds: object | None = None
    skip_reading_prefix_cache: bool = False
    resumable: bool = False
    prompt_tokens: int = -1
    kv_transfer_params: Any = None

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        return self.prompt_tokens if self.prompt_tokens >= 0 else self.num_tokens


def feature(identifier: str, offset: int, length: int) -> Any:
    return SimpleNamespace(identifier=identifier, mm_position=SimpleNamespace(offset=offset, length=length))
