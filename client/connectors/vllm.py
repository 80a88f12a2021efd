"""``KVCacheConnector``: vLLM's KV connector interface (``KVConnectorBase_V1``), translated.

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "KVCacheConnector", "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute"}'

vLLM makes one object with role SCHEDULER in its core and one with role WORKER in each worker; each
method here belongs to one of the two and hands on to ``vllm_scheduler`` or ``vllm_worker``. Loads are
asynchronous, blocks are copied whole, prefix hashes are kvcache's own.

Fail open: every entry point that vLLM calls while serving catches, counts and degrades; only the
construction raises, with one line, for a configuration that could not be served correctly.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from kvcache.client import connect_blocking, connect_device_blocking, connect_planning_blocking
from kvcache.client.connectors.attach import Attachment
from kvcache.client.connectors.vllm_moves import Moves
from kvcache.client.connectors.vllm_namespace import adapter_digest, check_backends, describe, refuse
from kvcache.client.connectors.vllm_pages import CpuPages, DevicePages, device_for
from kvcache.client.connectors.vllm_plan import StepPlan, Tally, merged
from kvcache.client.connectors.vllm_scheduler import SchedulerSide
from kvcache.client.connectors.vllm_settings import Settings
from kvcache.client.connectors.vllm_stats import KVCachePromMetrics, KVCacheStats
from kvcache.client.connectors.vllm_worker import WorkerSide
from kvcache.clock import SystemClock

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats, PromMetric
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from kvcache.client.store import BlockingStore
    from kvcache.device.engine import EngineDevice

_log = logging.getLogger("vllm.kvcache")
_Answer = TypeVar("_Answer")


@dataclass
class KVCacheMetadata(KVConnectorMetadata):
    """Scheduler to workers, each step."""

    plan: StepPlan = field(default_factory=StepPlan)


@dataclass
class KVCacheWorkerMetadata(KVConnectorWorkerMetadata):
    """Workers to scheduler: how many saves of which request have ended, over all ranks, and the number of
    the step that ends with this, if it is timed. ``lacks_hbm``: one of them cannot load what only HBM has."""

    saved: dict[str, int]
    timed: int = 0
    lacks_hbm: bool = False

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVCacheWorkerMetadata:
        assert isinstance(other, KVCacheWorkerMetadata)
        lacks_hbm = self.lacks_hbm or other.lacks_hbm
        return KVCacheWorkerMetadata(merged(self.saved, other.saved), max(self.timed, other.timed), lacks_hbm)


@dataclass
class KVCacheHandshake(KVConnectorHandshakeMetadata):
    """Worker to scheduler, once: the GPU on which it loads what is in HBM (its UUID; empty: the CPU)."""

    gpu: bytes


def is_on_cuda(vllm_config: VllmConfig) -> bool:
    """Else its KV is in host memory."""
    return bool(vllm_config.device_config.device_type == "cuda")


class KVCacheConnector(KVConnectorBase_V1):
    """See the module. Making one RAISES BadInput: ``unsupported_engine``, ``bad_config``."""

    _cache_hit_source = CacheHitSource.HOST

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self._settings = Settings.from_extra_config(self._kv_transfer_config.kv_connector_extra_config)
        refuse(vllm_config, kv_cache_config, self._settings)
        self._on_cuda = is_on_cuda(vllm_config)
        self._tally = Tally()
        self._clock = SystemClock()
        self._layers = list(kv_cache_config.kv_cache_groups[0].layer_names)
        self._computed_layers: set[str] = set()
        self._leading_layers = 0
        self._streams = False  # Of the step that is computed now, saves go layer by layer.
        self._bad_blocks: set[int] = set()
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._gpu: EngineDevice | None = None  # The worker's.
        self._plans_for: bytes | None = None  # The GPU of all workers, as the scheduler was told.
        if role is KVConnectorRole.SCHEDULER:
            ranks = range(vllm_config.parallel_config.tensor_parallel_size)
            self._scheduler = self._scheduler_side(vllm_config, ranks)
            self._say_how()

    @property
    def requires_kv_delivery(self) -> bool:
        """A save that does not happen is only a later miss."""
        return False

    # --- scheduler --------------------------------------------------------------------------------

    def set_xfer_handshake_metadata(self, metadata: dict[int, KVConnectorHandshakeMetadata]) -> None:
        gpus = {said.gpu for said in metadata.values() if isinstance(said, KVCacheHandshake)}
        if len(gpus) == 1:
            (self._plans_for,) = gpus
            self._scheduling.use_hbm(True)
        elif gpus:
            _log.warning("kvcache: HBM is not used: the ranks are on %d GPUs, one is served", len(gpus))

    def on_new_request(self, request: Request) -> None:
        self._guard("on_new_request", None, lambda: self._scheduling.known(request))

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        nothing: tuple[int | None, bool] = (0, False)
        return self._guard("lookup", nothing, lambda: self._scheduling.lookup(request, num_computed_tokens))

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        block_ids = blocks.get_block_ids()[0]
        if num_external_tokens:  # Asks nobody, so it cannot fail: a load that is not planned never ends.
            self._scheduling.allocated(request, block_ids, num_external_tokens)
            return
        self._guard("allocated", None, lambda: self._scheduling.allocated(request, block_ids, 0))

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVCacheMetadata:
        tables = scheduler_output.kv_connector_block_state

        def pages_of(request_id: str) -> Sequence[int]:
            found = tables.get_block_ids(request_id) if tables is not None else None
            return found[0] if found else ()

        preempted = scheduler_output.preempted_req_ids or ()
        return KVCacheMetadata(
            self._scheduling.plan(scheduler_output.num_scheduled_tokens, pages_of, preempted)
        )

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        meta = connector_output.kv_connector_worker_meta
        saved, timed = (meta.saved, meta.timed) if isinstance(meta, KVCacheWorkerMetadata) else ({}, 0)
        if isinstance(meta, KVCacheWorkerMetadata):
            self._scheduling.use_hbm(self._plans_for is not None and not meta.lacks_hbm)
        received = connector_output.finished_recving or ()
        bad_blocks = connector_output.invalid_block_ids or ()
        self._guard("absorb", None, lambda: self._scheduling.absorb(received, bad_blocks, saved, timed))

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        params = self._guard("answer", None, lambda: self._scheduling.answer(request.request_id))
        return self._guard("ended", False, lambda: self._scheduling.ended(request.request_id)), params

    def reset_cache(self) -> bool:
        """Part of ``reset_prefix_cache(reset_connector=True)``; what else to call when weights change."""
        return self._guard("reset", False, self._reset)

    # --- worker -----------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        rank = get_tensor_model_parallel_rank()
        attachment = self._attachment(self._vllm_config, [rank])
        pages = None if self._on_cuda else CpuPages(kv_caches, self._layers, attachment.spec)
        device = None
        if self._on_cuda:
            modules = self._vllm_config.compilation_config.static_forward_context
            check_backends(modules[name].attn_backend.get_name() for name in self._layers)
        if self._on_cuda or self._settings.hbm:
            self._gpu = device_for(kv_caches[self._layers[0]].device)
            device = DevicePages(self._gpu, kv_caches, self._layers, attachment.spec)
        self._worker = WorkerSide(attachment, Moves(attachment, pages, device), self._clock, self._tally)

    def get_handshake_metadata(self) -> KVCacheHandshake | None:
        if self._gpu is None:
            return None
        self._working.connect()
        return KVCacheHandshake(self._gpu.gpu)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        self._computed_layers.clear()
        self._leading_layers = 0
        self._streams = self._working.start_stream(self._plan)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        assert isinstance(kv_connector_metadata, KVCacheMetadata)
        self._working.release_pages(kv_connector_metadata.plan.preempted)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        self._working.start_loads(self._plan)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads end between steps; nothing to wait for."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: AttentionMetadata, **kwargs: Any
    ) -> None:
        self._computed_layers.add(layer_name)
        if self._streams:
            self._say_ready()

    def wait_for_save(self) -> None:
        # vLLM calls this also when the forward pass raised: pages are whole only if every layer ended. Graphs
        # on CUDA tell nothing of layers; but this is called then while the error is on its way.
        if self._on_cuda:
            computed = sys.exc_info()[0] is None
        else:
            computed = self._computed_layers.issuperset(self._layers)
        self._working.start_saves(self._plan, computed)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        received, bad = self._working.take_received()
        self._bad_blocks |= bad
        return self._working.take_freed(), received

    def get_block_ids_with_load_errors(self) -> set[int]:
        bad, self._bad_blocks = self._bad_blocks, set()
        return bad

    def build_connector_worker_meta(self) -> KVCacheWorkerMetadata | None:
        saved, timed, lacks_hbm = self._working.take_saved(), self._plan.timed, self._working.lacks_hbm
        return KVCacheWorkerMetadata(saved, timed, lacks_hbm) if saved or timed or lacks_hbm else None

    # --- both -------------------------------------------------------------------------------------

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        counts = self._tally.take()
        return KVCacheStats({"counts": counts}) if counts else None

    def shutdown(self) -> None:
        """May be called twice."""
        scheduler, self._scheduler = self._scheduler, None
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()
        if scheduler is not None:
            scheduler.close()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        return KVCacheStats(data if data is not None else {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[type[PromMetric], Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVCachePromMetrics:
        return KVCachePromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # --- helpers ----------------------------------------------------------------------------------

    @property
    def _scheduling(self) -> SchedulerSide:
        assert self._scheduler is not None
        return self._scheduler

    @property
    def _working(self) -> WorkerSide:
        assert self._worker is not None
        return self._worker

    @property
    def _plan(self) -> StepPlan:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, KVCacheMetadata)
        return metadata.plan

    def _say_ready(self) -> None:
        count = self._leading_layers
        while count < len(self._layers) and self._layers[count] in self._computed_layers:
            count += 1
        if count > self._leading_layers:
            self._leading_layers = count
            self._working.layers_ready(count)

    def _reset(self) -> bool:
        self._scheduling.reset()
        return True

    def _guard(self, entry: str, otherwise: _Answer, call: Callable[[], _Answer]) -> _Answer:
        try:
            return call()
        except Exception:
            _log.exception("kvcache: %s failed; the engine computes", entry)
            self._tally.add("errors", reason=entry)
            return otherwise

    def _attachment(self, vllm_config: VllmConfig, ranks: Sequence[int]) -> Attachment:
        spec = self._kv_cache_config.kv_cache_groups[0].kv_cache_spec
        cache = vllm_config.cache_config
        isa = ""
        if not self._on_cuda:
            from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

            isa = _get_attn_isa(
                vllm_config.model_config.dtype, spec.block_size, spec.head_size, cache.cache_dtype
            )
        namespaces, shape = describe(
            vllm_config, self._kv_cache_config, vllm.__version__, isa, ranks, self._settings
        )
        return Attachment(self._connected, namespaces, shape, self._clock, _log)

    def _connected(self) -> BlockingStore:
        """When it is first needed: by then both sides know of one another's GPU."""
        settings = self._settings
        waits = self._role is KVConnectorRole.SCHEDULER
        place = (settings.address or None, settings.token or None)
        timeout_ms = settings.lookup_timeout_ms if waits else settings.move_timeout_ms
        name = f"vllm {self._role.name.lower()}"
        if self._gpu is not None:
            return connect_device_blocking(self._gpu, *place, timeout_ms=timeout_ms, name=name)
        if self._plans_for is not None:
            return connect_planning_blocking(self._plans_for, *place, timeout_ms=timeout_ms, name=name)
        return connect_blocking(*place, timeout_ms=timeout_ms, mapped=not waits, name=name)

    def _scheduler_side(self, vllm_config: VllmConfig, ranks: Sequence[int]) -> SchedulerSide:
        attachment = self._attachment(vllm_config, ranks)
        return SchedulerSide(
            attachment,
            engine=str(self._kv_transfer_config.engine_id),
            block_tokens=attachment.spec.block_tokens,
            loads=self._kv_transfer_config.is_kv_consumer,
            saves=self._kv_transfer_config.is_kv_producer,
            save_generated=self._settings.save_generated and vllm_config.speculative_config is None,
            load_wait_ms=self._settings.load_wait_ms,
            promise_wait_ms=self._settings.promise_wait_ms,
            streams=self._settings.layer_streaming,
            adapter_digest=adapter_digest,
            clock=self._clock,
            tally=self._tally,
        )

    def _say_how(self) -> None:
        if self._kv_transfer_config.kv_load_failure_policy != "recompute":
            _log.warning(
                "kvcache: kv_load_failure_policy is %r, so a request whose stored blocks are lost ends with "
                'an error; set it to "recompute" and it is computed instead',
                self._kv_transfer_config.kv_load_failure_policy,
            )
