"""What is worth writing to the lower tier, and how much may be: branch by branch, leading blocks first.

    all             whatever falls out of memory
    touched>=2      blocks that so many requests had (any number will do)
    branch-reused   the same, and all of a branch of which some block was touched twice: a conversation
                    that came back once is written whole, its newest part too
    hazard=30%      so much of what falls, the best of it by what was learned (``admission_learned``)
    policy          what the lower tier's own policy says (``admit``): for policies that decline

A prefix is written or nothing is, so no rule ever leaves a hole: what continues it on the lower tier already
decides for a block. The budget is a bucket of blocks that fills at an even rate; it counts what is
written for that reason too, and then waits until it is paid.

CacheLib (OSDI 20) and Flashield (NSDI 19) admit to flash by the same two thoughts, for objects that
stand alone: only what has proved itself, and never more than the drive bears.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvcache.errors import BadInput

RULES = ("all", "touched>=2", "branch-reused", "hazard", "policy")
DAY_S = 86_400
_SHARE_PERCENT = 30


@dataclass(frozen=True, slots=True)
class Admission:
    """A rule of ``RULES``: ``touches`` is the least a block needs; ``branch`` asks it of one of a branch;
    ``share`` of what falls is written, the best of it."""

    name: str
    touches: int = 0
    branch: bool = False
    share: float = 0.0
    asks_policy: bool = False


ALL = Admission("all")


def parse_admission(text: str) -> Admission:
    """RAISES BadInput for what is no rule."""
    match = re.fullmatch(r"touched>=([1-9][0-9]{0,3})", text.replace(" ", ""))
    if match is not None:
        return Admission(text, touches=int(match[1]))
    if text == "all":
        return ALL
    if text == "branch-reused":
        return Admission(text, touches=2, branch=True)
    if text == "policy":
        return Admission(text, asks_policy=True)
    match = re.fullmatch(r"hazard(?:=(\d{1,3}(?:\.\d{1,3})?)%)?", text)
    if match is not None and 0 < float(match[1] or _SHARE_PERCENT) <= 100:
        return Admission(text, share=float(match[1] or _SHARE_PERCENT) / 100)
    raise BadInput("bad_config", f"no admission is called {text!r}", f"there are {', '.join(RULES)}")


def leading(
    rule: Admission, branch: Sequence[int], touches: Sequence[int], reused: Callable[[], bool]
) -> int:
    """How many leading blocks of a branch are worth writing, by themselves. ``reused``: does it belong to a
    longer branch of which some block was touched twice?"""
    if rule.branch and branch and (touches[branch[0]] >= rule.touches or reused()):
        return len(branch)
    count = 0
    while count < len(branch) and touches[branch[count]] >= rule.touches:
        count += 1
    return count
