"""Messages about blocks that move: what of them no log may hold."""

from __future__ import annotations

from kvcache import wire


def test_no_secret_is_in_the_words_for_a_message() -> None:
    secret, address = "5ec4e7" * 8, "tcp://10.0.0.1:7#" + "5ec4e7" * 8
    key = bytes.fromhex(secret)
    for message in (
        wire.Hello(1, token=secret),
        wire.Welcome(1, "node", 1, "a", [], key, 0, [address]),
        wire.Exported(address, key, b"", 1),
        wire.Posted(address, key, 1),
        wire.Followed("writing", 1, 1, address, key),
    ):
        assert "5ec4e7" not in repr(message)
        assert repr(key)[2:-1] not in repr(message)
