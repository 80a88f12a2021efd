"""What a vLLM configuration is called, and which are refused, over configurations made of plain values."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvcache.client.connectors.vllm_namespace import adapter_digest, check_backends, describe, refuse
from kvcache.client.connectors.vllm_settings import Settings
from kvcache.errors import BadInput
from kvcache.namespace import Namespace


class FullAttentionSpec(SimpleNamespace):
    """vLLM's class is known by its name."""


class MLAAttentionSpec(FullAttentionSpec):
    pass


class SlidingWindowSpec(FullAttentionSpec):
    pass


class MambaSpec(FullAttentionSpec):
    pass


PAGE = FullAttentionSpec(
    block_size=32,
    num_heads=2,
    page_size_bytes=2 * 32 * 64 * 4,
    dtype="torch.float32",
    sliding_window=None,
    attention_chunk_size=None,
    non_causal=False,
    page_size_padded=None,
    state_content_bytes=None,
    tokens_per_state=1,
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    return tmp_path


def engine(model: Path) -> Any:
    text = SimpleNamespace(to_dict=lambda: {"rope_theta": 10_000.0, "rms_norm_eps": 1e-5})
    return SimpleNamespace(
        device_config=SimpleNamespace(device_type="cpu"),
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            tensor_parallel_size=2,
        ),
        model_config=SimpleNamespace(
            model=str(model),
            revision=None,
            dtype="torch.float32",
            is_encoder_decoder=False,
            hf_text_config=text,
            quantization=None,
            max_model_len=4_096,
        ),
        cache_config=SimpleNamespace(cache_dtype="auto", calculate_kv_scales=False),
        load_config=SimpleNamespace(load_format="auto"),
        speculative_config=None,
    )


def cache(*pages: Any) -> Any:
    groups = [SimpleNamespace(kv_cache_spec=page, layer_names=["l0", "l1", "l2"]) for page in pages]
    return SimpleNamespace(kv_cache_groups=groups, kv_cache_layout="LBHNC")


def names(config: Any, isa: str = "vec", version: str = "0.32.0", **settings: Any) -> list[Namespace]:
    return describe(config, cache(PAGE), version, isa, range(2), Settings(**settings))[0]


def changed(page: FullAttentionSpec, kind: type[FullAttentionSpec], **values: object) -> Any:
    return kind(**{**vars(page), **values})


def test_a_plain_engine_is_served(model: Path) -> None:
    refuse(engine(model), cache(PAGE))


@pytest.mark.parametrize(
    ("page", "word"),
    [
        (changed(PAGE, MLAAttentionSpec), "MLA"),
        (changed(PAGE, SlidingWindowSpec, sliding_window=64), "sliding window"),
        (changed(PAGE, FullAttentionSpec, sliding_window=64), "sliding window"),
        (changed(PAGE, FullAttentionSpec, attention_chunk_size=64), "chunked"),
        (changed(PAGE, FullAttentionSpec, non_causal=True), "non-causal"),
        (changed(PAGE, FullAttentionSpec, page_size_padded=1 << 20), "padded"),
        (changed(PAGE, MambaSpec), "MambaSpec"),
    ],
)
def test_a_cache_that_is_not_plain_full_attention_is_refused(model: Path, page: Any, word: str) -> None:
    with pytest.raises(BadInput, match=word) as refused:
        refuse(engine(model), cache(page))
    assert refused.value.code == "unsupported_engine"
    assert "\n" not in str(refused.value)


def test_a_hybrid_model_is_refused(model: Path) -> None:
    with pytest.raises(BadInput, match="2 KV cache groups"):
        refuse(engine(model), cache(PAGE, changed(PAGE, MambaSpec)))


def test_an_unknown_layout_is_refused(model: Path) -> None:
    other = cache(PAGE)
    other.kv_cache_layout = "LBNHC"
    with pytest.raises(BadInput, match="LBNHC"):
        refuse(engine(model), other)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda c: setattr(c.device_config, "device_type", "cuda"), "cuda"),
        (lambda c: setattr(c.parallel_config, "pipeline_parallel_size", 2), "pipeline"),
        (lambda c: setattr(c.parallel_config, "decode_context_parallel_size", 2), "context"),
        (lambda c: setattr(c.model_config, "is_encoder_decoder", True), "encoder-decoder"),
        (lambda c: setattr(c.cache_config, "calculate_kv_scales", True), "scales"),
        (lambda c: setattr(c, "speculative_config", SimpleNamespace(method="eagle")), "eagle"),
    ],
)
def test_an_engine_whose_kv_has_no_name_is_refused(
    model: Path, change: Callable[[Any], None], word: str
) -> None:
    config = engine(model)
    change(config)
    with pytest.raises(BadInput, match=word):
        refuse(config, cache(PAGE))


def test_random_weights_have_no_identity(model: Path) -> None:
    config = engine(model)
    config.load_config.load_format = "dummy"
    with pytest.raises(BadInput, match="dummy"):
        names(config)
    assert names(config, weights="agreed")[0].weights == "agreed"


def test_each_rank_has_its_name(model: Path) -> None:
    first, second = names(engine(model))
    assert first.differences(second) == ["tp_rank: stored 1, yours 0"]
    assert first.root(bytes(32)) == second.root(bytes(32))


def test_the_shape_is_one_plane_a_layer(model: Path) -> None:
    _, spec = describe(engine(model), cache(PAGE), "0.32.0", "vec", [0], Settings())
    assert (spec.block_tokens, spec.plane_count, spec.head_count) == (32, 3, 2)
    assert spec.plane_bytes == PAGE.page_size_bytes


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda c: setattr(c.model_config, "dtype", "torch.bfloat16"), "dtype"),
        (lambda c: setattr(c.model_config, "quantization", "fp8"), "dtype"),
        (lambda c: setattr(c.cache_config, "cache_dtype", "fp8_e4m3"), "scales"),
        (lambda c: setattr(c.parallel_config, "tensor_parallel_size", 4), "tp_size"),
        (
            lambda c: setattr(c.model_config.hf_text_config, "to_dict", lambda: {"rope_theta": 5e5}),
            "rope",
        ),
    ],
)
def test_what_changes_the_bytes_changes_the_name(
    model: Path, change: Callable[[Any], None], field: str
) -> None:
    config, other = engine(model), copy.deepcopy(engine(model))
    change(other)
    assert [text.split(":")[0] for text in names(config)[0].differences(names(other)[0])] == [field]


def test_where_position_encoding_follows_the_longest_prompt_its_length_changes_the_name(model: Path) -> None:
    config, longer = engine(model), engine(model)
    longer.model_config.max_model_len = 131_072
    assert names(config) == names(longer)
    for each in (config, longer):
        rope = {"rope_type": "longrope", "original_max_position_embeddings": 4_096}
        each.model_config.hf_text_config.to_dict = lambda rope=rope: {"rope_parameters": rope}
    assert names(config)[0].differences(names(longer)[0])[0].startswith("rope")


def test_weights_packing_and_release_change_the_name(model: Path) -> None:
    config = engine(model)
    before = names(config)[0]
    assert before.differences(names(config, isa="amx")[0]) == ["isa: stored cpu amx, yours cpu vec"]
    assert "layout" in before.differences(names(config, version="0.33.1")[0])[0]
    assert before == names(config, version="0.32.4")[0]
    (model / "model.safetensors").write_bytes(b"weightz")
    assert before.differences(names(config)[0])[0].startswith("weights")


def test_an_adapter_is_named_by_its_content(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, content in ((one, b"a"), (two, b"b")):
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(content)
    assert adapter_digest(str(one), 1) != adapter_digest(str(two), 2)
    assert adapter_digest(str(tmp_path / "none"), 3) == b""


def test_an_adapter_loaded_anew_from_the_same_path_is_read_anew(tmp_path: Path) -> None:
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(b"a")
    before = adapter_digest(str(tmp_path), 1)
    file.write_bytes(b"b")
    assert adapter_digest(str(tmp_path), 1) == before, "what the engine uses was read before"
    assert adapter_digest(str(tmp_path), 2) != before


class TestSettings:
    def test_none_are_needed(self) -> None:
        assert Settings.from_extra_config({}) == Settings()

    @pytest.mark.parametrize(
        ("extra", "words"),
        [
            ({"adress": "unix:///a"}, "did you mean 'address'"),
            ({"epoch": "1"}, "it is a int"),
            ({"save_generated": 1}, "it is a bool"),
            ({"lookup_timeout_ms": 0}, "at least 1"),
            ({"address": "nowhere"}, "address"),
        ],
    )
    def test_what_is_not_a_setting_is_refused(self, extra: dict[str, object], words: str) -> None:
        with pytest.raises(BadInput, match=words):
            Settings.from_extra_config(extra)

    def test_the_token_is_the_first_line_of_its_file(self, tmp_path: Path) -> None:
        path = tmp_path / "token"
        path.write_text("secret\n# a note\n")
        assert Settings(token_file=str(path)).token == "secret"
        with pytest.raises(BadInput, match="token file"):
            _ = Settings(token_file=str(tmp_path / "none")).token


def on_cuda(model: Path) -> Any:
    config = engine(model)
    config.device_config.device_type = "cuda"
    return config


CUDA = Settings(cuda=True)


class TestCuda:
    def test_it_is_served_where_the_setting_says_so(self, model: Path) -> None:
        """Whatever the order of its strides: blocks are in one order."""
        strided = cache(PAGE)
        strided.kv_cache_layout = "LBNHC"
        refuse(on_cuda(model), strided, CUDA)
        with pytest.raises(BadInput, match="the setting cuda"):
            refuse(on_cuda(model), strided)
        with pytest.raises(BadInput, match="LBNHC"):
            refuse(engine(model), strided, CUDA)

    def test_another_device_is_refused(self, model: Path) -> None:
        config = on_cuda(model)
        config.device_config.device_type = "xpu"
        with pytest.raises(BadInput, match="xpu"):
            refuse(config, cache(PAGE), CUDA)

    @pytest.mark.parametrize(
        ("part", "name", "word"),
        [("model_config", "enable_sleep_mode", "sleep"), ("parallel_config", "enable_dbo", "overlap")],
    )
    def test_what_moves_pages_under_us_is_refused(self, model: Path, part: str, name: str, word: str) -> None:
        config = on_cuda(model)
        setattr(getattr(config, part), name, True)
        with pytest.raises(BadInput, match=word):
            refuse(config, cache(PAGE), CUDA)

    def test_pages_whose_content_is_not_known_are_refused(self, model: Path) -> None:
        check_backends(["FLASH_ATTN", "FLASHINFER", "TRITON_ATTN"])
        with pytest.raises(BadInput, match="FLEX_ATTENTION"):
            check_backends(["FLASH_ATTN", "FLEX_ATTENTION"])
        packed = changed(PAGE, FullAttentionSpec, num_head_slots=1)
        with pytest.raises(BadInput, match="packed"):
            refuse(on_cuda(model), cache(packed), CUDA)

    def test_its_blocks_are_not_those_of_the_cpu(self, model: Path) -> None:
        [name, _], [other, _] = names(on_cuda(model), isa=""), names(engine(model))
        assert name.isa == "cuda"
        assert name.namespace_id() != other.namespace_id()
