"""``kvcache tune mrc``: what policies find at every size, as a table and a picture.

    kvcache tune mrc TRACE
    kvcache tune mrc TRACE --policy leaf-lru,leaf-hazard --model llama-3.1-70b --capacity 40GiB,400GiB

How it is known, and how well: ``kvcache.eviction.simulate.curves``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from kvcache.errors import BadInput
from kvcache.eviction.amounts import gib_text
from kvcache.eviction.commands.picture import Line, draw
from kvcache.eviction.commands.progress import bar
from kvcache.eviction.commands.replay import chosen, heading, opened, parse_settings
from kvcache.eviction.simulate.capacity import Capacity, parse_capacities
from kvcache.eviction.simulate.curves import EXACT, LEAF_LRU, SAMPLED, Estimate, Estimator
from kvcache.eviction.simulate.models import MODELS, Model, model_named
from kvcache.eviction.simulate.replay import BELADY
from kvcache.eviction.simulate.tree import Forest
from kvcache.eviction.traces.files import Reading
from kvcache.eviction.traces.trace import Trace

GIB = 1 << 30
POLICIES = "leaf-lru,leaf-hazard,leaf-arc"
LADDER = "0.1%,0.3%,1%,2%,3%,5%,10%,20%,30%,50%,100%"


@dataclass(frozen=True, slots=True)
class Point:
    """One line of what is shown."""

    capacity: Capacity
    estimate: Estimate


@click.command("mrc")
@click.argument("path", type=click.Path(path_type=Path), metavar="TRACE")
@click.option("--policy", "policies", default=POLICIES, show_default=True, metavar="NAME,...")
@click.option(
    "--capacity", default=LADDER, show_default=True, help="of a trace's blocks; or blocks; or 40GiB"
)
@click.option("--model", "model_name", default="", help=f"{', '.join(MODELS)}, or bytes of KV a token")
@click.option("--sample", "rate", default="auto", show_default=True, help="of the blocks, or 100% for all")
@click.option("--shards", is_flag=True, help="leaf-lru from the sample alone beside it, as a node sees it")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="a setting of the policies")
@click.option("--hints/--no-hints", default=True, help="tell policies how requests ended")
@click.option("--bound/--no-bound", default=True, help="the optimum as well")
@click.option("--block-tokens", default=0, help="tokens a block, where the file does not say it")
@click.option("--json", "as_json", is_flag=True, help="one JSON object a line")
def mrc_command(
    path: Path,
    policies: str,
    capacity: str,
    model_name: str,
    rate: str,
    shards: bool,
    settings: tuple[str, ...],
    hints: bool,
    bound: bool,
    block_tokens: int,
    as_json: bool,
) -> None:
    """Draw what policies find at every size of the cache (a hit ratio curve).

    leaf-lru is exact. Others are simulated on a sample of the blocks.
    """
    model = model_named(model_name) if model_name else None
    names = chosen(policies)
    if bound and BELADY not in names:
        names.append(BELADY)
    own = parse_settings(settings)
    trace = opened(path, Reading(block_tokens=block_tokens))
    sizes = capacities(capacity, trace, model)
    estimator = Estimator(Forest(trace), parse_rate(rate), hints=hints, watch=bar)
    points = list(_points(estimator, names, sizes, own, shards))
    if as_json:
        for point in points:
            click.echo(json.dumps(as_dict(str(path), trace, model, point, estimator)))
    else:
        click.echo(heading(path.name, trace))
        click.echo(picture(points, trace, model))
        click.echo(table(points, trace, model))
        click.echo(_how(points, estimator))


def _points(
    estimator: Estimator,
    names: Sequence[str],
    sizes: Sequence[Capacity],
    settings: Mapping[str, float],
    shards: bool,
) -> Iterator[Point]:
    for name in names:
        for size in sizes:
            yield Point(size, estimator.estimate(name, size.blocks, settings if name != BELADY else {}))
    if shards:
        for size in sizes:
            yield Point(size, estimator.shards(size.blocks))


def capacities(text: str, trace: Trace, model: Model | None) -> list[Capacity]:
    """Rising. Of the usual sizes, those of less than a block are left out. RAISES BadInput."""
    if text == LADDER:
        parts = text.split(",")
        text = ",".join(part for part in parts if float(part[:-1]) * trace.block_count >= 100) or "1"
    found = {size.blocks: size for size in parse_capacities(text, trace, model)}
    return [found[blocks] for blocks in sorted(found)]


def parse_rate(text: str) -> float:
    """0 for auto. RAISES BadInput."""
    if text == "auto":
        return 0.0
    try:
        rate = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        rate = 0.0
    if not 0 < rate <= 1:
        raise BadInput("bad_config", f"--sample {text}", "that is no share", "write for instance 3%, or 100%")
    return rate


def as_dict(
    name: str, trace: Trace, model: Model | None, point: Point, estimator: Estimator
) -> dict[str, object]:
    estimate = point.estimate
    found: dict[str, object] = {
        "trace": name,
        "policy": estimate.policy,
        "capacity": point.capacity.text,
        "capacity_blocks": estimate.capacity_blocks,
        "capacity_tokens": estimate.capacity_blocks * trace.block_tokens,
        "prefix_token_hit_ratio": estimate.prefix_token_hit_ratio,
        "how": estimate.how,
    }
    if estimate.how == EXACT:
        found["block_hit_ratio"] = estimator.exact.block_hit_ratio(estimate.capacity_blocks)
    if estimate.how == SAMPLED:
        found["sample_rate"] = estimator.sample.rate
    if model is not None:
        found["model"] = model.name
        found["capacity_bytes"] = estimate.capacity_blocks * trace.block_tokens * model.token_bytes
    return found


def picture(points: Sequence[Point], trace: Trace, model: Model | None) -> str:
    names = list(dict.fromkeys(map(_name, points)))
    lines = [
        Line(
            name, [(p.capacity.blocks, p.estimate.prefix_token_hit_ratio) for p in points if _name(p) == name]
        )
        for name in names
    ]
    labels = {point.capacity.blocks: size_text(point.capacity, trace, model) for point in points}
    return draw(lines, sorted(labels.items()))


def size_text(size: Capacity, trace: Trace, model: Model | None) -> str:
    if model is None:
        return size.text
    return gib_text(size.blocks * trace.block_tokens * model.token_bytes)


def table(points: Sequence[Point], trace: Trace, model: Model | None) -> str:
    """One line a size, one column a policy."""
    names = list(dict.fromkeys(map(_name, points)))
    cells: dict[int, dict[str, str]] = {}
    for point in points:
        size = point.capacity
        line = cells.setdefault(
            size.blocks, {"capacity": size.text, "blocks": f"{size.blocks:,}", **_amounts(size, trace, model)}
        )
        line[_name(point)] = f"{point.estimate.prefix_token_hit_ratio:.2%}"
    head = ["capacity", "blocks", *_amounts(points[0].capacity, trace, model), *names]
    text = [head, *([line[column] for column in head] for line in cells.values())]
    widths = [max(map(len, column)) for column in zip(*text, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in text
    )


def _amounts(size: Capacity, trace: Trace, model: Model | None) -> dict[str, str]:
    tokens = size.blocks * trace.block_tokens
    found = {"tokens": f"{tokens:,}"}
    if model is not None:
        found["GiB"] = f"{tokens * model.token_bytes / GIB:,.1f}"
    return found


def _name(point: Point) -> str:
    estimate = point.estimate
    return "leaf-lru (SHARDS)" if (estimate.policy, estimate.how) == (LEAF_LRU, SAMPLED) else estimate.policy


def _how(points: Sequence[Point], estimator: Estimator) -> str:
    how = {point.estimate.how for point in points}
    if SAMPLED in how:
        return (
            f"\nleaf-lru is exact, the others are from {estimator.sample.rate:.1%} of the blocks, good to "
            "about a point; --sample 100% replays all."
        )
    return "\nAll of it was replayed." if how != {EXACT} else "\nExact."
