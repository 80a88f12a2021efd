"""Names of blocks: golden vectors, what a changed token or extra key changes, and what is refused."""

from __future__ import annotations

from array import array
from dataclasses import replace
from hashlib import blake2b

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache.block import (
    BLOCK_BYTES_MAX,
    CHUNK_BYTES_MAX,
    CHUNK_COUNT_MAX,
    BlockHash,
    BlockSpec,
    NamespaceId,
    chain,
    extra_keys,
    pack_tokens,
    routing_hint,
    split_hashes,
    storage_key,
)
from kvcache.errors import BadInput
from tests.kvcache.elsewhere import printed_elsewhere

ROOT = BlockHash(bytes(range(16)))
KEY = bytes(range(32))
TOKENS = [0, 1, 2, 3, 0xFFFF_FFFF, 5, 6, 7, 8]
SALTED = [extra_keys([("salt", b"pepper")])]

# Stored blocks are found by these names: a change here orphans everything that was ever stored.
GOLDEN_CHAIN = ["e68aac303c56e3f53b6df52e6c7320a1", "a52570a4cef518155c8c5fd82704cf51"]
GOLDEN_SALTED = ["858a277eaf7fe8f8e104169ef4237180", "21cdf2bca03ac03c3220f2052929f027"]

tokens_of = st.lists(st.integers(0, 0xFFFF_FFFF), min_size=1, max_size=40)
parts_of = st.lists(st.tuples(st.text(max_size=6), st.binary(max_size=12)), max_size=4)


def names(tokens: list[int], extra: list[bytes] | None = None, key: bytes = KEY) -> list[str]:
    return [block.hex() for block in chain(ROOT, key, tokens, 4, extra or [])]


class TestGoldenVectors:
    def test_chain(self) -> None:
        assert names(TOKENS) == GOLDEN_CHAIN

    def test_chain_with_an_extra_key(self) -> None:
        assert names(TOKENS, SALTED) == GOLDEN_SALTED

    def test_chain_spelled_out(self) -> None:
        packed = bytes.fromhex("00000000 01000000 02000000 03000000")
        salted = packed + b"\x04\0\0\0salt" + b"\x06\0\0\0pepper"
        for message, golden in ((packed, GOLDEN_CHAIN[0]), (salted, GOLDEN_SALTED[0])):
            made = blake2b(ROOT + message, digest_size=16, key=KEY, person=b"kvcache.prefix.1")
            assert made.hexdigest() == golden

    def test_extra_keys(self) -> None:
        encoded = extra_keys([("mm", b"\x00\x01"), ("salt", b"")])
        assert encoded.hex() == "020000006d6d0200000000010400000073616c7400000000"
        assert extra_keys([]) == b""

    def test_routing_hint_and_storage_key(self) -> None:
        first = chain(ROOT, KEY, TOKENS, 4)[0]
        assert routing_hint(first) == 0xF5E3563C30AC8AE6
        assert storage_key(NamespaceId(b"n" * 16), first) == b"n" * 16 + first

    def test_the_same_in_processes_with_other_hash_seeds(self) -> None:
        program = (
            "from kvcache.block import chain, extra_keys\n"
            f"for extra in ([], {SALTED!r}):\n"
            f"    for block in chain({ROOT!r}, {KEY!r}, {TOKENS!r}, 4, extra): print(block.hex())\n"
        )
        assert printed_elsewhere(program) == [GOLDEN_CHAIN + GOLDEN_SALTED] * 2


class TestChain:
    @given(tokens_of, st.data())
    def test_a_changed_token_changes_that_block_and_all_later(
        self, tokens: list[int], data: st.DataObject
    ) -> None:
        at = data.draw(st.integers(0, len(tokens) - 1))
        changed = [*tokens[:at], tokens[at] ^ (1 << data.draw(st.integers(0, 31))), *tokens[at + 1 :]]
        before, after = names(tokens), names(changed)
        assert before[: at // 4] == after[: at // 4]
        assert not set(before[at // 4 :]) & set(after[at // 4 :])

    @given(tokens_of, st.data())
    def test_a_changed_extra_key_changes_that_block_and_all_later(
        self, tokens: list[int], data: st.DataObject
    ) -> None:
        count = len(tokens) // 4
        at = data.draw(st.integers(0, count))
        extra = [extra_keys([("mm", data.draw(st.binary(min_size=1, max_size=4)))])]
        before, after = names(tokens), names(tokens, [b""] * at + extra)
        assert before[:at] == after[:at]
        assert not set(before[at:]) & set(after[at:])

    @given(tokens_of)
    def test_a_chain_can_go_on_from_any_block(self, tokens: list[int]) -> None:
        whole = chain(ROOT, KEY, tokens, 4)
        for done, parent in enumerate(whole, 1):
            assert whole[:done] + chain(parent, KEY, tokens[done * 4 :], 4) == whole

    @given(tokens_of)
    def test_a_partial_block_has_no_name(self, tokens: list[int]) -> None:
        assert len(names(tokens)) == len(tokens) // 4
        assert names(tokens) == names(tokens[: len(tokens) // 4 * 4])

    @given(tokens_of)
    def test_packed_ids_and_numbers_are_one(self, tokens: list[int]) -> None:
        assert chain(ROOT, KEY, pack_tokens(tokens), 4) == chain(ROOT, KEY, tokens, 4)
        assert chain(ROOT, KEY, array("Q", tokens), 4) == chain(ROOT, KEY, tokens, 4)

    def test_another_key_or_root_gives_other_names(self) -> None:
        others = [chain(BlockHash(b"r" * 16), KEY, TOKENS, 4), chain(ROOT, b"k" * 32, TOKENS, 4)]
        seen = {block for blocks in [chain(ROOT, KEY, TOKENS, 4), *others] for block in blocks}
        assert len(seen) == 6

    def test_position_counts(self) -> None:
        same = names([7, 7, 7, 7] * 3)
        assert len(set(same)) == 3

    def test_no_tokens(self) -> None:
        assert chain(ROOT, KEY, [], 4) == []

    @pytest.mark.parametrize("token", [-1, 1 << 32, 1 << 80, 1.5, None, "7", b"7"])
    def test_what_is_no_token_is_refused(self, token: object) -> None:
        with pytest.raises(BadInput) as caught:
            chain(ROOT, KEY, [1, 2, 3, token], 4)  # type: ignore[list-item]  # the test is about it
        assert caught.value.code == "bad_prefix"

    @pytest.mark.parametrize("tokens", [b"1234", bytearray(b"1234"), memoryview(b"1234"), "1234", 7, None])
    def test_ids_given_as_something_else_are_refused(self, tokens: object) -> None:
        with pytest.raises(BadInput):
            pack_tokens(tokens)  # type: ignore[arg-type]  # the test is about it

    @pytest.mark.parametrize(
        ("root", "key", "tokens", "block_tokens"),
        [
            (ROOT[:15], KEY, TOKENS, 4),
            (ROOT + b"\0\0\0\0", KEY, TOKENS, 4),
            (b"", KEY, TOKENS, 4),
            (ROOT, b"", TOKENS, 4),
            (ROOT, KEY * 4, TOKENS, 4),
            (ROOT, KEY, b"12345", 1),
            (ROOT, KEY, TOKENS, 0),
            (ROOT, KEY, TOKENS, -4),
        ],
    )
    def test_bad_input(self, root: bytes, key: bytes, tokens: list[int] | bytes, block_tokens: int) -> None:
        with pytest.raises(BadInput):
            chain(BlockHash(root), key, tokens, block_tokens)


class TestExtraKeys:
    @given(parts_of, parts_of)
    def test_injective(self, one: list[tuple[str, bytes]], other: list[tuple[str, bytes]]) -> None:
        assert (extra_keys(one) == extra_keys(other)) == (one == other)

    @given(parts_of)
    def test_moving_a_boundary_changes_the_encoding(self, parts: list[tuple[str, bytes]]) -> None:
        for at, (tag, value) in enumerate(parts):
            if value[:1].isascii() and value:
                moved = [*parts[:at], (tag + value[:1].decode(), value[1:]), *parts[at + 1 :]]
                assert extra_keys(moved) != extra_keys(parts)

    def test_the_same_bytes_under_another_tag_differ(self) -> None:
        assert extra_keys([("adapter", b"x")]) != extra_keys([("salt", b"x")])

    @given(parts_of)
    def test_it_can_be_read_back(self, parts: list[tuple[str, bytes]]) -> None:
        assert read_back(extra_keys(parts)) == parts

    def test_a_tag_that_is_no_text_is_refused(self) -> None:
        with pytest.raises(BadInput):
            extra_keys([("\ud800", b"")])


class TestKeys:
    @given(st.lists(st.binary(min_size=16, max_size=16), max_size=8))
    def test_split_is_the_inverse_of_join(self, blocks: list[bytes]) -> None:
        assert split_hashes(b"".join(blocks)) == blocks

    @given(st.binary(max_size=64))
    def test_a_part_of_a_hash_is_refused(self, joined: bytes) -> None:
        if len(joined) % 16:
            with pytest.raises(BadInput):
                split_hashes(joined)

    @pytest.mark.parametrize(
        ("namespace", "block"), [(b"n" * 15, b"b" * 16), (b"", b"b" * 16), (b"n" * 16, b"")]
    )
    def test_a_storage_key_has_its_length(self, namespace: bytes, block: bytes) -> None:
        with pytest.raises(AssertionError):
            storage_key(NamespaceId(namespace), BlockHash(block))

    @given(st.binary(min_size=16, max_size=16))
    def test_the_hint_is_the_first_eight_bytes(self, block: bytes) -> None:
        assert routing_hint(BlockHash(block)).to_bytes(8, "little") == block[:8]


class TestBlockSpec:
    @given(st.integers(1, 200), st.integers(1, 64), st.integers(1, 300_000))
    def test_chunks_divide_heads_or_are_whole_heads(
        self, plane_count: int, head_count: int, head_bytes: int
    ) -> None:
        try:
            spec = BlockSpec(16, plane_count, head_count, head_bytes)
        except BadInput:
            return
        assert spec.chunk_bytes <= CHUNK_BYTES_MAX
        assert spec.plane_bytes % spec.chunk_bytes == 0
        assert spec.head_bytes % spec.chunk_bytes == 0 or spec.chunk_bytes % spec.head_bytes == 0
        assert spec.chunk_count * spec.chunk_bytes == spec.block_bytes
        assert spec.chunk_count <= CHUNK_COUNT_MAX

    @pytest.mark.parametrize(
        ("head_count", "head_bytes", "chunk_bytes"),
        [
            (8, 4_096, 32_768),
            (32, 4_096, 65_536),
            (12, 10_000, 60_000),
            (1, 131_072, 65_536),
            (7, 20_000, 20_000),
            (2, 98_304, 49_152),
        ],
    )
    def test_chunk_bytes(self, head_count: int, head_bytes: int, chunk_bytes: int) -> None:
        assert BlockSpec(16, 4, head_count, head_bytes).chunk_bytes == chunk_bytes

    def test_the_chunk_follows_a_changed_shape(self) -> None:
        assert replace(BlockSpec(16, 4, 8, 4_096), head_bytes=1_024).chunk_bytes == 8_192

    @pytest.mark.parametrize("name", ["block_tokens", "plane_count", "head_count", "head_bytes"])
    @pytest.mark.parametrize("value", [0, -1])
    def test_nothing_is_empty(self, name: str, value: int) -> None:
        with pytest.raises(BadInput, match=name):
            replace(BlockSpec(16, 4, 8, 4_096), **{name: value})

    def test_the_largest_block(self) -> None:
        assert BlockSpec(1, 1, 1, BLOCK_BYTES_MAX).block_bytes == BLOCK_BYTES_MAX
        with pytest.raises(BadInput, match="limit"):
            BlockSpec(1, 1, 1, BLOCK_BYTES_MAX + 1)

    @pytest.mark.parametrize("shape", [(1, 1, 1_073_741_789), (1 << 20, 1, 1), (1, 1_073_741_789, 1)])
    def test_a_shape_of_endless_chunks_is_refused_at_once(self, shape: tuple[int, int, int]) -> None:
        with pytest.raises(BadInput, match="chunks"):
            BlockSpec(16, *shape)


def read_back(encoded: bytes) -> list[tuple[str, bytes]]:
    """A decoder of ``extra_keys``: that it exists is what makes the encoding injective."""
    items: list[bytes] = []
    while encoded:
        end = 4 + int.from_bytes(encoded[:4], "little")
        items.append(encoded[4:end])
        encoded = encoded[end:]
    return [(tag.decode(), value) for tag, value in zip(items[::2], items[1::2], strict=True)]
