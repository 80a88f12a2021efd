"""What followers are told to be in HBM: what each engine of the node that could use a block has on its GPU.

    GPU 0   ████████░░   two replicas       a block is told when the last slab whose engines
    GPU 1   ██████░░░░   told: ██████░░░░   use its namespace has it, and gone when the first lets it go

Followers know a node, and not its GPUs: what one of two replicas has would be taken for the other's, which
cannot reach it. So a router may not be told of a block that is there, and is told of none that is not. Ranks
of one engine have namespaces of their own, so the GPU of each is the only one that counts for its blocks.

Invariants: what is told is found in every slab that is used for its namespace and is not lost, once changes
have been taken; what a told block continues was told. What a lost slab kept from being told stays untold
until it is stored anew; a slab counts as used for as long as the node runs.

The sum: 1 us a block and slab.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import takewhile

from kvcache.block import HASH_BYTES, NamespaceId, StorageKey
from kvcache.ledger import Change


class HbmTelling:
    """One owner; decides only."""

    def __init__(self, is_lost: Callable[[int], bool], has: Callable[[int, StorageKey], bool]) -> None:
        """Of a slab by its number. ``has``: can this block be found there?"""
        self._is_lost = is_lost
        self._has = has
        self._users: dict[NamespaceId, set[int]] = {}
        self._told: dict[NamespaceId, set[StorageKey]] = {}
        self._widened: set[NamespaceId] = set()  # More slabs are used for them than were.

    def used(self, number: int, namespace: NamespaceId) -> None:
        """An engine that maps this slab uses this namespace."""
        users = self._users.setdefault(namespace, set())
        if number not in users:
            users.add(number)
            self._widened.add(namespace)

    def changes(self, taken: Iterable[Change]) -> Iterator[Change]:
        """What is to be told, after these of the slabs. REQUIRES: all that there were until now."""
        for namespace in self._widened:
            yield from self._gone(tuple(self._told.get(namespace, ())), "other")
        self._widened.clear()
        for change in taken:
            yield from (
                self._stored(change) if change.kind == "stored" else self._gone(change.keys, change.reason)
            )

    def check(self) -> None:
        """Assert every invariant. REQUIRES: no change is left to take."""
        for namespace, told in self._told.items():
            assert told
            assert all(key[:HASH_BYTES] == namespace and self._is_everywhere(key) for key in told)

    def _stored(self, change: Change) -> Iterator[Change]:
        namespace = _namespace(change.keys[0])
        told = self._told.get(namespace, set())
        first = sum(1 for _ in takewhile(told.__contains__, change.keys))
        parent = change.keys[first - 1] if first else change.parent
        fresh = tuple(takewhile(self._is_everywhere, change.keys[first:]))
        if fresh and (parent is None or parent in told):
            self._told.setdefault(namespace, set()).update(fresh)
            yield Change("stored", fresh, parent, change.reason)

    def _gone(self, keys: tuple[StorageKey, ...], reason: str) -> Iterator[Change]:
        gone = tuple([key for key in keys if self._is_told(key) and not self._is_everywhere(key)])
        for key in gone:
            told = self._told[_namespace(key)]
            told.discard(key)
            if not told:
                del self._told[_namespace(key)]
        if gone:
            yield Change("removed", gone, None, reason)

    def _is_told(self, key: StorageKey) -> bool:
        return key in self._told.get(_namespace(key), ())

    def _is_everywhere(self, key: StorageKey) -> bool:
        numbers = [each for each in self._users.get(_namespace(key), ()) if not self._is_lost(each)]
        return bool(numbers) and all(self._has(each, key) for each in numbers)


def _namespace(key: StorageKey) -> NamespaceId:
    return NamespaceId(key[:HASH_BYTES])
