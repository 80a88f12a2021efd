"""The host tier: memory for blocks, as memfds that local engines map.

One *arena* is one memfd, one a trust domain (uid, tenant), so that what an engine can scribble on is
only what it could have written anyway. An arena is sealed against shrinking and growing: measured, an
engine's ``ftruncate(0)`` otherwise ends the node with SIGBUS. Its address space is the tier's whole
capacity, but all arenas together are never resident beyond it: a unit that an arena gave back stays with
it until another arena needs the memory, and is punched out then. (Punching at once would make the next
writer pay for fresh, zeroed pages: three times the price of the copy itself.)

A connection whose process registers the arena with its GPU *pins* it. The GPU goes on copying from and to the
pages that were there then, so an arena is never punched under a pin. Pins hold no memory against others: they
are given only while no other arena holds blocks, and where memory must leave the arena after all, the
connection is ended first; what it copies from then on counts nowhere.

    not pinned ── pin ──► pinned ── unpin: the connection has ended ──────────────► not pinned
                             └───── memory must leave: the connection is ended ──────┘ punched

The node's own transports register with network cards, which keep the pages that were there as well. So they
are told of each unit when it is granted, and before it is punched. Such a unit holds no block and is in no
transfer: nothing has to be waited for. It is punched through this process's map, and not by the descriptor,
because that is what UCX sees, which keeps registrations in a cache, also when they were given up.

Invariants: memory that the node reads or writes lies in a granted extent; units resident in all arenas
are at most those of the capacity; the descriptor handed out is the arena's own, mode 0600, and carries
every seal in ``memfd.SEALS``; no unit is punched in an arena that is pinned, nor one that transports know;
they know every granted unit, and none that has no pages.

The sum: populating costs 0.3 to 0.5 s a GiB of 4 KiB pages (zeroing and page tables), once, at start;
afterwards the tier costs nothing: bytes are copied by those who use them.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from kvcache import memfd
from kvcache.block import Slot
from kvcache.errors import BadInput
from kvcache.tiers.space import Move, slot_arena, slot_offset

HUGE_PAGE_BYTES = 2 << 20

_MADV_REMOVE = 9
_MADV_POPULATE_WRITE = 23
_POPULATE_STEP_BYTES = 64 << 20

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Registrar(Protocol):
    """Who moves blocks from and to this memory with devices that keep its pages: ``kvcache.peers.plane``."""

    def register(self, memory: memoryview) -> None:
        """A unit that keeps its pages until ``forget``."""

    def forget(self, memory: memoryview) -> None:
        """The same view. Its pages go when this returns; no transfer has any of it."""


@dataclass(frozen=True, slots=True)
class Arena:
    """One trust domain's memory. ``address`` is where this process maps it; ``granted`` and ``idle``
    are the units that have pages, in use and given back, ``told`` those that the registrar knows. ``pins``
    are by owner, each with what ends it."""

    name: str
    descriptor: int
    memory: mmap.mmap
    address: int
    granted: set[int] = field(default_factory=set)
    idle: set[int] = field(default_factory=set)
    told: dict[int, memoryview] = field(default_factory=dict)
    pins: dict[int, Callable[[], None]] = field(default_factory=dict)


class HostTier:
    """Arenas of ``capacity_bytes`` address space each. One owner; populate and punch may run in a thread."""

    def __init__(
        self,
        capacity_bytes: int,
        unit_bytes: int,
        *,
        huge_pages: bool = False,
        registrar: Registrar | None = None,
    ) -> None:
        """``unit_bytes`` is that of ``Space``: moves are whole units. ``huge_pages`` asks for reserved
        2 MiB pages; see ``huge_pages_free_bytes``."""
        self.huge_pages = huge_pages
        self._registrar = registrar
        self._unit_bytes = unit_bytes
        self._unit_count = capacity_bytes // unit_bytes
        step = HUGE_PAGE_BYTES if huge_pages else mmap.PAGESIZE
        self.capacity_bytes = -(-capacity_bytes // step) * step
        self.coming_bytes = 0
        """On their way into reserved slots, from NVMe or a peer: counted here by who brings them."""
        self.ended_pins = 0
        """Pins that were ended because their memory had to go to another arena."""
        self._arenas: list[Arena] = []
        self._closed = False

    def add_arena(self, name: str) -> int:
        """A new, empty arena. The number is the one ``Space.add_arena`` gave for it.

        RAISES BadInput when the system refuses the memory."""
        descriptor = -1
        try:
            descriptor = memfd.create(name, self.capacity_bytes, huge_pages=self.huge_pages)
            memory = mmap.mmap(descriptor, self.capacity_bytes)
        except OSError as error:
            if descriptor >= 0:
                os.close(descriptor)
            raise BadInput(
                "bad_config",
                f"no {self.capacity_bytes} bytes of memory for the host tier",
                str(error),
                "lower --capacity, or raise the limit named",
            ) from error
        memory.madvise(mmap.MADV_DONTFORK)
        if not self.huge_pages:
            memory.madvise(mmap.MADV_HUGEPAGE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._arenas.append(Arena(name, descriptor, memory, address))
        return len(self._arenas) - 1

    def descriptor(self, arena: int) -> int:
        return self._arenas[arena].descriptor

    def view(self, slot: Slot, length: int) -> memoryview:
        """The bytes of a slot. REQUIRES: the slot is granted, and nobody else owns it just now."""
        offset = slot_offset(slot)
        assert offset + length <= self.capacity_bytes
        return memoryview(self._arenas[slot_arena(slot)].memory)[offset : offset + length]

    def apply(self, moves: Iterable[Move]) -> None:
        """Follow what ``Space`` granted and took back, in its order; memory goes where it is needed."""
        gained: list[tuple[Arena, int]] = []
        for move in moves:
            here = self._arenas[move.arena]
            first = move.offset // self._unit_bytes
            units = set(range(first, first + move.length // self._unit_bytes))
            if move.gained:
                here.idle.difference_update(units)
                here.granted.update(units)
                gained += [(here, unit) for unit in sorted(units)]
            else:
                here.granted.difference_update(units)
                here.idle.update(units)
        self._shrink()
        if self._registrar is not None:  # Now that there is room for their pages.
            self._tell(self._registrar, gained)

    def resident_units(self) -> int:
        """Units with pages, or about to have them, in all arenas. At most those of the capacity."""
        return sum(len(arena.granted) + len(arena.idle) for arena in self._arenas)

    # --- pins -----------------------------------------------------------------------------------

    @property
    def pin_count(self) -> int:
        return sum(len(arena.pins) for arena in self._arenas)

    def unit_to_pin(self, arena: int) -> int:
        """The bytes of a unit, when the arena may be pinned now; else 0: another holds blocks, which may need
        its memory."""
        others = (other for number, other in enumerate(self._arenas) if number != arena)
        return 0 if any(other.granted for other in others) else self._unit_bytes

    def pin(self, arena: int, owner: int, end: Callable[[], None]) -> None:
        """The owner's process registers what it maps of the arena. When ``end`` has returned, nothing counts
        that this process copies for the owner. REQUIRES: ``unit_to_pin``, just now."""
        self._arenas[arena].pins[owner] = end

    def unpin(self, owner: int) -> None:
        """The owner's connection has ended, and with it all that its copies are for. May be called twice."""
        for arena in self._arenas:
            arena.pins.pop(owner, None)

    # --- residence ------------------------------------------------------------------------------

    def populate(self, arena: int) -> None:
        """Make all of the arena resident now, not at first touch. May take seconds. REQUIRES: it is the
        only arena yet. Ends early when the tier is closed meanwhile. RAISES BadInput when there is not
        that much memory."""
        here, length = self._arenas[arena], self.capacity_bytes
        here.idle.update(set(range(self._unit_count)) - here.granted)
        for start in range(0, length, _POPULATE_STEP_BYTES):
            if self._closed:
                return
            step = min(_POPULATE_STEP_BYTES, length - start)
            if _libc.madvise(here.address + start, step, _MADV_POPULATE_WRITE) != 0:
                number = ctypes.get_errno()
                if number == 22:  # A kernel before 5.14 does not know the advice: first touch it is.
                    return
                raise BadInput(
                    "bad_config",
                    f"memory ran out at {start} of {length} bytes",
                    os.strerror(number),
                    "lower --capacity",
                )

    def close(self) -> None:
        """Forget the memory. Engines that still map it keep it until they unmap. May be called twice."""
        self._closed = True
        for arena in self._arenas:
            os.close(arena.descriptor)
        self._arenas.clear()

    def _tell(self, registrar: Registrar, gained: Iterable[tuple[Arena, int]]) -> None:
        for arena, unit in gained:
            if unit not in arena.told:
                start = unit * self._unit_bytes
                arena.told[unit] = memoryview(arena.memory)[start : start + self._unit_bytes]
                registrar.register(arena.told[unit])

    def _shrink(self) -> None:
        """Punch out idle units until all arenas together fit the capacity again."""
        excess = self.resident_units() - self._unit_count
        for arena in sorted(self._arenas, key=lambda each: len(each.pins) > 0):
            while excess > 0 and arena.idle:
                self._end_pins(arena)
                self._punch(arena, arena.idle.pop())
                excess -= 1
        assert excess <= 0, "more units are granted than there are"

    def _end_pins(self, arena: Arena) -> None:
        while arena.pins:
            _, end = arena.pins.popitem()
            end()
            self.ended_pins += 1

    def _punch(self, arena: Arena, unit: int) -> None:
        assert not arena.pins, "a GPU would go on copying from and to the pages that go"
        if self._registrar is not None and (told := arena.told.pop(unit, None)) is not None:
            self._registrar.forget(told)
        start = arena.address + unit * self._unit_bytes
        done = _libc.madvise(start, self._unit_bytes, _MADV_REMOVE)
        assert done == 0, os.strerror(ctypes.get_errno())

    def check(self) -> None:
        """Assert every invariant."""
        assert self.resident_units() <= self._unit_count
        for arena in self._arenas:
            assert not arena.granted & arena.idle
            assert arena.told.keys() <= arena.granted | arena.idle
            assert self._registrar is None or arena.told.keys() >= arena.granted


def memory_available_bytes() -> int:
    """What the kernel says can be had without swapping."""
    return _meminfo("MemAvailable") * 1024


def huge_pages_free_bytes() -> int:
    """Reserved 2 MiB pages that nobody uses yet."""
    if _meminfo("Hugepagesize") * 1024 != HUGE_PAGE_BYTES:
        return 0
    return _meminfo("HugePages_Free") * HUGE_PAGE_BYTES


def _meminfo(name: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0])
    return 0
