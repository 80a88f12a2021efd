"""``kvcache tune report``: curves, advice and what the trace is like, as one HTML page.

    kvcache tune report TRACE --capacity 40GiB --model llama-3.1-70b --output report.html

What is on it: ``kvcache.eviction.advise.report``.
"""

from __future__ import annotations

import json
from pathlib import Path

import click

from kvcache.errors import BadInput, plainly
from kvcache.eviction.advise.advice import Adviser
from kvcache.eviction.advise.report import Findings, page
from kvcache.eviction.advise.words import situation
from kvcache.eviction.amounts import plain
from kvcache.eviction.commands.advise import as_dict, runnable
from kvcache.eviction.commands.mrc import LADDER, POLICIES, capacities, parse_rate
from kvcache.eviction.commands.progress import bar
from kvcache.eviction.commands.replay import chosen, opened, parse_settings
from kvcache.eviction.registry import policy_names
from kvcache.eviction.simulate.capacity import parse_capacity
from kvcache.eviction.simulate.curves import Estimator
from kvcache.eviction.simulate.models import MODELS, model_named
from kvcache.eviction.simulate.replay import BELADY
from kvcache.eviction.simulate.tree import Forest
from kvcache.eviction.simulate.trial import Machine, Setting
from kvcache.eviction.traces.files import Reading
from kvcache.eviction.traces.shape import shape_of


@click.command("report")
@click.argument("path", type=click.Path(path_type=Path), metavar="TRACE")
@click.option("--capacity", required=True, help="of memory: 3% of the trace's blocks; or blocks; or 40GiB")
@click.option("--output", type=click.Path(path_type=Path), default=Path("report.html"), show_default=True)
@click.option("--model", "model_name", default="", help=f"{', '.join(MODELS)}, or bytes of KV a token")
@click.option("--policy", default="leaf-lru", show_default=True, help="what runs now")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="its settings, as they are now")
@click.option("--nvme", default="", metavar="SIZE", help="the NVMe below, if there is any")
@click.option("--curves", "drawn", default=POLICIES, show_default=True, metavar="NAME,...")
@click.option("--sizes", default=LADDER, show_default=True, help="of the curves")
@click.option("--sample", "rate", default="auto", show_default=True, help="of the blocks, or 100% for all")
@click.option("--hints/--no-hints", default=True, help="tell policies how requests ended")
@click.option("--block-tokens", default=0, help="tokens a block, where the file does not say it")
@click.option("--json", "as_json", is_flag=True, help="the advice as one JSON object")
def report_command(
    path: Path,
    capacity: str,
    output: Path,
    model_name: str,
    policy: str,
    settings: tuple[str, ...],
    nvme: str,
    drawn: str,
    sizes: str,
    rate: str,
    hints: bool,
    block_tokens: int,
    as_json: bool,
) -> None:
    """Write a page with the curves, the advice and what the trace is like.

    The page holds all it shows: it can be mailed, and asks nothing of any server.
    """
    model = model_named(model_name) if model_name else None
    if output.is_dir() or not output.parent.is_dir():
        why = "it is a folder" if output.is_dir() else f"there is no folder {output.parent}"
        raise BadInput("bad_config", f"{output} cannot be written", why, "give another --output")
    trace = opened(path, Reading(block_tokens=block_tokens))
    forest, share = Forest(trace), parse_rate(rate)
    lower = parse_capacity(nvme, trace, model).blocks if nvme else 0
    machine = Machine(parse_capacity(capacity, trace, model).blocks, lower, hints=hints)
    runnable(policy)
    now = Setting(policy, tuple(sorted(parse_settings(settings).items())))
    names = [*(name for name in chosen(drawn) if name != BELADY), BELADY]
    ladder = capacities(sizes, trace, model)
    advice = Adviser(forest, machine, rate=share, policies=policy_names(), watch=bar).advise(now)
    estimator = Estimator(forest, share, hints=hints, watch=bar)
    found = Findings(
        name=plain(path.name),
        shape=shape_of(trace, bar("what it is like", trace.request_count)),
        sizes=ladder,
        estimates=[estimator.estimate(name, size.blocks) for name in names for size in ladder],
        advice=advice,
        at=situation(forest, machine, model, bar),
        made_by=f"kvcache tune report {plain(path.name)} --capacity {capacity}",
    )
    write(output, page(found))
    if as_json:
        click.echo(json.dumps({"report": str(output), **as_dict(str(path), advice, found.at)}))
    else:
        click.echo(f"{output} is written: open it in a browser.")


def write(path: Path, text: str) -> None:
    """RAISES BadInput where it cannot be."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BadInput(
            "bad_config", f"{path} cannot be written", plainly(error), "give another --output"
        ) from error
