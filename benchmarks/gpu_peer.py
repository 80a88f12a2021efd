"""The other process of ``gpu_proofs.py``: it owns a slab or maps another's, at the far end of a socket.

    python gpu_peer.py DESCRIPTOR cpu|cuda         letters in, the same letter out when it is done

``o`` owns one and hands it over, ``r`` maps one that is handed to it, ``w`` writes until it is killed.
"""

from __future__ import annotations

import json
import os
import socket
import sys

import torch

from kvcache.device.slab import CpuMemory, CudaMemory, Memory, Slab, SlabTicket
from kvcache.device.vmm import Vmm

OWNERS, WRITERS = 7, 9
"""What the owner fills its slab with, and what the writer writes to its second half."""


def memory_of(kind: str) -> Memory:
    if kind == "cpu":
        return CpuMemory()
    torch.zeros(1, device="cuda")
    vmm = Vmm()
    return CudaMemory(vmm, vmm.uuid(torch.cuda.current_device()))


def packed(ticket: SlabTicket) -> bytes:
    fields = [ticket.kind, ticket.size_bytes, ticket.uuid.hex(), ticket.incarnation.hex()]
    return json.dumps(fields).encode()


def unpacked(data: bytes) -> SlabTicket:
    kind, size_bytes, uuid, incarnation = json.loads(data)
    return SlabTicket(kind, size_bytes, bytes.fromhex(uuid), bytes.fromhex(incarnation))


def whole(slab: Slab) -> torch.Tensor:
    return slab.whole(slab.ticket.incarnation)


def finish(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def main() -> None:
    memory = memory_of(sys.argv[2])
    slab: Slab | None = None
    with socket.socket(fileno=int(sys.argv[1])) as line:
        while order := line.recv(1):
            if order == b"o":
                slab = Slab.create(memory, "peer", int.from_bytes(line.recv(8), "little"))
                finish(whole(slab).fill_(OWNERS))
                socket.send_fds(line, [packed(slab.ticket)], [slab.descriptor])
                continue
            if order == b"r":
                data, descriptors, _, _ = socket.recv_fds(line, 4096, 1)
                slab = Slab.open(memory, unpacked(data), descriptors[0])
                os.close(descriptors[0])
                line.sendall(bytes([int(whole(slab)[0])]))
                continue
            assert slab is not None
            half = whole(slab)[slab.size_bytes // 2 :]
            finish(half.fill_(WRITERS))
            line.sendall(order)
            while True:
                half.fill_(WRITERS)


if __name__ == "__main__":
    main()
