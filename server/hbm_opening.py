"""Putting the HBM tier together: the one place of the server that, when it is asked for, brings torch in."""

from __future__ import annotations

from kvcache.errors import BadInput, Unavailable
from kvcache.server.core import Core
from kvcache.server.hbm import Hbm
from kvcache.tiers.hbm_demote import Below


def open_hbm(core: Core) -> Hbm:
    """REQUIRES: ``core.tuning`` has the tier. RAISES BadInput: no torch, or CUDA cannot be used."""
    kind = core.config.hbm_device
    try:
        from kvcache.device.served import Devices

        devices = Devices(kind)
    except (ImportError, Unavailable) as error:
        raise BadInput(
            "bad_config",
            f"hbm is {core.config.hbm!r} on {kind}",
            f"it cannot be used here: {error}",
            "install the extra [torch], check the driver, or leave hbm at none",
        ) from error
    return Hbm(core.config, devices, core.tuning, core.clock, core.counters)


def below_hbm(core: Core, arena: int) -> Below:
    """What is under the slab of a trust domain whose host memory is ``arena``."""
    return Below(
        core.ledger,
        core.host,
        arena,
        core.is_below_hbm,
        core.namespaces.spec_of,
        core.bringing.committed,
        core.settle,
    )
