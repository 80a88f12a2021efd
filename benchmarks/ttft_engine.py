"""One vLLM engine for ``bench_ttft.py``, under whichever environment runs it: prompts in, seconds out.

    {"prompt": [1, 2, ...]}  ->  {"seconds": 0.1, "token": 7, "cached": 3968}

Started as ``python ttft_engine.py MODEL KV_TRANSFER_CONFIG_JSON``; with ``--build MODEL`` it makes the
model: random weights, 180 M parameters, bfloat16, 16 KiB of KV a token.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

LENGTH_MAX = 4_352


def build(folder: str) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=LENGTH_MAX,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def engine(model: str, transfer: dict[str, Any] | None) -> Any:
    from vllm import LLM

    arguments: dict[str, Any] = {"kv_transfer_config": transfer} if transfer else {}
    if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0":
        arguments["distributed_executor_backend"] = "uni"
    return LLM(
        model=model,
        skip_tokenizer_init=True,
        dtype="bfloat16",
        block_size=128,
        max_model_len=LENGTH_MAX,
        max_num_batched_tokens=LENGTH_MAX,
        max_num_seqs=2,
        kv_cache_memory_bytes=1 << 30,
        enforce_eager=True,
        prefix_caching_hash_algo="sha256_cbor",
        **arguments,
    )


def answer(llm: Any, prompt: list[int]) -> dict[str, Any]:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    (output,) = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "token": output.outputs[0].token_ids[0],
        "cached": output.num_cached_tokens or 0,
    }


def main() -> None:
    if sys.argv[1] == "--build":
        build(sys.argv[2])
        return
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Whatever the engine prints is no answer.
    llm = engine(sys.argv[1], json.loads(sys.argv[2]))
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(llm, json.loads(line)["prompt"])), file=answers, flush=True)


if __name__ == "__main__":
    main()
