"""Compiles the kernels for compute capability 9.0 and says how they reach memory. A process of its own,
because Triton decides at import between compiler and interpreter."""

from __future__ import annotations

import re
from collections.abc import Mapping

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvcache.device import kernels

WIDE_LOAD, WIDE_STORE = r"ld\.global\S*\.v2\.b64", r"st\.global\S*\.v2\.b64"
LOCAL = r"(?:ld|st)\.local"
POINTERS = ("slab", "addresses", "table", "partials", "constants")
# 16 tokens of 128 bf16 a head and page, two pages a block, heads beside tokens (NHD): rows of 32 words.
SIZES = {"ROW": 32, "PAGE": 512, "HEAD": 1024, "PER_BLOCK": 2, "ALIGNED": 2}


def report(name: str, kernel: triton.JITFunction, constants: Mapping[str, int]) -> None:
    names = kernel.arg_names
    signature = {at: "*i64" if at in POINTERS else "constexpr" if at in constants else "i32" for at in names}
    source = ASTSource(
        kernel,
        signature=signature,
        constexprs={(names.index(at),): value for at, value in constants.items()},
        attrs={(names.index(at),): [["tt.divisibility", 16]] for at in POINTERS if at in names},
    )
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    counts = [len(re.findall(what, ptx)) for what in (WIDE_LOAD, WIDE_STORE, LOCAL)]
    print("{}: {} wide loads, {} wide stores, {} spilled".format(name, *counts))


if __name__ == "__main__":
    for kind, name in enumerate(("gather", "scatter")):
        copy = {**SIZES, "PIECES": 64, "PIECE": 32, "WORD_BYTES": 8, "KIND": kind}
        report(name, kernels._copy, copy)
    for kind, name in enumerate(("gather and sum", "scatter and sum", "sum")):
        report(name, kernels._copy_and_sum, {**SIZES, "ROUNDS": 16, "KIND": kind})
