"""An engine that keeps its truth: it stores, copies, offloads, evicts and clears blocks, and tells of it.

And ``Shelf``, an index that only believes: what it was told, in sets, and whether it was told in order.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import xxhash

from kvcache import packing
from kvcache.block import extra_keys
from kvcache.engine_events.naming import public_namespace
from kvcache.locality import Applied
from kvcache.wire import EventBatch

MODEL = "m"
BLOCK = 4
FAMILIES = 6
Member = tuple[str, bytes, int]
"""A tier, a namespace, a name."""


def name_of(tokens: list[int], parent: int | None, extra: bytes = b"") -> int:
    """By the definition: XXH3-64 with seed 1337, little-endian, and the name before in front."""
    packed = b"".join(token.to_bytes(4, "little") for token in tokens)
    local = xxhash.xxh3_64_intdigest(packed + extra, seed=1337)
    if parent is None:
        return local
    return xxhash.xxh3_64_intdigest(parent.to_bytes(8, "little") + local.to_bytes(8, "little"), seed=1337)


def names_of(tokens: list[int], salt: str = "", block: int = BLOCK) -> list[int]:
    names: list[int] = []
    for at in range(0, len(tokens) - block + 1, block):
        extra = extra_keys([("salt", salt.encode())]) if salt and not at else b""
        names.append(name_of(tokens[at : at + block], names[-1] if names else None, extra))
    return names


def namespace_id(adapter: str = "", block: int = BLOCK) -> bytes:
    return public_namespace(MODEL, block, adapter=adapter).namespace_id()


@dataclass
class Chain:
    """A prompt: the engine's hashes of its blocks are its own business."""

    tokens: list[int]
    salt: str
    adapter: str

    def hashes(self) -> list[int]:
        parent = xxhash.xxh3_64_intdigest(f"{self.salt} {self.adapter}".encode(), seed=9)
        out = []
        for at in range(0, len(self.tokens), BLOCK):
            part = repr(self.tokens[at : at + BLOCK]).encode()
            parent = xxhash.xxh3_64_intdigest(part, seed=parent)
            out.append(parent)
        return out


@dataclass
class ModelEngine:
    """``held`` is the truth: how many copies of each block are in each place."""

    random: random.Random
    engine: str = "vllm"
    offloads: bool = False
    """Whether it has a host tier; then it never clears, as that would not say which tiers it meant."""
    seq: int = 0
    held: Counter[tuple[str, int]] = field(default_factory=Counter)
    members: dict[int, tuple[bytes, int]] = field(default_factory=dict)
    before: dict[int, int | None] = field(default_factory=dict)
    """The name of the block before each, by its own."""
    pending: list[object] = field(default_factory=list)
    log: list[tuple[int, bytes]] = field(default_factory=list)
    clock: int = 0

    def step(self) -> None:
        choice = self.random.random()
        if choice < 0.5:
            self.store()
        elif choice < 0.85:
            self.evict()
        elif self.offloads:
            self.offload()
        elif choice > 0.96:
            self.clear()

    def chain(self) -> Chain:
        """Prompts of few families, so that they meet."""
        family = self.random.randrange(FAMILIES)
        length = self.random.randrange(1, 7)
        tokens = [family * 1000 + at // BLOCK for at in range(BLOCK * length)]
        if self.random.random() < 0.5:
            tokens[-1] += self.random.randrange(3)
        salt = ("", "s", "")[family % 3]
        return Chain(tokens, salt, "lora" if family == 5 else "")

    def store(self) -> None:
        chain = self.chain()
        hashes, names = chain.hashes(), names_of(chain.tokens, chain.salt)
        start = 0
        while start < len(hashes) and self.held["GPU", hashes[start]]:
            start += 1
        if self.engine == "vllm" and self.random.random() < 0.2:
            start = 0  # Two equal prompts at once: each has blocks of its own.
        if start == len(hashes):
            return
        self.before |= dict(zip(names, [None, *names], strict=False))
        for each, name in zip(hashes[start:], names[start:], strict=True):
            self.members[each] = (namespace_id(chain.adapter), name)
            self.held["GPU", each] += 1
            if self.engine != "vllm":
                self.held["GPU", each] = 1
        self.pending.append(self.stored(chain, hashes, start))

    def stored(self, chain: Chain, hashes: list[int], start: int) -> dict[str, object]:
        keys = [
            [*([chain.adapter] if chain.adapter else []), *([chain.salt] if chain.salt and not at else [])]
            for at in range(start, len(hashes))
        ]
        return {
            "type": "BlockStored",
            "block_hashes": hashes[start:],
            "parent_block_hash": hashes[start - 1] if start else None,
            "token_ids": chain.tokens[start * BLOCK :],
            "block_size": BLOCK,
            "lora_id": 1 if chain.adapter else None,
            "medium": "GPU",
            "lora_name": chain.adapter or None,
            "extra_keys": [each or None for each in keys] if any(keys) else None,
            "group_idx": 0,
        }

    def evict(self) -> None:
        """Any block, not only leaves: holes appear, and are filled again."""
        places = [key for key, count in self.held.items() if count]
        for medium, each in self.random.sample(places, min(len(places), 3)):
            self.held[medium, each] -= 1
            self.pending.append({"type": "BlockRemoved", "block_hashes": [each], "medium": medium})

    def offload(self) -> None:
        """Told without tokens, as vLLM's offloading does by default."""
        here = [each for (medium, each), count in self.held.items() if count and medium == "GPU"]
        for each in self.random.sample(here, min(len(here), 2)):
            if not self.held["CPU", each]:
                self.held["CPU", each] = 1
                self.pending.append(
                    {
                        "type": "BlockStored",
                        "block_hashes": [each],
                        "parent_block_hash": None,
                        "token_ids": [],
                        "block_size": 0,
                        "lora_id": None,
                        "medium": "CPU",
                        "lora_name": None,
                    }
                )

    def clear(self) -> None:
        self.held.clear()
        self.pending.append({"type": "AllBlocksCleared"})

    def publish(self) -> tuple[int, bytes] | None:
        """The message of what happened since the last one."""
        if not self.pending:
            return None
        self.clock += 1
        message = self.seq, packing.pack([float(self.clock), self.pending, 0])
        self.log.append(message)
        self.seq += 1
        self.pending = []
        return message

    def message(self) -> tuple[int, bytes]:
        """The next message, of whatever happens next."""
        while (found := self.publish()) is None:
            self.step()
        return found

    def restart(self) -> None:
        self.seq = 0
        self.held.clear()
        self.pending, self.log = [], []

    def truth(self) -> set[Member]:
        tiers = {"GPU": "hbm", "CPU": "host"}
        return {(tiers[medium], *self.members[each]) for (medium, each), count in self.held.items() if count}


class Shelf:
    """Whatever it is told, of one source. RAISES AssertionError when batches do not follow one another."""

    def __init__(self) -> None:
        self.members: set[Member] = set()
        self.at = (0, -1)
        self.partial = True
        self.suspects = 0
        self.heards = 0
        self.losing = False
        """Whether it says to have lost its place, once."""
        self.lost = False
        self._loading: set[Member] | None = None

    def apply(self, batch: EventBatch, now_ns: int) -> Applied:
        if self.losing and not batch.snapshot:
            self.losing, self.lost = False, True
            self.members = set()
            return Applied.GAP
        self.partial = batch.partial or (self.partial and not batch.snapshot)
        if batch.snapshot:
            return self._load(batch)
        assert batch.incarnation == self.at[0]
        assert batch.seq == self.at[1] + (not batch.beat)
        self.at = batch.incarnation, batch.seq
        _take(self.members, batch)
        return Applied.TAKEN

    def suspect(self, source: str) -> None:
        self.suspects += 1

    def heard(self, source: str, now_ns: int) -> None:
        self.heards += 1

    def _load(self, batch: EventBatch) -> Applied:
        ahead = (batch.incarnation, batch.seq) > self.at
        assert ahead or self.lost or self._loading is not None, "an index would keep what it has"
        loading = set() if self._loading is None else self._loading
        _take(loading, batch)
        self._loading = loading if batch.left else None
        if not batch.left:
            self.members, self.at, self.lost = loading, (batch.incarnation, batch.seq), False
        return Applied.TAKEN


def _take(members: set[Member], batch: EventBatch) -> None:
    for event in batch.events:
        names = [int.from_bytes(event.hashes[at : at + 8], "little") for at in range(0, len(event.hashes), 8)]
        told = {(event.tier, event.namespace, name) for name in names}
        if event.kind == "stored":
            members |= told
        elif event.kind == "removed":
            assert told <= members, "what is not there cannot go"
            members -= told
        else:
            assert event.kind == "cleared"
            members -= {each for each in members if each[:2] == (event.tier, event.namespace)}
