"""What the system refuses is said in its own words, with the setting that would help."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcache.address import parse
from kvcache.credentials import Credentials
from kvcache.errors import BadInput
from kvcache.server.listening import listen_tcp, lock
from kvcache.server.locate_frames import LocateFrames
from tests.server.locate_double import Answers


@contextlib.contextmanager
def refused(code: str, *words: str) -> Iterator[None]:
    with pytest.raises(BadInput) as caught:
        yield
    assert caught.value.code == code, caught.value
    for word in words:
        assert word in str(caught.value)
    assert "Errno" not in str(caught.value)


def test_a_port_that_another_has() -> None:
    with (
        listen_tcp("127.0.0.1", 0) as taken,
        refused("address_in_use", "already in use", "give another --tcp"),
    ):
        listen_tcp("127.0.0.1", taken.getsockname()[1])


def test_an_address_of_another_host_is_in_nobodys_use() -> None:
    with refused("bad_config", "192.0.2.1", "Cannot assign requested address", "give another --tcp"):
        listen_tcp("192.0.2.1", 0)


def test_a_socket_where_none_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with refused("bad_config", "cannot be bound", f"{tmp_path}/file", "give another --socket"):
        lock(tmp_path / "file" / "node.sock")


@pytest.mark.parametrize("setting", ["listen", "index_listen"])
def test_a_socket_for_look_ups_names_its_own_setting(setting: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    frames = LocateFrames(Answers(), Credentials.default(), setting=setting)
    with contextlib.closing(frames):
        with refused("bad_config", f"give another --{setting.replace('_', '-')}"):
            frames.listen(parse(f"unix://{tmp_path}/file/index.sock"))
        with refused("unsafe_bind", f"{setting} would listen"):
            frames.listen(parse("tcp://0.0.0.0:0"))
