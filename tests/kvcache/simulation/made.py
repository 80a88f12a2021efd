"""Small workloads for the simulator's tests: a service's, at a pace that fills a few slow workers."""

from __future__ import annotations

from kvcache.eviction.traces.generate import Workload as Made
from kvcache.eviction.traces.generate import generate
from kvcache.simulation.workload import Workload, prepare

BLOCK = 64


def made(requests: int = 250, seed: int = 3, speed: float = 1.0, **changes: float) -> Workload:
    """Prompts of some 2,000 tokens in blocks of 64, two thirds of which were said before."""
    shape = {
        "request_count": requests,
        "block_tokens": BLOCK,
        "seed": seed,
        "arrivals_a_second": 4.0,
        "system_prompt_tokens": 600,
        "turns": 6,
        "turn_gap_s": 8.0,
        "question_tokens": 400,
        "answer_tokens": 60,
        "document_tokens": 3_000,
        "one_shot_tokens": 2_500,
        **changes,
    }
    return prepare("made", generate(Made(**shape)), speed)  # type: ignore[arg-type]  # Fields by name.
