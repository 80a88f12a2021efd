"""kill -9 of a whole node under load, over and over on one directory, and every byte compared.

With room for all, every block that was said to be durable is served by the next node, at once. With room
for a part, blocks may have been evicted, and what is served is right.

The sum: a round is a start of the node, up to 0.2 s of load and a look at 576 blocks: a second.
"""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest

from kvcache.testing.processes import NodeProcess
from tests.faults.clients import LATE_MS, Book, client, load_on, until_persisted

ROUNDS = 30
LOAD_S = 0.2

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3_600)]


def settings(folder: Path, way: random.Random, size: str) -> dict[str, str]:
    """Other rules each time: what one wrote, all must read."""
    return {
        "socket": str(folder / "node.sock"),
        "http": "none",
        "capacity": "3MiB",
        "nvme": f"{folder / 'one'}:{size},{folder / 'two'}:{size}",
        "nvme_segment": "1MiB",
        "nvme_write": way.choice(("through", "back", "evict")),
        "nvme_back_ms": "20",
        "nvme_late_ms": LATE_MS,
        "nvme_direct": way.choice(("auto", "off")),
        "nvme_scrub_share": way.choice(("0", "0.5")),
    }


@pytest.mark.parametrize("size", ["16MiB", "3MiB"], ids=["room-for-all", "room-for-a-part"])
def test_killed_under_load(scratch: Path, factor: int, size: str) -> None:
    way = random.Random(size)
    book, log = Book(), scratch / "node.log"
    never = threading.Event()
    served = 0
    for seed in range(ROUNDS * factor):
        with NodeProcess(settings(scratch, way, size), log) as node:
            with client(node.socket, book) as looking:
                before = book.loaded
                missing = looking.look()
                served += book.loaded - before
            assert size == "3MiB" or not missing, f"round {seed}: {missing}"
            with load_on(node.socket, book, seed):
                until_persisted(book, seed)
                never.wait(way.uniform(0.02, LOAD_S))
                node.kill()
        assert not book.wrong, f"round {seed}: {book.wrong}"
    assert "Traceback" not in log.read_text()
    assert book.persisted > ROUNDS
    assert served > 50 * ROUNDS
