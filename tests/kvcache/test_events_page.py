"""docs/events.md: its bytes are what is sent, its tables name what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvcache import wire
from kvcache.block import NamespaceId
from kvcache.event_load import NODE_LOAD
from kvcache.events import Digest

PAGE = (Path(__file__).parents[2] / "docs" / "events.md").read_text()
SPACE = NamespaceId(bytes(range(16)))
BLOCKS = [bytes(range(0x11, 0x19)), bytes(range(0x21, 0x29))]
INCARNATION, SEQ = 1_763_697_600_000_000_000, 4712


def digest() -> bytes:
    made = Digest()
    made.add(SPACE, BLOCKS)
    return made.pack()


def messages() -> dict[str, wire.Message]:
    stored = wire.BlockEvent("stored", SPACE, "host", bytes(range(8, 0, -1)), b"".join(BLOCKS))
    tiers = {"host": digest()}
    return {
        "watch": wire.Watch(INCARNATION, SEQ - 1),
        "batch": wire.EventBatch("a", INCARNATION, SEQ, False, [stored], digests=tiers),
        "beat": wire.EventBatch(
            "a", INCARNATION, SEQ, False, [], digests=tiers, beat=True, load={"leases": 3.0}
        ),
    }


@pytest.mark.parametrize("name", ["watch", "batch", "beat"])
def test_the_bytes_of_the_page_are_those_sent(name: str) -> None:
    found = re.search(rf"```text {name}\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None
    assert bytes.fromhex(found.group(1)) == wire.encode(2, messages()[name])


@pytest.mark.parametrize("kind", [wire.EventBatch, wire.BlockEvent])
def test_every_field_is_described(kind: type[wire.Message]) -> None:
    rows = set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE))
    assert set(kind.__struct_fields__) <= rows


def test_every_number_of_a_nodes_load_is_described_as_it_is_declared() -> None:
    for name, meaning in NODE_LOAD.items():
        assert f"| `{name}` | {meaning} |" in PAGE
