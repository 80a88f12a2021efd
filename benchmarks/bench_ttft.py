"""Time to first token of a 4,001-token prompt in vLLM on CPU: cold, and warm from three places.

    cold.*       no connector (none), this project's, LMCache's: what a connector costs when it has nothing
    warm.own     the engine that computed it, from its own prefix cache
    warm.*       a new engine process, from the store: this project's node, LMCache's server (shared memory)

180 M parameters, bfloat16, 16 KiB of KV a token, 62 MiB a prompt. All engines run alike: three
processes each, one OpenMP thread, unpinned (vLLM binds other cores when it sees a connector). Engines
take turns, prompt by prompt; ratios are medians of the rounds' ratios.

    .venv-engines (make test-engines) runs vLLM; for LMCache:
    python3 -m venv .venv-lmcache && .venv-lmcache/bin/pip install --no-deps -r requirements/lmcache-cpu.txt

    .venv/bin/python benchmarks/bench_ttft.py [--json] [--quick]

``--quick``: no LMCache, engines in one process, prompts of 1,001 tokens, 2 rounds.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # Also where the project is not installed.

from benchmarks.harness import Figure, Options, compare, interleaved, machine, options, report  # noqa: E402
from kvcache.testing.processes import NodeProcess  # noqa: E402

ENGINES = ROOT / ".venv-engines" / "bin" / "python"
LMCACHE = ROOT / ".venv-lmcache" / "bin" / "python"
PROMPT_TOKENS = 4_001
PROMPT_TOKENS_QUICK = 1_001
BLOCK_TOKENS = 128
SETTINGS = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "LMCACHE_TRACK_USAGE": "false",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_CI_ENV": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
START_S = 60.0


class Engine:
    """``ttft_engine.py`` in a process of its own."""

    def __init__(
        self, python: Path, model: Path, transfer: dict[str, Any] | None, quick: bool, log: Path
    ) -> None:
        command = [str(python), str(ROOT / "benchmarks" / "ttft_engine.py"), str(model), json.dumps(transfer)]
        environment = {
            **os.environ,
            **SETTINGS,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if quick else "1",
        }
        with log.open("ab") as sink:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=sink,
                text=True,
                env=environment,
                cwd=ROOT,
            )
        self._log = log
        self.cached: list[int] = []
        self.tokens: list[int] = []
        self._length = PROMPT_TOKENS_QUICK if quick else PROMPT_TOKENS
        self._prompts = prompts(self._length)

    @property
    def stored_tokens(self) -> int:
        """What a store can hold of a prompt."""
        return self._length // BLOCK_TOKENS * BLOCK_TOKENS

    def ready(self) -> Engine:
        assert self._answer() == {"ready": True}
        return self

    def seconds(self) -> float:
        """To the first token of the next prompt."""
        answer = self.run(next(self._prompts))
        self.cached.append(answer["cached"])
        self.tokens.append(answer["token"])
        return float(answer["seconds"])

    def again(self) -> None:
        """Start over with the first prompt."""
        self._prompts = prompts(self._length)
        self.cached.clear()
        self.tokens.clear()

    def run(self, prompt: list[int]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompt": prompt}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"an engine ended; its log ends:\n{self._log.read_text()[-3000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def prompts(length: int) -> Iterator[list[int]]:
    """The same sequence for everybody; no two begin alike."""
    draw = random.Random(1)
    while True:
        yield [draw.randrange(3, 512) for _ in range(length)]


def ours(address: str) -> dict[str, Any]:
    return {
        "kv_connector": "KVCacheConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"address": address},
    }


def theirs(port: int) -> dict[str, Any]:
    return {
        "kv_connector": "LMCacheMPConnector",
        "kv_connector_module_path": "lmcache.integration.vllm.lmcache_mp_connector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": port},
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def lmcache_server(log: Path) -> Iterator[int]:
    """LMCache's multi-process server, with its shared memory; yields its port."""
    port = free_port()
    flags = {
        "host": "127.0.0.1",
        "port": port,
        "chunk-size": 128,
        "l1-size-gb": 2,
        "eviction-policy": "LRU",
        "supported-transfer-mode": "engine_driven",
        "shm-name": f"kvcache-bench-{os.getpid()}",
        "http-host": "127.0.0.1",
        "http-port": free_port(),
    }
    command = [str(LMCACHE.parent / "lmcache"), "server", "--disable-observability"]
    for name, value in flags.items():
        command += [f"--{name}", str(value)]
    with log.open("ab") as sink:
        server = subprocess.Popen(command, stdout=sink, stderr=sink, env={**os.environ, **SETTINGS})
    try:
        _wait_for(port)
        yield port
    finally:
        server.terminate()
        server.wait(20)


def _wait_for(port: int) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.1)
    raise SystemExit("LMCache's server did not start")


def measure(folder: Path, chosen: Options) -> dict[str, list[float]]:
    """Seconds of every contestant, round by round. Engines of one phase take turns."""
    model, rounds = folder / "model", chosen.rounds(5, 2)
    subprocess.run(
        [str(ENGINES), str(ROOT / "benchmarks" / "ttft_engine.py"), "--build", str(model)],
        check=True,
        stderr=subprocess.DEVNULL,
    )
    with contextlib.ExitStack() as stack:
        settings = {"socket": str(folder / "node.sock"), "capacity": "2GiB", "http": "none"}
        node = stack.enter_context(NodeProcess(settings, folder / "node.log"))
        connectors = {"kvcache": (ENGINES, ours(node.socket))}
        if LMCACHE.exists() and not chosen.quick:
            port = stack.enter_context(lmcache_server(folder / "lmcache.log"))
            connectors["lmcache"] = (LMCACHE, theirs(port))

        def start(names: Mapping[str, tuple[Path, dict[str, Any]]]) -> dict[str, Engine]:
            return {
                name: stack.enter_context(
                    contextlib.closing(
                        Engine(python, model, transfer, chosen.quick, folder / f"{name}.log").ready()
                    )
                )
                for name, (python, transfer) in names.items()
            }

        alone = Engine(ENGINES, model, None, chosen.quick, folder / "none.log").ready()
        stack.callback(alone.close)
        filling = start(connectors)
        cold = interleaved(_turns({"none": alone, **filling}), rounds)
        expected = {name: list(engine.tokens) for name, engine in filling.items()}
        for engine in filling.values():
            assert not any(engine.cached), "a cold prompt was cached"
            engine.close()
        alone.again()
        fresh = start(connectors)
        warm = interleaved(_turns({"own": alone, **fresh}), rounds)
        for name, engine in fresh.items():
            assert set(engine.cached) == {engine.stored_tokens}, (name, engine.cached)
            assert engine.tokens == expected[name], f"{name}: other tokens warm than cold"
    return {
        **{f"cold.{name}": seconds for name, seconds in cold.items()},
        **{f"warm.{name}": seconds for name, seconds in warm.items()},
    }


def _turns(engines: Mapping[str, Engine]) -> dict[str, Callable[[], float]]:
    return {name: engine.seconds for name, engine in engines.items()}


def figures(results: Mapping[str, list[float]]) -> list[Figure]:
    against = {"cold.kvcache": "cold.none", "warm.kvcache": "warm.lmcache"}
    where, found = machine(), []
    for name, seconds in results.items():
        other = against.get(name, "")
        ratio = compare(results, other, name) if other in results else None
        found.append(
            Figure(
                f"ttft.{name}",
                round(median(seconds), 4),
                "s",
                ratio and round(ratio, 3),
                other,
                len(seconds),
                where,
            )
        )
    return found


def main() -> None:
    chosen = options((__doc__ or "").partition("\n")[0])
    if not ENGINES.exists():
        print("bench_ttft: no .venv-engines, nothing measured (make test-engines makes it)", file=sys.stderr)
        return
    if not LMCACHE.exists() and not chosen.quick:
        print("bench_ttft: no .venv-lmcache, so no peer (see the head of this file)", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        report(figures(measure(Path(folder), chosen)), chosen)


if __name__ == "__main__":
    main()
