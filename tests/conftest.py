"""What every test stands on: hypothesis runs the same examples each time, and says how to repeat one.

``KVCACHE_FAULT_FACTOR`` (``make torture``) multiplies the examples and draws new ones each time.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

EXAMPLES = 100
GARDEN_S = 300
ENGINE_S = 900

_factor = int(os.environ.get("KVCACHE_FAULT_FACTOR", "0"))

settings.register_profile(
    "house",
    database=None,
    deadline=None,
    derandomize=_factor == 0,
    max_examples=EXAMPLES * max(_factor, 1),
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("house")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Who waits for the runs of planted bugs waits for several at once, and who starts real engines for what
    these import: a quarter of a minute each, and several times that on a slow machine."""
    for item in items:
        if item.get_closest_marker("engine") is not None:
            item.add_marker(pytest.mark.timeout(ENGINE_S))
        if isinstance(item, pytest.Function) and "garden" in item.fixturenames:
            item.add_marker(pytest.mark.timeout(GARDEN_S))
