"""A node that is a few lines of test, for operations by themselves: it answers each step in its turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from kvcache.block import HASH_BYTES, BlockHash, BlockSpec, NamespaceId
from kvcache.client.link import Context, Link, Tally
from kvcache.client.steps import Answer, Call, Operation, Pause, Step, Work
from kvcache.client.store import Handle
from kvcache.clock import NS_PER_MS
from kvcache.errors import KVCacheError
from kvcache.namespace import shape_of
from kvcache.testing.clock import FakeClock
from kvcache.testing.stores import EXAMPLE, SPEC
from kvcache.wire import PROTOCOL_VERSION, Reply, Request, Welcome

Result = TypeVar("Result")
TENANT_KEY = b"k" * 32


def hashes(count: int) -> list[BlockHash]:
    return [BlockHash(number.to_bytes(HASH_BYTES, "little")) for number in range(1, count + 1)]


def context_and_handle(
    spec: BlockSpec = SPEC, clock: FakeClock | None = None, tokens_s: float = 0.0
) -> tuple[Context, Handle]:
    namespace = replace(EXAMPLE, shape=shape_of(spec))
    handle = Handle(
        namespace, spec, NamespaceId(namespace.namespace_id()), namespace.root(TENANT_KEY), TENANT_KEY
    )
    link = Link(1, Welcome(PROTOCOL_VERSION, "n", 1, "default", [], TENANT_KEY, 0), None)
    link.opened = frozenset({handle.namespace_id})
    link.running = 1
    return Context(link, Tally(), clock or FakeClock(), tokens_s), handle


class Script:
    """Answers each call, does each work, lets each pause pass, and keeps what was asked.

    Like a driver it hands a KVCacheError of ``answer`` to the operation. ``cancel_at`` is how many steps
    are done before the caller is cancelled: the operation is told in place of the step after.
    """

    def __init__(self, answer: Callable[[Request], Reply], clock: FakeClock | None = None) -> None:
        self.asked: list[Request] = []
        self.sent: list[int] = []
        self.pauses_ms: list[float] = []
        self.clock = clock or FakeClock()
        self._answer = answer

    def drive(self, operation: Operation[Result], cancel_at: int = -1) -> Result:
        done = 0
        try:
            step = operation.send(None)
            while True:
                if done == cancel_at:
                    step = operation.throw(Cancelled())
                done += 1
                try:
                    answer = self._do(step)
                except KVCacheError as error:
                    step = operation.throw(error)
                else:
                    step = operation.send(answer)
        except StopIteration as ended:
            result: Result = ended.value
            return result
        except BaseException:
            operation.close()
            raise

    def _do(self, step: Step) -> Answer:
        if isinstance(step, Work):
            return step.run()
        if isinstance(step, Pause):
            assert step.duration_ns > 0
            self.pauses_ms.append(step.duration_ns / NS_PER_MS)
            self.clock.advance_ms(-(-step.duration_ns // NS_PER_MS))
            return None
        self.asked.append(step.request)
        if not isinstance(step, Call):
            return None
        self.sent.append(step.payload_bytes)
        return self._answer(step.request)


class Cancelled(BaseException):
    """As asyncio.CancelledError, without a loop."""
