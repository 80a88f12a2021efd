"""What the connector counts, in vLLM's own metrics: ``vllm:kvcache_*`` on the engine's /metrics.

Counts travel as a flat map, ``name`` or ``name:reason`` to a number, from workers and scheduler to
the engine's front end, where each becomes a Prometheus counter with the label ``reason``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from kvcache.client.connectors.vllm_plan import METRICS, merged

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import PromMetric


@dataclass
class KVCacheStats(KVConnectorStats):
    """Counts of one interval. ``data`` is ``{"counts": {name: number}}``."""

    def reset(self) -> None:
        self.data.clear()

    def aggregate(self, other: KVConnectorStats) -> KVCacheStats:
        return KVCacheStats({"counts": merged(self._counts(), other.data.get("counts", {}))})

    def reduce(self) -> dict[str, int | float]:
        return dict(sorted(self._counts().items()))

    def is_empty(self) -> bool:
        return not self._counts()

    def _counts(self) -> dict[str, int]:
        counts: dict[str, int] = self.data.get("counts", {})
        return counts


class KVCachePromMetrics(KVConnectorPromMetrics):
    """One counter a name in ``METRICS``."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[type[PromMetric], Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {
            name: self._counter_cls(f"vllm:kvcache_{name}", text, labelnames=[*labelnames, "reason"])
            for name, text in METRICS.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for key, amount in transfer_stats_data.get("counts", {}).items():
            name, _, reason = key.partition(":")
            if counter := self._counters.get(name):
                counter.labels(*self.per_engine_labelvalues[engine_idx], reason).inc(amount)
