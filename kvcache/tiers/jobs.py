"""What the threads of a drive do: blocking calls of its device, a group of blocks each.

Whatever the system refuses, foreseen or not, is a DeviceFault here: it fences the drive and not the node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvcache.tiers.nvme import BlockFault, Device, DeviceFault
from kvcache.tiers.nvme_files import faults
from kvcache.tiers.nvme_format import Entry

NamespaceMap = Mapping[str, str | int]


def close_device(device: Device) -> None:
    with faults(f"closing {device.path}"):
        device.close()


def read_blocks(
    device: Device, wanted: Sequence[Entry], into: Sequence[memoryview]
) -> list[bytes | BlockFault | DeviceFault]:
    """In order; behind a fault of the device itself nothing more is tried."""
    found: list[bytes | BlockFault | DeviceFault] = []
    for entry, view in zip(wanted, into, strict=True):
        if found and isinstance(found[-1], DeviceFault):
            found.append(found[-1])
            continue
        try:
            with faults(f"reading {device.path}"):
                found.append(device.read(entry, view))
        except (BlockFault, DeviceFault) as fault:
            found.append(fault)
    return found


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
