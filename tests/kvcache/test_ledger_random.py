"""Any order of events: the ledger's model, driven by hypothesis and by long seeded days."""

from __future__ import annotations

import os
from collections.abc import Callable
from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvcache.eviction.fifo import Fifo
from kvcache.eviction.leaf_lru import LeafLru
from kvcache.eviction.registry import policy_class
from kvcache.eviction.score import BlockMeta, scored
from kvcache.policy import EvictionPolicy, RequestContext, TreeView
from kvcache.testing.device_model import DeviceModel
from kvcache.testing.ledger_model import OWNERS, LedgerModel, pick
from kvcache.testing.ledger_world import NAMESPACES


class Erratic(LeafLru):
    """A policy that answers right, until it does not."""

    def __init__(self, tree: TreeView, capacity_bytes: int) -> None:
        super().__init__(tree, capacity_bytes)
        self._random = Random(3)

    def victims(self, context: RequestContext, count: int) -> list[int]:
        right = list(super().victims(context, count))
        return self._err(right)

    def victims_on(self, context: RequestContext, count: int, device: int) -> list[int]:
        return self._err(list(super().victims_on(context, count, device)))

    def _err(self, right: list[int]) -> list[int]:
        match self._random.randrange(6):
            case 0:
                raise RuntimeError("erratic")
            case 1:
                return right[::-1]
            case 2:
                return [*right, 99_999]
            case 3:
                return []
        return right


class Deepest:
    """The short form, and as unhelpful as one can be: parents would go first, if they could."""

    def score(self, block: int, meta: BlockMeta, now: float) -> float:
        return meta.depth


def strict() -> type[EvictionPolicy]:
    """Every wrapper, with quotas and retention that matter in a small cache."""
    everything = policy_class("leaf-hazard+keep+cost")

    class Strict(everything):  # type: ignore[misc, valid-type]  # It is made when it is asked for.
        def __init__(self, tree: TreeView, capacity_bytes: int) -> None:
            super().__init__(tree, capacity_bytes, tenant_share=0.3, retain_ms=1, cost_weight=0.5, samples=1)

    return Strict


POLICIES: tuple[type[EvictionPolicy], ...] = (
    LeafLru,
    Fifo,
    Erratic,
    scored(Deepest),
    *map(policy_class, ("leaf-hazard", "leaf-arc", "leaf-arc+cost+keep")),
    strict(),
)
SOUND = tuple(policy for policy in POLICIES if policy is not Erratic)
OWNER = st.sampled_from(OWNERS)
NAMESPACE = st.sampled_from(NAMESPACES)
STEPS = st.lists(st.sampled_from("ab"), min_size=1, max_size=6).map("".join)
WHICH = st.integers(0, 1 << 16)


class LedgerMachine(RuleBasedStateMachine):
    @initialize(policy=st.sampled_from(POLICIES))
    def start(self, policy: type[EvictionPolicy]) -> None:
        self.model = self.make(policy)

    def make(self, policy: type[EvictionPolicy]) -> LedgerModel:
        return LedgerModel(policy, trusted=policy is not Erratic)

    @rule(owner=OWNER, namespace=NAMESPACE, steps=STEPS, cut=st.sampled_from((0, 0, 0, 1, 2)))
    def reserve(self, owner: str, namespace: str, steps: str, cut: int) -> None:
        self.model.reserve(owner, namespace, steps, cut)

    @rule(owner=OWNER, namespace=NAMESPACE, steps=STEPS, fork=st.booleans())
    def save(self, owner: str, namespace: str, steps: str, fork: bool) -> None:
        self.model.save(owner, namespace, steps, fork)

    @rule(namespace=NAMESPACE, count=st.integers(1, 8))
    def make_room(self, namespace: str, count: int) -> None:
        self.model.make_room(namespace, count)

    @precondition(lambda self: self.model.writers)
    @rule(which=WHICH)
    def commit(self, which: int) -> None:
        self.model.commit(which)

    @precondition(lambda self: self.model.writers)
    @rule(which=WHICH)
    def abort(self, which: int) -> None:
        self.model.abort(which)

    @precondition(lambda self: self.model.writers)
    @rule(which=WHICH, count=st.integers(0, 4))
    def shorten(self, which: int, count: int) -> None:
        self.model.shorten(which, count)

    @precondition(lambda self: self.model.writers or self.model.vanished)
    @rule(which=WHICH)
    def scribble(self, which: int) -> None:
        self.model.scribble(which)

    @rule(namespace=NAMESPACE, steps=STEPS)
    def match(self, namespace: str, steps: str) -> None:
        self.model.match(namespace, steps)

    @rule(owner=OWNER, namespace=NAMESPACE, steps=STEPS, length_ns=st.integers(1, 40), shared=st.booleans())
    def lease(self, owner: str, namespace: str, steps: str, length_ns: int, shared: bool) -> None:
        self.model.lease(owner, namespace, steps, length_ns, "one" if shared else "")

    @rule(owner=OWNER, first=WHICH, count=st.integers(1, 4), length_ns=st.integers(1, 40))
    def borrow(self, owner: str, first: int, count: int, length_ns: int) -> None:
        self.model.borrow(owner, first, count, length_ns)

    @precondition(lambda self: self.model.readers)
    @rule(which=WHICH)
    def release(self, which: int) -> None:
        self.model.release(which)

    @rule(step_ns=st.integers(1, 30))
    def time_passes(self, step_ns: int) -> None:
        self.model.time_passes(step_ns)

    @rule(owner=OWNER, writes_ended=st.booleans())
    def disconnect(self, owner: str, writes_ended: bool) -> None:
        self.model.disconnect(owner, writes_ended)

    @rule(owner=OWNER)
    def writes_ended(self, owner: str) -> None:
        self.model.writes_ended(owner)

    @rule(namespace=NAMESPACE, steps=STEPS)
    def pin(self, namespace: str, steps: str) -> None:
        self.model.pin(namespace, steps)

    @rule(namespace=NAMESPACE, steps=STEPS)
    def unpin(self, namespace: str, steps: str) -> None:
        self.model.unpin(namespace, steps)

    @precondition(lambda self: self.model.found)
    @rule(which=WHICH, length_ns=st.integers(1, 60), stale=st.booleans())
    def quarantine(self, which: int, length_ns: int, stale: bool) -> None:
        self.model.quarantine(which, length_ns, stale)

    @rule(which=WHICH)
    def change_policy(self, which: int) -> None:
        self.model.change_policy(pick(SOUND, which))

    @rule(count=st.integers(1, 40))
    def change_step(self, count: int) -> None:
        self.model.change_step(count)

    @invariant()
    def check(self) -> None:
        if hasattr(self, "model"):
            self.model.check()

    def teardown(self) -> None:
        if hasattr(self, "model"):
            self.model.end()


class DeviceMachine(LedgerMachine):
    """The same over two devices, which are lost and come back."""

    def make(self, policy: type[EvictionPolicy]) -> LedgerModel:
        self.devices = DeviceModel(policy, trusted=policy is not Erratic)
        return self.devices

    @rule(device=st.integers(0, 1), length_ns=st.integers(0, 30))
    def lose(self, device: int, length_ns: int) -> None:
        self.devices.lose(device, length_ns)

    @rule(device=st.integers(0, 1), seed=WHICH)
    def restore(self, device: int, seed: int) -> None:
        self.devices.restore(device, seed)

    @rule(device=st.integers(0, 1), seed=WHICH)
    def blink(self, device: int, seed: int) -> None:
        self.devices.blink(device, seed)


TestLedgerMachine = pytest.mark.slow(LedgerMachine.TestCase)
TestLedgerMachine.settings = settings(stateful_step_count=50)
TestDeviceMachine = pytest.mark.slow(DeviceMachine.TestCase)
TestDeviceMachine.settings = settings(stateful_step_count=50)


@pytest.mark.parametrize("model_of", [LedgerModel, DeviceModel])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(max(2, int(os.environ.get("KVCACHE_FAULT_FACTOR", "0")))))
def test_a_long_day(policy: type[EvictionPolicy], seed: int, model_of: type[LedgerModel]) -> None:
    """The same deeds, weighted as a busy node would see them, over a thousand steps."""
    random = Random(seed)
    model = model_of(policy, trusted=policy is not Erratic)

    def path() -> tuple[str, str]:
        return random.choice(NAMESPACES), "".join(random.choice("ab") for _ in range(random.randint(1, 6)))

    def which() -> int:
        return random.randrange(1 << 16)

    def owner() -> str:
        return random.choice(OWNERS)

    deeds: list[tuple[int, Callable[[], None]]] = [
        (30, lambda: model.save(owner(), *path(), random.random() < 0.5)),
        (10, lambda: model.reserve(owner(), *path(), random.randrange(3))),
        (20, lambda: model.lease(owner(), *path(), random.randint(1, 40), pick(("", "one"), which()))),
        (15, lambda: model.release(which()) if model.readers else None),
        (8, lambda: model.commit(which()) if model.writers else None),
        (3, lambda: model.abort(which()) if model.writers else None),
        (5, lambda: model.scribble(which()) if model.writers or model.vanished else None),
        (5, lambda: model.match(*path())),
        (3, lambda: model.make_room(path()[0], random.randint(1, 8))),
        (8, lambda: model.time_passes(random.randint(1, 10))),
        (2, lambda: model.disconnect(owner(), random.random() < 0.5)),
        (2, lambda: model.writes_ended(owner())),
        (1, lambda: model.pin(*path())),
        (3, lambda: model.unpin(*path())),
        (3, lambda: model.shorten(which(), random.randrange(4)) if model.writers else None),
        (8, lambda: model.borrow(owner(), which(), random.randint(1, 4), random.randint(1, 40))),
        (1, lambda: model.change_policy(random.choice(SOUND))),
        (6, lambda: model.change_step(random.randint(1, 8))),
        (2, lambda: model.quarantine(which(), 9, random.random() < 0.3) if model.found else None),
    ]
    if isinstance(model, DeviceModel):
        devices = model
        deeds += [
            (2, lambda: devices.lose(random.randrange(2), random.randint(0, 9))),
            (4, lambda: devices.restore(random.randrange(2), which())),
            (6, lambda: devices.blink(random.randrange(2), which())),
        ]
    for _ in range(1_000):
        random.choices(deeds, [weight for weight, _ in deeds])[0][1]()
        model.check()
    model.end()
