"""The other process: an owner or a reader of a slab, at the far end of a socket whose number it is given.

It does what single letters say, and answers each when it is done.
"""

from __future__ import annotations

import os
import socket
import sys

import torch

from kvcache.device.slab import Slab, SlabTicket
from kvcache.packing import pack, unpack
from tests.device.rigs import BLOCK, SLOTS, memory_of


def main() -> None:
    with socket.socket(fileno=int(sys.argv[1])) as line:
        kind = sys.argv[2]
        slab: Slab | None = None
        while order := line.recv(1):
            match order:
                case b"o":  # Own a slab, and hand it over.
                    slab = Slab.create(memory_of(kind), "shared", SLOTS * BLOCK)
                    socket.send_fds(line, [packed(slab.ticket)], [slab.descriptor])
                case b"r":  # Read another's.
                    data, descriptors, _, _ = socket.recv_fds(line, 4096, 1)
                    slab = Slab.open(memory_of(kind), unpacked(data), descriptors[0])
                    os.close(descriptors[0])
                    line.sendall(b"r")
                case b"w":  # Write a slot whole, and one by half.
                    assert slab is not None
                    one, two = slab.slots([0, BLOCK], BLOCK, slab.ticket.incarnation)
                    one.fill_(1)
                    two[: BLOCK // 2].fill_(2)
                    if slab.device.type == "cuda":
                        torch.cuda.synchronize(slab.device)
                    line.sendall(b"w")


def packed(ticket: SlabTicket) -> bytes:
    return pack([ticket.kind, ticket.size_bytes, ticket.uuid, ticket.incarnation])


def unpacked(data: bytes) -> SlabTicket:
    fields = unpack(data)
    assert isinstance(fields, list)
    return SlabTicket(*fields)


if __name__ == "__main__":
    main()
