"""Addresses: what is one, what is none, and where a node is looked for by default."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from kvcache.address import TcpAddress, UnixAddress, default_address, parse
from kvcache.errors import BadInput


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("unix:///run/a.sock", UnixAddress("/run/a.sock")),
        ("/run/a.sock", UnixAddress("/run/a.sock")),
        ("tcp://localhost:80", TcpAddress("localhost", 80)),
        ("tcp://[::1]:80", TcpAddress("::1", 80)),
    ],
)
def test_an_address_is_read_and_written_back(text: str, address: UnixAddress | TcpAddress) -> None:
    assert parse(text) == address
    assert parse(str(address)) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        "run/a.sock",
        "unix://run/a.sock",
        "unix:///" + "a" * 200,
        "unix:///a\0b",
        "tcp://host",
        "tcp://:80",
        "tcp://host:",
        "tcp://host:99999",
        "tcp://host:\u0663",
        "tcp://host..domain:80",
        "tcp://" + "a" * 70 + ":80",
        "tcp://\ud800:80",
        "tcp://a b:80",
        "tcp://a\0b:80",
        "http://host:80",
    ],
)
def test_anything_else_is_refused_with_what_to_do(text: str) -> None:
    with pytest.raises(BadInput) as caught:
        parse(text)
    assert caught.value.code == "bad_config"


def test_the_default_is_the_most_particular_setting() -> None:
    assert default_address({"KVCACHE_SOCKET": "/a.sock", "XDG_RUNTIME_DIR": "/run/1"}) == "unix:///a.sock"
    assert default_address({"XDG_RUNTIME_DIR": "/run/1"}) == "unix:///run/1/kvcache/node.sock"


def test_without_settings_a_directory_of_this_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    expected = f"unix://{tmp_path}/kvcache-{os.getuid()}/node.sock"
    assert default_address({}) == expected
    (tmp_path / f"kvcache-{os.getuid()}").mkdir()
    assert default_address({}) == expected


def test_a_strangers_directory_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000)
    (tmp_path / "kvcache-4000000").mkdir()
    with pytest.raises(BadInput, match="belongs to uid"):
        default_address({})
