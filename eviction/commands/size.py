"""``kvcache tune size``: what to buy for a hit ratio, at a wear that the drives bear.

    kvcache tune size TRACE --hit 30% --model llama-3.1-70b --dwpd 1 --memory 200GiB,800GiB

How it is found: ``kvcache.eviction.advise.sizing``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click

from kvcache.errors import BadInput
from kvcache.eviction.admission import parse_admission
from kvcache.eviction.advise.sizing import Goal, Option, Sizer
from kvcache.eviction.amounts import gib_text, number_text
from kvcache.eviction.commands.mrc import parse_rate
from kvcache.eviction.commands.progress import bar
from kvcache.eviction.commands.replay import chosen, heading, opened
from kvcache.eviction.simulate.capacity import Capacity, parse_capacities, parse_capacity
from kvcache.eviction.simulate.curves import Estimator
from kvcache.eviction.simulate.models import MODELS, Model, model_named
from kvcache.eviction.simulate.replay import REPLAY_ONLY
from kvcache.eviction.simulate.tree import Forest
from kvcache.eviction.traces.files import Reading
from kvcache.eviction.traces.trace import Trace

_RULES = "all,branch-reused,hazard"
_PRICE = 25.0
_SAID = 3
_SLACK = 0.01  # If so much more is found than was asked for, it is wear that makes the drive large.


@dataclass(frozen=True, slots=True)
class Shop:
    """What may be bought, at most (0: any amount), and what a block of memory costs, in blocks of NVMe."""

    memory_price: float
    memory_most: int
    nvme_most: int

    def sells(self, option: Option) -> bool:
        return (not self.memory_most or option.memory_blocks <= self.memory_most) and (
            not self.nvme_most or option.nvme_blocks <= self.nvme_most
        )


@click.command("size")
@click.argument("path", type=click.Path(path_type=Path), metavar="TRACE")
@click.option("--hit", required=True, metavar="30%", help="the share of prompt tokens to be found")
@click.option("--model", "model_name", default="", help=f"{', '.join(MODELS)}, or bytes of KV a token")
@click.option("--dwpd", default=1.0, show_default=True, help="drive writes a day that the NVMe bears")
@click.option("--memory", default="1%,3%", show_default=True, metavar="SIZE,...", help="over the NVMe")
@click.option("--admit", default=_RULES, show_default=True, help="what may be written to NVMe")
@click.option("--policy", "policies", default="leaf-lru,leaf-hazard", show_default=True, metavar="NAME,...")
@click.option("--memory-price", default=_PRICE, show_default=True, help="of a GiB, in GiB of NVMe")
@click.option("--memory-most", default="", metavar="SIZE", help="no more memory can be bought")
@click.option("--nvme-most", default="", metavar="SIZE", help="no more NVMe can be bought; 0: none")
@click.option("--sample", "rate", default="auto", show_default=True, help="of the blocks, or 100% for all")
@click.option("--block-tokens", default=0, help="tokens a block, where the file does not say it")
@click.option("--json", "as_json", is_flag=True, help="one JSON object a line, the best first")
def size_command(
    path: Path,
    hit: str,
    model_name: str,
    dwpd: float,
    memory: str,
    admit: str,
    policies: str,
    memory_price: float,
    memory_most: str,
    nvme_most: str,
    rate: str,
    block_tokens: int,
    as_json: bool,
) -> None:
    """Say how much memory and NVMe a hit ratio takes.

    Each way to reach it is sought on a sample, and the cheapest is replayed on the whole trace.
    """
    model = model_named(model_name) if model_name else None
    goal = Goal(parse_ratio(hit), _positive("--dwpd", dwpd))
    trace = opened(path, Reading(block_tokens=block_tokens))
    no_nvme = nvme_most.strip() == "0"
    shop = Shop(
        _positive("--memory-price", memory_price),
        parse_capacity(memory_most, trace, model).blocks if memory_most else 0,
        parse_capacity(nvme_most, trace, model).blocks if nvme_most and not no_nvme else 0,
    )
    sizes = [] if no_nvme else parse_capacities(memory, trace, model)
    sizer = Sizer(Estimator(Forest(trace), parse_rate(rate), watch=bar), goal, watch=bar)
    shown = Shown(str(path), trace, model, goal)
    options = cheapest_first(sizer, list(_options(sizer, chosen(policies), sizes, admit)), shop, shown.amount)
    if as_json:
        for option in options:
            click.echo(json.dumps(shown.as_dict(option)))
    else:
        click.echo(heading(path.name, trace))
        click.echo(shown.sentence(options[0]) + "\n")
        click.echo(shown.table(options, shop))


def parse_ratio(text: str) -> float:
    """``30%`` or ``0.3``. RAISES BadInput."""
    try:
        ratio = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        ratio = math.nan
    if not 0 < ratio <= 1:
        raise BadInput("bad_config", f"--hit {text}", "that is no share of what prompts bring", "write 30%")
    return ratio


def _positive(name: str, value: float) -> float:
    if not 0 < value <= 1e6:
        raise BadInput("bad_config", f"{name} {value:g}", "more than 0, and at most a million, is possible")
    return value


def _options(
    sizer: Sizer, policies: Sequence[str], sizes: Sequence[Capacity], admit: str
) -> Iterator[Option]:
    """Memory alone, under each policy; NVMe below so much memory under the first."""
    for policy in policies:
        if policy in REPLAY_ONLY:
            raise BadInput("bad_config", f"--policy {policy}", "no node runs it: it is there for comparison")
    rules = [parse_admission(text.strip()) for text in admit.split(",")]
    for policy in policies:
        yield sizer.memory(policy)
    for size in sizes:
        for rule in rules:
            found = sizer.nvme(policies[0], size.blocks, rule, budget=False)
            if found is not None:
                yield found
            if found is None or found.ratio > sizer.goal.ratio + _SLACK:
                thrifty = sizer.nvme(policies[0], size.blocks, rule, budget=True)
                if thrifty is not None:
                    yield thrifty


def _or(options: Sequence[Option], shop: Shop, amount: Callable[[int], str]) -> str:
    """Some of them in words, the cheapest first."""
    said = [
        f"{amount(option.memory_blocks)} of memory under {option.policy}"
        + (f" and {amount(option.nvme_blocks)} of NVMe ({_taken(option)})" if option.admission else "")
        for option in sorted(options, key=lambda option: option.cost(shop.memory_price))
    ]
    return "; or ".join(list(dict.fromkeys(said))[:_SAID])


def _blocks(count: int) -> str:
    return f"{count:,} blocks"


def cheapest_first(
    sizer: Sizer, options: Sequence[Option], shop: Shop, amount: Callable[[int], str] = _blocks
) -> list[Option]:
    """The cheapest is confirmed: if the whole trace says it is not enough, the next is. RAISES BadInput where
    nothing that can be bought is enough."""
    left = sorted(filter(shop.sells, options), key=lambda option: option.cost(shop.memory_price))
    failed: list[Option] = []
    while left:
        first = sizer.confirm(left.pop(0))
        if first.confirmed and shop.sells(first):
            if not left or first.cost(shop.memory_price) <= left[0].cost(shop.memory_price):
                return [first, *left, *failed]
            left = sorted([first, *left], key=lambda option: option.cost(shop.memory_price))
            if left[0].confirmed:
                return [*left, *failed]
        else:
            failed.append(replace(first, confirmed=False))
    raise BadInput(
        "bad_config",
        "nothing that can be bought reaches this hit ratio at this wear",
        f"the least that does is {_or(options, shop, amount)}",
        "allow more with --memory-most, --nvme-most or --dwpd, or ask for less with --hit",
    )


@dataclass(frozen=True, slots=True)
class Shown:
    name: str
    trace: Trace
    model: Model | None
    goal: Goal

    @property
    def _block_bytes(self) -> int:
        return self.trace.block_tokens * self.model.token_bytes if self.model else 0

    def as_dict(self, option: Option) -> dict[str, object]:
        found: dict[str, object] = {
            "trace": self.name,
            "goal": self.goal.ratio,
            "policy": option.policy,
            "memory_blocks": option.memory_blocks,
            "nvme_blocks": option.nvme_blocks,
            "admit": option.admission.name if option.admission else None,
            "write_budget_blocks_a_second": option.budget_blocks_a_second or None,
            "prefix_token_hit_ratio": option.ratio,
            "drive_writes_a_day": option.drive_writes_a_day,
            "confirmed": option.confirmed,
        }
        if self.model is not None:
            found |= {
                "model": self.model.name,
                "memory_bytes": option.memory_blocks * self._block_bytes,
                "nvme_bytes": option.nvme_blocks * self._block_bytes,
                "written_bytes_a_second": option.written_blocks_a_second * self._block_bytes,
            }
        return found

    def sentence(self, option: Option) -> str:
        """What to buy, for a person."""
        buy = f"{self.amount(option.memory_blocks)} of memory under {option.policy}"
        if option.admission is not None:
            buy += f", and {self.amount(option.nvme_blocks)} of NVMe that takes {_taken(option)}"
        wear = (
            f"; the drives are written over {number_text(option.drive_writes_a_day)} times a day"
            if option.admission is not None
            else ""
        )
        begin = f"For {self.model.name}, buy" if self.model else "Buy"
        known = "the whole trace finds" if option.confirmed else "the sample says it finds about"
        asked = f"{option.ratio:.1%} of the tokens (asked for: {self.goal.ratio:.1%})"
        return f"{begin} {buy}: {known} {asked}{wear}."

    def amount(self, blocks: int) -> str:
        if not self.model:
            return _blocks(blocks)
        return gib_text(blocks * self._block_bytes)

    def table(self, options: Sequence[Option], shop: Shop) -> str:
        head = ["memory", "policy", "NVMe", "takes", "hit", "writes a day", "cost", ""]
        least = options[0].cost(shop.memory_price)
        lines = [
            [
                self.amount(option.memory_blocks),
                option.policy,
                self.amount(option.nvme_blocks) if option.nvme_blocks else "-",
                _taken(option),
                f"{option.ratio:.1%}",
                number_text(option.drive_writes_a_day) if option.nvme_blocks else "-",
                f"{option.cost(shop.memory_price) / least:.2f}",
                "replayed" if option.confirmed else "sampled",
            ]
            for option in options
        ]
        text = [head, *lines]
        widths = [max(map(len, column)) for column in zip(*text, strict=True)]
        shown = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in text]
        price = f"cost: in units of the first; a GiB of memory is taken as {shop.memory_price:g} of NVMe"
        return "\n".join([*shown, "", f"{price} (--memory-price)."])


def _taken(option: Option) -> str:
    if option.admission is None:
        return "-"
    rule = "all that falls" if option.admission.name == "all" else option.admission.name
    return f"{rule}, within a write budget" if option.budget_blocks_a_second else rule
