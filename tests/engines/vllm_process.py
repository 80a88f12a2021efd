"""The demo's vLLM engine with more commands, for tests:

    {"names": {"prompt": [...]}}  ->  {"namespace": "<hex>", "hashes": ["<hex>", ...]}
    {"hand": {"prompts": [[...]], "params": [{...}], "tokens": 8}}  ->  {"tokens": [[...]], "params": [{...}]}
    {"lose": {}}  ->  {}                                        the engine's GPU is reset, as far as HBM goes
    {"cached": {"sequences": [[...]], "salts": ["..."]}}  ->  {"held": [[0, 1, 5], ...], "blocks": 3}

An engine argument ``kv_events_config`` switches on the engine's own events.

Started as ``python -m tests.engines.vllm_process MODEL EXTRA_CONFIG_JSON [ENGINE_ARGUMENTS_JSON]``.
"""

from __future__ import annotations

from typing import Any

from kvcache import demo_engine_worker
from kvcache.demo_engine_worker import BLOCK_TOKENS, SETTINGS, engine_arguments, serve

__all__ = ["BLOCK_TOKENS", "PATIENT", "SETTINGS", "engine_arguments"]


PATIENT = {"lookup_timeout_ms": 5_000, "move_timeout_ms": 30_000, "load_wait_ms": 30_000}
"""Whatever else runs on the machine: tests count what is loaded, not how soon."""


def pretend_cuda() -> None:
    """The connector takes this engine for one on CUDA: what it does there, on memory of the CPU."""
    from kvcache.client.connectors import vllm, vllm_namespace

    vllm.is_on_cuda = lambda config: True
    vllm_namespace.CONTENTS += ("CPU_ATTN",)


class Engine(demo_engine_worker.Engine):
    def __init__(self, model: str, extra: dict[str, Any] | None, **changes: Any) -> None:
        if extra is not None and extra.get("cuda"):
            pretend_cuda()
        if "kv_events_config" in changes:
            from vllm.config import KVEventsConfig

            changes["kv_events_config"] = KVEventsConfig(**changes["kv_events_config"])
        super().__init__(model, extra, **changes)

    def cached(self, sequences: list[list[int]], salts: list[str]) -> dict[str, Any]:
        """The scheduler's truth: which blocks of these sequences its pool finds, by the hashes that vLLM
        computes for them, not by anything that it published; and how many it has at all."""
        from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id

        scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler
        pool = scheduler.kv_cache_manager.block_pool.cached_block_hash_to_block
        held = [
            [
                at
                for at, name in enumerate(_vllm_hashes(tokens, salt))
                if pool.get_one_block(make_block_hash_with_group_id(name, 0)) is not None
            ]
            for tokens, salt in zip(sequences, salts, strict=True)
        ]
        return {"held": held, "blocks": len(pool)}

    def hand(
        self, prompts: list[list[int]], params: list[dict[str, Any]], tokens: int, salt: str = ""
    ) -> dict[str, Any]:
        """Generate, with ``kv_transfer_params`` for each prompt, and those that come back."""
        from vllm import SamplingParams

        sampling = [
            SamplingParams(
                temperature=0,
                max_tokens=tokens,
                ignore_eos=True,
                detokenize=False,
                extra_args={"kv_transfer_params": each},
            )
            for each in params
        ]
        salted = {"cache_salt": salt} if salt else {}
        inputs = [{"prompt_token_ids": prompt, **salted} for prompt in prompts]
        outputs = self.llm.generate(inputs, sampling, use_tqdm=False)
        return {
            "tokens": [list(output.outputs[0].token_ids) for output in outputs],
            "params": [output.kv_transfer_params for output in outputs],
            "seconds": [output.metrics.first_token_latency for output in outputs],
        }

    def lose(self) -> dict[str, Any]:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        get_kv_transfer_group()._gpu.lose("it was reset")
        return {}

    def names(self, prompt: list[int]) -> dict[str, Any]:
        """What the store calls the full blocks of ``prompt``."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        worker = get_kv_transfer_group()._worker
        (handle,) = worker._attachment.handles()
        return {
            "namespace": handle.namespace_id.hex(),
            "hashes": [name.hex() for name in handle.hashes(prompt)],
        }


def _vllm_hashes(tokens: list[int], salt: str) -> list[Any]:
    from vllm.utils.hashing import sha256_cbor
    from vllm.v1.core.kv_cache_utils import hash_block_tokens

    names: list[Any] = []
    for at in range(0, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        keys = (("cache_salt", salt),) if salt and not at else None
        part = tokens[at : at + BLOCK_TOKENS]
        names.append(hash_block_tokens(sha256_cbor, names[-1] if names else None, part, keys))
    return names


if __name__ == "__main__":
    serve(Engine)
