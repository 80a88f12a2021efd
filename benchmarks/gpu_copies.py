"""How fast bytes go between an engine's pages, the HBM slab and host memory, each beside its ceiling.

On paper, H200: PCIe carries 50 GB/s, so 128 MiB take 2.7 ms; a gather of each part of 16 MiB goes before it
on the same stream (8 us a part, 3 %), and Python queues a part in 0.1 ms, behind the one before. A call waits
and is alone: it pays 0.3 ms of Python before its first byte and after its last, which is 0.1 of 128 MiB and
half of 16. A hit in HBM is one launch that reads and writes each
byte once, as a device-to-device copy does, and one that ends the sums, 3 us: of 16 MiB, which take 8 us, 0.7,
of 128 MiB 0.85 and more, where a row of the pages is 256 bytes. Its Python, 60 us, is more than that up to
128 MiB. index_select + copy a layer is two launches a layer, 64 in all, 10 us each: 1 to 2 ms of Python
beside 2.7 ms of link for 128 MiB, and as much for a sixteenth of that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import harness
import torch
from gpu_rig import GB, Case, Mover, Rig
from gpu_rivals import RIVALS, Rival
from harness import Figure

from kvcache import sums as host_sums
from kvcache.block import BlockSpec
from kvcache.device.checks import alignment, uploaded
from kvcache.device.gather import gather, gather_and_sum, scatter, scatter_and_sum
from kvcache.device.sums import joined, kernels_for, sum_chunks

Work = Callable[[], object]


# --- host memory ----------------------------------------------------------------------------------


def host_figures(rig: Rig) -> Iterator[Figure]:
    """Gather and copy out, copy in and scatter: the goal is 0.90 of a pinned memcpy. As a store has it done:
    a call that returns when all of it has arrived and is summed, with all of its Python."""
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
        check_round_trip(rig, pages, rival_name, saves[rival_name], loads[rival_name])
    _check_sums(rig, mover, offsets, pages)
    for way, works in (("save", saves), ("load", loads)):
        others = [key for key in works if key != "ours"]
        turns = {key: functools.partial(_speed, rig, work, size) for key, work in works.items()}
        results = harness.interleaved(turns, rig.sizes.rounds)
        yield from rig.speeds(f"host.{way}.{name}", results, "ours", others)
        for rival_name, why in absent.items():
            yield rig.missing(f"host.{way}.{name}", "GB/s", f"{rival_name}: {why}")
    mover.close()


def _rivals(
    rig: Rig, case: Case, pages: list[list[int]], host: torch.Tensor
) -> tuple[list[Rival], dict[str, str]]:
    """Those that run here, and why the others do not. Each is tried once, and what it raises is its own."""
    found: list[Rival] = []
    absent: dict[str, str] = {}
    for make in RIVALS:
        try:
            rival = make(rig, case, pages, host)
            for work in (rival.save, rival.load):
                work()
                rig.finish()
            found.append(rival)
        except Exception as error:  # Border: others' code, and a compiler's errors are of no one kind.
            absent[make.name] = f"{type(error).__name__}: {error}"
    return found, absent


def check_round_trip(rig: Rig, pages: list[list[int]], name: str, save: Work, load: Work) -> None:
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
    spec = rig.cache.spec(len(pages[0]))
    for at, row in zip(offsets, mover.save(offsets, pages), strict=True):
        block = rig.host[at : at + spec.block_bytes].numpy()
        if host_sums.sum_chunks([block], spec.chunk_bytes) != row:
            raise SystemExit(f"wrong sums of the block at {at}")


# --- HBM ------------------------------------------------------------------------------------------


def hbm_figures(rig: Rig) -> Iterator[Figure]:
    """Between pages and the slab on the same GPU: the goal is 0.80 of a device-to-device copy, in what the
    GPU takes: launches are replayed as a graph, over more memory than it caches. ``request`` is one as an
    engine asks for it, with its table and its Python."""
    for case in rig.sizes.cases:
        yield from _hbm_case(rig, case)


def _hbm_case(rig: Rig, case: Case) -> Iterator[Figure]:
    size, name, sets = rig.case_bytes(case), rig.case_name(case), rig.sets(case)
    slab = rig.device_bytes(size * sets)
    source, target = (
        torch.empty(size * sets, dtype=torch.uint8, device=rig.device).split(size) for _ in range(2)
    )
    pages = [rig.pages(case) for _ in range(sets)]
    offsets = [rig.offsets(case, at * size) for at in range(sets)]
    moves = [rig.cache.moves(*each) for each in zip(offsets, pages, strict=True)]
    works: dict[str, Callable[[int], object]] = {
        "save": lambda at: gather_and_sum(moves[at % sets], slab),
        "load": lambda at: scatter_and_sum(moves[at % sets], slab),
        "save_unsummed": lambda at: gather(moves[at % sets], slab),
        "load_unsummed": lambda at: scatter(moves[at % sets], slab),
        "copy": lambda at: target[at % sets].copy_(source[at % sets]),
    }
    check_round_trip(rig, pages[0], "hbm", lambda: works["save"](0), lambda: works["load"](0))
    for at in range(sets):
        works["save"](at)  # What is loaded below is what was there: two sets may name one page.
    count = max(rig.sizes.repeats, sets)
    turns = {
        key: functools.partial(_speed, rig, rig.replayed(work, count), count * size)
        for key, work in works.items()
    }
    turns["request"] = functools.partial(
        _speed, rig, lambda: scatter_and_sum(rig.cache.moves(offsets[0], pages[0]), slab), size
    )
    results = harness.interleaved(turns, rig.sizes.rounds)
    for key in ("load", "save", "load_unsummed", "save_unsummed", "request"):
        yield from rig.speeds(f"hbm.{key}.{name}", results, key, ["copy"])


def _speed(rig: Rig, work: Work, size: int) -> float:
    """GB/s of a call that moves ``size`` bytes."""
    return size / rig.seconds(work) / GB


# --- sums -----------------------------------------------------------------------------------------


def sum_figures(rig: Rig) -> Iterator[Figure]:
    """XXH3-64 of chunks where they lie, replayed as ``hbm_figures``, and asked for. A device-to-device copy
    moves two bytes a byte, so 1.0 of it is half of what memory can do."""
    for case in rig.sizes.cases:
        yield from _sum_case(rig, case)


def _sum_case(rig: Rig, case: Case) -> Iterator[Figure]:
    size, name, sets = rig.case_bytes(case), rig.case_name(case), rig.sets(case)
    slab, spec = rig.device_bytes(size * sets), rig.cache.spec(case.pages_per_block)
    offsets = [rig.offsets(case, at * size) for at in range(sets)]
    slab.copy_(torch.randint(0, 256, (size * sets,), dtype=torch.uint8, device=rig.device))
    on_host = slab[:size].cpu()
    blocks = [on_host[at : at + spec.block_bytes].numpy() for at in offsets[0]]
    have = joined(sum_chunks(slab, offsets[0], spec))
    if b"".join(have) != host_sums.sum_chunks(blocks, spec.chunk_bytes):
        raise SystemExit(f"wrong sums: {name}")
    source, target = slab.split(size), torch.empty_like(slab).split(size)
    summing, count = [_summing(slab, each, spec) for each in offsets], max(rig.sizes.repeats, sets)
    works: dict[str, Callable[[int], object]] = {
        "sum": lambda at: summing[at % sets](),
        "copy": lambda at: target[at % sets].copy_(source[at % sets]),
    }
    turns: dict[str, Callable[[], float]] = {
        key: functools.partial(_speed, rig, rig.replayed(work, count), count * size)
        for key, work in works.items()
    }
    turns["request"] = functools.partial(_speed, rig, lambda: sum_chunks(slab, offsets[0], spec), size)
    turns["host"] = lambda: (
        size / harness.seconds(lambda: host_sums.sum_chunks(blocks, spec.chunk_bytes)) / GB
    )
    results = harness.interleaved(turns, rig.sizes.rounds)
    yield from rig.speeds(f"sum.{name}", results, "sum", ["copy", "host"])
    yield from rig.speeds(f"sum_request.{name}", results, "request", ["copy", "host"])


def _summing(slab: torch.Tensor, offsets: list[int], spec: BlockSpec) -> Work:
    """``sum_chunks`` with its table made before, so that it can be replayed."""
    kernels, planes = kernels_for(slab.device), spec.plane_count
    if kernels is None:
        return lambda: sum_chunks(slab, offsets, spec)
    table = uploaded(offsets, slab.device)
    return lambda: kernels.sum_chunks(slab, table, alignment(*offsets), spec, 0, planes)


# --- launches -------------------------------------------------------------------------------------


def launch_figures(rig: Rig) -> Iterator[Figure]:
    """Kernels and copies that one request of blocks puts on the GPU, as the profiler counts them."""
    case = rig.sizes.cases[1]
    pages, offsets, name = rig.pages(case), rig.offsets(case), rig.case_name(case)
    slab = rig.device_bytes(rig.case_bytes(case))
    pinned = rig.pinned(rig.case_bytes(case))
    mover = Mover(rig)
    rivals, _ = _rivals(rig, case, pages, pinned)

    works: dict[str, Work] = {
        "hbm.load": lambda: scatter_and_sum(rig.cache.moves(offsets, pages), slab),
        "hbm.save": lambda: gather_and_sum(rig.cache.moves(offsets, pages), slab),
        "hbm.load_unsummed": lambda: scatter(rig.cache.moves(offsets, pages), slab),
        "host.load": lambda: mover.load(offsets, pages),
        "host.save": lambda: mover.save(offsets, pages),
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
