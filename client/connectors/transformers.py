"""Prefixes of transformers models: fill a ``DynamicCache`` from the store, and save what it holds.

    cache = PrefixCache(model, connect_blocking())
    output = cache.generate(input_ids, max_new_tokens=64)      # computes only what the store has not

Blocks are in the canonical axis order (``kvcache.block``): layer, K and V, head, token, dim; so a block
is the same bytes on any device. Only full attention is served: sliding windows, latent attention and
recurrent states are refused when the ``PrefixCache`` is made. Everything else that cannot be named
(several sequences, padding, images) goes past the store and is counted.

The sum: a block is copied twice (store to staging, staging to cache); for an 8 B model (128 KiB a token)
at 5 GB/s that is 50 us a token, against milliseconds of prefill on the same machine.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kvcache import weights
from kvcache.block import BlockHash, BlockSpec, extra_keys
from kvcache.client.connectors.attach import Attachment
from kvcache.client.store import SaveHints
from kvcache.clock import SystemClock
from kvcache.errors import BadInput
from kvcache.namespace import Namespace, shape_of
from kvcache.request_hints import UNKNOWN, RequestHints

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvcache.client.store import BlockingStore, Handle

SAMPLES = 1_024
BATCH_BYTES = 64 << 20

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Shape:
    layers: int
    heads: int
    tokens: int
    dim: int

    def blocks(self, count: int) -> tuple[int, ...]:
        return (count, self.layers, 2, self.heads, self.tokens, self.dim)


class PrefixCache:
    """The prefixes of one model in one store. For one thread; the store may be shared.

    ``weights_id`` replaces the digest that is taken of the model's parameters; raise ``epoch`` when they
    change in place. RAISES BadInput (unsupported_engine) for a model whose KV is not plain full attention.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        store: BlockingStore,
        *,
        block_tokens: int = 32,
        weights_id: str = "",
        epoch: int = 0,
    ) -> None:
        self._model = model
        self._shape = _shape_of(model, block_tokens)
        item_bytes = torch.empty((), dtype=model.dtype).element_size()
        head_bytes = block_tokens * self._shape.dim * item_bytes
        self.spec = BlockSpec(block_tokens, 2 * self._shape.layers, self._shape.heads, head_bytes)
        self.namespace = Namespace(
            model=type(model).__name__,
            weights=weights_id or weights_digest(model),
            epoch=epoch,
            rope=_config_digest(model),
            dtype=str(model.dtype).removeprefix("torch."),
            layout="canonical",
            layer_count=self._shape.layers,
            block_tokens=block_tokens,
            shape=shape_of(self.spec),
        )
        self._attachment = Attachment(lambda: store, [self.namespace], self.spec, SystemClock())
        self._counters: Counter[str] = Counter()

    @property
    def counters(self) -> Mapping[str, int]:
        """``loaded_tokens``, ``computed_tokens`` (of prompts), ``saved_blocks``, ``passed_by:<reason>``,
        ``errors``; the store has its own."""
        return dict(self._counters)

    def generate(
        self,
        input_ids: torch.Tensor,
        *,
        salt: bytes = b"",
        hints: RequestHints = UNKNOWN,
        **arguments: Any,
    ) -> torch.Tensor:
        """``model.generate``, with the prompt's leading blocks from the store and its new ones saved.

        ``salt`` keeps prompts apart that must not share blocks; ``hints`` are for the node's eviction policy.
        RAISES what ``model.generate`` raises."""
        prompt = [] if (reason := self._passed_by(input_ids, arguments)) else input_ids[0].tolist()
        if reason:
            self._counters[f"passed_by:{reason}"] += 1
            return self._model.generate(input_ids, **arguments)
        cache = self.load(prompt[:-1], salt, hints)
        loaded = cache.get_seq_length()
        self._counters["computed_tokens"] += len(prompt) - loaded
        output = self._model.generate(input_ids, past_key_values=cache, **arguments)
        sequence = output if isinstance(output, torch.Tensor) else output.sequences
        self.save(sequence[0].tolist(), cache, salt, start=loaded // self.spec.block_tokens, hints=hints)
        return output

    def load(self, tokens: Sequence[int], salt: bytes = b"", hints: RequestHints = UNKNOWN) -> DynamicCache:
        """A cache with the leading whole blocks of ``tokens`` that could be had: maybe none, never wrong."""
        cache = DynamicCache(config=self._model.config)
        try:
            blocks = self._load(tokens, salt, hints)
            if len(blocks):
                self._fill(cache, blocks)
            self._counters["loaded_tokens"] += len(blocks) * self.spec.block_tokens
        except Exception:  # Border with the engine: what is not loaded is computed.
            self._fault("load")
            return DynamicCache(config=self._model.config)
        return cache

    def save(
        self,
        tokens: Sequence[int],
        cache: DynamicCache,
        salt: bytes = b"",
        start: int = 0,
        hints: RequestHints = UNKNOWN,
    ) -> int:
        """Save the full blocks of ``tokens`` that ``cache`` holds, from block ``start`` on.

        Returns how many of them the store holds afterwards. REQUIRES: the blocks before ``start`` were
        loaded or saved."""
        try:
            return self._save(tokens, cache, salt, start, SaveHints.of(hints))
        except Exception:  # Border with the engine: what is not saved is computed again some day.
            self._fault("save")
            return 0

    # --- helpers ----------------------------------------------------------------------------------

    def _names(self, handle: Handle, tokens: Sequence[int], salt: bytes) -> list[BlockHash]:
        return handle.hashes(tokens, [extra_keys([("salt", salt)])] if salt else ())

    def _load(self, tokens: Sequence[int], salt: bytes, hints: RequestHints) -> torch.Tensor:
        """The blocks that could be had, up to the first that could not."""
        nothing = self._staging(0)
        handles = self._attachment.handles()
        if not handles:
            return nothing
        store = self._attachment.store
        lease = store.lease(handles[0], self._names(handles[0], tokens, salt), hints=hints)
        if not lease.count:
            return nothing
        staging = self._staging(lease.count)
        try:
            failed = store.load(lease, [[_bytes(block)] for block in staging])
        finally:
            store.release(lease)
        return staging[: min(failed, default=lease.count)]

    def _fill(self, cache: DynamicCache, blocks: torch.Tensor) -> None:
        count = len(blocks)
        shape = self._shape
        # [block, layer, part, head, token, dim] -> [layer, part, batch of 1, head, token, dim]
        whole = blocks.permute(1, 2, 3, 0, 4, 5).reshape(
            shape.layers, 2, 1, shape.heads, count * shape.tokens, shape.dim
        )
        for index, (keys, values) in enumerate(whole.to(self._model.device)):
            cache.update(keys, values, index)

    def _save(
        self, tokens: Sequence[int], cache: DynamicCache, salt: bytes, start: int, hints: SaveHints
    ) -> int:
        handles = self._attachment.handles()
        count = min(len(tokens), cache.get_seq_length()) // self.spec.block_tokens
        if not handles or count <= start:
            return 0
        names = self._names(handles[0], tokens[: count * self.spec.block_tokens], salt)
        step = max(1, BATCH_BYTES // self.spec.block_bytes)
        saved = 0
        for at in range(start, count, step):
            blocks = self._blocks(cache, at, min(at + step, count))
            parent = names[at - 1] if at else b""
            pieces = [[_bytes(block)] for block in blocks]
            fresh = names[at : at + len(blocks)]
            held = self._attachment.store.save(handles[0], fresh, pieces, parent, hints)
            saved += held
            if held < len(blocks):
                break
        self._counters["saved_blocks"] += saved
        return saved

    def _blocks(self, cache: DynamicCache, start: int, end: int) -> torch.Tensor:
        """Blocks ``start`` to ``end`` of the cache, in canonical order, in host memory."""
        shape, span = self._shape, slice(start * self._shape.tokens, end * self._shape.tokens)
        blocks = self._staging(end - start)
        wanted = (1, shape.heads, (end - start) * shape.tokens, shape.dim)
        for index, layer in enumerate(cache.layers):
            for part, source in enumerate((layer.keys, layer.values)):
                states = source[:, :, span]
                if tuple(states.shape) != wanted or states.dtype != blocks.dtype:
                    raise _unsupported(f"layer {index} holds {tuple(states.shape)} {states.dtype}")
                split = states.reshape(shape.heads, end - start, shape.tokens, shape.dim)
                blocks[:, index, part] = split.permute(1, 0, 2, 3).to(blocks.device)
        return blocks

    def _staging(self, count: int) -> torch.Tensor:
        return torch.empty(self._shape.blocks(count), dtype=self._model.dtype)

    def _passed_by(self, input_ids: torch.Tensor, arguments: Mapping[str, Any]) -> str:
        """Why this call cannot use the store, if so."""
        mask = arguments.get("attention_mask")
        if input_ids.ndim != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] < 2:
            return "not_one_sequence"
        if mask is not None and not bool(mask.all()):
            return "padding"
        if any(
            isinstance(value, torch.Tensor) for key, value in arguments.items() if key != "attention_mask"
        ):
            return "other_inputs"
        if any((self._setting(name, arguments) or 1) != 1 for name in ("num_beams", "num_return_sequences")):
            return "several_outputs"
        if "past_key_values" in arguments or self._setting("use_cache", arguments) is False:
            return "own_cache"
        if self._setting("cache_implementation", arguments) is not None:
            return "own_cache"
        if mask is None and self._masked(input_ids, arguments):
            return "padding"
        return "training" if self._model.training else ""

    def _setting(self, name: str, arguments: Mapping[str, Any]) -> Any:
        """What ``model.generate`` will go by: named in the call, in its configuration, or in the model's."""
        places = (arguments.get("generation_config"), self._model.generation_config)
        found = (arguments.get(name), *(getattr(place, name, None) for place in places))
        return next((value for value in found if value is not None), None)

    def _masked(self, input_ids: torch.Tensor, arguments: Mapping[str, Any]) -> bool:
        """Without a mask ``model.generate`` makes one, and hides padding tokens that cannot end a text."""
        padding, end = (self._setting(name, arguments) for name in ("pad_token_id", "eos_token_id"))
        ends = end if isinstance(end, Sequence) else [end]
        return padding is not None and padding not in ends and bool((input_ids == padding).any())

    def _fault(self, what: str) -> None:
        _log.exception("kvcache: %s failed; the model computes", what)
        self._counters["errors"] += 1


def weights_digest(model: PreTrainedModel) -> str:
    """Digest of every parameter and buffer that is saved with the model: name, shape, dtype, and content.

    A tensor of up to ``SAMPLES`` numbers counts whole, a larger one by so many at equal distances."""
    total = blake2b(digest_size=16, person=b"kvcache.state.1")
    for name, tensor in sorted(model.state_dict().items()):
        for part in (name.encode(), f"{tensor.dtype} {tuple(tensor.shape)}".encode(), _sample(tensor)):
            total.update(len(part).to_bytes(8, "little") + part)
    return total.hexdigest()


def _sample(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().reshape(-1)
    count = min(len(flat), SAMPLES)
    if count < len(flat):
        last = len(flat) - 1
        flat = flat[torch.tensor([last * at // (count - 1) for at in range(count)], device=flat.device)]
    return bytes(flat.contiguous().cpu().view(torch.uint8).numpy()) if count else b""


def _shape_of(model: PreTrainedModel, block_tokens: int) -> _Shape:
    """RAISES BadInput for anything but full attention."""
    config = model.config
    if config.is_encoder_decoder:
        raise _unsupported("it is an encoder-decoder model")
    text = config.get_text_config(decoder=True)
    if getattr(text, "kv_lora_rank", None):
        raise _unsupported("it has multi-head latent attention (MLA)")
    for index, layer in enumerate(_layers(model)):
        if type(layer) is not DynamicLayer:
            raise _unsupported(f"layer {index} keeps a {type(layer).__name__}; only full attention is served")
    if kinds := _length_dependent(text.to_dict()):
        raise _unsupported(f"its position encoding ({kinds[0]}) follows the length of the whole prompt")
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return _Shape(text.num_hidden_layers, heads, block_tokens, dim)


def _length_dependent(config: object) -> list[str]:
    """The kinds of position encoding, at any depth, by which a longer prompt changes its first tokens' KV."""
    if not isinstance(config, Mapping):
        return []
    kinds = [str(config.get(name, "")) for name in ("rope_type", "type")]
    found = [kind for kind in kinds if "dynamic" in kind or kind == "longrope"]
    return found + [kind for value in config.values() for kind in _length_dependent(value)]


def _layers(model: PreTrainedModel) -> Iterator[object]:
    try:
        yield from DynamicCache(config=model.config).layers
    except (KeyError, AttributeError, ValueError) as error:
        raise _unsupported(f"its cache cannot be made from its configuration ({error})") from error


def _config_digest(model: PreTrainedModel) -> str:
    """Of the whole configuration: position encoding and all else that shapes the numbers."""
    text = model.config.get_text_config(decoder=True)
    return weights.config_digest(json.loads(json.dumps(text.to_dict(), default=str)))


def _bytes(tensor: torch.Tensor) -> Any:
    """The memory of a contiguous host tensor, as a flat buffer of bytes."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _unsupported(why: str) -> BadInput:
    return BadInput(
        "unsupported_engine",
        f"kvcache cannot serve this model: {why}",
        "its blocks would be wrong or incomplete",
        "generate without kvcache; docs/transformers.md lists what is served",
    )
