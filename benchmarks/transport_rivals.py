"""Who else moves blocks between processes, for ``bench_transport.py``: ``RIVALS`` makes one of each.

    ucx_perftest    of the libucx wheel that ``ucx://`` runs on, same settings; spinning, and sleeping as we
                    do; it moves one buffer again and again, which stays in cache
    nixl            NIXL's own API, over TCP (reads emulated, or writes) and over cma
    mooncake        Mooncake's transfer engine over TCP, reads and writes

Each has its environment beside ours. None verifies anything on the clock, and whoever waits spins, but for
the one that is said to sleep.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from transport_pool import GB, MIB, PATIENCE_S, POOL_BYTES, Case, Contestant

ROOT = Path(__file__).resolve().parents[1]
HOW_TO_INSTALL = {
    ".venv-ucx": "make test-ucx sets up .venv-ucx",
    ".venv-nixl": "make test-nixl sets up .venv-nixl",
    ".venv-peers": "benchmarks/peers.sh sets up .venv-peers; apt-get install libibverbs1 libnuma1 libcurl4",
}
SEGMENTS = {"UCX_TCP_TX_SEG_SIZE": "512k", "UCX_TCP_RX_SEG_SIZE": "512k"}
"""As ``ucx://`` has them; those of UCX itself are of 8 KiB, and halve its speed."""
LISTEN_S = 2.0
TRIES = 3
OVER_TCP = {**SEGMENTS, "UCX_TLS": "tcp,self", "UCX_PROTO_EMULATION_ENABLE": "y", "UCX_MODULES": "^ib"}
OVER_CMA = {"UCX_MODULES": "^ib"}


def interpreter(environment: str) -> str:
    """RAISES RuntimeError that says how it is set up."""
    found = ROOT / environment / "bin" / "python"
    if not found.exists():
        raise RuntimeError(HOW_TO_INSTALL[environment])
    return str(found)


class Perftest:
    """``ucx_perftest -t tag_bw``: a process on each side, new ones each turn; a MB of its is a MiB."""

    def __init__(self, name: str, options: Sequence[str] = ()) -> None:
        self.name = name
        self._options = options
        found = sorted((ROOT / ".venv-ucx").glob("lib/python*/site-packages/libucx/bin/ucx_perftest"))
        if not found:
            raise RuntimeError(HOW_TO_INSTALL[".venv-ucx"])
        self._program = str(found[0])
        libraries = found[0].parents[1] / "lib"
        self._environment = {**os.environ, **SEGMENTS, "UCX_TLS": "tcp", "LD_LIBRARY_PATH": str(libraries)}

    def moved(self, case: Case) -> float:
        for _ in range(TRIES - 1):
            with contextlib.suppress(RuntimeError):  # Its port may be taken by then.
                return self._once(case)
        return self._once(case)

    def _once(self, case: Case) -> float:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = str(probe.getsockname()[1])
        server = self._start("-p", port)
        try:
            wait_for_listener(int(port))
            return self._measured(case, port)
        finally:
            server.kill()
            server.wait()

    def _measured(self, case: Case, port: str) -> float:
        count = POOL_BYTES // case.block_bytes
        wanted = [
            "-t",
            "tag_bw",
            "-s",
            str(case.block_bytes),
            "-n",
            str(count),
            "-w",
            str(max(count // 32, 2)),
        ]
        client = self._start("127.0.0.1", "-p", port, *wanted, "-f", "-v", *self._options)
        try:
            said = client.communicate(timeout=PATIENCE_S)[0].strip().splitlines()
        except subprocess.TimeoutExpired as error:
            client.kill()
            raise RuntimeError("ucx_perftest did not end") from error
        if not said or not re.fullmatch(r"\s*\d+(,[\d.]+)+", said[-1]):
            raise RuntimeError(f"ucx_perftest said {said[-1:]}")
        return float(said[-1].split(",")[4]) * MIB / GB

    def close(self) -> None:
        """Nothing runs between turns."""

    def _start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self._program, *arguments],
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )


def wait_for_listener(port: int) -> None:
    """Until somebody listens at it; to connect would be to take the one place that there is."""
    end = time.monotonic() + LISTEN_S
    wanted = re.compile(rf"^ *\d+: [0-9A-F]+:{port:04X} [0-9A-F]+:0000 0A ", re.MULTILINE)
    while not any(wanted.search(Path(f"/proc/net/{table}").read_text()) for table in ("tcp", "tcp6")):
        if time.monotonic() > end:
            raise RuntimeError("ucx_perftest does not listen")
        time.sleep(0.01)


def of_engine(name: str, environment: str, what: str, settings: dict[str, str], *options: str) -> Contestant:
    script = str(Path(__file__).with_name("transport_rival_ends.py"))
    return Contestant(name, [interpreter(environment), script, "read", what, *options], settings)


def _engines() -> dict[str, Callable[[], Contestant]]:
    nixl, mooncake = ".venv-nixl", ".venv-peers"
    made = {
        "nixl tcp read": (nixl, "nixl-read", OVER_TCP),
        "nixl tcp write": (nixl, "nixl-write", OVER_TCP),
        "nixl cma": (nixl, "nixl-read", OVER_CMA),
        "nixl cma, huge pages": (nixl, "nixl-read", OVER_CMA, "huge"),
        "mooncake tcp read": (mooncake, "mooncake-read", {}),
        "mooncake tcp write": (mooncake, "mooncake-write", {}),
    }
    return {name: partial(of_engine, name, *how) for name, how in made.items()}


RIVALS: dict[str, Callable[[], Contestant | Perftest]] = {
    "ucx_perftest": partial(Perftest, "ucx_perftest", ["-e"]),
    "ucx_perftest, sleeping": partial(Perftest, "ucx_perftest, sleeping", ["-e", "-I", "-E", "sleep"]),
    **_engines(),
}
