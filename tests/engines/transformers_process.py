"""One transformers model in this process, driven by JSON lines like ``vllm_process``.

    {"generate": {"prompts": [[1, 2, ...]], "hints": {"hint": "final"}}}
                                              ->  {"tokens", "counters", "store", "embedded"}: by it
    {"plain": {"prompts": [...]}}             ->  {"tokens"}, by the model alone
    {"names": {"prompt": [...]}}              ->  {"namespace", "hashes"}
    {"lose": {}}                              ->  {}: its GPU fails

Started as ``python -m tests.engines.transformers_process MODEL ADDRESS [WAY]``: ``host`` (the default),
``staged`` (as on a GPU for which the node has no HBM) and ``hbm``.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from functools import partial
from typing import Any

NEW_TOKENS = 8
STAGED_BLOCKS = 5
TIMEOUT_MS = 5_000
"""Of each call: a node that is stopped costs it once, a machine that looks away for less costs nothing."""
WAIT_MS = 30_000
"""For blocks that the node reads from NVMe."""


class Engine:
    def __init__(self, folder: str, address: str, way: str = "host") -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from kvcache.client import connect_blocking, connect_device_blocking
        from kvcache.client.connectors import transformers_pages
        from kvcache.client.connectors.transformers import PrefixCache
        from kvcache.device.engine import EngineDevice

        torch.set_num_threads(1)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.gpu = EngineDevice.of(self.model.device) if way == "hbm" else None
        if self.gpu is not None:
            self.store = connect_device_blocking(self.gpu, address, timeout_ms=TIMEOUT_MS)
        else:
            self.store = connect_blocking(address, timeout_ms=TIMEOUT_MS)
        for name in ("lease", *(["lease_device"] if self.gpu is not None else [])):
            vars(self.store)[name] = partial(getattr(self.store, name), wait_ms=WAIT_MS)
        self.cache = PrefixCache(self.model, self.store, gpu=self.gpu)
        if way == "staged":
            self.cache._is_staged = True
            transformers_pages.BATCH_BYTES = STAGED_BLOCKS * self.cache.spec.block_bytes
        self.embedded = 0
        self.model.get_input_embeddings().register_forward_hook(self._embed)

    def _embed(self, module: object, inputs: Any, output: object) -> None:
        self.embedded += inputs[0].numel()

    def generate(self, prompts: list[list[int]], hints: dict[str, Any] | None = None) -> dict[str, Any]:
        from kvcache.request_hints import RequestHints

        counters, store = Counter(self.cache.counters), Counter(self.store.counters)
        self.embedded = 0
        generate = partial(self.cache.generate, hints=RequestHints(**(hints or {})))
        tokens = [self._answer(generate, prompt) for prompt in prompts]
        return {
            "tokens": tokens,
            "counters": Counter(self.cache.counters) - counters,
            "store": Counter(self.store.counters) - store,
            "embedded": self.embedded,
        }

    def plain(self, prompts: list[list[int]]) -> dict[str, Any]:
        return {"tokens": [self._answer(self.model.generate, prompt) for prompt in prompts]}

    def names(self, prompt: list[int]) -> dict[str, Any]:
        handle = self.store.open(self.cache.namespace, self.cache.spec)
        hashes = [name.hex() for name in handle.hashes(prompt)]
        return {"namespace": handle.namespace_id.hex(), "hashes": hashes}

    def lose(self) -> dict[str, Any]:
        assert self.gpu is not None
        self.gpu.lose("it was reset")
        return {}

    def _answer(self, generate: Any, prompt: list[int]) -> list[int]:
        import torch

        output = generate(
            torch.tensor([prompt]),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
        tokens: list[int] = output[0, len(prompt) :].tolist()
        return tokens


def main() -> None:
    os.environ.update({"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Whatever the engine prints is no answer.
    engine = Engine(*sys.argv[1:])
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        ((name, arguments),) = json.loads(line).items()
        print(json.dumps(getattr(engine, name)(**arguments)), file=answers, flush=True)
    engine.store.close()


if __name__ == "__main__":
    main()
