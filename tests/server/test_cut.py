"""A node whose engine runs on another tensor parallel degree than those of its peers, with real nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from kvcache.block import storage_key
from kvcache.client import connect_blocking
from kvcache.client.store import BlockingStore, Handle
from kvcache.clock import NS_PER_S, SystemClock
from kvcache.config import NodeConfig
from kvcache.namespace import Namespace
from kvcache.peers import cut
from kvcache.testing.sharded import ShardedModel
from kvcache.testing.slices import prefix_of
from tests.server.conftest import EmbeddedNode
from tests.server.peer_world import NEVER_LATE, WAIT_MS

COUNT = 6
PATIENCE_S = 20
MODELS = {
    "a plane is one chunk": ShardedModel(3, 8, 64),
    "slices are whole chunks": ShardedModel(2, 4, 32_768),
    "slices begin within chunks": ShardedModel(2, 12, 16_384),
}


class Place:
    """A node, and an engine's store at it."""

    def __init__(self, folder: Path, name: str, stack: ExitStack, peers: str, **settings: str) -> None:
        config = NodeConfig(
            name=name,
            socket=str(folder / f"{name}.sock"),
            tcp="127.0.0.1:0",
            http="none",
            capacity="16MiB",
            unit="256KiB",
            peers=peers,
            **NEVER_LATE,  # type: ignore[arg-type]
            **settings,  # type: ignore[arg-type]
        )
        self.embedded = EmbeddedNode(config)
        self._closing = stack.enter_context(ExitStack())
        self._closing.callback(self.embedded.close)
        self.store: BlockingStore = connect_blocking(self.embedded.node.address, timeout_ms=2 * WAIT_MS)
        self._closing.callback(self.store.close)

    def close(self) -> None:
        """May be called twice."""
        self._closing.close()

    def open(self, model: ShardedModel, tp_size: int, tp_rank: int, **fields: str) -> Handle:
        namespace: Namespace = replace(model.namespace(tp_size, tp_rank), **fields)  # type: ignore[arg-type]
        return self.store.open(namespace, model.spec(tp_size))

    def save(
        self, model: ShardedModel, tp_size: int, tp_rank: int, count: int = COUNT, **fields: str
    ) -> Handle:
        handle = self.open(model, tp_size, tp_rank, **fields)
        blocks = [[model.block(at, tp_size, tp_rank)] for at in range(count)]
        assert self.store.save(handle, prefix_of(handle, COUNT)[:count], blocks) == count
        return handle

    def load(self, model: ShardedModel, tp_size: int, tp_rank: int, **fields: str) -> int:
        """How many blocks this rank had; each is what it would have saved itself."""
        handle = self.open(model, tp_size, tp_rank, **fields)
        lease = self.store.lease(handle, prefix_of(handle, COUNT), wait_ms=WAIT_MS)
        into = [bytearray(handle.spec.block_bytes) for _ in range(lease.count)]
        assert self.store.load(lease, [[block] for block in into]) == frozenset()
        self.store.release(lease)
        assert into == [model.block(at, tp_size, tp_rank) for at in range(lease.count)]
        return lease.count

    def stats(self) -> dict[str, float]:
        return self.embedded.call(self.embedded.node.core.stats)

    def until_known(self, blocks: int) -> None:
        """The index knows so many blocks of the peers."""
        end_ns = SystemClock().now_ns() + PATIENCE_S * NS_PER_S
        while self.stats()["peer_known_blocks"] != blocks:
            assert SystemClock().now_ns() < end_ns, f"never: {blocks} blocks are known"

    def change(self, handle: Handle, position: int, at: int) -> None:
        """A byte of a block where it lies."""
        core = self.embedded.node.core
        key = storage_key(handle.namespace_id, prefix_of(handle, COUNT)[position])

        def work() -> None:
            slot = core.ledger.slot_of(key)
            assert slot is not None
            core.host.view(slot, handle.spec.block_bytes)[at] ^= 1

        self.embedded.call(work)


Start = Callable[..., Place]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with ExitStack() as stack:

        def begin(name: str, *peers: Place, **settings: str) -> Place:
            addresses = ",".join(peer.embedded.node.tcp_address for peer in peers) or "none"
            return Place(tmp_path, name, stack, addresses, **settings)

        yield begin


@pytest.mark.parametrize("shape", MODELS)
@pytest.mark.parametrize(("stored", "wanted"), [(1, 2), (1, 4), (2, 4), (2, 1), (4, 2)])
def test_each_rank_gets_what_it_would_have_saved(start: Start, shape: str, stored: int, wanted: int) -> None:
    model = MODELS[shape]
    a = start("a")
    for rank in range(stored):
        a.save(model, stored, rank)
    b = start("b", a)
    b.until_known(stored * COUNT)
    for rank in range(wanted):
        assert b.load(model, wanted, rank) == COUNT
    told = b.stats()
    assert told["peer_cut_blocks"] == told["peer_fetched_blocks"] == wanted * COUNT
    assert a.stats()["exported_bytes"] <= wanted * stored * COUNT * model.spec(stored).block_bytes


def test_only_the_chunks_that_cover_the_heads_travel(start: Start) -> None:
    model = MODELS["slices are whole chunks"]
    a = start("a")
    a.save(model, 1, 0)
    b = start("b", a)
    b.until_known(COUNT)
    assert b.load(model, 2, 1) == COUNT
    assert a.stats()["exported_bytes"] == COUNT * model.spec(2).block_bytes


def test_ranks_that_lie_on_different_peers_are_joined(start: Start) -> None:
    model = MODELS["slices are whole chunks"]
    a, b = start("a"), start("b")
    a.save(model, 2, 0)
    b.save(model, 2, 1, count=4)
    c = start("c", a, b)
    c.until_known(COUNT + 4)
    assert c.load(model, 1, 0) == 4, "as far as both go"


def test_what_was_cut_is_a_block_like_any_other(start: Start) -> None:
    model = MODELS["a plane is one chunk"]
    a = start("a")
    a.save(model, 1, 0)
    b = start("b", a)
    b.until_known(COUNT)
    assert b.load(model, 2, 0) == COUNT
    c = start("c", b)
    c.until_known(COUNT)
    assert c.load(model, 2, 0) == COUNT
    assert "peer_cut_blocks" not in c.stats() or not c.stats()["peer_cut_blocks"]
    assert c.load(model, 4, 1) == COUNT, "and can be cut again"


@pytest.mark.parametrize(
    "fields", [{"layout": "vllm 0.11 LBHNC"}, {"isa": "cpu avx512"}, {"scales": "with the weights"}]
)
def test_what_is_not_certified_is_a_miss(start: Start, fields: dict[str, str]) -> None:
    model = MODELS["a plane is one chunk"]
    a = start("a")
    a.save(model, 1, 0, **fields)
    b = start("b", a)
    b.until_known(COUNT)
    assert b.load(model, 2, 0, **fields) == 0
    assert b.load(model, 1, 0, **fields) == COUNT, "the same degree has it"


def test_another_models_blocks_are_a_miss(start: Start) -> None:
    model = MODELS["a plane is one chunk"]
    a = start("a")
    a.save(model, 1, 0)
    b = start("b", a)
    b.until_known(COUNT)
    for fields in ({"weights": "n"}, {"dtype": "float16"}, {"rope": "x"}):
        assert b.load(model, 2, 0, **fields) == 0


@pytest.mark.parametrize("shape", MODELS)
def test_wrong_bytes_in_a_chunk_that_is_read_end_what_comes(start: Start, shape: str) -> None:
    model = MODELS[shape]
    a = start("a")
    handle = a.save(model, 1, 0)
    a.change(handle, 3, handle.spec.block_bytes - 1)
    b = start("b", a)
    b.until_known(COUNT)
    assert b.load(model, 2, 1) == 3
    assert b.stats()["peer_rejected_blocks:checksum"] >= 1
    assert b.stats()["peer_fetched_blocks"] == 3


def test_wrong_bytes_beside_what_is_read_do_not_matter(start: Start) -> None:
    model = MODELS["slices are whole chunks"]
    a = start("a")
    handle = a.save(model, 1, 0)
    a.change(handle, 3, handle.spec.block_bytes - 1)
    b = start("b", a)
    b.until_known(COUNT)
    assert b.load(model, 2, 0) == COUNT


def test_another_peer_gives_the_part_that_was_wrong(start: Start) -> None:
    model = MODELS["a plane is one chunk"]
    a, other = start("a"), start("other")
    for place in (a, other):
        handle = place.save(model, 1, 0)
    place.change(handle, 0, 0)
    c = start("c", a, other)
    c.until_known(2 * COUNT)
    assert c.load(model, 2, 0) == COUNT


@pytest.mark.parametrize("shape", MODELS)
@pytest.mark.parametrize(("stored", "wanted"), [(1, 2), (2, 1)])
def test_in_many_steps_it_is_the_same(
    start: Start, shape: str, stored: int, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MODELS[shape]
    monkeypatch.setattr(cut, "SCRATCH_BYTES", 2 * model.spec(stored).block_bytes)
    a = start("a")
    for rank in range(stored):
        handle = a.save(model, stored, rank)
    b = start("b", a)
    b.until_known(stored * COUNT)
    assert b.load(model, wanted, wanted - 1) == COUNT
    a.change(handle, 3, handle.spec.block_bytes - 1)
    c = start("c", a)
    c.until_known(stored * COUNT)
    assert c.load(model, wanted, wanted - 1) == 3, "in the middle of a step"


def test_a_source_that_has_it_for_another_degree_is_cut(start: Start) -> None:
    """A request names its prefill node, which has nothing under the name that is wanted."""
    model = MODELS["slices are whole chunks"]
    a = start("a")
    a.save(model, 1, 0)
    a.open(model, 2, 0)
    b = start("b", a)
    b.until_known(COUNT)
    for rank in range(2):
        handle = b.open(model, 2, rank)
        lease = b.store.lease(handle, prefix_of(handle, COUNT), wait_ms=WAIT_MS, source="a")
        assert lease.count == COUNT
        b.store.release(lease)
        assert b.load(model, 2, rank) == COUNT


@pytest.mark.slow
def test_what_a_peer_has_on_disk_is_cut_too(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MODELS["slices are whole chunks"]
    monkeypatch.setattr(cut, "SCRATCH_BYTES", 2 * model.spec(1).block_bytes)
    nvme = f"{tmp_path}/nvme:64MiB"
    before = start("a", nvme=nvme)
    handle = before.save(model, 1, 0)
    assert before.store.persist(handle, prefix_of(handle, COUNT), wait_ms=20_000) == COUNT
    before.close()
    a = start("a", nvme=nvme)
    b = start("b", a)
    b.until_known(COUNT)
    assert b.load(model, 2, 1) == COUNT
    assert a.stats()["nvme_read_blocks"] == COUNT


def test_three_who_want_a_cut_cause_one(start: Start) -> None:
    model = MODELS["slices are whole chunks"]
    a = start("a")
    a.save(model, 1, 0)
    b = start("b", a)
    b.until_known(COUNT)
    for _ in range(3):
        assert b.load(model, 2, 1) == COUNT
    assert b.stats()["peer_cut_blocks"] == COUNT
