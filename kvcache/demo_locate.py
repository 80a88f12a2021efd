"""One question over HTTP, as a router asks it: who holds how many leading blocks of this prompt?"""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from array import array
from collections.abc import Sequence

import msgspec

from kvcache.demo_client import MODEL_NAME, Setup, namespace_of, tokens_of

TIMEOUT_S = 5.0
NS_PER_MS = 1e6


class Located(msgspec.Struct, frozen=True):
    """The answer, in short. ``asked_blocks`` 0: nobody was asked; ``error``: nobody answered."""

    asked_blocks: int = 0
    blocks: int = 0
    source: str = ""
    tier: str = ""
    age_ms: int = 0
    answered_ms: float = 0.0
    error: str = ""


class _AsOf(msgspec.Struct):
    age_ms: int


class _Source(msgspec.Struct):
    source: str
    as_of: _AsOf
    blocks: int | None
    tiers: dict[str, int] | None


class _Reply(msgspec.Struct):
    asked_blocks: int
    sources: list[_Source]


def ask_locate(address: str, setup: Setup, blocks: Sequence[int]) -> Located:
    """POST /v1/locate at ``address`` for the prompt of these blocks. An HTTP failure is in the answer."""
    if not address:
        return Located(len(blocks), error="the node serves no HTTP")
    names = namespace_of(setup)
    model = {"model": MODEL_NAME, "weights": names.weights, "block_tokens": names.block_tokens}
    tokens = array("I", tokens_of(blocks, setup.block_tokens)).tolist()
    request = urllib.request.Request(
        f"{address}/v1/locate",
        data=msgspec.json.encode({"model": model, "tokens": tokens}),
        headers={"Content-Type": "application/json"},
    )
    started_ns = time.perf_counter_ns()
    try:
        with _opener().open(request, timeout=TIMEOUT_S) as answer:
            reply = msgspec.json.decode(answer.read(), type=_Reply)
    except urllib.error.HTTPError as error:
        return Located(len(blocks), error=f"{error.code}: {error.read(300).decode(errors='replace')}")
    except (OSError, ValueError) as error:
        return Located(len(blocks), error=str(error))
    return _best(reply, (time.perf_counter_ns() - started_ns) / NS_PER_MS)


def _opener() -> urllib.request.OpenerDirector:
    """Straight there: the environment's proxy does not know this host's loopback."""
    return urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _best(reply: _Reply, answered_ms: float) -> Located:
    """The source that holds most."""
    best = max(reply.sources, key=lambda source: source.blocks or 0, default=None)
    if best is None or not best.blocks:
        return Located(reply.asked_blocks, answered_ms=answered_ms)
    tiers = best.tiers or {}
    return Located(
        asked_blocks=reply.asked_blocks,
        blocks=best.blocks,
        source=best.source,
        tier=max(tiers, key=lambda tier: tiers[tier], default=""),
        age_ms=best.as_of.age_ms,
        answered_ms=answered_ms,
    )
