"""What the scheduler half of the vLLM connector tells the worker half, and what both ask of the engine.

No vLLM import: the two halves are driven by these values and by the small protocols below, so that
tests drive them without an engine. Everything that crosses processes is a frozen dataclass of plain
values (vLLM pickles it). Hashes travel joined (``block.split_hashes``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Protocol

from kvcache.request_hints import UNKNOWN, RequestHints

# Every counter of the connector; what stands after a colon of its name becomes the label ``reason``.
METRICS: dict[str, str] = {
    "lookups": "Prompts asked for at the store, by outcome.",
    "hit_tokens": "Prompt tokens that the store promised, and the engine did not plan to compute.",
    "hbm_tokens": "Those of them that are in HBM.",
    "loaded_blocks": "Blocks copied from the store into the engine's pages, verified.",
    "loaded_bytes": "Bytes of those blocks.",
    "load_us": "Microseconds spent loading.",
    "failed_blocks": "Blocks that were promised and not had, so the engine computed them, by reason.",
    "saved_blocks": "Blocks that the store holds after a save.",
    "saved_bytes": "Bytes of those blocks.",
    "save_us": "Microseconds spent saving.",
    "unsaved_blocks": "Full blocks that were not saved, by reason.",
    "handoffs": "Requests that came with kv_transfer_params, by what they ask.",
    "store": "What the store's client counted in the workers, by its own names.",
    "lookup_store": "The same in the scheduler.",
    "errors": "Exceptions caught at the border with the engine, by entry point.",
}


@dataclass(frozen=True, slots=True)
class LoadJob:
    """Fill the pages ``block_ids`` with the blocks from position ``start`` of ``prefix``.

    ``prefix`` is exactly what the scheduler leased as ``lease_name``: the same name and prefix give the
    worker the same lease, when it asks as it was asked: with ``hbm``, of HBM first."""

    request: str
    lease_name: str
    prefix: bytes
    start: int
    block_ids: tuple[int, ...]
    hbm: bool = False


@dataclass(frozen=True, slots=True)
class SaveJob:
    """Save the pages ``block_ids`` as ``hashes``, which stand at position ``start`` behind ``parent``
    (empty: the root). Valid once the forward pass of the step that carries it has ended; with ``streams``,
    layer by layer while it runs. ``push`` names the node to which they are to be copied.
    ``hints`` are for the eviction policy. ``hbm``: into HBM, as far as it goes."""

    request: str
    parent: bytes
    hashes: bytes
    start: int
    block_ids: tuple[int, ...]
    streams: bool = False
    push: str = ""
    hints: RequestHints = UNKNOWN
    hbm: bool = False


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One engine step.

    ``abandoned`` are loads that cannot be done, reported as failed. ``preempted`` lose their pages in
    this step. ``freeing`` have ended and wait for their saves; ``forgotten`` have ended and wait for nothing.
    ``timed`` is the number that the workers give back at the end of the step; 0: it is not timed.
    """

    loads: tuple[LoadJob, ...] = ()
    saves: tuple[SaveJob, ...] = ()
    abandoned: tuple[LoadJob, ...] = ()
    preempted: tuple[str, ...] = ()
    freeing: tuple[str, ...] = ()
    forgotten: tuple[str, ...] = ()
    timed: int = 0


class Placeholder(Protocol):
    """Where a multimodal item stands in the prompt."""

    @property
    def offset(self) -> int: ...
    @property
    def length(self) -> int: ...


class Feature(Protocol):
    """A multimodal item: its content hash and its place."""

    @property
    def identifier(self) -> str: ...
    @property
    def mm_position(self) -> Placeholder: ...


class Adapter(Protocol):
    """The LoRA adapter of a request."""

    @property
    def lora_name(self) -> str: ...
    @property
    def lora_int_id(self) -> int: ...
    @property
    def lora_path(self) -> str: ...
    @property
    def load_inplace(self) -> bool: ...


class EngineRequest(Protocol):
    """What is read of ``vllm.v1.request.Request``."""

    @property
    def request_id(self) -> str: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def num_prompt_tokens(self) -> int: ...
    @property
    def num_computed_tokens(self) -> int: ...
    @property
    def all_token_ids(self) -> Sequence[int]: ...
    @property
    def cache_salt(self) -> str | None: ...
    @property
    def lora_request(self) -> Adapter | None: ...
    @property
    def mm_features(self) -> Sequence[Feature]: ...
    @property
    def prompt_embeds(self) -> object | None: ...
    @property
    def skip_reading_prefix_cache(self) -> bool: ...
    @property
    def resumable(self) -> bool: ...
    @property
    def kv_transfer_params(self) -> Mapping[str, object] | None: ...


class Tally:
    """Counters that two threads add to. ``take`` empties it."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._counts: Counter[str] = Counter()

    def add(self, name: str, amount: int = 1, reason: str = "") -> None:
        if amount:
            assert name in METRICS, name
            with self._lock:
                self._counts[f"{name}:{reason}" if reason else name] += amount

    def take(self) -> dict[str, int]:
        with self._lock:
            counts, self._counts = dict(self._counts), Counter()
        return counts


def merged(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    """Both sets of counts, added."""
    return dict(Counter(one) + Counter(other))
