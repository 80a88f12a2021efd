"""Blocks that another node holds are had here: brought once, verified, and shared."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from kvcache import wire
from kvcache.clock import NS_PER_MS, NS_PER_S
from kvcache.credentials import Credentials
from kvcache.errors import BadInput
from kvcache.peers import fetch, lines
from kvcache.wire import BATCH_BLOCKS_MAX
from tests.server.peer_world import WAIT_MS, Here, Start
from tests.server.talk import HASHES, SIZE, SPEC, deadline, held, refused

CREDENTIALS = """
master_key = "{key}"

[[credential]]
token = "a-token-of-the-other-nodes"
tenant = "nodes"
roles = ["reader", "writer", "peer"]

[[credential]]
token = "a-token-of-the-team-called-a"
tenant = "team-a"
roles = ["reader", "writer"]
"""
NODES = "a-token-of-the-other-nodes"
TEAM = "a-token-of-the-team-called-a"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Nodes with their peers; each is looked at, and closed, at the end."""
    with ExitStack() as stack:

        def begin(name: str, *peers: Here, **settings: object) -> Here:
            addresses = ",".join(peer.node.tcp_address for peer in peers) or "none"
            return Here(tmp_path, name, stack, **{"peers": addresses, **settings})  # type: ignore[arg-type]

        yield begin


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks make a group."""
    monkeypatch.setattr(fetch, "GROUP_BYTES", 2 * SIZE)


@pytest.fixture
def a(start: Start) -> Here:
    """A node that holds eight blocks of one prompt."""
    node = start("a")
    node.save(HASHES[:8])
    return node


@pytest.fixture
def b(start: Start, a: Here) -> Here:
    """Its peer, which knows so."""
    node = start("b", a)
    node.until_known(8)
    return node


def test_what_a_peer_holds_is_had_here(a: Here, b: Here) -> None:
    assert b.load(HASHES[:10]) == 8
    told = b.stats()
    assert (told["peer_fetched_blocks"], told["peer_fetched_bytes"]) == (8, 8 * SIZE)
    assert (told["peers:ok"], told["peers:loading"], told["peers:lost"]) == (1, 0, 0)
    assert b.holds(HASHES[:8]) == 8
    assert b.troubles() == []
    assert a.stat("lookup_tokens") == 0, "what a node asks for is counted where it was asked first"
    assert told["hit_tokens"] == 8 * SPEC.block_tokens
    a.until_quiet()
    b.until_quiet()


def test_a_match_starts_the_fetch(b: Here) -> None:
    assert b.match(HASHES[:10]) == 8
    b.until(lambda: b.holds(HASHES[:8]) == 8, "they came")


def test_nobody_waits_who_does_not_want_to(b: Here) -> None:
    leased = b.lease(HASHES[:10], wait_ms=0)
    assert leased.count + leased.coming == 8
    b.until(lambda: b.holds(HASHES[:8]) == 8, "they came")


def test_only_what_is_missing_is_brought(a: Here, b: Here) -> None:
    b.save(HASHES[:3])
    assert b.load(HASHES[:8]) == 8
    assert a.stat("exported_blocks") == 5


def test_ten_who_ask_for_one_prompt_cause_one_transfer(a: Here, b: Here) -> None:
    channels = [b.connect() for _ in range(10)]
    with ThreadPoolExecutor(10) as pool:
        found = list(pool.map(lambda channel: b.load(HASHES[:8], channel=channel), channels))
    assert found == [8] * 10
    assert (a.stat("exported_blocks"), a.stat("requests:export")) == (8, 1)
    assert b.stat("peer_fetched_blocks") == 8


@pytest.mark.usefixtures("small_groups")
def test_groups_of_one_prompt_come_from_both_peers_that_hold_it(start: Start, a: Here) -> None:
    c = start("c")
    c.save(HASHES[:8])
    b = start("b", a, c)
    b.until_known(16)
    assert b.load(HASHES[:8]) == 8
    assert (a.stat("exported_blocks"), c.stat("exported_blocks")) == (4, 4)


@pytest.mark.usefixtures("small_groups")
def test_what_one_peer_begins_another_goes_on_with(start: Start, a: Here) -> None:
    c = start("c")
    c.save(HASHES[:12])
    b = start("b", a, c)
    b.until_known(20)
    assert b.load(HASHES[:16]) == 12
    assert c.stat("exported_blocks") >= 4


@pytest.mark.usefixtures("small_groups")
def test_what_does_not_fit_on_its_way_at_once_comes_while_somebody_waits(start: Start) -> None:
    a = start("a")
    a.save(HASHES[:20])
    b = start("b", a, capacity="1MiB")  # A quarter are 8 blocks.
    b.until_known(20)
    assert b.load(HASHES[:20]) == 20


def test_a_part_from_the_middle_of_a_prompt_stands_behind_what_is_here(b: Here) -> None:
    b.save(HASHES[:3])
    assert b.load(HASHES[3:8], parent=HASHES[2]) == 5
    assert b.holds(HASHES[:8]) == 8


def test_a_part_whose_beginning_is_not_here_is_a_miss(b: Here) -> None:
    assert b.load(HASHES[3:8], parent=HASHES[2]) == 0
    refused("bad_prefix", b.channel, wire.TakeLease(b.namespace, HASHES[0], parent=b"half a hash"))


def test_hole_after_hole_is_filled(b: Here) -> None:
    b.save(HASHES[:8])
    b.quarantine(HASHES[5])
    b.quarantine(HASHES[2])
    assert b.holds(HASHES[:8]) == 2
    assert b.load(HASHES[:8]) == 8
    assert b.stat("peer_fetched_blocks") == 2


def on_disk(start: Start, tmp_path: Path) -> Here:
    """A node that holds eight blocks of one prompt on its disk only."""
    a = start("a", capacity="1MiB", nvme=f"{tmp_path / 'tier'}:16MiB", nvme_segment="1MiB")
    a.save(HASHES[:8])
    request = wire.Persist(a.namespace, b"".join(HASHES[:8]), WAIT_MS)
    assert a.channel.call(request, deadline()) == wire.Matched(8)
    a.save([bytes([0xE0, at]) * 8 for at in range(32)])
    a.until(lambda: a.stat("nvme_written_blocks") == 40, "nothing is being written any more")
    return a


@pytest.mark.slow
def test_what_a_peer_has_on_its_disk_is_had_here(start: Start, tmp_path: Path, small_groups: None) -> None:
    a = on_disk(start, tmp_path)
    assert a.holds(HASHES[:1]) == 0, "they are on its disk only"
    b = start("b", a)
    b.until(lambda: b.stat("peer_known_blocks") >= 8, "the blocks are known")
    assert b.load(HASHES[:8]) == 8
    assert a.stat("nvme_read_blocks") == 8


@pytest.mark.slow
def test_what_a_peer_has_on_its_disk_goes_on_what_is_here(
    start: Start, tmp_path: Path, small_groups: None
) -> None:
    a = on_disk(start, tmp_path)
    b = start("b", a)
    b.save(HASHES[:3])
    b.until(lambda: b.stat("peer_known_blocks") >= 8, "the blocks are known")
    assert b.load(HASHES[:8]) == 8
    assert a.stat("exported_blocks") == 5


@pytest.mark.slow
def test_what_was_fetched_is_kept_on_the_disk_here_or_not_as_the_setting_says(
    start: Start, tmp_path: Path, a: Here, small_groups: None
) -> None:
    for keep in ("keep", "pass"):
        nvme = {"nvme": f"{tmp_path / keep}:16MiB", "nvme_segment": "1MiB"}
        b = start(keep, a, peer_keep=keep, **nvme)
        b.until_known(8)
        assert b.load(HASHES[:8]) == 8
        if keep == "keep":
            b.until(lambda b=b: b.stat("nvme_written_blocks") == 8, "they are written")  # type: ignore[misc]
        else:
            assert b.stat("nvme_wanted_blocks") == b.stat("nvme_written_blocks") == 0


def test_the_peer_that_a_request_names_is_asked_though_the_index_is_behind(a: Here, b: Here) -> None:
    b.stop_following()
    a.save(HASHES[8:12], HASHES[7])
    assert b.match(HASHES[:12]) == 8
    assert b.load(HASHES[:12], source="nobody") == 8
    assert b.load(HASHES[:12], source="a") == 12


def test_a_node_that_asks_gets_what_is_here_and_nothing_is_fetched_for_it(
    start: Start, a: Here, b: Here
) -> None:
    b.save(HASHES[:3])
    as_node = b.connect(node="x")
    leased = b.lease(HASHES[:8], channel=as_node, source="a")
    assert (leased.count, leased.coming) == (3, 0)
    reply = as_node.call(wire.Match(b.namespace, b"".join(HASHES[:8])), deadline())
    assert reply == wire.Matched(3)
    assert a.stat("requests:lease") == 0


def test_two_nodes_that_name_each_other_do_not_ask_for_ever(start: Start, tmp_path: Path) -> None:
    a = start("a", peers=f"unix://{tmp_path / 'b.sock'}")
    b = start("b", a)
    loads = dict.fromkeys("ab", 0)
    for here, other in ((a, b), (b, a)):
        here.until(lambda here=here: here.stat("peers:ok") == 1, "it follows")  # type: ignore[misc]
        while not other.stat("requests:follow"):  # A node that stood still had no time to ask.
            assert here.load(HASHES[:4], wait_ms=50, source=other.node.name) == 0
            loads[here.node.name] += 1
    assert {each.node.name: each.stat("requests:lease") for each in (a, b)} == loads
    a.save(HASHES[:4])
    b.until_known(4)
    b.until(lambda: b.load(HASHES[:4]) == 4, "what was not there a moment ago is had")


def test_another_data_address_is_taken_when_one_leads_nowhere(start: Start) -> None:
    a = start("a", data="tcp://127.0.0.2:0,tcp://127.0.0.1:0")
    a.save(HASHES[:8])
    a.embedded.run(a.node.core.plane._ways["tcp"].listeners[0].close())
    b = start("b", a)
    b.until_known(8)
    b.until(lambda: b.load(HASHES[:8], wait_ms=100) == 8, "they come by the other")
    assert b.stat("peer_failed_fetches:lost") == 1


def test_connections_that_nobody_uses_are_closed(a: Here, b: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    assert b.load(HASHES[:8]) == 8
    assert len(a.node._sessions) > 2
    monkeypatch.setattr(lines, "IDLE_NS", -3_600 * NS_PER_S)  # So long the clock has gone on, as it were.
    a.until(lambda: len(a.node._sessions) == 2, "its own, and one on which it is followed")
    a.save(HASHES[8:12])
    b.until_known(12)
    assert b.load(HASHES[:12]) == 12


def test_a_fetch_that_takes_longer_than_computing_is_not_begun(start: Start, a: Here, b: Here) -> None:
    directory = b.node.core.bringing.directory
    assert directory is not None
    rate = directory.peers[0].load.rate
    for _ in range(8):
        b.embedded.call(lambda: rate.add(SIZE, 100 * NS_PER_MS))
    fast, slow = 1_000 * SPEC.block_tokens, SPEC.block_tokens
    assert b.load(HASHES[:8], prefill_tokens_s=fast) == 0
    assert b.stat("peer_declined_fetches") == 1
    assert b.load(HASHES[:8], prefill_tokens_s=slow) == 8


def test_a_node_that_finds_itself_among_its_peers_leaves_itself_out(start: Start, tmp_path: Path) -> None:
    a = start("a", peers=f"unix://{tmp_path / 'a.sock'}")
    a.save(HASHES[:2])
    directory = a.node.core.bringing.directory
    assert directory is not None
    a.until(lambda: directory.peers[0].is_self, "it knows itself")
    assert a.troubles() == []
    assert a.load(HASHES[:4]) == 2
    assert [a.stat(f"peers:{state}") for state in ("ok", "loading", "lost")] == [0, 0, 0]
    a.until(lambda: all(task.done() for task in directory._tasks), "it is not tried again and again")


class TestTenants:
    def test_a_peer_is_asked_for_the_tenant_of_the_engine(self, start: Start, tmp_path: Path) -> None:
        settings = credentials(tmp_path, "12" * 32)
        a = start("a", token=TEAM, **settings)
        a.save(HASHES[:8])
        b = start("b", a, token=TEAM, **settings)
        b.until_known(8)
        assert b.load(HASHES[:8]) == 8
        other = start("c", a, token=NODES, **settings)
        other.until_known(8)
        assert other.load(HASHES[:8]) == 0, "these are another tenant's"
        assert other.stat("peer_failed_fetches:gone") == 0, "and not even asked for"

    def test_a_peer_with_another_master_key_is_told_of_and_not_followed(
        self, start: Start, tmp_path: Path
    ) -> None:
        (tmp_path / "other").mkdir()
        a = start("a", token=TEAM, **credentials(tmp_path, "12" * 32))
        b = start("b", a, token=TEAM, **credentials(tmp_path / "other", "34" * 32))
        b.until(lambda: any("another key" in text for text in b.troubles()), "it says so")
        assert b.stat("peers:lost") == 1

    def test_a_token_file_that_holds_none_is_refused(
        self, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        settings = credentials(tmp_path, "12" * 32)
        monkeypatch.delattr("kvcache.server.node._build_core")  # No memory is taken before.
        file = Path(str(settings["peer_token_file"]))
        for content in (b"", b"two words", b"\xff"):
            file.write_bytes(content)
            with pytest.raises(BadInput, match="holds no token"):
                start("a", peers="tcp://127.0.0.1:1", token=TEAM, **settings)
        file.write_text(NODES)
        file.chmod(0o644)
        with pytest.raises(BadInput, match="others can read"):
            start("a", peers="tcp://127.0.0.1:1", token=TEAM, **settings)


def credentials(folder: Path, key: str) -> dict[str, object]:
    file, token = folder / "credentials.toml", folder / "node.token"
    file.write_text(CREDENTIALS.format(key=key))
    token.write_text(f"{NODES}\n")
    file.chmod(0o600)
    token.chmod(0o600)
    assert Credentials.from_file(file).has_tokens
    return {"credentials": str(file), "peer_token_file": str(token)}


def test_a_peer_of_the_same_name_is_told_of(start: Start, a: Here, tmp_path: Path) -> None:
    folder = tmp_path / "apart"
    folder.mkdir()
    twin = start("a", a, socket=str(folder / "a.sock"))
    twin.until(lambda: any("is called a, as this one" in text for text in twin.troubles()), "it says so")
    assert twin.load(HASHES[:8]) == 0
    assert held(twin.channel, twin.namespace, HASHES[:8]) == 0
    assert len(HASHES) < BATCH_BLOCKS_MAX
