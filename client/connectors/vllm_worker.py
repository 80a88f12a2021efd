"""The worker half of the vLLM connector: moves whole pages between engine and store, beside the engine.

How they go, by host memory or by a device, is in ``vllm_moves``.

One thread does all of it, loads before saves; a save is done in batches of about ``BATCH_BYTES`` so
that a load never waits for more than one. The engine's calls only queue jobs and collect results. Prompts
that another engine will decode are saved while the forward pass runs, layer by layer (``vllm_stream``);
that is queued behind the saves of earlier steps, whose blocks are its parents, and it is published only when
the pass has ended well.

Whose bytes when:

* a page being loaded belongs to this side from the plan until its request is in ``take_received``;
* a page being saved is only read here. The engine keeps it until the save is in ``take_saved`` (an ended
  request: until it is in ``take_freed``); before it takes pages from a running request it calls
  ``release_pages``, which returns when none of them is read any more.

The sum: the copy is the client's native one (memory speed, GIL released); a page costs about 0.3 us of
interpreter a layer, so 16 layers of 128 KiB (2 MiB) a block cost about 5 us against 200 us of copying.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from threading import Condition, Thread
from typing import TYPE_CHECKING

from kvcache.block import HASH_BYTES, split_hashes
from kvcache.client.connectors.attach import Attachment
from kvcache.client.connectors.vllm_moves import Moves
from kvcache.client.connectors.vllm_plan import LoadJob, SaveJob, StepPlan, Tally
from kvcache.client.connectors.vllm_stream import BATCH_BYTES, Drafts, StepStream
from kvcache.client.store import SaveHints
from kvcache.clock import NS_PER_S, Clock

if TYPE_CHECKING:
    from kvcache.client.store import Lease
    from kvcache.device.streams import Event

SAVE_AGE_NS = 5 * NS_PER_S
CLOSE_S = 10.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _QueuedLoad:
    """``behind`` is the place in the engine's work at which it was queued, as of ``_QueuedSave``."""

    job: LoadJob
    behind: Event | None


@dataclass(frozen=True, slots=True)
class _QueuedSave:
    job: SaveJob
    queued_ns: int
    behind: Event | None
    done: int = 0


class WorkerSide:
    """Called by the engine's worker from one thread; its own thread does the work.

    The attachment is used by that thread only.
    """

    def __init__(self, attachment: Attachment, moves: Moves, clock: Clock, tally: Tally) -> None:
        self._attachment = attachment
        self._moves = moves
        self._clock = clock
        self._tally = tally
        self._changed = Condition()
        self._loads: deque[_QueuedLoad] = deque()
        self._saves: deque[_QueuedSave] = deque()
        self._stream: StepStream | None = None  # Of the forward pass that runs now.
        self._dropped: list[SaveJob] = []  # Streamed saves that ended without being saved.
        self._drafts = Drafts(attachment, moves)  # The thread's own.
        self._saving = ""
        self._taken: frozenset[str] = frozenset()  # Requests whose pages the engine waits for.
        self._unsaved: Counter[str] = Counter()  # Saves of a request that have not ended.
        self._gap: dict[str, int] = {}  # The first block of a request that could not be saved.
        self._freeing: set[str] = set()
        self._received: set[str] = set()
        self._bad_blocks: set[int] = set()
        self._saved: Counter[str] = Counter()
        self._lacks_hbm = False
        self._connecting = False
        self._closing = False
        self._thread = Thread(target=self._run, name="kvcache-pages", daemon=True)
        self._thread.start()

    # --- the engine's side ------------------------------------------------------------------------

    def connect(self) -> None:
        """Now, and not for the first request: a slab of HBM is made for who connects."""
        with self._changed:
            self._connecting = True
            self._changed.notify_all()

    def start_loads(self, plan: StepPlan) -> None:
        behind = self._moves.mark() if plan.loads else None
        with self._changed:
            self._loads.extend(_QueuedLoad(job, behind) for job in plan.loads)
            for job in plan.abandoned:
                self._give_up(job, "abandoned")
            self._changed.notify_all()

    def start_stream(self, plan: StepPlan) -> bool:
        """Before the forward pass: is there a save of it that goes layer by layer? Then ``layers_ready`` is
        to be called."""
        jobs = [job for job in plan.saves if job.streams]
        behind = self._moves.mark() if jobs else None
        with self._changed:
            self._end_stream()
            if jobs:
                self._stream = StepStream(jobs, behind)
            self._changed.notify_all()
        return bool(jobs)

    def layers_ready(self, count: int) -> None:
        """The leading ``count`` layers of this forward pass are computed, in every page it fills."""
        behind = self._moves.mark()
        with self._changed:
            if self._stream is not None:
                self._stream.ready, self._stream.behind = count, behind
                self._changed.notify_all()

    def start_saves(self, plan: StepPlan, computed: bool) -> None:
        """After the forward pass. When it did not run to its end (not ``computed``) nothing is saved."""
        now_ns, behind = self._clock.now_ns(), self._moves.mark() if plan.saves else None
        with self._changed:
            self._stream = None  # What it has begun is finished when the save's turn comes.
            for job in plan.saves:
                self._unsaved[job.request] += 1
                if computed:
                    self._saves.append(_QueuedSave(job, now_ns, behind))
                else:
                    self._end_save(job, len(job.block_ids), job.start, "not_computed")
            self._freeing.update(plan.freeing)
            for request in plan.forgotten:
                self._gap.pop(request, None)
                self._unsaved.pop(request, None)
            self._changed.notify_all()

    def release_pages(self, requests: Iterable[str]) -> None:
        """On return no page of these requests is read any more for what will be saved; what was not saved yet
        is not."""
        lost = frozenset(requests)
        if not lost:
            return
        with self._changed:
            kept: deque[_QueuedSave] = deque()
            for queued in self._saves:
                if queued.job.request in lost:
                    self._end_queued(queued, "preempted")
                else:
                    kept.append(queued)
            self._saves = kept
            self._changed.notify_all()
            self._taken = lost  # Of a save in the middle no further batch is begun.
            self._changed.wait_for(lambda: self._saving not in lost)
            self._taken = frozenset()

    def take_received(self) -> tuple[set[str], set[int]]:
        """(requests whose load has ended, pages that could not be filled), since the last call."""
        with self._changed:
            received, self._received = self._received, set()
            bad, self._bad_blocks = self._bad_blocks, set()
        return received, bad

    def take_saved(self) -> dict[str, int]:
        """How many saves of which request have ended since the last call, well or not."""
        with self._changed:
            saved, self._saved = dict(self._saved), Counter()
        return saved

    @property
    def lacks_hbm(self) -> bool:
        """What only HBM holds cannot be loaded here, as far as is known."""
        with self._changed:
            return self._lacks_hbm

    def take_freed(self) -> set[str]:
        """Ended requests of which no page is needed any more. Each is reported once."""
        with self._changed:
            freed = {request for request in self._freeing if not self._unsaved[request]}
            self._freeing -= freed
            for request in freed:
                self._gap.pop(request, None)
                del self._unsaved[request]
        return freed

    def close(self) -> None:
        """Finish what is queued, for at most ``CLOSE_S``. May be called twice."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            _log.warning("kvcache: closed with saves unfinished after %.0f s", CLOSE_S)

    # --- its own thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        while self._step():
            self._look()
        self._drafts.drop_all()
        self._attachment.close()

    def _look(self) -> None:
        """What has become of the store."""
        try:
            lacks_hbm = self._moves.lacks_hbm and bool(self._attachment.handles()) and self._moves.lacks_hbm
            for name, count in self._attachment.news().items():
                self._tally.add("store", count, name)
        except Exception:  # Without this thread no load would ever end.
            self._tally.add("errors", reason="news")
            return
        with self._changed:
            self._lacks_hbm = lacks_hbm

    def _step(self) -> bool:
        """Do one thing; false when there is none and none will come."""
        with self._changed:
            streaming: tuple[SaveJob, int, Event | None] | None = None
            while not (self._loads or self._saves or self._dropped or self._connecting or self._closing):
                if streaming := self._due():
                    break
                self._changed.wait()
            connecting, self._connecting = self._connecting, False
            dropped, self._dropped = self._dropped, []
            load = self._loads.popleft() if self._loads else None
            queued = self._saves.popleft() if load is None and self._saves else None
            reading = queued.job if queued is not None else streaming[0] if streaming else None
            self._saving = reading.request if reading is not None else ""
        for job in dropped:
            self._drafts.drop(job)
        if load is not None:
            self._do_load(load)
        elif queued is not None:
            self._do_save(queued)
        elif streaming is not None:
            self._do_stream(*streaming)
        return bool(load or queued or streaming or dropped or connecting)

    def _due(self) -> tuple[SaveJob, int, Event | None] | None:
        if self._stream is None or (due := self._stream.take(self._attachment.spec.plane_bytes)) is None:
            return None
        return *due, self._stream.behind

    def _do_stream(self, job: SaveJob, planes: int, behind: Event | None) -> None:
        is_next = self._gap.get(job.request, job.start) >= job.start
        if is_next and not self._drafts.advance(job, planes, behind):
            self._tally.add("errors", reason="stream")
        with self._changed:
            self._saving = ""
            self._changed.notify_all()

    def _do_load(self, queued: _QueuedLoad) -> None:
        job = queued.job
        try:
            bad = self._load(job, queued.behind)
        except Exception:  # Border with the engine: what was not loaded is computed.
            _log.exception("kvcache: a load failed")
            self._tally.add("errors", reason="load")
            self._tally.add("failed_blocks", len(job.block_ids), "error")
            bad = set(job.block_ids)
        with self._changed:
            self._bad_blocks |= bad
            self._received.add(job.request)

    def _load(self, job: LoadJob, behind: Event | None) -> set[int]:
        """The pages that could not be filled."""
        began_ns = self._clock.now_ns()
        handles = self._attachment.handles()
        if not handles:
            self._tally.add("failed_blocks", len(job.block_ids), "unavailable")
            return set(job.block_ids)
        lease = self._moves.lease(handles[0], split_hashes(job.prefix), job.lease_name, job.hbm)
        asked = len(job.block_ids)
        count = min(max(lease.count - job.start, 0), asked)
        failed: set[int] = set()
        if count:
            lost = self._moved(lease, job.block_ids[:count], job.start, behind)
            failed = {position - job.start for position in lost}
        elif lease.count:
            self._attachment.store.release(lease)
        self._tally.add("failed_blocks", asked - count, "lease_lost")
        self._tally.add("failed_blocks", len(failed), "not_read")
        self._tally.add("loaded_blocks", count - len(failed))
        self._tally.add("loaded_bytes", (count - len(failed)) * self._attachment.spec.block_bytes)
        self._tally.add("load_us", (self._clock.now_ns() - began_ns) // 1000)
        return {job.block_ids[position] for position in failed.union(range(count, asked))}

    def _moved(
        self, lease: Lease, block_ids: Sequence[int], start: int, behind: Event | None
    ) -> frozenset[int]:
        try:
            return self._moves.load(lease, block_ids, start, behind)
        finally:
            self._attachment.store.release(lease)

    def _do_save(self, queued: _QueuedSave) -> None:
        held, reason = 0, "error"
        try:
            held, reason = self._save(queued)
        except Exception:  # Border with the engine: what was not saved is computed again some day.
            _log.exception("kvcache: a save failed")
            self._tally.add("errors", reason="save")
        job, done = queued.job, queued.done + held
        with self._changed:
            if not reason and done < len(job.block_ids) and job.request in self._taken:
                reason = "preempted"
            if reason:
                self._end_save(job, len(job.block_ids) - done, job.start + done, reason)
            elif done == len(job.block_ids):
                self._end_save(job, 0, 0, "")
            else:
                self._saves.appendleft(replace(queued, done=done))
            self._saving = ""
            self._changed.notify_all()

    def _save(self, queued: _QueuedSave) -> tuple[int, str]:
        """Save one batch: (blocks held of it, why not all, if so)."""
        job, began_ns = queued.job, self._clock.now_ns()
        if self._gap.get(job.request, job.start) < job.start:
            return 0, "parent_not_saved"
        if began_ns - queued.queued_ns > SAVE_AGE_NS:
            return 0, "too_late"
        handles = self._attachment.handles()
        if not handles:
            return 0, "unavailable"
        if self._drafts.is_open(job):
            ended = self._drafts.end(job, queued.behind)
            reason = "" if ended in (None, len(job.block_ids)) else "not_taken"
            return self._count_saved(ended or 0, began_ns), reason
        limit = max(1, BATCH_BYTES // self._attachment.spec.block_bytes)
        pages = job.block_ids[queued.done : queued.done + limit]
        at = queued.done * HASH_BYTES
        parent = job.hashes[at - HASH_BYTES : at] if queued.done else job.parent
        prefix = split_hashes(job.hashes[at : at + len(pages) * HASH_BYTES])
        hints = SaveHints.of(job.hints, job.push)
        held = self._moves.save(handles[0], prefix, pages, parent, hints, job.hbm, queued.behind)
        return self._count_saved(held, began_ns), "" if held == len(pages) else "not_taken"

    def _count_saved(self, held: int, began_ns: int) -> int:
        self._tally.add("saved_blocks", held)
        self._tally.add("saved_bytes", held * self._attachment.spec.block_bytes)
        self._tally.add("save_us", (self._clock.now_ns() - began_ns) // 1000)
        return held

    # --- under the lock ---------------------------------------------------------------------------

    def _give_up(self, job: LoadJob, reason: str) -> None:
        self._tally.add("failed_blocks", len(job.block_ids), reason)
        self._bad_blocks.update(job.block_ids)
        self._received.add(job.request)

    def _end_queued(self, queued: _QueuedSave, reason: str) -> None:
        missing = len(queued.job.block_ids) - queued.done
        self._end_save(queued.job, missing, queued.job.start + queued.done, reason)

    def _end_stream(self) -> None:
        """A forward pass of which no end was heard: what it computed is not known to be whole."""
        if self._stream is not None:
            self._dropped += self._stream.jobs
            self._stream = None

    def _end_save(self, job: SaveJob, missing: int, gap: int, reason: str) -> None:
        if missing:
            if job.streams:
                self._dropped.append(job)
            self._tally.add("unsaved_blocks", missing, reason)
            self._gap[job.request] = min(gap, self._gap.get(job.request, gap))
        else:
            self._gap.pop(job.request, None)
        self._unsaved[job.request] -= 1
        self._saved[job.request] += 1
