"""Traces as Mooncake publishes them (FAST 25), and others after it: a JSON object a line.

    {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, 48, ...]}

Milliseconds, tokens, and a number a block of 512 tokens, the last of which may be partial. A number stands
for a block and all before it, so a block has one parent wherever it appears; a file in which one has two is
refused. Sessions and kinds are not written: they have no field.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from kvcache.eviction.traces.rows import LENGTH_MAX, Fit, Progress, Rows, names, objects, whole
from kvcache.eviction.traces.trace import AT_MS_MAX, Trace

BLOCK_TOKENS = 512


def read_mooncake(
    path: Path, block_tokens: int = 0, *, sort: bool = False, progress: Progress | None = None
) -> Trace:
    """The trace in ``path``; ``block_tokens`` 0: as published. RAISES BadInput (bad_trace)."""
    full = block_tokens or BLOCK_TOKENS
    rows = Rows(full, prefix_names=True, sort=sort, fit=Fit(full, is_assumed=not block_tokens))
    for where, fields in objects(path, progress):
        rows.add(
            where,
            whole(where, fields, "timestamp", AT_MS_MAX),
            names(where, fields),
            whole(where, fields, "input_length", LENGTH_MAX),
            whole(where, fields, "output_length", LENGTH_MAX),
        )
    return rows.trace(path.name)


def mooncake_lines(trace: Trace) -> Iterator[str]:
    """``trace`` in this form, time from 0. Whoever reads it has to know the length of its blocks."""
    start = trace.arrivals_ms[0] if trace.request_count else 0
    for request in trace.requests():
        yield json.dumps(
            {
                "timestamp": request.arrival_ms - start,
                "input_length": max(request.input_tokens, request.prompt_tokens),
                "output_length": request.output_tokens,
                "hash_ids": list(request.blocks),
            }
        )
