"""The engine's and the router's side: stores to load from and save to, and the connectors.

``connect`` and ``connect_blocking`` give a store over the node at an address; the store connects when it
is first used, survives the node's restarts, and keeps out of the way while the node is gone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvcache.client.hbm import BlockingDeviceStore, Device, DeviceStore
    from kvcache.client.store import BlockingStore, BlockStore

assert __name__ == "kvcache.client", "import kvcache.client, not client"

TIMEOUT_MS = 1_000


def connect(
    address: str | None = None,
    token: str | None = None,
    *,
    timeout_ms: int = TIMEOUT_MS,
    mapped: bool = True,
    name: str = "",
) -> BlockStore:
    """An async store over the node at ``address`` (none: ``address.default_address``).

    ``token`` none: ``$KVCACHE_TOKEN``, which may be unset. Blocks go through shared memory where the
    address is a unix socket and ``mapped`` is true, else over the wire. ``timeout_ms`` bounds each call.
    RAISES BadInput for an address that is none; a node that is not there is no error.
    """
    from kvcache.client.async_store import AsyncNodeStore
    from kvcache.client.link import options_for
    from kvcache.clock import SystemClock

    return AsyncNodeStore(options_for(address, token, timeout_ms, mapped, name), SystemClock())


def connect_blocking(
    address: str | None = None,
    token: str | None = None,
    *,
    timeout_ms: int = TIMEOUT_MS,
    mapped: bool = True,
    name: str = "",
) -> BlockingStore:
    """As ``connect``, for threads: any of them may call, copies run side by side."""
    from kvcache.client.blocking_store import BlockingNodeStore
    from kvcache.client.link import options_for
    from kvcache.clock import SystemClock

    return BlockingNodeStore(options_for(address, token, timeout_ms, mapped, name), SystemClock())


def connect_device(
    device: Device,
    address: str | None = None,
    token: str | None = None,
    *,
    timeout_ms: int = TIMEOUT_MS,
    name: str = "",
) -> DeviceStore:
    """As ``connect``, for an engine on that GPU (``kvcache.device.engine.EngineDevice``): blocks also go to
    and from HBM, where the node has some for it."""
    from kvcache.client.async_store import AsyncNodeStore
    from kvcache.client.link import options_for
    from kvcache.clock import SystemClock

    return AsyncNodeStore(options_for(address, token, timeout_ms, True, name, device), SystemClock())


def connect_device_blocking(
    device: Device,
    address: str | None = None,
    token: str | None = None,
    *,
    timeout_ms: int = TIMEOUT_MS,
    name: str = "",
) -> BlockingDeviceStore:
    """As ``connect_device``, for threads."""
    from kvcache.client.blocking_store import BlockingNodeStore
    from kvcache.client.link import options_for
    from kvcache.clock import SystemClock

    return BlockingNodeStore(options_for(address, token, timeout_ms, True, name, device), SystemClock())


def connect_planning_blocking(
    gpu: bytes,
    address: str | None = None,
    token: str | None = None,
    *,
    timeout_ms: int = TIMEOUT_MS,
    name: str = "",
) -> BlockingDeviceStore:
    """As ``connect_blocking``, for who plans what an engine loads, in another process perhaps, and loads
    nothing: it maps no memory, and leases what lies in the HBM that the engine has mapped on this GPU (its
    UUID; empty: the CPU). Only for engines of the same user and tenant, over a unix socket."""
    from kvcache.client.blocking_store import BlockingNodeStore
    from kvcache.client.link import options_for
    from kvcache.clock import SystemClock

    options = options_for(address, token, timeout_ms, False, name, None, gpu)
    return BlockingNodeStore(options, SystemClock())
