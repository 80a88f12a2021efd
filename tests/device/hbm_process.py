"""An engine as a process of its own: it does what lines say (``save COUNT SEED``), and answers each with one.

``stall-save`` and ``stall-load`` stop in the middle of the copy, say so, and go on at the next line.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from kvcache.device.engine import TensorBlocks
from kvcache.device.saving import Writing
from kvcache.testing.stores import SPEC
from tests.device.hbm_rig import Engine

torch.set_num_threads(1)


class Stalling(TensorBlocks):
    """Copies the first half of the blocks (of their planes, when it saves), and then waits."""

    def load(self, incarnation: bytes, offsets: Sequence[int], first: int) -> bytes:
        super().load(incarnation, offsets[: len(offsets) // 2], first)
        stall()
        return super().load(incarnation, offsets, first)

    def into_slab(self, incarnation: bytes, offsets: Sequence[int], first: int) -> Writing:
        writing = super().into_slab(incarnation, offsets, first)
        writing.advance(SPEC.plane_count // 2)
        while writing._running():
            writing.go_on()
        stall()
        return writing


def say(text: object) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def stall() -> None:
    say("half")
    sys.stdin.readline()


def main() -> None:
    engine = Engine(sys.argv[1], sys.argv[2])
    say("ready")
    for line in sys.stdin:
        order, count, seed = line.split()
        path = engine.path(int(count), int(seed))
        match order:
            case "save":
                say(engine.save(path))
            case "save-below":
                say(engine.save_below(path))
            case "load":
                held, failed = engine.load(path)
                say(f"{held} {sorted(failed)} {engine.counted('hbm_loaded_blocks')}")
            case "stall-save":
                blocks = Stalling(engine.device, engine.memory(path), SPEC)
                say(engine.store.save_device(engine.handle, path, blocks))
            case "stall-load":
                lease = engine.store.lease_device(engine.handle, path)
                blocks = Stalling(engine.device, torch.zeros_like(engine.memory(path)), SPEC)
                say(sorted(engine.store.load_device(lease, blocks)))
                engine.store.release(lease)


if __name__ == "__main__":
    main()
