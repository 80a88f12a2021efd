"""A vLLM server as a proxy sees it, HTTP in and out, with its engine in processes of their own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.engines.engine import ROOT
from tests.engines.vllm_process import SETTINGS, engine_arguments

READY_S = 600.0
END_S = 60.0
PAUSE_S = 0.25
FLAGS = (
    "skip_tokenizer_init",
    "dtype",
    "block_size",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "kv_cache_memory_bytes",
    "enforce_eager",
    "prefix_caching_hash_algo",
)


class HttpEngine:
    """Starts at once; ``wait_ready`` waits. Use as a context manager: no process of it is left."""

    def __init__(self, model: Path, extra: dict[str, Any], port: int, log: Path) -> None:
        self._url = f"http://127.0.0.1:{port}"
        arguments = engine_arguments(str(model), extra)
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        command += ["--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port)]
        for name in FLAGS:
            flag, value = f"--{name.replace('_', '-')}", arguments[name]
            command += [flag] if value is True else [flag, str(value)]
        command += ["--kv-transfer-config", json.dumps(arguments["kv_transfer_config"])]
        settings = {**SETTINGS, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_HOST_IP": "127.0.0.1"}
        with log.open("ab") as sink:
            self._process = subprocess.Popen(
                command,
                stdout=sink,
                stderr=sink,
                cwd=ROOT,
                env={**os.environ, **settings},
                start_new_session=True,
            )

    def __enter__(self) -> HttpEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # Whatever it has left behind.
        self._process.wait()

    def wait_ready(self) -> None:
        end = time.monotonic() + READY_S
        while True:
            assert self._process.poll() is None and time.monotonic() < end, "the server did not start"
            try:
                self.get("/health")
            except OSError:
                self._pause()
            else:
                return

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            self._url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=READY_S) as reply:
            answer: dict[str, Any] = json.loads(reply.read())
        return answer

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self._url + path, timeout=READY_S) as reply:
            text: str = reply.read().decode()
        return text

    def metric(self, name: str) -> float:
        """Of all label sets in which ``name``, with the beginning of its labels, stands."""
        lines = [line for line in self.get("/metrics").splitlines() if not line.startswith("#")]
        return sum(float(line.split()[-1]) for line in lines if all(part in line for part in name.split()))

    def said(self) -> list[str]:
        """Everything that it counts of the store, and that is not zero."""
        lines = [line for line in self.get("/metrics").splitlines() if line.startswith("vllm:kvcache")]
        return [line for line in lines if float(line.split()[-1])]

    def _pause(self) -> None:
        """Until it listens there is nothing to wait on but its end."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(PAUSE_S)
