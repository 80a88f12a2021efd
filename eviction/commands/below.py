"""The options and figures of the lower tier in ``kvcache tune replay``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import click

from kvcache.config import parse_size
from kvcache.errors import BadInput
from kvcache.eviction.admission import DAY_S, RULES, parse_admission
from kvcache.eviction.simulate.capacity import parse_capacities
from kvcache.eviction.simulate.models import Model
from kvcache.eviction.simulate.spill import Below
from kvcache.eviction.simulate.tiers import TiersResult
from kvcache.eviction.traces.trace import Trace

DWPD_MAX = 10_000.0


def with_below(command: Callable[..., None]) -> Callable[..., None]:
    """Its options."""
    for option in reversed(
        (
            click.option("--nvme", default="", metavar="SIZE,...", help="a lower tier under each --capacity"),
            click.option(
                "--nvme-policy", default="leaf-lru", show_default=True, help="which block goes there"
            ),
            click.option("--admit", default="all", show_default=True, help=f"of {', '.join(RULES)}"),
            click.option(
                "--write-budget", default="", metavar="500MB/s", help="what may be written (--model)"
            ),
            click.option("--dwpd", default="", metavar="N", help="the same, in drive writes a day"),
        )
    ):
        command = option(command)
    return command


@dataclass(frozen=True, slots=True)
class LowerOptions:
    """As they were written. Without ``nvme`` there is no lower tier."""

    nvme: str = ""
    nvme_policy: str = "leaf-lru"
    admit: str = "all"
    write_budget: str = ""
    dwpd: str = ""

    def tiers(self, trace: Trace, model: Model | None) -> list[Below]:
        """One for each size and rule. RAISES BadInput."""
        if not self.nvme:
            if self.write_budget or self.dwpd:
                raise BadInput("bad_config", "a write budget without --nvme", "memory does not wear out")
            if self.admit != "all" or self.nvme_policy != "leaf-lru":
                given = "--admit" if self.admit != "all" else "--nvme-policy"
                why = "it is of what goes there"
                raise BadInput("bad_config", f"{given} without --nvme", why, "give --nvme, or leave it out")
            return []
        rules = [parse_admission(text.strip()) for text in self.admit.split(",")]
        return [
            Below(
                size.blocks, self.nvme_policy, rule, False, self._blocks_a_second(size.blocks, trace, model)
            )
            for size in parse_capacities(self.nvme, trace, model)
            for rule in rules
        ]

    def _blocks_a_second(self, blocks: int, trace: Trace, model: Model | None) -> float:
        """The lower of the two budgets; 0: none."""
        found = []
        if self.dwpd:
            found.append(_number(self.dwpd, "--dwpd") * blocks / DAY_S)
        if self.write_budget:
            text = self.write_budget.removesuffix("/s")
            if model is None:
                raise BadInput(
                    "bad_config",
                    f"--write-budget {text}",
                    "bytes a block depend on the model",
                    "give --model",
                )
            found.append(parse_size(text, "--write-budget") / (model.token_bytes * trace.block_tokens))
        if found and not min(found):
            raise BadInput(
                "bad_config", "a write budget of 0", "then nothing is ever written", "leave out --nvme"
            )
        return min(found, default=0.0)


def _number(text: str, name: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise BadInput("bad_config", f"{name} {text}", "that is no number") from error
    if not 0 < value <= DWPD_MAX:
        raise BadInput("bad_config", f"{name} {text}", f"more than 0, and at most {DWPD_MAX:g}, is possible")
    return value


@dataclass(frozen=True, slots=True)
class BelowRow:
    """What is shown of the lower tier. ``size`` is what was written."""

    size: str
    result: TiersResult

    @property
    def memory_ratio(self) -> float:
        return self.result.memory_hit_tokens / max(self.result.whole.prompt_tokens, 1)

    def as_dict(self, block_bytes: int) -> dict[str, object]:
        result = self.result
        found: dict[str, object] = {
            "nvme_blocks": result.below.capacity_blocks,
            "nvme_policy": result.below.policy,
            "admit": result.below.admission.name,
            "memory_prefix_token_hit_ratio": self.memory_ratio,
            "promoted_blocks": result.promoted_blocks,
            "written_blocks": result.written_blocks,
            "declined_blocks": result.declined_blocks,
            "written_ratio": result.written_ratio,
            "drive_writes_a_day": result.drive_writes_a_day,
        }
        if block_bytes:
            written_bytes = result.written_blocks * block_bytes
            found["written_bytes"] = written_bytes
            found["written_bytes_a_second"] = written_bytes / result.span_s if result.span_s else 0.0
        return found

    def cells(self) -> dict[str, str]:
        result = self.result
        return {
            "NVMe blocks": f"{result.below.capacity_blocks:,}",
            "admit": result.below.admission.name,
            "in memory": f"{self.memory_ratio:.2%}",
            "written": f"{result.written_ratio:.2f}",
            "DWPD": f"{result.drive_writes_a_day:.1f}",
        }
