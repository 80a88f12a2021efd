"""What the demo counts, and how it says it.

Prefill saved is reckoned, not measured, and the formula is printed with it. For a prompt's first n
tokens, served instead of computed:

    FLOPs = 2 x parameters x n  +  2 x layers x width x n^2       (matrix products; causal attention)
    GPU seconds = FLOPs / sustained FLOP/s

Rates are of the copies alone: bytes over the time the clients spent inside ``load`` and ``save``, which
copy and verify. The rest of the demo's time goes to making and comparing bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from kvcache.demo_client import Outcome
from kvcache.demo_locate import Located

GB = 1e9
NS_PER_S = 1e9
BAR_CHARS = 24
SHARING_REQUESTS = 200
"""In so many prompts, some begin like one that another node has."""
NEXT = """\
How to go on:
  kvcache serve --capacity 8GiB       a node for the engines on this host
  kvcache info                        what it holds and has done
  kvcache demo --trace FILE           another trace (kvtrace-v1); --json for scripts
  README.md, "An engine"              the line that connects vLLM to the node"""


@dataclass(frozen=True, slots=True)
class Model:
    """A published model's shape, as far as prefill and KV size depend on it."""

    name: str
    parameters: float
    layers: int
    width: int
    kv_bytes_a_token: int

    def prefill_flops(self, tokens: int) -> float:
        """Of the first ``tokens`` tokens of a prompt."""
        return 2 * self.parameters * tokens + 2 * self.layers * self.width * tokens**2


MODEL = Model("Llama 3.1 8B", 8.03e9, layers=32, width=4096, kv_bytes_a_token=131_072)
GPU = "an H100 at 40 % of its 989 TFLOP/s"
GPU_FLOPS_A_SECOND = 0.4 * 989e12


@dataclass(slots=True)
class Totals:
    """What all clients did together."""

    block_tokens: int
    block_bytes: int
    requests: int = 0
    prompt_tokens: int = 0
    hit_tokens: int = 0
    saved_blocks: int = 0
    wrong_blocks: int = 0
    wrong_bytes: int = 0
    away_requests: int = 0
    load_ns: int = 0
    save_ns: int = 0
    flops_saved: float = 0.0

    def add(self, prompt_tokens: int, outcome: Outcome) -> None:
        hit_tokens = outcome.hit_blocks * self.block_tokens
        self.requests += 1
        self.prompt_tokens += prompt_tokens
        self.hit_tokens += hit_tokens
        self.saved_blocks += outcome.saved_blocks
        self.wrong_blocks += outcome.wrong_blocks
        self.wrong_bytes += outcome.wrong_bytes
        self.away_requests += outcome.away
        self.load_ns += outcome.load_ns
        self.save_ns += outcome.save_ns
        self.flops_saved += MODEL.prefill_flops(hit_tokens)

    @property
    def hit_ratio(self) -> float:
        return self.hit_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def loaded_bytes(self) -> int:
        return self.hit_tokens // self.block_tokens * self.block_bytes

    @property
    def saved_bytes(self) -> int:
        return self.saved_blocks * self.block_bytes

    @property
    def load_gb_a_second(self) -> float:
        return rate(self.loaded_bytes, self.load_ns)

    @property
    def save_gb_a_second(self) -> float:
        return rate(self.saved_bytes, self.save_ns)


@dataclass(frozen=True, slots=True)
class Kill:
    """The node was killed: when, after how many prompts, and how long until a new one answered."""

    at_s: float
    at_request: int
    back_s: float


@dataclass(frozen=True, slots=True)
class Nvme:
    """What went to disk and came from there. ``capacity_bytes`` is 0 without an NVMe tier;
    ``restored_blocks`` are those that the new node found after the kill."""

    capacity_bytes: int = 0
    written_blocks: int = 0
    restored_blocks: int = 0
    read_blocks: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """Everything the summary says. ``hit_again_s`` is the time from the kill to the next hit, below 0
    when there was none."""

    source: str
    clients: int
    capacity_bytes: int
    seconds: float
    totals: Totals
    kill: Kill | None
    hit_again_s: float
    evicted_blocks: int
    located: Located
    nvme: Nvme = Nvme()
    nodes: int = 1
    fetched_blocks: int = 0
    """What nodes had from one another."""

    @property
    def exit_status(self) -> int:
        lost_all = self.nvme.capacity_bytes and self.kill and not self.nvme.restored_blocks
        meant_to_share = self.nodes > 1 and self.clients > 1 and self.totals.requests >= SHARING_REQUESTS
        apart = meant_to_share and not self.fetched_blocks
        return 1 if self.totals.wrong_bytes or not self.totals.hit_tokens or lost_all or apart else 0


def rate(count_bytes: int, time_ns: int) -> float:
    """GB/s; 0 where no time was spent."""
    return count_bytes / GB / (time_ns / NS_PER_S) if time_ns else 0.0


def progress(share: float, totals: Totals, note: str) -> str:
    """One line, short enough for 100 columns."""
    done = round(min(share, 1.0) * BAR_CHARS)
    bar = "#" * done + "." * (BAR_CHARS - done)
    return (
        f"[{bar}] {totals.requests:>6,} prompts  hit {totals.hit_ratio:>5.1%}  "
        f"out {totals.load_gb_a_second:4.1f}  in {totals.save_gb_a_second:4.1f} GB/s  "
        f"wrong {totals.wrong_bytes}  {note}"
    )


def as_json(report: Report) -> dict[str, object]:
    totals = report.totals
    kill = report.kill
    return {
        "requests": totals.requests,
        "prompt_tokens": totals.prompt_tokens,
        "hit_tokens": totals.hit_tokens,
        "wrong_bytes": totals.wrong_bytes,
        "node_kills": 1 if kill else 0,
        "seconds": round(report.seconds, 3),
        "hit_ratio": round(totals.hit_ratio, 4),
        "wrong_blocks": totals.wrong_blocks,
        "loaded_bytes": totals.loaded_bytes,
        "saved_bytes": totals.saved_bytes,
        "load_gb_per_second": round(totals.load_gb_a_second, 3),
        "save_gb_per_second": round(totals.save_gb_a_second, 3),
        "prefill_flops_saved": totals.flops_saved,
        "gpu_seconds_saved": round(totals.flops_saved / GPU_FLOPS_A_SECOND, 3),
        "model": MODEL.name,
        "evicted_blocks": report.evicted_blocks,
        "capacity_bytes": report.capacity_bytes,
        "block_bytes": totals.block_bytes,
        "block_tokens": totals.block_tokens,
        "clients": report.clients,
        "nodes": report.nodes,
        "peer_fetched_blocks": report.fetched_blocks,
        "trace": report.source,
        "restart_seconds": round(kill.back_s, 3) if kill else 0.0,
        "requests_without_node": totals.away_requests,
        "hit_again_seconds": round(report.hit_again_s, 3),
        "nvme_capacity_bytes": report.nvme.capacity_bytes,
        "nvme_written_blocks": report.nvme.written_blocks,
        "nvme_restored_blocks": report.nvme.restored_blocks,
        "nvme_read_blocks": report.nvme.read_blocks,
        "located": msgspec.to_builtins(report.located),
    }


def summary(report: Report) -> str:
    """The whole result for a person, in aligned plain text."""
    totals = report.totals
    rows = [
        ("prompts", f"{totals.requests:,} from {report.clients} client processes in {report.seconds:.1f} s"),
        ("prompt tokens", f"{totals.prompt_tokens:,}"),
        ("hit tokens", f"{totals.hit_tokens:,} ({totals.hit_ratio:.1%}), loaded instead of computed"),
        *_prefill_rows(totals),
        ("out", _moved(totals.loaded_bytes, totals.load_gb_a_second)),
        ("in", _moved(totals.saved_bytes, totals.save_gb_a_second)),
        ("evicted", _evicted(report)),
        ("NVMe", _nvme(report)),
        ("peers", _peers(report)),
        ("wrong bytes", _wrong(totals)),
        *[("node-1 killed", line) for line in _kill_lines(report)],
        ("who has it?", _located(report.located)),
    ]
    return "\n".join(["", *_aligned(rows), "", NEXT])


def _aligned(rows: list[tuple[str, str]]) -> list[str]:
    """``name  text``; a name that repeats is said once."""
    width = max(len(name) for name, _ in rows)
    lines, before = [], ""
    for name, text in rows:
        lines.append(f"  {'' if name == before else name:<{width}}  {text}")
        before = name
    return lines


def _prefill_rows(totals: Totals) -> list[tuple[str, str]]:
    gpu_seconds = totals.flops_saved / GPU_FLOPS_A_SECOND
    return [
        (
            "prefill saved",
            f"{totals.flops_saved:.3g} FLOPs, {gpu_seconds:,.1f} GPU seconds, if this were {MODEL.name}",
        ),
        (
            "prefill saved",
            f"(2 x {MODEL.parameters:.3g} x n + 2 x {MODEL.layers} x {MODEL.width} x n^2 FLOPs",
        ),
        ("prefill saved", f" for n hit tokens of a prompt; {GPU})"),
    ]


def _moved(count_bytes: int, gb_a_second: float) -> str:
    return f"{count_bytes / GB:,.1f} GB at {gb_a_second:.1f} GB/s a client, verified"


def _evicted(report: Report) -> str:
    capacity_blocks = report.capacity_bytes // report.totals.block_bytes
    return (
        f"{report.evicted_blocks:,} blocks, least recently used leaves first; "
        f"{capacity_blocks:,} fit in a node"
    )


def _nvme(report: Report) -> str:
    nvme = report.nvme
    if not nvme.capacity_bytes:
        return "not used"
    return (
        f"{nvme.written_blocks:,} blocks written, {nvme.read_blocks:,} read back; "
        f"{nvme.restored_blocks:,} found again after the kill"
    )


def _peers(report: Report) -> str:
    if report.nodes < 2:
        return "one node: nobody to fetch from"
    moved = report.fetched_blocks * report.totals.block_bytes / GB
    return f"{report.fetched_blocks:,} blocks ({moved:,.1f} GB) that another node held, fetched and verified"


def _wrong(totals: Totals) -> str:
    if totals.wrong_bytes:
        return (
            f"{totals.wrong_bytes:,} in {totals.wrong_blocks:,} blocks. This must never be: please report it."
        )
    return f"0 (every one of {totals.loaded_bytes:,} was compared)"


def _located(located: Located) -> str:
    if located.error:
        return f"POST /v1/locate was not answered: {located.error}"
    if not located.asked_blocks:
        return "nobody asked: no prompt was hit"
    held = f"{located.source or 'nobody'} holds {located.blocks} of {located.asked_blocks} blocks"
    return (
        f"POST /v1/locate: {held} of a prompt in tier {located.tier or 'none'} ({located.answered_ms:.1f} ms)"
    )


def _kill_lines(report: Report) -> list[str]:
    kill = report.kill
    if kill is None:
        return ["not this time: the replay was over too soon"]
    again = f"hits again {report.hit_again_s:.2f} s after" if report.hit_again_s >= 0 else "no hit after it"
    return [
        f"at {kill.at_s:.1f} s, after {kill.at_request:,} prompts; the next answers {kill.back_s:.2f} s on",
        f"no client failed: {report.totals.away_requests:,} prompts met no node and were computed; {again}",
    ]
