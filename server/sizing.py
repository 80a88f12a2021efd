"""What the settings leave open and the machine decides: the pages of memory, the segments of NVMe."""

from __future__ import annotations

from kvcache.config import NodeConfig
from kvcache.errors import BadInput
from kvcache.tiers.host import HUGE_PAGE_BYTES, huge_pages_free_bytes, memory_available_bytes
from kvcache.tiers.nvme_load import segment_bytes_of


def takes_huge_pages(config: NodeConfig) -> bool:
    """Is memory for blocks to be of huge pages? RAISES BadInput when neither kind is enough."""
    huge = _use_huge_pages(config)
    available = huge_pages_free_bytes() if huge else memory_available_bytes()
    if config.capacity_bytes > available:
        raise BadInput(
            "bad_config",
            f"capacity is {config.capacity}",
            f"this host has {available / (1 << 30):,.1f} GiB of memory available",
            "lower --capacity",
        )
    return huge


def segment_bytes(config: NodeConfig) -> int:
    """Where the setting leaves it open, what is there decides: else a tier could not grow, nor get a
    smaller device, without losing all it holds."""
    if config.nvme_segment == "auto":
        for path, _ in config.nvme_places:
            if found := segment_bytes_of(path):
                return found
    return config.nvme_segment_bytes


def _use_huge_pages(config: NodeConfig) -> bool:
    # Memory goes from one arena to another in units, and less than a page cannot be given back.
    enough = huge_pages_free_bytes() >= config.capacity_bytes and config.unit_bytes % HUGE_PAGE_BYTES == 0
    if config.huge_pages == "on" and not enough:
        raise BadInput(
            "bad_config",
            f"{huge_pages_free_bytes()} bytes of huge pages are free",
            f"the capacity is {config.capacity_bytes} bytes, in units of {config.unit_bytes}",
            "use whole pages as units, raise vm.nr_hugepages, or leave huge_pages at auto",
        )
    return enough and config.huge_pages != "off"
