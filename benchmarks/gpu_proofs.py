"""What has to be right on a real GPU before any figure counts: two proofs, each a number that must be 0.

``race``    the engine computes pages, they are saved, and overwritten as soon as the save has ended; and the
            other way: wiped, loaded, used. 150 times; every byte is compared. The same without waiting for
            the save is shown, because a race that cannot be lost proves nothing.
``share``   two processes map one slab; whoever wrote or owned it is killed with SIGKILL, in the middle of its
            work. Bytes of the other are right, and once all have let go no memory of the slab is held.
"""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import gpu_peer
import torch
from gpu_rig import Mover, Rig
from harness import GIB, MIB, Figure

from kvcache import sums as host_sums
from kvcache.device.slab import Slab

KILLS, KILLS_QUICK = 3, 1
PATIENCE_S = 60.0
LEAK_BYTES = 64 * MIB
"""Others may use the GPU meanwhile: less than this is no leak of a slab."""


# --- race -----------------------------------------------------------------------------------------


def race_figures(rig: Rig) -> Iterator[Figure]:
    case = rig.sizes.cases[0]
    race = _Race(rig)
    for name, waits in (("save", True), ("save_unended", False)):
        wrong = sum(race.save(number, waits) for number in range(rig.sizes.races))
        what = "must be 0" if waits else "without waiting: shows that the race can be lost"
        yield rig.figure(f"proof.race.{name}", wrong, f"of {rig.sizes.races}", None, what, rig.sizes.races)
    wrong = sum(race.load(number) for number in range(rig.sizes.races))
    yield rig.figure(
        "proof.race.load", wrong, f"of {rig.sizes.races}", None, f"must be 0 ({rig.case_name(case)})",
        rig.sizes.races,
    )  # fmt: skip
    race.mover.close()


class _Race:
    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self.mover = Mover(rig)
        case = rig.sizes.cases[0]
        self._pages, self._offsets = rig.pages(case), rig.offsets(case)
        self._spec = rig.cache.spec(case.pages_per_block)
        self._flat = torch.tensor([page for block in self._pages for page in block], device=rig.device)

    def save(self, number: int, waits: bool) -> bool:
        """Layer by layer. Is anything wrong?"""
        writing = self.mover.begin(self._offsets, self._pages)
        for layer, tensor in enumerate(self._rig.tensors):
            tensor.view(torch.uint8).index_fill_(1, self._flat, self._value(number, layer))
            writing.advance(2 * (layer + 1))
        if not waits:
            self._fill(lambda layer: 255)
        sums = self.mover.end(writing)
        self._fill(lambda layer: 255)
        blocks = [self._block(at) for at in self._offsets]
        right = all(torch.equal(block, self._want(number)) for block in blocks)
        chunk = self._spec.chunk_bytes
        summed = host_sums.sum_chunks([block.numpy() for block in blocks], chunk)
        self._rig.finish()
        return not (right and (sums == summed or not waits))

    def load(self, number: int) -> bool:
        for at in self._offsets:
            self._block(at).copy_(self._want(number))
        self._fill(lambda layer: 0)
        self.mover.load(self._offsets, self._pages)
        seen = [
            tensor.index_select(1, self._flat).view(torch.uint8).flatten() for tensor in self._rig.tensors
        ]
        self._fill(lambda layer: 255)
        self._rig.finish()
        return not all(bool((each == self._value(number, layer)).all()) for layer, each in enumerate(seen))

    def _fill(self, value: Callable[[int], int]) -> None:
        for layer, tensor in enumerate(self._rig.tensors):
            tensor.view(torch.uint8).index_fill_(1, self._flat, value(layer))

    def _value(self, number: int, layer: int) -> int:
        return (31 * number + 7 * layer + 1) % 251

    def _want(self, number: int) -> torch.Tensor:
        layers = self._rig.sizes.layers
        values = torch.tensor([self._value(number, at) for at in range(layers)], dtype=torch.uint8)
        return values.repeat_interleave(self._spec.block_bytes // layers)

    def _block(self, at: int) -> torch.Tensor:
        return self._rig.host[at : at + self._spec.block_bytes]


# --- share ----------------------------------------------------------------------------------------


def share_figures(rig: Rig) -> Iterator[Figure]:
    if rig.memory is None:
        yield rig.missing("proof.share", "", "memory of this GPU cannot be shared by descriptors here")
        return
    kills = KILLS_QUICK if rig.quick else KILLS
    for name, scene in (("writer_killed", _writer_killed), ("owner_killed", _owner_killed)):
        before = _held(rig)
        wrong = sum(scene(rig) for _ in range(kills))
        leaked = _settled(rig, before)
        unit = "bytes" if rig.is_cuda else "maps and descriptors"
        yield rig.figure(f"proof.share.{name}", wrong, f"of {kills}", None, "must be 0", kills)
        yield rig.figure(f"proof.share.{name}.leaked", leaked, unit, None, "must be 0", kills)


class _Peer:
    """A process of ``gpu_peer.py``."""

    def __init__(self, rig: Rig) -> None:
        self.line, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        script = Path(__file__).parent / "gpu_peer.py"
        kind = "cuda" if rig.is_cuda else "cpu"
        with far:
            command = [sys.executable, str(script), str(far.fileno()), kind]
            self._process = subprocess.Popen(command, pass_fds=[far.fileno()])
        self.line.settimeout(PATIENCE_S)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self.line.close()


def _size(rig: Rig) -> int:
    return GIB if rig.is_cuda else MIB


def _writer_killed(rig: Rig) -> bool:
    """Ours is the slab; who writes to its second half dies. Is anything wrong?"""
    assert rig.memory is not None
    slab = Slab.create(rig.memory, "proof", _size(rig))
    peer = _Peer(rig)
    try:
        mine = gpu_peer.whole(slab)
        gpu_peer.finish(mine.fill_(gpu_peer.OWNERS))
        peer.line.sendall(b"r")
        socket.send_fds(peer.line, [gpu_peer.packed(slab.ticket)], [slab.descriptor])
        seen = peer.line.recv(1)
        peer.line.sendall(b"w")
        answered = peer.line.recv(1)
    finally:
        peer.kill()
    first, second = mine.split(_size(rig) // 2)
    right = seen == bytes([gpu_peer.OWNERS]) and answered == b"w"
    right &= bool((first == gpu_peer.OWNERS).all()) and bool((second == gpu_peer.WRITERS).all())
    second.fill_(1)
    right &= bool((second == 1).all())
    del mine, first, second
    slab.close()
    return not right


def _owner_killed(rig: Rig) -> bool:
    """Another's is the slab, and it dies. Is anything wrong?"""
    assert rig.memory is not None
    peer = _Peer(rig)
    try:
        peer.line.sendall(b"o" + _size(rig).to_bytes(8, "little"))
        data, descriptors, _, _ = socket.recv_fds(peer.line, 4096, 1)
        slab = Slab.open(rig.memory, gpu_peer.unpacked(data), descriptors[0])
        os.close(descriptors[0])
    finally:
        peer.kill()
    mine = gpu_peer.whole(slab)
    right = bool((mine == gpu_peer.OWNERS).all())
    mine.fill_(3)
    right &= bool((mine == 3).all())
    del mine
    slab.close()
    return not right


def _held(rig: Rig) -> int:
    """Of the GPU, by anybody; without one, maps and descriptors of slabs in this process."""
    gc.collect()
    if rig.is_cuda:
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(rig.device)
        return total - free
    maps = Path("/proc/self/maps").read_text().count("kvcache-")
    links = [each.readlink() for each in Path("/proc/self/fd").iterdir() if each.is_symlink()]
    return maps + sum("kvcache-" in str(each) for each in links)


def _settled(rig: Rig, before: int) -> int:
    """How much more is held than before, once the driver has cleared up: 0 when it is no slab."""
    allowed = LEAK_BYTES if rig.is_cuda else 0
    until = time.monotonic() + 10
    while (more := _held(rig) - before) > allowed and time.monotonic() < until:
        time.sleep(0.1)
    return more if more > allowed else 0
