"""The demo counts right: what was found, what was wrong, and what happened at the kill."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

from kvcache.block import BlockHash, BlockSpec
from kvcache.client import connect_blocking
from kvcache.client.store import LEASE_MS, NO_HINTS, BlockingStore, Handle, Lease, SaveHints
from kvcache.clock import NS_PER_S, SystemClock
from kvcache.demo import Options, block_bytes_for
from kvcache.demo_client import Outcome, Prompt, Replayer, Setup, namespace_of, run, spec_of, tokens_of
from kvcache.demo_feed import Feed
from kvcache.demo_locate import Located
from kvcache.demo_report import MODEL, Kill, Nvme, Report, Totals, as_json, progress, summary
from kvcache.eviction.traces.generate import Workload, generate
from kvcache.eviction.traces.trace import write_trace
from kvcache.namespace import Namespace
from kvcache.testing.processes import NodeProcess

if TYPE_CHECKING:
    from typing_extensions import Buffer

ROOT = Path(__file__).parent.parent
SETUP = Setup("", block_tokens=4, block_bytes=8_192, seed=3)
PROMPT = Prompt(list(range(5)))
PROMISED = {"requests", "prompt_tokens", "hit_tokens", "wrong_bytes", "node_kills", "seconds"}


class DictStore:
    """A store that keeps blocks in a dict, with faults to order: it loses, lies and goes away."""

    def __init__(self) -> None:
        self.counters: Mapping[str, int] = Counter()
        self.blocks: dict[BlockHash, list[bytes]] = {}
        self.lost: set[int] = set()
        self.room = 1 << 30
        self.asked = 0
        self.released = 0

    def open(self, namespace: Namespace, spec: BlockSpec) -> Handle:
        key = bytes(32)
        return Handle(namespace, spec, namespace.namespace_id(), namespace.root(key), key)

    def lease(
        self, handle: Handle, prefix: Sequence[BlockHash], request: str = "", duration_ms: int = LEASE_MS
    ) -> Lease:
        self.asked += len(prefix)
        held = [name in self.blocks for name in prefix]
        return Lease(handle, tuple(prefix[: held.index(False) if False in held else len(held)]), (), 1)

    def load(self, lease: Lease, into: Sequence[Sequence[Buffer]], start: int = 0) -> frozenset[int]:
        for name, pieces in zip(lease.prefix[start:], into, strict=False):
            for piece, stored in zip(pieces, self.blocks[name], strict=True):
                memoryview(piece)[:] = stored
        return frozenset(self.lost & set(range(start, start + len(into))))

    def save(
        self,
        handle: Handle,
        prefix: Sequence[BlockHash],
        blocks: Sequence[Sequence[Buffer]],
        parent: bytes = b"",
        hints: SaveHints = NO_HINTS,
    ) -> int:
        held = 0
        for name, pieces in zip(prefix, blocks, strict=True):
            if name not in self.blocks and len(self.blocks) >= self.room:
                break
            self.blocks.setdefault(name, [bytes(piece) for piece in pieces])
            held += 1
        return held

    def release(self, lease: Lease) -> None:
        self.released += 1

    def close(self) -> None:
        pass


def replayer(store: BlockingStore, setup: Setup = SETUP) -> Replayer:
    return Replayer(store, store.open(namespace_of(setup), spec_of(setup)), setup)


def counted(outcome: Outcome) -> tuple[int, int, int, int]:
    return outcome.hit_blocks, outcome.saved_blocks, outcome.wrong_blocks, outcome.wrong_bytes


def test_what_was_saved_is_hit() -> None:
    store = DictStore()
    client = replayer(store)
    assert counted(client.replay(PROMPT)) == (0, 5, 0, 0)
    assert counted(client.replay(PROMPT)) == (5, 0, 0, 0)
    assert counted(client.replay(Prompt([0, 1, 9]))) == (2, 1, 0, 0)
    assert store.released == 3
    assert store.asked == 5 + 5 + 3, "the node's hit ratio is of whole prompts"


def test_an_empty_prompt_is_nothing() -> None:
    assert counted(replayer(DictStore()).replay(Prompt([]))) == (0, 0, 0, 0)


def test_a_planted_wrong_byte_is_counted() -> None:
    store = DictStore()
    client = replayer(store)
    client.replay(PROMPT)
    for pieces in list(store.blocks.values())[1:3]:
        pieces[0] = pieces[0][:99] + bytes([pieces[0][99] ^ 1]) + pieces[0][100:]
    assert counted(client.replay(PROMPT)) == (5, 0, 2, 2)


def test_blocks_that_changed_places_are_wrong() -> None:
    store = DictStore()
    client = replayer(store)
    client.replay(PROMPT)
    first, second = list(store.blocks)[:2]
    store.blocks[first], store.blocks[second] = store.blocks[second], store.blocks[first]
    assert client.replay(PROMPT).wrong_blocks == 2


def test_a_hit_ends_where_a_block_could_not_be_had() -> None:
    store = DictStore()
    client = replayer(store)
    client.replay(PROMPT)
    store.lost = {3}
    assert counted(client.replay(PROMPT)) == (3, 2, 0, 0)


def test_nothing_found_again_on_nvme_is_a_failure() -> None:
    totals = Totals(16, 4_096, hit_tokens=16)
    killed = Report("t", 1, 1, 1.0, totals, Kill(1.0, 1, 1.0), 1.0, 0, Located(), Nvme(1 << 30, 9, 0, 0))
    assert killed.exit_status == 1
    assert replace(killed, nvme=Nvme(1 << 30, 9, 5, 0)).exit_status == 0
    assert replace(killed, nvme=Nvme()).exit_status == 0


def test_nodes_that_fetched_nothing_from_one_another_are_a_failure() -> None:
    totals = Totals(16, 4_096, requests=200, hit_tokens=16)
    apart = Report("t", 2, 1, 1.0, totals, None, 1.0, 0, Located(), nodes=2)
    assert apart.exit_status == 1
    assert replace(apart, fetched_blocks=1).exit_status == 0
    assert replace(apart, totals=replace(totals, requests=199)).exit_status == 0


def test_a_full_store_saves_less() -> None:
    store = DictStore()
    store.room = 2
    client = replayer(store)
    assert counted(client.replay(PROMPT)) == (0, 2, 0, 0)
    assert counted(client.replay(PROMPT)) == (2, 0, 0, 0)


def test_prompts_longer_than_a_batch_are_whole() -> None:
    store = DictStore()
    client = replayer(store)
    long = Prompt(list(range(300)))
    assert counted(client.replay(long)) == (0, 300, 0, 0)
    assert counted(client.replay(long)) == (300, 0, 0, 0)


def test_equal_tokens_mean_equal_blocks() -> None:
    assert tokens_of([1, 2], 3) == b"\1\0\0\0" * 3 + b"\2\0\0\0" * 3
    assert tokens_of([], 3) == b""


@pytest.mark.parametrize("block_bytes", [4_096, 16_384, 1 << 18, 1 << 21])
def test_every_block_size_has_a_shape(block_bytes: int) -> None:
    setup = msgspec.structs.replace(SETUP, block_bytes=block_bytes)
    assert spec_of(setup).block_bytes == block_bytes


def test_the_tier_holds_many_blocks_but_not_all() -> None:
    long, short = generate(Workload(request_count=2_000)), generate(Workload(request_count=20))
    assert block_bytes_for(long, 1 << 30) == 1 << 18
    assert block_bytes_for(long, 1 << 40) == 16 * MODEL.kv_bytes_a_token
    assert block_bytes_for(long, 1 << 20) == 4_096
    held = (1 << 26) // block_bytes_for(short, 1 << 26)
    assert 8 < held < short.block_count


def test_prompts_are_handed_out_once_each() -> None:
    trace = generate(Workload(request_count=20))
    feed = Feed(trace, 12, Totals(16, 4_096))
    taken = []
    while (request := feed.take()) is not None:
        taken.append(request.index)
        feed.give(request, Outcome(hit_blocks=1))
    assert taken == list(range(12))
    assert feed.done_share == 1
    assert feed.totals.prompt_tokens == sum(request.prompt_tokens for request in trace.head(12).requests())
    assert feed.totals.hit_tokens == 12 * 16


def test_a_hit_after_the_kill_is_noted() -> None:
    feed = Feed(generate(Workload(request_count=4)), 4, Totals(16, 4_096))
    request = feed.take()
    assert request is not None
    feed.give(request, Outcome(hit_blocks=1))
    assert feed.hit_again_s < 0
    feed.watch_for_hit()
    feed.give(request, Outcome(hit_blocks=1, away=True))
    assert feed.hit_again_s < 0
    feed.give(request, Outcome(hit_blocks=1))
    assert feed.hit_again_s >= 0


def report(totals: Totals) -> Report:
    return Report("made up", 2, 1 << 30, 3.0, totals, Kill(1.0, 4, 0.5), 0.7, 9, Located())


def totals(*outcomes: Outcome) -> Totals:
    counted = Totals(16, 4_096)
    for outcome in outcomes:
        counted.add(64, outcome)
    return counted


def test_prefill_saved_follows_the_formula() -> None:
    flops = totals(Outcome(hit_blocks=2), Outcome(hit_blocks=1)).flops_saved
    assert flops == sum(2 * 8.03e9 * n + 2 * 32 * 4096 * n**2 for n in (32, 16))


def test_exit_status_says_whether_it_went_well() -> None:
    assert report(totals(Outcome(hit_blocks=1))).exit_status == 0
    assert report(totals(Outcome(hit_blocks=0))).exit_status == 1
    assert report(totals(Outcome(hit_blocks=1, wrong_bytes=1))).exit_status == 1


def test_the_summary_says_what_the_numbers_say() -> None:
    well = report(totals(Outcome(hit_blocks=2), Outcome(away=True)))
    text = summary(well)
    assert "128" in text  # prompt tokens
    assert "32 (25.0%)" in text
    assert "1 prompts met no node" in text
    assert max(map(len, text.splitlines())) <= 100
    assert "must never be" not in text
    assert "must never be" in summary(report(totals(Outcome(hit_blocks=1, wrong_bytes=7))))
    assert set(as_json(well)) >= PROMISED
    assert json.loads(json.dumps(as_json(well)))["node_kills"] == 1
    assert len(progress(0.5, totals(), "12.0 s")) <= 100


def test_defaults_stay_under_a_minute() -> None:
    assert Options().seconds <= 30


# --- with real processes ------------------------------------------------------------------------


def demo_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "kvcache", "demo", "--capacity", "32MiB", *arguments]


def demo_environment(home: Path) -> dict[str, str]:
    """All that the demo leaves would lie under ``home``, and all its processes name it."""
    return {**os.environ, "TMPDIR": str(home)}


def processes_of(home: Path) -> list[str]:
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                if str(home).encode() in (process / "environ").read_bytes():
                    found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue
    return found


def left_after(home: Path) -> list[str]:
    """What still runs. A killed node's HTTP process ends when it sees its pipe end: it has thirty seconds."""
    end_ns = SystemClock().now_ns() + 30 * NS_PER_S
    while (found := processes_of(home)) and SystemClock().now_ns() < end_ns:
        pass
    return found


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_demo_runs_through(tmp_path: Path) -> None:
    command = demo_command("--json", "--requests", "600", "--clients", "2", "--seconds", "600")
    done = subprocess.run(
        command, cwd=ROOT, env=demo_environment(tmp_path), capture_output=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr.decode()[-2_000:]
    assert done.stdout.count(b"\n") == 1, "with --json, one line and nothing else"
    result = json.loads(done.stdout)
    assert set(result) >= PROMISED
    assert result["requests"] == 600
    assert result["wrong_bytes"] == 0
    assert 0 < result["hit_tokens"] < result["prompt_tokens"]
    assert result["node_kills"] == 1
    assert result["evicted_blocks"] > 0
    assert result["nvme_restored_blocks"] > 0, "the killed node's blocks are found on NVMe"
    assert result["nvme_read_blocks"] > 0, "and served"
    assert result["located"]["error"] == ""
    assert result["peer_fetched_blocks"] > 0, "what one node holds is loaded at the other"
    assert result["located"]["source"] == "node-1"
    assert result["located"]["blocks"] > 0
    assert list(tmp_path.iterdir()) == []
    assert left_after(tmp_path) == []


@pytest.mark.slow
def test_the_demo_replays_a_file(tmp_path: Path) -> None:
    path = tmp_path / "small.npz"
    write_trace(path, generate(Workload(request_count=60, block_tokens=64)))
    done = subprocess.run(
        demo_command("--trace", str(path)), cwd=ROOT, capture_output=True, timeout=100, check=False, text=True
    )
    assert done.returncode == 0, done.stderr[-2_000:]
    assert "small.npz" in done.stdout
    assert "wrong bytes" in done.stdout


def hear_interrupts() -> None:
    """A shell's background job ignores SIGINT, and so does all that it starts: not what is tested here."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    with subprocess.Popen(
        demo_command(),
        cwd=ROOT,
        env=demo_environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        preexec_fn=hear_interrupts,
    ) as running:
        assert running.stdout is not None
        assert running.stdout.readline()  # The node is ready, the clients start.
        running.send_signal(number)
        assert running.wait(30) != 0
    assert list(tmp_path.iterdir()) == []
    assert left_after(tmp_path) == []


def test_a_trace_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.npz"
    path.write_bytes(b"no")
    done = subprocess.run(
        demo_command("--trace", str(path)), cwd=ROOT, capture_output=True, timeout=60, check=False, text=True
    )
    assert done.returncode == 1
    assert "bad_trace" in done.stderr


@pytest.mark.slow
def test_bytes_changed_in_the_slab_are_a_miss_not_a_wrong_byte(tmp_path: Path) -> None:
    """Another client writes into the shared memory after the commit: the store must see it, not the demo."""
    settings = {"socket": str(tmp_path / "s"), "capacity": "8MiB", "http": "none"}
    with NodeProcess(settings) as node:
        setup = msgspec.structs.replace(SETUP, address=f"unix://{node.socket.removeprefix('unix://')}")
        store, other = (connect_blocking(setup.address, timeout_ms=60_000) for _ in range(2))
        client = replayer(store, setup)
        assert counted(client.replay(PROMPT)) == (0, 5, 0, 0)
        scribble(other, setup, position=2)
        outcome = client.replay(PROMPT)
        assert (outcome.hit_blocks, outcome.wrong_bytes) == (2, 0)
        assert store.counters["failed_blocks:checksum"] >= 1
        store.close()
        other.close()


def scribble(store: BlockingStore, setup: Setup, position: int) -> None:
    """Flip one byte of block ``position`` of PROMPT, through the map of ``store``."""
    handle = store.open(namespace_of(setup), spec_of(setup))
    lease = store.lease(handle, handle.hashes(tokens_of(PROMPT.blocks, setup.block_tokens)))
    offset = lease.grants[0].offsets[position]
    view = store._attached.link.slab._view  # type: ignore[attr-defined]  # what a hostile client reaches
    view[offset + 100] ^= 1
    store.release(lease)


def test_a_client_ends_with_its_input(tmp_path: Path) -> None:
    settings = {"socket": str(tmp_path / "s"), "capacity": "8MiB", "http": "none"}
    with NodeProcess(settings) as node:
        setup = msgspec.structs.replace(SETUP, address=node.socket)
        lines = [setup, PROMPT, PROMPT]
        source = io.BytesIO(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
        target = io.BytesIO()
        run(source, target)
    outcomes = [msgspec.json.decode(line, type=Outcome) for line in target.getvalue().splitlines()[1:]]
    assert [counted(outcome) for outcome in outcomes] == [(0, 5, 0, 0), (5, 0, 0, 0)]
