"""The HBM tier and its data path on a GPU: proofs first, then speed beside the ceilings of the same run.

    python benchmarks/bench_gpu.py [--json] [--quick] [--device cpu|cuda] [--only PART,...] [--out DIR]
    PYTHONPATH=. python benchmarks/bench_gpu.py        where the package is not installed

    proofs      150 races of compute, save, overwrite; two processes share a slab and either is killed
    host        gather and copy out, copy in and scatter, beside pinned memcpy and three others' ways
    hbm         hits beside a device-to-device copy        sums      XXH3 on the device
    launches    kernels and copies a request               decode    how much a decode loop is slowed
    overlap     layer by layer, on and off                 tiers     a real model, loaded by a fresh process

The sums are in the parts (``gpu_copies.py``, ``gpu_beside.py``, ``gpu_proofs.py``, ``gpu_tiers.py``); all
of it should take some 6 minutes of a GPU. ``--device cpu`` runs all of it on the CPU, tiny, Triton
interpreted: that proves the code and no figure. Results go to DIR (``benchmarks/results``), one file a kind
of GPU, line by line as they come (those of parts that ``--only`` leaves out stay); what could not be measured
is a line that says why. Exit status 1: there is no GPU, a proof failed, or a part did.

Torch, Triton, xxhash and cuda-bindings are enough for all parts but the last, which needs transformers, and
what goes through a node what that needs (README.md says which wheels).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import harness
from harness import Figure

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

# How a figure's ratio should be, at least: the name's beginning, what it is held against, and the ratio.
GOALS = (
    ("gpu.host.save.", "memcpy (", 0.90),
    ("gpu.host.load.", "memcpy (", 0.90),
    ("gpu.hbm.load.", "copy (", 0.80),
    ("gpu.decode.slowdown.share25", "the loop alone", 1 / 1.03),
)
MUST_BE_0 = "must be 0"

Part = Callable[[], Iterator[Figure]]


def parser() -> argparse.ArgumentParser:
    made = harness.parser("the HBM tier and its data path on a GPU")
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny, proves the code")
    made.add_argument("--only", default="", metavar="PART,...", help="some parts only")
    made.add_argument("--out", type=Path, metavar="DIR", help="of the results; on the CPU none unless given")
    return made


def main() -> None:
    parsed = parser().parse_args()
    if parsed.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # Read when Triton is imported.
    # Engines and peers are processes of their own and find the package as this one does.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    sys.path.insert(0, str(ROOT))
    trouble = _trouble(parsed.device)
    if trouble:
        raise SystemExit(f"bench_gpu: {trouble}: every figure is not measured. --device cpu proves the code.")
    found, failed = _measured(parsed)
    if not parsed.json:
        by_speed = sorted(found, key=lambda each: "proof" in each.name)
        harness.report(by_speed, harness.choose(parsed))
    if parsed.device == "cuda":
        _say_goals(found)
    wrong = [each.name for each in found if each.against.startswith(MUST_BE_0) and each.value]
    for name in wrong:
        print(f"PROOF FAILED: {name}", file=sys.stderr)
    raise SystemExit(1 if wrong or failed else 0)


def _trouble(device: str) -> str:
    """Why nothing can be measured, if so."""
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported ({error})"
    if device == "cuda" and not torch.cuda.is_available():
        return "there is no CUDA device here"
    if device == "cpu":
        torch.set_num_threads(1)
    return ""


def _measured(parsed: argparse.Namespace) -> tuple[list[Figure], list[str]]:
    """All figures, and the parts that failed."""
    import torch
    from gpu_rig import Rig, slug

    device = torch.device(parsed.device, 0) if parsed.device == "cuda" else torch.device("cpu")
    out = parsed.out or (RESULTS if parsed.device == "cuda" else None)
    kept = None if out is None else Kept(out / f"gpu-{slug(device)}.jsonl", add=bool(parsed.only))
    rig = Rig(device, quick=parsed.quick)
    found: list[Figure] = []
    failed: list[str] = []

    def keep(figure: Figure) -> None:
        found.append(figure)
        line = json.dumps(asdict(figure))
        if kept is not None:
            kept.add(figure.name, line)
        if parsed.json:
            print(line, flush=True)

    for name, part in _parts(rig, out, parsed.only).items():
        began = time.perf_counter()
        try:
            for figure in part():
                keep(figure)
        except (Exception, SystemExit) as error:  # The other parts may work: a machine with a GPU is rare.
            traceback.print_exc()
            failed.append(name)
            keep(rig.missing(name, "", f"the part failed: {type(error).__name__}: {error}"))
        print(f"{name}: {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
    for note in rig.notes:
        keep(note)
    rig.close()
    return found, failed


class Kept:
    """The file of results, whole after each line. ``add``: what other parts said before stays in it."""

    def __init__(self, path: Path, *, add: bool) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        lines = path.read_text().splitlines() if add and path.exists() else []
        self._before = [(str(json.loads(line)["name"]), line) for line in lines]
        self._lines: list[tuple[str, str]] = []

    def add(self, name: str, line: str) -> None:
        self._lines.append((name, line))
        fresh = {each for each, _ in self._lines}
        old = [each for each in self._before if each[0] not in fresh]
        self._path.write_text("".join(f"{text}\n" for _, text in [*old, *self._lines]))


def _parts(rig: object, out: Path | None, only: str) -> dict[str, Part]:
    import gpu_beside
    import gpu_copies
    import gpu_proofs
    import gpu_tiers
    from gpu_rig import Rig

    assert isinstance(rig, Rig)

    def proofs() -> Iterator[Figure]:
        yield from gpu_proofs.race_figures(rig)
        yield from gpu_proofs.share_figures(rig)

    parts: dict[str, Part] = {
        "proofs": proofs,
        "host": lambda: gpu_copies.host_figures(rig),
        "hbm": lambda: gpu_copies.hbm_figures(rig),
        "sums": lambda: gpu_copies.sum_figures(rig),
        "launches": lambda: gpu_copies.launch_figures(rig),
        "decode": lambda: gpu_beside.decode_figures(rig),
        "overlap": lambda: gpu_beside.overlap_figures(rig),
        "tiers": lambda: gpu_tiers.figures(rig, out),
    }
    chosen = only.split(",") if only else list(parts)
    if unknown := [name for name in chosen if name not in parts]:
        raise SystemExit(f"bench_gpu: no part {unknown[0]}; there are {', '.join(parts)}")
    return {name: parts[name] for name in chosen}


def _say_goals(found: list[Figure]) -> None:
    for begins, against, least in GOALS:
        for each in found:
            if each.ratio is not None and each.name.startswith(begins) and each.against.startswith(against):
                words = "met" if each.ratio >= least else "MISSED"
                print(f"goal {least:.2f} {words}: {each.name} is at {each.ratio:.2f}", file=sys.stderr)


if __name__ == "__main__":
    main()
