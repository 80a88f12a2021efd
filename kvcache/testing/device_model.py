"""``ledger_model`` over two devices, which are lost and come back with what they had.

The model keeps each device's index: what was committed into a slot is in it until the slot is given to a
writer again, or one that overlaps it, whatever the ledger has forgotten meanwhile. What comes back is
any part of that, in any order, with entries among it that no ledger may take.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from kvcache.block import Slot, StorageKey
from kvcache.errors import BadInput
from kvcache.holdings import State
from kvcache.ledger import Restored
from kvcache.policy import EvictionPolicy
from kvcache.testing.ledger_model import LedgerModel, Writer
from kvcache.testing.ledger_world import DEVICES
from kvcache.tiers.space import slot_arena


class DeviceModel(LedgerModel):
    def __init__(self, policy: type[EvictionPolicy], *, trusted: bool) -> None:
        super().__init__(policy, trusted=trusted, world=DEVICES)
        self.disk: dict[Slot, Restored] = {}
        self.bytes_at: dict[Slot, int] = {}
        self.begun: set[int] = set()

    def begins(self, slot: Slot, block_bytes: int, generation: int) -> None:
        self.begun.add(generation)
        for other, entry in list(self.disk.items()):
            if self.memory.overlap(slot, block_bytes, other, entry.block_bytes):
                del self.disk[other]

    def publish(self, writer: Writer) -> None:
        super().publish(writer)
        made = writer.reservation
        for key, slot, generation in zip(made.keys, made.slots, made.generations, strict=True):
            before = StorageKey(key[:-1]) if len(key) > len("m:a") else None
            self.disk[slot] = Restored(key, before, slot, made.block_bytes, b"back")
            self.bytes_at[slot] = generation

    def stored(self, key: StorageKey) -> None:
        lease = self.look(key)
        if lease.lease_id and lease.generations[0] not in self.begun:
            assert lease.checksums == (b"back",)
            assert self.disk[lease.slots[0]].key == key
            self.generation[key] = lease.generations[0]
            self.content[lease.generations[0]] = self.bytes_at[lease.slots[0]]

    def lose(self, device: int, length_ns: int) -> None:
        """Its blocks go at once; where somebody reads, the slot is kept aside for a while."""
        until_ns = self.now_ns + length_ns
        self.quarantined += [(until_ns, *read) for read in self.being_read() if slot_arena(read[0]) == device]
        part = 2 if length_ns % 2 else None
        while self.ledger.withdraw_arena(device, until_ns, part):
            self.settle()
            self.ledger.check()
        assert all(slot_arena(self.look(key).slots[0]) != device for key in self.found)

    def blink(self, device: int, seed: int) -> None:
        """It is lost, and back before anybody has written anything."""
        self.lose(device, 0)
        self.time_passes(1)
        self.restore(device, seed)

    def being_read(self) -> Iterator[tuple[Slot, int]]:
        """Slots under a lease, and the size of their blocks, but for those that are in quarantine."""
        holdings = self.ledger._holdings
        for reader in self.readers:
            try:
                lease = self.ledger.leased(reader.lease.lease_id, reader.owner)
            except BadInput:
                continue
            for slot in lease.slots:
                if holdings.state(holdings.at(slot)) is not State.PARKED:
                    yield slot, lease.block_bytes

    def restore(self, device: int, seed: int) -> None:
        """Some of what it had is offered, with some that nobody can take."""
        random = Random(seed)
        there = [entry for slot, entry in sorted(self.disk.items()) if slot_arena(slot) == device]
        offered = random.sample(there, random.randint(0, len(there)) if seed % 3 else len(there))
        wrong = [entry._replace(key=StorageKey(b"m:?"), slot=Slot(entry.slot + 512)) for entry in offered[:1]]
        wrong += [entry._replace(key=StorageKey(b"m:??"), parent=StorageKey(b"m:?")) for entry in there[:1]]
        found = set(self.found)
        entries = random.sample(offered + wrong, len(offered) + len(wrong))
        refused = self.ledger.restore(entries)
        self.settle()
        taken = [entry.key for entry in entries if entry not in refused]
        assert len(taken) + len(refused) == len(entries)
        assert len(set(taken)) == len(taken)
        assert not found.intersection(taken)
        assert self.found.keys() - found <= self.reachable(taken)
        assert all(entry in refused for entry in wrong)

    def reachable(self, keys: list[StorageKey]) -> set[StorageKey]:
        """These, and all that continues them and can be found."""
        return {key for key in self.found if any(key.startswith(each) for each in keys)}
