"""A running node, for the commands that ask it something: a connection, and plain words if nobody answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager

from kvcache.channel import BlockingChannel
from kvcache.errors import Unavailable
from kvcache.wire import PROTOCOL_VERSION, Hello

START_ONE = "start one with kvcache serve, or name its address with --address"


@contextmanager
def connected(
    address: str, token: str, command: str, deadline_ns: int, todo: str = START_ONE
) -> Iterator[BlockingChannel]:
    """Closed at the end. ``command`` is what the node is told of who asks; ``todo``: what to do when there is
    no node. RAISES Unavailable, BadInput, NotAllowed."""
    hello = Hello(PROTOCOL_VERSION, token=token, client=command)
    try:
        channel = BlockingChannel.connect(address, hello, deadline_ns)
    except Unavailable as error:
        if isinstance(error.__cause__, PermissionError):
            todo = "run this as the node's user, or have it list this one in its --credentials (SECURITY.md)"
        elif error.__cause__ is None:
            todo = "it is there and says nothing: is its process stopped, or its host overloaded?"
        raise Unavailable("unavailable", f"no node answers at {address}", error.why, todo) from error
    with closing(channel):
        yield channel
