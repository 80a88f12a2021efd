"""What the link between a device and the host carries, measured once: 32 MiB, four times, in 3 ms."""

from __future__ import annotations

import torch

from kvcache.clock import NS_PER_S, Clock
from kvcache.device.cap import Cap
from kvcache.device.streams import Streams, failed, wait_out

MEASURED_BYTES = 32 << 20


def save_share_bytes_s(streams: Streams, clock: Clock, share: float) -> float:
    """This share of the link in bytes a second; 0 for all of it. RAISES BadInput, Unavailable."""
    Cap.of_share(share, 1.0, 0)
    return 0.0 if share == 1 else share * link_bytes_s(streams, clock)


def link_bytes_s(streams: Streams, clock: Clock) -> float:
    """What the link carries to locked host memory when nobody else uses it. RAISES Unavailable."""
    device = streams.device
    try:
        near = torch.zeros(MEASURED_BYTES, dtype=torch.uint8, device=device)
        far = torch.zeros(MEASURED_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")
        took = []
        for _ in range(4):
            wait_out(streams.current().mark())
            begun_ns = clock.now_ns()
            far.copy_(near, non_blocking=True)
            wait_out(streams.current().mark())
            took.append(clock.now_ns() - begun_ns)
    except RuntimeError as error:
        raise failed(error) from error
    return MEASURED_BYTES * NS_PER_S / max(1, min(took))
