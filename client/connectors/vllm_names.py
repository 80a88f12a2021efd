"""The names of an engine request's blocks: what a block of KV depends on, besides the tokens before it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvcache.block import BlockHash, chain, extra_keys
from kvcache.client.connectors.vllm_plan import EngineRequest, Feature

if TYPE_CHECKING:
    from kvcache.client.store import Handle

ERA_BYTES = 16


class Names:
    """``adapter_digest`` names a LoRA adapter by content, given its path and the engine's number for it;
    it returns b"" when it cannot."""

    def __init__(self, block_tokens: int, adapter_digest: Callable[[str, int], bytes]) -> None:
        self._block_tokens = block_tokens
        self._adapter_digest = adapter_digest
        self._era = b""

    def begin_era(self) -> None:
        """From now on blocks have names that only this engine knows."""
        self._era = os.urandom(ERA_BYTES)

    def identity(self, request: EngineRequest) -> tuple[bytes, str]:
        """(adapter digest, why this request cannot be cached, if so)."""
        if request.prompt_embeds is not None:
            return b"", "prompt_embeds"
        if request.resumable:
            return b"", "streaming_input"
        adapter = request.lora_request
        if adapter is None:
            return b"", ""
        if adapter.load_inplace:
            return b"", "adapter_in_place"
        digest = self._adapter_digest(adapter.lora_path, adapter.lora_int_id)
        return digest, "" if digest else "adapter_unknown"

    def extend(
        self,
        hashes: list[BlockHash],
        request: EngineRequest,
        adapter: bytes,
        handle: Handle,
        block_count: int,
    ) -> None:
        """Make ``hashes``, the names so far, at least ``block_count``. REQUIRES: the request has so many full
        blocks of known tokens."""
        done = len(hashes)
        if done < block_count:
            tokens = request.all_token_ids[done * self._block_tokens : block_count * self._block_tokens]
            extra = [self._extra(request, adapter, index) for index in range(done, block_count)]
            root = hashes[-1] if hashes else handle.root
            hashes += chain(root, handle.tenant_key, tokens, self._block_tokens, extra)

    def _extra(self, request: EngineRequest, adapter: bytes, block_index: int) -> bytes:
        """Adapter and salt (the first block), and the multimodal items in a block."""
        parts: list[tuple[str, bytes]] = []
        if block_index == 0 and self._era:
            parts.append(("era", self._era))
        if block_index == 0 and adapter:
            parts.append(("lora", adapter))
        if block_index == 0 and request.cache_salt:
            parts.append(("salt", _text(request.cache_salt)))
        start = block_index * self._block_tokens
        for feature in request.mm_features:
            if _overlaps(feature, start, start + self._block_tokens):
                place = (feature.mm_position.offset - start).to_bytes(8, "little", signed=True)
                parts.append(("mm", place + _text(feature.identifier)))
        return extra_keys(parts)


def _overlaps(feature: Feature, start: int, end: int) -> bool:
    place = feature.mm_position
    return place.offset < end and start < place.offset + place.length


def _text(value: str) -> bytes:
    """Any string the engine lets through, lone surrogates too, as bytes that no other string has."""
    return value.encode("utf-8", "surrogatepass")
