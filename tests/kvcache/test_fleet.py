"""The file of workers and nodes: what it says, and what is said of a wrong one."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvcache.errors import BadInput
from kvcache.fleet import Fleet, Node, Worker, engine_source, token, token_of
from kvcache.locator import Locator

WHOLE = """
[[worker]]
name = "decode-0"
url = "http://10.0.0.2:8000"
model = "qwen3"
sources = ["cold"]
node = "tcp://10.0.0.2:8211"
events = "tcp://10.0.0.2:5557"
replay = "tcp://10.0.0.2:6557"
engine = "sglang"
block_tokens = 16
ranks = 2
role = "decode"

[[worker]]
name = "bare"

[[node]]
address = "tcp://10.0.0.9:8211"
token_file = "router.token"
"""


def written(folder: Path, text: str, name: str = "fleet.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_a_file_is_read_whole(tmp_path: Path) -> None:
    fleet = Fleet.from_file(written(tmp_path, WHOLE))
    decode, bare = fleet.worker
    assert (decode.engine, decode.role, bare.role, bare.tenant) == ("sglang", "decode", "any", "default")
    assert [(each.source, each.events, each.replay) for each in decode.streams()] == [
        ("engine:decode-0", "tcp://10.0.0.2:5557", "tcp://10.0.0.2:6557"),
        ("engine:decode-0/1", "tcp://10.0.0.2:5558", "tcp://10.0.0.2:6558"),
    ]
    assert decode.own_sources() == ["cold", "engine:decode-0", "engine:decode-0/1"]
    assert bare.own_sources() == []
    assert fleet.followed() == {
        "tcp://10.0.0.2:8211": "",
        "tcp://10.0.0.9:8211": str(tmp_path / "router.token"),
    }


def test_json_says_the_same(tmp_path: Path) -> None:
    fleet = Fleet.from_file(written(tmp_path, '{"worker": [{"name": "a"}]}', "fleet.json"))
    assert fleet.worker == (Worker(name="a"),)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[worker]]\nname = 'a'\nurll = 'x'", "worker 1 .*urll.*did you mean 'url'"),
        ("[[worker]]\nname = 'a'\n[[worker]]\nname = 7", "worker 2, name.*Expected `str`"),
        ("[[worker]]\nname = 'a'\nengine = 'tgi'", "worker 1, engine"),
        ("[[worker]]\nname = 'a b'", "worker 1, name"),
        ('[[worker]]\nname = "a\\n"', "worker 1, name"),
        (
            "[[worker]]\nname = 'a'\nevents = 'tcp://h:1'\nranks = 2\n"
            "[[worker]]\nname = 'a/1'\nevents = 'tcp://h:9'",
            "the source engine:a/1, as those of 'a' are",
        ),
        ("[[worker]]\nname = 'a'\n[[worker]]\nname = 'a'", "another worker has it"),
        ("[[worker]]\nname = 'a'\nnode = 'here'", "node of worker 'a'"),
        ("[[worker]]\nname = 'a'\nurl = 'ftp://x'", "url of worker 'a'"),
        *(
            (f"[[worker]]\nname = 'a'\nurl = 'http://{host}'", "url of worker 'a'")
            for host in ("u:p@h", "h:70000", "h:0", "h:x", ":80", "[::1", "[x]", "h?x", "h\\\\y", "")
        ),
        ("[[worker]]\nname = 'a'\nevents = 'tcp://*:5557'", "events of worker 'a'"),
        ("[[worker]]\nname = 'a'\nevents = 'tcp://h:65535'\nranks = 2", "events of worker 'a'"),
        ("[[worker]]\nname = 'a'\nreplay = 'tcp://h:5557'", "replay of worker 'a'"),
        ("[[worker]]\nname = 'a'\nranks = 2", "ranks of worker 'a'"),
        ("[[worker]]\nname = 'a'\ntenant = 'A!'", "tenant of worker 'a'"),
        ("[[node]]\naddress = 'udp://x:1'", "address of node"),
        ("[[worker]\nname = 'a'", "line 1"),
        ("workers = []", "unknown field `workers`.*did you mean 'worker'"),
        (
            "[[node]]\naddress = 'tcp://h:1'\ntoken_file = 'a'\n"
            "[[node]]\naddress = 'tcp://h:1'\ntoken_file = 'b'",
            "two files of tokens",
        ),
    ],
)
def test_a_wrong_file_names_the_place(tmp_path: Path, text: str, said: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(BadInput, match=said) as raised:
        Fleet.from_file(path)
    assert raised.value.code == "bad_config" and str(path) in str(raised.value)


def test_a_file_that_is_not_there_is_said_to_be_so(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="No such file"):
        Fleet.from_file(tmp_path / "none.toml")


def test_who_registers_is_checked_alike() -> None:
    with pytest.raises(BadInput, match="node of worker 'a'"):
        Fleet.of([Worker(name="a", node="nowhere")])
    assert Fleet.of(nodes=[Node(address="unix:///run/a.sock")]).followed() == {"unix:///run/a.sock": ""}


def test_a_source_of_an_engine_is_no_nodes() -> None:
    assert (engine_source("a"), engine_source("a", 3)) == ("engine:a", "engine:a/3")


def test_a_token_is_read_from_a_private_file_and_never_repeated(tmp_path: Path) -> None:
    assert token("") == ""
    path = tmp_path / "token"
    path.write_text("0123456789abcdef\n")
    path.chmod(0o600)
    assert token(str(path)) == "0123456789abcdef"
    path.write_text("secret!")
    with pytest.raises(BadInput, match="holds no token") as raised:
        token(str(path))
    assert "secret" not in str(raised.value)
    path.chmod(0o644)
    with pytest.raises(BadInput, match="others can read"):
        token(str(path))


def test_what_is_given_as_a_token_is_one_and_is_not_repeated() -> None:
    assert token_of("", "KVCACHE_TOKEN") == "" and token_of("x" * 16, "KVCACHE_TOKEN") == "x" * 16
    for secret in ("\udcff\udcfe" * 9, "secret with a space", "secret-of-a-line\n"):
        with pytest.raises(BadInput, match="KVCACHE_TOKEN holds no token") as raised:
            token_of(secret, "KVCACHE_TOKEN")
        assert secret not in str(raised.value)
    with pytest.raises(BadInput, match="bad_credentials"):
        Locator("unix:///none.sock", "\udcff\udcfe" * 9)


@pytest.mark.parametrize(
    "url", ["http://h", "https://h:65535/v1", "http://[::1]:8000/x/v1/", "http://10.0.0.2:8000"]
)
def test_a_url_may_have_a_port_and_a_path(url: str) -> None:
    Worker(name="a", url=url).check()
