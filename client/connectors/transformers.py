"""Prefixes of transformers models: fill a ``DynamicCache`` from the store, and save what it holds.

    cache = PrefixCache(model, connect_blocking())
    output = cache.generate(input_ids, max_new_tokens=64)      # computes only what the store has not

With a device (``gpu``) blocks go straight between the model's memory and the store's: loads take each block
from the tier that has it, saves put the whole prefix into HBM, and what that does not take into host memory.

Blocks are in the canonical axis order (``kvcache.block``): layer, K and V, head, token, dim; so a block
is the same bytes on any device. Only full attention is served: sliding windows, latent attention and
recurrent states are refused when the ``PrefixCache`` is made. Everything else that cannot be named
(several sequences, padding, images) goes past the store and is counted.

The sum: a block is copied twice (store to staging, staging to cache); for an 8 B model (128 KiB a token)
at 5 GB/s that is 50 us a token, against milliseconds of prefill on the same machine. That of GPUs is in
``transformers_pages``.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kvcache import weights
from kvcache.block import BlockHash, extra_keys
from kvcache.client.connectors.attach import Attachment
from kvcache.client.connectors.transformers_pages import (
    Shape,
    buffers,
    every,
    kept,
    load_staged,
    paged,
    staged,
    unsupported,
)
from kvcache.client.store import SaveHints
from kvcache.clock import SystemClock
from kvcache.namespace import Namespace, shape_of
from kvcache.request_hints import UNKNOWN, RequestHints
from kvcache.wire_hbm import HBM

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvcache.client.hbm import BlockingDeviceStore
    from kvcache.client.store import BlockingStore, Handle, Lease
    from kvcache.device.engine import EngineDevice

SAMPLES = 1_024

_log = logging.getLogger(__name__)


class PrefixCache:
    """The prefixes of one model in one store. For one thread; the store may be shared.

    ``gpu``: the model's; the store is then one of ``connect_device_blocking(gpu)``. ``weights_id`` replaces
    the digest that is taken of the model's parameters; raise ``epoch`` when they change in place. RAISES
    BadInput (unsupported_engine) for a model whose KV is not plain full attention, on one device.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        store: BlockingStore,
        *,
        gpu: EngineDevice | None = None,
        block_tokens: int = 32,
        weights_id: str = "",
        epoch: int = 0,
    ) -> None:
        self._model = model
        self._shape = _shape_of(model, block_tokens)
        self.spec = self._shape.spec
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
        self._gpu = gpu
        self._is_staged = model.device.type == "cuda"
        self._counters: Counter[str] = Counter()

    @property
    def counters(self) -> Mapping[str, int]:
        """``loaded_tokens``, of these ``hbm_tokens``, ``computed_tokens`` (of prompts), ``saved_blocks``,
        ``passed_by:<reason>``, ``errors``; the store has its own."""
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
            whole = self._load(tokens, salt, hints)
            if whole is not None:
                for index, (keys, values) in enumerate(whole):
                    cache.update(keys, values, index)
            self._counters["loaded_tokens"] += cache.get_seq_length()
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
        """Save the full blocks of ``tokens`` that ``cache`` holds, from block ``start`` on; with a device
        also those before that are not held any more, as a tier continues only what it holds.

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

    def _near(self) -> tuple[EngineDevice, BlockingDeviceStore] | None:
        """The model's device, and the store that was given it."""
        return (self._gpu, cast("BlockingDeviceStore", self._attachment.store)) if self._gpu else None

    def _load(self, tokens: Sequence[int], salt: bytes, hints: RequestHints) -> torch.Tensor | None:
        """What could be had, up to the first block that could not: [layer, part, 1, head, token, dim]."""
        handles = self._attachment.handles()
        if not handles:
            return None
        names = self._names(handles[0], tokens, salt)
        store, near = self._attachment.store, self._near()
        if near is not None and near[0].has_slab:
            lease = near[1].lease_device(handles[0], names, hints=hints)
        else:
            lease = store.lease(handles[0], names, hints=hints)
        if not lease.count:
            return None
        try:
            whole, failed = self._whole(lease)
        finally:
            store.release(lease)
        count = min(failed, default=lease.count)
        if in_hbm := sum(grant.count for grant in lease.grants if grant.tier == HBM):
            self._counters["hbm_tokens"] += min(in_hbm, count) * self.spec.block_tokens
        return whole[..., : count * self.spec.block_tokens, :] if count else None

    def _whole(self, lease: Lease) -> tuple[torch.Tensor, frozenset[int]]:
        """All blocks of the lease, and the positions of those that could not be had."""
        shape, store, near = self._shape, self._attachment.store, self._near()
        if near is not None or self._is_staged:
            whole = shape.room(lease.count, self._model.device)
            pages = paged(list(whole.flatten(0, 1)), shape)
            if near is not None:
                return whole, near[1].load_device(lease, every(pages, near[0]))
            return whole, load_staged(store, lease, pages, shape)
        rows = shape.rows(lease.count)
        failed = store.load(lease, buffers(rows))
        # [block, layer, part, head, token, dim] -> [layer, part, batch of 1, head, token, dim]
        whole = rows.permute(1, 2, 3, 0, 4, 5).reshape(
            shape.layers, 2, 1, shape.heads, lease.count * shape.tokens, shape.dim
        )
        return whole.to(self._model.device), failed

    def _save(
        self, tokens: Sequence[int], cache: DynamicCache, salt: bytes, start: int, hints: SaveHints
    ) -> int:
        handles = self._attachment.handles()
        count = min(len(tokens), cache.get_seq_length()) // self.spec.block_tokens
        near = self._near()
        if not handles or not count or (count <= start and near is None):
            return 0
        names = self._names(handles[0], tokens[: count * self.spec.block_tokens], salt)
        planes = kept(cache, self._shape, count)
        if near is None:
            saved = self._save_below(handles[0], names, planes, start, hints)
        else:
            pages = every(paged(planes, self._shape), near[0])
            saved = max(0, near[1].save_device(handles[0], names, pages, hints=hints) - start)
        self._counters["saved_blocks"] += saved
        return saved

    def _save_below(
        self,
        handle: Handle,
        names: Sequence[BlockHash],
        planes: Sequence[torch.Tensor],
        start: int,
        hints: SaveHints,
    ) -> int:
        """Blocks ``start`` and on into host memory, in batches."""
        count, step, saved = len(names), self._shape.batch(), 0
        for at in range(start, count, step):
            end = min(at + step, count)
            parent = names[at - 1] if at else b""
            blocks = buffers(self._rows(planes, at, end))
            held = self._attachment.store.save(handle, names[at:end], blocks, parent, hints)
            saved += held
            if held < end - at:
                break
        return saved

    def _rows(self, planes: Sequence[torch.Tensor], start: int, end: int) -> torch.Tensor:
        """Blocks ``start`` to ``end``, in canonical order, in host memory."""
        shape, count = self._shape, end - start
        if self._is_staged:
            return staged(paged(planes, shape), start, end, shape)
        rows = shape.rows(count)
        for at, plane in enumerate(planes):
            states = plane[0, :, start * shape.tokens : end * shape.tokens]
            split = states.reshape(shape.heads, count, shape.tokens, shape.dim)
            rows[:, at // 2, at % 2] = split.permute(1, 0, 2, 3).to(rows.device)
        return rows

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


def _shape_of(model: PreTrainedModel, block_tokens: int) -> Shape:
    """RAISES BadInput for anything but full attention, and for layers on several devices."""
    config = model.config
    devices = {str(each.device) for each in model.parameters() if each.device.type != "meta"}
    if len(devices) > 1:
        raise unsupported(f"it lies on several devices ({', '.join(sorted(devices))}), and one is served")
    if config.is_encoder_decoder:
        raise unsupported("it is an encoder-decoder model")
    text = config.get_text_config(decoder=True)
    if getattr(text, "kv_lora_rank", None):
        raise unsupported("it has multi-head latent attention (MLA)")
    for index, layer in enumerate(_layers(model)):
        if type(layer) is not DynamicLayer:
            raise unsupported(f"layer {index} keeps a {type(layer).__name__}; only full attention is served")
    if kinds := _length_dependent(text.to_dict()):
        raise unsupported(f"its position encoding ({kinds[0]}) follows the length of the whole prompt")
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Shape(text.num_hidden_layers, heads, block_tokens, dim, model.dtype)


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
        raise unsupported(f"its cache cannot be made from its configuration ({error})") from error


def _config_digest(model: PreTrainedModel) -> str:
    """Of the whole configuration: position encoding and all else that shapes the numbers."""
    text = model.config.get_text_config(decoder=True)
    return weights.config_digest(json.loads(json.dumps(text.to_dict(), default=str)))
