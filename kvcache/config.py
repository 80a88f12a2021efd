"""A node's settings: one schema, four places: flag, else environment, else file, else default.

The file is TOML with the names of ``NodeConfig``; the environment has them in capitals behind
``KVCACHE_`` (``KVCACHE_CAPACITY=4GiB``). An unknown name is an error that says what was probably meant.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import msgspec

from kvcache.address import UNIX_PATH_BYTES_MAX, parse
from kvcache.errors import BadInput, plainly

ENVIRONMENT_PREFIX = "KVCACHE_"
# Read elsewhere: where clients look for the node, which copy loop is used, how long the tests try.
ENVIRONMENT_ELSEWHERE = frozenset(
    {"KVCACHE_SOCKET", "KVCACHE_NATIVE", "KVCACHE_TOKEN", "KVCACHE_CONFIG", "KVCACHE_FAULT_FACTOR"}
)

INDEX_BYTES_MIN = 1 << 20

_SIZES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZES |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}

Milliseconds = Annotated[int, msgspec.Meta(ge=1, le=86_400_000)]
Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]


class NodeConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All ``kvcache serve`` can be told. Sizes: ``4GiB``. Addresses: ``HOST:PORT`` or ``none``."""

    socket: str = ""
    tcp: str = "none"
    http: str = "127.0.0.1:8210"
    index_listen: str = "auto"
    index_bytes: str = "256MiB"
    name: str = ""
    capacity: str = "1GiB"
    unit: str = "auto"
    huge_pages: str = "auto"
    populate: bool = True
    policy: str = "leaf-lru"
    policy_params: str = ""
    hbm: str = "none"
    hbm_device: Literal["cuda", "cpu"] = "cuda"
    hbm_policy: str = "leaf-lru"
    hbm_demote_rate: str = "0"
    credentials: str = ""
    lease_ms_max: Milliseconds = 60_000
    quarantine_ms: Milliseconds = 600_000
    handshake_ms: Milliseconds = 5_000
    connections_max: Count = 1_024
    namespaces_max: Count = 4_096
    data: str = "auto"
    peers: str = "none"
    peer_token_file: str = ""
    peer_keep: Literal["keep", "pass"] = "keep"
    peer_wait_ms: Milliseconds = 2_000
    replicate_rate: str = "0"
    replicate_hits: Count = 8
    trust_network: bool = False
    nvme: str = "none"
    nvme_segment: str = "auto"
    nvme_write: Literal["through", "back", "evict"] = "through"
    nvme_back_ms: Milliseconds = 10_000
    nvme_admission: Literal["all", "second-touch", "touched>=2", "branch-reused", "hazard"] = "all"
    nvme_write_rate: str = "0"
    nvme_writes_a_day: Annotated[float, msgspec.Meta(ge=0, le=1_000)] = 0.0
    nvme_late_ms: Milliseconds = 2_000
    nvme_direct: Literal["auto", "on", "off"] = "auto"
    nvme_scrub_share: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.05
    shadow: str = "none"
    shadow_sizes: str = "50%,100%,200%"
    shadow_sample: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.03
    shadow_cpu: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.015
    record: str = "none"
    record_bytes: str = "256MiB"
    record_sample: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0

    @property
    def capacity_bytes(self) -> int:
        return parse_size(self.capacity, "capacity")

    @property
    def unit_bytes(self) -> int:
        """Bytes an extent: a 32nd of the capacity, a power of two between 256 KiB and 256 MiB."""
        return _unit_of(self.capacity_bytes) if self.unit == "auto" else parse_size(self.unit, "unit")

    @property
    def hbm_bytes(self) -> int:
        """Of each GPU; 0: none."""
        return 0 if self.hbm == "none" else parse_size(self.hbm, "hbm")

    @property
    def hbm_unit_bytes(self) -> int:
        return _unit_of(self.hbm_bytes)

    @property
    def data_addresses(self) -> list[str]:
        """Where transports listen. ``auto``: beside ``tcp``, on a port that is free; nowhere without it."""
        if self.data == "auto":
            bind = parse_bind(self.tcp, "tcp")
            host = f"[{bind[0]}]" if bind is not None and ":" in bind[0] else (bind or ("",))[0]
            return [f"tcp://{host}:0"] if bind is not None else []
        return [] if self.data == "none" else _parse_addresses(self.data, "data")

    @property
    def peer_addresses(self) -> list[str]:
        """The control addresses of the peers. RAISES BadInput for what is none."""
        found = [] if self.peers == "none" else _parse_addresses(self.peers, "peers")
        for address in found:
            try:
                parse(address)
            except BadInput as error:
                why = f"{error.what}: {error.why}".removesuffix(": ")
                raise BadInput(error.code, f"peers is {self.peers!r}", why, error.todo) from error
        return found

    @property
    def index_addresses(self) -> list[str]:
        """Where raw look-ups are answered. ``auto``: a unix socket beside the node's, if the name fits."""
        if self.index_listen != "auto":
            return [] if self.index_listen == "none" else _parse_addresses(self.index_listen, "index_listen")
        beside = f"{self.socket.removesuffix('.sock')}.index.sock"
        return [f"unix://{beside}"] if self.socket and len(beside) <= UNIX_PATH_BYTES_MAX else []

    @property
    def index_bytes_max(self) -> int:
        return parse_size(self.index_bytes, "index_bytes")

    @property
    def replicate_bytes_s(self) -> int:
        return parse_size(self.replicate_rate, "replicate_rate")

    @property
    def hbm_demote_bytes_s(self) -> int:
        return parse_size(self.hbm_demote_rate, "hbm_demote_rate")

    @property
    def nvme_write_bytes_s(self) -> int:
        return parse_size(self.nvme_write_rate, "nvme_write_rate")

    @property
    def nvme_places(self) -> list[tuple[Path, int]]:
        """Directory and bytes of each device. RAISES BadInput for what is no ``PATH:SIZE``."""
        if self.nvme == "none":
            return []
        return [_parse_place(text, self.nvme) for text in self.nvme.split(",")]

    @property
    def nvme_segment_bytes(self) -> int:
        """Bytes a segment file: a 32nd of the smallest device, a power of two between 16 and 512 MiB."""
        if self.nvme_segment != "auto":
            return parse_size(self.nvme_segment, "nvme_segment")
        smallest = min(size for _, size in self.nvme_places)
        return min(max(1 << (max(1, smallest // 32).bit_length() - 1), 16 << 20), 512 << 20)


def load(flags: Mapping[str, str | int | bool], environment: Mapping[str, str]) -> NodeConfig:
    """The settings in force. ``flags`` holds only what was given; ``config`` among them names the file.

    RAISES BadInput (bad_config) that names the setting, where it was set, and what it may be.
    """
    given = dict(flags)
    path = str(given.pop("config", "") or environment.get("KVCACHE_CONFIG", ""))
    merged: dict[str, object] = {}
    origins: dict[str, str] = {}
    for origin, values in (
        (path, _from_file(path) if path else {}),
        ("the environment", _from_environment(environment)),
        ("the command line", given),
    ):
        _check_names(values, origin)
        merged.update(values)
        origins.update(dict.fromkeys(values, origin))
    try:
        config = msgspec.convert(merged, NodeConfig, strict=False)
    except msgspec.ValidationError as error:
        raise _unusable(str(error), merged, origins) from error
    _check(config)
    return config


def parse_size(text: str, name: str = "size") -> int:
    """Bytes of ``4GiB``, ``512 MiB``, ``1.5TB``, ``65536``. RAISES BadInput."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    factor = _SIZES.get(match[2].upper()) if match else None
    if match is None or factor is None:
        raise BadInput(
            "bad_config", f"{name} is {text!r}", "that is no size", "write for instance 4GiB, 512MiB or 65536"
        )
    return int(Fraction(match[1]) * factor)


def parse_bind(text: str, name: str) -> tuple[str, int] | None:
    """Host and port of ``HOST:PORT`` or ``[V6]:PORT``, None for ``none``. RAISES BadInput."""
    if text == "none":
        return None
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdecimal() or not 0 <= int(port) <= 65_535 or not host.strip("[]"):
        raise BadInput(
            "bad_config",
            f"{name} is {text!r}",
            "that is no HOST:PORT",
            "write for instance 127.0.0.1:8210 or none",
        )
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or re.fullmatch(r"127(\.\d{1,3}){3}", host) is not None


def _unit_of(capacity_bytes: int) -> int:
    wanted = max(1, capacity_bytes // 32)
    return min(max(1 << (wanted.bit_length() - 1), 256 << 10), 256 << 20)


def _check(config: NodeConfig) -> None:
    parse_bind(config.tcp, "tcp")
    parse_bind(config.http, "http")
    if config.huge_pages not in ("auto", "on", "off"):
        raise BadInput("bad_config", f"huge_pages is {config.huge_pages!r}", "it is auto, on or off")
    if config.capacity_bytes < 1 or config.unit_bytes < 1:
        raise BadInput("bad_config", f"capacity is {config.capacity!r}", "the tier must hold something")
    if config.socket and not config.socket.startswith("/"):
        todo = "write /absolute/path.sock"
        raise BadInput("bad_config", f"socket is {config.socket!r}", "that is no absolute path", todo)
    if config.nvme_places:
        _check_nvme(config)
    if config.hbm != "none" and config.hbm_bytes < config.hbm_unit_bytes:
        raise BadInput(
            "bad_config",
            f"hbm is {config.hbm!r}",
            f"the tier takes {config.hbm_unit_bytes:,} bytes of a GPU at least",
            "give it more, for instance 20GiB, or none",
        )
    _ = config.data_addresses, config.peer_addresses, config.replicate_bytes_s, config.nvme_write_bytes_s
    _ = config.hbm_demote_bytes_s
    _ = parse_size(config.record_bytes, "record_bytes")
    for address in config.index_addresses:
        parse(address)
    if config.index_bytes_max < INDEX_BYTES_MIN:
        raise BadInput(
            "bad_config", f"index_bytes is {config.index_bytes!r}", "an index takes 1 MiB at least"
        )
    if config.unit == "auto" and config.unit_bytes > config.capacity_bytes:
        why = f"an extent takes {config.unit_bytes >> 10} KiB at least"
        raise BadInput("bad_config", f"capacity is {config.capacity!r}", why, "give more, or a smaller unit")
    if config.unit_bytes % 4096 or config.unit_bytes > config.capacity_bytes:
        raise BadInput(
            "bad_config",
            f"unit is {config.unit_bytes} bytes",
            "extents are whole 4 KiB pages and fit in the capacity",
            "leave unit at auto, or give a power of two",
        )


def _check_nvme(config: NodeConfig) -> None:
    places, segment = config.nvme_places, config.nvme_segment_bytes
    if segment < 8192 or segment % 4096:
        raise BadInput(
            "bad_config",
            f"nvme_segment is {segment} bytes",
            "it is a multiple of 4 KiB, at least 8 KiB",
            "leave it at auto, or give for instance 512MiB",
        )
    for path, size in places:
        if size < segment:
            raise BadInput(
                "bad_config",
                f"{size:,} bytes in {path}",
                f"a device holds at least one segment, which has {segment:,} bytes",
                "give it more, or a smaller nvme_segment",
            )
    if len({path.resolve() for path, _ in places}) < len(places):
        raise BadInput("bad_config", f"nvme is {config.nvme!r}", "a directory is named twice", "one a device")


def _parse_addresses(text: str, name: str) -> list[str]:
    found = [part.strip() for part in text.split(",")]
    for part in found:
        if not re.fullmatch(r"[a-z][a-z0-9+.-]*://\S+", part):
            raise BadInput(
                "bad_config",
                f"{name} is {text!r}",
                f"{part!r} is no address" if part else "something is missing before or after a comma",
                "write for instance tcp://10.0.0.2:8211, several with commas between them, or none",
            )
    if len(set(found)) < len(found):
        raise BadInput("bad_config", f"{name} is {text!r}", "an address is named twice", "name it once")
    return found


def _parse_place(text: str, whole: str) -> tuple[Path, int]:
    path, colon, size = text.strip().rpartition(":")
    why = "" if colon and path else "that is no PATH:SIZE"
    if not text.strip():
        why = "something is missing before or after a comma"
    elif re.search(r":[\d.]+\s*[A-Za-z]*\s*[;\s]", path):
        why = "several are kept apart by commas"
    if why:
        raise BadInput(
            "bad_config",
            f"nvme is {whole!r}",
            why,
            "write for instance /mnt/nvme0/kvcache:200GiB, several with commas between them, or none",
        )
    # A file and the environment have no shell that would do this.
    place = Path(path).expanduser() if path.startswith("~/") else Path(path)
    return place.absolute(), parse_size(size, "the size in nvme")


def _unusable(said: str, values: Mapping[str, object], origins: Mapping[str, str]) -> BadInput:
    """In our words, what the schema refused. ``said`` is what the library made of it."""
    named = re.search(r"`\$\.(\w+)", said)
    if named is None:
        return BadInput("bad_config", "a setting cannot be used", said, "kvcache serve --help lists them")
    name = named[1]
    wanted = get_type_hints(NodeConfig, include_extras=True)[name]
    choices = [str(each) for each in get_args(wanted)] if get_origin(wanted) is Literal else []
    near = difflib.get_close_matches(str(values[name]), choices, 1)
    return BadInput(
        "bad_config",
        f"{name} is {values[name]!r}, from {origins[name]}",
        f"it is {_described(wanted, choices)}",
        f"did you mean {near[0]!r}?" if near else "",
    )


def _described(wanted: object, choices: list[str]) -> str:
    if choices:
        return " or ".join([", ".join(choices[:-1]), choices[-1]])
    if get_origin(wanted) is Annotated:
        kind, limits = get_args(wanted)
        number = "a whole number" if kind is int else "a number"
        low = f"from {limits.ge:,}" if limits.ge is not None else f"over {limits.gt:,}, up"
        return f"{number} {low} to {limits.le:,}"
    return "true or false" if wanted is bool else "text, in a file in quotes"


def _check_names(values: Mapping[str, object], origin: str) -> None:
    known = NodeConfig.__struct_fields__
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise BadInput(
                "bad_config",
                f"unknown setting {name!r} in {origin}",
                f"the settings are {', '.join(known)}",
                f"did you mean {near[0]!r}?" if near else "remove it",
            )


def _from_environment(environment: Mapping[str, str]) -> dict[str, object]:
    return {
        key.removeprefix(ENVIRONMENT_PREFIX).lower(): value
        for key, value in environment.items()
        if key.startswith(ENVIRONMENT_PREFIX) and key not in ENVIRONMENT_ELSEWHERE
    }


def _from_file(path: str) -> dict[str, object]:
    try:
        return tomllib.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadInput(
            "bad_config",
            f"the settings file {path} cannot be read",
            plainly(error),
            "check the path and the TOML",
        ) from error
