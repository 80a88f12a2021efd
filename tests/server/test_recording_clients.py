"""What a real client does with a node, read back: one record a request, whose prompt is the one it had."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from kvcache.block import BlockHash, BlockSpec
from kvcache.client import connect_blocking
from kvcache.client.store import BlockingStore, Handle, SaveHints
from kvcache.eviction.traces import record_files
from kvcache.eviction.traces.edit import coarsened, renumbered
from kvcache.eviction.traces.generate import Workload, generate
from kvcache.eviction.traces.recorded import read_recorded
from kvcache.eviction.traces.trace import Trace
from kvcache.namespace import Namespace, shape_of
from tests.eviction.record_world import alike, whole_blocks
from tests.server.conftest import Serve

SPEC = BlockSpec(block_tokens=16, plane_count=2, head_count=1, head_bytes=1_024)
NAMESPACE = Namespace(
    model="m", weights="w", dtype="float32", layout="canonical", block_tokens=16, shape=shape_of(SPEC)
)
CONTENT = [bytes(SPEC.block_bytes)]


def serve_request(
    store: BlockingStore, handle: Handle, prefix: Sequence[BlockHash], name: str, hints: SaveHints
) -> int:
    """As an engine does: look, load (not here), compute, save. How many blocks were found."""
    held = store.lease(handle, prefix, name)
    store.release(held)
    missing = prefix[held.count :]
    parent = prefix[held.count - 1] if held.count else b""
    if missing:
        store.save(handle, missing, [CONTENT] * len(missing), parent, hints)
    return held.count


def prefixes(handle: Handle, trace: Trace) -> list[list[BlockHash]]:
    """Blocks of a trace as tokens: those of block 3 are 3, 3, 3, ..."""
    return [
        handle.hashes([block for block in request.blocks for _ in range(16)]) for request in trace.requests()
    ]


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the disk is just now: what was recorded is there once it was closed."""
    monkeypatch.setattr(record_files, "CLOSE_S", 60.0)


@pytest.mark.slow
@pytest.mark.parametrize("capacity", ["64MiB", "2MiB"])
def test_a_trace_that_was_served_is_read_back(serve: Serve, tmp_path: Path, capacity: str) -> None:
    node = serve(record=str(tmp_path / "rec"), capacity=capacity)
    trace = whole_blocks(generate(Workload(request_count=150, seed=5)))
    store = connect_blocking(node.node.address, timeout_ms=60_000)
    handle = store.open(NAMESPACE, SPEC)
    found = 0
    for request, prefix in zip(trace.requests(), prefixes(handle, trace), strict=True):
        hints = SaveHints("tool_call", session=1_000 + request.session)
        found += serve_request(store, handle, prefix, f"r{request.index}", hints)
        serve_request(store, handle, prefix, f"r{request.index}", hints)  # A second rank, or a retry.
    store.close()
    node.call(node.node.core.recording.close)
    read, expected = read_recorded(tmp_path / "rec"), coarsened(trace, 128)
    assert read.input_tokens.tolist() == [request.prompt_tokens for request in trace.requests()]
    assert alike(
        [list(request.blocks) for request in renumbered(read).requests()],
        [list(request.blocks) for request in expected.requests()],
    )
    told = [at for at, session in enumerate(read.sessions) if session >= 0]
    assert len(told) > 100  # Nothing is saved of a prompt that was found whole: it has none.
    assert all(
        (read.sessions[at] == read.sessions[told[0]]) == (trace.sessions[at] == trace.sessions[told[0]])
        for at in told
    )
    assert {read.request(at).kind for at in told} == {"tool_call"}
    assert found > 0


@pytest.mark.slow
def test_a_prompt_of_many_calls_is_one_request(serve: Serve, tmp_path: Path) -> None:
    node = serve(record=str(tmp_path / "rec"), capacity="32MiB")
    store = connect_blocking(node.node.address, timeout_ms=60_000)
    handle = store.open(NAMESPACE, SPEC)
    prefix = handle.hashes(list(range(16 * 2_600)))
    for name in ("cold", "warm"):
        serve_request(store, handle, prefix, name, SaveHints(session=3))
    store.close()
    node.call(node.node.core.recording.close)
    trace = read_recorded(tmp_path / "rec")
    assert trace.input_tokens.tolist() == [2_600 * 16, 2_600 * 16]
    assert list(trace.request(0).blocks) == list(trace.request(1).blocks)
    assert trace.output_tokens.tolist() == [0, 0]
