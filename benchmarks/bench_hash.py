"""What naming a prompt costs: prefix hashes of 128,000 tokens, in blocks of 16, on one thread.

    .venv/bin/python benchmarks/bench_hash.py [--json] [--quick]

On paper: keyed BLAKE2b of 80 bytes takes two compressions, 0.3 us, and the interpreter about as much
again for slicing and joining, so 0.7 to 1 us a block; packing the ids costs 0.1 us a block more.
``ratio`` is the budget of 1.5 us a block over what was measured. ``bare`` is hashlib alone, called as
often on as many bytes: what no pure-Python chain can beat.
"""

from __future__ import annotations

import sys
from hashlib import blake2b
from pathlib import Path
from random import Random
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # Also where the project is not installed.

import harness
from harness import Figure

from kvcache.block import BlockHash, chain

TOKEN_COUNT = 128_000
BLOCK_TOKENS = 16
BLOCK_COUNT = TOKEN_COUNT // BLOCK_TOKENS
BUDGET_US = 1.5
KEY = bytes(range(32))
ROOT = BlockHash(bytes(16))


def bare() -> None:
    message = bytes(16 + 4 * BLOCK_TOKENS)
    for _ in range(BLOCK_COUNT):
        blake2b(message, digest_size=16, key=KEY).digest()


def main() -> None:
    chosen = harness.options("what naming a prompt costs")
    random = Random(1)
    tokens = [random.randrange(150_000) for _ in range(TOKEN_COUNT)]
    spent = harness.interleaved(
        {
            "chain": lambda: harness.seconds(lambda: chain(ROOT, KEY, tokens, BLOCK_TOKENS)),
            "bare": lambda: harness.seconds(bare),
        },
        chosen.rounds(51, 5),
    )
    count, machine = len(spent["chain"]), harness.machine()
    values = {name: median(each) / BLOCK_COUNT * 1e6 for name, each in spent.items()}
    harness.report(
        [
            Figure(
                "hash.chain.block",
                values["chain"],
                "us",
                BUDGET_US / values["chain"],
                "budget",
                count,
                machine,
            ),
            Figure(
                "hash.chain.block",
                values["chain"],
                "us",
                values["bare"] / values["chain"],
                "bare",
                count,
                machine,
            ),
        ],
        chosen,
    )


if __name__ == "__main__":
    main()
