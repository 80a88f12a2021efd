"""A scheduler half over a store in memory, as its tests drive it."""

from __future__ import annotations

from kvcache.client.connectors.attach import Attachment
from kvcache.client.connectors.vllm_plan import StepPlan, Tally
from kvcache.client.connectors.vllm_scheduler import SchedulerSide
from tests.client.connectors.fake_store import (
    BLOCK_TOKENS,
    SPEC,
    FakeRequest,
    FakeStore,
    HandClock,
    namespace,
)


class Rig:
    """A scheduler side with ``ranks`` namespaces, and the pages that its engine would hand out."""

    def __init__(
        self, ranks: int = 1, load_wait_ms: int = 2_000, promise_wait_ms: int = 500, **options: bool
    ) -> None:
        self.store, self.clock, self.tally = FakeStore(), HandClock(), Tally()
        names = [namespace(rank, ranks) for rank in range(ranks)]
        self.attachment = Attachment(lambda: self.store, names, SPEC, self.clock)
        flags = {"loads": True, "saves": True, "save_generated": True, "streams": True, **options}
        self.side = SchedulerSide(
            self.attachment,
            engine="engine",
            block_tokens=BLOCK_TOKENS,
            load_wait_ms=load_wait_ms,
            promise_wait_ms=promise_wait_ms,
            adapter_digest=lambda path, loaded_as: path.encode(),
            clock=self.clock,
            tally=self.tally,
            **flags,
        )

    def step(self, scheduled: dict[str, int] | None = None, preempted: tuple[str, ...] = ()) -> StepPlan:
        plan = self.side.plan(scheduled or {}, lambda _: range(100, 200), preempted)
        self.side.check()
        return plan

    def hold(self, request: FakeRequest, count: int) -> list[bytes]:
        """Put the first ``count`` blocks of the request into the store of every rank."""
        names = []
        for handle in self.attachment.handles():
            names = handle.hashes(request.all_token_ids)[:count]
            for name in names:
                self.store.blocks[handle.namespace_id, name] = bytes(SPEC.block_bytes)
        return names

    def load(self, request: FakeRequest, computed: int = 0) -> StepPlan:
        """Look up, allocate, plan: the plan that starts the load."""
        tokens, asynchronous = self.side.lookup(request, computed)
        assert tokens and asynchronous
        self.side.allocated(request, list(range(100, 200)), tokens)
        return self.step()


def tokens(count: int, first: int = 0) -> list[int]:
    return list(range(first, first + count))
