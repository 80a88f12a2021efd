"""The scheduler half of the vLLM connector: what a request loads and saves, and when its pages are free.

Decides only; the one thing it waits for is the store's answer to a lease, bounded by the store's own
deadline and by ``STEP_BUDGET_NS`` for all requests of one step together (after that, "ask me again").

A request goes through these states (all of one ``vllm_request.State``):

    known -> looked up (lease held) -> loading -> running -> ended
      |  ^          \\_ nothing to load _________/  \\_ preempted: looked up again
      v  |
     coming (from NVMe, or from another node; nothing held)

While blocks are coming the engine is told to ask again, and goes on with its other requests: vLLM steps
over such a request and keeps its place in the queue. With nothing else to do vLLM asks each millisecond, or
without a pause where engine and caller share a process. So an idle engine waits in the store, which answers
as soon as the blocks are there; a busy one asks now and then. Both times grow, within limits, to a quarter
of what the request has waited. After ``load_wait_ms`` it takes what is there. Never before: a request whose
prompt is still being computed elsewhere would compute the rest of it here at the same time.

Invariants:

* at most one lease a rank is held for a request; it is released when the load has ended, when nothing
  is loaded, or when the request ends;
* a block is handed out to be saved at most once between two look-ups, only when full and computed, never
  when it was loaded from the store, unless it came from below and is to go into HBM;
* ``issued`` counts, over all ranks, the saves whose pages may still be read: while it is not zero the
  engine keeps the pages of an ended request;
* after a load of a request has failed, the request is not looked up again;
* after a reset no block named before it is loaded, and no request known before it is saved.

With HBM (``use_hbm``) leases are of HBM first, and saves go there; but for a prompt that another engine will
decode: other nodes do not get what only HBM holds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from kvcache.block import BlockHash
from kvcache.client.connectors.attach import Attachment
from kvcache.client.connectors.handoff import Params, answer, read
from kvcache.client.connectors.vllm_asking import Asking, in_hbm
from kvcache.client.connectors.vllm_names import Names
from kvcache.client.connectors.vllm_plan import EngineRequest, LoadJob, SaveJob, StepPlan, Tally
from kvcache.client.connectors.vllm_rate import PrefillMeter
from kvcache.client.connectors.vllm_request import Lookup, State, Wait
from kvcache.clock import NS_PER_MS, NS_PER_S, Clock

if TYPE_CHECKING:
    from kvcache.client.store import Handle, Lease

STEP_BUDGET_NS = 50 * NS_PER_MS
LEASE_RENEW_NS = 10 * NS_PER_S
STREAM_BLOCKS_MIN = 4
"""Fewer new blocks are not worth a step of layers for the engine's own sake: all are copied after it."""
FAULTS = ("missed_calls:", "ended:", "refused_connects")


class SchedulerSide:
    """Called by the engine's scheduler only, from one thread.

    ``engine`` tells this engine's requests from another's. ``load_wait_ms`` is how long a request waits, at
    most, for blocks that are coming, ``promise_wait_ms`` if only the router says so. ``streams``: prompts
    that another engine will decode are given to the store layer by layer. ``adapter_digest``: see ``Names``.
    """

    def __init__(
        self,
        attachment: Attachment,
        *,
        engine: str,
        block_tokens: int,
        loads: bool,
        saves: bool,
        save_generated: bool,
        load_wait_ms: int,
        promise_wait_ms: int,
        streams: bool,
        adapter_digest: Callable[[str, int], bytes],
        clock: Clock,
        tally: Tally,
    ) -> None:
        self._attachment = attachment
        self._engine = engine
        self._block_tokens = block_tokens
        self._may_load = loads
        self._may_save = saves
        self._save_generated = save_generated
        self._load_wait_ms = load_wait_ms
        self._promise_wait_ms = promise_wait_ms
        self._streams = streams
        self._names = Names(block_tokens, adapter_digest)
        self._clock = clock
        self._tally = tally
        self._states: dict[str, State] = {}
        self._loads: list[LoadJob] = []
        self._abandoned: list[LoadJob] = []
        self._freeing: list[str] = []
        self._forgotten: list[str] = []
        self._meter = PrefillMeter()
        self._spent_ns = 0
        self._hbm = False
        self._idle = True  # The last step had nothing to compute, and this one has not waited yet.

    def use_hbm(self, yes: bool) -> None:
        """Can every worker load what only HBM holds? REQUIRES: then the store plans for their GPU
        (``connect_planning_blocking``)."""
        self._hbm = yes

    def known(self, request: EngineRequest) -> None:
        """The engine has taken the request in. May be called again for the same one."""
        if request.request_id not in self._states:
            adapter, uncacheable = self._names.identity(request)
            handoff = read(request.kv_transfer_params)
            for reason in (handoff.do, handoff.ignored and f"ignored_{handoff.ignored}"):
                self._tally.add("handoffs", bool(reason), reason)
            wait = Wait.of(handoff, self._load_wait_ms, self._promise_wait_ms)
            self._states[request.request_id] = State(request, uncacheable, adapter, handoff, wait)

    def lookup(self, request: EngineRequest, computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens that can be loaded beyond ``computed_tokens``; None means ask again in the next step.

        Whole blocks, and at least one token is left to compute. Asking twice gives the same answer."""
        self.known(request)
        state = self._states[request.request_id]
        start = computed_tokens // self._block_tokens
        end = (request.num_tokens - 1) // self._block_tokens
        if skipped := self._skip_reason(state, start, end):
            self._tally.add("lookups", reason=skipped)
            self._release(state)
            return 0, False
        fresh = state.lookup is not None and state.lookup.start == start and not self._stale(state.lookup)
        if not fresh and state.wait.rests(self._clock.now_ns(), idle=self._idle):
            return None, False
        if not fresh and self._spent_ns >= STEP_BUDGET_NS:
            self._tally.add("lookups", reason="deferred")
            return None, False
        if not fresh:
            self._release(state)
            if not self._ask(state, start, end):
                return None, False
        if state.lookup is None:
            return 0, False
        return (state.lookup.held - start) * self._block_tokens, True

    def allocated(self, request: EngineRequest, block_ids: Sequence[int], external_tokens: int) -> None:
        """The request has its pages; ``external_tokens`` are expected to be loaded into them."""
        self.known(request)
        state = self._states[request.request_id]
        if external_tokens == 0:
            self._release(state)
            return
        lookup = state.lookup
        count = external_tokens // self._block_tokens
        start = lookup.start if lookup is not None else 0
        prefix = b"".join(lookup.prefix) if lookup is not None else b""
        pages = tuple(block_ids[start : start + count])
        name, hbm = self._name(request.request_id), lookup is not None and lookup.hbm
        state.loading = LoadJob(request.request_id, name, prefix, start, pages, hbm)
        (self._loads if lookup is not None else self._abandoned).append(state.loading)

    def plan(
        self,
        scheduled_tokens: Mapping[str, int],
        pages_of: Callable[[str], Sequence[int]],
        preempted: Iterable[str],
    ) -> StepPlan:
        """End of a scheduling step: all loads decided in it, and a save for each block that it completes.

        Loads and ended requests are in the plan even when planning the saves fails."""
        self._spent_ns, self._idle, timed = 0, not scheduled_tokens, 0
        gone = tuple(preempted)
        saves: list[SaveJob] = []
        try:
            timed = self._timed(scheduled_tokens)
            for request_id in gone:
                if state := self._states.get(request_id):
                    self._release(state)
            for request_id, token_count in scheduled_tokens.items():
                saves += self._saves(request_id, token_count, pages_of)
        except Exception:  # Border with the engine: a save is never worth a step.
            self._tally.add("errors", reason="plan")
        plan = StepPlan(
            loads=tuple(self._loads),
            saves=tuple(saves),
            abandoned=tuple(self._abandoned),
            preempted=gone,
            freeing=tuple(self._freeing),
            forgotten=tuple(self._forgotten),
            timed=timed,
        )
        self._loads, self._abandoned, self._freeing, self._forgotten = [], [], [], []
        return plan

    def absorb(
        self,
        received: Collection[str],
        bad_blocks: Collection[int],
        saved: Mapping[str, int],
        timed: int = 0,
    ) -> None:
        """What the workers report at the end of a step: loads that ended, pages that could not be filled,
        saves that ended, and the number of the step if it is timed."""
        self._meter.ended(self._clock.now_ns(), timed)
        for state in self._states.values() if bad_blocks else ():
            if state.loading is not None:
                state.bad_blocks.update(set(state.loading.block_ids).intersection(bad_blocks))
        for request_id in received:
            if loaded := self._states.get(request_id):
                self._loaded(loaded)
        for request_id, count in saved.items():
            if saving := self._states.get(request_id):
                saving.issued -= count

    def ended(self, request_id: str) -> bool:
        """The request is over. True: its pages must stay until the workers report it in ``freeing``."""
        state = self._states.pop(request_id, None)
        if state is None:
            return False
        self._release(state)
        # While a load runs the engine itself keeps the pages, until the load is reported: once is enough.
        keep = state.issued > 0 and state.loading is None
        (self._freeing if keep else self._forgotten).append(request_id)
        return keep

    def answer(self, request_id: str) -> Params | None:
        """What the router is told when the request is over. Asked before ``ended``."""
        state = self._states.get(request_id)
        if state is None or not self._may_save:
            return None
        return answer(state.handoff, self._attachment.node, state.saved, self._block_tokens)

    def reset(self) -> None:
        """The engine has dropped its cache, perhaps for new weights: from now on blocks have names that
        only this engine knows, so that nothing computed before is found by it, nor the new by others."""
        self._names.begin_era()
        for state in self._states.values():
            self._release(state)
            state.uncacheable, state.saved = "before_reset", 0

    def close(self) -> None:
        for state in self._states.values():
            self._release(state)
        self._states.clear()
        self._attachment.close()

    def check(self) -> None:
        """Assert the invariants that can be seen from here."""
        for request_id, state in self._states.items():
            assert state.request.request_id == request_id
            assert state.issued >= 0, request_id
            assert state.saved <= len(state.hashes), request_id
            assert state.loading is None or state.lookup is not None or not state.loading.prefix, request_id
            assert not state.uncacheable or (state.lookup is None and state.saved == 0), request_id

    # --- helpers ----------------------------------------------------------------------------------

    def _name(self, request_id: str) -> str:
        """Under this name the leases of scheduler and workers are one."""
        return f"{self._engine}/{request_id}"

    def _skip_reason(self, state: State, start: int, end: int) -> str:
        if state.uncacheable:
            return state.uncacheable
        if not self._may_load or state.request.skip_reading_prefix_cache:
            return "not_wanted"
        if state.load_failed:
            return "failed_before"
        return "" if end > start else "too_short"

    def _ask(self, state: State, start: int, end: int) -> bool:
        """Lease the prefix at every rank; keep the leases when they are worth a load. False: blocks that
        would make it worth more are coming."""
        began_ns = self._clock.now_ns()
        handles = self._attachment.handles()
        if not handles:
            self._spent_ns += self._clock.now_ns() - began_ns
            self._tally.add("lookups", reason="unavailable")
            return True
        prefix = self._prefix(state, handles[0], end)[:end]
        hbm = self._takes_hbm(state)
        leases = self._leases(state, handles, prefix, hbm)
        now_ns = self._clock.now_ns()
        self._spent_ns += now_ns - began_ns
        faults = self._faults()
        held, hot = min(lease.count for lease in leases), min(map(in_hbm, leases))
        promised = min(state.handoff.promised, len(prefix))
        state.lookup = Lookup(tuple(prefix), start, held, tuple(leases), now_ns, hbm)
        have, all_there = max(held, start), state.handoff.covers(held)
        is_coming = not all_there and min(lease.count + lease.coming for lease in leases) > have
        coming = is_coming or promised > have
        if coming and state.wait.asks_again(began_ns, now_ns, promised=not is_coming):
            self._release(state)
            self._tally.add("lookups", reason="coming")
            return False
        state.saved = hot if hbm else held
        if held <= start:
            self._release(state)
            late = "not_in_time" if coming else "miss"
            self._tally.add("lookups", reason="unavailable" if faults else late)
            return True
        self._tally.add("lookups", reason="hit")
        self._tally.add("hit_tokens", (held - start) * self._block_tokens)
        self._tally.add("hbm_tokens", max(0, min(hot, held) - start) * self._block_tokens)
        return True

    def _takes_hbm(self, state: State) -> bool:
        return self._hbm and state.handoff.do != "prefill"

    def _leases(
        self, state: State, handles: Sequence[Handle], prefix: Sequence[BlockHash], hbm: bool
    ) -> list[Lease]:
        """One a rank. An idle engine waits for blocks that are coming, all ranks together once a step."""
        store = self._attachment.store
        store.prefill_tokens_s = self._meter.tokens_s
        wait_ns = state.wait.step_ns(self._clock.now_ns()) if self._idle else 0
        asking = Asking(self._name(state.request.request_id), state.handoff, state.hints, wait_ns, hbm)
        leases = asking.leases(store, handles, prefix, self._clock)
        self._idle = self._idle and not any(lease.coming for lease in leases)
        return leases

    def _timed(self, scheduled_tokens: Mapping[str, int]) -> int:
        """The number of this step, if it is one that tells how fast the engine prefills."""
        prefill_tokens = 0
        for request_id, token_count in scheduled_tokens.items():
            if state := self._states.get(request_id):
                left = state.request.num_prompt_tokens - state.request.num_computed_tokens
                prefill_tokens += max(0, min(left, token_count))
        return self._meter.planned(self._clock.now_ns(), prefill_tokens, sum(scheduled_tokens.values()))

    def _faults(self) -> int:
        """Hand on what the store's client counted; how many calls to the store went wrong."""
        news = self._attachment.news()
        for name, count in news.items():
            self._tally.add("lookup_store", count, name)
        return sum(count for name, count in news.items() if name.startswith(FAULTS))

    def _stale(self, lookup: Lookup) -> bool:
        return self._clock.now_ns() - lookup.taken_ns > LEASE_RENEW_NS

    def _release(self, state: State) -> None:
        lookup, state.lookup = state.lookup, None
        for lease in lookup.leases if lookup is not None else ():
            if lease.count:
                self._attachment.store.release(lease)

    def _loaded(self, state: State) -> None:
        job, state.loading = state.loading, None
        self._release(state)
        if job is not None and state.bad_blocks:
            state.load_failed = True
            first_bad = min(job.block_ids.index(block) for block in state.bad_blocks)
            state.saved = min(state.saved, job.start + first_bad)
        state.bad_blocks.clear()

    def _saves(
        self, request_id: str, token_count: int, pages_of: Callable[[str], Sequence[int]]
    ) -> list[SaveJob]:
        state = self._states.get(request_id)
        if state is None or state.uncacheable or not self._may_save:
            return []
        request = state.request
        known_tokens = request.num_tokens if self._save_generated else request.num_prompt_tokens
        full = min(request.num_computed_tokens + token_count, known_tokens) // self._block_tokens
        handles = self._attachment.handles() if full > state.saved else ()
        if not handles:
            return []
        hashes = self._prefix(state, handles[0], full)
        pages = tuple(pages_of(request_id)[state.saved : full])
        assert len(pages) == full - state.saved, f"{len(pages)} pages for {full - state.saved} blocks"
        parent = hashes[state.saved - 1] if state.saved else b""
        prefill, hbm = state.handoff.do == "prefill", self._takes_hbm(state)
        job = SaveJob(
            request_id,
            parent,
            b"".join(hashes[state.saved : full]),
            state.saved,
            pages,
            streams=self._streams and (prefill or (hbm and len(pages) >= STREAM_BLOCKS_MIN)),
            push=state.handoff.push_to if prefill else "",
            hints=state.hints,
            hbm=hbm,
        )
        state.saved = full
        state.issued += len(handles)
        return [job]

    def _prefix(self, state: State, handle: Handle, block_count: int) -> list[BlockHash]:
        """The request's hashes, at least ``block_count``. REQUIRES: so many full blocks of known tokens."""
        self._names.extend(state.hashes, state.request, state.adapter, handle, block_count)
        return state.hashes
