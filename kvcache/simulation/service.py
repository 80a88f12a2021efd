"""How long a worker takes: the model's constants, in seconds, and the two sums made of them.

They are those of a dense model of 70 billion parameters with grouped-query attention (80 layers, 8 KV heads
of 128) in eight bits of KV, on four accelerators of 80 GB and 3.35 TB/s at half of 1 PFLOP/s each:

    prefill  140 GFLOP a token / 2 PFLOP/s ............................ 64 us a token
             attention: 4 * 8192 * 80 FLOP a pair of tokens, at 1.6 PFLOP/s ... 1.6 ns a pair
    load     160 KiB a token: 20 GB/s from host memory ................. 8 us a token
    decode   140 GB of weights / 13.4 TB/s, and what each step costs besides ... 15 ms a step
             160 KiB a token of context / 8 TB/s ...................... 20 ns a token and step

They set the scale. What a comparison of routers rests on is that computing a token costs about eight times
what loading it from host memory does, and that a prompt of 10,000 tokens costs as much as 50 steps of decode.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Service:
    """A worker's speed. Prompts are computed one at a time, in chunks; after each chunk comes one step of
    decode of all that is running, so that either slows the other."""

    prompt_s: float = 10e-3
    token_s: float = 64e-6
    pair_s: float = 1.6e-9
    load_s: float = 8e-6
    chunk_tokens: int = 2_048
    step_s: float = 15e-3
    sequence_step_s: float = 0.1e-3
    context_step_s: float = 20e-9
    slots: int = 128

    def prefill_s(self, prompt_tokens: int, cached_tokens: int, loaded_tokens: int) -> float:
        """To compute a prompt of which the first ``cached_tokens`` are there, ``loaded_tokens`` of them in
        host memory, on a worker that decodes nothing. At least the last token is always computed."""
        computed = max(1, prompt_tokens - cached_tokens)
        pairs = computed * (prompt_tokens - computed / 2)
        return self.prompt_s + self.token_s * computed + self.pair_s * pairs + self.load_s * loaded_tokens

    def chunks(self, prompt_tokens: int, cached_tokens: int) -> int:
        return -(-max(1, prompt_tokens - cached_tokens) // self.chunk_tokens)

    def decode_s(self, sequences: int, context_tokens: int) -> float:
        """One step of decode: a token for each of ``sequences``, which attend ``context_tokens`` together."""
        return self.step_s + self.sequence_step_s * sequences + self.context_step_s * context_tokens
