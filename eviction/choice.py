"""A policy that somebody chose, with its parameters: checked whole before anything is made of it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from kvcache.errors import BadInput
from kvcache.eviction.registry import params_of, policy_class, willing
from kvcache.policy import EvictionPolicy, MakePolicy

NAME_CHARS_MAX = 200
PARAMS_MAX = 64


@dataclass(frozen=True, slots=True)
class Choice:
    """RAISES BadInput for a policy that nobody offers, a parameter that it has not, or one out of range."""

    name: str
    params: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.name) > NAME_CHARS_MAX or len(self.params) > PARAMS_MAX:
            raise BadInput("too_large", f"policy {self.name[:40]!r}", "its name, or the number of parameters")
        known = params_of(self.name, policy_class(self.name))
        for key, value in self.params.items():
            if key not in known:
                near = difflib.get_close_matches(key, known, 1)
                raise BadInput(
                    "bad_config",
                    f"{self.name} has no parameter {key!r:.40}",
                    f"it has {', '.join(known) or 'none'}",
                    f"did you mean {near[0]!r}?" if near else "",
                )
            if not math.isfinite(value) or not known[key].low <= value <= known[key].high:
                raise BadInput(
                    "bad_config",
                    f"{key} of {self.name} is {value:g}",
                    f"{known[key].low:g} to {known[key].high:g} is possible: {known[key].doc}",
                )
            if known[key].whole and not float(value).is_integer():
                raise BadInput(
                    "bad_config", f"{key} of {self.name} is {value:g}", f"a whole number is: {known[key].doc}"
                )

    @property
    def said(self) -> str:
        """For a person: ``leaf-hazard (samples=16)``."""
        given = ", ".join(f"{key}={value:g}" for key, value in self.params.items())
        return f"{self.name} ({given})" if given else self.name

    def make(self, *, declines: bool = True) -> MakePolicy:
        """What makes the policy. Without ``declines`` it stores what it is given, unless the parameters say
        otherwise: what it declined would be lost to more than its own tier."""
        found: type[EvictionPolicy] = policy_class(self.name)
        made: MakePolicy = found if declines or "decline" in self.params else willing(found)
        return partial(made, **self.params) if self.params else made

    def understands(self, other: Choice) -> bool:
        """Do the two learn the same things, so that what one has learned is of use to the other?"""
        return self.name.partition("+")[0] == other.name.partition("+")[0]


def parse_params(parts: Sequence[str], what: str) -> dict[str, float]:
    """Of ``name=number`` each. RAISES BadInput."""
    found: dict[str, float] = {}
    for part in parts:
        name, equals, text = part.strip().partition("=")
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not equals or not name.strip() or math.isnan(value):
            raise BadInput(
                "bad_config",
                f"{what} has {part!r:.60}",
                "a parameter is name=number",
                "for instance samples=16",
            )
        if name.strip() in found:
            raise BadInput("bad_config", f"{what} has {name.strip()!r:.60} twice", "once is enough")
        found[name.strip()] = value
    return found


def parse_choice(policy: str, params: str) -> Choice:
    """As in settings: parameters with commas between. RAISES BadInput."""
    parts = [part for part in params.split(",") if part.strip()]
    return Choice(policy, parse_params(parts, f"policy_params {params!r:.60}"))
