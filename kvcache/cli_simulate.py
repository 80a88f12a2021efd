"""``kvcache simulate``: replay request traces over simulated workers, and compare ways of routing.

    kvcache simulate                        a generated workload
    kvcache simulate TRACE ...              in any format that ``kvcache.eviction.traces.files`` knows

The model and its limits: docs/routing-simulation.md. Exit status: 0 done, 1 wrong settings or trace, 2 usage.
"""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from kvcache.errors import BadInput, plainly
from kvcache.eviction.traces.files import open_trace
from kvcache.eviction.traces.generate import Workload as Made
from kvcache.eviction.traces.generate import generate
from kvcache.routing.weights import Weights
from kvcache.simulation.feed import Stream
from kvcache.simulation.plot import svg
from kvcache.simulation.report import Figures, figures, table
from kvcache.simulation.run import ROUTERS, TAIL_LRU, Run, Settings, simulate
from kvcache.simulation.workload import Workload, prepare

MADE = Made(
    request_count=4_000,
    block_tokens=512,
    arrivals_a_second=0.55,
    system_prompt_count=8,
    system_prompt_tokens=3_000,
    session_share=0.55,
    fan_out_share=0.05,
    turns=6,
    turn_gap_s=45.0,
    question_tokens=1_500,
    answer_tokens=350,
    document_tokens=20_000,
    fan_out_width=8,
    one_shot_tokens=9_000,
)
"""Long prompts, as in the published traces: conversations, documents asked about, and one-shots."""


@dataclass(frozen=True, slots=True)
class _Row:
    figures: Figures
    run: Run

    @property
    def rate(self) -> float:
        return self.run.choices / max(self.run.choose_s, 1e-9)


@click.command()
@click.argument("traces", nargs=-1, type=click.Path(path_type=Path), metavar="[TRACE]...")
@click.option("--workers", default=16, show_default=True, help="how many")
@click.option("--speed", default=4.0, show_default=True, help="times as fast as the trace was recorded")
@click.option("--router", "routers", default="", metavar="NAME,...", help=f"of {', '.join(ROUTERS)}")
@click.option("--capacity", default=2_048, show_default=True, help="blocks of the trace in a worker's memory")
@click.option("--host", "host_blocks", default=0, show_default=True, help="and in its host memory")
@click.option("--policy", default=TAIL_LRU, show_default=True, help="which blocks go, or an eviction policy")
@click.option("--delay", "delay_ms", default=0.1, show_default=True, help="ms until an event is in the index")
@click.option(
    "--loss", "loss_percent", default=0.0, show_default=True, help="%% of event batches that get lost"
)
@click.option("--restarts", default=0, show_default=True, help="of workers, at times drawn by chance")
@click.option("--weights", type=click.Path(path_type=Path), help="TOML file of the router's weights")
@click.option("--requests", default=0, help="replay only the first so many of each trace")
@click.option("--warm-up", default=0.0, show_default=True, help="share of the time that does not count")
@click.option("--seed", default=1, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="one JSON object a line")
@click.option("--markdown", is_flag=True, help="tables for a document")
@click.option("--plot", type=click.Path(path_type=Path), help="write a picture (SVG) to this file")
def simulate_command(
    traces: tuple[Path, ...],
    workers: int,
    speed: float,
    routers: str,
    capacity: int,
    host_blocks: int,
    policy: str,
    delay_ms: float,
    loss_percent: float,
    restarts: int,
    weights: Path | None,
    requests: int,
    warm_up: float,
    seed: int,
    as_json: bool,
    markdown: bool,
    plot: Path | None,
) -> None:
    """Compare ways of routing on request traces.

    TRACE is in any format of docs/traces.md; without one, a workload is generated. What is simulated, and
    what is not, is in docs/routing-simulation.md.
    """
    if not 0 <= warm_up < 1:
        raise BadInput("bad_config", f"warm-up {warm_up}", "it is a share, 0 to less than 1")
    if plot and not plot.parent.is_dir():  # Not after the minutes that a simulation takes.
        why = f"there is no folder {plot.parent}"
        raise BadInput("bad_config", f"{plot} cannot be written", why, "give another --plot")
    settings = Settings(
        workers=workers,
        capacity=capacity,
        host_blocks=host_blocks,
        policy=policy,
        stream=Stream(delay_s=delay_ms / 1_000, loss=loss_percent / 100),
        restarts=restarts,
        seed=seed,
        weights=read_weights(weights) if weights else Weights(),
    )
    names = chosen(routers)
    shown: list[Figures] = []
    for workload in _workloads(traces, speed, requests):
        rows: list[_Row] = []
        for name in names:
            run = simulate(workload, name, settings, _progress(workload, name))
            rows.append(_Row(figures(workload, settings, run, warm_up), run))
            if as_json:
                click.echo(
                    json.dumps({**rows[-1].figures.as_dict(), "choices_a_second": round(rows[-1].rate)})
                )
        if not as_json:
            _print(workload, settings, rows, markdown)
        shown += [row.figures for row in rows]
    if plot:
        _write(plot, svg(shown))


def chosen(names: str) -> list[str]:
    """RAISES BadInput for a name that there is not."""
    wanted = [name.strip() for name in names.split(",") if name.strip()] or list(ROUTERS)
    for name in wanted:
        if name not in ROUTERS:
            raise BadInput("bad_config", f"no router is called {name!r}", f"there are {', '.join(ROUTERS)}")
    return list(dict.fromkeys(wanted))


def read_weights(path: Path) -> Weights:
    """From a TOML file: the table ``[weights]``, or the file itself where it has none. RAISES BadInput."""
    try:
        with path.open("rb") as stream:
            read = tomllib.load(stream)
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(
            "bad_config", f"{path} cannot be read", plainly(error)[:200], "give a TOML file"
        ) from error
    found = read.get("weights", read)
    if not isinstance(found, dict):
        raise BadInput("bad_config", f"weights in {path} is no table", "write [weights] and its lines below")
    return Weights.from_table(found)


def _workloads(paths: Sequence[Path], speed: float, requests: int) -> Iterator[Workload]:
    if not paths:
        yield prepare("generated", generate(MADE), speed, requests)
    for path in paths:
        yield prepare(path.stem, open_trace(path), speed, requests)


def _progress(workload: Workload, name: str) -> _Shown | None:
    return _Shown(workload, name) if sys.stderr.isatty() else None


class _Shown:
    """How far it is, on standard error, where a person watches."""

    def __init__(self, workload: Workload, name: str) -> None:
        self._what = f"{workload.name}: {name}"
        self._total = len(workload.paths)

    def __call__(self, done: int) -> None:
        share = f" {done / self._total:4.0%}" if done < self._total else ""
        click.echo(f"\r\x1b[2K{f'{self._what}{share}' if share else ''}", nl=False, err=True)


def _print(workload: Workload, settings: Settings, rows: Sequence[_Row], markdown: bool) -> None:
    first = rows[0].figures
    click.echo(
        f"{workload.name}: {first.requests:,} requests in {workload.span_s:,.0f} s, {settings.workers} "
        f"workers, ideal hit {first.ideal_tokens:.1%} of tokens, {first.ideal_blocks:.1%} of blocks"
    )
    click.echo("")
    click.echo(table([(row.figures, row.rate) for row in rows], markdown))
    notes = [
        f"{row.figures.router}: {row.figures.lost_batches} batches lost, {row.figures.resyncs} resyncs"
        for row in rows
        if row.figures.lost_batches
    ]
    resent = max(row.figures.resent for row in rows)
    notes += [f"up to {resent} requests were sent again, as their worker went down"] if resent else []
    click.echo("\n".join(["", *notes, ""]) if notes else "")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise BadInput(
            "bad_config", f"{path} cannot be written", plainly(error), "give another --plot"
        ) from error
