"""What policies that stand around another one share: they pass on all they are told, and say more than it.

A wrapper is made for a base by ``wrapped``: the result is a policy class like any other, whose settings are
those of both. ``kvcache.eviction.registry`` makes one of "leaf-hazard+keep".
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Mapping, Sequence
from typing import ClassVar

from kvcache.policy import DevicePolicy, EvictionPolicy, KeyedPolicy, Param, RequestContext, TreeView

ASK_MAX = 4_096
_ASK_FACTOR = 4
_ASK_MORE = 16


class Wrapper:
    """An ``EvictionPolicy``, a ``KeyedPolicy`` and a ``DevicePolicy``, as good as its base. Subclasses say
    what ``OWN`` settings they take, and what goes."""

    BASE: ClassVar[type[EvictionPolicy]]
    OWN: ClassVar[Mapping[str, Param]] = {}

    def __init__(self, tree: TreeView, capacity_bytes: int, **settings: float) -> None:
        self._tree = tree
        self._own = {name: settings.pop(name, param.default) for name, param in self.OWN.items()}
        self.base: EvictionPolicy = self.BASE(tree, capacity_bytes, **settings)
        self._keyed = self.base if isinstance(self.base, KeyedPolicy) else None
        self._devices = self.base if isinstance(self.base, DevicePolicy) else None

    @classmethod
    def params(cls) -> Mapping[str, Param]:
        return {**cls.BASE.params(), **cls.OWN}

    def on_request(self, context: RequestContext, path: Sequence[int]) -> None:
        self.base.on_request(context, path)

    def admit(self, context: RequestContext, parent: int, count: int) -> int:
        return self.base.admit(context, parent, count)

    def admit_keys(self, context: RequestContext, parent: int, keys: Sequence[Hashable]) -> int:
        if self._keyed is not None:
            return self._keyed.admit_keys(context, parent, keys)
        return self.base.admit(context, parent, len(keys))

    def on_admitted(self, context: RequestContext, blocks: Sequence[int]) -> None:
        self.base.on_admitted(context, blocks)

    def victims(self, context: RequestContext, count: int) -> Sequence[int]:
        return self._choose(context, count, None)

    def victims_on(self, context: RequestContext, count: int, device: int) -> Sequence[int]:
        return self._choose(context, count, device)

    def on_evicted(self, blocks: Sequence[int], reason: str) -> None:
        self.base.on_evicted(blocks, reason)

    def state(self) -> bytes:
        return self.base.state()

    def load_state(self, data: bytes) -> None:
        self.base.load_state(data)

    def _choose(self, context: RequestContext, count: int, device: int | None) -> Sequence[int]:
        return self._of_base(context, count, device)

    def _of_base(self, context: RequestContext, count: int, device: int | None) -> Sequence[int]:
        if device is None:
            return self.base.victims(context, count)
        if self._devices is not None:
            return self._devices.victims_on(context, count, device)
        named = Going(self._tree)
        for block in self.base.victims(context, min(ASK_MAX, count * _ASK_FACTOR + _ASK_MORE)):
            if self._tree.device[block] == device and len(named.blocks) < count:
                named.take(block)
        return named.blocks


class Going:
    """Blocks that will go, leaves first."""

    def __init__(self, tree: TreeView) -> None:
        self._tree = tree
        self._seen: set[int] = set()
        self._gone: dict[int, int] = {}
        self.blocks: list[int] = []

    def take(self, block: int) -> bool:
        """Take the block if it is an evictable leaf once those taken have gone, and was not taken."""
        if block in self._seen or self._tree.holds[block]:
            return False
        if self._tree.children[block] != self._gone.get(block, 0):
            return False
        parent = self._tree.parent[block]
        self._gone[parent] = self._gone.get(parent, 0) + 1
        self._seen.add(block)
        self.blocks.append(block)
        return True


def ask_more(count: int) -> int:
    """How many to ask for, where ``count`` were not enough."""
    return min(ASK_MAX, count * _ASK_FACTOR + _ASK_MORE)


def wrapped(wrapper: type[Wrapper], base: type[EvictionPolicy]) -> type[EvictionPolicy]:
    """The policy class that is ``wrapper`` around ``base``. REQUIRES: no setting of both has one name."""
    assert not base.params().keys() & wrapper.OWN.keys()

    def init(self: Wrapper, tree: TreeView, capacity_bytes: int, **settings: float) -> None:
        wrapper.__init__(self, tree, capacity_bytes, **settings)

    taken = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=param.default, annotation=float)
        for name, param in {**base.params(), **wrapper.OWN}.items()
    ]
    own = list(inspect.signature(init).parameters.values())[:-1]
    init.__signature__ = inspect.Signature([*own, *taken])  # type: ignore[attr-defined]  # inspect reads it.
    made = type(f"{wrapper.__name__}{base.__name__}", (wrapper,), {"BASE": base, "__init__": init})
    assert issubclass(made, Wrapper)
    return made
