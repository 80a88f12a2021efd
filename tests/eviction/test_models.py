"""Models by name: what their published configurations come to."""

from __future__ import annotations

import pytest

from kvcache.errors import BadInput
from kvcache.eviction.simulate.models import MODELS, model_named


def test_bytes_a_token_follow_from_the_layers() -> None:
    """Keys and values of each layer in 16 bits: 8 heads of 128, or one latent of 512 + 64."""
    assert model_named("llama-3.1-8b").token_bytes == 2 * 2 * 32 * 8 * 128
    assert model_named("llama-3.1-70b").token_bytes == 2 * 2 * 80 * 8 * 128
    assert model_named("deepseek-v3").token_bytes == 2 * 61 * (512 + 64)


@pytest.mark.parametrize("name", list(MODELS))
def test_attention_costs_more_than_all_else_after_some_tens_of_thousands_of_tokens(name: str) -> None:
    model = MODELS[name]
    assert 20_000 < model.position_tokens < 120_000
    assert model.flops(1, 0) == 2 * model.active_weights
    twice = model.flops(int(2 * model.position_tokens), int(2 * model.position_tokens) ** 2)
    assert twice == pytest.approx(2 * model.flops(int(2 * model.position_tokens), 0), rel=1e-4)


def test_another_model_is_given_by_its_bytes() -> None:
    assert model_named("4096").token_bytes == 4096
    for name in ("0", "llama-3.1-7b", "", "9" * 30):
        with pytest.raises(BadInput):
            model_named(name)
    with pytest.raises(BadInput) as raised:
        model_named("Llama-3.1-80B")
    assert raised.value.todo.startswith("did you mean 'llama-3.1-8")
