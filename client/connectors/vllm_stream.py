"""Saves of the vLLM connector that go layer by layer, beside the forward pass that computes them.

    engine   bind ── layer ── layer ── ... ── layer ── wait_for_save
               │ jobs   │ ready += 1                      │ queued like any save
    thread   begin ── advance ── advance ── ...        finish

``StepStream`` says what is due, ``Drafts`` does it. A layer is one plane (``vllm_namespace``).

The sum: a layer costs the engine a lock and a wake-up, about 10 us; the copies go beside it, on another core.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvcache.block import split_hashes
from kvcache.client.connectors.vllm_moves import Moves
from kvcache.client.connectors.vllm_plan import SaveJob
from kvcache.client.store import SaveHints

if TYPE_CHECKING:
    from kvcache.client.connectors.attach import Attachment
    from kvcache.client.store import BlockingWriting
    from kvcache.device.streams import Event

BATCH_BYTES = 32 << 20
"""About so much is copied at once, so that a load never waits for more."""

_NOT_BEGUN = -1
_log = logging.getLogger(__name__)


class StepStream:
    """The streaming saves of one step and how far each is. Two threads use it, under one lock. ``ready``
    layers are computed behind ``behind``, a place in what the engine has queued."""

    def __init__(self, jobs: Sequence[SaveJob], behind: Event | None = None) -> None:
        self.jobs = tuple(jobs)
        self.ready = 0
        self.behind = behind
        self._done = [_NOT_BEGUN] * len(jobs)

    def take(self, plane_bytes: int) -> tuple[SaveJob, int] | None:
        """The save that is furthest behind and up to which plane to bring it now; None: nothing is due."""
        at = min(range(len(self.jobs)), key=self._done.__getitem__)
        done, job = self._done[at], self.jobs[at]
        if done >= self.ready:
            return None
        self._done[at] = 0 if done == _NOT_BEGUN else _next(done, self.ready, job, plane_bytes)
        return job, self._done[at]


@dataclass(slots=True)
class _Draft:
    writing: BlockingWriting
    planes: int = 0


class Drafts:
    """The saves that were begun and have not ended. For one thread. Nothing is raised: what goes wrong here
    leaves an ordinary save."""

    def __init__(self, attachment: Attachment, moves: Moves) -> None:
        self._attachment = attachment
        self._moves = moves
        self._open: dict[tuple[str, int], _Draft] = {}

    def advance(self, job: SaveJob, planes: int, behind: Event | None) -> bool:
        """Begin, or go on up to ``planes``, which are computed behind that. False: it raised."""
        try:
            draft = self._open.get(_key(job))
            if draft is not None:
                self._go_on(draft, planes, behind)
            elif planes == 0 and (handles := self._attachment.handles()):
                prefix, hints = split_hashes(job.hashes), SaveHints.of(job.hints, job.push)
                writing = self._moves.begin_save(
                    handles[0], prefix, job.block_ids, job.parent, hints, job.hbm, behind
                )
                self._open[_key(job)] = _Draft(writing)
        except Exception:  # Border with the engine: without a draft it is saved whole.
            _log.exception("kvcache: a save layer by layer failed")
            self.drop(job)
            return False
        return True

    def is_open(self, job: SaveJob) -> bool:
        return _key(job) in self._open

    def end(self, job: SaveJob, behind: Event | None) -> int | None:
        """All planes are computed behind that: how many blocks are held now. None: there is more to copy
        first, and a part of it was done. REQUIRES: it is open. RAISES what the store raises."""
        draft, spec = self._open[_key(job)], self._attachment.spec
        planes = _next(draft.planes, spec.plane_count, job, spec.plane_bytes)
        if planes < spec.plane_count:
            self._go_on(draft, planes, behind)
            return None
        self._moves.follow(behind)
        del self._open[_key(job)]
        return draft.writing.finish()

    def _go_on(self, draft: _Draft, planes: int, behind: Event | None) -> None:
        self._moves.follow(behind)
        draft.planes = planes
        draft.writing.advance(planes)

    def drop(self, job: SaveJob) -> None:
        """It will not be saved this way. Reads no page. May be called for what is not open."""
        if draft := self._open.pop(_key(job), None):
            try:
                draft.writing.abort()
            except Exception:  # Border with the engine: what was reserved goes with the connection.
                _log.exception("kvcache: a save could not be aborted")

    def drop_all(self) -> None:
        for draft in self._open.values():
            draft.writing.abort()
        self._open.clear()


def _key(job: SaveJob) -> tuple[str, int]:
    return job.request, job.start


def _next(done: int, ready: int, job: SaveJob, plane_bytes: int) -> int:
    return min(ready, done + max(1, BATCH_BYTES // (plane_bytes * len(job.block_ids))))
