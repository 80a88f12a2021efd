"""The fingerprint of a vLLM engine's KV, read from its configuration, and what is refused there.

Refused at start, by name: whatever needs more than whole blocks of full attention in one KV cache
group, and whatever makes the same tokens give other KV in a way that the fingerprint cannot say.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

from kvcache import weights
from kvcache.block import BlockSpec
from kvcache.client.connectors.vllm_settings import Settings
from kvcache.errors import BadInput, KVCacheError
from kvcache.namespace import Namespace, shape_of

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec

LAYOUT = "LBHNC"
DEFAULTS = Settings()
CONTENTS = ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN")
"""The backends on CUDA whose content of a head and token is known to be K, then V."""


def refuse(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, settings: Settings = DEFAULTS) -> None:
    """RAISES BadInput (unsupported_engine) with one line when this engine's KV cannot be served correctly."""
    device_type = vllm_config.device_config.device_type
    reason = _device_refusal(vllm_config, settings) or _engine_refusal(vllm_config)
    reason = reason or _cache_refusal(kv_cache_config, device_type)
    if reason:
        raise BadInput(
            "unsupported_engine",
            f"kvcache cannot serve this engine: {reason}",
            "its blocks would be wrong or incomplete",
            "run it without the kvcache connector; docs/vllm.md lists what is served",
        )


def describe(
    vllm_config: VllmConfig,
    kv_cache_config: KVCacheConfig,
    version: str,
    isa: str,
    ranks: Sequence[int],
    settings: Settings,
) -> tuple[list[Namespace], BlockSpec]:
    """The namespace of each tensor parallel rank, and the shape they share. ``isa`` is that of the CPU
    backend, by which it packs pages; empty on CUDA, where all of ``CONTENTS`` fill them alike. RAISES
    BadInput."""
    group = kv_cache_config.kv_cache_groups[0]
    page, model, parallel = group.kv_cache_spec, vllm_config.model_config, vllm_config.parallel_config
    layers = len(group.layer_names)
    spec = BlockSpec(page.block_size, layers, page.num_heads, page.page_size_bytes // page.num_heads)
    quantised = vllm_config.cache_config.cache_dtype.startswith("fp8")
    base = Namespace(
        model=settings.model or model.model,
        weights=settings.weights or _weights(vllm_config),
        epoch=settings.epoch,
        rope=_digest(model.hf_text_config.to_dict(), model.max_model_len),
        dtype=_numbers(page, model),
        scales="with the weights" if quantised else "",
        layout=f"vllm {_family(version)} {LAYOUT}",
        isa=f"cpu {isa}" if isa else "cuda",
        layer_count=layers,
        block_tokens=spec.block_tokens,
        shape=shape_of(spec),
        tp_size=parallel.tensor_parallel_size,
    )
    return [replace(base, tp_rank=rank) for rank in ranks], spec


@lru_cache(maxsize=256)
def adapter_digest(path: str, loaded_as: int) -> bytes:
    """What names a LoRA adapter: the content of its files. b"" when they cannot be read.

    ``loaded_as`` is the engine's number for it, another after each time it is loaded: files that were
    replaced and loaded anew are read anew, and those of an adapter in use once."""
    try:
        return weights.digest(path).encode()
    except (KVCacheError, OSError):
        return b""


def check_backends(names: Iterable[str]) -> None:
    """RAISES BadInput unless these attention backends, on CUDA, fill pages alike."""
    others = sorted(set(names).difference(CONTENTS))
    if others:
        raise BadInput(
            "unsupported_engine",
            f"kvcache cannot serve the attention backend {', '.join(others)} on CUDA",
            f"what its pages hold is not known; it is for {', '.join(CONTENTS)}",
            "choose one of these (--attention-backend), or run it without the kvcache connector",
        )


def _device_refusal(vllm_config: VllmConfig, settings: Settings) -> str:
    kind = vllm_config.device_config.device_type
    if kind == "cpu":
        return ""
    if kind != "cuda" or not settings.cuda:
        return f"its KV is on {kind}; the CPU backend is served, and CUDA where the setting cuda says so"
    if getattr(vllm_config.model_config, "enable_sleep_mode", False):
        return "sleep mode on CUDA: its KV goes away while blocks may be copied"
    if getattr(vllm_config.parallel_config, "enable_dbo", False):
        return "dual batch overlap on CUDA: when a layer is computed is not known"
    return ""


def _engine_refusal(vllm_config: VllmConfig) -> str:
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    speculative = vllm_config.speculative_config
    if parallel.pipeline_parallel_size > 1:
        return "pipeline parallelism: a rank holds only some of the layers"
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        return "context parallelism: a rank holds only some of the tokens"
    if speculative is not None and speculative.method != "ngram":
        return f"speculation by {speculative.method}: the draft model's KV has no name of its own"
    if model.is_encoder_decoder:
        return "an encoder-decoder model: its cross attention depends on more than the tokens before"
    if getattr(vllm_config.cache_config, "calculate_kv_scales", False):
        return "calculate_kv_scales: the scales depend on the first prompts that the engine saw"
    return ""


def _cache_refusal(kv_cache_config: KVCacheConfig, device_type: str) -> str:
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        kinds = sorted({type(group.kv_cache_spec).__name__ for group in groups})
        return f"{len(groups)} KV cache groups ({', '.join(kinds)}): hybrid models are not served yet"
    page = groups[0].kv_cache_spec
    if kind := _page_refusal(page):
        return kind
    layout = kv_cache_config.kv_cache_layout
    if layout not in (None, LAYOUT) and device_type == "cpu":
        return f"the KV cache layout {layout}: {LAYOUT} is served"
    return ""


def _page_refusal(page: KVCacheSpec) -> str:
    kind = type(page).__name__
    if "MLA" in kind:
        return f"{kind}: multi-head latent attention (MLA) is not served yet"
    if "SlidingWindow" in kind or getattr(page, "sliding_window", None) is not None:
        return f"{kind} with a sliding window: only full attention is served"
    if getattr(page, "attention_chunk_size", None) is not None:
        return f"{kind} with chunked attention: only full attention is served"
    if kind != "FullAttentionSpec":
        return f"{kind}: only FullAttentionSpec is served"
    if page.non_causal:
        return "non-causal attention: a block depends on the tokens after it"
    if (
        page.page_size_padded is not None
        or page.state_content_bytes is not None
        or getattr(page, "num_head_slots", None) is not None
        or page.tokens_per_state != 1
    ):
        return "pages that are padded or packed in a way not known here"
    return ""


def _weights(vllm_config: VllmConfig) -> str:
    """RAISES BadInput when nothing identifies the weights."""
    model, load = vllm_config.model_config, vllm_config.load_config
    if load.load_format == "dummy":
        raise BadInput(
            "unsupported_engine",
            "kvcache cannot serve load_format=dummy: its random weights have no identity",
            "blocks of one engine would be wrong in another",
            'give "weights" in kv_connector_extra_config if they are the same everywhere',
        )
    return weights.digest(model.model, model.revision or "")


def _digest(config: dict[str, object], token_count_max: int) -> str:
    """Of the whole text configuration: position encoding and all else that shapes the numbers.

    With LongRoPE the engine takes the factors for long prompts, for all, when it serves any that long."""
    text = json.dumps(config, default=str)
    served = {"served_tokens": token_count_max} if '"longrope"' in text else {}
    return weights.config_digest({**json.loads(text), **served})


def _numbers(page: KVCacheSpec, model: ModelConfig) -> str:
    """What is stored, and what it was computed in: weights quantised while loading give other numbers."""
    quantised = f", weights as {model.quantization}" if model.quantization else ""
    return f"{_plain(page.dtype)}, computed in {_plain(model.dtype)}{quantised}"


def _plain(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _family(version: str) -> str:
    """Pages are packed alike within a minor release; across them nothing is promised."""
    return ".".join(version.split(".")[:2])
