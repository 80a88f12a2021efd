"""The figures of a run, and the table of them for people.

Shares and percentiles are over the requests that arrived after the first ``warm_up`` of the time; the ideal
ones too: what an endless cache that all workers share would have given. Over- and under-credited blocks are
those that the router took the chosen worker to have, and it did not, or the other way round, when the request
arrived.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from kvcache.simulation.run import Run, Settings
from kvcache.simulation.workload import Workload


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one router on one trace. ``hit_tokens`` and ``hit_blocks`` are shares, times are seconds;
    ``imbalance``: the busiest worker's prefill time over the mean. -1: it does not apply."""

    trace: str
    router: str
    workers: int
    requests: int
    hit_tokens: float
    hit_blocks: float
    ideal_tokens: float
    ideal_blocks: float
    ttft_p50: float
    ttft_p90: float
    ttft_p99: float
    ttft_mean: float
    token_p99: float
    """The 99th percentile over requests of the mean time between two tokens of an answer."""
    imbalance: float
    busy_share: float
    over_credited: int
    under_credited: int
    loaded_blocks: int
    resent: int
    lost_batches: int
    resyncs: int
    refused_blocks: int

    def as_dict(self) -> dict[str, object]:
        return {
            name: round(value, 6) if isinstance(value, float) else value
            for name, value in asdict(self).items()
        }


def figures(workload: Workload, settings: Settings, run: Run, warm_up: float = 0.0) -> Figures:
    """``warm_up``: the share of the time whose arrivals do not count, 0 to less than 1."""
    jobs = [job for job in run.jobs if job.arrival_s >= warm_up * workload.span_s]
    block = workload.block_tokens
    blocks, tokens = sum(len(job.path) for job in jobs), sum(job.prompt_tokens for job in jobs)
    used = sum(min(job.used * block, job.prompt_tokens - 1) for job in jobs)
    ideal = [workload.ideals[job.number] for job in jobs]
    ideal_tokens = sum(min(hit * block, job.prompt_tokens - 1) for hit, job in zip(ideal, jobs, strict=True))
    waits = sorted(job.first_s - job.arrival_s for job in jobs)
    paces = sorted(
        (job.finish_s - job.first_s) / (job.answer_tokens - 1) for job in jobs if job.answer_tokens > 1
    )
    looked = [job for job in jobs if job.credited >= 0]
    mean_busy_s = sum(run.busy_s) / len(run.busy_s)
    return Figures(
        trace=workload.name,
        router=run.router,
        workers=settings.workers,
        requests=len(jobs),
        hit_tokens=_ratio(used, tokens),
        hit_blocks=_ratio(sum(job.used for job in jobs), blocks),
        ideal_tokens=_ratio(ideal_tokens, tokens),
        ideal_blocks=_ratio(sum(ideal), blocks),
        ttft_p50=percentile(waits, 0.5),
        ttft_p90=percentile(waits, 0.9),
        ttft_p99=percentile(waits, 0.99),
        ttft_mean=_ratio(sum(waits), len(waits)),
        token_p99=percentile(paces, 0.99),
        imbalance=_ratio(max(run.busy_s), mean_busy_s),
        busy_share=_ratio(mean_busy_s, max(job.first_s for job in run.jobs)),
        over_credited=sum(max(0, job.credited - job.truth) for job in looked) if looked else -1,
        under_credited=sum(max(0, job.truth - job.credited) for job in looked) if looked else -1,
        loaded_blocks=sum(job.loaded for job in jobs),
        resent=sum(job.resent for job in jobs),
        lost_batches=run.lost_batches,
        resyncs=run.resyncs,
        refused_blocks=run.refused_blocks,
    )


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of them do not exceed; 0 of none."""
    if not ordered:
        return 0.0
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))]


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


_COLUMNS = (
    "router",
    "hit tokens",
    "hit blocks",
    "p50",
    "p90",
    "p99",
    "imbalance",
    "over",
    "under",
    "choices/s",
)


def table(rows: Iterable[tuple[Figures, float]], markdown: bool = False) -> str:
    """``rows``: figures, and choices a second. One trace's, as lines of text."""
    cells = [[*_COLUMNS]] + [_cells(each, rate) for each, rate in rows]
    if markdown:
        cells.insert(1, ["---", *["---:"] * (len(_COLUMNS) - 1)])
        return "\n".join("| " + " | ".join(row) + " |" for row in cells)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        rest = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *rest]))
    return "\n".join(lines)


def _cells(figures: Figures, rate: float) -> list[str]:
    return [
        figures.router,
        f"{figures.hit_tokens:.1%}",
        f"{figures.hit_blocks:.1%}",
        f"{figures.ttft_p50:.2f} s",
        f"{figures.ttft_p90:.2f} s",
        f"{figures.ttft_p99:.2f} s",
        f"{figures.imbalance:.2f}",
        _count(figures.over_credited),
        _count(figures.under_credited),
        f"{rate:,.0f}",
    ]


def _count(value: int) -> str:
    return "" if value < 0 else f"{value:,}"
