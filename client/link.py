"""One connection as operations see it, and the decision when to try the next.

    up --a call missed, the node gone, a reply without sense--> down --back-off over, asked for--> trying
     ^                                                           ^                                   |
     +---------------------------- connected --------------------|-----------------------------------+
                                                                 +------------- refused, silent -----+

While down every call misses at once: operations run on ``nowhere``, the link that reaches no node. A
lease belongs to the link it was taken on; all of a link's leases and reservations end with it, at the
node too. The back-off starts over only after a call was answered: a node that is stopped still accepts
connections.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvcache.address import UnixAddress, default_address, parse
from kvcache.block import NamespaceId
from kvcache.client.hbm import Device, DeviceWriting, Mapped
from kvcache.client.local import Slab
from kvcache.client.steps import BadReply, Call, Post
from kvcache.client.store import Handle, Lease
from kvcache.clock import NS_PER_MS, Clock
from kvcache.errors import BadInput, KVCacheError, Unavailable
from kvcache.wire import HBM_WAIT_MS, PROTOCOL_VERSION, Hello, Welcome

BACKOFF_NS_MIN = 50 * NS_PER_MS
BACKOFF_NS_MAX = 2_000 * NS_PER_MS
RECONNECT_WAIT_NS = 20 * NS_PER_MS
NS_PER_PAYLOAD_BYTE = 10
TOKENS_S_MAX = 1e12
PARENT_GONE = "bad_prefix"

LeaseName = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Options:
    """How a store behaves. ``timeout_ms`` bounds each call to the node, with 10 ns more a byte that
    crosses the wire in it, and the time that the node was asked to wait; ``mapped`` false keeps to the wire
    even where the slab could be mapped; ``device`` is the engine's GPU, None: blocks go to host memory.
    ``plans_for`` is the GPU of the engine for which leases are taken, by who maps nothing; None: for none."""

    address: str
    token: str = field(default="", repr=False)
    timeout_ms: int = 1_000
    mapped: bool = True
    name: str = ""
    device: Device | None = None
    plans_for: bytes | None = None

    def deadline_ns(self, now_ns: int, payload_bytes: int = 0, wait_ms: int = 0) -> int:
        return now_ns + (self.timeout_ms + wait_ms) * NS_PER_MS + payload_bytes * NS_PER_PAYLOAD_BYTE

    @property
    def greeting_ms(self) -> int:
        """How long a connection may take. The first engine of a GPU waits until its memory is there."""
        return self.timeout_ms + (HBM_WAIT_MS if self.device is not None else 0)

    def hello(self, client: str, again: bool) -> Hello:
        """``again``: this store had a connection before, and no copy over its map runs any more."""
        is_local = isinstance(parse(self.address), UnixAddress)
        wants_map = self.mapped and is_local
        device = self.device if wants_map else None
        plans_for = None if wants_map or not is_local else self.plans_for
        return Hello(
            PROTOCOL_VERSION,
            self.token,
            wants_map,
            client,
            writes_ended=again and not (self.device is not None and self.device.is_stuck),
            hbm=device is not None or plans_for is not None,
            gpu=device.gpu if device is not None else plans_for or b"",
            joined=list(device.joined) if device is not None else [],
            pins=device is not None and device.pins,
        )


class Link:
    """What holds while one connection lasts. Any thread of the store may use it. Number 0: ``nowhere``."""

    def __init__(
        self,
        number: int,
        welcome: Welcome,
        slab: Slab | None,
        hbm: Mapped | None = None,
        *,
        plans: bool = False,
    ) -> None:
        """``plans``: blocks in HBM are leased for others."""
        self.number = number
        self.welcome = welcome
        self.slab = slab
        self.hbm = hbm
        self._plans = plans
        self.opened: frozenset[NamespaceId] = frozenset()
        self.broken = ""  # Set by an operation: why nothing the node says can be relied on.
        self.running = 0  # Set by the driver: how many operations are under way on it.
        self._wait_ends_ns = 0
        self._lock = threading.Lock()
        self._holders: Counter[LeaseName] = Counter()  # how many Lease values name it
        self._wrong: dict[LeaseName, set[int]] = {}  # positions whose bytes failed their check
        self._writings: list[DeviceWriting] = []  # copies from a device that may go on between operations

    @property
    def leases_hbm(self) -> bool:
        return self._plans or self.hbm is not None

    def hold(self, name: LeaseName) -> None:
        with self._lock:
            self._holders[name] += 1

    def holds(self, name: LeaseName) -> bool:
        with self._lock:
            return self._holders[name] > 0

    def blame(self, name: LeaseName, positions: Sequence[int]) -> None:
        with self._lock:
            self._wrong.setdefault(name, set()).update(positions)

    def writes(self, writing: DeviceWriting) -> None:
        """It was begun by an operation."""
        with self._lock:
            self._writings.append(writing)

    def wrote(self, writing: DeviceWriting) -> None:
        """It has ended."""
        with self._lock:
            self._writings = [each for each in self._writings if each is not writing]

    def end_writings(self) -> None:
        """Wait until nothing writes to what this connection had reserved, and nothing more will. Who is
        interrupted waits too, and hears of it then: a device is not waited for without end."""
        with self._lock:
            left, self._writings = self._writings, []  # Others do not wait as well.
        interrupt: BaseException | None = None
        try:
            while left:
                try:
                    with contextlib.suppress(Unavailable):  # It is stuck, and the node is told nothing.
                        left[-1].end()
                    left.pop()
                except (KeyboardInterrupt, SystemExit) as error:
                    interrupt = error
        finally:  # What is wrong with one leaves the others to the next.
            with self._lock:
                self._writings += left
        if interrupt is not None:
            raise interrupt

    def let_go(self, name: LeaseName) -> list[int] | None:
        """The positions to report when the last holder lets go, None while others hold on (or none did)."""
        with self._lock:
            self._holders[name] -= 1
            if self._holders[name] > 0:
                return None
            known = self._holders.pop(name) == 0
            wrong = self._wrong.pop(name, set())
        return sorted(wrong) if known else None

    def deadline_ns(self, options: Options, now_ns: int, step: Call | Post) -> int:
        """Of a call that is made now. The node answers in turn: behind a wait, its time counts from there."""
        begins_ns = max(now_ns, self._wait_ends_ns)
        if step.wait_ms:
            self._wait_ends_ns = max(begins_ns, now_ns + step.wait_ms * NS_PER_MS)
        return options.deadline_ns(begins_ns, step.payload_bytes, step.wait_ms)

    def pin(self, device: Device | None, descriptor: int | None, tally: Tally) -> None:
        """Have the map registered with the device, if the node allows it. Once."""
        unit_bytes = self.welcome.pinned_unit
        if unit_bytes and device is not None and self.slab is not None and descriptor is not None:
            self.slab.pin(device, descriptor, unit_bytes, tally.add)

    def owns(self, lease: Lease) -> bool:
        return self.number == lease.connection

    def close(self) -> None:
        self.end_writings()
        if self.slab is not None:
            self.slab.close()
        if self.hbm is not None:
            self.hbm.close()


class Outage:
    """When to try to connect again. Takes the time, keeps no clock."""

    def __init__(self) -> None:
        self._delay_ns = BACKOFF_NS_MIN
        self._retry_ns = 0

    def may_try(self, now_ns: int) -> bool:
        return now_ns >= self._retry_ns

    def failed(self, now_ns: int) -> None:
        """The connection ended, or could not be made."""
        self._retry_ns = now_ns + self._delay_ns
        self._delay_ns = min(self._delay_ns * 2, BACKOFF_NS_MAX)

    def answered(self) -> None:
        """The node answered a call."""
        self._delay_ns = BACKOFF_NS_MIN


class Tally:
    """The counters of one store, for all its threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def add(self, name: str, count: int = 1) -> None:
        if count:
            with self._lock:
                self._counts[name] += count

    def copy(self) -> dict[str, int]:
        with self._lock:
            return dict(self._counts)


@dataclass(frozen=True, slots=True)
class Context:
    """What every operation works with: the link it runs on, the counters, the clock; and how fast the
    engine computes what it does not load (0: not known)."""

    link: Link
    tally: Tally
    clock: Clock
    prefill_tokens_s: float = 0.0

    @property
    def away(self) -> bool:
        return self.link.number == 0

    @property
    def tokens_s(self) -> int:
        """``prefill_tokens_s`` as it is sent: 0 for what no engine computes in a second."""
        return int(self.prefill_tokens_s) if 1 <= self.prefill_tokens_s <= TOKENS_S_MAX else 0

    def reaches(self, handle: Handle) -> bool:
        """Can the node be asked about this namespace? Counts why not."""
        known = handle.namespace_id in self.link.opened
        if not known:
            self.tally.add("missed_calls:away" if self.away else "missed_calls:not_open")
        return known

    def missed(self, error: KVCacheError) -> None:
        """The node did not do what was asked, and the operation goes on without. A parent that was evicted
        just before is nobody's fault: those blocks are counted as unsaved."""
        if isinstance(error, BadReply):
            self.link.broken = "bad_reply"
        elif not isinstance(error, Unavailable) and error.code != PARENT_GONE:
            self.tally.add("missed_calls:refused")


def nowhere() -> Link:
    """What operations run on while there is no connection: they find nothing, and ask nobody."""
    return Link(0, Welcome(PROTOCOL_VERSION, "", 0, "", [], b"", 0), None)


def client_name(name: str, pid: int) -> str:
    """What one store calls itself at the node: for an operator to read, and unlike any other store."""
    if not name:
        with contextlib.suppress(OSError):
            name = Path(f"/proc/{pid}/comm").read_text().strip()
    return f"{name or 'client'}-{pid}-{secrets.token_hex(4)}"


def away(address: str) -> Unavailable:
    return Unavailable(
        "unavailable",
        f"there is no connection to the node at {address}",
        "it is gone, or was when last tried",
        "start it with kvcache serve, or try again later",
    )


def options_for(
    address: str | None,
    token: str | None,
    timeout_ms: int,
    mapped: bool,
    name: str,
    device: Device | None = None,
    plans_for: bytes | None = None,
) -> Options:
    """RAISES BadInput for an address that is none, or a timeout that ends before it begins."""
    if timeout_ms < 1:
        raise BadInput("bad_config", f"a timeout of {timeout_ms} ms", "no node answers so fast")
    chosen = str(parse(address)) if address else default_address()
    secret = os.environ.get("KVCACHE_TOKEN", "") if token is None else token
    return Options(chosen, secret, timeout_ms, mapped, name, device, plans_for)
