"""An engine of ``gpu_tiers.py``: a transformers model with random weights, in a process of its own.

    python gpu_engine.py DESCRIPTOR cpu|cuda NAME        JSON messages over a socket, descriptors with them

It prefills prompts and saves their KV to every tier, or loads it from one and goes on. The KV of a prompt
lies in two tensors a layer, ``[1, head, token, number]``, which are also read as pages of the prompt: so
blocks are gathered from and scattered to what the model itself uses. The last tokens of a prompt are always
computed, and the answer's tokens are chosen greedily, so two runs over the same KV give the same tokens.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import gpu_peer
import torch
from gpu_rig import Mover
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from kvcache.block import BlockSpec
from kvcache.device.gather import gather_and_sum, scatter_and_sum
from kvcache.device.pages import PagedCache
from kvcache.device.pinned import Pinned
from kvcache.device.slab import CpuMemory, Slab
from kvcache.device.sums import joined
from kvcache.device.vmm import Vmm

if TYPE_CHECKING:
    from gpu_store import Node

TAIL_TOKENS = 16
ANSWER_TOKENS = 16
MESSAGE_BYTES = 1 << 17
VOCABULARY = 32_000


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a model, and of its blocks: ``pages`` of ``page_tokens`` each."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    dim: int
    page_tokens: int
    pages: int
    dtype: str

    @property
    def spec(self) -> BlockSpec:
        tokens = self.page_tokens * self.pages
        item_bytes = torch.empty((), dtype=getattr(torch, self.dtype)).element_size()
        return BlockSpec(tokens, 2 * self.layers, self.kv_heads, tokens * self.dim * item_bytes)


SHAPES = {
    "8B": Shape(4096, 14336, 32, 32, 8, 128, 16, 16, "bfloat16"),
    "1B": Shape(2048, 8192, 16, 32, 8, 64, 16, 16, "bfloat16"),
    "tiny": Shape(64, 128, 2, 4, 2, 16, 4, 4, "bfloat16"),
}
"""8B has 7.2 G parameters (Llama 3's shape with a small vocabulary), and 128 KiB of KV a token."""


def build(shape: Shape, device: torch.device) -> Any:
    """The same weights in every process: drawn on the device, from one seed."""
    config = LlamaConfig(
        vocab_size=VOCABULARY if shape.hidden > 64 else 256,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.dim,
        max_position_embeddings=1 << 16,
        initializer_range=0.05,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, shape.dtype))
    try:
        with device:
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(usual)


class Kv:
    """Of one prompt: what the model gets, and the same memory as pages. A ``Place`` of ``gpu_rig``."""

    def __init__(self, engine: Engine, tensors: Sequence[torch.Tensor], tokens: int) -> None:
        """``tensors``: K, V of layer 0, and so on, ``[1, head, token, number]``, alike in their strides."""
        shape = engine.shape
        count = tokens // shape.page_tokens
        pages = [
            each[0, :, :tokens].unflatten(1, (count, shape.page_tokens)).permute(1, 0, 2, 3)
            for each in tensors
        ]
        self.tensors = tensors
        self.cache = PagedCache(pages, "single_hnd")
        self.blocks = [list(range(at, at + shape.pages)) for at in range(0, count, shape.pages)]
        self.spec = self.cache.spec(shape.pages)
        self.memory, self.host = engine.memory, engine.host

    @classmethod
    def empty(cls, engine: Engine, tokens: int) -> Kv:
        shape = engine.shape
        size = (2 * shape.layers, 1, shape.kv_heads, tokens, shape.dim)
        return cls(
            engine, list(torch.empty(size, dtype=getattr(torch, shape.dtype), device=engine.device)), tokens
        )

    @classmethod
    def of(cls, engine: Engine, cache: DynamicCache, tokens: int) -> Kv:
        parts = [part.contiguous() for layer in cache.layers for part in (layer.keys, layer.values)]
        return cls(engine, parts, tokens)

    def given(self, model: Any) -> DynamicCache:
        cache = DynamicCache(config=model.config)
        for layer in range(len(self.tensors) // 2):
            cache.update(self.tensors[2 * layer], self.tensors[2 * layer + 1], layer)
        return cache


class Engine:
    """The model and the tiers. Bytes that failed their sums are counted, never used."""

    def __init__(self, device: torch.device, name: str) -> None:
        self.device, self.shape = device, SHAPES[name]
        began = time.perf_counter()
        self.model = build(self.shape, device)
        self._finish()
        self.build_s = time.perf_counter() - began
        self.memory = gpu_peer.memory_of(device.type)
        self._room = torch.empty(self.shape.spec.block_bytes, dtype=torch.uint8, device=device)
        self.host = torch.empty(0, dtype=torch.uint8)
        self.hbm: Slab | None = None
        self._node: Node | None = None

    def attach(self, message: dict[str, Any], descriptors: list[int]) -> dict[str, Any]:
        """The host slab comes first, then that of HBM, if there is one."""
        assert message["block_bytes"] == self.shape.spec.block_bytes
        self.host = CpuMemory().open(descriptors[0], message["host_bytes"])
        if self.device.type == "cuda":
            self._pinned = Pinned(Vmm(), self.device.index or 0, self.host)
        if message["hbm"]:
            ticket = gpu_peer.unpacked(json.dumps(message["hbm"]).encode())
            self.hbm = Slab.open(self.memory, ticket, descriptors[1])
        for each in descriptors:
            os.close(each)
        parameters = sum(each.numel() for each in self.model.parameters())
        return {"parameters": parameters, "build_s": self.build_s}

    def node(self, message: dict[str, Any], _: list[int]) -> dict[str, Any]:
        """Another node, or the same after its restart."""
        if self._node is not None:
            self._node.close()
        from gpu_store import Node

        self._node = Node(message["socket"], self.shape, self.device)
        return {}

    def leave(self, _message: dict[str, Any], _: list[int]) -> dict[str, Any]:
        """No node any more."""
        if self._node is not None:
            self._node.close()
            self._node = None
        return {}

    # --- what is asked of it ----------------------------------------------------------------------

    def fill(self, message: dict[str, Any], _: list[int]) -> dict[str, Any]:
        """Prefill, and save to every tier from block ``first`` of each slab on."""
        tokens, prompt = message["tokens"], self._prompt(message["tokens"])
        cache = self._prefilled(prompt, tokens)
        kv = Kv.of(self, cache, tokens)
        offsets = self._offsets(message["first"], len(kv.blocks))
        mover = Mover(kv)
        sums = [_digest(row) for row in mover.save(offsets, kv.blocks)]
        mover.close()
        if self.hbm is not None:
            whole = self.hbm.whole(self.hbm.ticket.incarnation)
            in_hbm = joined(gather_and_sum(kv.cache.moves(offsets, kv.blocks), whole))
            assert [_digest(row) for row in in_hbm] == sums
        no_hbm = ""
        if self._node is not None:
            size = kv.spec.block_bytes
            no_hbm = self._node.save(kv, prompt[:tokens], [self.host[at : at + size] for at in offsets])
        answer, _seconds = self._answer(prompt, tokens, lambda: cache)
        return {"answer": answer, "sums": sums, "no_hbm": no_hbm}

    def recompute(self, message: dict[str, Any], _: list[int]) -> dict[str, Any]:
        tokens, prompt = message["tokens"], self._prompt(message["tokens"])
        answer, seconds = self._answer(prompt, tokens, lambda: self._prefilled(prompt, tokens))
        return {"answer": answer, "seconds": seconds, "load_s": 0.0, "wrong": 0}

    def load(self, message: dict[str, Any], _: list[int]) -> dict[str, Any]:
        """From the tier that is named; the time is that to the first token, all of loading in it."""
        tokens, prompt = message["tokens"], self._prompt(message["tokens"])
        took, wrong, tier, kept = 0.0, 0, message["tier"], []

        def loaded() -> DynamicCache:
            nonlocal took, wrong
            began = time.perf_counter()
            kv = Kv.empty(self, tokens)
            kept.append(kv)
            offsets = self._offsets(message["first"], len(kv.blocks))
            if tier.startswith("node"):
                assert self._node is not None
                self._node.load(tier, kv, prompt[:tokens])  # Verified by the client.
            else:
                rows = (self._from_hbm if tier == "hbm" else self._from_host)(kv, offsets)
                wrong = sum(_digest(row) != want for row, want in zip(rows, message["sums"], strict=True))
            cache = kv.given(self.model)
            self._finish()
            took = time.perf_counter() - began
            return cache

        answer, seconds = self._answer(prompt, tokens, loaded)
        if tier.startswith("node"):
            wrong = sum(
                have != want for have, want in zip(self._summed(kept[0]), message["sums"], strict=True)
            )
        return {"answer": answer, "seconds": seconds, "load_s": took, "wrong": wrong}

    # --- parts ------------------------------------------------------------------------------------

    def _from_hbm(self, kv: Kv, offsets: list[int]) -> list[bytes]:
        assert self.hbm is not None
        whole = self.hbm.whole(self.hbm.ticket.incarnation)
        return joined(scatter_and_sum(kv.cache.moves(offsets, kv.blocks), whole))

    def _from_host(self, kv: Kv, offsets: list[int]) -> list[bytes]:
        """By this process's GPU, out of the registered slab."""
        return Mover(kv).load(offsets, kv.blocks)

    def _summed(self, kv: Kv) -> list[str]:
        """What is in the pages now, block by block."""
        found = []
        for block in kv.blocks:
            [row] = joined(gather_and_sum(kv.cache.moves([0], [block]), self._room))
            found.append(_digest(row))
        return found

    def _prompt(self, tokens: int) -> list[int]:
        """Its first token is its own, so no two prompts share a block."""
        size = self.model.config.vocab_size - 8
        return [5 + (tokens * 37 + at * 7919 + at * at % 1009) % size for at in range(tokens + TAIL_TOKENS)]

    def _offsets(self, first: int, count: int) -> list[int]:
        return [at * self.shape.spec.block_bytes for at in range(first, first + count)]

    @torch.no_grad()
    def _prefilled(self, prompt: list[int], tokens: int) -> DynamicCache:
        cache = DynamicCache(config=self.model.config)
        self._forward(prompt[:tokens], cache)
        return cache

    @torch.no_grad()
    def _answer(
        self, prompt: list[int], tokens: int, get: Callable[[], DynamicCache]
    ) -> tuple[list[int], float]:
        """The tokens, and seconds to the first of them. The same steps whatever ``get`` does."""
        self._finish()
        began = time.perf_counter()
        cache = get()
        answer = [self._forward(prompt[tokens:], cache)]
        seconds = time.perf_counter() - began
        while len(answer) < ANSWER_TOKENS:
            answer.append(self._forward(answer[-1:], cache))
        return answer, seconds

    def _forward(self, tokens: list[int], cache: DynamicCache) -> int:
        ids = torch.tensor([tokens], device=self.device)
        output = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return int(output.logits[0, -1].argmax())

    def _finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _digest(sums: bytes) -> str:
    """Of all the sums of a block: short enough for a message."""
    return blake2b(sums, digest_size=8).hexdigest()


def main() -> None:
    kind = sys.argv[2]
    if kind == "cpu":
        torch.set_num_threads(1)
    with socket.socket(fileno=int(sys.argv[1])) as line:
        engine = Engine(torch.device(kind, 0) if kind == "cuda" else torch.device(kind), sys.argv[3])
        while True:
            data, descriptors, _, _ = socket.recv_fds(line, MESSAGE_BYTES, 2)
            if not data:
                return
            message = json.loads(data)
            try:
                reply = getattr(engine, message["op"])(message, descriptors)
            except Exception as error:  # Border: the benchmark says it in its output.
                reply = {"error": f"{type(error).__name__}: {error}"[:2000]}
            line.sendall(json.dumps(reply).encode())


if __name__ == "__main__":
    main()
