"""A ledger with everybody who uses it, as a model that knows nothing of the ledger but its answers.

The model has memory: a byte array an arena. Writers write whatever they like into their slots, at any
time until they have said that they stopped, or have ended; the vanished ones go on writing. The right
bytes of a block are its generation. What must hold: a release that says "intact" means that every
byte read under the lease was right; what readers are told by changes is what match finds; memory is
used only where the space granted it, and within the capacity.

Each method is one deed of one user and asserts what its answer must be. Play them in any order, with
``check`` after each and ``end`` at the end. ``which`` picks one of the open writes, leases or blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import TypeVar

from kvcache.block import Slot, StorageKey
from kvcache.errors import BadInput
from kvcache.ledger import Lease, Ledger, Reservation
from kvcache.policy import HINTS, PRIORITY_MAX, EvictionPolicy, RequestContext
from kvcache.testing.ledger_world import HOST, Memory, World
from kvcache.tiers.space import slot_arena

STRANGER = "cat"  # of the same tenant, but another trust domain: writes the same keys into the other arena
OWNERS = ("ann", "bob", "cat")


Item = TypeVar("Item")


def pick(items: Sequence[Item], which: int) -> Item:
    return items[which % len(items)]


def refused(code: str, call: Callable[[], object]) -> None:
    try:
        call()
    except BadInput as error:
        assert error.code == code
    else:
        raise AssertionError(f"nobody refused with {code}")


def chain(namespace: str, steps: str) -> list[StorageKey]:
    return [StorageKey(f"{namespace}:{steps[: end + 1]}".encode()) for end in range(len(steps))]


@dataclass(frozen=True, slots=True)
class Reader:
    owner: str
    lease: Lease


@dataclass(frozen=True, slots=True)
class Writer:
    owner: str
    reservation: Reservation


class LedgerModel:
    """A ledger, everybody who uses it, and the memory they share."""

    def __init__(self, policy: type[EvictionPolicy], *, trusted: bool, world: World = HOST) -> None:
        """``trusted``: the policy must never be replaced."""
        self.trusted = trusted
        self.world = world
        self.space = world.space()
        self.ledger = Ledger(self.space, policy)
        self.memory = Memory(world)
        self.now_ns = 1
        self._said = Random(1)
        self.found: dict[StorageKey, StorageKey | None] = {}  # what readers were told of, and its parent
        self.generation: dict[StorageKey, int] = {}
        self.content: dict[int, int] = {}  # generation of a block that came back -> its bytes
        self.last_generation = 0
        self.pinned: set[StorageKey] = set()
        self.readers: list[Reader] = []
        self.writers: list[Writer] = []
        self.vanished: list[Writer] = []
        self.quarantined: list[tuple[int, Slot, int]] = []

    def settle(self) -> None:
        """What the node does after every call."""
        for move in self.space.take_moves():
            self.memory.move(move)
        for change in self.ledger.take_changes():
            if change.kind == "removed":
                for key in change.keys:
                    del self.found[key]
                    if change.reason not in ("quarantined", "fenced"):
                        assert key not in self.pinned
                    self.pinned.discard(key)
                continue
            before = change.parent
            for key in change.keys:
                assert key not in self.found
                assert before == (key[:-1] if len(key) > len("m:a") else None)
                self.found[key] = before
                before = key
                self.stored(key)

    def context(self) -> RequestContext:
        """Of somebody who says more about a request than is good for anybody."""
        said = self._said
        return RequestContext(
            now_ns=self.now_ns,
            tenant=said.choice(("", "ann", "bob")),
            session=said.randrange(-1, 3),
            hint=said.choice(HINTS),
            priority=said.choice((50, 50, 0, 20, 80, 100)),
            expected_gap_ms=said.choice((None, 0, 1)),
            keep_ms=said.choice((None, 0, 1)),
        )

    # --- writers --------------------------------------------------------------------------------

    def reserve(self, owner: str, namespace: str, steps: str, cut: int) -> None:
        keys = chain(namespace, steps)
        cut = min(cut, len(keys) - 1)
        parent = keys[cut - 1] if cut else None
        arena, block_bytes = self.world.sizes[namespace]
        arena = 1 - arena if owner == STRANGER else arena
        try:
            made = self.ledger.reserve(arena, parent, keys[cut:], block_bytes, owner, self.context())
        except BadInput as refused:
            assert refused.code == "bad_prefix"
            assert parent is not None
            assert parent not in self.found
            return
        finally:
            self.settle()
        if made.keys:
            assert not any(w.owner != owner and parent in w.reservation.keys for w in self.writers)
        at = cut + made.start
        assert made.keys == tuple(keys[at : at + len(made.keys)])
        assert bool(made.reservation_id) == bool(made.keys)
        assert bool(made.reason) == (at + len(made.keys) < len(keys) or not made.keys)
        assert not self.found.keys() & set(made.keys)
        for slot, generation in zip(made.slots, made.generations, strict=True):
            assert generation > self.last_generation
            self.last_generation = generation
            assert slot_arena(slot) == arena
            for until_ns, dirty, length in self.quarantined:
                assert until_ns <= self.now_ns or not self.memory.overlap(slot, block_bytes, dirty, length)
            self.begins(slot, block_bytes, generation)
            self.memory.fill(slot, block_bytes, -generation & 0xFFFF)  # Half written.
        if made.reservation_id:
            self.writers.append(Writer(owner, made))
        if made.reason == "full":
            self.nothing_of_this_class_could_go(arena, block_bytes, keys[at + len(made.keys) - 1 :: -1])

    def begins(self, slot: Slot, block_bytes: int, generation: int) -> None:
        """A writer has got this slot."""

    def stored(self, key: StorageKey) -> None:
        """Readers were told of it."""

    def make_room(self, namespace: str, count: int) -> None:
        """Evicting ahead gives nothing away: what it frees, the next writer gets."""
        arena, block_bytes = self.world.sizes[namespace]
        self.ledger.make_room(self.context(), arena, block_bytes, count)
        self.settle()

    def nothing_of_this_class_could_go(
        self, arena: int, block_bytes: int, standing: list[StorageKey]
    ) -> None:
        holdings = self.ledger._holdings
        for block in holdings.tree.linked():
            if self.space.same_class(holdings.slot[block], arena, block_bytes):
                after = holdings.tree.subtree(block)
                held = any(holdings.tree.holds[each] for each in after)
                assert held or any(holdings.tree.key[each] in standing for each in after)

    def commit(self, which: int) -> None:
        self.publish(pick(self.writers, which))

    def save(self, owner: str, namespace: str, steps: str, fork: bool) -> None:
        """Reserve and commit: so that there is something to read, lose and evict."""
        before = len(self.writers)
        self.reserve(owner, namespace, steps, 0)
        for writer in self.writers[before:]:
            self.publish(writer)
        if fork:
            self.save(owner, namespace, steps[: len(steps) // 2] + "b", False)

    def publish(self, writer: Writer) -> None:
        made = writer.reservation
        assert self.ledger.reserved(made.reservation_id, writer.owner) == made
        for slot, generation in zip(made.slots, made.generations, strict=True):
            self.memory.fill(slot, made.block_bytes, generation)
        refused("bad_block", lambda: self.ledger.commit(made.reservation_id, writer.owner, [], []))
        sums = [bytes([generation % 256]) for generation in made.generations]
        assert self.ledger.commit(made.reservation_id, writer.owner, sums, sums) == len(made.keys)
        self.settle()
        self.writers.remove(writer)
        self.generation.update(zip(made.keys, made.generations, strict=True))
        self.is_over(writer)

    def abort(self, which: int) -> None:
        writer = pick(self.writers, which)
        self.ledger.abort(writer.reservation.reservation_id, writer.owner)
        self.settle()
        self.writers.remove(writer)
        self.is_over(writer)

    def shorten(self, which: int, count: int) -> None:
        writer = pick(self.writers, which)
        made = writer.reservation
        left = self.ledger.shorten(made.reservation_id, writer.owner, count)
        self.settle()
        assert (left.keys, left.slots) == (made.keys[:count], made.slots[:count])
        self.writers.remove(writer)
        if left.reservation_id:
            self.writers.append(Writer(writer.owner, left))
        else:
            self.is_over(writer)

    def is_over(self, writer: Writer) -> None:
        number = writer.reservation.reservation_id
        refused("bad_reservation", lambda: self.ledger.commit(number, writer.owner, [], []))
        refused("bad_reservation", lambda: self.ledger.abort(number, writer.owner))
        refused("bad_reservation", lambda: self.ledger.reserved(number, writer.owner))

    def scribble(self, which: int) -> None:
        """A writer, perhaps one that vanished long ago, writes into a slot it was given."""
        made = pick(self.writers + self.vanished, which).reservation
        self.memory.fill(pick(made.slots, which), made.block_bytes, 0xBAD)

    # --- readers --------------------------------------------------------------------------------

    def match(self, namespace: str, steps: str) -> None:
        keys = chain(namespace, steps)
        assert self.ledger.match(keys) == self.leading(keys)

    def leading(self, keys: list[StorageKey]) -> int:
        return next((at for at, key in enumerate(keys) if key not in self.found), len(keys))

    def lease(self, owner: str, namespace: str, steps: str, length_ns: int, request: str) -> None:
        keys = chain(namespace, steps)
        lease = self.ledger.lease(keys, owner, self.now_ns + length_ns, self.context(), request)
        if request and any(reader.lease.lease_id == lease.lease_id for reader in self.readers):
            self.readers = [r for r in self.readers if (r.owner, r.lease.lease_id) != (owner, lease.lease_id)]
        else:
            assert len(lease.keys) == self.leading(keys)
        if lease.lease_id:
            assert lease.expires_ns >= self.now_ns + length_ns
            assert lease.keys == tuple(keys[: len(lease.keys)])
            self.readers.append(Reader(owner, lease))
            self.read(lease)

    def borrow(self, owner: str, first: int, count: int, length_ns: int) -> None:
        keys = [pick([*sorted(self.found), StorageKey(b"m:!")], first * at) for at in range(1, count + 1)]
        lease = self.ledger.borrow(keys, owner, self.now_ns + length_ns)
        sizes = [self.world.sizes[chr(key[0])][1] for key in keys]
        same = [key in self.found and size == sizes[0] for key, size in zip(keys, sizes, strict=True)]
        assert len(lease.keys) == [*same, False].index(False)
        if lease.lease_id:
            self.readers.append(Reader(owner, lease))
            self.read(lease)

    def look(self, key: StorageKey) -> Lease:
        """What is known of a block that can be found. A lease that has ended."""
        lease = self.ledger.borrow([key], "dog", self.now_ns + 1)
        self.ledger.release(lease.lease_id, "dog", self.now_ns)
        return lease

    def read(self, lease: Lease) -> None:
        for slot, generation in zip(lease.slots, lease.generations, strict=True):
            value = self.content.get(generation, generation)
            assert self.memory.is_filled(slot, lease.block_bytes, value), "wrong bytes under a lease"

    def release(self, which: int) -> None:
        reader = pick(self.readers, which)
        self.readers.remove(reader)
        intact = self.ledger.release(reader.lease.lease_id, reader.owner, self.now_ns)
        if intact:
            self.read(reader.lease)
        assert intact or reader.lease.expires_ns <= self.now_ns
        number = reader.lease.lease_id
        refused("bad_lease", lambda: self.ledger.release(number, reader.owner, self.now_ns))

    def live_leases_read_right(self) -> None:
        for reader in self.readers:
            try:
                lease = self.ledger.leased(reader.lease.lease_id, reader.owner)
            except BadInput:
                assert reader.lease.expires_ns <= self.now_ns
            else:
                assert lease.slots == reader.lease.slots
                self.read(lease)

    # --- everything else ------------------------------------------------------------------------

    def time_passes(self, step_ns: int) -> None:
        self.now_ns += step_ns
        self.ledger.expire(self.now_ns)
        self.settle()
        self.quarantined = [entry for entry in self.quarantined if entry[0] > self.now_ns]

    def disconnect(self, owner: str, writes_ended: bool) -> None:
        self.ledger.disconnect(owner, writes_ended)
        self.settle()
        self.readers = [reader for reader in self.readers if reader.owner != owner]
        theirs = [writer for writer in self.writers if writer.owner == owner]
        self.writers = [writer for writer in self.writers if writer.owner != owner]
        if not writes_ended:
            self.vanished += theirs
        else:
            self.vanished = [writer for writer in self.vanished if writer.owner != owner]
        for writer in theirs:
            self.is_over(writer)

    def writes_ended(self, owner: str) -> None:
        self.ledger.writes_ended(owner)
        self.settle()
        self.vanished = [writer for writer in self.vanished if writer.owner != owner]

    def pin(self, namespace: str, steps: str) -> None:
        keys = chain(namespace, steps)
        count = self.ledger.pin(keys)
        assert count == self.leading(keys)
        self.pinned.update(keys[:count])

    def unpin(self, namespace: str, steps: str) -> None:
        keys = chain(namespace, steps)
        assert self.ledger.unpin(keys) >= len(self.pinned & set(keys))
        self.pinned -= set(keys)

    def quarantine(self, which: int, length_ns: int, stale: bool) -> None:
        key = pick(sorted(self.found), which)
        lease = self.look(key)
        assert lease.generations == (self.generation[key],)
        until_ns = self.now_ns + length_ns
        done = self.ledger.quarantine(key, lease.generations[0] - stale, until_ns)
        assert done == (not stale)
        self.settle()
        assert (key in self.found) == stale
        if done:
            self.quarantined.append((until_ns, lease.slots[0], lease.block_bytes))

    def change_policy(self, policy: type[EvictionPolicy]) -> None:
        """Another is to decide, once it has been told of everything (``change_step``)."""
        self.ledger.policy.begin_change(policy, with_state=False)

    def change_step(self, count: int) -> None:
        if self.ledger.policy.change_step(count):
            assert not self.trusted or not self.ledger.policy.change_fault, self.ledger.policy.change_fault

    def check(self) -> None:
        """What must hold after every deed."""
        self.live_leases_read_right()
        self.ledger.check()
        for key in self.found:
            generation = self.generation[key]
            expected = b"" if generation in self.content else bytes([generation % 256])
            assert self.ledger.chunk_sums(key) == expected
            assert self.ledger.has(key)
            before = next(islice(self.ledger.ancestors(key), 1, None), None)
            assert before == self.found[key]
            assert before is None or before in self.found
        assert not self.trusted or self.ledger.policy.last_fault == "", self.ledger.policy.last_fault

    def end(self) -> None:
        """When all have gone and time has passed, every byte can be had again."""
        for owner in (*OWNERS, "dog"):
            self.ledger.disconnect(owner, writes_ended=True)
        for keys in [[key] for key in self.found]:
            self.ledger.unpin(keys)
        self.ledger.expire(self.now_ns + 1_000)
        holdings = self.ledger._holdings
        holdings.unpin([block for block in holdings.tree.linked() if holdings.is_pinned(block)])
        for namespace, (arena, block_bytes) in self.world.sizes.items():
            keys = chain(namespace, "c" * 40)
            wanted = RequestContext(now_ns=self.now_ns, priority=PRIORITY_MAX)
            made = self.ledger.reserve(arena, None, keys, block_bytes, "eve", wanted)
            assert len(made.keys) == len(self.world.space().allocate_many(arena, block_bytes, 40))
            self.ledger.abort(made.reservation_id, "eve")
            self.ledger.check()
