"""What the router says of settings that cannot be used."""

from __future__ import annotations

import resource
from dataclasses import replace
from pathlib import Path

import pytest

from kvcache.errors import BadInput
from kvcache.server import route_cli
from kvcache.server.http_route_serve import Settings, check, descriptors, served
from tests.server.http_double import in_loop


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    fleet = tmp_path / "fleet.toml"
    fleet.write_text('[[worker]]\nname = "a"\nurl = "http://10.0.0.2:8000"\n')
    return Settings(
        fleet=str(fleet),
        bind="127.0.0.1:0",
        weights="",
        index="none",
        index_size="1GiB",
        index_ms=20,
        credentials="",
        worker_token_file="",
        tokenize_ms=0,
        requests_max=1,
        attempts=1,
        connect_ms=1,
        first_byte_ms=1,
        idle_ms=1,
        request_ms=1,
        seed=0,
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokenize_ms", -1),
        ("index_ms", 0),
        ("index_ms", 10**20),
        ("request_ms", 10**20),
        ("requests_max", 0),
        ("attempts", -3),
    ],
)
def test_a_number_out_of_its_range_is_named(settings: Settings, name: str, value: int) -> None:
    check(settings)
    with pytest.raises(BadInput, match=f"{name} is {value}"):
        check(replace(settings, **{name: value}))  # type: ignore[arg-type]  # A number, as it was.


@in_loop
async def test_an_index_without_room_is_refused(settings: Settings) -> None:
    with pytest.raises(BadInput, match="index_size is '0'"):
        async with served(replace(settings, index="embedded", index_size="0")):
            pass


def test_what_others_can_reach_needs_tokens(settings: Settings) -> None:
    with pytest.raises(BadInput, match="unsafe_bind"):
        check(replace(settings, bind="0.0.0.0:1"))


def test_as_many_descriptors_are_allowed_as_all_requests_take(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[tuple[int, int]] = [(1_024, 1 << 20)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, wanted: limits.append(wanted))
    route_cli._allow(descriptors(1_024))
    assert limits[1:] == [(7_168, 1 << 20)]
    route_cli._allow(descriptors(16))  # What is there already is left.
    limits.append((512, 4_096))
    route_cli._allow(descriptors(1_024))
    assert limits[-1] == (4_096, 4_096) and len(limits) == 4
