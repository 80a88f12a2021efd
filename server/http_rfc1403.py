"""RFC 1403, the indexer interface that routers know: what is asked, and what is answered, in both dialects.

    model_name ── Dynamo's indexer:    {scores: {instance: {rank: tokens}}, frequencies, instances: {...}}
    model, modelname ── Mooncake's:    {tenant: {instance: {longest_matched, GPU, DP: {...}, CPU, DISK}}}

A request says by the name of one field which of the two it speaks, and is answered in kind. What it asks
about are engines' own events: blocks by public sequence hashes (``kvcache.sequence``). Nodes name theirs by
keys that no router has: ask ``/v1/locate`` for these.

Tokens, not blocks, are counted. ``gpu``, ``cpu`` and ``disk`` (Dynamo) add up: the longest prefix with that
tier and all quicker ones. ``GPU``, ``CPU`` and ``DISK`` (Mooncake): how much of the longest prefix is there.

Hashes may be signed or not. ``block_hashes`` (Dynamo) are of each block by itself, and are chained here;
``seq_hashes``, once called ``block_hash`` (Mooncake), are of the sequence. Pure. The sum: 3 matches.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import msgspec

from kvcache.block import NamespaceId
from kvcache.errors import BadInput
from kvcache.fleet import Worker
from kvcache.index import ALL_TIERS
from kvcache.locality import TIERS, Found, LocalityIndex
from kvcache.namespace import Namespace
from kvcache.packing import PREFIX_BLOCKS_MAX
from kvcache.sequence import PUBLIC, chain_locals, sequence_hashes
from kvcache.server import http_api as api

Instance = int | str
Text = Annotated[str, msgspec.Meta(max_length=512)]
Rank = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 20)]
Hashes = Annotated[list[int], msgspec.Meta(max_length=PREFIX_BLOCKS_MAX)]
Tokens = Annotated[list[api.Token], msgspec.Meta(max_length=api.LOCATE_TOKENS_MAX)]

_HBM, _HOST = 1, 2
_LOW, _HIGH = -(1 << 63), 1 << 64


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """Base of what is asked. Fields that are not known here are others' extensions, and are let pass."""

    model_name: Text = ""
    """Dynamo."""
    tenant_id: Text = ""
    routing_group: Text = ""
    """Dynamo's word for a tenant, since 1.3."""
    lora_name: Text | None = None

    @property
    def tenant(self) -> str:
        return self.tenant_id or self.routing_group


class RegisterRequest(Asked, frozen=True, kw_only=True):
    """Follow an engine's events. ``modelname`` instead of ``model_name``: Mooncake."""

    instance_id: Instance
    endpoint: Text
    block_size: Count
    modelname: Text = ""
    dp_rank: Rank | None = None
    replay_endpoint: Text | None = None
    type: Text = "vLLM"
    additionalsalt: Text = ""


class UnregisterRequest(Asked, frozen=True, kw_only=True):
    """Follow them no more. Without ``dp_rank``: all ranks of the instance."""

    instance_id: Instance
    modelname: Text = ""
    dp_rank: Rank | None = None


class Query(Asked, frozen=True, kw_only=True):
    """Base of both queries. ``model`` instead of ``model_name``: Mooncake."""

    model: Text = ""
    instance_id: Instance | None = None
    block_size: Count = 0
    cache_salt: Text = ""
    """What ``additionalsalt`` was at registration."""


class QueryRequest(Query, frozen=True, kw_only=True):
    """By tokens."""

    token_ids: Tokens


class HashRequest(Query, frozen=True, kw_only=True):
    """By hashes, of one kind."""

    block_hashes: Hashes | None = None
    seq_hashes: Hashes | None = None
    block_hash: Hashes | None = None


class Registered(api.Answer, frozen=True, kw_only=True):
    """``{"status": ...}`` and, to Mooncake's clients, what was done to whom."""


class ByTenant(api.Answer, frozen=True, kw_only=True):
    """Instances with their prefixes, in the dialect of the request: docs/index.md shows both."""


class Listed(api.Answer, frozen=True, kw_only=True):
    """The instances that are followed, or what they hold: docs/index.md shows both."""


@dataclass(frozen=True, slots=True)
class Member:
    """A worker as RFC 1403 sees it. ``instance`` as it was registered: a number or text. ``ranks``: the
    source of each."""

    instance: Instance
    worker: Worker
    ranks: tuple[tuple[int, str], ...]


class Hit(NamedTuple):
    """Tokens of one rank's longest prefix, of these in each tier, and the longest by tiers taken together."""

    longest: int = 0
    hbm: int = 0
    host: int = 0
    nvme: int = 0
    gpu: int = 0
    cpu: int = 0


NO_HIT = Hit()
Hits = dict[str, dict[int, Hit]]
"""By instance and rank."""


def chosen(members: Sequence[Member], asked: Query, tenant: str) -> list[Member]:
    """Of these, those that the query is about."""
    model, salt = asked.model_name or asked.model, asked.cache_salt
    return [
        each
        for each in members
        if each.worker.tenant == tenant and each.worker.model == model and each.worker.salt == salt
        if asked.instance_id is None or str(each.instance) == str(asked.instance_id)
    ]


def prefixes(asked: QueryRequest | HashRequest) -> Callable[[int], memoryview]:
    """The sequence hashes of what is asked about, by block length. RAISES BadInput."""
    if isinstance(asked, QueryRequest):
        tokens = array("I", asked.token_ids)
        return lambda block_tokens: sequence_hashes(tokens[: PREFIX_BLOCKS_MAX * block_tokens], block_tokens)
    given = [each for each in (asked.block_hashes, asked.seq_hashes, asked.block_hash) if each is not None]
    if len(given) != 1:
        raise BadInput(
            "bad_prefix", "hashes of no kind, or of several", "", "send block_hashes or seq_hashes"
        )
    packed = _packed(given[0])
    hashes = chain_locals(packed) if asked.block_hashes is not None else memoryview(packed)
    return lambda block_tokens: hashes


def hits(
    index: LocalityIndex,
    members: Sequence[Member],
    asked: Query,
    tenant: str,
    prefix: Callable[[int], memoryview],
) -> Hits:
    """What each of ``members`` holds, those with nothing included. RAISES BadInput."""
    best: dict[str, Hit] = {}
    for block_tokens, ids in _spaces(index, asked, tenant).items():
        hashes = prefix(block_tokens)
        for source, hit in _matched(index, hashes, ids, block_tokens).items():
            if hit.longest > best.get(source, NO_HIT).longest:
                best[source] = hit
    found: Hits = {}
    for member in members:
        ranks = found.setdefault(str(member.instance), {})
        for rank, source in member.ranks:
            ranks[rank] = best.get(source, NO_HIT)
    return found


def as_dynamo(found: Hits) -> dict[str, object]:
    """Only instances that hold something are told, and of their ranks those that do on the GPU."""
    instances = {}
    for instance, ranks in found.items():
        longest = max((hit.longest for hit in ranks.values()), default=0)
        if longest:
            instances[instance] = {
                "longest_matched": longest,
                "gpu": max(hit.gpu for hit in ranks.values()),
                "dp": {str(rank): hit.gpu for rank, hit in ranks.items() if hit.gpu},
                "cpu": max(hit.cpu for hit in ranks.values()),
                "disk": longest,
            }
    scores = {instance: told["dp"] for instance, told in instances.items() if told["dp"]}
    return {"scores": scores, "frequencies": [], "instances": instances}


def as_mooncake(found: Hits, tenant: str) -> dict[str, object]:
    """Every instance is told."""
    instances = {}
    for instance, ranks in found.items():
        best = max(ranks.values(), key=lambda hit: hit.longest, default=NO_HIT)
        instances[instance] = {
            "longest_matched": best.longest,
            "GPU": best.hbm,
            "DP": {str(rank): hit.longest for rank, hit in ranks.items()},
            "CPU": best.host,
            "DISK": best.nvme,
        }
    return {tenant: instances}


def _spaces(index: LocalityIndex, asked: Query, tenant: str) -> Mapping[int, frozenset[NamespaceId]]:
    """The namespaces that the query is about, by block length."""
    found: dict[int, set[NamespaceId]] = {}
    for each in index.known_namespaces():
        namespace = index.namespace(each)
        if namespace is not None and _is_meant(namespace, asked, tenant):
            found.setdefault(namespace.block_tokens, set()).add(each)
    return {block_tokens: frozenset(ids) for block_tokens, ids in found.items()}


def _is_meant(namespace: Namespace, asked: Query, tenant: str) -> bool:
    return (
        namespace.layout == PUBLIC
        and namespace.tenant == tenant
        and namespace.model == (asked.model_name or asked.model)
        and namespace.adapter == (asked.lora_name or "")
        and asked.block_size in (0, namespace.block_tokens)
        and (not asked.cache_salt or asked.cache_salt in namespace.weights.split("+"))
    )


def _matched(
    index: LocalityIndex, hashes: memoryview, ids: Collection[NamespaceId], block_tokens: int
) -> dict[str, Hit]:
    everywhere = index.match(hashes, ids, tiers=ALL_TIERS)
    gpu = _blocks(index.match(hashes, ids, tiers=_HBM))
    cpu = _blocks(index.match(hashes, ids, tiers=_HBM | _HOST))
    names, found = everywhere.names.sources, dict[str, Hit]()
    tiers = (everywhere.tier(at) for at in range(len(TIERS)))
    for number, blocks, *held in zip(everywhere.sources, everywhere.blocks, *tiers, strict=True):
        source = names.get(number)
        if source is not None and blocks * block_tokens > found.get(source, NO_HIT).longest:
            counts = blocks, *held, min(gpu.get(number, 0), blocks), min(cpu.get(number, 0), blocks)
            found[source] = Hit(*[count * block_tokens for count in counts])
    return found


def _blocks(found: Found) -> dict[int, int]:
    """The most of any namespace, by number of the source."""
    most: dict[int, int] = {}
    for source, blocks in zip(found.sources, found.blocks, strict=True):
        if blocks > most.get(source, 0):
            most[source] = blocks
    return most


def _packed(hashes: Sequence[int]) -> bytes:
    """Signed or not, 64 bits are the same hash."""
    try:
        return array("q", hashes).tobytes()
    except OverflowError:
        if not all(_LOW <= each < _HIGH for each in hashes):
            raise BadInput("bad_prefix", "a hash of more than 64 bits") from None
        return array("Q", [each % _HIGH for each in hashes]).tobytes()
