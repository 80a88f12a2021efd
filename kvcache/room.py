"""Makes room for what is to be written: orphans go first, then what the policy names.

A victim of the size class that needs room frees a slot of it. A victim of another class frees nothing
that could be used, unless its whole extent goes: then the extent is *reclaimed*, that is, every block
in it goes with all that continues them, leaves first. So the class that holds the coldest leaf gives,
and no class can starve another for good. An extent is passed over while anything in it, or continuing
it, is leased, pinned, being written or parked.

The roots of a tree and its newest leaf may lie in one extent, and then reclaiming it would take a whole
hot tree for the sake of one cold leaf. So extents whose reclaim takes little beside themselves are
looked for first, colder ones before warmer; only if there is none, the one that takes least goes.

REQUIRES of the caller: what must not go (the parent of what is reserved) is held.

Where each arena is a device with its own room, the policy is asked for what is coldest on that device. If
that gives nothing, some block of the device goes with what continues it on others.

The sum: one call of the policy a request, 5 us a block that goes. Only when what is coldest lies in
extents that must stay is the policy asked again, for more, up to ``VICTIMS_MAX`` leaves: 20 ms at worst,
and what is warmer than all these is then taken to be worth keeping.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvcache.block import Slot
from kvcache.guard import PolicyGuard
from kvcache.holdings import Holdings
from kvcache.policy import RequestContext

VICTIMS_MAX = 4_096
_ASK_FACTOR = 4
_ASK_MORE = 16
_EXTRA_FACTOR = 2
_COSTLY_MAX = 8


class Room:
    def __init__(self, holdings: Holdings, guard: PolicyGuard) -> None:
        self._holdings = holdings
        self._guard = guard
        self.reclaimed_extents = 0

    def slots(self, context: RequestContext, arena: int, block_bytes: int, count: int) -> list[Slot]:
        """At most ``count`` slots; fewer when nothing more can go."""
        space = self._holdings.space
        if not space.fits(arena, block_bytes):
            return []
        allocate = space.allocate_many
        slots = allocate(arena, block_bytes, count)
        if len(slots) < count and self._evict_orphans():
            slots += allocate(arena, block_bytes, count - len(slots))
        while len(slots) < count and self._evict(context, arena, block_bytes, count - len(slots)):
            slots += allocate(arena, block_bytes, count - len(slots))
        return slots

    def ahead(self, context: RequestContext, arena: int, block_bytes: int, count: int) -> None:
        """Let go now what ``slots`` would have to let go before it could give ``count``. One step."""
        space = self._holdings.space
        missing = count - space.room(arena, block_bytes)
        if missing > 0 and space.fits(arena, block_bytes) and not self._evict_orphans():
            self._evict(context, arena, block_bytes, missing)

    def _evict_orphans(self) -> bool:
        tree = self._holdings.tree
        going: list[int] = []
        for orphan in tree.orphans():
            gone: dict[int, int] = {}
            for block in reversed(tree.subtree(orphan)):
                if not tree.holds[block] and tree.children[block] == gone.get(block, 0):
                    going.append(block)
                    parent = tree.parent[block]
                    gone[parent] = gone.get(parent, 0) + 1
        self._holdings.evict(going, "orphaned")
        return bool(going)

    def _evict(self, context: RequestContext, arena: int, block_bytes: int, count: int) -> bool:
        """One step: at least one block has gone that makes room, or False: none can."""
        ask = count
        while True:
            named = self._coldest(context, arena, ask)
            if self._take(named, arena, block_bytes, count):
                return True
            if len(named) < ask or ask >= VICTIMS_MAX:
                break
            ask = min(VICTIMS_MAX, ask * _ASK_FACTOR + _ASK_MORE)
        if self._take_much(named, arena, block_bytes):
            return True
        if not self._holdings.space.layout.own_budgets:
            return False
        # What lies there may all be covered by blocks of other devices.
        return self._take_much(self._guard.victims(context, VICTIMS_MAX), arena, block_bytes)

    def _coldest(self, context: RequestContext, arena: int, count: int) -> list[int]:
        """Of one device, where what another frees would be no help, and the policy can tell; else of all."""
        if self._holdings.space.layout.own_budgets:
            return self._guard.victims_on(context, count, arena)
        return self._guard.victims(context, count)

    def _take_much(self, named: Sequence[int], arena: int, block_bytes: int) -> bool:
        """Let go more than what is needed, or what cannot be used now, where nothing else is left."""
        return self._reclaim_least(named, arena, block_bytes) or self._take_branch(named, arena, block_bytes)

    def _take(self, named: Sequence[int], arena: int, block_bytes: int, count: int) -> bool:
        """Evict ``count`` of the blocks named, in order, or until an extent could be reclaimed."""
        holdings = self._holdings
        going: list[int] = []
        gone: dict[int, int] = {}
        seen: set[Slot] = set()
        for block in named:
            slot = holdings.slot[block]
            if holdings.space.same_class(slot, arena, block_bytes):
                if holdings.tree.children[block] != gone.get(block, 0):
                    continue  # One that continues it was passed over, so this is still no leaf.
                going.append(block)
                parent = holdings.tree.parent[block]
                gone[parent] = gone.get(parent, 0) + 1
                if len(going) == count:
                    break
            elif slot not in seen:
                lying = holdings.space.in_the_way(arena, block_bytes, slot)
                seen.update(lying)
                if self._reclaim(lying, len(lying) * _EXTRA_FACTOR):
                    # The reclaim may have taken some of them, with what continued them.
                    going = [each for each in going if holdings.tree.children[each] >= 0]
                    holdings.evict(going, "evicted")
                    return True
        holdings.evict(going, "evicted")
        return bool(going)

    def _reclaim_least(self, named: Sequence[int], arena: int, block_bytes: int) -> bool:
        """Of the few extents that hold the coldest leaves, reclaim the one that takes least with it."""
        holdings = self._holdings
        seen: set[Slot] = set()
        found: list[list[int]] = []
        for block in named:
            slot = holdings.slot[block]
            if slot in seen or len(found) == _COSTLY_MAX:
                continue
            lying = holdings.space.in_the_way(arena, block_bytes, slot)
            seen.update(lying)
            closure = self._closure(lying, len(holdings.slot))
            if closure:
                found.append(closure)
        if not found:
            return False
        self._go(min(found, key=len))
        return True

    def _take_branch(self, named: Sequence[int], arena: int, block_bytes: int) -> bool:
        """Evict one block of the class with all that continues it, though that is of another class and
        cannot be used now. (A tenant's trust domains continue one another's blocks, each in its arena.)"""
        holdings = self._holdings
        for block in named:
            slot = holdings.slot[block]
            if holdings.space.same_class(slot, arena, block_bytes):
                closure = self._closure([slot], len(holdings.slot))
                if closure:
                    holdings.evict(closure, "evicted")
                    return True
        return False

    def _reclaim(self, lying: Sequence[Slot], limit: int) -> bool:
        closure = self._closure(lying, limit)
        if closure:
            self._go(closure)
        return bool(closure)

    def _go(self, closure: Sequence[int]) -> None:
        self.reclaimed_extents += 1
        self._holdings.evict(closure, "reclaimed")

    def _closure(self, slots: Sequence[Slot], limit: int) -> list[int]:
        """The blocks in these slots and all that continues them, leaves first. Empty when one of them
        must stay, or when they are over ``limit``."""
        tree, holdings = self._holdings.tree, self._holdings
        found: dict[int, None] = {}
        for slot in slots:
            block = holdings.at(slot)
            if block in found:
                continue
            if block < 0 or tree.children[block] < 0:
                return []
            fresh: list[int] = []
            walk = [block]
            while walk:
                each = walk.pop()
                fresh.append(each)
                if tree.holds[each] or len(found) + len(fresh) > limit:
                    return []
                if tree.children[each]:
                    walk.extend(child for child in tree.children_of(each) if child not in found)
            found.update(dict.fromkeys(reversed(fresh)))
        return list(found)
