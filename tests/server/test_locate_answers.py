"""Look-ups of a real index: what a tenant may see, and that numbers are never taken for others."""

from __future__ import annotations

from array import array
from dataclasses import replace

import msgspec
import pytest

from kvcache import locate_wire as wire
from kvcache.block import HINT_BYTES
from kvcache.errors import NotAllowed
from kvcache.locality import LocalityIndex
from kvcache.locator import Names
from kvcache.server.locate_answers import IndexAnswers
from kvcache.wire import BlockEvent, EventBatch
from tests.server.http_double import Clock, space

HINTS = array("Q", range(1, 11)).tobytes()
MINE, OTHERS = space("default"), space("other")
ASK = wire.Asked(wire.QUERY, 0, len(HINTS), 0, False, 0)


class Rig:
    def __init__(self) -> None:
        self.index, self.clock = LocalityIndex(1 << 24), Clock()
        self.workers: dict[str, list[str]] = {}
        self.answers = IndexAnswers(self.index, self.clock, lambda _: self.workers)

    def tell(self, source: str, namespace: object, blocks: int, tier: str = "host", seq: int = 0) -> None:
        """All that the source has, at once."""
        assert isinstance(namespace, type(MINE))
        held = HINTS[: blocks * HINT_BYTES]
        event = BlockEvent("stored", namespace.namespace_id(), tier, b"", held)
        batch = EventBatch(source, 1, seq, True, [event], 0, [namespace.to_map()], load={"running": 2.0})
        self.index.apply(batch, self.clock.now_ns())

    def rows(
        self, tenant: str = "default", asked: wire.Asked = ASK, selector: bytes = b""
    ) -> list[list[int]]:
        parts = [bytes(each) for each in self.answers.query(tenant, asked, selector, memoryview(HINTS))]
        whole = b"".join(parts)
        body, _, _, rows, _ = wire.reply(whole)
        assert len(whole) == wire.ANSWER.size + body
        table = memoryview(parts[1]).cast("I").tolist()
        suspect = whole[wire.ANSWER.size + rows * 28 :][:rows]
        at = wire.COLUMNS
        return [[*table[row * at : row * at + at], suspect[row]] for row in range(rows)]

    def names(self, tenant: str = "default") -> Names:
        return msgspec.json.decode(self.answers.names(tenant), type=Names, strict=False)


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_columns_say_who_holds_how_much_and_where(rig: Rig) -> None:
    rig.tell("a", MINE, 4)
    rig.tell("b", MINE, 10, "nvme")
    assert rig.rows() == [[0, 0, 4, 0, 4, 0, 0, 0], [1, 0, 10, 0, 0, 10, 0, 0]]
    names = rig.names()
    assert names.sources == {0: "a", 1: "b"}
    assert [(each.number, each.id) for each in names.namespaces] == [(0, MINE.namespace_id().hex())]


def test_tiers_limit_and_selector_narrow_it(rig: Rig) -> None:
    rig.tell("a", MINE, 4)
    rig.tell("b", MINE, 10, "nvme")
    other = space("default", model="another")
    rig.tell("c", other, 7)
    assert [row[0] for row in rig.rows(asked=wire.Asked(1, 0, 80, 4, False, 0))] == [1]
    assert [row[0] for row in rig.rows(asked=wire.Asked(1, 0, 80, 0, False, 2))] == [1, 2]
    assert [row[0] for row in rig.rows(selector=wire.write_selector("another", []))] == [2]
    assert [row[0] for row in rig.rows(selector=wire.write_selector("", [MINE.namespace_id()]))] == [0, 1]
    assert rig.rows(selector=wire.write_selector("none", [])) == []


def test_a_tenant_sees_its_own_only_even_when_others_come_later(rig: Rig) -> None:
    rig.tell("a", MINE, 4)
    assert len(rig.rows()) == 1 and rig.rows("other") == []
    rig.tell("a", OTHERS, 9, seq=1)
    rig.tell("b", OTHERS, 9)
    assert [row[1] for row in rig.rows("other")] == [1, 1]
    assert [row[1] for row in rig.rows()] in ([], [0])  # What ``a`` told last was all that it has.
    assert [each.id for each in rig.names("other").namespaces] == [OTHERS.namespace_id().hex()]


def test_another_epoch_is_told_when_a_number_is_new(rig: Rig) -> None:
    epochs = [rig.names().epoch]
    for change in (
        lambda: rig.tell("a", MINE, 1),
        lambda: rig.tell("b", MINE, 1),
        lambda: rig.tell("b", OTHERS, 1, seq=1),
        lambda: rig.index.forget("a"),
        rig.answers.workers_changed,
    ):
        change()
        rig.rows()
        epochs.append(rig.names().epoch)
    assert len(set(epochs)) == len(epochs)
    before = rig.names().epoch
    rig.rows()
    assert rig.names().epoch == before


def test_who_is_suspect_is_marked_and_how_old_its_word_is(rig: Rig) -> None:
    rig.tell("a", MINE, 4)
    rig.clock.ns += 40_000_000
    rig.index.suspect("a")
    assert rig.rows()[0][-1] == 1
    parts = [
        bytes(each)
        for each in rig.answers.query("default", wire.Asked(1, 0, 80, 0, True, 0), b"", memoryview(HINTS))
    ]
    assert [memoryview(parts[at]).cast(kind).tolist() for at, kind in ((3, "Q"), (4, "Q"), (5, "I"))] == [
        [1],
        [0],
        [40],
    ]


def test_placements_are_for_those_who_see_the_namespace(rig: Rig) -> None:
    rig.tell("a", MINE, 4)
    with pytest.raises(NotAllowed):
        rig.answers.place("other", "a", MINE.namespace_id(), memoryview(HINTS))
    rig.answers.place("default", "a", MINE.namespace_id(), memoryview(HINTS))
    assert rig.rows() == [[0, 0, 4, 0, 4, 0, 6, 0]]


def test_sources_tell_their_state_and_load(rig: Rig) -> None:
    rig.workers = {"w": ["a"]}
    rig.tell("a", MINE, 4)
    rig.clock.ns += 3_000_000
    told = msgspec.json.decode(rig.answers.sources("default"))
    assert [(each["source"], each["state"], each["blocks"], each["load"]) for each in told] == [
        ("a", "synced", 4, {"running": 2.0})
    ]
    assert (told[0]["age_ms"], told[0]["load_age_ms"]) == (3, 3)
    assert rig.names().workers == {"w": ["a"]}


def test_what_is_kept_may_be_emptied_by_another_thread_at_any_time(rig: Rig) -> None:
    class Emptied(dict[tuple[str, bytes], frozenset[bytes] | None]):
        """Between two looks into it, somebody else asked for one selection too many."""

        def __contains__(self, key: object) -> bool:
            found = super().__contains__(key)
            self.clear()
            return found

    rig.tell("a", MINE, 4)
    rig.tell("a", OTHERS, 9, seq=1)
    expected = rig.rows("other")
    seen = rig.answers._seen
    rig.answers._seen = replace(seen, selections=Emptied(seen.selections))
    assert rig.rows("other") == expected != []
