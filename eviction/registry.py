"""Policies by name: ours in the table, others' by the entry point group ``kvcache.eviction``.

A name may go on with wrappers, innermost first: "leaf-hazard+keep". A class with no more than a ``score`` is
made a policy (``kvcache.eviction.score``). An entry point's class is loaded only when its name is asked
for; a name of ours cannot be taken over.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from functools import partial
from importlib.metadata import entry_points

from kvcache.errors import BadInput
from kvcache.eviction.cost import Cost
from kvcache.eviction.fifo import Fifo
from kvcache.eviction.keep import Keep
from kvcache.eviction.leaf_arc import LeafArc
from kvcache.eviction.leaf_hazard import LeafHazard
from kvcache.eviction.leaf_lru import LeafLru
from kvcache.eviction.score import is_score, scored
from kvcache.eviction.wrapper import Wrapper, wrapped
from kvcache.guard import said
from kvcache.policy import EvictionPolicy, MakePolicy, Param

GROUP = "kvcache.eviction"


POLICIES: dict[str, type[EvictionPolicy]] = {
    "leaf-lru": LeafLru,
    "leaf-hazard": LeafHazard,
    "leaf-arc": LeafArc,
    "leaf-fifo": Fifo,
}
WRAPPERS: dict[str, type[Wrapper]] = {"keep": Keep, "cost": Cost}


def policy_names() -> list[str]:
    """Every name ``policy_class`` knows, ours first."""
    others = {entry.name for entry in entry_points(group=GROUP)} - POLICIES.keys()
    return [*POLICIES, *sorted(others)]


def policy_class(name: str) -> type[EvictionPolicy]:
    """RAISES BadInput when nobody offers this name, or when what is offered cannot be loaded."""
    base, *around = name.split("+")
    found = _base(base)
    for each in around:
        if each not in WRAPPERS or around.count(each) > 1:
            why = f"what goes around a policy is {', '.join(WRAPPERS)}, each once"
            raise BadInput("bad_config", f"policy {name!r} names {each!r}", why)
        if taken := params_of(base, found).keys() & WRAPPERS[each].OWN.keys():
            why = f"{base} has a parameter {min(taken)!r} of its own"
            raise BadInput("bad_config", f"policy {name!r} cannot be used", why)
        found = wrapped(WRAPPERS[each], found)
    return found


def params_of(name: str, found: type[EvictionPolicy]) -> Mapping[str, Param]:
    """The parameters of a policy. RAISES BadInput when it does not say them as it should."""
    try:
        params = dict(found.params())
        wrong = [key for key, param in params.items() if not param.low <= param.default <= param.high]
    except BaseException as error:  # Others' code.
        why = f"params raised {said(error)}"[:200]
        raise BadInput("bad_config", f"policy {name!r} cannot be used", why) from error
    if wrong:
        why = f"the default of {wrong[0]!r:.40} is out of its range"
        raise BadInput("bad_config", f"policy {name!r} cannot be used", why)
    return params


def willing(found: type[EvictionPolicy]) -> MakePolicy:
    """The policy where what it declines would be lost to more than its own tier: it then declines nothing."""
    return partial(found, decline=0.0) if "decline" in found.params() else found  # type: ignore[call-arg]


def load_class(target: str) -> type[EvictionPolicy]:
    """The policy at ``module:Class``. RAISES BadInput when it is not there, or is none."""
    module, _, name = target.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except BaseException as error:  # Others' code, and whatever it does when it is imported.
        raise BadInput("bad_config", f"there is no policy at {target!r}", said(error)) from error
    return _policy(found, target, target)


def _policy(found: object, name: str, where: str) -> type[EvictionPolicy]:
    if is_score(found):
        return scored(found)
    if not callable(found):
        raise BadInput("bad_config", f"policy {name!r} is no class", f"{where} is {found!r}"[:200])
    loaded: type[EvictionPolicy] = found  # type: ignore[assignment]  # The guard and the contract see the rest.
    return loaded


def _base(name: str) -> type[EvictionPolicy]:
    if name in POLICIES:
        return POLICIES[name]
    for entry in entry_points(group=GROUP, name=name):
        try:
            found = entry.load()
        except BaseException as error:  # Others' code, and whatever it does when it is imported.
            raise BadInput(
                "bad_config",
                f"policy {name!r} cannot be loaded",
                f"{entry.value}: {said(error)}",
                "install the package that offers it again, or choose another policy",
            ) from error
        return _policy(found, name, entry.value)
    near = difflib.get_close_matches(name, policy_names(), 1)
    raise BadInput(
        "bad_config",
        f"no policy is called {name!r}",
        f"there are {', '.join(policy_names())}",
        f"did you mean {near[0]!r}?"
        if near
        else "choose one of these, or install the package that offers it",
    )
