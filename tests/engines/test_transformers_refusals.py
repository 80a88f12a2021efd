"""What transformers does that no block name says: such models are refused, such calls go past the store."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kvcache.errors import BadInput

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.engine, pytest.mark.slow]

PROMPT = list(range(10, 50))


class NoStore:
    """Asked for nothing here."""


def model(**settings: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        **settings,
    )
    return transformers.LlamaForCausalLM(config).float().eval()


def prefix_cache(served: Any) -> Any:
    from kvcache.client.connectors.transformers import PrefixCache

    return PrefixCache(served, NoStore())  # type: ignore[arg-type]  # nothing is asked of it


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 2.0},
        {
            "rope_type": "longrope",
            "factor": 2.0,
            "short_factor": [1.0] * 16,
            "long_factor": [2.0] * 16,
            "original_max_position_embeddings": 128,
        },
    ],
)
def test_position_encoding_that_follows_the_length_is_refused(rope: dict[str, Any]) -> None:
    """The same leading tokens have other KV in a longer prompt."""
    with pytest.raises(BadInput, match=rope["rope_type"]):
        prefix_cache(model(rope_parameters={"rope_theta": 10_000.0, **rope}))


def test_position_encoding_that_does_not_is_served() -> None:
    prefix_cache(model(rope_parameters={"rope_theta": 10_000.0, "rope_type": "linear", "factor": 2.0}))


@pytest.mark.parametrize("others", [[("cuda", 1)], [("cuda", 1), ("meta", 0)], [("cpu", 0)]])
def test_a_model_on_several_devices_is_refused(others: list[tuple[str, int]]) -> None:
    """As ``device_map`` makes them. Blocks of all layers go to and from one."""
    served = model()
    devices = [torch.device("cuda", 0), *(torch.device(*other) for other in others)]
    served.parameters = lambda: (SimpleNamespace(device=device) for device in devices)
    with pytest.raises(BadInput, match="several devices"):
        prefix_cache(served)


def test_parameters_that_are_brought_when_they_are_needed_lie_nowhere() -> None:
    served = model()
    parameters = [*served.parameters(), SimpleNamespace(device=torch.device("meta"))]
    served.parameters = lambda: iter(parameters)
    prefix_cache(served)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"num_beams": 2}, "several_outputs"),
        ({"num_return_sequences": 2, "do_sample": True}, "several_outputs"),
        ({"use_cache": False}, "own_cache"),
        ({"cache_implementation": "static"}, "own_cache"),
        ({"pad_token_id": PROMPT[3], "eos_token_id": 1}, "padding"),
    ],
)
@pytest.mark.parametrize("given", ["by the model", "in the call", "by name"])
def test_settings_that_go_past_the_store_count_wherever_they_stand(
    settings: dict[str, Any], reason: str, given: str
) -> None:
    served, arguments = model(), {}
    if given == "by the model":
        served.generation_config.update(**settings)
    elif given == "in the call":
        arguments = {"generation_config": transformers.GenerationConfig(max_new_tokens=1, **settings)}
    else:
        arguments = settings
    cache = prefix_cache(served)
    ids = torch.tensor([PROMPT])
    assert cache._passed_by(ids, arguments) == reason
    assert cache._passed_by(ids, {}) == (reason if given == "by the model" else "")


def test_a_padding_token_that_also_ends_is_a_token() -> None:
    arguments = {"pad_token_id": PROMPT[3], "eos_token_id": [1, PROMPT[3]]}
    assert prefix_cache(model())._passed_by(torch.tensor([PROMPT]), arguments) == ""
