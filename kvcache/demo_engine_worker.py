"""One real vLLM engine in this process, driven by JSON lines: a command a line in, an answer a line out.

    {"generate": {"prompts": [[1, 2, ...]], "salt": "a", "tokens": 8}}
                     ->  {"tokens": [[...]], "cached": [...], "reasons": [...], "seconds": [...]}
    {"metrics": {}}  ->  {"vllm:prompt_tokens_by_source{local_compute}": 12, ...}
    {"reset": {}}    ->  forgets the engine's own prefix cache

Started as ``python -m kvcache.demo_engine_worker MODEL EXTRA_CONFIG_JSON [ENGINE_ARGUMENTS_JSON]``, with
an EXTRA_CONFIG of null without the connector; a MODEL that is not there is made first. It ends when its
input does. ``seconds`` are to the first token, by vLLM's own clock.

The model is random weights: no hub, no tokenizer. They are drawn wide (``SPREAD``), so that a wrong block
changes the tokens.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_CI_ENV": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "OMP_NUM_THREADS": "1",
}
BLOCK_TOKENS = 32
RESET_S = 60.0
VOCABULARY = 512
SPREAD = 0.2
DEMO_SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
"""24 million parameters: a core has to work on a prompt of 1,000 tokens for a while."""
DEMO_KV_BYTES_A_TOKEN = 8 * 2 * 4 * 64 * 4


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


def prompt(length: int, seed: int) -> list[int]:
    """Token ids that are the same everywhere, and never the end-of-text token."""
    import random

    draw = random.Random(seed)
    return [draw.randrange(3, VOCABULARY) for _ in range(length)]


def engine_arguments(model: str, extra: dict[str, Any] | None) -> dict[str, Any]:
    """What makes an engine ready in seconds, and its numbers repeatable."""
    arguments: dict[str, Any] = {
        "model": model,
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "block_size": BLOCK_TOKENS,
        "max_model_len": 2048,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 512,
        "kv_cache_memory_bytes": 64 << 20,
        "enforce_eager": True,
        "enable_prefix_caching": True,
        "prefix_caching_hash_algo": "sha256_cbor",
        "distributed_executor_backend": "uni",
        "disable_log_stats": False,
        "seed": 0,
    }
    if extra is not None:
        arguments["kv_transfer_config"] = {
            "kv_connector": "KVCacheConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": extra,
        }
    return arguments


class Engine:
    """Every public method is a command."""

    def __init__(self, model: str, extra: dict[str, Any] | None, **changes: object) -> None:
        from vllm import LLM

        self.llm = LLM(**{**engine_arguments(model, extra), **changes})

    def generate(self, prompts: list[list[int]], salt: str = "", tokens: int = 8) -> dict[str, Any]:
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        inputs = [{"prompt_token_ids": p, **({"cache_salt": salt} if salt else {})} for p in prompts]
        outputs = self.llm.generate(inputs, sampling, use_tqdm=False)
        return {
            "tokens": [list(output.outputs[0].token_ids) for output in outputs],
            "cached": [output.num_cached_tokens for output in outputs],
            "reasons": [output.outputs[0].finish_reason for output in outputs],
            "seconds": [output.metrics.first_token_latency for output in outputs],
        }

    def metrics(self) -> dict[str, float]:
        values: dict[str, float] = {}
        for metric in self.llm.get_metrics():
            kept = {k: v for k, v in metric.labels.items() if k in ("source", "reason") and v}
            name = metric.name + (f"{{{','.join(kept.values())}}}" if kept else "")
            if (value := getattr(metric, "value", None)) is not None:
                values[name] = values.get(name, 0) + value
        return values

    def reset(self) -> dict[str, Any]:
        """Pages of ended requests that are still being saved are given back by a later step: take some."""
        end = time.monotonic() + RESET_S
        while not (done := self.llm.reset_prefix_cache()) and time.monotonic() < end:
            self.generate([[3, 4, 5]], tokens=1)
        return {"done": done}


def serve(make: Callable[..., Engine]) -> None:
    """Make the engine that the command line says, and do what standard input says until it ends."""
    os.environ.update({name: os.environ.get(name, value) for name, value in SETTINGS.items()})
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Whatever the engine prints is no answer.
    model, extra, changes = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads((*sys.argv, "{}")[3])
    if not model.exists():
        build(model, **DEMO_SHAPE)
    engine = make(str(model), extra, **changes)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        ((name, arguments),) = json.loads(line).items()
        print(json.dumps(getattr(engine, name)(**arguments)), file=answers, flush=True)
    engine.llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    serve(Engine)
