"""What UCX's memory hooks see, by the library that this process has loaded."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvcache.block import Slot
from kvcache.tiers.host import HostTier
from kvcache.tiers.space import Move, make_slot

UNIT = 64 << 10
_VM_UNMAPPED = 1 << 17
_Seen = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.POINTER(ctypes.c_size_t * 2), ctypes.c_void_p)


@contextmanager
def unmapped() -> Iterator[list[tuple[int, int]]]:
    """Address and length of what UCX takes for gone meanwhile: it drops its registrations of that."""
    maps = Path("/proc/self/maps").read_text().split()
    library = ctypes.CDLL(next(path for path in maps if Path(path).name.startswith("libucm")))
    library.ucm_set_event_handler.argtypes = (ctypes.c_int, ctypes.c_int, _Seen, ctypes.c_void_p)
    library.ucm_unset_event_handler.argtypes = (ctypes.c_int, _Seen, ctypes.c_void_p)
    seen: list[tuple[int, int]] = []
    handler = _Seen(lambda _event, span, _argument: seen.append((span[0][0], span[0][1])))
    assert library.ucm_set_event_handler(_VM_UNMAPPED, 0, handler, None) == 0
    try:
        yield seen
    finally:
        library.ucm_unset_event_handler(_VM_UNMAPPED, handler, None)


def assert_ucx_sees_them_go() -> None:
    host = HostTier(UNIT, UNIT)
    for name in ("one", "two"):
        host.add_arena(name)
    host.apply([Move(0, 0, UNIT, True), Move(0, 0, UNIT, False)])
    view = host.view(Slot(make_slot(0, 0)), UNIT)
    start = ctypes.addressof(ctypes.c_char.from_buffer(view))
    with unmapped() as seen:
        host.apply([Move(1, 0, UNIT, True)])
    assert (start, UNIT) in seen
    host.close()
