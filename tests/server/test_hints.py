"""What a client says of a request is what the policy of a real node is told, whichever way it comes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import pytest

from kvcache import wire
from kvcache.block import BlockSpec
from kvcache.client import connect, connect_blocking
from kvcache.client.store import SaveHints
from kvcache.leaf_lru import LeafLru
from kvcache.ledger import Ledger
from kvcache.namespace import Namespace, shape_of
from kvcache.policy import RequestContext
from kvcache.request_hints import RequestHints
from tests.server.conftest import EmbeddedNode, Serve
from tests.server.talk import HASHES, connected, deadline, held, lease, opened, refused, save, stats

SPEC = BlockSpec(block_tokens=16, plane_count=2, head_count=1, head_bytes=1_024)
NAMESPACE = Namespace(
    model="m", weights="w", dtype="float32", layout="canonical", block_tokens=16, shape=shape_of(SPEC)
)
CONTENT = [bytes(SPEC.block_bytes)]
TOOL_CALL = RequestHints("tool_call", 70, 5, 8_000, 60_000)


class Hearing(LeafLru):
    """Leaf-first LRU that writes down what it is told."""

    def __init__(self) -> None:
        self.requests: list[RequestContext] = []
        self.admitted: list[RequestContext] = []
        self.asked: list[RequestContext] = []

    def on_request(self, context: RequestContext, path: Sequence[int]) -> None:
        self.requests.append(context)
        super().on_request(context, path)

    def admit(self, context: RequestContext, parent: int, count: int) -> int:
        self.asked.append(context)
        return count

    def on_admitted(self, context: RequestContext, blocks: Sequence[int]) -> None:
        self.admitted.append(context)
        super().on_admitted(context, blocks)


def hearing(node: EmbeddedNode, ledger: Ledger) -> Hearing:
    """Put in the place of the node's policy, before it has been told of anything."""
    policy = Hearing()

    def put() -> None:
        LeafLru.__init__(policy, ledger.policy._tree, ledger.policy._capacity_bytes)
        ledger.policy._install(policy)

    node.call(put)
    return policy


def is_tool_call(context: RequestContext) -> bool:
    told = (context.hint, context.priority, context.session, context.expected_gap_ms, context.keep_ms)
    return told == ("tool_call", 70, 5, 8_000, 60_000)


def test_look_ups_and_saves_of_threads(serve: Serve) -> None:
    node = serve()
    policy = hearing(node, node.node.core.ledger)
    store = connect_blocking(node.node.address, timeout_ms=60_000)
    handle = store.open(NAMESPACE, SPEC)
    prefix = handle.hashes(range(64))
    store.release(store.lease(handle, prefix, hints=TOOL_CALL))
    assert store.save(handle, prefix, [CONTENT] * 4, hints=SaveHints.of(TOOL_CALL)) == 4
    store.release(store.lease(handle, prefix, "named", hints=TOOL_CALL))
    store.close()
    assert [is_tool_call(each) for each in policy.requests] == [True, True]
    assert [is_tool_call(each) for each in policy.asked + policy.admitted] == [True, True]
    assert {each.tenant for each in policy.requests + policy.admitted} == {"default"}
    assert [each.prompt_tokens for each in policy.requests] == [64, 64]


def test_look_ups_and_saves_of_tasks(serve: Serve) -> None:
    node = serve()
    policy = hearing(node, node.node.core.ledger)

    async def work() -> None:
        store = connect(node.node.address, timeout_ms=60_000)
        handle = await store.open(NAMESPACE, SPEC)
        prefix = handle.hashes(range(64))
        await store.release(await store.lease(handle, prefix, hints=TOOL_CALL))
        writing = await store.begin_save(handle, prefix, [CONTENT] * 4, hints=SaveHints.of(TOOL_CALL))
        assert await writing.finish() == 4
        await store.close()

    asyncio.run(work())
    assert [is_tool_call(each) for each in policy.requests + policy.admitted] == [True, True]


def test_the_lower_tier_hears_of_look_ups_too(serve: Serve, tmp_path: object) -> None:
    node = serve(nvme=f"{tmp_path}/nvme:64MiB", nvme_segment="16MiB")
    stack = node.node.core.stack
    assert stack is not None
    policy = hearing(node, stack.ledger)
    with connected(node.node.address) as channel:
        namespace = opened(channel)
        save(channel, namespace, HASHES[:2])
        asked = wire.TakeLease(namespace, b"".join(HASHES[:2]), hint="turn_end", priority=20)
        channel.call(asked, deadline())
    assert [(each.hint, each.priority) for each in policy.requests] == [("turn_end", 20)]


def test_who_says_nothing_is_ordinary(serve: Serve) -> None:
    node = serve()
    policy = hearing(node, node.node.core.ledger)
    with connected(node.node.address) as channel:
        namespace = opened(channel)
        save(channel, namespace, HASHES[:2])
        lease(channel, namespace, HASHES[:2])
    (context,) = policy.requests
    assert (context.hint, context.priority, context.keep_ms) == ("unknown", 50, None)


@pytest.mark.parametrize(
    "asked",
    [
        lambda namespace: wire.TakeLease(namespace, HASHES[0], hint="soon"),
        lambda namespace: wire.TakeLease(namespace, HASHES[0], priority=101),
        lambda namespace: wire.Reserve(namespace, b"", HASHES[9], hint="soon"),
        lambda namespace: wire.Reserve(namespace, b"", HASHES[9], priority=-1),
    ],
)
def test_what_is_no_hint_is_refused_and_changes_nothing(
    serve: Serve, asked: Callable[[bytes], wire.Request]
) -> None:
    node = serve()
    policy = hearing(node, node.node.core.ledger)
    with connected(node.node.address) as channel:
        namespace = opened(channel)
        save(channel, namespace, HASHES[:1])
        refused("bad_message", channel, asked(namespace))
        assert policy.requests == []
        assert (stats(channel)["leases"], stats(channel)["reservations"]) == (0, 0)
        assert held(channel, namespace, HASHES[:1]) == 1
