"""The messages by which an operator looks at a node's eviction and changes it (docs/tuning-online.md)."""

from __future__ import annotations

import msgspec

from kvcache.wire_base import Message, Unsigned

TELL, SET = "tell", "set"


class Tune(Message, frozen=True, tag="tune", omit_defaults=True):
    """``action`` is tell, or set (role operator): ``policy`` with ``params`` is to decide in ``tier`` (host,
    nvme, hbm) from when it has been told of all that is held. The reply, ``Tuned``, does not wait for it."""

    action: str
    tier: str = "host"
    policy: str = ""
    params: dict[str, float] = msgspec.field(default_factory=dict)


class InForce(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What decides in one tier: ``policy`` with ``params`` (those that were given). ``coming``: one that is
    being told of what is held, and of how many blocks it was (``told_blocks`` of ``blocks``). ``fault``: why
    leaf-lru decides instead; empty: it does not. ``said``: how the last change ended, for a person."""

    policy: str
    params: dict[str, float]
    blocks: Unsigned
    coming: str = ""
    told_blocks: Unsigned = 0
    fault: str = ""
    said: str = ""


class Shadow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a cache of ``size`` (1: as the host tier) would have found under ``policy``, as a share of the
    blocks asked for: ``hit_ratio`` lately, of ``blocks`` that were sampled, give or take ``doubt``;
    ``sampled_hit_ratio`` before what the sample is seen to be wrong by was taken off. ``is_full``: it has let
    something go, so its size matters."""

    policy: str
    size: float
    hit_ratio: float
    sampled_hit_ratio: float
    doubt: float
    blocks: Unsigned
    is_full: bool


class Tuned(Message, frozen=True, tag="tuned"):
    """``hit_ratio``: what the node itself found of the blocks asked for, lately. ``advice`` is for a person;
    nothing is changed by itself."""

    tiers: dict[str, InForce]
    shadows: list[Shadow] = msgspec.field(default_factory=list)
    hit_ratio: float = 0.0
    sample: float = 0.0
    seconds: float = 0.0
    advice: list[str] = msgspec.field(default_factory=list)
