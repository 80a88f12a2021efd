"""Every form in which engines tell of their blocks, as bytes that they wrote; and bytes that nobody would."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache import packing
from kvcache.block import extra_keys, pack_tokens
from kvcache.engine_events.decode import (
    PAYLOAD_BYTES_MAX,
    SKIPPED,
    Cleared,
    Event,
    Removed,
    Skipped,
    Stored,
    decode,
)
from kvcache.engine_events.naming import extra_bytes, salted
from kvcache.errors import BadInput

# Written by vLLM 0.32 (msgspec, its own classes).
VLLM = (
    "93cb3ff8000000000000938ba474797065ab426c6f636b53746f726564ac626c6f636b5f68617368657392cfffffffffffff"
    "ffff07b1706172656e745f626c6f636b5f68617368c0a9746f6b656e5f696473980102030405060708aa626c6f636b5f7369"
    "7a6504a76c6f72615f6964c0a66d656469756da3475055a96c6f72615f6e616d65c0aa65787472615f6b6579739291a47361"
    "6c74c0a967726f75705f69647800aa73657373696f6e5f6964a17384a474797065ac426c6f636b52656d6f766564ac626c6f"
    "636b5f6861736865739107a66d656469756da3475055a967726f75705f6964780081a474797065b0416c6c426c6f636b7343"
    "6c656172656401"
)
VLLM_BYTES = (
    "93cb3ff8000000000000918aa474797065ab426c6f636b53746f726564ac626c6f636b5f68617368657391c4200101010101"
    "010101010101010101010101010101010101010101010101010101b1706172656e745f626c6f636b5f68617368c420020202"
    "0202020202020202020202020202020202020202020202020202020202a9746f6b656e5f69647394"
    "01020304aa626c6f636b5f73697a6504a76c6f72615f696403a66d656469756da3475055a96c6f72615f6e616d65a3616461"
    "aa65787472615f6b6579739192a361646192a3696d67fea967726f75705f69647800c0"
)
VLLM_OFFLOAD = (
    "93cb3ff8000000000000948ba474797065ab426c6f636b53746f726564ac626c6f636b5f6861736865739105b1706172656e"
    "745f626c6f636b5f68617368c0a9746f6b656e5f69647390aa626c6f636b5f73697a6500a76c6f72615f6964c0a66d656469"
    "756da3435055a96c6f72615f6e616d65c0a967726f75705f69647800a86c6f63616c697479a54c4f43414ca96f776e657273"
    "686970a4313a667385a474797065ac426c6f636b52656d6f766564ac626c6f636b5f6861736865739105a66d656469756da7"
    "53544f52414745a967726f75705f69647800a96f776e657273686970a4313a667385a474797065ac426c6f636b52656d6f76"
    "6564ac626c6f636b5f6861736865739105a66d656469756da753544f52414745a967726f75705f69647800a86c6f63616c69"
    "7479a652454d4f544584a474797065ac426c6f636b52656d6f766564ac626c6f636b5f6861736865739105a66d656469756d"
    "a3475055a967726f75705f6964780100"
)
# As SGLang 0.5.23 declares its classes.
SGLANG = (
    "93cb3ff80000000000009688a474797065ab426c6f636b53746f726564ac626c6f636b5f68617368657392fb06b170617265"
    "6e745f626c6f636b5f68617368c0a9746f6b656e5f6964739401020304aa626c6f636b5f73697a6502a76c6f72615f6964c0"
    "a66d656469756da3475055aa63616368655f73616c74a473616c7488a474797065ab426c6f636b53746f726564ac626c6f63"
    "6b5f6861736865739107b1706172656e745f626c6f636b5f68617368fba9746f6b656e5f696473920909aa626c6f636b5f73"
    "697a6502a76c6f72615f6964c0a66d656469756daa4350555f50494e4e4544aa63616368655f73616c74a473616c7483a474"
    "797065ac426c6f636b52656d6f766564ac626c6f636b5f68617368657391fba66d656469756daa4350555f50494e4e454487"
    "a474797065ab426c6f636b53746f726564ac626c6f636b5f6861736865739108b1706172656e745f626c6f636b5f68617368"
    "c0a9746f6b656e5f69647392920102920203aa626c6f636b5f73697a6502a76c6f72615f6964c0a66d656469756da3475055"
    "87a474797065ab426c6f636b53746f726564ac626c6f636b5f6861736865739108b1706172656e745f626c6f636b5f686173"
    "68c0a9746f6b656e5f696473920102aa626c6f636b5f73697a6502a76c6f72615f6964c0a66d656469756da845585445524e"
    "414c81a474797065b0416c6c426c6f636b73436c6561726564c0"
)
# Before maps: fields by position.
OLD = (
    "92cb3ff80000000000009396ab426c6f636b53746f7265649105c092010202c092ac426c6f636b52656d6f766564910591b0"
    "416c6c426c6f636b73436c6561726564"
)
SALT = salted("salt")
MINUS_5 = (1 << 64) - 5

WRITTEN: list[tuple[str, int | None, list[Event]]] = [
    (
        VLLM,
        1,
        [
            Stored(((1 << 64) - 1, 7), None, pack_tokens(range(1, 9)), 4, "hbm", SALT),
            Removed((7,), "hbm"),
            Cleared(),
        ],
    ),
    (
        VLLM_BYTES,
        None,
        [
            Stored(
                (b"\x01" * 32,),
                b"\x02" * 32,
                pack_tokens([1, 2, 3, 4]),
                4,
                "hbm",
                (extra_keys([("mm", (-2).to_bytes(8, "little", signed=True) + b"img")]),),
                "ada",
            )
        ],
    ),
    (
        VLLM_OFFLOAD,
        0,
        [
            Stored((5,), None, b"", 0, "host:1:fs"),
            Removed((5,), "nvme:1:fs"),
            Skipped("remote"),
            Skipped("group"),
        ],
    ),
    (
        SGLANG,
        None,
        [
            Stored((MINUS_5, 6), None, pack_tokens([1, 2, 3, 4]), 2, "hbm", SALT),
            Stored((7,), MINUS_5, pack_tokens([9, 9]), 2, "host"),
            Removed((MINUS_5,), "host"),
            Skipped("bigram", lost=True),
            Skipped("medium"),
            Cleared(),
        ],
    ),
    (
        OLD,
        None,
        [Stored((5,), None, pack_tokens([1, 2]), 2, "hbm"), Removed((5,), "hbm"), Cleared()],
    ),
]


@pytest.mark.parametrize(("written", "rank", "events"), WRITTEN)
def test_what_engines_wrote_is_read(written: str, rank: int | None, events: list[Event]) -> None:
    told = decode(bytes.fromhex(written))
    assert list(told.events) == events
    assert told.rank == rank


def stored(**changes: object) -> dict[str, object]:
    return {
        "type": "BlockStored",
        "block_hashes": [1],
        "parent_block_hash": None,
        "token_ids": [3, 4],
        "block_size": 2,
        **changes,
    }


def rfc(kind: str, **changes: object) -> dict[str, object]:
    return {
        **{"event_id": 3, "timestamp": 1, "event_type": kind, "model_name": "m", "block_size": 2},
        **{"additional_salt": "w8", "lora_name": None, "tenant_id": "t", "backend_id": "b"},
        **{"medium": "gpu", "dp_rank": 0, "seq_hashes": [9], "base_block_idx": 1},
        **changes,
    }


def only(event: object) -> Event:
    (found,) = decode(packing.pack([1.0, [event], None])).events
    return found


FORMS: list[tuple[object, Event]] = [
    (stored(medium=None), Stored((1,), None, pack_tokens([3, 4]), 2, "hbm")),
    (stored(medium="DISK"), Stored((1,), None, pack_tokens([3, 4]), 2, "nvme")),
    (stored(lora_id=3), Stored((1,), None, pack_tokens([3, 4]), 2, "hbm", adapter="3")),
    (stored(cache_salt="s", parent_block_hash=9), Stored((1,), 9, pack_tokens([3, 4]), 2, "hbm")),
    (stored(kv_cache_spec_kind="mla_attention"), Stored((1,), None, pack_tokens([3, 4]), 2, "hbm")),
    (stored(kv_cache_spec_kind="sliding_window"), Skipped("kind")),
    (stored(token_ids=[3, 4, 5]), Skipped("uneven", lost=True)),
    (stored(block_hashes=[], token_ids=[]), Skipped("keyless", lost=True)),
    (stored(extra_keys=[["s", b"d", 5]]), Stored(
        (1,), None, pack_tokens([3, 4]), 2, "hbm",
        (extra_keys([("salt", b"s"), ("embeds", b"d"), ("key", (5).to_bytes(8, "little"))]),),
    )),
    ({"type": "BlockTouched"}, Skipped("unknown")),
    (["BlockTouched", 3], Skipped("unknown")),
    (
        rfc("stored", parent_hash=8, token_ids=None),
        Stored((9,), 8, b"", 2, "hbm", public=True, model="m", salt="w8", tenant="t"),
    ),
    (
        rfc("stored", parent_hash=8, token_ids=[1, 2, 3], block_size=None, tenant_id="default"),
        Stored((9,), 8, pack_tokens([1, 2, 3]), 3, "hbm", model="m", salt="w8"),
    ),
    (rfc("removed", type="BlockRemoved", block_hashes=[4]), Removed((9,), "hbm")),
    (rfc("removed", seq_hashes=[], object_key="k"), Skipped("keyless")),
    (rfc("cleared", medium="cpu"), Cleared("host", narrow=True)),
    (rfc("cleared", medium=None), Cleared("", narrow=True)),
]  # fmt: skip


@pytest.mark.parametrize(("event", "expected"), FORMS)
def test_every_form_of_an_event(event: object, expected: Event) -> None:
    assert only(event) == expected


def test_every_envelope() -> None:
    event, expected = rfc("removed", dp_rank=4), (Removed((9,), "hbm"),)
    for envelope, rank in (
        ([1, [event], 2], 2),
        ([1.5, [event]], None),
        ({"ts": 1, "events": [event], "data_parallel_rank": 3}, 3),
        ({"events": [event], "attn_dp_rank": 5}, 5),
        ([event], 4),
        (event, 4),
    ):
        told = decode(packing.pack(envelope))
        assert (told.events, told.rank) == (expected, rank), envelope


@pytest.mark.parametrize(
    "plain",
    [
        None,
        7,
        "BlockStored",
        [1],
        [1, None],
        ["a", []],
        [1, [], -1],
        [1, [], True],
        [1, [3]],
        [1, [[]]],
        [1, [{}]],
        [1, [{"event_type": "moved"}, stored(block_hashes=None)]],
        [1, [stored(block_hashes=["a"])]],
        [1, [stored(block_hashes=[b""])]],
        [1, [stored(block_hashes=[True])]],
        [1, [stored(token_ids=[-1, 1])]],
        [1, [stored(token_ids=["a", "b"])]],
        [1, [stored(token_ids=b"abcd")]],
        [1, [stored(block_size=-1)]],
        [1, [stored(medium=3)]],
        [1, [stored(extra_keys=[[None]])]],
        [1, [stored(extra_keys=[[["a", "b"]]])]],
        [1, [stored(extra_keys=[[1 << 63]])]],
        [1, [stored(extra_keys=5)]],
        [1, [stored(lora_name="x" * 513)]],
        [1, [stored(group_idx="0")]],
    ],
)
def test_what_is_no_message_is_refused_whole(plain: object) -> None:
    with pytest.raises(BadInput) as caught:
        decode(packing.pack(plain))
    assert caught.value.code in ("bad_message", "bad_prefix")


def test_sizes_are_bounded() -> None:
    for payload in (
        b"\x91" * (1 << 20),
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x90" * 3,
        bytes(PAYLOAD_BYTES_MAX + 1),
        b"\x93\x01\xdc\xff\xff" + b"\x91\x90" * 65_535 + b"\xc0",
        b"",
    ):
        with pytest.raises(BadInput):
            decode(payload)


@pytest.mark.parametrize("field", [*stored(), "extra_keys", "medium"])
@pytest.mark.parametrize("depth", [500, 1_000])
def test_lists_in_one_another_are_refused_and_not_said_in_full(field: str, depth: int) -> None:
    """Python cannot say what is a thousand deep."""
    inner = b"\x91" * depth + b"\x90"
    names = {**stored(), field: 0}
    packed = b"".join(
        packing.pack(name) + packing.pack(value) for name, value in names.items() if name != field
    )
    event = bytes([0x80 + len(names)]) + packed + packing.pack(field) + b"\x92" + inner + inner
    _survives(b"\x93\x01\x91" + event + b"\x00")


def test_no_two_lists_of_keys_have_the_same_bytes() -> None:
    lists = [[], ["a"], ["a", "b"], ["ab"], [b"a"], [["a", 1]], [["a", 2]], [1], [2], ["", "a"], [b"", "a"]]
    assert len({extra_bytes(keys) for keys in lists}) == len(lists)


_plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.text(max_size=8)
    | st.binary(max_size=8) | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(
        st.sampled_from(["type", "event_type", "events", "block_hashes", "token_ids", "extra_keys"]),
        inner,
        max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip
_named = st.sampled_from(
    [*stored(), "extra_keys", "medium", "lora_name", "group_idx", "event_type", "seq_hashes"]
)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=64))
def test_any_bytes_are_read_or_refused(payload: bytes) -> None:
    _survives(payload)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(_named, _plain, max_size=4), st.sampled_from(["BlockStored", "BlockRemoved", None]))
def test_any_fields_are_read_or_refused(changes: dict[str, object], tag: str | None) -> None:
    event = {**stored(), **changes, "type": tag}
    _survives(packing.pack([math.pi, [event, *changes.values()], None]))
    _survives(packing.pack(list(changes.values())))


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(WRITTEN), st.integers(0, 1 << 12), st.integers(0, 255))
def test_any_byte_may_be_wrong(written: tuple[str, int | None, list[Event]], at: int, byte: int) -> None:
    payload = bytearray.fromhex(written[0])
    payload[at % len(payload)] = byte
    _survives(bytes(payload))


def _survives(payload: bytes) -> None:
    try:
        told = decode(payload)
    except BadInput:
        return
    for event in told.events:
        assert isinstance(event, Stored | Removed | Cleared) or event.why in SKIPPED
