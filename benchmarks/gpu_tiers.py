"""A real model's prompts from each tier, in a fresh process, beside computing them again.

    engine 1   prefills every prompt, saves its KV to HBM, to host memory and through a node to NVMe, ends
    engine 2   a new process with the same weights: recomputes, then loads from HBM and host memory; then
               through the node from HBM and host memory, and, after the node was started again, from NVMe

The slabs are this process's, as they would be the node's: of HBM (``HbmTier``) and of host memory, handed
over as descriptors: what the data path can do. Through the node the client does it (``gpu_store.py``), with
leases, checks and an NVMe tier. Answers must be the same tokens everywhere.

On paper, 16,384 tokens of an 8B model are 2 GiB of KV: prefill 250 TFLOP, 0.5 s; HBM 2 ms; pinned host memory
over PCIe 45 ms; through the node, whose memory is not registered in the client, 130 ms; NVMe of 5 GB/s 0.4 s
more. So NVMe should win by little on such a machine, and host memory by 3 to 10 x.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import gpu_peer
import gpu_plot
from gpu_rig import Rig, slug
from harness import MIB, Figure

from kvcache.device.slab import CpuMemory
from kvcache.errors import Unavailable
from kvcache.testing.processes import NodeProcess
from kvcache.tiers.hbm import HbmTier
from kvcache.tiers.space import HBM_LAYOUT, Space, slot_offset

PATIENCE_S = 300.0
NODE_NEEDS = ("aiohttp", "click", "lmdb", "msgpack", "msgspec", "prometheus_client", "xxhash")
REPEATS, REPEATS_QUICK = 5, 2


@dataclass(frozen=True, slots=True)
class Plan:
    """Which model, and prompts of how many tokens: whole blocks."""

    model: str
    prompts: Sequence[int]
    block_tokens: int
    block_bytes: int

    def first(self, tokens: int) -> int:
        """The first block of this prompt in each slab."""
        return sum(each for each in self.prompts if each < tokens) // self.block_tokens

    @property
    def slab_bytes(self) -> int:
        return sum(self.prompts) // self.block_tokens * self.block_bytes


FULL = Plan("8B", (2048, 4096, 8192, 16384), 256, 32 * MIB)
QUICK = Plan("1B", (2048, 8192), 256, 8 * MIB)
TINY = Plan("tiny", (32, 64), 16, 4096)


class EngineProcess:
    """``gpu_engine.py``. RAISES RuntimeError with what it says went wrong."""

    def __init__(self, kind: str, model: str) -> None:
        self._line, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        script = Path(__file__).parent / "gpu_engine.py"
        command = [sys.executable, str(script), str(far.fileno()), kind, model]
        with far:
            self._process = subprocess.Popen(command, pass_fds=[far.fileno()], stdout=sys.stderr)
        self._line.settimeout(PATIENCE_S)

    def ask(self, message: dict[str, Any], descriptors: Sequence[int] = ()) -> dict[str, Any]:
        try:
            socket.send_fds(self._line, [json.dumps(message).encode()], list(descriptors))
            data = self._line.recv(1 << 20)
        except OSError as error:
            raise RuntimeError(f"the engine does not answer: {error}") from error
        reply: dict[str, Any] = json.loads(data) if data else {"error": "the engine ended"}
        if "error" in reply:
            raise RuntimeError(f"{message['op']} {message.get('tier', '')}: {reply['error']}")
        return reply

    def close(self) -> None:
        self._line.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Slabs:
    """HBM's, made as the node would, and host memory."""

    def __init__(self, rig: Rig, plan: Plan, stack: ExitStack) -> None:
        unit = max(plan.block_bytes, 2 * MIB)
        size = -(-plan.slab_bytes // unit) * unit
        self.host_bytes = max(size, 4096)
        self._block_bytes = plan.block_bytes
        self.memory, descriptor = CpuMemory().create("tiers-host", self.host_bytes)
        stack.callback(os.close, descriptor)
        self.descriptors = [descriptor]
        self.ticket: object = None
        if rig.memory is None:
            return
        tier, space = HbmTier(unit), Space(size, unit, HBM_LAYOUT)
        stack.callback(tier.close)
        arena = tier.add_arena("tiers", rig.memory, size)
        assert space.add_arena(size) == arena
        slots = space.allocate_many(arena, plan.block_bytes, size // plan.block_bytes)
        tier.apply(space.take_moves())
        count = plan.slab_bytes // plan.block_bytes
        assert [slot_offset(slot) for slot in slots[:count]] == [at * plan.block_bytes for at in range(count)]
        self.descriptors.append(tier.descriptor(arena))
        self.ticket = json.loads(gpu_peer.packed(tier.ticket(arena)))

    def attach(self, engine: EngineProcess) -> dict[str, Any]:
        message = {"op": "attach", "hbm": self.ticket, "host_bytes": self.host_bytes}
        message["block_bytes"] = self._block_bytes
        return engine.ask(message, self.descriptors)


def figures(rig: Rig, out: Path | None) -> Iterator[Figure]:
    """``out``: where the plot goes."""
    plan = (QUICK if rig.quick else FULL) if rig.is_cuda else TINY
    if importlib.util.find_spec("transformers") is None:
        yield rig.missing("tiers", "s", "transformers is not installed")
        return
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvcache-gpu-")))
        node, why, no_hbm = _node(rig, plan, home, stack)
        slabs = Slabs(rig, plan, stack)
        kind = "cuda" if rig.is_cuda else "cpu"
        with closing(EngineProcess(kind, plan.model)) as first:
            about = slabs.attach(first)
            filled, why_not = _fill(first, plan, node)
        why = why or why_not
        yield rig.figure("tiers.model", about["parameters"] / 1e9, "G parameters", n=1)
        with closing(EngineProcess(kind, plan.model)) as second:
            slabs.attach(second)
            taken = Taken(rig, plan, second, filled)
            taken.take("recompute", {"op": "recompute"})
            if slabs.ticket is None:
                taken.absent["hbm"] = "memory of this GPU cannot be shared here"
            else:
                taken.take("hbm", {"op": "load", "tier": "hbm"})
            taken.take("host", {"op": "load", "tier": "host"})
            no_hbm = no_hbm or next((each["no_hbm"] for each in filled.values() if each["no_hbm"]), "")
            _through_node(taken, second, None if why else node, why, no_hbm)
            yield from taken.figures()
        if out is not None:
            path = out / f"gpu-{slug(rig.device)}-tiers.svg"
            path.write_text(gpu_plot.svg(taken.plotted(), f"{plan.model}, random weights; {rig.machine}"))
            print(f"plot: {path}", file=sys.stderr)


class Taken:
    """Times by tier and prompt, and what was wrong."""

    def __init__(
        self, rig: Rig, plan: Plan, engine: EngineProcess, filled: dict[int, dict[str, Any]]
    ) -> None:
        self._rig, self._plan, self._engine, self._filled = rig, plan, engine, filled
        self._repeats = REPEATS_QUICK if rig.quick else REPEATS
        self._seconds: dict[str, dict[int, list[float]]] = {}
        self._loads: dict[str, dict[int, list[float]]] = {}
        self.absent: dict[str, str] = {}
        self.wrong_blocks = self.wrong_answers = self.answers = 0

    def take(self, tier: str, message: dict[str, Any], *, once: bool = False) -> None:
        """``once``: what was read is nearer afterwards, so there is one turn, and none to warm up."""
        try:
            for tokens in self._plan.prompts:
                for turn in range(1 if once else 1 + self._repeats):
                    reply = self._ask(message, tokens)
                    if turn or once:
                        self._seconds.setdefault(tier, {}).setdefault(tokens, []).append(reply["seconds"])
                        self._loads.setdefault(tier, {}).setdefault(tokens, []).append(reply["load_s"])
        except RuntimeError as error:
            self.absent[tier] = str(error)

    def _ask(self, message: dict[str, Any], tokens: int) -> dict[str, Any]:
        filled = self._filled[tokens]
        more = {"tokens": tokens, "first": self._plan.first(tokens), "sums": filled["sums"]}
        reply = self._engine.ask({**message, **more})
        self.wrong_blocks += reply["wrong"]
        self.answers += 1
        self.wrong_answers += reply["answer"] != filled["answer"]
        return reply

    def plotted(self) -> dict[str, list[tuple[int, float]]]:
        return {
            tier: [(tokens, median(values)) for tokens, values in by.items()]
            for tier, by in self._seconds.items()
        }

    def figures(self) -> Iterator[Figure]:
        recomputed = self._seconds.get("recompute", {})
        for tier, by in self._seconds.items():
            for tokens, values in by.items():
                took = median(values)
                base = recomputed.get(tokens)
                ratio = median(base) / took if base and tier != "recompute" else None
                against = f"recompute ({median(base):.3f} s)" if base and ratio is not None else ""
                yield self._rig.figure(f"tiers.{tier}.{tokens}", took, "s", ratio, against, len(values))
                if tier != "recompute":
                    size = tokens // self._plan.block_tokens * self._plan.block_bytes
                    rate = size / median(self._loads[tier][tokens]) / 1e9
                    yield self._rig.figure(f"tiers.{tier}.{tokens}.rate", rate, "GB/s", n=len(values))
        for tier, why in self.absent.items():
            yield self._rig.missing(f"tiers.{tier}", "s", why)
        for name, wrong in (("answers", self.wrong_answers), ("blocks", self.wrong_blocks)):
            unit = f"in {self.answers} answers"
            yield self._rig.figure(f"proof.tiers.wrong_{name}", wrong, unit, None, "must be 0", self.answers)


def _fill(engine: EngineProcess, plan: Plan, node: Any) -> tuple[dict[int, dict[str, Any]], str]:
    """What each prompt's answer and sums are; and why the node holds none of it, if so."""
    why = ""
    if node is not None:
        try:
            engine.ask({"op": "node", "socket": node.socket})
        except RuntimeError as error:
            why = str(error)
    filled = {}
    for tokens in plan.prompts:
        message = {"op": "fill", "tokens": tokens, "first": plan.first(tokens)}
        try:
            filled[tokens] = engine.ask(message)
        except RuntimeError as error:
            if why or node is None:
                raise
            why = str(error)  # The node's: without it, again.
            engine.ask({"op": "leave"})
            filled[tokens] = engine.ask(message)
    return filled, why


def _node(rig: Rig, plan: Plan, home: Path, stack: ExitStack) -> tuple[Any, str, str]:
    """A node with HBM, host memory and NVMe for all prompts; or why there is none; and why without HBM."""
    if absent := [name for name in NODE_NEEDS if not _is_there(name)]:
        return None, f"a node needs {', '.join(absent)}", ""
    need = sum(plan.prompts) // plan.block_tokens * (plan.block_bytes + MIB)
    size = max(2 * need, 64 * MIB)
    if shutil.disk_usage(home).free < 2 * size:
        return None, f"{home} has no {2 * size} bytes free", ""
    settings = {
        "socket": str(home / "node.sock"),
        "http": "none",
        "capacity": f"{size // MIB}MiB",
        "nvme": f"{home / 'nvme'}:{2 * size // MIB}MiB",
        "nvme_segment": f"{max(8 * MIB, 4 * plan.block_bytes) // MIB}MiB",
    }
    hbm = {"hbm": f"{size // MIB}MiB", "hbm_device": "cuda" if rig.is_cuda else "cpu"}
    log, failures = home / "node.log", []
    for more in (hbm, {}):
        node = NodeProcess({**settings, **more}, log)
        try:
            node.start()
        except (Unavailable, OSError) as error:
            failures.append(str(error))
            continue
        stack.callback(node.close)
        return node, "", "; ".join(failures)
    return None, f"no node: {failures[-1]}", ""


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def _through_node(taken: Taken, engine: EngineProcess, node: Any, why: str, no_hbm: str) -> None:
    """Its HBM and host memory, then NVMe after a restart."""
    if node is None:
        taken.absent |= dict.fromkeys(("node_hbm", "node_host", "node_nvme"), why)
        return
    try:
        engine.ask({"op": "node", "socket": node.socket})
        if no_hbm:
            taken.absent["node_hbm"] = no_hbm
        else:
            taken.take("node_hbm", {"op": "load", "tier": "node_hbm"})
        taken.take("node_host", {"op": "load", "tier": "node_host"})
        node.close()
        node.start()
        engine.ask({"op": "node", "socket": node.socket})
        taken.take("node_nvme", {"op": "load", "tier": "node_nvme"}, once=True)
    except (RuntimeError, OSError) as error:
        taken.absent["node_nvme"] = str(error)
