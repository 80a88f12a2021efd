"""B fetches what A holds, while the network between them fails, or one of them stands still or dies.

    engine at B: a lease, with a time to wait ──► A's blocks come ── the fault ──► fewer blocks, in that time
                                                                       └── healed ──► all of them, within 3 s

Every request ends in its time, every byte that is read is right, whoever looks meanwhile sees whole blocks
only, and at the end nothing is held at either node and every slot can be had.

The sum: a fault of the network takes 8 s, a round with a node that stands 1 s, one that dies 2 s. A prompt
takes 0.2 s of the wire, however fast the machine: what comes within MIDDLE_S comes before its last byte is
sent, of which a queue of 50 ms and a socket's buffer hold 8 MiB at most.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import pytest

from kvcache import following
from kvcache.clock import NS_PER_MS, NS_PER_S
from kvcache.errors import Unavailable
from kvcache.peers import peer
from kvcache.testing.netns import TwoHosts
from kvcache.testing.transport_pair import LATE_NS
from tests.netfaults.nodes import LOOKER, PROMPT_BLOCKS, PROMPTS, Loaded, Node, TwoNodes, prompt
from tests.netfaults.test_network import CUTS, HEALED_NS

pytestmark = [pytest.mark.slow, pytest.mark.timed]

WAIT_MS = 600
MIDDLE_S = 0.08
WIRE_BYTES_PER_S = 80_000_000
AGAIN_S = 0.005
QUIET_NS = 5 * NS_PER_S
SLOW_BYTES_PER_S = 8_000_000
STANDING_ROUNDS = 12
DYING_ROUNDS = 3


class Scene:
    """Two nodes, and what was seen of them."""

    def __init__(self, nodes: TwoNodes) -> None:
        self.a, self.b, self.stalls = nodes.a, nodes.b, nodes.stalls
        self.way = random.Random(1)
        self.loads: list[Loaded] = []
        self.healed_ns: list[int] = []

    def fill(self) -> None:
        """A holds all prompts, and B knows so."""
        for number in range(PROMPTS):
            self.a.client.save(prompt(number))
        count = PROMPTS * PROMPT_BLOCKS
        self.b.client.until(lambda found: found["peer_known_blocks"] >= count, "it knows", HEALED_NS)

    def another(self) -> list[bytes]:
        """A prompt of which B lacks the most."""
        return min(map(prompt, range(PROMPTS)), key=self.b.looker.match)

    def load(self) -> Loaded:
        loaded = self.b.client.load(self.another(), WAIT_MS)
        self.loads.append(loaded)
        return loaded

    @contextmanager
    def loading(self) -> Iterator[Future[Loaded]]:
        """A request at B is under way, with some part of its bytes."""
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(self.b.client.load, self.another(), WAIT_MS)
            Event().wait(self.way.uniform(0, MIDDLE_S))
            yield asked

    def meet(self, fault: Callable[[], None]) -> Loaded:
        """What a request gets when this happens in the middle of its transfer."""
        with self.loading() as asked:
            fault()
            self.loads.append(asked.result())
        return self.loads[-1]

    def heals(self) -> None:
        """From now on it takes 3 s at most until a prompt comes whole."""
        began_ns = self.stalls.awake_ns()
        while self.load().count < PROMPT_BLOCKS:
            assert self.stalls.awake_ns() - began_ns < HEALED_NS, f"it does not heal: {self.b.client.stats()}"
            Event().wait(AGAIN_S)
        self.healed_ns.append(self.stalls.awake_ns() - began_ns)

    def check(self) -> None:
        for node in (self.a, self.b):
            node.client.until_quiet(QUIET_NS)
        late = [loaded for loaded in self.loads if loaded.over_ns > LATE_NS]
        assert not late
        latest_ms = max(loaded.over_ns for loaded in self.loads) / NS_PER_MS
        print(f"{len(self.loads)} requests, the latest {latest_ms:.1f} ms past its time")
        print("healed in", ", ".join(f"{each / NS_PER_S:.2f} s" for each in self.healed_ns))
        for node in (self.a, self.b):
            node.check_room(first=100)


@pytest.fixture
def scene(hosts: TwoHosts, tmp_path: Path) -> Iterator[Scene]:
    with TwoNodes(hosts, tmp_path) as nodes:
        scene = Scene(nodes)
        scene.fill()
        hosts.slow(WIRE_BYTES_PER_S)
        yield scene


@contextmanager
def watched(node: Node) -> Iterator[None]:
    """Somebody reads whatever of all prompts is visible, all the time."""
    client, over = node.new_client(LOOKER), Event()

    def watch() -> int:
        count = 0
        while not over.is_set():
            count += sum(client.load(prompt(number), 0).count for number in range(PROMPTS))
        return count

    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch)
        try:
            yield
        finally:
            over.set()
            assert watching.result(), "nothing was there to be seen"


@pytest.mark.parametrize("way", CUTS)
def test_a_partition(hosts: TwoHosts, scene: Scene, way: str) -> None:
    with watched(scene.b):
        scene.meet(lambda: CUTS[way](hosts))
        assert [scene.load().count for _ in range(5)] != [PROMPT_BLOCKS] * 5
        for node in (scene.a, scene.b):
            node.client.until_quiet(QUIET_NS)
        hosts.heal()
        scene.heals()
    scene.check()


def test_loss(hosts: TwoHosts, scene: Scene) -> None:
    with watched(scene.b):
        scene.meet(lambda: hosts.lose(20))
        for _ in range(6):
            scene.load()
        hosts.heal()
        scene.heals()
    scene.check()


def test_a_slow_wire(hosts: TwoHosts, scene: Scene) -> None:
    with watched(scene.b):
        scene.meet(lambda: hosts.slow(SLOW_BYTES_PER_S))
        assert any(scene.load().count < PROMPT_BLOCKS for _ in range(6))
        hosts.heal()
        scene.heals()
    scene.check()


def test_who_was_away_is_tried_again_in_time() -> None:
    """A wire that heals in the middle of a try that fails all the same, after the longest partition."""
    assert peer.CONNECT_NS + following.PAUSE_S_MAX * NS_PER_S <= HEALED_NS


def test_the_giver_stands_still(scene: Scene, factor: int) -> None:
    short = 0
    with watched(scene.b):
        for _ in range(STANDING_ROUNDS * factor):
            short += scene.meet(scene.a.stop).count < PROMPT_BLOCKS
            scene.b.client.until_quiet(QUIET_NS)
            scene.a.wake()
            scene.heals()
    assert short > STANDING_ROUNDS * factor // 3, f"{short} in the middle"
    scene.check()


def test_the_giver_dies(scene: Scene, factor: int) -> None:
    with watched(scene.b):
        for _ in range(DYING_ROUNDS * factor):
            scene.meet(scene.a.kill)
            scene.b.client.until_quiet(QUIET_NS)
            scene.a.start()
            scene.fill()
            scene.heals()
    scene.check()


def test_the_taker_stands_still(scene: Scene, factor: int) -> None:
    """What it was lent is given back meanwhile: it may stand for ever."""
    lent = 0.0
    with watched(scene.a):
        for _ in range(STANDING_ROUNDS // 2 * factor):
            with scene.loading() as asked:
                scene.b.stop()
                lent += scene.a.client.stats()["tickets"]
                scene.a.client.until_quiet(QUIET_NS)
                scene.b.wake()
                asked.result()  # It is late, as its node was.
            scene.heals()
    assert lent, "in the middle"
    scene.check()


def test_the_taker_dies(scene: Scene, factor: int) -> None:
    with watched(scene.a):
        for _ in range(DYING_ROUNDS * factor):
            with scene.loading() as asked:
                scene.b.kill()
                assert isinstance(asked.exception(), Unavailable | None)
            scene.a.client.until_quiet(QUIET_NS)
            scene.b.start()
            scene.fill()
            scene.heals()
    scene.check()
