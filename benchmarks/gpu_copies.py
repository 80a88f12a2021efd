"""How fast bytes go between an engine's pages, the HBM slab and host memory, each beside its ceiling.

On paper, H200: PCIe carries 50 GB/s, so 128 MiB take 2.7 ms; a gather of each group of 32 MiB goes before it
on the same stream (16 us a group, 3 %), and Python queues a group in 0.2 ms, behind the one before. So a
save or load through staging should be at 0.95 of a pinned memcpy. A hit in HBM is one launch that reads and
writes each byte once, as a device-to-device copy does: 0.85 and more with the sums in passing, where a row
of the pages is 256 bytes. index_select + copy a layer is two launches a layer, 64 in all, 10 us each:
1 to 2 ms of Python beside 2.7 ms of link for 128 MiB, and as much for a sixteenth of that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import median

import harness
import torch
from gpu_rig import GB, Case, Mover, Rig
from gpu_rivals import RIVALS, Rival
from harness import Figure

from kvcache import sums as host_sums
from kvcache.device.gather import gather, gather_and_sum, scatter, scatter_and_sum
from kvcache.device.staging import Passage
from kvcache.device.sums import joined, sum_chunks

Work = Callable[[], object]


# --- host memory ----------------------------------------------------------------------------------


def host_figures(rig: Rig) -> Iterator[Figure]:
    """Gather and copy out, copy in and scatter: the goal is 0.90 of a pinned memcpy."""
    for case in rig.sizes.cases:
        yield from _host_case(rig, case)


def _host_case(rig: Rig, case: Case) -> Iterator[Figure]:
    mover, pages, offsets = Mover(rig), rig.pages(case), rig.offsets(case)
    size, name = rig.case_bytes(case), rig.case_name(case)
    pinned = rig.pinned(size)
    there = torch.empty(size, dtype=torch.uint8, device=rig.device)
    rivals, absent = _rivals(rig, case, pages, pinned)
    saves: dict[str, Work] = {
        "memcpy": lambda: pinned.copy_(there, non_blocking=True),
        "memcpy_slab": lambda: rig.host[:size].copy_(there, non_blocking=True),
        "ours": lambda: mover.save(offsets, pages),
    }
    loads: dict[str, Work] = {
        "memcpy": lambda: there.copy_(pinned, non_blocking=True),
        "memcpy_slab": lambda: there.copy_(rig.host[:size], non_blocking=True),
        "ours": lambda: mover.load(offsets, pages),
    }
    for rival in rivals:
        saves[rival.name], loads[rival.name] = rival.save, rival.load
    for rival_name in [key for key in saves if not key.startswith("memcpy")]:
        _check_round_trip(rig, pages, rival_name, saves[rival_name], loads[rival_name])
    _check_sums(rig, mover, offsets, pages)
    for way, works in (("save", saves), ("load", loads)):
        results = harness.interleaved(
            {key: lambda work=work: size / rig.seconds(work) / GB for key, work in works.items()},
            rig.sizes.rounds,
        )
        yield from rig.speeds(f"host.{way}.{name}", results, "ours", [key for key in works if key != "ours"])
        for rival_name, why in absent.items():
            yield rig.missing(f"host.{way}.{name}", "GB/s", f"{rival_name}: {why}")
    mover.close()


def _rivals(
    rig: Rig, case: Case, pages: list[list[int]], host: torch.Tensor
) -> tuple[list[Rival], dict[str, str]]:
    """Those that run here, and why the others do not. Each is tried once."""
    found: list[Rival] = []
    absent: dict[str, str] = {}
    for make in RIVALS:
        try:
            rival = make(rig, case, pages, host)
            rival.save()
            rig.finish()
            found.append(rival)
        except (RuntimeError, ValueError) as error:
            absent[make.name] = str(error)
    return found, absent


def _check_round_trip(rig: Rig, pages: list[list[int]], name: str, save: Work, load: Work) -> None:
    """What was saved, wiped and loaded is what was there. RAISES SystemExit: a figure for wrong bytes is
    none."""
    flat = torch.tensor([page for block in pages for page in block], device=rig.device)
    before = [tensor.index_select(1, flat) for tensor in rig.tensors]
    save()
    rig.finish()
    for tensor, content in zip(rig.tensors, before, strict=True):
        tensor.index_copy_(1, flat, torch.zeros_like(content))
    load()
    rig.finish()
    for at, (tensor, content) in enumerate(zip(rig.tensors, before, strict=True)):
        have, want = tensor.index_select(1, flat), content
        if not torch.equal(have.view(torch.uint8), want.view(torch.uint8)):
            raise SystemExit(f"{name}: wrong bytes in layer {at}")


def _check_sums(rig: Rig, mover: Mover, offsets: list[int], pages: list[list[int]]) -> None:
    """The device's sums of a save are those that the host finds in its slab."""
    passages = mover.save(offsets, pages)
    mover.wait(passages)
    spec = rig.cache.spec(len(pages[0]))
    have = [row for passage in passages for row in joined(passage.sums)]
    for at, row in zip(offsets, have, strict=True):
        block = rig.host[at : at + spec.block_bytes].numpy()
        if host_sums.sum_chunks([block], spec.chunk_bytes) != row:
            raise SystemExit(f"wrong sums of the block at {at}")


# --- HBM ------------------------------------------------------------------------------------------


def hbm_figures(rig: Rig) -> Iterator[Figure]:
    """Between pages and the slab on the same GPU: the goal is 0.80 of a device-to-device copy. ``repeats``
    launches a turn, so that Python is hidden; ``request`` is one, with its table and its Python."""
    for case in rig.sizes.cases:
        size, name = rig.case_bytes(case), rig.case_name(case)
        slab, pages, offsets = rig.device_bytes(size), rig.pages(case), rig.offsets(case)
        source, target = (torch.empty(size, dtype=torch.uint8, device=rig.device) for _ in range(2))
        moves = rig.cache.moves(offsets, pages)
        works: dict[str, Work] = {
            "save": lambda slab=slab, moves=moves: gather_and_sum(moves, slab),
            "load": lambda slab=slab, moves=moves: scatter_and_sum(moves, slab),
            "save_unsummed": lambda slab=slab, moves=moves: gather(moves, slab),
            "load_unsummed": lambda slab=slab, moves=moves: scatter(moves, slab),
            "copy": lambda source=source, target=target: target.copy_(source),
        }
        _check_round_trip(rig, pages, "hbm", works["save"], works["load"])

        def request(slab: torch.Tensor, offsets: list[int], pages: list[list[int]]) -> object:
            return scatter_and_sum(rig.cache.moves(offsets, pages), slab)

        turns = {key: lambda work=work, size=size: _speed(rig, work, size) for key, work in works.items()}
        turns["request"] = lambda size=size, slab=slab, offsets=offsets, pages=pages: (
            size / rig.seconds(lambda: request(slab, offsets, pages)) / GB
        )
        results = harness.interleaved(turns, rig.sizes.rounds)
        for key in ("load", "save", "load_unsummed", "save_unsummed", "request"):
            yield from rig.speeds(f"hbm.{key}.{name}", results, key, ["copy"])


def _speed(rig: Rig, work: Work, size: int) -> float:
    """GB/s of ``repeats`` calls in a row, so that Python hides behind the GPU."""
    repeats = rig.sizes.repeats
    return repeats * size / rig.seconds(lambda: [work() for _ in range(repeats)]) / GB


# --- sums -----------------------------------------------------------------------------------------


def sum_figures(rig: Rig) -> Iterator[Figure]:
    """XXH3-64 of chunks where they lie. A device-to-device copy moves two bytes a byte, so 1.0 of it is
    half of what memory can do."""
    for case in rig.sizes.cases:
        size, name = rig.case_bytes(case), rig.case_name(case)
        slab, offsets = rig.device_bytes(size), rig.offsets(case)
        slab.copy_(torch.randint(0, 256, (size,), dtype=torch.uint8, device=rig.device))
        spec = rig.cache.spec(case.pages_per_block)
        on_host = slab.cpu()
        blocks = [on_host[at : at + spec.block_bytes].numpy() for at in offsets]
        have = joined(sum_chunks(slab, offsets, spec))
        if b"".join(have) != host_sums.sum_chunks(blocks, spec.chunk_bytes):
            raise SystemExit(f"wrong sums: {name}")
        target = torch.empty_like(slab)
        works: dict[str, Work] = {
            "sum": lambda slab=slab, offsets=offsets, spec=spec: sum_chunks(slab, offsets, spec),
            "copy": lambda slab=slab, target=target: target.copy_(slab),
        }
        turns = {key: lambda work=work, size=size: _speed(rig, work, size) for key, work in works.items()}
        turns["host"] = lambda blocks=blocks, spec=spec, size=size: (
            size / harness.seconds(lambda: host_sums.sum_chunks(blocks, spec.chunk_bytes)) / GB
        )
        yield from rig.speeds(
            f"sum.{name}", harness.interleaved(turns, rig.sizes.rounds), "sum", ["copy", "host"]
        )


# --- launches -------------------------------------------------------------------------------------


def launch_figures(rig: Rig) -> Iterator[Figure]:
    """Kernels and copies that one request of blocks puts on the GPU, as the profiler counts them."""
    case = rig.sizes.cases[1]
    pages, offsets, name = rig.pages(case), rig.offsets(case), rig.case_name(case)
    slab = rig.device_bytes(rig.case_bytes(case))
    pinned = rig.pinned(rig.case_bytes(case))
    mover = Mover(rig)
    rivals, _ = _rivals(rig, case, pages, pinned)

    def passages(ask: Callable[..., list[Passage]]) -> None:
        mover.wait(ask(offsets, pages))

    works: dict[str, Work] = {
        "hbm.load": lambda: scatter_and_sum(rig.cache.moves(offsets, pages), slab),
        "hbm.save": lambda: gather_and_sum(rig.cache.moves(offsets, pages), slab),
        "hbm.load_unsummed": lambda: scatter(rig.cache.moves(offsets, pages), slab),
        "host.load": lambda: passages(mover.load),
        "host.save": lambda: passages(mover.save),
    }
    works |= {f"{rival.name}.load": rival.load for rival in rivals}
    for key, work in works.items():
        if not rig.is_cuda:
            yield rig.missing(f"launches.{key}.{name}", "launches", "counted on a GPU only")
            continue
        work()
        rig.finish()
        try:
            kernels, copies = _counted(rig, work)
        except (RuntimeError, AssertionError, ImportError) as error:
            yield rig.missing(f"launches.{key}.{name}", "launches", f"no profiler: {error}")
            continue
        yield rig.figure(f"launches.{key}.{name}", kernels, "launches", n=1)
        yield rig.figure(f"copies.{key}.{name}", copies, "copies", n=1)
    mover.close()


def _counted(rig: Rig, work: Work) -> tuple[int, int]:
    """Kernels, and copies by the copy engines."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        work()
        rig.finish()
    on_gpu = [each.name for each in profiled.events() if each.device_type == DeviceType.CUDA]
    if not on_gpu:
        raise RuntimeError("it saw nothing on the GPU")
    copies = sum(name.startswith("Memcpy") for name in on_gpu)
    others = sum(name.startswith("Memset") for name in on_gpu)
    return len(on_gpu) - copies - others, copies


def host_ceiling(rig: Rig) -> float:
    """Bytes a second from the device into pinned memory: what a cap is a share of."""
    size = rig.sizes.batch_bytes_max
    pinned = rig.pinned(size)
    there = torch.empty(size, dtype=torch.uint8, device=rig.device)
    return size / median(rig.seconds(lambda: pinned.copy_(there, non_blocking=True)) for _ in range(5))
