"""Which blocks may be cut for a rank of another tensor parallel degree, and which bytes that takes.

In the ``canonical`` layout (``kvcache.block``) a plane is its heads one after the other, and ranks hold
equal shares of the model's heads in the order of their numbers. So the heads of any rank, of whatever
degree, are one range of bytes of every plane of every rank that holds some of them:

    plane of rank 0 of 1   | h0 | h1 | h2 | h3 | h4 | h5 | h6 | h7 |
    plane of rank 1 of 2                       | h4 | h5 | h6 | h7 |      cut: heads 4 to 8 of rank 0 of 1
    plane of rank 2 of 4                       | h4 | h5 |                cut: heads 0 to 2 of rank 1 of 2

and the other way: a block of rank 0 of 1 is joined of those of ranks 0 and 1 of 2. Names of blocks do
not depend on the rank (``kvcache.namespace``), so the same prefix hashes find all of them.

A part is verified by its chunks: the block's checksum vouches for the sums of all its chunks, these for the
chunks that were read. Where a slice is not made of whole chunks, the chunks that cover it are read and
verified, and what is not wanted is dropped.

Whatever is not certified is refused by name: a miss costs time, wrong bytes cost everything.

The sum: sums are 8 bytes a chunk, 512 bytes for a block of 64 planes of one chunk each; a cut of a block
is 10 us of Python. What is read beside a slice is less than one chunk at each of its ends: nothing where
a rank's share of a plane is 64 KiB or a multiple, everything where the whole plane is one chunk.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from kvcache.block import BlockSpec
from kvcache.errors import BadInput
from kvcache.namespace import Namespace, shape_of, spec_of_shape
from kvcache.sums import SUM_BYTES

CERTIFIED: Mapping[str, str] = {
    "canonical": "a plane is its heads one after the other, each whole, ranks hold equal shares in order",
}
"""Layouts whose blocks may be cut, and why."""

FREE = ("shape", "tp_rank", "tp_size")
"""In what fields stored and wanted blocks may differ."""

_PLAIN: Mapping[str, tuple[str, str]] = {
    "codec": ("raw", "its bytes are not those of the heads"),
    "scales": ("", "scales belong to numbers of the whole rank: a part of them has others"),
    "isa": ("", "heads are packed for an instruction set, not laid one after the other"),
}


@dataclass(frozen=True, slots=True)
class ChunkRange:
    """Bytes ``offset`` to ``offset + length`` of every plane of a block, in whole chunks.

    RAISES BadInput (bad_slice) when they are no chunks of a plane."""

    spec: BlockSpec
    offset: int
    length: int

    def __post_init__(self) -> None:
        chunk = self.spec.chunk_bytes
        end = self.offset + self.length
        if not 0 <= self.offset < end <= self.spec.plane_bytes or self.offset % chunk or self.length % chunk:
            raise BadInput(
                "bad_slice",
                f"bytes {self.offset} to {end} of planes of {self.spec.plane_bytes}",
                f"a part is whole chunks of {chunk} bytes, one at least: less cannot be verified",
                "ask for the chunks that cover it (kvcache.slices)",
            )

    @property
    def is_whole(self) -> bool:
        return self.length == self.spec.plane_bytes

    @property
    def block_bytes(self) -> int:
        """Of one block."""
        return self.spec.plane_count * self.length

    @property
    def sums_bytes(self) -> int:
        """Of the sums of one block's chunks in it."""
        return self.block_bytes // self.spec.chunk_bytes * SUM_BYTES

    def pieces(self, block: memoryview) -> list[memoryview]:
        """These bytes of a whole block, plane after plane; in one piece when they are all of it.
        REQUIRES: a flat byte view of ``spec.block_bytes``."""
        assert len(block) == self.spec.block_bytes
        if self.is_whole:
            return [block]
        step = self.spec.plane_bytes
        starts = range(self.offset, len(block), step)
        return [block[at : at + self.length] for at in starts]

    def sums_of(self, sums: bytes) -> bytes:
        """Of a block's chunk sums, those of the chunks here, in the order of ``pieces``."""
        assert len(sums) == self.spec.chunk_count * SUM_BYTES
        if self.is_whole:
            return sums
        chunk = self.spec.chunk_bytes
        first, size = self.offset // chunk * SUM_BYTES, self.length // chunk * SUM_BYTES
        step = self.spec.plane_bytes // chunk * SUM_BYTES
        return b"".join([sums[at : at + size] for at in range(first, len(sums), step)])


@dataclass(frozen=True, slots=True)
class Slice:
    """Heads ``first`` to ``first + count`` of every plane of a block. RAISES BadInput (bad_slice) when it
    does not have them."""

    spec: BlockSpec
    first: int
    count: int

    def __post_init__(self) -> None:
        end = self.first + self.count
        if not 0 <= self.first < end <= self.spec.head_count:
            raise BadInput(
                "bad_slice",
                f"heads {self.first} to {end}",
                f"a plane has heads 0 to {self.spec.head_count}, and a slice one of them at least",
                "ask within the block",
            )

    @property
    def offset(self) -> int:
        """Where it begins in every plane."""
        return self.first * self.spec.head_bytes

    @property
    def length(self) -> int:
        """Its bytes in every plane."""
        return self.count * self.spec.head_bytes

    @property
    def block_bytes(self) -> int:
        """Its bytes in a block."""
        return self.spec.plane_count * self.length

    @property
    def cover(self) -> ChunkRange:
        """The whole chunks that must be read to verify it."""
        chunk = self.spec.chunk_bytes
        begin = self.offset // chunk * chunk
        end = -(-(self.offset + self.length) // chunk) * chunk
        return ChunkRange(self.spec, begin, end - begin)

    @property
    def is_exact(self) -> bool:
        """Is it made of whole chunks, so that nothing else need be read?"""
        return self.offset % self.spec.chunk_bytes == 0 and self.length % self.spec.chunk_bytes == 0


@dataclass(frozen=True, slots=True)
class Part:
    """What a rank's stored blocks give to another's: heads ``cut.first`` and on become head ``at`` and on."""

    stored: Namespace
    cut: Slice
    at: int


def certify(stored: Namespace, wanted: Namespace) -> Part:
    """What blocks of ``stored`` can give to blocks of ``wanted``.

    RAISES BadInput (bad_slice) that names the field or the layout when that is nothing, or not certain."""
    for namespace, whose in ((stored, "stored"), (wanted, "wanted")):
        _check_plain(namespace, whose)
    _check_same(stored, wanted)
    have, want = spec_of_shape(stored), spec_of_shape(wanted)
    _check_degrees(stored, wanted, have, want)
    first = max(stored.tp_rank * have.head_count, wanted.tp_rank * want.head_count)
    end = min((stored.tp_rank + 1) * have.head_count, (wanted.tp_rank + 1) * want.head_count)
    if first >= end:
        raise _refused(
            f"tp_rank: stored rank {stored.tp_rank} of {stored.tp_size}, "
            f"wanted rank {wanted.tp_rank} of {wanted.tp_size}",
            "they have no head in common",
            "cut the blocks of the rank that holds the heads (kvcache.slices.parts)",
        )
    cut = Slice(have, first - stored.tp_rank * have.head_count, end - first)
    return Part(stored, cut, first - wanted.tp_rank * want.head_count)


def parts(wanted: Namespace, tp_size: int) -> tuple[Part, ...]:
    """What ranks of degree ``tp_size`` must give so that blocks of ``wanted`` are whole, in the order of
    heads. RAISES BadInput (bad_slice) as ``certify`` does."""
    want = spec_of_shape(wanted)
    _check_plain(wanted, "wanted")
    total = wanted.tp_size * want.head_count
    if tp_size < 1 or total % tp_size:
        raise _refused(
            f"tp_size: ranks of degree {tp_size} for {total} heads",
            "ranks hold equal shares of the heads",
            f"choose a degree that divides {total}",
        )
    heads = total // tp_size
    shape = shape_of(BlockSpec(want.block_tokens, want.plane_count, heads, want.head_bytes))
    first = wanted.tp_rank * want.head_count
    ranks = range(first // heads, -(-(first + want.head_count) // heads))
    donors = [replace(wanted, tp_size=tp_size, tp_rank=rank, shape=shape) for rank in ranks]
    return tuple(certify(stored, wanted) for stored in donors)


def plans(wanted: Namespace, known: Iterable[Namespace]) -> list[tuple[Part, ...]]:
    """Every way to make blocks of ``wanted`` of blocks of the namespaces in ``known``, other than itself, the
    one that reads the least first. Empty when there is none."""
    held = {namespace for namespace in known if namespace != wanted}
    found: list[tuple[Part, ...]] = []
    for tp_size in {namespace.tp_size for namespace in held}:
        try:
            plan = parts(wanted, tp_size)
        except BadInput:
            continue
        if all(part.stored in held for part in plan):
            found.append(plan)
    return sorted(found, key=_cost)


def _cost(plan: tuple[Part, ...]) -> tuple[int, int]:
    return sum(part.cut.cover.block_bytes for part in plan), len(plan)


def _check_plain(namespace: Namespace, whose: str) -> None:
    if namespace.layout not in CERTIFIED:
        raise _refused(
            f"layout: {whose} blocks are laid out as {namespace.layout!r}",
            "only in a certified layout are a rank's heads known to be one range of bytes of every plane",
            f"store blocks as {', '.join(CERTIFIED)}, or run both engines with the same tp_size",
        )
    for name, (plain, why) in _PLAIN.items():
        value = getattr(namespace, name)
        if value != plain:
            raise _refused(
                f"{name}: {whose} blocks have {value!r}, and {plain or '(empty)'} can be cut",
                why,
                "run both engines with the same tp_size",
            )


def _check_same(stored: Namespace, wanted: Namespace) -> None:
    aligned = replace(wanted, **{name: getattr(stored, name) for name in FREE})
    if differing := aligned.differences(stored):
        raise _refused(
            "; ".join(differing),
            f"only {', '.join(FREE)} may differ between stored blocks and those cut of them",
            "use the same model, weights and engine settings",
        )


def _check_degrees(stored: Namespace, wanted: Namespace, have: BlockSpec, want: BlockSpec) -> None:
    if (have.plane_count, have.head_bytes) != (want.plane_count, want.head_bytes):
        raise _refused(
            f"shape: stored {stored.shape}, yours {wanted.shape}",
            "only the number of heads may differ",
            "store as many planes, and heads as large, on both sides",
        )
    if stored.tp_size * have.head_count != wanted.tp_size * want.head_count:
        raise _refused(
            f"shape: {stored.tp_size} x {have.head_count} heads stored, "
            f"{wanted.tp_size} x {want.head_count} wanted",
            "one of them has more ranks than the model has KV heads and repeats heads: "
            "nothing says which rank has which",
            "run with a tp_size that divides the KV heads",
        )
    if stored.tp_size % wanted.tp_size and wanted.tp_size % stored.tp_size:
        raise _refused(
            f"tp_size: stored {stored.tp_size}, yours {wanted.tp_size}",
            "one must be a multiple of the other",
            "choose such degrees, for instance powers of two",
        )


def _refused(what: str, why: str, todo: str) -> BadInput:
    return BadInput("bad_slice", f"these blocks cannot be cut: {what}", why, todo)
