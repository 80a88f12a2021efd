"""Shadow caches beside a real node: their figures against those of nodes that are what they stand for."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from kvcache import wire
from kvcache.block import HASH_BYTES, BlockSpec, NamespaceId
from kvcache.client import connect_blocking
from kvcache.client.store import SaveHints
from kvcache.clock import NS_PER_S
from kvcache.config import NodeConfig, load
from kvcache.errors import BadInput
from kvcache.eviction.choice import Choice
from kvcache.eviction.shadows import BLOCKS_MAX, SAMPLE_MIN
from kvcache.eviction.traces.generate import Workload, generate
from kvcache.eviction.traces.trace import Trace
from kvcache.leaf_lru import LeafLru
from kvcache.ledger import Ledger
from kvcache.namespace import Namespace, shape_of
from kvcache.policy import RequestContext
from kvcache.server import shadowing
from kvcache.server.node import Node
from kvcache.server.shadow_plan import Plan, Store
from kvcache.server.shadowing import Shadowing
from kvcache.testing.clock import FakeClock
from kvcache.tiers.space import Space
from tests.eviction.record_world import hashes, whole_blocks
from tests.server.conftest import EmbeddedNode, Serve
from tests.server.talk import HASHES, connected, deadline, lease, opened, save, stats
from tests.server.test_tuning import settled, told, tune

SPEC = BlockSpec(block_tokens=16, plane_count=1, head_count=1, head_bytes=1_024)
NAMESPACE = Namespace(
    model="m", weights="w", dtype="float32", layout="canonical", block_tokens=16, shape=shape_of(SPEC)
)
CONTENT = [bytes(SPEC.block_bytes)]
WITHIN = 0.02
QUEUE_OF_ALL = 1 << 20
"""However rarely a busy machine lets the shadows work, they are never told to look at less."""


def test_off_is_nothing(serve: Serve) -> None:
    node = serve()
    with connected(node.node.address) as channel:
        namespace = opened(channel)
        save(channel, namespace, HASHES[:4])
        lease(channel, namespace, HASHES[:4])
        values = stats(channel)
        assert (values["shadow_sample"], values["shadow_blocks"], values["shadow_seconds"]) == (0, 0, 0)
        assert "There are no shadow caches" in told(channel, wire.Tune("tell")).advice[0]
    assert node.node.core.tuning.shadowing._shadows is None


@dataclass(frozen=True)
class Served:
    """What a node found of a trace, and what its shadows say, by policy and size."""

    hit_ratio: float
    sampled: dict[tuple[str, float], float]
    estimated: dict[tuple[str, float], float]
    told: wire.Tuned
    values: dict[str, float]


def play(node: EmbeddedNode, trace: Trace) -> Served:
    """As an engine does: look, save what is missing."""
    store = connect_blocking(node.node.address, timeout_ms=60_000)
    handle = store.open(NAMESPACE, SPEC)
    names = hashes(trace)
    for request in trace.requests():
        prefix = [names[block] for block in request.blocks]  # type: ignore[misc]  # They are as good.
        held = store.lease(handle, prefix)  # type: ignore[arg-type]
        store.release(held)
        missing = prefix[held.count :]
        parent = prefix[held.count - 1] if held.count else b""
        if missing:
            store.save(handle, missing, [CONTENT] * len(missing), parent, SaveHints())  # type: ignore[arg-type]
    store.close()
    node.call(node.node.core.tuning.shadowing.drain_all)
    with connected(node.node.address) as channel:
        values, tuned = stats(channel), told(channel, wire.Tune("tell"))
    return Served(
        values["hit_tokens"] / values["lookup_tokens"],
        {(each.policy, each.size): each.sampled_hit_ratio for each in tuned.shadows},
        {(each.policy, each.size): each.hit_ratio for each in tuned.shadows},
        tuned,
        values,
    )


@pytest.mark.slow
@pytest.mark.parametrize("new_event_loop", ["asyncio"], indirect=True)
def test_shadows_agree_with_what_they_are_shadows_of(
    serve: Serve, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node of each kind serves the same requests; one of them has all the shadows."""
    monkeypatch.setattr(shadowing, "QUEUE_MAX", QUEUE_OF_ALL)
    workload = Workload(request_count=2_500, seed=3, arrivals_a_second=4, turns=6, turn_gap_s=40)
    trace = whole_blocks(generate(workload))
    kinds = {
        ("leaf-lru", 1.0): "8MiB",
        ("leaf-lru", 0.5): "4MiB",
        ("leaf-lru", 2.0): "16MiB",
        ("leaf-fifo", 1.0): "8MiB",
        ("leaf-arc", 0.5): "4MiB",
    }
    real: dict[tuple[str, float], float] = {}
    shadowed: Served | None = None
    for (policy, size), capacity in kinds.items():
        is_shadowed = (policy, size) == ("leaf-lru", 1.0)
        more = {"shadow": "leaf-fifo,leaf-arc", "shadow_cpu": 1.0} if is_shadowed else {}
        socket = f"{tmp_path}/{policy}-{capacity}.sock"
        node = serve(socket=socket, policy=policy, capacity=capacity, unit="256KiB", **more)
        served = play(node, trace)
        real[policy, size] = served.hit_ratio
        shadowed = served if more else shadowed
        assert served.values["removed_blocks:evicted"] > 1_000
    assert shadowed is not None
    assert shadowed.told.sample == pytest.approx(0.03)
    for kind, hit_ratio in real.items():
        assert shadowed.estimated[kind] == pytest.approx(hit_ratio, abs=WITHIN), (kind, real)
    assert shadowed.told.hit_ratio == pytest.approx(real["leaf-lru", 1.0], abs=0.005)
    assert shadowed.sampled["leaf-lru", 1.0] == pytest.approx(real["leaf-lru", 1.0], abs=WITHIN)
    assert max(real.values()) - min(real.values()) > 0.1, "kinds that find the same tell nothing"


@pytest.mark.slow
def test_what_they_find_is_told_everywhere(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadowing, "QUEUE_MAX", QUEUE_OF_ALL)
    node = serve(shadow="leaf-hazard", shadow_sample=1.0, shadow_sizes="50%,100%", shadow_cpu=1.0)
    trace = whole_blocks(generate(Workload(request_count=300)))
    served = play(node, trace)
    assert set(served.sampled) == {
        ("leaf-lru", 1.0),
        ("leaf-lru", 0.5),
        ("leaf-hazard", 0.5),
        ("leaf-hazard", 1.0),
    }
    assert served.sampled["leaf-lru", 1.0] == pytest.approx(served.hit_ratio, abs=0.002)
    assert served.values["shadow_hit_ratio:leaf-lru@100%"] == served.estimated["leaf-lru", 1.0]
    assert served.values["shadow_seconds"] > 0
    assert served.values["shadow_dropped"] == 0
    assert "The node found" in served.told.advice[0]


def test_a_parent_that_is_none_is_nothing(serve: Serve) -> None:
    """Look-ups do not check it, so whoever uses it must."""
    node = serve(shadow="leaf-fifo", shadow_sample=1.0)
    with connected(node.node.address) as channel:
        namespace = opened(channel)
        save(channel, namespace, HASHES[:4])
        for parent in (b"x", b"x" * 40, HASHES[9]):
            channel.call(wire.TakeLease(namespace, HASHES[1], parent=parent), deadline())
        channel.call(wire.TakeLease(namespace, b""), deadline())
        assert stats(channel)["shadow_sample"] == 1.0


def test_a_policy_that_takes_over_has_a_shadow_too(serve: Serve) -> None:
    node = serve(shadow="leaf-fifo", shadow_sizes="100%", shadow_sample=1.0)
    with connected(node.node.address) as channel:
        namespace = opened(channel)
        save(channel, namespace, HASHES[:4])
        tune(channel, "leaf-hazard", {"samples": 4})
        settled(channel)
        lease(channel, namespace, HASHES[:4])
        node.call(lambda: node.node.core.tuning.tick())
        lease(channel, namespace, HASHES[:4])
        said = {each.policy for each in told(channel, wire.Tune("tell")).shadows}
    assert said == {"leaf-hazard (samples=4)", "leaf-fifo"}


# --- alone, with a ledger and a clock ------------------------------------------------------------


def named(*numbers: int) -> bytes:
    """Hashes of which every one is in any sample, as its first half is next to nothing."""
    return b"".join(number.to_bytes(8, "little") + bytes(7) + bytes([number]) for number in numbers)


def prefix_of(count: int, start: int = 1) -> bytes:
    return named(*range(start, start + count))


SPACE_ID = NamespaceId(b"n" * HASH_BYTES)
CONTEXT = RequestContext(now_ns=1)


class Alone:
    """Shadowing with no node around it. Each look at its clock for work says that ``step_ns`` passed, and
    the node works all the time."""

    def __init__(self, plan: Plan, step_ns: int = 0) -> None:
        self.step_ns = step_ns
        self._work_ns = 0
        self.clock = FakeClock()
        self.shadowing = Shadowing(self._work, lambda: self.clock.now_ns())
        ledger = Ledger(Space(1 << 20, 1 << 12), LeafLru)
        self.shadowing.begin(plan, Store(ledger, 1 << 20, True, lambda: False), Choice("leaf-lru"), 1)
        self.tick()

    def _work(self) -> int:
        self._work_ns += self.step_ns
        return self._work_ns

    def tick(self, seconds: int = 0) -> None:
        self.clock.advance_ms(seconds * 1_000)
        self.shadowing.tick(self.clock.now_ns() + NS_PER_S)

    def ask(self, prefix: bytes, held: int = 0, parent: bytes = b"") -> None:
        self.shadowing.asked(CONTEXT, SPACE_ID, prefix, parent, held, 64, 16)

    def save(self, prefix: bytes, parent: bytes = b"") -> None:
        self.shadowing.saved(CONTEXT, SPACE_ID, prefix, parent, 64, 16)

    @property
    def blocks(self) -> int:
        self.shadowing.drain_all()
        return int(self.shadowing.stats(0)["shadow_blocks"])


PLAN = Plan(("leaf-lru",), (1.0,), 0.5, 0.02)


@pytest.fixture
def looping() -> Iterator[None]:
    """Within a running loop, as the node has it."""
    loop = asyncio.new_event_loop()
    asyncio._set_running_loop(loop)
    yield
    asyncio._set_running_loop(None)
    loop.close()


@pytest.mark.usefixtures("looping")
class TestAlone:
    def test_who_saves_the_beginning_of_what_was_missing_saves_it_all(self) -> None:
        """Though the store, under its policy, may decline the rest."""
        alone = Alone(PLAN)
        alone.ask(prefix_of(10))
        assert alone.blocks == 0
        alone.save(prefix_of(2))
        assert alone.blocks == 10
        alone.save(prefix_of(2))
        assert alone.blocks == 10

    def test_what_the_store_holds_is_held(self) -> None:
        alone = Alone(PLAN)
        alone.ask(prefix_of(10), held=6)
        assert alone.blocks == 6

    def test_what_is_not_in_the_sample_is_only_counted(self) -> None:
        alone = Alone(Plan(("leaf-lru",), (1.0,), 0.03, 0.02))
        alone.ask(b"\xff" * 160)
        alone.save(b"\xff" * 160)
        assert alone.blocks == 0
        assert alone.shadowing._shadows is not None
        assert alone.shadowing._shadows.asked_tokens == 160

    def test_the_beginning_of_a_long_prompt_is_looked_up_in_the_store(self) -> None:
        alone = Alone(PLAN)
        store = alone.shadowing._store
        assert store is not None
        ledger = store.ledger
        arena = ledger._holdings.space.add_arena()
        keys = [SPACE_ID + prefix_of(3)[at : at + 16] for at in (0, 16, 32)]
        made = ledger.reserve(arena, None, keys, 64, "me", CONTEXT)  # type: ignore[arg-type]
        ledger.commit(made.reservation_id, "me", [b"c"] * 3, [b"s"] * 3)
        alone.ask(prefix_of(3), held=3)
        alone.ask(prefix_of(2, start=4), parent=prefix_of(3)[-16:])
        alone.save(prefix_of(2, start=4), parent=prefix_of(3)[-16:])
        assert alone.blocks == 5

    def test_what_costs_too_much_looks_at_less_and_then_ends(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shadowing, "QUEUE_MAX", 3)
        monkeypatch.setattr(shadowing, "PENDING_MAX", 2)
        alone = Alone(PLAN, step_ns=NS_PER_S)
        shadows = alone.shadowing._shadows
        assert shadows is not None
        for number in range(1, 5):
            alone.ask(named(number))
            alone.shadowing._drain()
        assert shadows.sample == 0.25, "without credit nothing is worked off"
        assert alone.shadowing.stats(0)["shadow_dropped"] == 1
        while alone.shadowing.is_on:
            alone.ask(prefix_of(3))
        assert shadows.sample < 2 * SAMPLE_MIN
        assert "the shadow caches ended: they took" in alone.shadowing.trouble
        assert alone.shadowing.said(0) == [alone.shadowing.trouble]
        alone.tick(10)
        alone.shadowing.check()

    def test_no_more_is_spent_than_was_earned(self) -> None:
        """A hundredth of a second of work asked for every second, and two hundredths earned; then five."""
        for each_ns, is_done in ((10_000_000, True), (50_000_000, False)):
            alone = Alone(PLAN, step_ns=each_ns // 3)
            for number in range(1, 101):
                alone.ask(named(number))
                alone.tick(1)
                alone.shadowing._drain()
            assert (len(alone.shadowing._queue) < 10) == is_done
            spent_ns = alone.shadowing.stats(0)["shadow_seconds"] * NS_PER_S
            assert spent_ns < 1.1 * PLAN.cpu * 100 * NS_PER_S + 100 * each_ns * (2 / 3)

    def test_what_begins_most_prompts_is_left_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shadowing, "LOOKS_ENOUGH", 20)
        alone = Alone(PLAN)
        for number in range(2, 30):
            alone.ask(named(1, number))
            alone.save(named(1, number))
        alone.shadowing.drain_all()
        alone.tick(10)
        assert len(alone.shadowing._hot) == 1
        for number in range(2, 40):
            alone.ask(named(1, number), held=1)
            alone.save(named(number), parent=named(1))
        alone.shadowing.check()
        assert alone.blocks == 39
        alone.ask(named(1), held=1)
        assert not alone.shadowing._queue

    def test_too_many_blocks_are_looked_at_less(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shadowing, "BLOCKS_MAX", 5)
        assert BLOCKS_MAX > 5
        alone = Alone(PLAN)
        alone.ask(prefix_of(6), held=6)
        alone.shadowing.drain_all()
        alone.tick(10)
        assert alone.blocks == 0
        assert alone.shadowing.stats(0)["shadow_sample"] == 0.25


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"shadow": "leaf-hazrd"}, "did you mean 'leaf-hazard'"),
        ({"shadow": "leaf-arc", "shadow_sizes": "50"}, "per cent"),
        ({"shadow": "leaf-arc", "shadow_sizes": "0%"}, "per cent"),
        ({"shadow": "leaf-arc", "shadow_sizes": "x%"}, "per cent"),
        (
            {"shadow": "leaf-arc", "shadow_sizes": ",".join(f"{at}%" for at in range(1, 30))},
            "16 are the most",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, str], words: str) -> None:
    with pytest.raises(BadInput, match=words) as caught:
        Node(NodeConfig(http="none", **settings))  # type: ignore[arg-type]
    assert caught.value.code == "bad_config"


@pytest.mark.parametrize("sample", ["0", "1.5", "much"])
def test_a_sample_that_is_none_is_refused(sample: str) -> None:
    with pytest.raises(BadInput, match=r"shadow_sample is .* a number over 0, up to 1"):
        load({"shadow_sample": sample}, {})
