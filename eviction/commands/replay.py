"""``kvcache tune replay``: what policies and sizes would have been worth on a trace.

    kvcache tune replay TRACE --policy leaf-lru,leaf-fifo --capacity 1%,3%,10%,30%
    kvcache tune replay TRACE --capacity 40GiB,400GiB --model llama-3.1-70b
    kvcache tune replay TRACE --capacity 1% --nvme 10% --admit all,touched>=2 --dwpd 1

What is counted: ``kvcache.eviction.simulate.replay``. TRACE is in any format that
``kvcache.eviction.traces.files`` knows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import click

from kvcache.errors import BadInput
from kvcache.eviction.amounts import plain
from kvcache.eviction.commands.below import BelowRow, LowerOptions, with_below
from kvcache.eviction.commands.progress import bar
from kvcache.eviction.simulate.capacity import Capacity, parse_capacities
from kvcache.eviction.simulate.models import MODELS, Model, model_named
from kvcache.eviction.simulate.replay import BELADY, REPLAY_ONLY, named_policy, replay, replay_names
from kvcache.eviction.simulate.result import ReplayResult
from kvcache.eviction.simulate.spill import Below
from kvcache.eviction.simulate.tiers import TiersResult, replay_tiers
from kvcache.eviction.simulate.tree import Forest
from kvcache.eviction.traces.files import Reading, bytes_of, open_trace
from kvcache.eviction.traces.trace import Trace

_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Row:
    """One line of what is shown. ``optimum`` is the prefix hit ratio that nobody can beat, or None."""

    trace: str
    capacity: Capacity
    result: ReplayResult
    optimum: float | None
    block_bytes: int
    model: Model | None
    below: BelowRow | None = None

    def as_dict(self) -> dict[str, object]:
        result = self.result
        found: dict[str, object] = {
            "trace": self.trace,
            "policy": result.policy,
            "capacity": self.capacity.text,
            "capacity_blocks": self.capacity.blocks,
            "block_hit_ratio": result.block_hit_ratio,
            "prefix_token_hit_ratio": result.prefix_token_hit_ratio,
            "flops_saved_ratio": self.flops_saved_ratio,
            "requests": result.requests,
            "prompt_tokens": result.prompt_tokens,
            "hit_tokens": result.hit_tokens,
            "stored_blocks": result.admitted_blocks,
            "evicted_blocks": result.evicted_blocks,
            "seconds": round(result.seconds, 3),
        }
        if self.optimum is not None:
            found["optimum"] = self.optimum
        if self.model is not None:
            found |= {
                "model": self.model.name,
                "capacity_bytes": self.capacity.blocks * self.block_bytes,
                "loaded_bytes": result.hit_tokens * self.model.token_bytes,
                "stored_bytes": result.admitted_blocks * self.block_bytes,
                "flops_saved": self.model.flops(result.hit_tokens, result.hit_squared),
            }
        if self.below is not None:
            found |= self.below.as_dict(self.block_bytes)
        if result.policy_fault:
            found["policy_fault"] = result.policy_fault
        return found

    @property
    def flops_saved_ratio(self) -> float:
        if self.model is None:
            return self.result.flops_saved_ratio
        return self.result.flops_saved(self.model.position_tokens)


@click.command("replay")
@click.argument("traces", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="TRACE...")
@click.option("--policy", "policies", default="leaf-lru", show_default=True, metavar="NAME,...")
@click.option(
    "--capacity", default="1%,3%,10%,30%", show_default=True, help="of a trace's blocks; or blocks; or 40GiB"
)
@click.option("--model", "model_name", default="", help=f"{', '.join(MODELS)}, or bytes of KV a token")
@with_below
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="a setting of the policies")
@click.option("--hints/--no-hints", default=True, help="tell policies how requests ended")
@click.option("--bound/--no-bound", default=None, help="the optimum beside it (default: without --json)")
@click.option("--block-tokens", default=0, help="tokens a block, where the file does not say it")
@click.option("--sort", is_flag=True, help="put requests in order of their time")
@click.option("--json", "as_json", is_flag=True, help="one JSON object a line")
def replay_command(
    traces: tuple[Path, ...],
    policies: str,
    capacity: str,
    model_name: str,
    settings: tuple[str, ...],
    hints: bool,
    bound: bool | None,
    block_tokens: int,
    sort: bool,
    as_json: bool,
    **lower: str,
) -> None:
    """Replay traces over a cache, for each policy and size.

    Policies are the store's own; those of the literature (and belady, the optimum) are there for
    comparison: lru, fifo, arc, s3-fifo, sieve, w-tinylfu, each also with -rev, touched from the end.
    """
    model = model_named(model_name) if model_name else None
    wanted_bound = not as_json if bound is None else bound
    asked = Asked(
        chosen(policies), model, parse_settings(settings), hints, wanted_bound, LowerOptions(**lower)
    )
    check(asked)
    for path in traces:
        trace = opened(path, Reading(block_tokens=block_tokens, sort=sort))
        rows = replayed(str(path), trace, parse_capacities(capacity, trace, model), asked)
        if as_json:
            for row in rows:
                click.echo(json.dumps(row.as_dict()))
        else:
            shown = table(list(rows))
            click.echo(heading(path.name, trace))
            click.echo(shown)


@dataclass(frozen=True, slots=True)
class Asked:
    policies: Sequence[str]
    model: Model | None
    settings: Mapping[str, float]
    hints: bool
    bound: bool
    lower: LowerOptions


def check(asked: Asked) -> None:
    """RAISES BadInput for a policy or a setting that there is not, before anything takes time."""
    known = [policy for policy in asked.policies if policy not in REPLAY_ONLY]
    for policy in known:
        named_policy(policy, asked.settings)
    if asked.settings and not known:
        first = next(iter(asked.settings))
        raise BadInput("bad_config", f"{asked.policies[0]} has no setting {first!r}", "it has none")


def opened(path: Path, reading: Reading) -> Trace:
    """The trace in ``path``; who watches sees how far it is read. RAISES BadInput as ``open_trace``."""
    whole = bytes_of(path)
    shown = bar(f"reading {path.name}", whole)
    if shown is None:
        return open_trace(path, reading)
    try:
        # A bar looks at round numbers only.
        return open_trace(path, reading, lambda done: shown(done // 64 * 64))
    finally:
        shown(whole)


def replayed(name: str, trace: Trace, sizes: Sequence[Capacity], asked: Asked) -> Iterator[Row]:
    """A row for each size, policy and lower tier, as it is done."""
    forest, model = Forest(trace), asked.model
    block_bytes = trace.block_tokens * (model.token_bytes if model else 0)
    lower: Sequence[Below | None] = asked.lower.tiers(trace, model) or [None]
    for size, under in product(sizes, lower):
        in_all = size if under is None else Capacity(size.text, size.blocks + under.capacity_blocks)
        best = _replay(name, forest, BELADY, in_all, asked) if asked.bound else None
        optimum = best.prefix_token_hit_ratio if best else None
        for policy in asked.policies:
            if under is not None:
                found = _replay_tiers(name, forest, policy, size, under, asked)
                yield Row(
                    name, size, found.whole, optimum, block_bytes, model, BelowRow(asked.lower.nvme, found)
                )
            else:
                result = best if best and policy == BELADY else _replay(name, forest, policy, size, asked)
                yield Row(name, size, result, optimum, block_bytes, model)


def _replay(name: str, forest: Forest, policy: str, size: Capacity, asked: Asked) -> ReplayResult:
    progress = bar(f"{Path(name).name}: {policy}, {size.text}", forest.trace.request_count)
    own = {} if policy in REPLAY_ONLY else asked.settings
    return replay(forest, policy, size.blocks, settings=own, hints=asked.hints, progress=progress)


def _replay_tiers(
    name: str, forest: Forest, policy: str, size: Capacity, under: Below, asked: Asked
) -> TiersResult:
    label = f"{Path(name).name}: {policy}, {size.text}, {under.admission.name}"
    progress = bar(label, forest.trace.request_count)
    return replay_tiers(
        forest, policy, size.blocks, under, settings=asked.settings, hints=asked.hints, progress=progress
    )


def chosen(names: str) -> list[str]:
    """Names, with commas between. RAISES BadInput where there are none."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise BadInput("bad_config", "no policy", f"there are {', '.join(replay_names())}")
    return list(dict.fromkeys(wanted))


def parse_settings(texts: Sequence[str]) -> dict[str, float]:
    """``NAME=VALUE`` each. RAISES BadInput."""
    found: dict[str, float] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        try:
            found[name.strip()] = float(value)
        except ValueError as error:
            raise BadInput(
                "bad_config", f"--set {text}", "that is no setting", "write for instance --set samples=16"
            ) from error
        if not equals or not name.strip():
            raise BadInput("bad_config", f"--set {text}", "the name is missing")
    return found


def heading(name: str, trace: Trace) -> str:
    span_s = (trace.arrivals_ms[-1] - trace.arrivals_ms[0]) / 1_000
    requests = f"{trace.request_count:,} requests in {span_s:,.0f} s"
    return (
        f"{plain(name)}: {requests}, {sum(trace.input_tokens):,} tokens, "
        f"{trace.block_count:,} blocks of {trace.block_tokens}\n"
    )


def table(rows: Sequence[Row]) -> str:
    """For a person: one line a policy and size."""
    lines = [_cells(row) for row in rows]
    head = list(lines[0])
    text = [head, *([line[column] for column in head] for line in lines)]
    widths = [max(len(line[at]) for line in text) for at in range(len(head))]
    left = head.index("policy")
    shown = [
        "  ".join(
            cell.ljust(width) if at == left else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in text
    ]
    faults = [f"{row.result.policy} was replaced by leaf-lru: {row.result.policy_fault}" for row in rows]
    notes = [note for note, row in zip(faults, rows, strict=True) if row.result.policy_fault]
    return "\n".join([*shown, *dict.fromkeys(notes), ""])


def _cells(row: Row) -> dict[str, str]:
    result = row.result
    cells = {
        "policy": result.policy,
        "capacity": row.capacity.text,
        "blocks": f"{row.capacity.blocks:,}",
        "prefix hit": f"{result.prefix_token_hit_ratio:.2%}",
        "block hit": f"{result.block_hit_ratio:.2%}",
        "FLOPs saved": f"{row.flops_saved_ratio:.2%}",
    }
    if row.optimum is not None:
        cells["optimum"] = f"{row.optimum:.2%}"
    if row.model is not None:
        cells["size GiB"] = f"{row.capacity.blocks * row.block_bytes / _GIB:,.1f}"
        cells["loaded GiB"] = f"{result.hit_tokens * row.model.token_bytes / _GIB:,.0f}"
        cells["stored GiB"] = f"{result.admitted_blocks * row.block_bytes / _GIB:,.0f}"
    if row.below is not None:
        cells |= row.below.cells()
    cells["seconds"] = f"{result.seconds:.1f}"
    return cells
