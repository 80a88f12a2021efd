"""What every test stands on: hypothesis runs the same examples each time, and says how to repeat one.

``KVCACHE_FAULT_FACTOR`` (``make torture``) multiplies the examples and draws new ones each time.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

EXAMPLES = 100

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
