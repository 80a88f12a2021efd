"""The message by which an operator turns a node's recording of requests on and off (docs/traces.md)."""

from __future__ import annotations

from kvcache.wire_base import Message, Unsigned

BEGIN, END, TELL = "begin", "end", "tell"
SAMPLE_ALL = 1_000_000


class Record(Message, frozen=True, tag="record"):
    """``action`` is begin, end or tell (role operator). The reply, ``StatsReply``, tells what is recorded,
    and where.

    ``folder`` empty: as the node's settings say. Only the node's own user, on its unix socket, can name one.
    ``bytes_max`` 0: as the settings say; so ``sample``, which is in millionths of the sessions."""

    action: str
    folder: str = ""
    bytes_max: Unsigned = 0
    sample: Unsigned = 0
