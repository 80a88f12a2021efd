"""Schemes and what they open; what others offer, and what is wrong with it."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint, EntryPoints

import pytest

from kvcache.errors import BadInput
from kvcache.testing.clock import FakeClock
from kvcache.transport import table
from kvcache.transport.base import Limits
from kvcache.transport.inproc import Hub, InprocTransport
from kvcache.transport.tcp import TcpTransport


def make_other(limits: Limits, clock: FakeClock) -> InprocTransport:
    """What another package might offer."""
    return InprocTransport(Hub(), limits, clock)


NO_CLASS = "text"


def offer(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    entries = EntryPoints([EntryPoint(name, value, table.GROUP)])

    def entry_points(**wanted: str) -> EntryPoints:
        return entries.select(**wanted)

    monkeypatch.setattr(table, "entry_points", entry_points)


def test_ours_by_scheme() -> None:
    assert isinstance(table.open_transport("tcp"), TcpTransport)
    assert "tcp" in table.schemes()
    assert table.scheme_of("tcp://127.0.0.1:0") == "tcp"


def test_others_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, "other", f"{__name__}:make_other")
    monkeypatch.setitem(
        sys.modules, __name__, sys.modules.get(__name__) or sys.modules[make_other.__module__]
    )
    limits, clock = Limits(1, 2), FakeClock()
    found = table.open_transport("other", limits, clock)
    assert isinstance(found, InprocTransport)
    assert (found.limits, found.clock) == (limits, clock)
    assert table.schemes()[-1] == "other"


def test_a_name_of_ours_cannot_be_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, "tcp", "nowhere:nothing")
    assert isinstance(table.open_transport("tcp"), TcpTransport)
    assert table.schemes().count("tcp") == 1


@pytest.mark.parametrize("value", ["no_such_module:x", "kvcache.clock:nothing", "kvcache.clock:NS_PER_MS"])
def test_what_cannot_be_loaded_is_said_in_words(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    offer(monkeypatch, "other", value)
    with pytest.raises(BadInput, match="'other'"):
        table.open_transport("other")


def test_what_nobody_offers(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match=r"there are .*tcp"):
        table.open_transport("carrier-pigeon")
    for wrong in ("", "tcp", "://x"):
        with pytest.raises(BadInput):
            table.scheme_of(wrong)


@pytest.mark.slow
def test_nothing_is_imported_before_it_is_asked_for() -> None:
    code = "import sys, kvcache.transport.table as t; print([m for m in sys.modules if m in t.PLACES])"
    code = code.replace("t.PLACES", "{place.partition(':')[0] for place in t.OURS.values()}")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
