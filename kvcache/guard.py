"""The border between the core and an eviction policy, which may be others' code.

Every call of a policy goes through here. It is given nothing that the core goes on with, and its answer is
verified before anything acts on it; a policy that raises, be it ``SystemExit``, or answers wrongly is
replaced, for good, by leaf-first LRU, which is told what is held; so is one that never comes back
(``patience``). It costs hits, never blocks that somebody
holds and never a request. ``faults`` counts, ``last_fault`` says what.

A policy can be changed for another meanwhile (``begin_change``, then ``change_step`` until it says so): the
new one is told what is held in order of its last use (``handover``), and what goes wrong with it before it
decides leaves the old one in its place.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Hashable, Sequence
from itertools import islice
from operator import index
from typing import ParamSpec, TypeVar

from kvcache.handover import Handover
from kvcache.leaf_lru import LeafLru
from kvcache.patience import Patience
from kvcache.policy import DevicePolicy, EvictionPolicy, KeyedPolicy, MakePolicy, RequestContext, TreeView
from kvcache.recency import Recency

_FAULT_CHARS_MAX = 300

_Each = TypeVar("_Each")
_T = TypeVar("_T")
_P = ParamSpec("_P")


class PolicyGuard:
    def __init__(
        self,
        tree: TreeView,
        capacity_bytes: int,
        make_policy: MakePolicy,
        committed: Callable[[], Sequence[int]],
        recency: Recency | None = None,
    ) -> None:
        """``committed`` lists the blocks a new policy must be told of, parents before children. Without
        ``recency``, which is kept here, the policy cannot be changed.

        RAISES what the policy's constructor raises: a policy that cannot start is the operator's to mend."""
        self._tree = tree
        self._capacity_bytes = capacity_bytes
        self._committed = committed
        self.patience: Patience | None = None
        """Where others look after how long a policy takes."""
        self._install(self._made(make_policy))
        self.faults = 0
        self.last_fault = ""
        self.change_fault = ""
        """Why the last change was given up; empty if it was not."""
        self._recency = recency
        self._coming: Handover | None = None

    def _install(self, policy: EvictionPolicy) -> None:
        keyed = policy if isinstance(policy, KeyedPolicy) else None
        devices = policy if isinstance(policy, DevicePolicy) else None
        self._policy, self._keyed, self._devices = policy, keyed, devices

    # --- another policy ---------------------------------------------------------------------------

    @property
    def is_changing(self) -> bool:
        return self._coming is not None

    @property
    def told_count(self) -> int:
        """How many blocks a policy that is to take over has been told of; 0 when there is none."""
        return self._coming.told_count if self._coming is not None else 0

    def begin_change(self, make_policy: MakePolicy, *, with_state: bool) -> bool:
        """Another policy is to decide; until ``change_step`` says so, the one that does goes on. A change
        that was begun before is given up. ``with_state``: the two understand each other's ``state``; was it
        handed over? RAISES what the policy's constructor raises: then nothing has changed."""
        assert self._recency is not None
        policy = self._made(make_policy)
        has_state = False
        if with_state:
            try:
                state = self._timed(self._policy.state)
                self._timed(policy.load_state, state)
                has_state = len(state) > 0
            except BaseException as error:  # Others' code. What was learned is learned again.
                _raise_if_ours(error)
                policy = self._made(make_policy)
        self.change_fault = ""
        self._coming = Handover(self._tree, self._recency, policy)
        return has_state

    def change_step(self, count: int) -> bool:
        """Tell the new policy of ``count`` blocks, or a branch more. True: no change is under way any more;
        the new one decides, unless ``change_fault`` says otherwise."""
        try:
            is_over = self._coming is None or self._timed(self._coming.step, count)
            if is_over and self._coming is not None:
                self._install(self._coming.policy)
                self._coming = None
        except BaseException as error:
            self._give_up("was told what is held", error)
            return True
        return is_over

    def cancel_change(self) -> None:
        """The old policy stays."""
        self._coming = None

    def check(self) -> None:
        """Assert every invariant of what is kept here."""
        if self._recency is not None:
            self._recency.check(self._committed())
        if self._coming is not None:
            self._coming.check()

    def _give_up(self, when: str, error: BaseException) -> None:
        assert self._coming is not None
        name = type(self._coming.policy).__name__
        self.change_fault = f"{name}, when it {when}, raised {said(error)}"[:_FAULT_CHARS_MAX]
        self._coming = None

    def _used(self, context: RequestContext, path: Sequence[int]) -> None:
        if self._recency is None or not path:
            return
        stamp = self._recency.used(path[-1], context.now_ns)
        if self._coming is not None and stamp:
            self._coming.used(context, path[-1], stamp)

    def _entered(self, context: RequestContext, blocks: Sequence[int]) -> None:
        if self._recency is None or not blocks:
            return
        stamp = self._recency.entered(blocks, context.now_ns)
        if self._coming is not None:
            self._coming.entered(context, blocks, stamp)

    def _left(self, blocks: Sequence[int], reason: str) -> None:
        if self._recency is None:
            return
        risen = self._recency.left(blocks)
        if self._coming is not None:
            try:
                self._timed(self._coming.left, blocks, reason, risen)
            except BaseException as error:
                self._give_up("was told what has left", error)

    # --- what happens, and what goes --------------------------------------------------------------

    def on_request(self, context: RequestContext, path: Sequence[int]) -> None:
        self._used(context, path)
        try:
            self._ask(self._policy.on_request, context, _own(path))
        except BaseException as error:
            self._replace(context, f"on_request raised {said(error)}")

    def admit(self, context: RequestContext, parent: int, keys: Sequence[Hashable]) -> int:
        count = len(keys)
        try:
            if self._keyed is not None:
                admitted = index(self._ask(self._keyed.admit_keys, context, parent, _own(keys)))
            else:
                admitted = index(self._ask(self._policy.admit, context, parent, count))
        except BaseException as error:
            self._replace(context, f"admit raised {said(error)}")
            return count
        if not 0 <= admitted <= count:
            self._replace(context, f"admit answered {admitted} of {count} blocks")
            return count
        return admitted

    def on_admitted(self, context: RequestContext, blocks: Sequence[int]) -> None:
        """REQUIRES: ``committed`` lists them already."""
        blocks = _own(blocks)
        self._entered(context, blocks)
        try:
            self._ask(self._policy.on_admitted, context, blocks)
        except BaseException as error:
            self._replace(context, f"on_admitted raised {said(error)}")

    def on_restored(self, context: RequestContext, paths: Sequence[Sequence[int]]) -> None:
        """As ``on_admitted``, for many paths, parents first. REQUIRES: ``committed`` lists them all."""
        for path in paths:
            self._entered(context, path)
        try:
            for path in paths:
                self._ask(self._policy.on_admitted, context, _own(path))
        except BaseException as error:
            self._replace(context, f"on_admitted raised {said(error)}")

    def victims(self, context: RequestContext, count: int) -> list[int]:
        """At least one while anything can go. In this order, each is an evictable leaf."""
        try:
            named = self._ask(_named, self._policy.victims, context, count)
        except BaseException as error:
            fault = f"victims raised {said(error)}"
        else:
            fault = self._wrong(named, count)
            if not named and self._tree.evictable_count():
                fault = f"victims named none, though {self._tree.evictable_count()} leaves could go"
        if not fault:
            return named
        self._replace(context, fault)
        named = list(self._policy.victims(context, count))
        assert not self._wrong(named, count)
        return named

    def victims_on(self, context: RequestContext, count: int, device: int) -> list[int]:
        """As ``victims``: of one device if the policy can tell them apart, and then perhaps none."""
        if self._devices is None:
            return self.victims(context, count)
        try:
            named = self._ask(_named_on, self._devices.victims_on, context, count, device)
        except BaseException as error:
            fault = f"victims_on raised {said(error)}"
        else:
            fault = self._wrong(named, count)
            if not fault and any(self._tree.device[block] != device for block in named):
                fault = f"victims_on named a block that is not on device {device}"
        if not fault:
            return named
        return list(self._replace(context, fault).victims_on(context, count, device))

    def on_evicted(self, context: RequestContext, blocks: Sequence[int], reason: str) -> None:
        """REQUIRES: ``committed`` lists them no longer."""
        blocks = _own(blocks)
        self._left(blocks, reason)
        try:
            self._ask(self._policy.on_evicted, blocks, reason)
        except BaseException as error:
            self._replace(context, f"on_evicted raised {said(error)}")

    def _ask(self, call: Callable[_P, _T], *given: _P.args, **named: _P.kwargs) -> _T:
        """Of the policy that decides. Ours that it falls back to is not timed: nothing would be left."""
        return call(*given, **named) if type(self._policy) is LeafLru else self._timed(call, *given, **named)

    def _timed(self, call: Callable[_P, _T], *given: _P.args, **named: _P.kwargs) -> _T:
        return call(*given, **named) if self.patience is None else self.patience.call(call, *given, **named)

    def _made(self, make_policy: MakePolicy) -> EvictionPolicy:
        """RAISES what the constructor raises, but nothing that would end more than the call."""
        try:
            return self._timed(make_policy, self._tree, self._capacity_bytes)
        except Exception:
            raise
        except BaseException as error:
            raise RuntimeError(f"its constructor raised {said(error)}") from error

    def _wrong(self, named: Sequence[int], count: int) -> str:
        """What breaks the contract, or nothing."""
        parent, children, holds = self._tree.parent, self._tree.children, self._tree.holds
        if len(named) <= count and self._plainly_right(named):
            return ""
        if len(named) > count:
            return f"victims named {len(named)} blocks, {count} were asked for"
        seen: set[int] = set()
        gone: dict[int, int] = {}
        for block in named:
            if not 0 <= block < len(children) or children[block] < 0:
                return f"victims named block {block}, which is not held"
            if holds[block]:
                return f"victims named block {block}, which is leased, pinned or being written"
            if children[block] != gone.get(block, 0):
                return f"victims named block {block}, which is no leaf"
            if block in seen:
                return f"victims named block {block} twice"
            seen.add(block)
            gone[parent[block]] = gone.get(parent[block], 0) + 1
        return ""

    def _plainly_right(self, named: Sequence[int]) -> bool:
        """Quickly, for what is named as a rule: branches, each from its leaf up. False proves nothing."""
        parent, children, holds = self._tree.parent, self._tree.children, self._tree.holds
        if not named or len(set(named)) < len(named) or min(named) < 0 or max(named) >= len(children):
            return False
        gone: dict[int, int] = {}
        bare = -1  # Has lost its only child to the block before.
        for block in named:
            if holds[block] or (block != bare and children[block] != gone.get(block, 0)):
                return False
            before = parent[block]
            if children[before] == 1:
                bare = before
            else:
                gone[before] = gone.get(before, 0) + 1
        return True

    def _replace(self, context: RequestContext, fault: str) -> LeafLru:
        assert type(self._policy) is not LeafLru, fault  # Ours is wrong: nothing is left to fall back to.
        self.faults += 1
        self.last_fault = f"{type(self._policy).__name__}: {fault}"[:_FAULT_CHARS_MAX]
        policy = LeafLru(self._tree, self._capacity_bytes)
        self._install(policy)
        held = self._committed()
        for block in held if self._recency is None else self._recency.oldest_first(held):
            policy.on_admitted(context, (block,))
        return policy


def said(error: BaseException) -> str:
    """What a policy raised, in its own words. RAISES it when it is not the policy's."""
    _raise_if_ours(error)
    try:
        return repr(error)[:_FAULT_CHARS_MAX]
    except BaseException as worse:  # Its words are others' code, too.
        _raise_if_ours(worse)
        return f"{type(error).__name__}, which cannot be shown"


def _raise_if_ours(error: BaseException) -> None:
    """A person may interrupt a command while a policy is at work; a node handles that signal itself."""
    if isinstance(error, KeyboardInterrupt) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        raise error


def _named(
    ask: Callable[[RequestContext, int], Sequence[int]], context: RequestContext, count: int
) -> list[int]:
    return [index(block) for block in islice(ask(context, count), count + 1)]


def _named_on(
    ask: Callable[[RequestContext, int, int], Sequence[int]], context: RequestContext, count: int, device: int
) -> list[int]:
    return [index(block) for block in islice(ask(context, count, device), count + 1)]


def _own(given: Sequence[_Each]) -> Sequence[_Each]:
    """For a policy: what it does with it changes nothing here."""
    return tuple(given) if type(given) is list else given
