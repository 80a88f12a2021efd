"""One client process of the demo: an engine's part, without the engine.

    stdin   one ``Setup``, then one ``Prompt`` a line                        (JSON)
    stdout  ``READY`` once connected, then one ``Outcome`` a line, in the same order

For each prompt: lease, load what is held and compare every byte with the pattern of its key, then save
what was missing, as prefill would have made it. Memory is one batch of blocks, however long the prompt.
The process ends when its input does, so it never outlives the demo.

The sum: a block is copied and summed once on each way, filled once, compared once: about 1 ms for 2 MiB.
"""

from __future__ import annotations

import sys
import time
from array import array
from collections.abc import Mapping, Sequence
from typing import BinaryIO

import msgspec

from kvcache.block import TOKEN_BYTES, BlockHash, BlockSpec, storage_key
from kvcache.client import connect_blocking
from kvcache.client.store import BlockingStore, Handle, Lease, SaveHints
from kvcache.namespace import Namespace, shape_of
from kvcache.testing.pattern import Pattern

BATCH_BYTES = 32 << 20
BATCH_BLOCKS_MAX = 128
PLANE_BYTES = 32_768
HEAD_BYTES = 4_096
TIMEOUT_MS = 5_000
MODEL_NAME = "kvcache-demo"
READY = b"ready\n"
AWAY_PAUSE_S = 0.05
"""What a prompt takes when the store is away: an engine would be computing it. So long does an 8 B model
need for 1,300 tokens on a large GPU."""


class Setup(msgspec.Struct, frozen=True):
    """What every client of one demo agrees on."""

    address: str
    block_tokens: int
    block_bytes: int
    seed: int


class Prompt(msgspec.Struct, frozen=True):
    """The full blocks of one request, first to last, by their numbers in the trace."""

    blocks: list[int]
    session: int = -1


class Outcome(msgspec.Struct, frozen=True):
    """What became of one prompt. ``hit_blocks`` are leading, loaded, verified by the store, and compared."""

    hit_blocks: int = 0
    saved_blocks: int = 0
    wrong_blocks: int = 0
    wrong_bytes: int = 0
    load_ns: int = 0
    save_ns: int = 0
    away: bool = False


def spec_of(setup: Setup) -> BlockSpec:
    """Planes of 32 KiB, as 16 tokens of 8 heads of 128 bfloat16 numbers are."""
    plane_bytes = min(PLANE_BYTES, setup.block_bytes)
    head_bytes = min(HEAD_BYTES, plane_bytes)
    return BlockSpec(
        setup.block_tokens, setup.block_bytes // plane_bytes, plane_bytes // head_bytes, head_bytes
    )


def namespace_of(setup: Setup) -> Namespace:
    return Namespace(
        model=MODEL_NAME,
        weights=f"pattern-{setup.seed}",
        dtype="bfloat16",
        layout="canonical",
        block_tokens=setup.block_tokens,
        shape=shape_of(spec_of(setup)),
    )


def tokens_of(blocks: Sequence[int], block_tokens: int) -> bytes:
    """The packed token ids of these blocks: as good as any, and equal only for equal blocks."""
    ids = array("I", blocks)
    assert ids.itemsize == TOKEN_BYTES
    if sys.byteorder == "big":
        ids.byteswap()
    packed = ids.tobytes()
    return b"".join(packed[at : at + TOKEN_BYTES] * block_tokens for at in range(0, len(packed), TOKEN_BYTES))


class Replayer:
    """Replays prompts against one store. REQUIRES: the spec of ``handle`` is ``spec_of(setup)``."""

    def __init__(self, store: BlockingStore, handle: Handle, setup: Setup) -> None:
        self._store = store
        self._handle = handle
        self._setup = setup
        self._pattern = Pattern(setup.seed, setup.block_bytes)
        batch = max(1, min(BATCH_BYTES // setup.block_bytes, BATCH_BLOCKS_MAX))
        self._blocks = [bytearray(setup.block_bytes) for _ in range(batch)]
        plane_bytes = handle.spec.plane_bytes
        self._pieces = [
            [memoryview(block)[at : at + plane_bytes] for at in range(0, setup.block_bytes, plane_bytes)]
            for block in self._blocks
        ]

    def replay(self, prompt: Prompt) -> Outcome:
        """Load what is held, save what is not."""
        before = _away(self._store.counters)
        prefix = self._handle.hashes(tokens_of(prompt.blocks, self._setup.block_tokens))
        loaded = self._load(prefix)
        saved, save_ns = self._save(prefix, loaded.hit_blocks, prompt.session)
        return msgspec.structs.replace(
            loaded, saved_blocks=saved, save_ns=save_ns, away=_away(self._store.counters) > before
        )

    def _load(self, prefix: Sequence[BlockHash]) -> Outcome:
        lease = self._store.lease(self._handle, prefix)
        try:
            return self._load_lease(lease)
        finally:
            self._store.release(lease)

    def _load_lease(self, lease: Lease) -> Outcome:
        """Batch by batch, up to the first block that could not be had: the rest is recomputed anyway."""
        hit = wrong_blocks = wrong_bytes = load_ns = 0
        while hit < lease.count:
            pieces = self._pieces[: lease.count - hit]
            started_ns = time.perf_counter_ns()
            failed = self._store.load(lease, pieces, hit)
            load_ns += time.perf_counter_ns() - started_ns
            end = min(failed, default=hit + len(pieces))
            for position in range(hit, end):
                wrong = self._wrong_bytes(position - hit, lease.prefix[position])
                wrong_bytes += wrong
                wrong_blocks += wrong > 0
            hit = end
            if failed:
                break
        return Outcome(hit_blocks=hit, wrong_blocks=wrong_blocks, wrong_bytes=wrong_bytes, load_ns=load_ns)

    def _wrong_bytes(self, index: int, name: BlockHash) -> int:
        return self._pattern.wrong_bytes(self._blocks[index], storage_key(self._handle.namespace_id, name))

    def _save(self, prefix: Sequence[BlockHash], start: int, session: int) -> tuple[int, int]:
        """How many blocks from ``start`` on are held now, and the time it took."""
        at, save_ns = start, 0
        hints = SaveHints(session=session)
        while at < len(prefix):
            names = prefix[at : at + len(self._blocks)]
            for block, name in zip(self._blocks, names, strict=False):
                self._pattern.fill(block, storage_key(self._handle.namespace_id, name))
            parent = prefix[at - 1] if at else b""
            started_ns = time.perf_counter_ns()
            held = self._store.save(self._handle, names, self._pieces[: len(names)], parent, hints)
            save_ns += time.perf_counter_ns() - started_ns
            at += held
            if held < len(names):
                break
        return at - start, save_ns


def _away(counters: Mapping[str, int]) -> int:
    """How often the store was not there. Grows when, and only when, the node was out of reach."""
    return sum(count for name, count in counters.items() if name.startswith(("missed_calls:away", "ended:")))


def run(source: BinaryIO, target: BinaryIO) -> None:
    """Replay prompts from ``source`` until it ends."""
    setup = msgspec.json.decode(source.readline(), type=Setup)
    store = connect_blocking(setup.address, timeout_ms=TIMEOUT_MS, name="kvcache demo")
    try:
        replayer = Replayer(store, store.open(namespace_of(setup), spec_of(setup)), setup)
        target.write(READY)
        target.flush()
        decoder = msgspec.json.Decoder(Prompt)
        for line in source:
            outcome = replayer.replay(decoder.decode(line))
            if outcome.away:
                time.sleep(AWAY_PAUSE_S)
            target.write(msgspec.json.encode(outcome) + b"\n")
            target.flush()
    finally:
        store.close()


if __name__ == "__main__":
    run(sys.stdin.buffer, sys.stdout.buffer)
