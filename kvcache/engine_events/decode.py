"""An engine's message about its cache, as MessagePack, made into typed events. Pure.

    batch    [time, [event, ...], rank]        vLLM, SGLang, Mooncake; the rank may be missing
             {events: [event, ...], ...}       the same by name
             [event, ...] or event             RFC 1527 alone
    event    {type: BlockStored, ...}          vLLM 0.32, SGLang 0.5.23
             [BlockStored, ...]                older ones: the same fields by position
             {event_type: stored, ...}         RFC 1527, whatever other names stand beside it

What is not meant for a prefix index is ``Skipped`` and says why. Anything else that is none of these forms
is refused whole: an engine that is not understood is not half believed.

The sum: 0.1 us a token, most of it MessagePack's; 16 MiB a message at most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvcache import packing
from kvcache.block import TOKEN_BYTES, pack_tokens
from kvcache.engine_events.naming import Key, extra_bytes, shown
from kvcache.errors import BadInput

PAYLOAD_BYTES_MAX = 16 << 20
LISTS_MAX = 1 << 18
ITEMS_MAX = 1 << 20
BLOCK_TOKENS_MAX = 1 << 20
HASH_BYTES_MAX = 64
NAME_CHARS_MAX = 512
GROUP = 0
"""Of a model with several KV cache groups, the one whose events are taken: it must be of full attention."""

EngineHash = int | bytes
Fields = Mapping[str, object]

_MASK = (1 << 64) - 1
_KINDS = (None, "full_attention", "mla_attention", "sink_full_attention")
_TIERS = {
    **{"gpu": "hbm", "npu": "hbm", "hbm": "hbm"},
    **{"cpu": "host", "cpu_pinned": "host", "cpu_tier1": "host"},
    **{"storage": "nvme", "disk": "nvme", "cpu_tier2": "nvme"},
}
_STORED = (
    *("block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "lora_name"),
    *("extra_keys", "group_idx", "kv_cache_spec_kind", "kv_cache_spec_sliding_window"),
    *("locality", "ownership", "session_id"),
)
_POSITIONS: dict[str, tuple[str, ...]] = {
    "BlockStored": _STORED,
    "BlockRemoved": ("block_hashes", "medium", "group_idx", "locality", "ownership"),
    "AllBlocksCleared": (),
}
_RFC = {"stored": "BlockStored", "removed": "BlockRemoved", "cleared": "AllBlocksCleared"}


@dataclass(frozen=True, slots=True)
class Stored:
    """These blocks, which follow one another, are now in ``place``: a tier, and behind a colon whose part
    of it. No ``tokens`` (packed u32): their names are known, or, when ``public``, the hashes are names."""

    hashes: tuple[EngineHash, ...]
    parent: EngineHash | None
    tokens: bytes
    block_tokens: int
    place: str
    extra: tuple[bytes, ...] = ()
    adapter: str = ""
    public: bool = False
    model: str = ""
    salt: str = ""
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class Removed:
    hashes: tuple[EngineHash, ...]
    place: str


@dataclass(frozen=True, slots=True)
class Cleared:
    """Nothing is left, in this tier or (empty) in any; ``narrow``: of one namespace of perhaps several."""

    tier: str = ""
    narrow: bool = False


@dataclass(frozen=True, slots=True)
class Skipped:
    """``lost``: blocks that the engine holds cannot be told because of this."""

    why: str
    lost: bool = False


Event = Stored | Removed | Cleared | Skipped
SKIPPED = ("group", "kind", "remote", "medium", "bigram", "uneven", "keyless", "unknown")
"""Every ``Skipped.why``."""


@dataclass(frozen=True, slots=True)
class Told:
    """One message. ``rank``: of the data-parallel rank that sent it, if it said."""

    events: tuple[Event, ...]
    rank: int | None = None


def decode(payload: bytes | memoryview) -> Told:
    """RAISES BadInput for anything that is none of these forms."""
    if len(payload) > PAYLOAD_BYTES_MAX:
        raise _bad(f"{len(payload)} bytes", f"a message has at most {PAYLOAD_BYTES_MAX}")
    try:
        plain = packing.unpack(payload, LISTS_MAX, ITEMS_MAX)
    except ValueError as error:
        raise _bad("bytes that are no MessagePack within the limits", str(error)[:120]) from error
    events, rank = _envelope(plain)
    return Told(tuple(_event(event) for event in events), rank)


def _envelope(plain: object) -> tuple[Sequence[object], int | None]:
    if isinstance(plain, dict):
        if "events" not in plain:
            return [plain], _rank(plain.get("dp_rank"))
        return _list(plain["events"]), _rank(plain.get("data_parallel_rank", plain.get("attn_dp_rank")))
    batch = _list(plain)
    if all(isinstance(event, dict) for event in batch):
        return batch, _rank(batch[0].get("dp_rank")) if batch and isinstance(batch[0], dict) else None
    if len(batch) < 2 or not isinstance(batch[0], int | float):
        raise _bad("a list that is no batch", "it is [time, events, rank]")
    return _list(batch[1]), _rank(batch[2]) if len(batch) > 2 else None


def _event(event: object) -> Event:
    fields, tag = _fields(event)
    if tag not in _POSITIONS:
        return Skipped("unknown")
    if tag == "AllBlocksCleared":
        return _cleared(fields)
    place = _place(fields)
    if isinstance(place, Skipped):
        return place
    named = fields.get("seq_hashes") if "event_type" in fields else fields.get("block_hashes")
    hashes = tuple(_hash(each) for each in _list(named))
    if not hashes:
        return Skipped("keyless", lost=tag == "BlockStored")
    return Removed(hashes, place) if tag == "BlockRemoved" else _stored(fields, hashes, place)


def _fields(event: object) -> tuple[Fields, str]:
    if isinstance(event, dict):
        kind = event.get("event_type")
        tag = _RFC.get(kind, "") if isinstance(kind, str) else event.get("type")
        fields: Fields = event
    else:
        positions = _list(event)
        tag = positions[0] if positions else None
        names = _POSITIONS.get(tag, ()) if isinstance(tag, str) else ()
        fields = dict(zip(names, positions[1:], strict=False))
    if not isinstance(tag, str):
        raise _bad("an event of no type", "each says whether it is BlockStored, BlockRemoved or another")
    return fields, tag


def _cleared(fields: Fields) -> Event:
    medium = _text(fields, "medium")
    tier = _TIERS.get(medium.lower()) if medium else ""
    return Skipped("medium") if tier is None else Cleared(tier, narrow="event_type" in fields)


def _place(fields: Fields) -> str | Skipped:
    if _whole(fields, "group_idx", GROUP) != GROUP:
        return Skipped("group")
    if fields.get("kv_cache_spec_kind") not in _KINDS:
        return Skipped("kind")
    if _text(fields, "locality").upper() == "REMOTE":
        return Skipped("remote")
    tier = _TIERS.get(_text(fields, "medium").lower() or "gpu")
    if tier is None:
        return Skipped("medium")
    owner = _text(fields, "ownership")
    return f"{tier}:{owner}" if owner else tier


def _stored(fields: Fields, hashes: tuple[EngineHash, ...], place: str) -> Event:
    block_tokens = _whole(fields, "block_size", 0, BLOCK_TOKENS_MAX)
    listed = _list(fields.get("token_ids") or [])
    if listed and isinstance(listed[0], list):
        return Skipped("bigram", lost=True)
    tokens = pack_tokens(listed)  # type: ignore[arg-type]  # It says whether these are integers.
    block_tokens = block_tokens or len(listed) // len(hashes)
    if tokens and len(tokens) != len(hashes) * block_tokens * TOKEN_BYTES:
        return Skipped("uneven", lost=True)
    standard = "event_type" in fields
    parent = fields.get("parent_hash" if standard else "parent_block_hash")
    adapter = _adapter(fields)
    return Stored(
        hashes=hashes,
        parent=None if parent is None else _hash(parent),
        tokens=tokens,
        block_tokens=block_tokens,
        place=place,
        extra=_extra(fields, adapter, first=parent is None),
        adapter=adapter,
        public=standard and not tokens,
        model=_text(fields, "model_name"),
        salt=_text(fields, "additional_salt"),
        tenant=_tenant(fields),
    )


def _extra(fields: Fields, adapter: str, first: bool) -> tuple[bytes, ...]:
    """vLLM tells keys a block; SGLang one salt an event, which is the first block's."""
    salt = _text(fields, "cache_salt")
    listed = [_list(keys or []) for keys in _list(fields.get("extra_keys") or [])]
    if salt and first and not listed:
        listed = [[salt]]
    extra = [extra_bytes(_keys(keys, adapter)) for keys in listed]
    while extra and not extra[-1]:
        extra.pop()
    return tuple(extra)


def _keys(keys: Sequence[object], adapter: str) -> Sequence[Key]:
    checked: list[Key] = []
    for at, key in enumerate(keys):
        if at == 0 and adapter and key == adapter:
            continue  # It is in the namespace.
        if isinstance(key, bool) or not isinstance(key, str | bytes | int | list):
            raise _bad(f"an extra key of type {type(key).__name__}", "no engine known here tells such a one")
        checked.append(key)
    return checked


def _adapter(fields: Fields) -> str:
    """By its name; engines that tell only its number (``lora_id``) are of before names."""
    name = _text(fields, "lora_name")
    number = fields.get("lora_id")
    if name or number is None:
        return name
    return str(_whole(fields, "lora_id", 0))


def _tenant(fields: Fields) -> str:
    tenant = _text(fields, "tenant_id")
    return "" if tenant == "default" else tenant


def _hash(value: object) -> EngineHash:
    """Signed or not, 64 bits are the same hash."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value & _MASK
    if isinstance(value, bytes) and 0 < len(value) <= HASH_BYTES_MAX:
        return value
    raise _bad(f"a block hash {shown(value)}", "it is 64 bits, or bytes")


def _rank(value: object) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 31:
        raise _bad(f"rank {shown(value)}", "it is a small whole number")
    return value


def _whole(fields: Fields, name: str, default: int, most: int = _MASK) -> int:
    value = fields.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise _bad(f"{name} {shown(value)}", f"it is a whole number up to {most}")
    return value


def _text(fields: Fields, name: str) -> str:
    value = fields.get(name)
    if value is None:
        return ""
    if not isinstance(value, str) or len(value) > NAME_CHARS_MAX:
        raise _bad(f"{name} {shown(value)}", f"it is text of at most {NAME_CHARS_MAX} characters")
    return value


def _list(value: object) -> Sequence[object]:
    if not isinstance(value, list):
        raise _bad(f"{shown(value)} where a list stands", "it is none of the forms known here")
    return value


def _bad(what: str, why: str) -> BadInput:
    return BadInput(
        "bad_message", f"an engine told {what}", why, "see docs/engine-events.md for the engines known"
    )
