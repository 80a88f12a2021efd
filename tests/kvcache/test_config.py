"""Settings come from four places, and a wrong one says what, where and what to do."""

from pathlib import Path

import pytest

from kvcache.config import NodeConfig, is_loopback, load, parse_bind, parse_size
from kvcache.errors import BadInput


def refusal(flags: dict[str, str | int | bool], environment: dict[str, str]) -> str:
    with pytest.raises(BadInput) as caught:
        load(flags, environment)
    assert caught.value.code == "bad_config"
    return str(caught.value)


def test_defaults_serve_on_loopback() -> None:
    config = load({}, {})
    assert config == NodeConfig()
    host, _ = parse_bind(config.http, "http") or ("", 0)
    assert is_loopback(host)


def test_a_flag_beats_the_environment_that_beats_the_file(tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    file.write_text('capacity = "1MiB"\npolicy = "leaf-fifo"\nname = "from-file"\n')
    environment = {"KVCACHE_CAPACITY": "2MiB", "KVCACHE_POLICY": "leaf-lru", "PATH": "/bin"}
    config = load({"config": str(file), "capacity": "3MiB"}, environment)
    assert (config.capacity, config.policy, config.name) == ("3MiB", "leaf-lru", "from-file")


def test_the_environment_may_name_the_file(tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    file.write_text("lease_ms_max = 5\n")
    assert load({}, {"KVCACHE_CONFIG": str(file)}).lease_ms_max == 5


def test_numbers_in_the_environment_are_text() -> None:
    assert load({}, {"KVCACHE_LEASE_MS_MAX": "1234"}).lease_ms_max == 1234


def test_an_unknown_setting_says_what_was_meant(tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    file.write_text("capacty = '1GiB'\n")
    message = refusal({"config": str(file)}, {})
    assert "'capacty'" in message
    assert "did you mean 'capacity'?" in message
    assert str(file) in message
    assert "the environment" in refusal({}, {"KVCACHE_POLICI": "fifo"})


def test_variables_of_the_clients_are_not_settings() -> None:
    environment = {"KVCACHE_SOCKET": "/x", "KVCACHE_TOKEN": "t", "KVCACHE_NATIVE": "0"}
    assert load({}, environment) == NodeConfig()


@pytest.mark.parametrize(
    ("text", "size"),
    [("65536", 65536), ("4KiB", 4096), ("1.5 GiB", 3 << 29), ("2MB", 2_000_000), ("1tib", 1 << 40)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1XiB", "1 G", "0x10"])
def test_sizes_that_are_none(text: str) -> None:
    assert "write for instance" in refusal({"capacity": text}, {})


@pytest.mark.parametrize("text", ["8080", "host", ":80", "host:x", "host:70000", "[]:1"])
def test_binds_that_are_none(text: str) -> None:
    assert "HOST:PORT" in refusal({"tcp": text}, {})


def test_binds() -> None:
    assert parse_bind("127.0.0.1:80", "x") == ("127.0.0.1", 80)
    assert parse_bind("[::1]:80", "x") == ("::1", 80)
    assert parse_bind("none", "x") is None


@pytest.mark.parametrize(("host", "near"), [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True)])
def test_loopback(host: str, near: bool) -> None:
    assert is_loopback(host) is near


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.1", "::", "127.0.0.1.example.org", "128.0.0.1"])
def test_what_only_looks_like_loopback(host: str) -> None:
    assert not is_loopback(host)


@pytest.mark.parametrize(
    "flags",
    [
        {"lease_ms_max": 0},
        {"connections_max": -1},
        {"huge_pages": "maybe"},
        {"unit": "5000"},
        {"unit": "2GiB", "capacity": "1GiB"},
        {"capacity": "0"},
    ],
)
def test_values_out_of_range(flags: dict[str, str | int | bool]) -> None:
    refusal(flags, {})


@pytest.mark.parametrize("capacity", ["64KiB", "1MiB", "64MiB", "1GiB", "1TiB"])
def test_the_extent_is_a_power_of_two_that_fits(capacity: str) -> None:
    try:
        config = load({"capacity": capacity}, {})
    except BadInput:
        assert parse_size(capacity) < 256 << 10
        return
    assert config.unit_bytes & (config.unit_bytes - 1) == 0
    assert config.unit_bytes <= config.capacity_bytes


def test_a_size_is_exact_and_never_too_long_to_be_one() -> None:
    assert parse_size("9007199254740993") == 9007199254740993
    assert parse_size("9" * 400) == int("9" * 400)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            {"nvme_write": "throu"},
            ["nvme_write is 'throu', from the command line", "through, back or evict"],
        ),
        ({"nvme_write": "throu"}, ["did you mean 'through'?"]),
        ({"nvme_back_ms": "10s"}, ["nvme_back_ms is '10s'", "a whole number from 1 to 86,400,000"]),
        ({"nvme_writes_a_day": "inf"}, ["a number from 0 to 1,000"]),
        ({"nvme_writes_a_day": "nan"}, ["nvme_writes_a_day"]),
        ({"nvme": "/a:1GiB,"}, ["nvme is '/a:1GiB,'", "before or after a comma"]),
        ({"nvme": "/a:1GiB /b:1GiB"}, ["kept apart by commas"]),
        ({"nvme": "/a:1GiB;/b:1GiB"}, ["kept apart by commas"]),
        (
            {"peers": "tcp://a"},
            ["peers is 'tcp://a'", "a tcp address is a host and a port", "tcp://host:port"],
        ),
        ({"peers": "ucx://a:1"}, ["peers is 'ucx://a:1'", "it has no scheme known here"]),
        ({"peers": "unix://a"}, ["peers is 'unix://a'", "'a' is not absolute"]),
        ({"nvme": "/a"}, ["that is no PATH:SIZE", "/mnt/nvme0/kvcache:200GiB"]),
        ({"nvme": "/a:1GB2"}, ["the size in nvme is '1GB2'"]),
        ({"socket": "unix:///a"}, ["socket is 'unix:///a'", "/absolute/path.sock"]),
        ({"socket": "node.sock"}, ["socket is 'node.sock'", "no absolute path"]),
        ({"capacity": "1KiB"}, ["capacity is '1KiB'", "256 KiB at least"]),
    ],
)
def test_a_wrong_value_says_what_it_may_be(flags: dict[str, str | int | bool], said: list[str]) -> None:
    message = refusal(flags, {})
    assert all(each in message for each in said), message


def test_a_wrong_type_in_a_file_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    file.write_text('nvme = ["/a:1GiB"]\n')
    message = refusal({"config": str(file)}, {})
    assert f"from {file}" in message
    assert "text, in a file in quotes" in message


def test_a_home_is_found_without_a_shell_and_paths_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/srv/somebody")
    places = load({"nvme": "~/kv:1GiB, some/where:2GiB, /mnt/a:b:1GiB"}, {}).nvme_places
    assert places[0] == (Path("/srv/somebody/kv"), 1 << 30)
    assert places[1] == (Path.cwd() / "some/where", 2 << 30)
    assert places[2][0] == Path("/mnt/a:b")
