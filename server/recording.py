"""Recording what a node is asked: one call a request, off unless the operator turns it on.

    look-up, reservation ──► Recorder (bytes) ──► every second, or 32 KiB ──► RecordFiles (a thread)

It never slows or ends the node: nothing here waits, a disk that does not keep up costs records (counted), one
that fails ends the recording (said once, in the log, in ``troubles`` and by ``kvcache trace record``).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from dataclasses import dataclass
from pathlib import Path

from kvcache.block import HASH_BYTES
from kvcache.clock import NS_PER_S, Clock
from kvcache.config import NodeConfig, parse_size
from kvcache.errors import BadInput, NotAllowed
from kvcache.eviction.traces.record import Recorder
from kvcache.eviction.traces.record_files import BYTES_MIN, RecordFiles
from kvcache.eviction.traces.record_format import Head
from kvcache.request_hints import UNKNOWN
from kvcache.wire import BATCH_BLOCKS_MAX, Record, Reserve, TakeLease
from kvcache.wire_record import SAMPLE_ALL

log = logging.getLogger("kvcache.server")

FLUSH_BYTES = 32 << 10
FLUSH_NS = NS_PER_S


@dataclass(frozen=True, slots=True)
class Plan:
    """Where to record, and how much. RAISES BadInput (bad_config)."""

    folder: Path
    bytes_max: int
    sample: float

    def __post_init__(self) -> None:
        if self.bytes_max < BYTES_MIN:
            raise BadInput(
                "bad_config", f"record_bytes is {self.bytes_max}", f"a recording takes {BYTES_MIN} at least"
            )
        if not 0 < self.sample <= 1:
            raise BadInput("bad_config", f"record_sample is {self.sample}", "it is over 0, and 1 at most")

    @staticmethod
    def of(config: NodeConfig) -> Plan | None:
        """What the settings ask for; None: nothing."""
        if config.record == "none":
            return None
        folder = Path(config.record).expanduser().absolute()
        return Plan(folder, parse_size(config.record_bytes, "record_bytes"), config.record_sample)


def asked_plan(config: NodeConfig, request: Record, is_own_user: bool) -> Plan:
    """What an operator asks for, the settings for what was left out.

    RAISES NotAllowed for a folder that is not the settings' of anybody but the node's own user: he could
    write there anyway; BadInput when no folder is named at all."""
    folder = request.folder or config.record
    if request.folder and not is_own_user:
        raise NotAllowed(
            "not_allowed",
            "another may not choose where the node writes",
            "only the node's own user, on its unix socket, names a folder",
            "leave it out, and give the node the setting record",
        )
    if folder == "none":
        raise BadInput(
            "bad_config",
            "there is no folder to record into",
            "the setting record is none",
            "name a folder, or give it with --record when the node starts",
        )
    bytes_max = request.bytes_max or parse_size(config.record_bytes, "record_bytes")
    sample = request.sample / SAMPLE_ALL or config.record_sample
    return Plan(Path(folder).expanduser().absolute(), bytes_max, sample)


class Recording:
    """On from ``begin`` to ``end``, or to a failure. Called from one thread, the event loop's."""

    def __init__(self, clock: Clock) -> None:
        self.is_on = False
        self.trouble = ""
        """Why the last recording ended by itself; empty if it did not."""
        self._clock = clock
        self._recorder: Recorder | None = None
        self._files: RecordFiles | None = None
        self._ending: RecordFiles | None = None
        """Of a recording that has ended, while it may still be writing."""
        self._life = ""
        self._sequence = 0
        self._first = 1
        self._at_ms = 0
        self._is_head_due = True
        self._started_ms = 0
        self._sample = 1.0
        self._flushed_ns = 0
        self._requests = 0  # Of recordings that have ended, as are those below.
        self._bytes = 0
        self._lost = 0
        self._failures = 0

    def begin(self, plan: Plan, started_ms: int) -> None:
        """Record from now on; what was being recorded ends. ``started_ms`` is now on a wall clock."""
        self.end()
        self.trouble = ""
        self._sample, self._started_ms = plan.sample, started_ms
        self._life, self._sequence, self._first, self._at_ms = secrets.token_hex(8), 0, 1, 0
        self._is_head_due = True
        now_ns = self._clock.now_ns()
        self._recorder = Recorder(secrets.token_bytes(16), now_ns, plan.sample)
        self._files = RecordFiles(plan.folder, plan.bytes_max, self._ending)
        self._flushed_ns = now_ns
        self.is_on = True

    async def begin_and_wait(self, plan: Plan, started_ms: int) -> None:
        """``begin``, and wait until its folder is there and nobody else's, or it has failed, unless the disk
        takes long; others go on meanwhile."""
        self.begin(plan, started_ms)
        assert self._files is not None
        await asyncio.get_running_loop().run_in_executor(None, self._files.wait_begun)
        self.tick()

    def end(self) -> None:
        """What was recorded is still written, by and by. May be called twice."""
        if self._files is not None:
            self._flush()
            self._files.end()
            self._ending = self._files
            self._leave()

    async def end_and_wait(self) -> None:
        """``end``, and wait until it is written, unless the disk takes long; others go on meanwhile."""
        self.end()
        if self._ending is not None:
            await asyncio.get_running_loop().run_in_executor(None, self._ending.close)
            self.tick()  # It may have failed at the very end.

    def close(self) -> None:
        """``end``, and wait until it is written, unless the disk takes long. May be called twice."""
        self.end()
        if self._ending is not None:
            self._ending.close()

    # --- what is recorded -----------------------------------------------------------------------

    def asked(self, request: TakeLease, block_tokens: int, tenant: str) -> None:
        """A look-up that has been answered. REQUIRES: ``is_on``."""
        assert self._recorder is not None
        if len(request.parent) not in (0, HASH_BYTES):
            return
        self._recorder.asked(
            self._clock.now_ns(),
            request.prefix,
            request.parent,
            block_tokens,
            request.request,
            len(request.prefix) == BATCH_BLOCKS_MAX * HASH_BYTES,
        )
        if request.session >= 0 or request.hint != UNKNOWN.hint:  # Else the save may tell, if there is one.
            self._said(request, block_tokens, tenant)
        if self._recorder.waiting_bytes >= FLUSH_BYTES:
            self._flush()

    def saved(self, request: Reserve, block_tokens: int, tenant: str) -> None:
        """A reservation that has been answered. REQUIRES: ``is_on``, and its prefix and parent are sound."""
        self._said(request, block_tokens, tenant)

    def _said(self, request: TakeLease | Reserve, block_tokens: int, tenant: str) -> None:
        assert self._recorder is not None
        self._recorder.saved(
            request.prefix, request.parent, block_tokens, tenant, request.session, request.hint
        )

    # --- time and people ------------------------------------------------------------------------

    def tick(self) -> None:
        if self._ending is not None and self._ending.is_over:
            if self._ending.failed:
                self._say(self._ending.failed)
            self._ending = None
        if self._files is None:
            return
        if self._files.failed:
            self._say(self._files.failed)
            self._leave()
        elif self._clock.now_ns() - self._flushed_ns >= FLUSH_NS:
            self._flush()

    def stats(self) -> dict[str, float]:
        requests = self._recorder.requests if self._recorder is not None else 0
        written = self._files.written_bytes if self._files is not None else 0
        return {
            "recording": float(self.is_on),
            "recorded_requests": float(self._requests + requests),
            "recorded_bytes": float(self._bytes + written),
            "record_lost_batches": float(self._lost),
            "record_failures": float(self._failures),
        }

    def said(self) -> str:
        """For a person: is it on, and where?"""
        if self._files is None:
            return f"not recording: {self.trouble}" if self.trouble else "not recording"
        share = f", {self._sample:.0%} of the sessions" if self._sample < 1 else ""
        return f"recording into {self._files.folder}{share}"

    def _flush(self) -> None:
        assert self._recorder is not None
        assert self._files is not None
        self._flushed_ns = self._clock.now_ns()
        records = self._recorder.take()
        if not records:
            return
        is_taken = self._files.begin(self._head()) if self._is_head_due else True
        self._is_head_due = False
        if not is_taken or not self._files.put(records):
            self._lost += 1
            self._begin_file()  # What comes next cannot rely on what is lost.
        elif self._files.is_full:
            self._begin_file()

    def _begin_file(self) -> None:
        assert self._recorder is not None
        self._recorder.begin_file()
        self._first, self._at_ms = self._recorder.next_number, self._recorder.at_ms
        self._is_head_due = True
        self._sequence += 1

    def _head(self) -> Head:
        assert self._recorder is not None
        return Head(
            self._life,
            self._sequence,
            self._first,
            self._at_ms,
            self._started_ms,
            self._recorder.group_tokens,
            self._sample,
        )

    def _say(self, why: str) -> None:
        self.trouble = f"the recording ended: {why}"
        log.error("%s; the node goes on without", self.trouble)
        self._failures += 1

    def _leave(self) -> None:
        assert self._recorder is not None
        assert self._files is not None
        self._requests += self._recorder.requests
        self._bytes += self._files.written_bytes
        self._recorder, self._files, self.is_on = None, None, False
