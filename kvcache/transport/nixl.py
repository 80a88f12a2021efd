"""The agents of ``nixl://``: registered memory, and reads of others'. The only file that imports NIXL.

Two agents of one process, both called from one thread, which is also where same-host copies happen:

* the *serving* agent, whose description peers get; they read through it without asking this process;
* the *reading* agent, which does our reads. Nobody else ever writes to memory of ours.

A read that is in flight cannot be called back: releasing its handle, or forgetting the peer, lets its bytes
land later (UCX 1.23; tests/transport/test_nixl.py sees it). So a read that must end now gets ``GRACE_NS``,
and then the reading agent is destroyed and made anew, which ends everything in flight; other reads of
it begin their round again. Where copies are made by ``transfer()`` itself (cma) that never happens.

NIXL's progress threads spin a whole core, so there are none: whoever waits polls, and the serving agent is
polled while a peer makes his path, else every ``IDLE_S``.

The sum: a round is one hop to the thread and back (80 us) and one request; 16 descriptors 60 us.
An agent takes 30 ms to make, the first one of a process 450 ms.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pathlib
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import partial
from typing import ParamSpec, TypeVar

import numpy as np

try:
    from nixl_cu12 import _bindings as bindings
    from nixl_cu12._api import nixl_agent, nixl_agent_config
except ImportError:
    from nixl_cu13 import _bindings as bindings
    from nixl_cu13._api import nixl_agent, nixl_agent_config

from kvcache.clock import NS_PER_MS
from kvcache.transport.base import PeerLost
from kvcache.transport.nixl_regions import Region, Regions, address_of
from kvcache.transport.nixl_rounds import SLOT_BYTES, SLOT_COUNT, SMALL, Flight, Path, Slots, Span
from kvcache.transport.nixl_wire import PROBE_BYTES
from kvcache.uncancelled import to_the_end

GRACE_NS = 100 * NS_PER_MS
SPIN_NS = 200_000
IDLE_S = 0.5
BUSY_S = 0.001
LANDING_COUNT = 64
PIN_S = 1.0  # So long the loop stands still, at most, for memory that goes while it is being pinned.
INFINIBAND = pathlib.Path("/dev/infiniband")
BACKEND = "UCX"

log = logging.getLogger("kvcache.transport")

_ERRORS = (
    bindings.nixlBackendError,
    bindings.nixlCancelledError,
    bindings.nixlInvalidParamError,
    bindings.nixlMismatchError,
    bindings.nixlNotAllowedError,
    bindings.nixlNotFoundError,
    bindings.nixlNotPostedError,
    bindings.nixlNotSupportedError,
    bindings.nixlRemoteDisconnectError,
    bindings.nixlRepostActiveError,
    bindings.nixlUnknownError,
)
_P = ParamSpec("_P")
_T = TypeVar("_T")


class Agents:
    """One transport's. Methods that begin with an underscore run on its thread, the others on its loop."""

    def __init__(self) -> None:
        # A read over a socket, emulated, would be slow, and its reader's death can end the owner's process.
        self._is_emulated = os.environ.setdefault("UCX_PROTO_EMULATION_ENABLE", "n") == "y"
        if not INFINIBAND.exists():  # The bundled libraries for it crash a process without one, at its end.
            os.environ.setdefault("UCX_MODULES", "^ib")
        self._executor = ThreadPoolExecutor(1, "nixl")
        self._registered: dict[int, Region] = {}
        self._pinning: dict[Region, Future[bytes]] = {}
        self._flights: set[Flight] = set()
        self._known: dict[str, int] = {}
        self._generation = 0
        self._guests = 0
        self._is_closed = False
        self._is_refused = False
        self._came = asyncio.Event()
        self._serving_task: asyncio.Task[None] | None = None
        half, landing = SLOT_COUNT * SLOT_BYTES, LANDING_COUNT * PROBE_BYTES
        small = memoryview(bytearray(2 * half + landing + PROBE_BYTES))
        place = address_of(small)
        self.stage = Slots(small[:half], place, SLOT_BYTES)
        """Where what is exported from memory that is not registered is put for its reader."""
        self.bounce = Slots(small[half : 2 * half], place + half, SLOT_BYTES)
        """Where what goes to memory that is not registered is read to."""
        self.landing = Slots(small[2 * half : 2 * half + landing], place + 2 * half, PROBE_BYTES)
        """Where peers' probes are read to."""
        self.regions = Regions()
        """What pieces can be read from and to where they are."""
        self.probe = secrets.token_bytes(PROBE_BYTES)
        self.probe_place = place + 2 * half + landing
        small[2 * half + landing :] = self.probe
        self._small = Region(place, SMALL, small)

    # --- on the loop ----------------------------------------------------------------------------

    async def start(self) -> None:
        """May be called twice."""
        await self._run(self._open)
        if self._serving_task is None:
            self._serving_task = asyncio.ensure_future(self._serve())

    async def close(self) -> None:
        """REQUIRES: no read is running. May be called twice."""
        if self._serving_task is not None:
            self._serving_task.cancel()
            await asyncio.wait([self._serving_task])
            self._serving_task = None
        if not self._is_closed:
            self._is_closed = True
            await self._run(self._close)
            self._executor.shutdown()

    def register(self, memory: memoryview, tell: Callable[[bytes], None]) -> None:
        """Pin it, behind what the thread does now. ``tell`` is called with what peers have to know before
        they hear of places in it: not when it cannot be pinned, is already, or is forgotten meanwhile."""

        def pinned(region: Region, job: asyncio.Future[bytes]) -> None:
            if job.cancelled():
                return
            if not (description := job.result()):
                self._pinning.pop(region, None)
                self.regions.refused(region)
            elif self.regions.pinned(region):
                tell(description)

        if (region := self.regions.want(memory)) is not None:
            job = self._pinning[region] = self._executor.submit(self._register, region)
            asyncio.wrap_future(job).add_done_callback(partial(pinned, region))

    def unregister(self, memory: memoryview) -> None:
        """Nothing new is read from or to it; behind what the thread does now it is pinned no more. Waits
        when it is just being pinned, which would bring back pages that go. REQUIRES: no read has it."""
        if (region := self.regions.forget(memory)) is not None:
            job = self._pinning.pop(region)
            if not job.cancel():
                wait([job], PIN_S)
                self._run(self._drop, region)

    async def description(self) -> bytes:
        """The serving agent's: keys to all registered memory. REQUIRES: started."""
        return await self._run(self._describe)

    def guest_came(self) -> None:
        """The serving agent is polled often, until ``guest_left``."""
        self._guests += 1
        self._came.set()

    def guest_left(self) -> None:
        self._guests -= 1

    @property
    def is_emulated(self) -> bool:
        """Reads need this process's help, because the environment has asked for it."""
        return self._is_emulated

    async def meet(self, path: Path) -> None:
        """Make it, or bring it up to date. RAISES PeerLost."""
        if error := await self._run(self._meet, path):
            raise PeerLost(error)

    async def forget(self, path: Path) -> None:
        await self._run(self._forget, path)

    async def read(
        self, path: Path, local: Sequence[Span], remote: Sequence[Span], look: Callable[[], None]
    ) -> bool:
        """One round. False: the path has to be made anew, nothing was read. Whatever it raises, or ``look``
        does, and when it is cancelled: nothing is in flight any more. RAISES PeerLost."""
        flight = Flight(path, local, remote)
        polls = 0
        try:
            await asyncio.shield(self._run(self._begin, flight))
            while not flight.is_over:
                look()
                await asyncio.sleep(0 if polls < 100 else BUSY_S)
                polls += 1
                await asyncio.shield(self._run(self._poll, flight))
        except BaseException:
            flight.is_dropped = True
            if (cancelled := await to_the_end(self._run(self._abandon, flight))) is not None:
                raise cancelled from None
            raise
        if flight.error:
            raise PeerLost(flight.error)
        return flight.is_done

    def _run(self, job: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> asyncio.Future[_T]:
        return asyncio.wrap_future(self._executor.submit(job, *args, **kwargs))

    async def _serve(self) -> None:
        while True:
            await asyncio.shield(self._run(self._progress))
            if self._guests:
                await asyncio.sleep(0 if self._is_emulated else BUSY_S)
                continue
            self._came.clear()
            try:
                async with asyncio.timeout(IDLE_S):
                    await self._came.wait()
            except TimeoutError:
                continue

    # --- on the thread --------------------------------------------------------------------------

    def _open(self) -> None:
        if self._generation:
            return
        self._serving = _agent()
        self._new_reading()
        self._add(self._small)

    def _register(self, region: Region) -> bytes:
        """Its description, none when it cannot be pinned."""
        self._open()
        try:
            self._add(region)
            listed = self._serving.get_reg_descs([region.row], "DRAM")
            return bytes(self._serving.get_partial_agent_metadata(listed, False, [BACKEND]))
        except _ERRORS as error:
            self._drop(region)
            if not self._is_refused:
                log.warning("memory cannot be registered, and goes through buffers (slower): %s", error)
            self._is_refused = True
            return b""

    def _add(self, region: Region) -> None:
        self._registered[region.device] = region
        for agent in (self._serving, self._reading):
            agent.register_memory([region.row], "DRAM")

    def _drop(self, region: Region) -> None:
        """It is pinned no more, as far as it was. UCX keeps it in a cache until it sees the pages go
        (``HostTier``), and lets it go then."""
        spans = [span for flight in self._flights for span in flight.local]
        assert all(device != region.device for _, _, device in spans), "a read into it was running"
        if self._registered.pop(region.device, None) is None:
            return
        for agent in (self._serving, self._reading):
            with suppress(*_ERRORS):  # It stays pinned, and nothing leads there.
                agent.deregister_memory(agent.get_reg_descs([region.row], "DRAM"))

    def _describe(self) -> bytes:
        return bytes(self._serving.get_agent_metadata())

    def _progress(self) -> None:
        self._serving.get_new_notifs()

    def _new_reading(self) -> None:
        self._reading = _agent()
        self._generation += 1
        self._known.clear()
        for region in self._registered.values():
            self._reading.register_memory([region.row], "DRAM")

    def _meet(self, path: Path) -> str:
        is_new = path.generation != self._generation
        path.met = 0 if is_new else path.met
        try:
            for description in path.descriptions[path.met :]:
                path.name = bytes(self._reading.add_remote_agent(description)).decode()
                path.met += 1
        except _ERRORS as error:
            return f"what it says of its memory cannot be used: {error}"
        if is_new:
            self._known[path.name] = self._known.get(path.name, 0) + 1
        path.generation = self._generation
        return ""

    def _forget(self, path: Path) -> None:
        if path.generation != self._generation:
            return
        path.generation = 0
        self._known[path.name] -= 1
        if self._known[path.name] == 0:
            del self._known[path.name]
            with suppress(*_ERRORS):  # It was gone by itself.
                self._reading.remove_remote_agent(path.name)
                self._reading.get_new_notifs()

    def _begin(self, flight: Flight) -> None:
        if flight.is_dropped:
            return
        if flight.path.generation != self._generation:
            flight.is_unmet = True
            return
        raw = self._reading.agent
        count = range(len(flight.local))
        self._flights.add(flight)
        try:
            for name, spans in ((bindings.NIXL_INIT_AGENT, flight.local), (flight.path.name, flight.remote)):
                rows = np.array(spans, np.uint64)
                described = bindings.nixlXferDList(bindings.DRAM_SEG, rows)
                flight.lists.append(int(raw.prepXferDlist(name, described)))
            here, there = flight.lists
            flight.request = int(raw.makeXferReq(bindings.NIXL_READ, here, count, there, count))
            self._settle(flight, raw.postXferReq(flight.request))
        except _ERRORS as error:
            self._fail(flight, f"the read failed: {error}")
        self._spin(flight, SPIN_NS)

    def _poll(self, flight: Flight) -> None:
        self._spin(flight, SPIN_NS)

    def _abandon(self, flight: Flight) -> None:
        """Nothing of it is in flight when this returns."""
        self._spin(flight, GRACE_NS)
        if flight.request:
            self._replace_reading()

    def _spin(self, flight: Flight, for_ns: int) -> None:
        """Poll it for so long, or until it is over."""
        end_ns = time.monotonic_ns() + for_ns
        while flight.request:
            try:
                self._settle(flight, self._reading.agent.getXferStatus(flight.request))
            except bindings.nixlNotFoundError:
                self._replace_reading()  # NIXL has lost sight of it; it may be in flight all the same.
            except _ERRORS as error:
                self._fail(flight, f"the read failed: {error}")
            if time.monotonic_ns() >= end_ns:
                return

    def _settle(self, flight: Flight, status: object) -> None:
        if status == bindings.NIXL_IN_PROG:
            return
        if status != bindings.NIXL_SUCCESS:
            self._fail(flight, f"the read failed: {status}")
            return
        flight.is_done = True
        self._release(flight)

    def _fail(self, flight: Flight, why: str) -> None:
        flight.error = why
        self._release(flight)

    def _release(self, flight: Flight) -> None:
        raw = self._reading.agent
        self._flights.discard(flight)
        try:
            if flight.request:
                raw.releaseXferReq(flight.request)
            for handle in flight.lists:
                raw.releasedDlistH(handle)
        except _ERRORS as error:
            flight.error = flight.error or f"its handle cannot be released: {error}"
        flight.request = 0
        flight.lists.clear()

    def _replace_reading(self) -> None:
        """End all that is in flight."""
        for flight in list(self._flights):
            flight.is_unmet = True
            self._release(flight)
        _destroy(self._reading)
        self._new_reading()

    def _close(self) -> None:
        if not self._generation:
            return
        assert not self._flights, "a read was still running"
        for name in self._known:
            with suppress(*_ERRORS):
                self._reading.remove_remote_agent(name)
        for _ in range(8):
            self._reading.get_new_notifs()
            self._serving.get_new_notifs()
        _destroy(self._reading)
        _destroy(self._serving)
        self._generation = 0
        self._registered.clear()


def _agent() -> nixl_agent:
    """Its name is a secret of those who got its description."""
    logging.getLogger("nixl").handlers.clear()  # They write to the standard output.
    return nixl_agent(secrets.token_hex(16), nixl_agent_config(enable_prog_thread=False, backends=[BACKEND]))


def _destroy(agent: nixl_agent) -> None:
    """NIXL's agent ends with the last reference to it, which the wrapper has."""
    agent.agent = None
