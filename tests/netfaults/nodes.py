"""Two real nodes on two hosts, peers of one another, and clients of theirs that look at every byte.

    client ── unix socket ──► A on the left ═══ the wire ═══ B on the right ◄── unix socket ── client

Clients come by unix sockets, which the network does not touch. A block's bytes are its name, over and over,
so what is of another block, or of none, shows wherever it is read.

The sum: a node takes a second to start; a prompt is 16 MiB, 65 ms of the wire.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from kvcache import wire
from kvcache.block import HASH_BYTES, BlockSpec
from kvcache.channel import BlockingChannel
from kvcache.clock import NS_PER_MS, NS_PER_S, SystemClock
from kvcache.sums import sum_chunks
from kvcache.testing.netns import Host, TwoHosts
from kvcache.testing.processes import NodeProcess
from kvcache.testing.stalls import Stalls
from tests.faults.nursery import wait_until_stopped
from tests.server.talk import example

SPEC = BlockSpec(block_tokens=16, plane_count=8, head_count=4, head_bytes=16_384)
PROMPT_BLOCKS = 32
PORT = 8211
PROMPTS = 5
A_PROMPTS, B_PROMPTS = 6, 4
"""There is room for so many: A holds all, and what B has fetched some rounds ago has gone there."""
ANSWER_NS = 20 * NS_PER_S
PATIENCE_NS = 20 * NS_PER_S
PEER_WAIT_MS = 1_000
LOOKER = "a node that looks"
"""Who says that he is a node sees what is held, and nothing is fetched for him."""
QUIET = ("reservations", "leases", "limbo_blocks", "tickets", "peer_coming_bytes")
"""What comes back to nothing when nobody asks for anything."""
CLOCK = SystemClock()
TOKEN = "a-token-of-nodes-on-a-network"
CREDENTIALS = f"""
master_key = "{"5e" * 32}"
[[credential]]
token = "{TOKEN}"
tenant = "nodes"
roles = ["reader", "writer", "peer"]
"""


def prompt(number: int) -> list[bytes]:
    """The names of its blocks."""
    return [sha256(b"%d %d" % (number, at)).digest()[:HASH_BYTES] for at in range(PROMPT_BLOCKS)]


def content(block: bytes) -> bytes:
    return block * (SPEC.block_bytes // len(block))


@dataclass(frozen=True, slots=True)
class Loaded:
    """How many leading blocks of a prompt were there, and how long the node took to say so beyond the time
    that it was given, less what the machine stood still meanwhile."""

    count: int
    over_ns: int


class Client:
    """A connection of its own. ``wrong`` are the blocks that were not what they should be."""

    def __init__(self, socket: str, stalls: Stalls, node: str = "") -> None:
        self._stalls = stalls
        hello = wire.Hello(wire.PROTOCOL_VERSION, token=TOKEN, node=node)
        self._channel = BlockingChannel.connect(socket, hello, CLOCK.now_ns() + ANSWER_NS)
        shape = (SPEC.plane_count, SPEC.head_count, SPEC.head_bytes)
        namespace = example(shape="x".join(map(str, shape)))
        opened = self._channel.call(wire.Open(namespace.to_map(), *shape), self._deadline())
        assert isinstance(opened, wire.Opened)
        self._namespace = opened.namespace
        self._room = [memoryview(bytearray(SPEC.block_bytes)) for _ in range(PROMPT_BLOCKS)]

    def close(self) -> None:
        self._channel.close()

    def save(self, blocks: Sequence[bytes]) -> None:
        reserved = self._channel.call(wire.Reserve(self._namespace, b"", b"".join(blocks)), self._deadline())
        assert isinstance(reserved, wire.Reserved)
        assert reserved.start + reserved.count == len(blocks), reserved.reason
        if not reserved.count:
            return
        mine = [memoryview(content(block)) for block in blocks[reserved.start :]]
        self._channel.call(wire.Write(reserved.reservation, 0, len(mine)), self._deadline(), mine)
        sums = sum_chunks(mine, SPEC.chunk_bytes)
        self._channel.call(wire.Commit(reserved.reservation, sums), self._deadline())

    def load(self, blocks: Sequence[bytes], wait_ms: int) -> Loaded:
        """Lease, read, and compare what was read."""
        until_ns = CLOCK.now_ns() + wait_ms * NS_PER_MS
        request = wire.TakeLease(self._namespace, b"".join(blocks), wait_ms=wait_ms)
        leased = self._channel.call(request, self._deadline())
        ended_ns = CLOCK.now_ns()
        over_ns = ended_ns - until_ns - self._stalls.stood_ns(until_ns, ended_ns)
        assert isinstance(leased, wire.Leased)
        if leased.count:
            into = self._room[: leased.count]
            self._channel.call(wire.Read(leased.lease, 0, leased.count), self._deadline(), into=into)
            self._channel.call(wire.Release(leased.lease), self._deadline())
            for block, view in zip(blocks, into, strict=False):
                assert view == content(block), f"wrong bytes of {block!r}"
        return Loaded(leased.count, over_ns)

    def match(self, blocks: Sequence[bytes]) -> int:
        reply = self._channel.call(wire.Match(self._namespace, b"".join(blocks)), self._deadline())
        assert isinstance(reply, wire.Matched)
        return reply.count

    def stats(self) -> dict[str, float]:
        reply = self._channel.call(wire.Stats(), self._deadline())
        assert isinstance(reply, wire.StatsReply)
        return reply.values

    def until(self, condition: Callable[[dict[str, float]], bool], what: str, within_ns: int) -> int:
        """How long until the node's figures say so. Each question takes its time."""
        began_ns = self._stalls.awake_ns()
        while not condition(found := self.stats()):
            assert self._stalls.awake_ns() - began_ns < within_ns, f"never: {what}: {found}"
        return self._stalls.awake_ns() - began_ns

    def until_quiet(self, within_ns: int) -> int:
        """Nothing is held, reserved, lent or on its way."""

        def quiet(found: dict[str, float]) -> bool:
            return not any(found.get(name, 0) for name in QUIET)

        return self.until(quiet, f"nothing of {QUIET}", within_ns)

    def _deadline(self) -> int:
        return CLOCK.now_ns() + ANSWER_NS


class Node:
    """One of the two."""

    def __init__(self, host: Host, peer: Host, name: str, prompts: int, folder: Path, stalls: Stalls) -> None:
        credentials, token = folder / f"{name}.toml", folder / f"{name}.token"
        credentials.write_text(CREDENTIALS)
        token.write_text(TOKEN)
        for file in (credentials, token):
            file.chmod(0o600)
        self._host = host
        self._stalls = stalls
        self._process = NodeProcess(
            {
                "name": name,
                "socket": str(folder / f"{name}.sock"),
                "tcp": f"{host.address}:{PORT}",
                "http": "none",
                "capacity": str(prompts * PROMPT_BLOCKS * SPEC.block_bytes),
                "unit": str(SPEC.block_bytes),
                "credentials": str(credentials),
                "peers": f"tcp://{peer.address}:{PORT}",
                "peer_token_file": str(token),
                "peer_wait_ms": str(PEER_WAIT_MS),
            },
            folder / f"{name}.log",
        )
        self._clients: list[Client] = []
        self._prompts = prompts
        self.client: Client
        self.looker: Client

    def start(self) -> None:
        """Also after it was killed."""
        self._hang_up()
        self._host.run(self._process.start)
        self.client, self.looker = self.new_client(), self.new_client(LOOKER)

    def new_client(self, node: str = "") -> Client:
        client = Client(self._process.socket, self._stalls, node)
        self._clients.append(client)
        return client

    def stop(self) -> None:
        """When this returns, it stands."""
        self._process.pause()
        wait_until_stopped([self._process.pid])

    def wake(self) -> None:
        self._process.wake()

    def kill(self) -> None:
        """Its clients' connections stay, and lead nowhere."""
        self._process.kill()

    def close(self) -> None:
        self._hang_up()
        self._process.close()

    def check_room(self, first: int) -> None:
        """No slot was lost: all that is in use is of blocks that are held, and there is room for as many
        prompts as ever, from number ``first`` on; for one less than fit, since room is made ahead."""
        found = self.client.stats()
        assert found["used_bytes:host"] == found["block_bytes:host"], "an extent is one block"
        numbers = range(first, first + self._prompts - 1)
        for number in numbers:
            self.client.save(prompt(number))
        assert [self.client.load(prompt(number), 0).count for number in numbers] == [PROMPT_BLOCKS] * len(
            numbers
        )

    def _hang_up(self) -> None:
        for client in self._clients:
            client.close()
        self._clients.clear()


class TwoNodes:
    """Use as a context manager."""

    def __init__(self, hosts: TwoHosts, folder: Path) -> None:
        self.stalls = Stalls()
        self.a = Node(hosts.left, hosts.right, "a", A_PROMPTS, folder, self.stalls)
        self.b = Node(hosts.right, hosts.left, "b", B_PROMPTS, folder, self.stalls)

    def __enter__(self) -> TwoNodes:
        self.stalls.__enter__()
        try:
            self.a.start()
            self.b.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Once."""
        self.a.close()
        self.b.close()
        self.stalls.__exit__(None, None, None)
