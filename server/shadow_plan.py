"""What shadow caches a node is to have, by its settings, and what they are shadows of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvcache.config import NodeConfig
from kvcache.errors import BadInput
from kvcache.eviction.choice import Choice
from kvcache.eviction.shadows import Cell
from kvcache.ledger import Ledger

EVICTED = "removed_blocks:evicted"


@dataclass(frozen=True, slots=True)
class Plan:
    """Policies and sizes (1: as the host tier), the share of blocks that is looked at, and the share of the
    node's processor time that all this may take. RAISES BadInput (bad_config)."""

    policies: tuple[str, ...]
    sizes: tuple[float, ...]
    sample: float
    cpu: float

    @staticmethod
    def of(config: NodeConfig) -> Plan | None:
        """What the settings ask for; None: nothing."""
        if config.shadow == "none":
            return None
        policies = tuple(dict.fromkeys(part.strip() for part in config.shadow.split(",") if part.strip()))
        sizes = tuple(dict.fromkeys(_size(part) for part in config.shadow_sizes.split(",")))
        return Plan(policies, sizes, config.shadow_sample, config.shadow_cpu)

    def cells(self, own: Choice) -> list[Cell]:
        """With the store's own stand-in first. RAISES BadInput."""
        choices = [own, *(Choice(name) for name in self.policies if name != own.said)]
        cells = [Cell(own, 1.0)]
        return cells + [
            Cell(choice, size) for choice in choices for size in self.sizes if Cell(choice, size) != cells[0]
        ]


def _size(text: str) -> float:
    number, percent, rest = text.strip().partition("%")
    try:
        size = float(number) / 100
    except ValueError:
        size = 0.0
    if not percent or rest or not 0.01 <= size <= 100:
        raise BadInput(
            "bad_config",
            f"shadow_sizes has {text.strip()!r:.40}",
            "a size is in per cent of the capacity, from 1% to 10000%",
            "for instance 50%,100%,200%",
        )
    return size


@dataclass(frozen=True, slots=True)
class Store:
    """What the shadows are shadows of. ``is_alone``: all that it finds is in its memory; nothing is brought
    from other tiers or nodes."""

    ledger: Ledger
    capacity_bytes: int
    is_alone: bool
    has_evicted: Callable[[], bool]
