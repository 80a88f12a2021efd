"""What shadow caches say, in plain words, for an operator to act on. Nothing is changed by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvcache.eviction.shadows import Estimate

GAIN_MIN = 0.005
BLOCKS_ENOUGH = 2_000
SECONDS_ENOUGH = 600
OFF = (
    "There are no shadow caches, so there is no advice. Start the node with --shadow leaf-hazard,leaf-arc to "
    "see what other policies and sizes would find; it costs at most 2 % of what the node takes."
)


@dataclass(frozen=True, slots=True)
class Situation:
    """``policy`` decides now, and found ``found_ratio`` of what was asked in the last ``seconds``; ``own`` is
    the place of its stand-in among ``estimates``, None where it has none."""

    policy: str
    found_ratio: float
    seconds: float
    sample: float
    estimates: Sequence[Estimate]
    own: int | None
    is_counting: bool


def advice(at: Situation) -> list[str]:
    return list(_lines(at))


def _lines(at: Situation) -> Iterator[str]:
    if not at.is_counting or not at.estimates:
        yield "The shadow caches are filling; they say something once they have let something go."
        return
    span = f"the last {_span(at.seconds)}, from {at.estimates[0].blocks:,} blocks sampled at {at.sample:.2%}"
    yield f"The node found {at.found_ratio:.1%} of what was asked for in {span}."
    for each in at.estimates:
        if each.fault:
            yield f"{each.cell.choice.said} broke its contract ({each.fault}): its figures are leaf-lru's."
    if at.own is None:
        yield f"{at.policy}, which decides, has no shadow of its own size to compare the others with."
        return
    if at.estimates[0].blocks < BLOCKS_ENOUGH or at.seconds < SECONDS_ENOUGH:
        yield (
            f"That is too little to advise on: {BLOCKS_ENOUGH:,} sampled blocks and "
            f"{_span(SECONDS_ENOUGH)} are wanted."
        )
        return
    yield _policy_line(at)
    yield from _size_lines(at)


def _policy_line(at: Situation) -> str:
    assert at.own is not None
    size = at.estimates[at.own].cell.size
    rivals = [
        each
        for place, each in enumerate(at.estimates)
        if place != at.own and each.cell.size == size and not each.fault
    ]
    if not rivals:
        return "No other policy is shadowed at this size."
    best = max(rivals, key=lambda each: each.gain)
    names = ", ".join(each.cell.choice.said for each in rivals)
    if best.gain < GAIN_MIN or best.gain < best.gain_doubt:
        return f"Keep {at.policy}: of {names}, none would have found more by what can be told apart."
    params = "".join(f" --param {name}={value:g}" for name, value in best.cell.choice.params.items())
    return (
        f"{best.cell.choice.said} would have found {best.hit_ratio:.1%}: {_points(best)} than {at.policy}. "
        f"To change: kvcache tune set --policy {best.cell.choice.name}{params}"
    )


def _size_lines(at: Situation) -> Iterator[str]:
    assert at.own is not None
    mine = at.estimates[at.own].cell
    for each in sorted(at.estimates, key=lambda each: each.cell.size):
        if each.cell.choice.said != mine.choice.said or each.cell.size == mine.size:
            continue
        waits = "" if each.is_full or each.cell.size < mine.size else " (so far: it is not full yet)"
        yield (
            f"With {each.cell.size:.0%} of the memory, {at.policy} would have found "
            f"{each.hit_ratio:.1%}{waits}: {_points(each)} than now."
        )


def _points(each: Estimate) -> str:
    side = "more" if each.gain >= 0 else "less"
    return f"{abs(each.gain) * 100:.1f} points {side} (give or take {each.gain_doubt * 100:.1f})"


def _span(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} seconds"
