"""What can be asked over HTTP, and what is answered: the structs that validate.

The OpenAPI document (``kvcache.server.openapi``) is made from these and the table of routes
(``http_routes``); nothing is described twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Literal

import msgspec

from kvcache.errors import KVCacheError
from kvcache.wire import PREFIX_BLOCKS_MAX
from kvcache.wire_tuning import InForce, Shadow

LOCATE_TOKENS_MAX = 1 << 20
BODY_BYTES_MAX = 16 << 20
REQUESTS_MAX = 64
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Server": "kvcache",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
"""Of every answer."""
DEADLINE_S = 5.0

Hash = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$", max_length=32, description="16 bytes as hex")]
Hint = Annotated[
    str,
    msgspec.Meta(
        pattern="^([0-9a-f]{16}|[0-9a-f]{32})$",
        max_length=32,
        description="a block's name as hex: 16 bytes, or the first 8, as u64 LE",
    ),
]
Token = Annotated[int, msgspec.Meta(ge=0, le=(1 << 32) - 1)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=512)]
Count = Annotated[int, msgspec.Meta(ge=0)]

READERS_OF_PLACES = frozenset({"router", "operator"})


class Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of what is asked: an unknown field is refused, by its name."""


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """Base of what is answered."""


class Model(Strict, frozen=True, kw_only=True):
    """What prefix hashes depend on besides tokens and tenant."""

    model: Name
    weights: Name
    block_tokens: Annotated[int, msgspec.Meta(ge=1)]
    epoch: Count = 0
    adapter: Annotated[str, msgspec.Meta(max_length=512)] = ""


class LocateRequest(Strict, frozen=True, kw_only=True):
    """Who holds the blocks of this prompt? Either ``hashes``, or ``tokens`` with ``model`` or ``namespace``.

    With ``namespace`` only blocks of that namespace count: one engine shape, one rank. With ``model``, also
    what engines told themselves of that model, if its weights are not known to be others'. ``cache_salt``: of
    the request, for tokens.
    """

    namespace: Hash | None = None
    model: Model | None = None
    tokens: Annotated[list[Token], msgspec.Meta(max_length=LOCATE_TOKENS_MAX)] | None = None
    hashes: Annotated[list[Hint], msgspec.Meta(max_length=PREFIX_BLOCKS_MAX)] | None = None
    cache_salt: Annotated[str, msgspec.Meta(max_length=512)] = ""


class Tiers(Answer, frozen=True, kw_only=True):
    """How many of the blocks are in each tier. A block can be in several."""

    hbm: int
    host: int
    nvme: int


class AsOf(Answer, frozen=True, kw_only=True):
    """The state of the source that the answer describes: its events up to ``seq``, and for how many
    milliseconds nothing proves that there were no more."""

    incarnation: int
    seq: int
    age_ms: int


class Shard(Answer, frozen=True, kw_only=True):
    """The leading blocks in one namespace (one rank of one engine shape)."""

    namespace: Hash
    blocks: int
    tokens: int
    tiers: Tiers


class Source(Answer, frozen=True, kw_only=True):
    """What one source holds. ``blocks`` are the leading ones that all its ranks hold, in the engine
    shape that has most; null while the source is ``unknown``: it has not told its content yet, which
    is not the same as holding nothing. ``suspect``: the stream of its events broke, this was so.
    ``partial``: the index had no room for all, there may be more."""

    source: str
    state: Literal["synced", "suspect", "unknown"]
    partial: bool
    as_of: AsOf
    blocks: int | None
    tokens: int | None
    tiers: Tiers | None
    shards: list[Shard]


class LocateReply(Answer, frozen=True, kw_only=True):
    """``complete`` is false while any source is not synced, is partial, or is not heard of yet."""

    complete: bool
    asked_blocks: int
    sources: list[Source]


class IndexState(Answer, frozen=True, kw_only=True):
    """``entries``: blocks held, each counted once a namespace and tier. ``bytes``: memory taken for them."""

    entries: int
    bytes: int
    bytes_max: int
    refused_blocks: int
    sources: dict[str, AsOf]


class PlacementRequest(Strict, frozen=True, kw_only=True):
    """A request was sent to a worker that loads from ``source``: predict the blocks there for a while."""

    source: Name
    namespace: Hash
    hashes: Annotated[list[Hint], msgspec.Meta(max_length=PREFIX_BLOCKS_MAX)] | None = None
    tokens: Annotated[list[Token], msgspec.Meta(max_length=LOCATE_TOKENS_MAX)] | None = None
    cache_salt: Annotated[str, msgspec.Meta(max_length=512)] = ""


class PlacementReply(Answer, frozen=True, kw_only=True):
    """How many of the blocks are predicted now; fewer where the index has no room, or no such source."""

    placed: int


class SourceState(Answer, frozen=True, kw_only=True):
    """One source of the index. ``load``: how busy it said it is, ``load_age_ms`` ago (-1: it never said)."""

    source: str
    state: Literal["synced", "suspect", "unknown"]
    partial: bool
    as_of: AsOf
    blocks: int
    load: dict[str, float]
    load_age_ms: int


class Stream(Answer, frozen=True, kw_only=True):
    """What is followed: a node, or an engine's own events. ``source``: empty while it was never reached."""

    kind: str
    address: str
    source: str
    connected: bool
    trouble: str
    workers: list[str]


class WorkersReply(Answer, frozen=True, kw_only=True):
    """``workers``: the sources that each can load from."""

    workers: dict[str, list[str]]
    sources: list[SourceState]
    followed: list[Stream]


class StatsReply(Answer, frozen=True, kw_only=True):
    """``values`` are explained in docs/metrics.md; they were so ``age_ms`` ago."""

    node: str
    incarnation: int
    release: str
    age_ms: int
    values: dict[str, float]
    index: IndexState


class TuningRequest(Strict, frozen=True, kw_only=True):
    """This policy, with these parameters, is to decide in this tier (``kvcache policy list``, ``show``)."""

    policy: Name
    params: dict[str, float] = msgspec.field(default_factory=dict)
    tier: Literal["hbm", "host", "nvme"] = "host"


class TuningReply(Answer, frozen=True, kw_only=True):
    """What decides in each tier; what shadow caches found of the blocks asked for in the last ``seconds``, by
    a ``sample`` of them, and what the node itself found (``hit_ratio``); and what that advises, in plain
    words. Nothing is changed by itself."""

    tiers: dict[str, InForce]
    hit_ratio: float
    sample: float
    seconds: float
    shadows: list[Shadow]
    advice: list[str]


class Health(Answer, frozen=True, kw_only=True):
    alive: bool


class Readiness(Answer, frozen=True, kw_only=True):
    """``degraded`` says in plain words what is wrong: what a node that is not ready lacks, and what one
    that is does without (a device of the NVMe tier, for instance)."""

    ready: bool
    degraded: list[str]


class Problem(Answer, frozen=True, kw_only=True):
    """An error, as RFC 9457 has it; ``code`` is one of ``kvcache.errors.CODES``."""

    type: str
    title: str
    status: int
    code: str
    what: str
    why: str
    todo: str


@dataclass(frozen=True, slots=True)
class Route:
    """One path. ``roles`` empty: open to everybody. ``reply`` None: not JSON."""

    method: str
    path: str
    name: str
    summary: str
    roles: frozenset[str]
    request: type[msgspec.Struct] | None
    reply: type[Answer] | None


_STATUSES = {
    "not_allowed": HTTPStatus.NOT_FOUND,
    "too_large": HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    "unavailable": HTTPStatus.SERVICE_UNAVAILABLE,
}


def problem(error: KVCacheError, status: HTTPStatus | None = None) -> Problem:
    """The error as it is sent. Without ``status``, that of its code."""
    status = status or _STATUSES.get(error.code, HTTPStatus.BAD_REQUEST)
    return Problem(
        type="about:blank",
        title=status.phrase,
        status=status,
        code=error.code,
        what=error.what,
        why=error.why,
        todo=error.todo,
    )
