"""What a command says of an address where no node answers: each reason has a remedy of its own."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from kvcache.clock import NS_PER_MS, NS_PER_S, SystemClock
from kvcache.errors import KVCacheError
from kvcache.node_channel import connected


def refusal(address: str, patience_ns: int = 20 * NS_PER_S) -> KVCacheError:
    deadline_ns = SystemClock().now_ns() + patience_ns
    with pytest.raises(KVCacheError) as caught, connected(address, "", "a test", deadline_ns):
        pass
    assert "Errno" not in str(caught.value)
    return caught.value


def test_nothing_is_there(tmp_path: Path) -> None:
    error = refusal(f"unix://{tmp_path}/node.sock")
    assert (error.code, error.why) == ("unavailable", "No such file or directory")
    assert "kvcache serve" in error.todo


def test_it_is_another_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*_: object) -> socket.socket:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("kvcache.blocking_channel.connected_socket", connect)
    error = refusal(f"unix://{tmp_path}/node.sock")
    assert error.why == "Permission denied"
    assert "the node's user" in error.todo
    assert "kvcache serve" not in error.todo


def test_it_says_nothing(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "node.sock"))
        listener.listen()
        error = refusal(f"unix://{tmp_path}/node.sock", 50 * NS_PER_MS)
    assert error.why == "it did not answer in time"
    assert "stopped" in error.todo


def test_it_speaks_http() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        error = refusal(f"tcp://127.0.0.1:{listener.getsockname()[1]}")
        thread.join()
    assert error.code == "bad_frame"
    assert "is no kvcache node" in error.what
    assert "--http" in error.todo
