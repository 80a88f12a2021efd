"""The demo's vLLM engine with more commands, for tests:

    {"names": {"prompt": [...]}}  ->  {"namespace": "<hex>", "hashes": ["<hex>", ...]}
    {"hand": {"prompts": [[...]], "params": [{...}], "tokens": 8}}  ->  {"tokens": [[...]], "params": [{...}]}

Started as ``python -m tests.engines.vllm_process MODEL EXTRA_CONFIG_JSON [ENGINE_ARGUMENTS_JSON]``.
"""

from __future__ import annotations

from typing import Any

from kvcache import demo_engine_worker
from kvcache.demo_engine_worker import BLOCK_TOKENS, SETTINGS, engine_arguments, serve

__all__ = ["BLOCK_TOKENS", "SETTINGS", "engine_arguments"]


class Engine(demo_engine_worker.Engine):
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

    def names(self, prompt: list[int]) -> dict[str, Any]:
        """What the store calls the full blocks of ``prompt``."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        worker = get_kv_transfer_group()._worker
        (handle,) = worker._attachment.handles()
        return {
            "namespace": handle.namespace_id.hex(),
            "hashes": [name.hex() for name in handle.hashes(prompt)],
        }


if __name__ == "__main__":
    serve(Engine)
