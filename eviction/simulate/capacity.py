"""How large a cache is to be, as one writes it: ``3%`` of a trace's blocks, ``5000`` blocks, ``40GiB``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from kvcache.config import parse_size
from kvcache.errors import BadInput
from kvcache.eviction.simulate.models import Model
from kvcache.eviction.traces.trace import Trace

_TODO = "write for instance 3%, 5000 (blocks) or 40GiB (with --model)"
_BLOCKS_MAX = 1 << 40


@dataclass(frozen=True, slots=True)
class Capacity:
    """``text`` is what was written."""

    text: str
    blocks: int


def parse_capacities(text: str, trace: Trace, model: Model | None) -> list[Capacity]:
    """Some, with commas between. RAISES BadInput for what is none, and for less than a block."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise BadInput("bad_config", f"a capacity of {text!r}", "that is no size", _TODO)
    return [parse_capacity(part, trace, model) for part in parts]


def parse_capacity(text: str, trace: Trace, model: Model | None) -> Capacity:
    """One. Per cent are of the blocks of the trace; parts of a block are dropped. RAISES BadInput."""
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,12})?)\s*(%|[A-Za-z]{0,5})", text)
    if match is None:
        raise BadInput("bad_config", f"a capacity of {text!r}", "that is no size", _TODO)
    number, unit = Fraction(match[1]), match[2]
    if unit == "%":
        blocks = int(number * trace.block_count / 100)
        why = f"the trace has {trace.block_count:,} blocks, so this is less than one"
    elif not unit and number.denominator == 1:
        blocks = int(number)
        why = "one block is the least"
    elif not unit or model is None:
        why = "a part of a block is none" if not unit else "how many blocks that is depends on the model"
        raise BadInput("bad_config", f"a capacity of {text!r}", why, _TODO)
    else:
        block_bytes = model.token_bytes * trace.block_tokens
        blocks = parse_size(text, "capacity") // block_bytes
        why = f"a block of {trace.block_tokens} tokens of {model.name} takes {block_bytes:,} bytes"
    if blocks < 1:
        raise BadInput("too_small", f"a capacity of {text}", why, "give it more")
    if blocks > _BLOCKS_MAX:
        raise BadInput("too_large", f"a capacity of {text}", f"that is {blocks:,} blocks")
    return Capacity(text, blocks)
