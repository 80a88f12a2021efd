"""Which blocks may be cut, and into what bytes: against a model whose ranks' blocks are known."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache.block import BlockSpec
from kvcache.errors import BadInput
from kvcache.namespace import Namespace, shape_of
from kvcache.slices import CERTIFIED, ChunkRange, Part, Slice, certify, parts, plans
from kvcache.sums import sum_chunks
from kvcache.testing.sharded import ShardedModel

MODEL = ShardedModel(plane_count=4, head_count=8, head_bytes=48)


def refused(stored: Namespace, wanted: Namespace) -> BadInput:
    with pytest.raises(BadInput) as caught:
        certify(stored, wanted)
    assert caught.value.code == "bad_slice"
    assert caught.value.what
    assert caught.value.why
    assert caught.value.todo
    return caught.value


def cut_out(part: Part, stored: bytes, into: bytearray) -> None:
    """Copy by hand: read the covering chunks only, keep what is wanted of them."""
    cut, cover = part.cut, part.cut.cover
    taken = b"".join(bytes(piece) for piece in cover.pieces(memoryview(stored)))
    lead = cut.offset - cover.offset
    step = len(into) // cut.spec.plane_count
    for plane in range(cut.spec.plane_count):
        begin = plane * cover.length + lead
        at = plane * step + part.at * cut.spec.head_bytes
        into[at : at + cut.length] = taken[begin : begin + cut.length]


class TestBytes:
    @pytest.mark.parametrize(("stored", "wanted"), [(1, 2), (1, 4), (2, 4), (2, 1), (4, 1), (4, 2), (2, 2)])
    def test_every_rank_gets_what_it_would_have_saved(self, stored: int, wanted: int) -> None:
        for rank in range(wanted):
            into = bytearray(MODEL.spec(wanted).block_bytes)
            for part in parts(MODEL.namespace(wanted, rank), stored):
                cut_out(part, MODEL.block(7, stored, part.stored.tp_rank), into)
            assert into == MODEL.block(7, wanted, rank)

    @pytest.mark.slow
    @given(
        planes=st.integers(1, 2),
        share=st.integers(1, 3),
        small=st.integers(1, 3),
        times=st.integers(1, 4),
        head_bytes=st.sampled_from([1, 3, 64, 4_096, 24_576, 65_536, 65_538]),
        joined=st.booleans(),
        data=st.data(),
    )
    def test_of_any_shape(
        self,
        planes: int,
        share: int,
        small: int,
        times: int,
        head_bytes: int,
        joined: bool,
        data: st.DataObject,
    ) -> None:
        model = ShardedModel(planes, share * small * times, head_bytes)
        stored, wanted = (small * times, small) if joined else (small, small * times)
        rank = data.draw(st.integers(0, wanted - 1))
        into = bytearray(model.spec(wanted).block_bytes)
        needed = parts(model.namespace(wanted, rank), stored)
        for part in needed:
            assert part == certify(
                model.namespace(stored, part.stored.tp_rank), model.namespace(wanted, rank)
            )
            assert part.stored == model.namespace(stored, part.stored.tp_rank)
            cut_out(part, model.block(0, stored, part.stored.tp_rank), into)
        assert into == model.block(0, wanted, rank)
        assert len(needed) == (times if joined else 1)

    @given(
        planes=st.integers(1, 3),
        heads=st.integers(1, 12),
        head_bytes=st.sampled_from([1, 64, 4_096, 16_384, 24_576, 65_536, 98_304]),
        data=st.data(),
    )
    def test_the_cover_is_the_fewest_chunks_and_their_sums(
        self, planes: int, heads: int, head_bytes: int, data: st.DataObject
    ) -> None:
        model = ShardedModel(planes, heads, head_bytes)
        spec = model.spec(1)
        first = data.draw(st.integers(0, heads - 1))
        cut = Slice(spec, first, data.draw(st.integers(1, heads - first)))
        cover, chunk = cut.cover, spec.chunk_bytes
        assert cover.offset <= cut.offset < cover.offset + chunk
        end = cover.offset + cover.length
        assert end - chunk < cut.offset + cut.length <= end
        assert cut.is_exact is ((cover.offset, cover.length) == (cut.offset, cut.length))
        block = model.block(0, 1, 0)
        whole = sum_chunks([block], chunk)
        pieces = cover.pieces(memoryview(block))
        assert cover.sums_of(whole) == sum_chunks(pieces, chunk)
        assert len(cover.sums_of(whole)) == cover.sums_bytes
        assert sum(map(len, pieces)) == cover.block_bytes

    @pytest.mark.parametrize(("first", "count"), [(0, 0), (0, 9), (8, 1), (-1, 2), (4, 5)])
    def test_heads_outside_the_block(self, first: int, count: int) -> None:
        with pytest.raises(BadInput, match="bad_slice"):
            Slice(MODEL.spec(1), first, count)

    @pytest.mark.parametrize(
        ("offset", "length"),
        [(0, 0), (1, 65_536), (0, 65_535), (0, 4 * 65_536), (3 * 65_536, 65_536), (-65_536, 65_536)],
    )
    def test_a_range_that_is_no_chunks(self, offset: int, length: int) -> None:
        spec = BlockSpec(4, 2, 3, 65_536)
        with pytest.raises(BadInput, match="bad_slice"):
            ChunkRange(spec, offset, length)
        assert ChunkRange(spec, 65_536, 131_072).block_bytes == 262_144


OTHERS = [field.name for field in fields(Namespace) if field.name not in ("shape", "tp_rank", "tp_size")]


class TestCertified:
    def test_the_table_gives_reasons(self) -> None:
        assert list(CERTIFIED) == ["canonical"]
        assert all(CERTIFIED.values())

    @pytest.mark.parametrize(
        "layout", ["vllm 0.11 LBHNC", "LBHNC", "canonical ", "Canonical", "mla", "paged", "token first"]
    )
    @pytest.mark.parametrize("side", ["stored", "wanted", "both"])
    def test_other_layouts_are_refused_by_name(self, layout: str, side: str) -> None:
        stored, wanted = MODEL.namespace(1, 0), MODEL.namespace(2, 0)
        if side != "wanted":
            stored = replace(stored, layout=layout)
        if side != "stored":
            wanted = replace(wanted, layout=layout)
        error = refused(stored, wanted)
        assert repr(layout) in error.what
        assert ("stored" if side != "wanted" else "wanted") in error.what

    @pytest.mark.parametrize(
        ("name", "value"), [("codec", "zstd"), ("scales", "with the weights"), ("isa", "cpu avx512")]
    )
    @pytest.mark.parametrize("side", ["stored", "wanted", "both"])
    def test_what_is_packed_scaled_or_encoded_is_refused_by_name(
        self, name: str, value: str, side: str
    ) -> None:
        stored, wanted = MODEL.namespace(1, 0), MODEL.namespace(2, 0)
        if side != "wanted":
            stored = replace(stored, **{name: value})
        if side != "stored":
            wanted = replace(wanted, **{name: value})
        error = refused(stored, wanted)
        assert name in error.what
        assert value in error.what

    @pytest.mark.parametrize("name", OTHERS)
    def test_no_other_field_may_differ(self, name: str) -> None:
        sizes = {f"{kind}_size": 2 for kind in ("pp", "cp")}
        stored = replace(MODEL.namespace(1, 0), **sizes)
        wanted = replace(MODEL.namespace(2, 0), **sizes)
        certify(stored, wanted)
        value = getattr(wanted, name)
        other = value + 1 if isinstance(value, int) else f"{value}x"
        assert name in refused(stored, replace(wanted, **{name: other})).what

    def test_planes_and_heads_of_other_sizes(self) -> None:
        wanted = MODEL.namespace(2, 0)
        for shape in ("5x8x48", "4x8x49"):
            assert "shape" in refused(replace(MODEL.namespace(1, 0), shape=shape), wanted).what
        with pytest.raises(BadInput, match="shape"):
            certify(replace(MODEL.namespace(1, 0), shape="mine"), wanted)

    @pytest.mark.parametrize(("stored", "wanted"), [((1, 2), (4, 1)), ((4, 1), (1, 2)), ((2, 2), (8, 1))])
    def test_repeated_heads_are_refused(self, stored: tuple[int, int], wanted: tuple[int, int]) -> None:
        """(degree, heads a rank): a model of 2 heads on 4 ranks, of 4 on 8."""
        error = refused(
            *(
                replace(MODEL.namespace(1, 0), tp_size=size, shape=shape_of(BlockSpec(4, 4, heads, 48)))
                for size, heads in (stored, wanted)
            )
        )
        assert "shape" in error.what
        assert "repeats heads" in error.why

    def test_degrees_that_do_not_divide_each_other(self) -> None:
        model = ShardedModel(2, 6, 8)
        assert "tp_size" in refused(model.namespace(2, 0), model.namespace(3, 0)).what
        assert "tp_size" in refused(model.namespace(3, 0), model.namespace(2, 0)).what

    def test_a_rank_that_holds_none_of_the_heads(self) -> None:
        for stored, wanted in (((2, 0), (4, 2)), ((4, 1), (2, 1)), ((2, 0), (2, 1))):
            assert "tp_rank" in refused(MODEL.namespace(*stored), MODEL.namespace(*wanted)).what

    def test_degrees_that_cannot_be(self) -> None:
        for tp_size in (0, 3, 16):
            with pytest.raises(BadInput, match="bad_slice"):
                parts(MODEL.namespace(2, 0), tp_size)


class TestPlans:
    def test_nothing_known_nothing_to_cut(self) -> None:
        wanted = MODEL.namespace(2, 0)
        assert plans(wanted, []) == []
        assert plans(wanted, [wanted]) == [], "it is no way to make it"
        assert plans(wanted, [MODEL.namespace(2, 1), replace(MODEL.namespace(1, 0), layout="x")]) == []
        assert plans(wanted, [replace(MODEL.namespace(1, 0), model="other")]) == []
        assert plans(replace(wanted, layout="x"), [MODEL.namespace(1, 0)]) == []

    def test_a_join_needs_every_rank(self) -> None:
        wanted = MODEL.namespace(1, 0)
        quarters = [MODEL.namespace(4, rank) for rank in range(4)]
        assert plans(wanted, quarters[:3]) == []
        (plan,) = plans(wanted, reversed(quarters))
        assert [part.stored for part in plan] == quarters
        assert [part.at for part in plan] == [0, 2, 4, 6]

    def test_what_reads_the_least_comes_first(self) -> None:
        """Of a plane that is one chunk all is read: so the smaller rank's is the better."""
        wanted = MODEL.namespace(4, 2)
        known = [MODEL.namespace(1, 0), MODEL.namespace(2, 1), MODEL.namespace(8, 4), MODEL.namespace(8, 5)]
        degrees = [plan[0].stored.tp_size for plan in plans(wanted, [*known, MODEL.namespace(2, 0)])]
        assert degrees == [8, 2, 1]
        even = ShardedModel(2, 4, 65_536)
        known = [even.namespace(1, 0), even.namespace(4, 0), even.namespace(4, 1)]
        ways = plans(even.namespace(2, 0), known)
        assert [len(way) for way in ways] == [1, 2], "as many bytes, fewer parts"
