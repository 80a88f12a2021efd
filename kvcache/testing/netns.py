"""Two hosts on one machine, and a wire between them that fails as told. Needs Linux, root, ip, nft and tc.

    left 198.18.0.1 ══ wire ═══════ wire ══ 198.18.0.2 right
                       │ tc: how fast it sends                nft: what of the arriving it throws away

A host is a network namespace. ``Host.run`` does work in it, in a thread of its own; what that work starts,
threads and processes, stays in the host. Nothing outlives this process: a namespace goes with the last who
is in it or holds it open.

* No packet leaves the machine: the wire is the only way out of a host, and ends in the other.
* A packet is thrown away where it arrives, so one direction fails without the other, and whoever sends is
  told nothing, as on a real network.
* ``heal`` takes every fault back, and is all that a test has to remember.

The sum: a pair of hosts takes 20 ms, a fault 20 ms; the wire carries 250 MB/s, for a core.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

from kvcache.errors import Unavailable

T = TypeVar("T")

LEFT, RIGHT = "198.18.0.1", "198.18.0.2"
"""Of the addresses that are set aside for trying out networks."""
WIRE = "wire"
TOOLS = {"ip": "iproute2", "tc": "iproute2", "nft": "nftables"}
_PREFIX_BITS = 30
_PACKET_BYTES = 9_000
_BURST_BYTES = 32 << 10
_QUEUE_MS = 50
"""Of packets that wait for a slow wire; what comes then is thrown away."""

_CLONE_NEWNS = 0x0002_0000
_CLONE_NEWNET = 0x4000_0000
_MNT_DETACH = 2
_MS_REC = 1 << 14
_MS_SLAVE = 1 << 19


class Host:
    """One of the two; use ``TwoHosts``."""

    def __init__(self, address: str) -> None:
        """RAISES Unavailable."""
        self.address = address
        self._namespace = _in_thread(_new_namespace)

    def run(self, work: Callable[[], T]) -> T:
        """What ``work`` returns or raises, done in this host."""

        def there() -> T:
            self._enter()
            return work()

        return _in_thread(there)

    def do(self, *command: str, said: str = "") -> str:
        """Run a tool in this host, with ``said`` as its input. RAISES Unavailable when it fails."""
        done = self.run(lambda: subprocess.run(command, input=said, capture_output=True, text=True))
        if done.returncode:
            raise Unavailable("unavailable", f"{' '.join(command)} failed", done.stderr.strip())
        return done.stdout

    @property
    def path(self) -> str:
        """Of its namespace, for tools."""
        return f"/proc/{os.getpid()}/fd/{self._namespace}"

    def close(self) -> None:
        """It goes once its processes have ended, and the wire with it."""
        os.close(self._namespace)

    def _enter(self) -> None:
        """For the calling thread, for good, with the view of /sys that belongs to it."""
        _call("setns", self._namespace, _CLONE_NEWNET)
        _call("unshare", _CLONE_NEWNS)
        _call("mount", None, b"/", None, _MS_REC | _MS_SLAVE, None)
        _call("umount2", b"/sys", _MNT_DETACH)
        _call("mount", b"sysfs", b"/sys", b"sysfs", 0, None)


class TwoHosts:
    """``left`` and ``right``, with the wire between them. Use as a context manager."""

    def __init__(self) -> None:
        """RAISES Unavailable, when this machine or this user cannot have them."""
        require()
        self.left = Host(LEFT)
        self.right = Host(RIGHT)
        end = ("type", "veth", "peer", "name", WIRE, "netns", self.right.path)
        self.left.do("ip", "link", "add", WIRE, *end)
        for host in (self.left, self.right):
            host.do("ip", "link", "set", "lo", "up")
            host.do("ip", "address", "add", f"{host.address}/{_PREFIX_BITS}", "dev", WIRE)
            # As on a real wire, what is lost is a packet, never a batch of 40 that the system makes of them.
            host.do("ip", "link", "set", WIRE, "up", "mtu", str(_PACKET_BYTES), "gso_max_segs", "1")

    def __enter__(self) -> TwoHosts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Once."""
        self.left.close()
        self.right.close()

    def cut(self) -> None:
        """Nothing arrives any more, either way, and nobody is told."""
        self.cut_towards(self.left)
        self.cut_towards(self.right)

    def cut_towards(self, host: Host) -> None:
        """Nothing arrives at ``host`` any more; what it sends does arrive at the other."""
        _hear(host, "drop")

    def lose(self, percent: int) -> None:
        """Of 100 packets so many are lost, either way, by chance."""
        for host in (self.left, self.right):
            _hear(host, f"numgen random mod 100 < {percent} drop")

    def slow(self, bytes_per_s: int) -> None:
        """The wire carries no more than this, each way."""
        rate = ("rate", f"{bytes_per_s * 8}bit", "burst", str(_BURST_BYTES), "latency", f"{_QUEUE_MS}ms")
        for host in (self.left, self.right):
            host.do("tc", "qdisc", "replace", "dev", WIRE, "root", "tbf", *rate)

    def heal(self) -> None:
        """As new. May be called twice."""
        for host in (self.left, self.right):
            _hear(host, "")
            host.do("tc", "qdisc", "replace", "dev", WIRE, "root", "pfifo")


def require() -> None:
    """RAISES Unavailable with what is missing here."""
    if os.geteuid():
        raise Unavailable(
            "unavailable", "two hosts on one machine need root", "namespaces are root's to make"
        )
    for tool, package in TOOLS.items():
        if shutil.which(tool) is None:
            raise Unavailable(
                "unavailable", f"{tool} is missing", "it makes the network", f"install {package}"
            )


def _hear(host: Host, rule: str) -> None:
    """What ``host`` does with what arrives by the wire; in one step, whatever it did before."""
    matched = f"iifname {WIRE} {rule};" if rule else ""
    chain = f"type filter hook input priority 0; policy accept; {matched}"
    table = f"table inet faults {{ chain arriving {{ {chain} }}; }}"
    host.do("nft", "-f", "-", said=f"table inet faults\ndelete table inet faults\n{table}\n")


def _new_namespace() -> int:
    """Of the calling thread, held open. RAISES Unavailable."""
    _call("unshare", _CLONE_NEWNET)
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _call(name: str, *arguments: int | bytes | None) -> None:
    """One of the system's calls that Python does not have. RAISES Unavailable."""
    if ctypes.CDLL(None, use_errno=True)[name](*arguments):
        why = os.strerror(ctypes.get_errno())
        raise Unavailable("unavailable", f"no network namespaces here: {name} failed", why, "run it as root")


def _in_thread(work: Callable[[], T]) -> T:
    """In a fresh one, which ends with it."""
    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(work).result()
    finally:
        pool.shutdown(wait=False)  # A test that is over its time does not wait.
