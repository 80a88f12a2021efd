"""Addresses with a key in them, and what a proof depends on."""

from __future__ import annotations

import pytest

from kvcache.errors import BadInput
from kvcache.transport.keys import (
    CONNECTS,
    LISTENS,
    is_key,
    is_proof,
    new_key,
    new_nonce,
    proof,
    shown,
    split_key,
    with_key,
)

KEY = bytes(range(32))
# What two releases that speak one version must agree on.
GOLDEN = "a02273afa4a8e72f6f46fd056063530ec5fe00f39cd5cde1f64f769a52ae4a8e"


def test_an_address_bears_its_key_there_and_back() -> None:
    address = with_key("tcp://[::1]:7", KEY)
    assert address == f"tcp://[::1]:7#{KEY.hex()}"
    assert split_key(address) == ("tcp://[::1]:7", KEY)
    assert shown(address) == "tcp://[::1]:7"


def test_without_a_key_an_address_is_what_it_was() -> None:
    assert with_key("ucx://host:1", b"") == "ucx://host:1"
    assert split_key("ucx://host:1") == ("ucx://host:1", b"")
    assert shown("ucx://host:1") == "ucx://host:1"


@pytest.mark.parametrize("text", ["", "zz", "0", "00" * 15, "00" * 65, "0x" + "00" * 16, f"{KEY.hex()}#"])
def test_what_cannot_be_a_key_is_refused_without_repeating_it(text: str) -> None:
    with pytest.raises(BadInput) as caught:
        split_key(f"tcp://host:1#{text}")
    assert "tcp://host:1 " in str(caught.value)
    assert not text or f"#{text}" not in str(caught.value)


def test_what_may_be_a_key() -> None:
    assert is_key(b"")
    assert is_key(new_key())
    assert not is_key(b"short")
    assert not is_key(bytes(65))
    assert new_key() != new_key()
    assert new_nonce() != new_nonce()


def test_a_proof_depends_on_everything() -> None:
    right = proof(KEY, CONNECTS, b"said")
    assert right.hex() == GOLDEN
    assert is_proof(bytearray(right), KEY, CONNECTS, b"said")
    for key, role, said in (
        (bytes(32), CONNECTS, b"said"),
        (b"", CONNECTS, b"said"),
        (KEY, LISTENS, b"said"),
        (KEY, CONNECTS, b"sai"),
        (KEY, CONNECTS, b"saie"),
    ):
        assert not is_proof(right, key, role, said)
    assert not is_proof(right[:-1], KEY, CONNECTS, b"said")
    assert not is_proof(b"", KEY, CONNECTS, b"said")
