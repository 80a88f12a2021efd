"""A model made on the spot: random weights, no hub, no tokenizer. Small, but every layer counts.

Weights are drawn wide (``SPREAD``), so that a wrong block changes the tokens.
"""

from __future__ import annotations

from pathlib import Path

VOCABULARY = 512
SPREAD = 0.2


def build(folder: Path, seed: int = 0, **changes: object) -> Path:
    """A Llama of 4 layers, 2 KV heads of 32, in ``folder``. ``changes`` go into its configuration."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "initializer_range": SPREAD,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **changes,
    }
    LlamaForCausalLM(LlamaConfig(**settings)).float().save_pretrained(folder)
    return folder


def build_sliding(folder: Path) -> Path:
    """A Mistral whose layers see only the last 64 tokens."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        sliding_window=64,
    )
    MistralForCausalLM(config).float().save_pretrained(folder)
    return folder


def prompt(length: int, seed: int) -> list[int]:
    """Token ids that are the same everywhere, and never the end-of-text token."""
    import random

    draw = random.Random(seed)
    return [draw.randrange(3, VOCABULARY) for _ in range(length)]
