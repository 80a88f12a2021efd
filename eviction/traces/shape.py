"""What a trace is like: how much could be found at best, how soon, how deep, and how much is in use at once.

Everything comes from one walk over the requests, blocks being as old as their last use:

* the *ideal hit* is what a cache without end would find, by blocks and by tokens of leading blocks;
* a *reuse time* is how long a block that is found was not used; the blocks used for the first time have none;
* the *working set* of a window T is how many blocks the last T had in use, on average over the trace
  (Denning, CACM 1968): the sum over all uses of min(time to the next use, T), over the trace's length.

The sum: 0.1 us a block of a prompt and 10 us a request: 0.8 s for 4.5 million blocks.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from kvcache.eviction.amounts import plain
from kvcache.eviction.traces.trace import Trace

REUSE_S = (1, 10, 60, 600, 3_600, 21_600)
WINDOWS_S = (10, 60, 600, 3_600)
PERCENTILES = (10, 50, 90, 99)
PROGRESS_REQUESTS = 256
_BAR_CHARS = 36

Progress = Callable[[int], None]
Shares = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Shape:
    """Times are in seconds, depths in tokens. Shares of what is found add up to 1."""

    note: str
    block_tokens: int
    requests: int
    sessions: int
    kinds: Mapping[str, int]
    span_s: float
    blocks: int
    unique_blocks: int
    prompt_tokens: int
    unique_tokens: int
    output_tokens: int
    ideal_block_hit: float
    ideal_token_hit: float
    found_again_blocks: int
    hottest_block_share: float
    """Of all uses of blocks, those of the one used most."""
    prompt_depth: Mapping[str, int]
    found_depth: Mapping[str, int]
    new_tokens: Mapping[str, int]
    reuse: Shares
    """Of the blocks found, by the time since their last use."""
    reuse_s: Shares
    working_set_blocks: Mapping[str, int]

    @property
    def requests_a_second(self) -> float:
        return self.requests / self.span_s if self.span_s else 0.0

    def as_dict(self) -> dict[str, object]:
        return {**asdict(self), "requests_a_second": round(self.requests_a_second, 6)}


@dataclass(slots=True)
class Uses:
    """What the walk finds, request by request, and over all of them."""

    known_blocks: array[int]
    """Of each request: how many of its leading blocks had been used before."""
    block_counts: array[int]
    known_tokens: array[int]
    prompt_tokens: array[int]
    """All that came in, tokens of no whole block included."""
    gaps_ms: Counter[int]
    """Time since the last use, of every block found."""
    last_ms: array[int]
    """Of every block; -1 for one that no request has."""
    use_counts: array[int]


def uses_of(trace: Trace, progress: Progress | None = None) -> Uses:
    """Walk over all requests."""
    parents, tokens, depths = trace.parents, trace.tokens, depths_of(trace.parents)
    last = array("q", [-1]) * trace.block_count
    counts = array("i", bytes(4 * trace.block_count))
    gaps: Counter[int] = Counter()
    known, sizes, known_tokens, prompt_tokens = array("i"), array("i"), array("q"), array("q")
    base = trace.arrivals_ms[0] if trace.request_count else 0
    full = trace.block_tokens
    columns = (trace.leaves, trace.arrivals_ms, trace.input_tokens)
    for index, (leaf, arrival, came_in) in enumerate(zip(*columns, strict=True)):
        now = arrival - base
        size = depths[leaf] if leaf >= 0 else 0
        found, before, run = 0, -1, 0
        block = leaf
        while block >= 0:
            then = last[block]
            last[block] = now
            counts[block] += 1
            block = parents[block]
            if then < 0:
                continue
            found += 1
            if then == before:
                run += 1
                continue
            if run:
                gaps[now - before] += run
            before, run = then, 1
        if run:
            gaps[now - before] += run
        short = full - tokens[leaf] if leaf >= 0 else 0
        known.append(found)
        sizes.append(size)
        known_tokens.append(found * full - (short if found == size and size else 0))
        prompt_tokens.append(max(size * full - short, came_in))
        if progress is not None and index % PROGRESS_REQUESTS == 0:
            progress(index)
    return Uses(known, sizes, known_tokens, prompt_tokens, gaps, last, counts)


def depths_of(parents: Sequence[int]) -> array[int]:
    """Blocks from the start of the prompt, of every block: 1 for the first."""
    depths = array("i", bytes(4 * len(parents)))
    for block, parent in enumerate(parents):
        depths[block] = depths[parent] + 1 if parent >= 0 else 1
    return depths


def shape_of(trace: Trace, progress: Progress | None = None) -> Shape:
    """What ``trace`` is like. REQUIRES: it has requests."""
    uses = uses_of(trace, progress)
    span_ms = trace.arrivals_ms[-1] - trace.arrivals_ms[0]
    blocks, found = sum(uses.block_counts), sum(uses.known_blocks)
    prompts = sum(uses.prompt_tokens)
    kinds = Counter(trace.kind_indexes)
    names = {at: trace.kinds[at] if at < len(trace.kinds) else "" for at in kinds}
    return Shape(
        note=trace.note,
        block_tokens=trace.block_tokens,
        requests=trace.request_count,
        sessions=len({each for each in trace.sessions if each >= 0}),
        kinds={names[at] or "unknown": count for at, count in kinds.most_common()},
        span_s=span_ms / 1_000,
        blocks=blocks,
        unique_blocks=sum(1 for count in uses.use_counts if count),
        prompt_tokens=prompts,
        unique_tokens=sum(size for size, count in zip(trace.tokens, uses.use_counts, strict=True) if count),
        output_tokens=sum(trace.output_tokens),
        ideal_block_hit=found / max(blocks, 1),
        ideal_token_hit=sum(uses.known_tokens) / max(prompts, 1),
        found_again_blocks=sum(1 for count in uses.use_counts if count > 1),
        hottest_block_share=max(uses.use_counts, default=0) / max(blocks, 1),
        prompt_depth=percentiles(uses.prompt_tokens),
        found_depth=percentiles(uses.known_tokens),
        new_tokens=percentiles(
            [each - known for each, known in zip(uses.prompt_tokens, uses.known_tokens, strict=True)]
        ),
        reuse=_reuse_shares(uses.gaps_ms),
        reuse_s=_reuse_percentiles(uses.gaps_ms),
        working_set_blocks=_working_sets(uses, span_ms),
    )


def percentiles(values: Iterable[int]) -> dict[str, int]:
    """The nearest value at or above each of ``PERCENTILES``; all 0 of none."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return {
        f"p{each}": ordered[min(last, each * len(ordered) // 100)] if ordered else 0 for each in PERCENTILES
    }


def window(seconds: float) -> str:
    """How a time is called: 10 s, 1 min, 6 h."""
    if seconds < 60:
        return f"{seconds:g} s"
    return f"{seconds / 60:g} min" if seconds < 3_600 else f"{seconds / 3_600:g} h"


def _reuse_shares(gaps_ms: Counter[int]) -> dict[str, float]:
    names = [f"within {window(each)}" for each in REUSE_S] + ["later"]
    shares = dict.fromkeys(names, 0)
    edges = [each * 1_000 for each in REUSE_S]
    for gap, count in gaps_ms.items():
        shares[names[bisect_right(edges, gap)]] += count
    total = max(sum(shares.values()), 1)
    return {name: count / total for name, count in shares.items()}


def _reuse_percentiles(gaps_ms: Counter[int]) -> dict[str, float]:
    ordered, total, passed = sorted(gaps_ms), sum(gaps_ms.values()), 0
    wanted = list(PERCENTILES)
    found: dict[str, float] = {}
    for gap in ordered:
        passed += gaps_ms[gap]
        while wanted and passed * 100 >= wanted[0] * total:
            found[f"p{wanted.pop(0)}"] = gap / 1_000
    return found


def _working_sets(uses: Uses, span_ms: int) -> dict[str, int]:
    ends = Counter(span_ms - last for last in uses.last_ms if last >= 0)
    sizes = {}
    for seconds in WINDOWS_S:
        if seconds * 1_000 >= span_ms:
            continue
        total = sum(
            min(gap, seconds * 1_000) * count for each in (uses.gaps_ms, ends) for gap, count in each.items()
        )
        sizes[window(seconds)] = round(total / span_ms)
    return sizes


# --- in text ------------------------------------------------------------------------------------


def picture(name: str, shape: Shape) -> str:
    """For a person: some lines of figures and bars."""
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in shape.kinds.items())
    unique_share = shape.unique_blocks / max(shape.blocks, 1)
    rows = [
        f"{plain(name)}: {shape.requests:,} requests in {shape.span_s:,.0f} s, "
        f"{shape.requests_a_second:.2f} a second, {shape.sessions:,} sessions",
        f"  from      {shape.note or 'it does not say'}",
        f"  kinds     {kinds}",
        f"  prompts   {shape.prompt_tokens:,} tokens in {shape.blocks:,} blocks of {shape.block_tokens}",
        f"  footprint {shape.unique_blocks:,} blocks, {unique_share:.1%} of these; "
        f"{shape.unique_tokens:,} tokens",
        f"  ideal hit {shape.ideal_token_hit:.1%} of tokens, {shape.ideal_block_hit:.1%} of blocks; "
        f"the hottest block is {shape.hottest_block_share:.1%} of all uses",
        f"  prompt    {_depths(shape.prompt_depth)} tokens",
        f"  found     {_depths(shape.found_depth)} tokens",
        f"  new       {_depths(shape.new_tokens)} tokens",
        "",
        "  blocks found again, by the time since their last use",
        *_bars(shape.reuse, lambda share: f"{share:.1%}"),
        "",
        "  blocks in use within a window, on average",
        *_bars(shape.working_set_blocks, lambda count: f"{count:,.0f}", shape.unique_blocks),
    ]
    return "\n".join(rows)


def _depths(depths: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {value:,}" for name, value in depths.items())


def _bars(values: Mapping[str, float], words: Callable[[float], str], whole: float = 0) -> list[str]:
    most = max(values.values(), default=0) or 1
    rows = []
    for name, value in values.items():
        share = f"({value / whole:.1%} of the footprint)" if whole else ""
        said = " ".join(filter(None, ["#" * round(_BAR_CHARS * value / most), share]))
        rows.append(f"  {name:>14}  {words(value):>9}  {said}".rstrip())
    return rows
