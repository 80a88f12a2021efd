"""What the threads of a drive do: blocking calls of its device, a group of blocks each.

Whatever the system refuses, foreseen or not, is a DeviceFault here: it fences the drive and not the node.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence

from kvcache.block import HASH_BYTES, BlockSpec, Slot, StorageKey
from kvcache.tiers.nvme import BlockFault, Device, DeviceFault
from kvcache.tiers.nvme_files import faults
from kvcache.tiers.nvme_format import PARENT_ROOT, Entry
from kvcache.tiers.space import slot_offset

NamespaceMap = Mapping[str, str | int]
UNREADABLE = "unreadable"


def close_device(device: Device) -> None:
    with faults(f"closing {device.path}"):
        device.close()


def read_blocks(
    device: Device, wanted: Sequence[Entry], into: Sequence[memoryview]
) -> list[bytes | BlockFault | DeviceFault]:
    """In order; behind a fault of the device itself nothing more is tried. A single block that cannot be
    read (a bad sector) is that block's fault."""
    with faults(f"reading {device.path}"):
        found = device.read_many(wanted, into)
    failed = [
        at for at, each in enumerate(found) if isinstance(each, DeviceFault) and each.errno == errno.EIO
    ]
    if failed:  # One of several that were read in one call, perhaps: each by itself tells which.
        again = _read_each(device, [wanted[at] for at in failed], [into[at] for at in failed])
        for at, each in zip(failed, again, strict=True):
            found[at] = each
    return found


def _read_each(
    device: Device, wanted: Sequence[Entry], into: Sequence[memoryview]
) -> list[bytes | BlockFault | DeviceFault]:
    found: list[bytes | BlockFault | DeviceFault] = []
    for entry, view in zip(wanted, into, strict=True):
        if found and isinstance(found[-1], DeviceFault):
            found.append(found[-1])
            continue
        try:
            with faults(f"reading {device.path}"):
                found.append(device.read(entry, view))
        except BlockFault as fault:
            found.append(fault)
        except DeviceFault as fault:
            again = bool(found) and is_unreadable(found[-1])
            found.append(fault if again or fault.errno != errno.EIO else BlockFault(UNREADABLE))
    return found


def is_unreadable(found: bytes | BlockFault | DeviceFault) -> bool:
    return isinstance(found, BlockFault) and found.reason == UNREADABLE


def write_blocks(
    device: Device,
    puts: Sequence[tuple[Entry, memoryview]],
    deletes: Sequence[int],
    namespaces: Sequence[NamespaceMap],
    spent: Mapping[str, object],
    durable: bool,
) -> list[Entry]:
    with faults(f"writing to {device.path}"):
        if spent:
            device.save_budget(spent)
        for fields in namespaces:
            device.save_namespace(fields)
        return device.write(puts, deletes, durable=durable)


def entries_of(
    keys: Sequence[StorageKey],
    slots: Sequence[Slot],
    checksums: Sequence[bytes],
    spec: BlockSpec,
    before: StorageKey | None,
) -> list[Entry]:
    """What is to be written of a path behind ``before``; the device gives generation and epoch."""
    parents = [PARENT_ROOT if before is None else before[HASH_BYTES:]]
    parents += [key[HASH_BYTES:] for key in keys[:-1]]
    return [
        Entry(
            offset=slot_offset(slot),
            key=key,
            parent=parent,
            block_bytes=spec.block_bytes,
            chunk_bytes=spec.chunk_bytes,
            generation=0,
            checksum=checksum,
            epoch=0,
        )
        for key, parent, slot, checksum in zip(keys, parents, slots, checksums, strict=True)
    ]
