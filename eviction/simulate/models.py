"""What a token of a prompt costs, in memory and in work, for a few models by name.

A token's KV takes ``token_bytes`` in 16-bit numbers. Prefill of token ``p`` takes 2 FLOPs a weight that it
meets, and as attention looks back at ``p`` tokens, ``2 * attention_width * layers`` FLOPs for each; so from
position ``position_tokens`` on, attention costs more than all else. From the models' published
configurations; a fine-tuned model costs what its base does.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from kvcache.errors import BadInput

TOKEN_BYTES_MAX = 1 << 30


@dataclass(frozen=True, slots=True)
class Model:
    """``attention_width``: query heads times the length of a key and a value, together halved."""

    name: str
    token_bytes: int
    active_weights: float = 8e9
    layers: int = 32
    attention_width: int = 4_096

    @property
    def position_tokens(self) -> float:
        return self.active_weights / (self.layers * self.attention_width)

    def flops(self, tokens: int, squared: int) -> float:
        """Of prefilling prompts of ``tokens`` tokens in all, whose squares add up to ``squared``."""
        return 2 * self.active_weights * (tokens + squared / (2 * self.position_tokens))


MODELS: dict[str, Model] = {
    model.name: model
    for model in (
        Model("llama-3.1-8b", 131_072, 8.03e9, 32, 4_096),
        Model("llama-3.1-70b", 327_680, 70.6e9, 80, 8_192),
        Model("qwen3-32b", 262_144, 32.8e9, 64, 8_192),
        Model("qwen3-235b-a22b", 192_512, 22.2e9, 94, 8_192),
        Model("deepseek-v3", 70_272, 37.6e9, 61, 20_480),
        Model("kimi-k2.5", 70_272, 32.9e9, 61, 10_240),
    )
}


def model_named(name: str) -> Model:
    """One of the table, or one of which only its bytes a token are known: ``131072``. RAISES BadInput."""
    if name in MODELS:
        return MODELS[name]
    if name.isdecimal() and 1 <= int(name) <= TOKEN_BYTES_MAX:
        return Model(name, int(name))
    near = difflib.get_close_matches(name.lower(), MODELS, 1)
    raise BadInput(
        "bad_config",
        f"no model is called {name!r}",
        f"known are {', '.join(MODELS)}",
        f"did you mean {near[0]!r}?"
        if near
        else "for another, give its bytes of KV a token, for instance 131072",
    )
