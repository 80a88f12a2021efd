"""Policies by name: ours in the table, others' by the entry point group ``kvcache.eviction``.

An entry point's class is loaded only when its name is asked for; a name of ours cannot be taken over.
"""

from __future__ import annotations

import difflib
from importlib.metadata import entry_points

from kvcache.errors import BadInput
from kvcache.eviction.fifo import Fifo
from kvcache.eviction.leaf_arc import LeafArc
from kvcache.eviction.leaf_hazard import LeafHazard
from kvcache.eviction.leaf_lru import LeafLru
from kvcache.policy import EvictionPolicy

GROUP = "kvcache.eviction"


POLICIES: dict[str, type[EvictionPolicy]] = {
    "leaf-lru": LeafLru,
    "leaf-hazard": LeafHazard,
    "leaf-arc": LeafArc,
    "leaf-fifo": Fifo,
}


def policy_names() -> list[str]:
    """Every name ``policy_class`` knows, ours first."""
    others = {entry.name for entry in entry_points(group=GROUP)} - POLICIES.keys()
    return [*POLICIES, *sorted(others)]


def policy_class(name: str) -> type[EvictionPolicy]:
    """RAISES BadInput when nobody offers this name, or when what is offered cannot be loaded."""
    if name in POLICIES:
        return POLICIES[name]
    for entry in entry_points(group=GROUP, name=name):
        try:
            found = entry.load()
        except (ImportError, AttributeError) as error:
            raise BadInput(
                "bad_config",
                f"policy {name!r} cannot be loaded",
                f"{entry.value}: {error}",
                "install the package that offers it again, or choose another policy",
            ) from error
        if not callable(found):
            raise BadInput("bad_config", f"policy {name!r} is no class", f"{entry.value} is {found!r}"[:200])
        loaded: type[EvictionPolicy] = found
        return loaded
    near = difflib.get_close_matches(name, policy_names(), 1)
    raise BadInput(
        "bad_config",
        f"no policy is called {name!r}",
        f"there are {', '.join(policy_names())}",
        f"did you mean {near[0]!r}?"
        if near
        else "choose one of these, or install the package that offers it",
    )
