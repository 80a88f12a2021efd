"""What the tests of two hosts share. Who cannot have them here fails: that a fault does no harm is shown by
the fault, or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from kvcache.testing.netns import TwoHosts


@pytest.fixture(scope="session")
def factor() -> int:
    """By how much ``make torture`` multiplies the rounds."""
    return max(1, int(os.environ.get("KVCACHE_FAULT_FACTOR", "1")))


@pytest.fixture(scope="session")
def both() -> Iterator[TwoHosts]:
    with TwoHosts() as both:
        yield both


@pytest.fixture
def hosts(both: TwoHosts) -> Iterator[TwoHosts]:
    """Two hosts and a sound wire."""
    both.heal()
    yield both
    both.heal()
