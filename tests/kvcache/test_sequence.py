"""Public sequence hashes: those of others, and the same from C++ and from Python."""

from __future__ import annotations

import random
from array import array
from itertools import pairwise

import pytest
from xxhash import xxh3_64_intdigest

from kvcache import index
from kvcache.errors import BadInput
from kvcache.sequence import chain_locals, local_hashes, sequence_hashes

TOKENS = array("I", [(number * 2654435761 + 12345) % 128256 for number in range(520)])

# ``compute_block_hash_for_seq(TOKENS, block_tokens)`` of ai-dynamo-runtime 1.6.1: the first, second and last.
DYNAMO = {
    1: (8866690161878238418, 6041355867291876665, 5100651808786778770),
    4: (6609409459677603705, 7547965385304659204, 9320406059952195623),
    16: (15754887313989684930, 1088502275136136911, 12408315183222078361),
    32: (1247110890431612671, 6318755059963459937, 15284717475081030087),
    64: (14859582025322110317, 12230877793511277274, 2953316182424538035),
    128: (8452168780242142488, 2219912069408355178, 5334379567436660143),
    256: (3009428109475085298, 7256822460892595127, 7256822460892595127),
}
# The same of TOKENS[:48], the second block with an image: {"mm_hash": 0x1122334455667788}.
DYNAMO_IMAGE = [15754887313989684930, 13869791607098703041, 17923235369319895431]
IMAGE = (0x1122334455667788).to_bytes(8, "little")

GOLDEN = [15754887313989684930, 11295806798770746750, 4815729190993671319]
GOLDEN_IMAGE = [15754887313989684930, 10639938679628315021]


@pytest.fixture(params=["native", "twin"] if index.NATIVE else ["twin"], autouse=True)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "NATIVE", request.param == "native")


@pytest.mark.parametrize("block_tokens", DYNAMO)
def test_local_hashes_are_those_of_dynamo(block_tokens: int) -> None:
    made = local_hashes(TOKENS, block_tokens)
    assert len(made) == len(TOKENS) // block_tokens and made.format == "Q"
    assert (made[0], made[1], made[-1]) == DYNAMO[block_tokens]


def test_what_is_appended_is_hashed_as_dynamo_does() -> None:
    assert list(local_hashes(TOKENS[:48], 16, [b"", IMAGE])) == DYNAMO_IMAGE
    assert list(local_hashes(TOKENS[:48], 16, (b"", IMAGE, b"", b"beyond"))) == DYNAMO_IMAGE


def test_sequence_hashes_are_these() -> None:
    """These names are in events and in others' indexes: they never change."""
    assert list(sequence_hashes(TOKENS[:50], 16)) == GOLDEN
    assert list(sequence_hashes(TOKENS[:48], 16, [b"", IMAGE]))[:2] == GOLDEN_IMAGE


@pytest.mark.parametrize("block_tokens", [1, 2, 3, 4, 5, 16, 33, 64, 100])
def test_each_is_the_sum_of_the_one_before_and_its_own(block_tokens: int) -> None:
    generator = random.Random(block_tokens)
    extra = [generator.randbytes(generator.choice([0, 0, 1, 8, 200, 300])) for _ in range(4)]
    packed, size = TOKENS.tobytes(), 4 * block_tokens
    local = [xxh3_64_intdigest(packed[at : at + size], 1337) for at in range(0, len(packed) - size + 1, size)]
    for number, more in enumerate(extra):
        local[number] = xxh3_64_intdigest(packed[number * size : (number + 1) * size] + more, 1337)
    made = sequence_hashes(TOKENS, block_tokens, extra)
    assert list(local_hashes(TOKENS, block_tokens, extra)) == local
    assert list(chain_locals(array("Q", local))) == list(made)
    assert made[0] == local[0]
    for (before, after), own in zip(pairwise(made), local[1:], strict=True):
        assert after == xxh3_64_intdigest(before.to_bytes(8, "little") + own.to_bytes(8, "little"), 1337)


def test_a_prompt_is_named_part_by_part() -> None:
    whole = list(sequence_hashes(TOKENS, 16))
    for first in range(1, len(whole)):
        rest = sequence_hashes(TOKENS[16 * first :], 16, (), whole[first - 1])
        assert list(rest) == whole[first:]
        assert list(chain_locals(local_hashes(TOKENS[16 * first :], 16), whole[first - 1])) == whole[first:]


def test_parts_of_a_block_have_no_name() -> None:
    assert len(sequence_hashes(TOKENS[:15], 16)) == len(sequence_hashes(b"", 16)) == 0
    assert len(chain_locals(b"")) == len(local_hashes(array("I"), 16)) == 0


def test_other_things_are_refused() -> None:
    with pytest.raises(BadInput, match="bad_prefix"):
        sequence_hashes(array("Q", [1]), 16)
    with pytest.raises(BadInput, match="bad_prefix"):
        local_hashes(TOKENS, 0)
    with pytest.raises(BadInput, match="bad_prefix"):
        local_hashes(TOKENS, 16, ["text"])  # type: ignore[list-item]
    with pytest.raises(BadInput, match="bad_prefix"):
        chain_locals(array("I", [1]))
