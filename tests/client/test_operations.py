"""Operations by themselves: what they ask for, step by step, of a node that is a few lines of test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import pytest

from kvcache.block import HASH_BYTES, BlockHash, BlockSpec, NamespaceId
from kvcache.client import operations
from kvcache.client.link import Context, Link, Tally
from kvcache.client.operations import COMMIT_SUMS_BYTES_MAX
from kvcache.client.remote import TRANSFER_BYTES
from kvcache.client.steps import Answer, Call, Operation, Work
from kvcache.client.store import NO_HINTS, Handle, SaveHints
from kvcache.namespace import shape_of
from kvcache.sums import SUM_BYTES
from kvcache.testing.clock import FakeClock
from kvcache.testing.stores import EXAMPLE, SIZE, SPEC
from kvcache.wire import (
    BATCH_BLOCKS_MAX,
    PROTOCOL_VERSION,
    Commit,
    Committed,
    Done,
    Reply,
    Request,
    Reserve,
    Reserved,
    Welcome,
    Write,
)

Result = TypeVar("Result")
TENANT_KEY = b"k" * 32


def hashes(count: int) -> list[BlockHash]:
    return [BlockHash(number.to_bytes(HASH_BYTES, "little")) for number in range(1, count + 1)]


def context_and_handle(spec: BlockSpec = SPEC) -> tuple[Context, Handle]:
    namespace = replace(EXAMPLE, shape=shape_of(spec))
    handle = Handle(
        namespace, spec, NamespaceId(namespace.namespace_id()), namespace.root(TENANT_KEY), TENANT_KEY
    )
    link = Link(1, Welcome(PROTOCOL_VERSION, "n", 1, "default", [], TENANT_KEY, 0), None)
    link.opened = frozenset({handle.namespace_id})
    return Context(link, Tally(), FakeClock()), handle


class Script:
    """Answers each call, does each work, and keeps what was asked."""

    def __init__(self, answer: Callable[[Request], Reply]) -> None:
        self.asked: list[Request] = []
        self.sent: list[int] = []
        self._answer = answer

    def drive(self, operation: Operation[Result]) -> Result:
        answer: Answer = None
        try:
            while True:
                step = operation.send(answer)
                if isinstance(step, Work):
                    answer = step.run()
                    continue
                self.asked.append(step.request)
                if isinstance(step, Call):
                    self.sent.append(step.payload_bytes)
                answer = self._answer(step.request) if isinstance(step, Call) else None
        except StopIteration as done:
            result: Result = done.value
            return result


def roomy(request: Request) -> Reply:
    """A node that takes all."""
    match request:
        case Reserve():
            return Reserved(1, 0, len(request.prefix) // HASH_BYTES, [], [])
        case Write():
            return Done()
        case Commit():
            return Committed(len(request.sums) // (SPEC.chunk_count * SUM_BYTES))
    raise AssertionError(request)


def test_the_parent_of_a_batch_is_the_last_block_of_the_one_before() -> None:
    context, handle = context_and_handle()
    prefix = hashes(2 * BATCH_BLOCKS_MAX + 1)
    shared = bytes(SIZE)
    script = Script(roomy)
    hints = SaveHints("assistant", 70, 5, 100)
    held = script.drive(operations.save(context, handle, prefix, [[shared]] * len(prefix), b"p" * 16, hints))
    assert held == len(prefix)
    reserves = [request for request in script.asked if isinstance(request, Reserve)]
    assert [request.parent for request in reserves] == [
        b"p" * 16,
        prefix[BATCH_BLOCKS_MAX - 1],
        prefix[2 * BATCH_BLOCKS_MAX - 1],
    ]
    assert b"".join(request.prefix for request in reserves) == b"".join(prefix)
    assert {(r.hint, r.priority, r.session, r.gap_ms) for r in reserves} == {("assistant", 70, 5, 100)}


@pytest.mark.parametrize("room", [0, 1, BATCH_BLOCKS_MAX - 1])
def test_a_node_that_fills_up_ends_the_save(room: int) -> None:
    context, handle = context_and_handle()

    def full(request: Request) -> Reply:
        if isinstance(request, Reserve):
            return Reserved(min(room, 1), 0, room, [], [], "full")
        return roomy(request)

    script = Script(full)
    prefix = hashes(BATCH_BLOCKS_MAX + 5)
    blocks = [[bytes(SIZE)]] * len(prefix)
    assert script.drive(operations.save(context, handle, prefix, blocks, b"", NO_HINTS)) == room
    assert sum(isinstance(request, Reserve) for request in script.asked) == 1
    assert context.tally.copy()["unsaved_blocks:full"] == len(prefix) - room


def test_what_is_held_already_is_not_sent() -> None:
    context, handle = context_and_handle()

    def partly(request: Request) -> Reply:
        return Reserved(1, 3, 2, [], []) if isinstance(request, Reserve) else roomy(request)

    script = Script(partly)
    blocks = [[bytes(SIZE)]] * 5
    assert script.drive(operations.save(context, handle, hashes(5), blocks, b"", NO_HINTS)) == 5
    assert sum(script.sent) == 2 * SIZE


def test_a_commit_and_a_transfer_stay_within_their_limits() -> None:
    """Many small chunks a block: the sums of a batch must fit a message, its bytes several transfers."""
    spec = BlockSpec(block_tokens=4, plane_count=4_096, head_count=1, head_bytes=256)
    context, handle = context_and_handle(spec)

    def answer(request: Request) -> Reply:
        if isinstance(request, Commit):
            assert len(request.sums) <= COMMIT_SUMS_BYTES_MAX
            return Committed(len(request.sums) // (spec.chunk_count * SUM_BYTES))
        return roomy(request)

    script = Script(answer)
    count = COMMIT_SUMS_BYTES_MAX // (spec.chunk_count * SUM_BYTES) + 1
    blocks = [[bytes(spec.block_bytes)]] * count
    assert script.drive(operations.save(context, handle, hashes(count), blocks, b"", NO_HINTS)) == count
    assert sum(isinstance(request, Commit) for request in script.asked) == 2
    assert max(script.sent) == TRANSFER_BYTES
