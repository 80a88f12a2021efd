"""These tests need torch, so they run in an environment of their own (``make test-device``), on CPU tensors
and, where there is one, on a GPU. Without a GPU the Triton kernels run in Triton's interpreter."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest

if find_spec("torch") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    import torch

    torch.set_num_threads(1)  # Tensors are small here, and threads that wait for work spin.
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # Read when kvcache.device.kernels is imported.

    def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
        """What is only of a GPU is no test of a machine that has none."""
        alien = [item for item in items if item.get_closest_marker("cuda")]
        if alien and not torch.cuda.is_available():
            config.hook.pytest_deselected(items=alien)
            items[:] = [item for item in items if item not in alien]
