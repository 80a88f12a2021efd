"""The codec: every message survives the way there, and nothing but BadInput ever comes out of bad bytes."""

from __future__ import annotations

import tracemalloc

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache import wire
from kvcache.errors import CODES, BadInput
from kvcache.wire_tuning import InForce
from tests.kvcache.wire_messages import (
    MESSAGES,
    NUMBER_MAX,
    REPLIES,
    REQUESTS,
    Decode,
    Plain,
    anything,
    body_of,
    decoder,
    example,
    messages_of,
    plain_of,
)

HEADER_BYTES = wire.HEADER.size


def refused(decode: Decode, body: bytes) -> str:
    with pytest.raises(BadInput) as caught:
        decode(body)
    assert caught.value.code == "bad_message"
    assert str(caught.value).isprintable()
    return str(caught.value)


def counted(count: int) -> wire.StatsReply:
    return wire.StatsReply({str(number): 0.0 for number in range(count)})


def packed(*parts: object) -> bytes:
    body = msgpack.packb(list(parts), use_bin_type=True)
    assert isinstance(body, bytes)
    return body


def survives(decode: Decode, body: bytes) -> None:
    """Whatever ``body`` is: a message that encodes again, or BadInput."""
    try:
        call, message = decode(body)
    except BadInput as error:
        assert error.code in CODES
    else:
        assert decode(body_of(call, message)) == (call, message) or "nan" in repr(message)


class TestRoundTrip:
    def test_every_message_is_in_a_union(self) -> None:
        inside = {wire.BlockEvent}
        assert set(wire.Message.__subclasses__()) - set(MESSAGES) <= inside
        assert not set(REQUESTS) & set(REPLIES)

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", MESSAGES)
    def test_every_message(self, kind: type[wire.Message]) -> None:
        @given(st.integers(0, NUMBER_MAX), messages_of(kind))
        def there_and_back(call: int, message: wire.Message) -> None:
            assert decoder(kind)(body_of(call, message)) == (call, message)

        there_and_back()

    @pytest.mark.parametrize("kind", MESSAGES)
    def test_one_of_every_kind(self, kind: type[wire.Message]) -> None:
        message = example(kind)
        frame = wire.encode(7, message, 11)
        header = wire.decode_header(frame[:HEADER_BYTES])
        assert header == wire.FrameHeader(len(frame) - HEADER_BYTES, 11)
        assert decoder(kind)(frame[HEADER_BYTES:]) == (7, message)
        assert decoder(kind)(memoryview(frame)[HEADER_BYTES:]) == (7, message)

    def test_the_largest_of_the_large(self) -> None:
        numbers = list(range(1 << 33, (1 << 33) + wire.PREFIX_BLOCKS_MAX))
        leased = wire.Leased(1, len(numbers), numbers, numbers, bytes(16 * len(numbers)), 1, 1)
        assert wire.decode_reply(body_of(1, leased)) == (1, leased)
        match = wire.Match(bytes(16), bytes(16 * wire.PREFIX_BLOCKS_MAX))
        assert wire.decode_request(body_of(1, match)) == (1, match)

    def test_a_golden_frame(self) -> None:
        """The layout on the wire: a change here needs another protocol version."""
        frame = wire.encode(7, wire.Abort(9), 5)
        assert frame[:HEADER_BYTES].hex() == "4b5601001b000000" + "0500000000000000"
        assert frame[HEADER_BYTES:].hex() == "9207" + "82" + (b"\xa4type\xa5abort\xabreservation\x09").hex()

    def test_secrets_stay_out_of_what_is_printed(self) -> None:
        hello = wire.Hello(1, token="a-secret-token")
        welcome = wire.Welcome(1, "n", 1, "t", [], b"a-secret-key", 0)
        assert "secret" not in f"{hello!r} {hello} {welcome!r} {welcome}"


class TestEncodeRefuses:
    @pytest.mark.parametrize(
        ("message", "code"),
        [
            (wire.Hello(1, token="\ud800"), "bad_message"),
            (wire.Abort(1 << 64), "bad_message"),
            (wire.Open({"epoch": 1 << 70}, 1, 1, 1), "bad_message"),
            (wire.Match(b"", bytes(wire.BODY_BYTES_MAX)), "too_large"),
        ],
    )
    def test_what_cannot_be_sent(self, message: wire.Message, code: str) -> None:
        with pytest.raises(BadInput) as caught:
            wire.encode(1, message)
        assert caught.value.code == code

    def test_a_payload_over_the_limit(self) -> None:
        assert wire.encode(1, wire.Blocks(1), wire.PAYLOAD_BYTES_MAX)
        with pytest.raises(BadInput, match="limits"):
            wire.encode(1, wire.Blocks(1), wire.PAYLOAD_BYTES_MAX + 1)


class TestHeader:
    GOOD = wire.HEADER.pack(wire.MAGIC, wire.PROTOCOL_VERSION, 0, 3, 4)

    def test_good(self) -> None:
        for data in (self.GOOD, bytearray(self.GOOD), memoryview(self.GOOD)):
            assert wire.decode_header(data) == wire.FrameHeader(3, 4)

    @pytest.mark.parametrize("length", [*range(HEADER_BYTES), HEADER_BYTES + 1])
    def test_another_length(self, length: int) -> None:
        with pytest.raises(BadInput) as caught:
            wire.decode_header((self.GOOD * 2)[:length])
        assert caught.value.code == "bad_frame"

    @pytest.mark.parametrize(
        ("fields", "code"),
        [
            ((b"VK", 1, 0, 3, 4), "bad_frame"),
            ((b"KV", 1, 1, 3, 4), "bad_frame"),
            ((b"KV", 0, 0, 3, 4), "bad_version"),
            ((b"KV", 2, 0, 3, 4), "bad_version"),
            ((b"KV", 1, 0, wire.BODY_BYTES_MAX + 1, 4), "too_large"),
            ((b"KV", 1, 0, 3, wire.PAYLOAD_BYTES_MAX + 1), "too_large"),
            ((b"KV", 1, 0, (1 << 32) - 1, NUMBER_MAX), "too_large"),
        ],
    )
    def test_each_field(self, fields: tuple[bytes, int, int, int, int], code: str) -> None:
        with pytest.raises(BadInput) as caught:
            wire.decode_header(wire.HEADER.pack(*fields))
        assert caught.value.code == code

    def test_the_limits_themselves_are_allowed(self) -> None:
        most = (wire.BODY_BYTES_MAX, wire.PAYLOAD_BYTES_MAX)
        assert wire.decode_header(wire.HEADER.pack(b"KV", 1, 0, *most)) == wire.FrameHeader(*most)

    @given(st.binary(max_size=20) | st.binary(max_size=14).map(lambda rest: b"KV" + rest))
    def test_fuzz(self, data: bytes) -> None:
        try:
            header = wire.decode_header(data)
        except BadInput as error:
            assert error.code in ("bad_frame", "bad_version", "too_large")
        else:
            again = wire.HEADER.pack(b"KV", 1, 0, header.body_bytes, header.payload_bytes)
            assert again == data


class TestBadBodies:
    @pytest.mark.parametrize("kind", MESSAGES)
    def test_every_truncation_and_every_trailing_byte(self, kind: type[wire.Message]) -> None:
        body = body_of(7, example(kind))
        for end in range(len(body)):
            refused(decoder(kind), body[:end])
        for tail in (b"\0", b"\xc1", body):
            refused(decoder(kind), body + tail)

    @pytest.mark.parametrize("kind", MESSAGES)
    def test_the_other_direction(self, kind: type[wire.Message]) -> None:
        other = wire.decode_reply if kind in REQUESTS else wire.decode_request
        refused(other, body_of(7, example(kind)))

    @pytest.mark.parametrize("kind", MESSAGES)
    def test_an_unknown_field(self, kind: type[wire.Message]) -> None:
        assert "surprise" in refused(decoder(kind), packed(7, {**plain_of(kind), "surprise": 1}))

    @pytest.mark.parametrize("kind", MESSAGES)
    def test_a_missing_field(self, kind: type[wire.Message]) -> None:
        optional = set(kind.__struct_fields__[len(kind.__struct_fields__) - len(kind.__struct_defaults__) :])
        for name in {"type", *kind.__struct_fields__} - optional:
            plain = plain_of(kind)
            del plain[name]
            assert name in refused(decoder(kind), packed(7, plain))

    @pytest.mark.parametrize("kind", MESSAGES)
    def test_a_wrong_type_in_every_field(self, kind: type[wire.Message]) -> None:
        for name in ("type", *kind.__struct_fields__):
            is_fraction = isinstance(getattr(example(kind), name, ""), float)
            for wrong in (None, "1.5" if is_fraction else 1.5, {"a": None}):
                assert name in refused(decoder(kind), packed(7, {**plain_of(kind), name: wrong}))
            refused(decoder(kind), packed(7, {**plain_of(kind), name: [None]}))

    def test_a_number_is_no_truth_and_text_no_bytes(self) -> None:
        for kind, name, wrong in (
            (wire.Hello, "map", 1),
            (wire.Hello, "version", True),
            (wire.Hello, "version", 1.0),
            (wire.Hello, "version", "1"),
            (wire.Match, "prefix", "AAAA"),
            (wire.Hello, "token", b"bytes"),
            (wire.Open, "namespace", {"epoch": True}),
            (wire.Open, "namespace", {b"epoch": 1}),
        ):
            refused(wire.decode_request, packed(7, {**plain_of(kind), name: wrong}))

    @pytest.mark.parametrize("field", [*InForce.__struct_fields__, "surprise"])
    def test_a_wrong_type_and_an_unknown_field_within_a_message(self, field: str) -> None:
        def told(inside: Plain) -> bytes:
            return packed(7, {**plain_of(wire.Tuned), "tiers": {"host": inside}})

        right: Plain = {"policy": "leaf-lru", "params": {}, "blocks": 1}
        assert wire.decode_reply(told(right))
        assert "tiers" in refused(wire.decode_reply, told({**right, field: 1.5}))

    @pytest.mark.parametrize(
        ("kind", "name"),
        [(wire.Read, "start"), (wire.Read, "count"), (wire.Write, "start"), (wire.Release, "lease")],
    )
    def test_a_position_before_the_first(self, kind: type[wire.Message], name: str) -> None:
        refused(decoder(kind), packed(7, {**plain_of(kind), name: -1}))

    def test_positions_before_the_first_in_a_list(self) -> None:
        refused(wire.decode_request, packed(7, {**plain_of(wire.Release), "failed": [0, -1]}))

    @pytest.mark.parametrize(
        "tag", ["", "Hello", "hello ", "welcome", "block_event", "message", "\x1b[2J", "x" * 300]
    )
    def test_an_unknown_type(self, tag: str) -> None:
        refused(wire.decode_request, packed(7, {**plain_of(wire.Hello), "type": tag}))

    @pytest.mark.parametrize(
        "parts",
        [
            [],
            [7],
            [7, {}],
            [7, {"type": "stats"}, 1],
            [True, {"type": "stats"}],
            ["7", {"type": "stats"}],
            [7, []],
        ],
    )
    def test_what_is_no_call_and_message(self, parts: list[object]) -> None:
        refused(wire.decode_request, packed(*parts))

    @pytest.mark.parametrize("plain", [None, 1, "stats", b"stats", {"type": "stats"}, {7: 1}])
    def test_what_is_no_list(self, plain: object) -> None:
        body = msgpack.packb(plain)
        assert isinstance(body, bytes)
        refused(wire.decode_request, body)


class TestHostileBodies:
    @pytest.mark.parametrize(
        "body",
        [
            b"\xdd\xff\xff\xff\xff",  # A list of 4 billion.
            b"\xdc\xff\xff",
            b"\xdf\xff\xff\xff\xff",  # A map of 4 billion.
            b"\xdb\xff\xff\xff\xff",  # A text, then bytes, of 4 GiB.
            b"\xc6\xff\xff\xff\xff",
            b"\x92\x07\xdd\x00\x01\x00\x01" + b"\xc0" * 65_537,
            b"\x92\x07\x81\x90\x01",  # A map with a list for a key, and with a number.
            b"\x92\x07\x81\x01\x01",
            b"\xc7\x05\x01" + b"x" * 5,  # An extension type, and the one for times.
            b"\xd6\xff\0\0\0\0",
            b"\xc1",  # Never used by MessagePack.
            b"\x92\x07\x82\xa4type\xa5stats\xa1a\xc1",
            b"\x92\x07\xa2\xff\xfe",  # No UTF-8.
            b"\x91" * 100_000,
            b"\x81\xa1a" * 100_000,
            b"\xdc\xff\xff" * 100_000,
            b"\x92\x07" + b"\x91" * 1_000 + b"\xc0",
            b"\x92\x07" + b"\x81\xa1a" * 500 + b"\xc0",
        ],
        ids=lambda body: f"{body[:8].hex()}-{len(body)}",
    )
    def test_sizes_depth_and_types(self, body: bytes) -> None:
        refused(wire.decode_request, body)
        refused(wire.decode_reply, body)

    def test_the_limits_on_texts_lists_and_maps(self) -> None:
        for decode, fits, over in (
            (wire.decode_request, wire.Hello(1, token="x" * 4_096), wire.Hello(1, token="x" * 4_097)),
            (wire.decode_request, wire.Release(1, [0] * 65_536), wire.Release(1, [0] * 65_537)),
            (wire.decode_reply, counted(4_096), counted(4_097)),
        ):
            assert decode(body_of(7, fits)) == (7, fits)
            assert "exceeds" in refused(decode, body_of(7, over))

    @pytest.mark.parametrize("brackets", [b"\x90", b"\x80"])
    def test_a_body_of_brackets_costs_little(self, brackets: bytes) -> None:
        """60 lists of 65,535 empty ones: 3.9 MB that would become 275 MB."""
        body = (b"\xdd\0\1\0\0" + brackets * 65_535) * 60
        assert len(body) < wire.BODY_BYTES_MAX
        tracemalloc.start()
        try:
            refused(wire.decode_request, body)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 8 << 20

    def test_the_peers_text_is_cut_and_cleaned(self) -> None:
        said = refused(wire.decode_request, packed(7, {"type": "stats", "\n\x1b[2J" + "x" * 4_000: 1}))
        assert len(said) < 400


@pytest.mark.slow
class TestFuzz:
    @given(st.binary(max_size=64))
    def test_any_bytes(self, body: bytes) -> None:
        survives(wire.decode_request, body)
        survives(wire.decode_reply, body)

    @given(anything)
    def test_any_content(self, plain: object) -> None:
        survives(wire.decode_request, packed(7, plain))
        survives(wire.decode_reply, packed(7, plain))

    @given(st.sampled_from(MESSAGES), st.data())
    def test_any_value_in_any_field(self, kind: type[wire.Message], data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(["type", *kind.__struct_fields__]))
        survives(decoder(kind), packed(7, {**plain_of(kind), name: data.draw(anything)}))

    @given(st.sampled_from(MESSAGES), st.data())
    def test_damaged_messages(self, kind: type[wire.Message], data: st.DataObject) -> None:
        body = bytearray(body_of(7, data.draw(messages_of(kind))))
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.integers(0, len(body)))
            body[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
        survives(decoder(kind), bytes(body))
