"""A page that shows what a cache finds and could find: one HTML file, light or dark as its reader wants it.

It holds everything it shows. Nothing is asked of any other place, and its own policy forbids it
(``Content-Security-Policy``): no script, no font, no picture from outside; so it can be mailed and kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from kvcache.eviction.advise.advice import Advice
from kvcache.eviction.advise.charts import Axis, Series, bar_chart, line_chart
from kvcache.eviction.advise.style import STYLE
from kvcache.eviction.advise.words import Situation, words
from kvcache.eviction.amounts import gib_text, number_text
from kvcache.eviction.simulate.capacity import Capacity
from kvcache.eviction.simulate.curves import Estimate
from kvcache.eviction.simulate.replay import BELADY
from kvcache.eviction.simulate.trial import Trial
from kvcache.eviction.traces.shape import Shape

_DEPTHS = 24
_STRETCHES = 40
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


@dataclass(frozen=True, slots=True)
class Findings:
    """What the page is about. ``estimates`` are of several policies at the ``sizes``, both rising."""

    name: str
    shape: Shape
    sizes: Sequence[Capacity]
    estimates: Sequence[Estimate]
    advice: Advice
    at: Situation
    made_by: str


def page(found: Findings) -> str:
    """The whole of it."""
    body = "\n".join(
        f"<section><h2>{escape(title)}</h2>\n<p>{escape(about)}</p>\n{content}</section>"
        for title, about, content in _sections(found)
    )
    title = f"{found.name}: what the cache finds"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
{_facts(found.shape)}
{_advice(found)}
{body}
<footer>Made by <code>{escape(found.made_by)}</code>.</footer>
</main>
</body>
</html>
"""


def _sections(found: Findings) -> Iterator[tuple[str, str, str]]:
    sampled = found.advice.sample_rate
    yield (
        "By size",
        "Prompt tokens found, of all, by the size of memory. Leaf-lru is exact; others are estimated, where "
        "the trace is large, from a sample of its blocks, to about a point. Nobody finds more than the "
        "optimum, which knows the future.",
        _curves(found) + _by_size(found),
    )
    yield (
        "What was tried",
        f"{len(found.advice.tried)} settings were tried on {sampled:.1%} of the blocks of the first "
        f"{found.advice.first_requests:,} requests; these were then replayed on everything.",
        _finalists(found),
    )
    yield (
        "In time",
        "The same, in equal stretches of requests. Left of the line is what the setting was sought on.",
        _in_time(found),
    )
    yield (
        "How soon prompts come back",
        "Of the blocks that a cache without end would find: how long before they had been used last. What "
        "comes back late needs a large cache, or one that knows what to keep.",
        bar_chart("blocks found, by the time since their last use", list(found.shape.reuse.items())),
    )
    yield (
        "How deep prompts are",
        "How many requests have a prompt of so many tokens, and for how many the cache has so much of it.",
        _depths(found),
    )


def _facts(shape: Shape) -> str:
    facts = [
        ("requests", f"{shape.requests:,}"),
        ("a second", f"{shape.requests_a_second:.2f}"),
        ("prompt tokens", f"{shape.prompt_tokens:,}"),
        ("different blocks", f"{shape.unique_blocks:,} of {shape.block_tokens} tokens"),
        ("found at best", f"{shape.ideal_token_hit:.1%}"),
    ]
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    return f'<dl class="facts">{cells}</dl>'


def _advice(found: Findings) -> str:
    said = words(found.advice, found.at)
    notes = "".join(f"<dt>{escape(about)}</dt><dd>{escape(text)}</dd>" for about, text in said.notes)
    return f'<section class="advice"><h2>{escape(said.headline)}</h2>\n<dl>{notes}</dl></section>'


def _label(size: Capacity, found: Findings) -> str:
    if not found.at.block_bytes:
        return size.text
    return gib_text(size.blocks * found.at.block_bytes)


def _curves(found: Findings) -> str:
    names = list(dict.fromkeys(each.policy for each in found.estimates))
    series = [
        Series(
            "optimum" if name == BELADY else name,
            [
                (each.capacity_blocks, each.prefix_token_hit_ratio)
                for each in found.estimates
                if each.policy == name
            ],
            dashed=name == BELADY,
        )
        for name in names
    ]
    axis = Axis(
        [(size.blocks, _label(size, found)) for size in found.sizes],
        "size of memory",
        logarithmic=True,
        mark=(found.at.machine.memory_blocks, "there is"),
    )
    return line_chart("hit ratio by size", series, axis)


def _by_size(found: Findings) -> str:
    names = list(dict.fromkeys(each.policy for each in found.estimates))
    cells = {(each.policy, each.capacity_blocks): each.prefix_token_hit_ratio for each in found.estimates}
    head = ["of the blocks", "blocks", *(["size"] if found.at.block_bytes else [])]
    lines = []
    for size in found.sizes:
        line = [size.text, f"{size.blocks:,}", *([_label(size, found)] if found.at.block_bytes else [])]
        lines.append([*line, *(f"{cells[name, size.blocks]:.1%}" for name in names)])
    return _table([*head, *("optimum" if name == BELADY else name for name in names)], lines)


def _finalists(found: Findings) -> str:
    advice, below = found.advice, bool(found.at.machine.nvme_blocks)
    lines = []
    for each in sorted(advice.finalists, key=lambda each: -each.trial.ratio()):
        advised = each is advice.named and advice.change
        mark = "advised" if advised else "now" if each is advice.now else ""
        nvme = [each.setting.admission.name, number_text(each.writes_a_day)] if below else []
        ratios = [f"{ratio:.2%}" for ratio in (each.first_ratio, each.rest_ratio)]
        lines.append([f"{each.setting}", *nvme, *ratios, mark])
    head = [
        "setting",
        *(["NVMe takes", "drive writes a day"] if below else []),
        "sought on",
        "after that",
        "",
    ]
    return _table(head, lines)


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    row = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in line)}</tr>" for line in lines)
    return f'<div class="wide"><table><thead><tr>{row}</tr></thead><tbody>{body}</tbody></table></div>'


def _shown(found: Findings) -> list[tuple[str, Trial]]:
    advice = found.advice
    now = (f"{advice.now.setting}, now", advice.now.trial)
    return [now, (f"{advice.named.setting}, advised", advice.named.trial)] if advice.change else [now]


def _in_time(found: Findings) -> str:
    count = found.advice.requests
    stretches = min(_STRETCHES, count)
    edges = [count * at // stretches for at in range(stretches + 1)]
    series = [
        Series(name, [(last, trial.ratio(first, last)) for first, last in pairwise(edges)])
        for name, trial in _shown(found)
    ]
    ticks = [(count * at / 4, f"{count * at // 4:,}") for at in range(5)]
    return line_chart(
        "hit ratio in time",
        series,
        Axis(ticks, "requests", mark=(found.advice.first_requests, "sought before, confirmed after")),
    )


def _depths(found: Findings) -> str:
    wanted = found.advice.now.trial.wanted
    deepest = max(max(wanted, default=1), found.shape.block_tokens)
    start = min(found.shape.block_tokens, deepest)
    factor = (deepest / start) ** (1 / _DEPTHS) if deepest > start else 1.0
    depths = [start * factor**at for at in range(_DEPTHS + 1)] if factor > 1 else [float(start)]
    shown = [*((name, trial.hits) for name, trial in _shown(found)), ("prompts", wanted)]
    series = [
        Series(
            name, list(zip(depths, _reaching(sorted(tokens), depths), strict=True)), dashed=name == "prompts"
        )
        for name, tokens in shown
    ]
    ticks = [(10.0**power * unit, f"{10**power * unit:,}") for power in range(1, 8) for unit in (1, 3)]
    return line_chart("how deep prompts are", series, Axis(ticks, "tokens", logarithmic=True))


def _reaching(ordered: Sequence[int], depths: Sequence[float]) -> list[float]:
    """Which share is at least so deep."""
    shares, at = [], 0
    for depth in depths:
        while at < len(ordered) and ordered[at] < int(depth):
            at += 1
        shares.append(1 - at / max(len(ordered), 1))
    return shares
