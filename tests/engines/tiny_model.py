"""Models made on the spot: the demo's, small, and one that is refused."""

from __future__ import annotations

from pathlib import Path

from kvcache.demo_engine_worker import VOCABULARY, build, prompt

__all__ = ["build", "build_sliding", "prompt"]


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
