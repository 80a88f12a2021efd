"""Engine processes that the tests start: their modules stand in the tree, not in the package."""

from __future__ import annotations

from pathlib import Path

from kvcache.testing.engines import EngineProcess

__all__ = ["ROOT", "EngineProcess", "start_engine"]
ROOT = Path(__file__).parents[2]


def start_engine(module: str, arguments: list[str], log: Path) -> EngineProcess:
    """It is ready. RAISES Unavailable with the end of its log."""
    return EngineProcess(module, arguments, log, ROOT).wait_ready()
