"""Which policy decides in each tier of a running node, and changing it (docs/tuning-online.md).

    set ──► checked whole ──► told of what is held, STEP_BLOCKS a turn of the loop ──► decides
                                        └── it raises: the old one stays, and it is said why

One owner, the event loop's thread; beside it a thread looks, every ``LOOK_S``, after how long a policy takes.
The sum: a step takes 1 ms, or 3 ms where a policy knows much of each block; 300,000 blocks take 1 to 5 s, and
the loop serves others between any two steps.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from dataclasses import dataclass

from kvcache.clock import Clock
from kvcache.errors import BadInput
from kvcache.eviction.choice import Choice
from kvcache.guard import PolicyGuard, said
from kvcache.ledger import Ledger
from kvcache.patience import LIMIT_NS, Patience
from kvcache.policy import MakePolicy
from kvcache.server.shadowing import Shadowing
from kvcache.tiers.space import Space
from kvcache.wire_tuning import InForce, Tune, Tuned

log = logging.getLogger("kvcache.server")

HOST = "host"
STEP_BLOCKS = 256
LOOK_S = 0.5
_FAULT_CHARS_MAX = 200
_ROOM_BYTES = 1 << 20


@dataclass(slots=True)
class _Tier:
    ledgers: list[Ledger]
    choice: Choice
    declines: bool
    coming: Choice | None = None
    with_state: bool = False
    faults: int = 0  # Of policies that decided before.
    task: asyncio.Task[None] | None = None
    said: str = ""

    @property
    def policies(self) -> list[PolicyGuard]:
        return [ledger.policy for ledger in self.ledgers]

    @property
    def fault_count(self) -> int:
        return sum(policy.faults for policy in self.policies)

    def make(self) -> MakePolicy:
        return (self.coming or self.choice).make(declines=self.declines)


class Tuning:
    def __init__(self, clock: Clock) -> None:
        self._patience = Patience(LIMIT_NS)
        self._looker: threading.Thread | None = None
        self._is_over = threading.Event()
        self.shadowing = Shadowing(patience=self._patience)
        self._clock = clock
        self._tiers: dict[str, _Tier] = {}
        self._changes = 0

    def add(self, name: str, choice: Choice, *ledgers: Ledger, declines: bool) -> None:
        """A tier in which ``choice`` decides, in each of its ledgers. ``declines``: as of ``Choice.make``."""
        self._tiers[name] = _Tier([], choice, declines)
        for ledger in ledgers:
            self.join(name, ledger)

    def make(self, name: str) -> MakePolicy:
        """For one more ledger of this tier: what decides there, or is about to."""
        return self._tiers[name].make()

    def join(self, name: str, ledger: Ledger) -> None:
        """Its policy was made by ``make``, just now."""
        ledger.policy.patience = self._patience
        self._tiers[name].ledgers.append(ledger)

    def start(self) -> None:
        """Look after how long policies take, until ``close``."""
        self._looker = threading.Thread(target=self._look, name="kvcache-policies", daemon=True)
        self._looker.start()

    def _look(self) -> None:
        while not self._is_over.wait(LOOK_S):
            self._patience.look()

    def set(self, request: Tune) -> None:
        """Begin a change. One that is under way in this tier is given up. RAISES BadInput: then nothing has
        changed."""
        tier = self._tiers.get(request.tier)
        if tier is None:
            why = f"this node has {', '.join(self._tiers)}"
            raise BadInput("bad_config", f"there is no tier {request.tier!r:.40} here", why)
        choice = Choice(request.policy, dict(request.params))
        with_state = choice.understands(tier.choice) and not self._fault(tier)
        try:
            tier.with_state = _begin(tier, choice.make(declines=tier.declines), with_state)
        except Exception as error:  # Others' code: what a policy's constructor does is not ours.
            what = f"policy {choice.said} cannot start"
            raise BadInput("bad_config", what, said(error)[:_FAULT_CHARS_MAX], "choose another") from error
        log.info("%s is to decide in tier %s", choice.said, request.tier)
        tier.coming, tier.said = choice, ""
        if tier.task is None:
            tier.task = asyncio.get_running_loop().create_task(self._change(request.tier, tier))

    def tell(self) -> Tuned:
        now_ns = self._clock.now_ns()
        at = self.shadowing.situation(now_ns)
        return Tuned(
            tiers={name: _in_force(tier, self._fault(tier)) for name, tier in self._tiers.items()},
            shadows=self.shadowing.curves(now_ns),
            hit_ratio=at.found_ratio if at is not None else 0.0,
            sample=at.sample if at is not None else 0.0,
            seconds=at.seconds if at is not None else 0.0,
            advice=self.shadowing.said(now_ns),
        )

    def tick(self) -> None:
        if self.shadowing.is_on:
            self.shadowing.tick(self._clock.now_ns())

    def stats(self) -> dict[str, float]:
        return {"policy_changes": float(self._changes), **self.shadowing.stats(self._clock.now_ns())}

    def troubles(self) -> list[str]:
        """In plain words, what does not work as it should."""
        shadows = [self.shadowing.trouble] if self.shadowing.trouble else []
        return shadows + [
            f"leaf-lru decides in tier {name}, as {tier.choice.said} broke the contract: {fault}; set another"
            for name, tier in self._tiers.items()
            if (fault := self._fault(tier))
        ]

    async def close(self) -> None:
        """A change that is under way is given up. May be called twice."""
        self._is_over.set()
        if self._looker is not None:
            self._looker.join()
        for tier in self._tiers.values():
            if tier.task is not None:
                tier.task.cancel()
                await asyncio.gather(tier.task, return_exceptions=True)

    async def _change(self, name: str, tier: _Tier) -> None:
        try:
            # One step a turn, of the first that has not been told of all.
            while not all(policy.change_step(STEP_BLOCKS) for policy in tier.policies):
                await asyncio.sleep(0)
        finally:
            tier.task = None
        assert tier.coming is not None
        coming, tier.coming = tier.coming, None
        if faults := [policy.change_fault for policy in tier.policies if policy.change_fault]:
            where = f" ({len(faults)} of {len(tier.policies)} GPUs)" if len(tier.policies) > 1 else ""
            tier.said = (
                f"{tier.choice.said} goes on{where}, as {coming.said} could not take over: {faults[0]}"
            )
            log.error("tier %s: %s", name, tier.said)
            return
        learned = "what was learned was handed over" if tier.with_state else "it learns from now on"
        tier.said = f"{coming.said} took over from {tier.choice.said}; {learned}"
        tier.choice, tier.faults = coming, tier.fault_count
        self._changes += 1
        if name == HOST:
            self.shadowing.decides(coming, self._clock.now_ns())
        log.info("tier %s: %s", name, tier.said)

    def _fault(self, tier: _Tier) -> str:
        """Why the core decides instead of what was chosen; empty while it does not."""
        if tier.fault_count <= tier.faults:
            return ""
        return next(policy.last_fault for policy in tier.policies if policy.last_fault)


def _begin(tier: _Tier, make_policy: MakePolicy, with_state: bool) -> bool:
    """Was the state handed over? RAISES what the policy's constructor raises, also where there is nothing yet
    to decide over."""
    if not tier.ledgers:
        Ledger(Space(_ROOM_BYTES, _ROOM_BYTES), make_policy)
    begun: list[PolicyGuard] = []
    has_state = bool(tier.ledgers)
    try:
        for policy in tier.policies:
            has_state &= policy.begin_change(make_policy, with_state=with_state)
            begun.append(policy)
    except Exception:
        for policy in begun:
            policy.cancel_change()
        raise
    return has_state


def _in_force(tier: _Tier, fault: str) -> InForce:
    return InForce(
        policy=tier.choice.name,
        params=dict(tier.choice.params),
        blocks=int(sum(ledger.stats()["blocks"] for ledger in tier.ledgers)),
        coming=tier.coming.said if tier.coming is not None else "",
        told_blocks=sum(policy.told_count for policy in tier.policies),
        fault=fault,
        said=tier.said,
    )
