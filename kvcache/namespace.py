"""The fingerprint: everything that makes a block's bytes mean something.

Two writers share blocks only when every field here is equal; anything unknown or different is a miss,
or, where the caller said what it expects, a refusal that names the field. Fields are identity only, no
tuning figures: the data-parallel rank is not among them, because replicas compute the same KV. The
tenant comes from the credential: the node fills it in.

    namespace id  BLAKE2b-128 of all fields: what storage keys begin with
    root          keyed BLAKE2b-128 of model, weights, epoch, adapter and block length: where the chain
                  of prefix hashes starts; it does not depend on layout, dtype or rank, so that routers
                  can compare workers of other shapes

The encoding is canonical: each field as its name and its value, tagged with the type, every part
behind its length. No two different fingerprints encode alike.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from hashlib import blake2b

from kvcache.block import HASH_BYTES, TENANT_KEY_BYTES, BlockHash, BlockSpec, NamespaceId
from kvcache.errors import BadInput

TEXT_CHARS_MAX = 512
NUMBER_MAX = (1 << 63) - 1

_ROOT_FIELDS = ("model", "weights", "epoch", "adapter", "block_tokens")
_PERSON_ID = b"kvcache.space.1"
_PERSON_ROOT = b"kvcache.root.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Namespace:
    """One fingerprint. RAISES BadInput for a missing identity or a value out of range."""

    model: str
    """The model's id, as all who share blocks call it."""
    weights: str
    """What identifies the weights' content: a revision, a content oid, or ``kvcache.weights.digest``."""
    dtype: str
    """Of the stored numbers, for instance bfloat16."""
    layout: str
    """Axis order and packing of a plane: ``canonical`` (see ``kvcache.block``), or an engine's own, named."""
    block_tokens: int
    shape: str
    """Planes x heads x bytes a head, as ``shape_of`` writes it."""
    epoch: int = 0
    """Raised when weights change in place: older blocks become unreachable at once."""
    adapter: str = ""
    """Adapter (LoRA) identity and version, empty without one."""
    rope: str = ""
    """Digest of position encoding and its scaling."""
    scales: str = ""
    """Where the scales of quantised KV are: empty when there are none."""
    isa: str = ""
    """Instruction set the interior is packed for, empty when it is not."""
    layer_first: int = 0
    layer_count: int = 0
    """Layers in a block; 0 for all."""
    group: int = 0
    """Which KV cache group, for models that have several."""
    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    cp_rank: int = 0
    cp_size: int = 1
    codec: str = "raw"
    """How the bytes are encoded in the store."""
    tenant: str = ""
    """Filled in by the node, from the credential."""

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_value(field.name, getattr(self, field.name))
        for name in ("model", "weights", "dtype", "layout", "shape", "codec"):
            if not getattr(self, name):
                raise _bad(
                    name, "is empty", "without it blocks of different content would be taken for the same"
                )
        for name in ("tp", "pp", "cp"):
            if not getattr(self, f"{name}_rank") < getattr(self, f"{name}_size"):
                raise _bad(f"{name}_rank", "is not below its size", "ranks count from 0")
        if self.block_tokens < 1:
            raise _bad("block_tokens", "is 0", "a block cannot be empty")

    def namespace_id(self) -> NamespaceId:
        encoded = _encode(self.to_map().items())
        return NamespaceId(blake2b(encoded, digest_size=HASH_BYTES, person=_PERSON_ID).digest())

    def root(self, tenant_key: bytes) -> BlockHash:
        """Where the chain of prefix hashes starts, under the credential's key. RAISES BadInput (bad_prefix)
        for a key of another length: an empty one would name blocks in the open."""
        if len(tenant_key) != TENANT_KEY_BYTES:
            raise BadInput(
                "bad_prefix", f"a tenant key of {len(tenant_key)} bytes", f"it has {TENANT_KEY_BYTES} bytes"
            )
        encoded = _encode((name, getattr(self, name)) for name in _ROOT_FIELDS)
        digest = blake2b(encoded, digest_size=HASH_BYTES, key=tenant_key, person=_PERSON_ROOT)
        return BlockHash(digest.digest())

    def to_map(self) -> dict[str, str | int]:
        """All fields by name, in the order of their declaration."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_map(cls, values: Mapping[str, str | int]) -> Namespace:
        """RAISES BadInput that names every unknown, missing or wrongly typed field."""
        known = {field.name: field.type for field in fields(cls)}
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"the fields are {', '.join(known)}"
                raise BadInput(
                    "namespace_differs",
                    f"unknown namespace field {name!r}",
                    "what is unknown is refused",
                    hint,
                )
        missing = [name for name in known if name not in values]
        if missing:
            raise BadInput(
                "namespace_differs",
                f"namespace fields missing: {', '.join(missing)}",
                "a fingerprint is whole or refused",
                "send every field; run the same release on both sides",
            )
        return cls(**dict(values))  # type: ignore[arg-type]  # __post_init__ checks each value's type

    def differences(self, other: Namespace) -> list[str]:
        """What differs, self being the caller's and ``other`` the stored one."""
        mine, stored = self.to_map(), other.to_map()
        return [
            f"{name}: stored {_shown(stored[name])}, yours {_shown(mine[name])}"
            for name in mine
            if mine[name] != stored[name]
        ]

    def check_shape(self, spec: BlockSpec) -> None:
        """RAISES BadInput (namespace_differs) when blocks of ``spec`` are not of this namespace."""
        if (spec.block_tokens, shape_of(spec)) != (self.block_tokens, self.shape):
            raise BadInput(
                "namespace_differs",
                f"blocks of {spec.block_tokens} tokens and shape {shape_of(spec)}",
                f"the namespace says block_tokens {self.block_tokens} and shape {self.shape}",
                "write the field shape with kvcache.namespace.shape_of",
            )

    def check_same(self, other: Namespace) -> None:
        """RAISES BadInput (namespace_differs) that names the fields stored differently in ``other``."""
        differing = self.differences(other)
        if differing:
            raise BadInput(
                "namespace_differs",
                "; ".join(differing),
                "blocks of the one cannot be read as the other",
                "use the same model, weights and engine settings, or expect no reuse between them",
            )


def shape_of(spec: BlockSpec) -> str:
    """The field ``shape`` for blocks of this spec."""
    return f"{spec.plane_count}x{spec.head_count}x{spec.head_bytes}"


def spec_of_shape(namespace: Namespace) -> BlockSpec:
    """The blocks that a namespace's ``shape`` describes. RAISES BadInput when it describes none."""
    parts = namespace.shape.split("x")
    if len(parts) != 3 or not all(part.isdecimal() for part in parts):
        raise _bad("shape", f"is {namespace.shape[:80]!r}", "it is planes x heads x bytes a head")
    planes, heads, head_bytes = map(int, parts)
    return BlockSpec(namespace.block_tokens, planes, heads, head_bytes)


def _shown(value: str | int) -> str:
    return "(empty)" if value == "" else str(value)


def _encode(values: Iterable[tuple[str, str | int]]) -> bytes:
    encoded = bytearray()
    for name, value in values:
        tag = b"i" if isinstance(value, int) else b"s"
        for part in (name.encode(), tag + str(value).encode()):
            encoded += len(part).to_bytes(4, "little") + part
    return bytes(encoded)


def _check_value(name: str, value: object) -> None:
    wanted = int if name in _NUMBERS else str
    if type(value) is not wanted:
        raise _bad(name, f"is of type {type(value).__name__}", f"it is of type {wanted.__name__}")
    if isinstance(value, int) and not 0 <= value <= NUMBER_MAX:
        raise _bad(name, "is out of range", f"it is between 0 and {NUMBER_MAX}")
    if isinstance(value, str) and (len(value) > TEXT_CHARS_MAX or not value.isprintable()):
        raise _bad(name, f"is {value[:80]!r}", f"it is at most {TEXT_CHARS_MAX} printable characters")


_NUMBERS = frozenset(field.name for field in fields(Namespace) if field.type == "int")


def _bad(name: str, what: str, why: str) -> BadInput:
    return BadInput(
        "namespace_differs", f"the namespace field {name} {what}", why, "see kvcache/namespace.py"
    )
