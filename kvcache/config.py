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
from typing import Annotated

import msgspec

from kvcache.errors import BadInput

ENVIRONMENT_PREFIX = "KVCACHE_"
# Read elsewhere: where clients look for the node, and which copy loop is used.
ENVIRONMENT_ELSEWHERE = frozenset({"KVCACHE_SOCKET", "KVCACHE_NATIVE", "KVCACHE_TOKEN", "KVCACHE_CONFIG"})

_SIZES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZES |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}

Milliseconds = Annotated[int, msgspec.Meta(ge=1, le=86_400_000)]
Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]


class NodeConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All ``kvcache serve`` can be told. Sizes: ``4GiB``. Addresses: ``HOST:PORT`` or ``none``."""

    socket: str = ""
    tcp: str = "none"
    http: str = "127.0.0.1:8210"
    name: str = ""
    capacity: str = "1GiB"
    unit: str = "auto"
    huge_pages: str = "auto"
    populate: bool = True
    policy: str = "leaf-lru"
    credentials: str = ""
    lease_ms_max: Milliseconds = 60_000
    quarantine_ms: Milliseconds = 600_000
    handshake_ms: Milliseconds = 5_000
    connections_max: Count = 1_024
    namespaces_max: Count = 4_096

    @property
    def capacity_bytes(self) -> int:
        return parse_size(self.capacity, "capacity")

    @property
    def unit_bytes(self) -> int:
        """Bytes an extent: a 32nd of the capacity, a power of two between 256 KiB and 256 MiB."""
        if self.unit != "auto":
            return parse_size(self.unit, "unit")
        wanted = max(1, self.capacity_bytes // 32)
        return min(max(1 << (wanted.bit_length() - 1), 256 << 10), 256 << 20)


def load(flags: Mapping[str, str | int | bool], environment: Mapping[str, str]) -> NodeConfig:
    """The settings in force. ``flags`` holds only what was given; ``config`` among them names the file.

    RAISES BadInput (bad_config) that names the setting, where it was set, and what it may be.
    """
    given = dict(flags)
    path = str(given.pop("config", "") or environment.get("KVCACHE_CONFIG", ""))
    merged: dict[str, object] = {}
    for origin, values in (
        (path, _from_file(path) if path else {}),
        ("the environment", _from_environment(environment)),
        ("the command line", given),
    ):
        _check_names(values, origin)
        merged.update(values)
    try:
        config = msgspec.convert(merged, NodeConfig, strict=False)
    except msgspec.ValidationError as error:
        raise BadInput("bad_config", "a setting cannot be used", str(error)) from error
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


def _check(config: NodeConfig) -> None:
    parse_bind(config.tcp, "tcp")
    parse_bind(config.http, "http")
    if config.huge_pages not in ("auto", "on", "off"):
        raise BadInput("bad_config", f"huge_pages is {config.huge_pages!r}", "it is auto, on or off")
    if config.capacity_bytes < 1 or config.unit_bytes < 1:
        raise BadInput("bad_config", f"capacity is {config.capacity!r}", "the tier must hold something")
    if config.unit_bytes % 4096 or config.unit_bytes > config.capacity_bytes:
        raise BadInput(
            "bad_config",
            f"unit is {config.unit_bytes} bytes",
            "extents are whole 4 KiB pages and fit in the capacity",
            "leave unit at auto, or give a power of two",
        )


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
            str(error),
            "check the path and the TOML",
        ) from error
