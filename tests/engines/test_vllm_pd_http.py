"""Two vLLM servers behind a proxy as there are: it knows the words of vLLM, and nothing of kvcache.

What a proxy for prefill and decode does is these lines: it sends the prompt with ``max_tokens`` 1 and
``do_remote_decode`` to one server, and the request to the other with the ``kv_transfer_params`` that came
back. Here each server is several processes, as in production.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from kvcache.testing.processes import NodeProcess
from tests.engines.http_process import HttpEngine
from tests.engines.test_vllm_pd import ROUNDS, WAITS, held_port, nodes, whole_blocks
from tests.engines.tiny_model import build, prompt
from tests.engines.vllm_process import BLOCK_TOKENS

pytestmark = [pytest.mark.engine, pytest.mark.slow]
pytest.importorskip("vllm")


def proxied(prefill: HttpEngine, decode: HttpEngine, body: dict[str, Any]) -> dict[str, Any]:
    params = {
        "do_remote_decode": True,
        "do_remote_prefill": False,
        "remote_engine_id": None,
        "remote_block_ids": None,
        "remote_host": None,
        "remote_port": None,
    }
    first = prefill.post("/v1/completions", {**body, "max_tokens": 1, "kv_transfer_params": params})
    return decode.post("/v1/completions", {**body, "kv_transfer_params": first["kv_transfer_params"]})


def asking(tokens: list[int], **more: object) -> dict[str, Any]:
    wanted = {"max_tokens": 8, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    return {"model": "tiny", "prompt": tokens, **wanted, **more}


def test_a_proxy_of_today(tmp_path: Path) -> None:
    model = build(tmp_path / "model")
    with ExitStack() as stack:
        pair: list[NodeProcess] = nodes(tmp_path, stack, "tcp")
        prefill, decode = (
            stack.enter_context(
                HttpEngine(
                    model, {"address": node.socket, **WAITS}, held_port(stack), tmp_path / f"{name}.log"
                )
            )
            for name, node in zip("ab", pair, strict=True)
        )
        for server in (prefill, decode):
            server.wait_ready()
        prompts = [prompt(length, seed=length) for length in (200, 900)]
        for tokens in prompts:
            cold = decode.post("/v1/completions", asking(tokens, cache_salt="cold"))
            warm = proxied(prefill, decode, asking(tokens))
            assert warm["choices"][0]["token_ids"] == cold["choices"][0]["token_ids"]
        blocks = whole_blocks(prompts)
        assert decode.metric("vllm:kvcache_loaded_blocks_total") == blocks, decode.said()
        by_source = "vllm:prompt_tokens_by_source_total"
        assert decode.metric(f"{by_source} external_kv_transfer") == blocks * BLOCK_TOKENS
        assert decode.metric('vllm:kvcache_handoffs_total reason="decode"') == len(prompts)
        assert prefill.metric('vllm:kvcache_handoffs_total reason="prefill"') == len(prompts)
        streamed = 'vllm:kvcache_store_total reason="advances"'
        for seed in range(ROUNDS):  # A pass may be over before its saver has a turn.
            if prefill.metric(streamed):
                break
            proxied(prefill, decode, asking(prompt(900, seed=10_000 + seed)))
        assert prefill.metric(streamed) > 0
