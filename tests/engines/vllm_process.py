"""The demo's vLLM engine with one more command, for tests:

    {"names": {"prompt": [...]}}  ->  {"namespace": "<hex>", "hashes": ["<hex>", ...]}

Started as ``python -m tests.engines.vllm_process MODEL EXTRA_CONFIG_JSON [ENGINE_ARGUMENTS_JSON]``.
"""

from __future__ import annotations

from typing import Any

from kvcache import demo_engine_worker
from kvcache.demo_engine_worker import BLOCK_TOKENS, SETTINGS, engine_arguments, serve

__all__ = ["BLOCK_TOKENS", "SETTINGS", "engine_arguments"]


class Engine(demo_engine_worker.Engine):
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
