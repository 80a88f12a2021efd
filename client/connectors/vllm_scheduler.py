"""The scheduler half of the vLLM connector: what a request loads and saves, and when its pages are free.

Decides only; the one thing it waits for is the store's answer to a lease, bounded by the store's own
deadline and by ``STEP_BUDGET_NS`` for all requests of one step together (after that, "ask me again").

A request goes through these states (all of one ``_State``):

    known -> looked up (lease held) -> loading -> running -> ended
                    \\_ nothing to load _________/  \\_ preempted: looked up again

Invariants:

* at most one lease a rank is held for a request; it is released when the load has ended, when nothing
  is loaded, or when the request ends;
* a block is handed out to be saved at most once between two look-ups, only when full and computed, never
  when it was loaded from the store;
* ``issued`` counts, over all ranks, the saves whose pages may still be read: while it is not zero the
  engine keeps the pages of an ended request;
* after a load of a request has failed, the request is not looked up again;
* after a reset no block named before it is loaded, and no request known before it is saved.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvcache.block import BlockHash, chain, extra_keys
from kvcache.client.connectors.attach import Attachment
from kvcache.client.connectors.vllm_plan import EngineRequest, Feature, LoadJob, SaveJob, StepPlan, Tally
from kvcache.clock import NS_PER_MS, NS_PER_S, Clock

if TYPE_CHECKING:
    from kvcache.client.store import Handle, Lease

STEP_BUDGET_NS = 50 * NS_PER_MS
LEASE_RENEW_NS = 10 * NS_PER_S
ERA_BYTES = 16
FAULTS = ("missed_calls:", "ended:", "refused_connects")


@dataclass(frozen=True, slots=True)
class _Lookup:
    """What the store holds of a request's prompt, and our right to it (one lease a rank)."""

    prefix: tuple[BlockHash, ...]
    start: int
    held: int
    leases: tuple[Lease, ...]
    taken_ns: int


@dataclass(slots=True)
class _State:
    request: EngineRequest
    uncacheable: str
    adapter: bytes = b""
    hashes: list[BlockHash] = field(default_factory=list)
    lookup: _Lookup | None = None
    loading: LoadJob | None = None
    bad_blocks: set[int] = field(default_factory=set)
    load_failed: bool = False
    saved: int = 0
    issued: int = 0


class SchedulerSide:
    """Called by the engine's scheduler only, from one thread.

    ``engine`` tells this engine's requests from another's. ``adapter_digest`` names a LoRA adapter by
    content, given its path and the engine's number for it; it returns b"" when it cannot.
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
        self._adapter_digest = adapter_digest
        self._clock = clock
        self._tally = tally
        self._states: dict[str, _State] = {}
        self._loads: list[LoadJob] = []
        self._abandoned: list[LoadJob] = []
        self._freeing: list[str] = []
        self._forgotten: list[str] = []
        self._spent_ns = 0
        self._era = b""

    def known(self, request: EngineRequest) -> None:
        """The engine has taken the request in. May be called again for the same one."""
        if request.request_id not in self._states:
            adapter, uncacheable = self._identity(request)
            self._states[request.request_id] = _State(request, uncacheable, adapter)

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
        if not fresh and self._spent_ns >= STEP_BUDGET_NS:
            self._tally.add("lookups", reason="deferred")
            return None, False
        if not fresh:
            self._release(state)
            self._ask(state, start, end)
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
        state.loading = LoadJob(request.request_id, self._name(request.request_id), prefix, start, pages)
        (self._loads if lookup is not None else self._abandoned).append(state.loading)

    def plan(
        self,
        scheduled_tokens: Mapping[str, int],
        pages_of: Callable[[str], Sequence[int]],
        preempted: Iterable[str],
    ) -> StepPlan:
        """End of a scheduling step: all loads decided in it, and a save for each block that it completes.

        Loads and ended requests are in the plan even when planning the saves fails."""
        self._spent_ns = 0
        gone = tuple(preempted)
        saves: list[SaveJob] = []
        try:
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
        )
        self._loads, self._abandoned, self._freeing, self._forgotten = [], [], [], []
        return plan

    def absorb(
        self, received: Collection[str], bad_blocks: Collection[int], saved: Mapping[str, int]
    ) -> None:
        """What the workers report: loads that ended, pages that could not be filled, saves that ended."""
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

    def reset(self) -> None:
        """The engine has dropped its cache, perhaps for new weights: from now on blocks have names that
        only this engine knows, so that nothing computed before is found by it, nor the new by others."""
        self._era = os.urandom(ERA_BYTES)
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

    def _skip_reason(self, state: _State, start: int, end: int) -> str:
        if state.uncacheable:
            return state.uncacheable
        if not self._may_load or state.request.skip_reading_prefix_cache:
            return "not_wanted"
        if state.load_failed:
            return "failed_before"
        return "" if end > start else "too_short"

    def _ask(self, state: _State, start: int, end: int) -> None:
        """Lease the prefix at every rank; keep the leases when they are worth a load."""
        began_ns = self._clock.now_ns()
        handles = self._attachment.handles()
        if not handles:
            self._spent_ns += self._clock.now_ns() - began_ns
            self._tally.add("lookups", reason="unavailable")
            return
        prefix = self._prefix(state, handles[0], end)[:end]
        name = self._name(state.request.request_id)
        leases = [self._attachment.store.lease(handle, prefix, name) for handle in handles]
        now_ns = self._clock.now_ns()
        self._spent_ns += now_ns - began_ns
        held = min(lease.count for lease in leases)
        state.saved = held
        state.lookup = _Lookup(tuple(prefix), start, held, tuple(leases), now_ns)
        faults = self._faults()
        if held <= start:
            self._release(state)
            self._tally.add("lookups", reason="unavailable" if faults else "miss")
            return
        self._tally.add("lookups", reason="hit")
        self._tally.add("hit_tokens", (held - start) * self._block_tokens)

    def _faults(self) -> int:
        """Hand on what the store's client counted; how many calls to the store went wrong."""
        news = self._attachment.news()
        for name, count in news.items():
            self._tally.add("lookup_store", count, name)
        return sum(count for name, count in news.items() if name.startswith(FAULTS))

    def _stale(self, lookup: _Lookup) -> bool:
        return self._clock.now_ns() - lookup.taken_ns > LEASE_RENEW_NS

    def _release(self, state: _State) -> None:
        lookup, state.lookup = state.lookup, None
        for lease in lookup.leases if lookup is not None else ():
            if lease.count:
                self._attachment.store.release(lease)

    def _loaded(self, state: _State) -> None:
        job, state.loading = state.loading, None
        self._release(state)
        if job is not None and state.bad_blocks:
            state.load_failed = True
            state.saved = job.start + min(job.block_ids.index(block) for block in state.bad_blocks)
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
        job = SaveJob(request_id, parent, b"".join(hashes[state.saved : full]), state.saved, pages)
        state.saved = full
        state.issued += len(handles)
        return [job]

    def _prefix(self, state: _State, handle: Handle, block_count: int) -> list[BlockHash]:
        """The request's hashes, at least ``block_count``. REQUIRES: so many full blocks of known tokens."""
        done = len(state.hashes)
        if done < block_count:
            tokens = state.request.all_token_ids[done * self._block_tokens : block_count * self._block_tokens]
            extra = [self._extra(state, index) for index in range(done, block_count)]
            root = state.hashes[-1] if state.hashes else handle.root
            state.hashes += chain(root, handle.tenant_key, tokens, self._block_tokens, extra)
        return state.hashes

    def _extra(self, state: _State, block_index: int) -> bytes:
        """What a block depends on besides its tokens: adapter and salt (the first), multimodal items."""
        parts: list[tuple[str, bytes]] = []
        if block_index == 0 and self._era:
            parts.append(("era", self._era))
        if block_index == 0 and state.adapter:
            parts.append(("lora", state.adapter))
        if block_index == 0 and state.request.cache_salt:
            parts.append(("salt", _text(state.request.cache_salt)))
        start = block_index * self._block_tokens
        for feature in state.request.mm_features:
            if _overlaps(feature, start, start + self._block_tokens):
                place = (feature.mm_position.offset - start).to_bytes(8, "little", signed=True)
                parts.append(("mm", place + _text(feature.identifier)))
        return extra_keys(parts)

    def _identity(self, request: EngineRequest) -> tuple[bytes, str]:
        """(adapter digest, why this request cannot be cached, if so)."""
        if request.prompt_embeds is not None:
            return b"", "prompt_embeds"
        if request.resumable:
            return b"", "streaming_input"
        adapter = request.lora_request
        if adapter is None:
            return b"", ""
        if adapter.load_inplace:
            return b"", "adapter_in_place"
        digest = self._adapter_digest(adapter.lora_path, adapter.lora_int_id)
        return digest, "" if digest else "adapter_unknown"


def _overlaps(feature: Feature, start: int, end: int) -> bool:
    place = feature.mm_position
    return place.offset < end and start < place.offset + place.length


def _text(value: str) -> bytes:
    """Any string the engine lets through, lone surrogates too, as bytes that no other string has."""
    return value.encode("utf-8", "surrogatepass")
