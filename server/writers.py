"""Who may still be writing into the slab: processes that map it, and their connections that have ended.

    watch ──► connected ── leave, nothing kept aside ──► forgotten
                 │
                 └──────── leave, slots kept aside ────► gone ── the process dies, or says that
                                                                 its copies have ended ──► ended

A connection that mapped the slab is tied to its process by a pidfd, one a process. Slots it had reserved
when it ended are used again (``ended``) once nobody can be writing to them any more.

Invariants: a pidfd is open for exactly the processes with an owner here, so a process that connects and
goes a thousand times costs one descriptor, and none afterwards unless slots wait for it.
"""

from __future__ import annotations

import asyncio
import os
import select
from collections.abc import Callable
from dataclasses import dataclass, field

from kvcache.server.identity import Peer


@dataclass(slots=True)
class _Process:
    descriptor: int
    clients: dict[int, str] = field(default_factory=dict)  # owner -> what the client calls itself


class Writers:
    """One owner: the node's event loop."""

    def __init__(self, ended: Callable[[int], None]) -> None:
        """``ended`` is told the owner whose kept slots nobody writes to any more."""
        self._ended = ended
        self._processes: dict[Peer, _Process] = {}
        self._peers: dict[int, Peer] = {}
        self._gone: set[int] = set()
        self._stopped: set[int] = set()  # Said to have ended before the node saw its connection end.

    def __len__(self) -> int:
        """How many connections are known, ended ones that slots wait for among them."""
        return len(self._peers)

    def watch(self, owner: int, peer: Peer, client: str) -> bool:
        """Whether the end of the peer's process can be seen; without that its map is not given out."""
        process = self._processes.get(peer)
        if process is not None and _has_ended(process.descriptor):
            self._died(peer)  # Another process has its number now.
            process = None
        if process is None:
            process = self._open(peer)
        if process is None:
            return False
        process.clients[owner] = client
        self._peers[owner] = peer
        return True

    def leave(self, owner: int, kept_aside: bool) -> None:
        """The connection has ended; ``kept_aside`` says whether slots wait for its copies to end."""
        if not kept_aside:
            self.forget(owner)
        elif owner in self._stopped or owner not in self._peers:
            self.forget(owner)
            self._ended(owner)
        else:
            self._gone.add(owner)

    def stopped(self, peer: Peer, client: str) -> None:
        """This client of the process says that no copy of its is in flight from any connection before.

        Stores of one process are told apart by ``client``: one does not speak for another's copies."""
        process = self._processes.get(peer)
        mine = [owner for owner, name in process.clients.items() if name == client] if process else []
        for owner in mine:
            if owner in self._gone:
                self.forget(owner)
                self._ended(owner)
            elif client:
                self._stopped.add(owner)

    def forget(self, owner: int) -> None:
        """Nothing is to be done for this owner any more."""
        self._gone.discard(owner)
        self._stopped.discard(owner)
        peer = self._peers.pop(owner, None)
        if peer is not None:
            process = self._processes[peer]
            del process.clients[owner]
            if not process.clients:
                self._close(peer)

    def close(self) -> None:
        """May be called twice."""
        for owner in list(self._peers):
            self.forget(owner)

    def _open(self, peer: Peer) -> _Process | None:
        if peer.pid <= 0:
            return None
        try:
            descriptor = os.pidfd_open(peer.pid)
        except OSError:
            return None
        self._processes[peer] = _Process(descriptor)
        asyncio.get_running_loop().add_reader(descriptor, self._died, peer)
        return self._processes[peer]

    def _close(self, peer: Peer) -> None:
        process = self._processes.pop(peer)
        asyncio.get_running_loop().remove_reader(process.descriptor)
        os.close(process.descriptor)

    def _died(self, peer: Peer) -> None:
        for owner in list(self._processes[peer].clients):
            is_gone = owner in self._gone
            self.forget(owner)
            if is_gone:
                self._ended(owner)


def _has_ended(descriptor: int) -> bool:
    poll = select.poll()  # Unlike select, it takes any descriptor.
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))
