"""A look-up by a router that runs elsewhere: raw frames and HTTP, beside Dynamo's indexer over HTTP.

    python benchmarks/bench_locate.py [--json] [--quick] [--dynamo PYTHON]

``--dynamo`` names an interpreter of a virtual environment with ``ai-dynamo-runtime==1.6.1`` (default:
``.venv-peers/bin/python``, where that has it). Its indexer listens on every interface, without a setting for
that: it runs for as long as this script does.

64 workers hold the same prompt of 8,192 blocks, so each answer is about all of them. They are registered over
``/register`` with both indexers and publish over ZeroMQ, as engines do; before anything is measured, both
give the same answer at each length. One client, one connection that stays, on loopback; the clients take
turns of 100 questions. HTTP is asked by 64-bit hashes, and the answer's JSON is decoded.

On paper: a frame of 8,192 hints is 64 KiB and the answer 1.9 KB; two system calls and a wake-up each way are
10 to 15 us on a unix socket, 50 over TCP; Python takes 10 of it. JSON of as many hashes is 160 KB.
"""

from __future__ import annotations

import argparse
import gc
import http.client
import json
import os
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # Also where the project is not installed.

import harness
import msgspec
import zmq
from harness import Figure

from kvcache.locator import Locator
from kvcache.sequence import local_hashes, sequence_hashes

ROOT = Path(__file__).resolve().parent.parent
WORKERS = 64
LENGTHS = (128, 1_024, 8_192)
BLOCK_TOKENS = 4
TURN = 100
GOAL_US = {"unix": 25.0, "tcp": 70.0}
READY_S = 60.0
TOKEN = "operator-of-the-benchmark"
DYNAMO_PORT = 18_190

Ask = Callable[[], object]


class Http:
    """One connection that stays."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)

    def ask(self, method: str, path: str, body: bytes | None = None) -> object:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"}
        self._connection.request(method, path, body, headers)
        answer = self._connection.getresponse()
        raw = answer.read()
        assert answer.status < 300, (answer.status, raw[:200])
        return msgspec.json.decode(raw) if raw else None


class Publishers:
    """What 64 engines would tell."""

    def __init__(self, tokens: array[int]) -> None:
        self._context = zmq.Context()
        self._sockets = [self._context.socket(zmq.PUB) for _ in range(WORKERS)]
        self.ports = [each.bind_to_random_port("tcp://127.0.0.1") for each in self._sockets]
        blocks = len(tokens) // BLOCK_TOKENS
        stored = ["BlockStored", list(range(blocks)), None, tokens.tolist(), BLOCK_TOKENS, None, "GPU"]
        self._payload = msgspec.msgpack.encode([0.0, [stored], 0])

    def tell(self) -> None:
        for socket in self._sockets:
            socket.send_multipart([b"", (0).to_bytes(8, "big"), self._payload])

    def close(self) -> None:
        self._context.destroy(linger=0)


@contextmanager
def ours(folder: Path) -> Iterator[tuple[str, str, int]]:
    """The addresses over unix and tcp, and the port of HTTP."""
    credentials = folder / "credentials.toml"
    credentials.write_text(
        f'master_key = "{"ab" * 32}"\n[[credential]]\ntoken = "{TOKEN}"\ntenant = "default"\n'
        'roles = ["operator"]\n'
    )
    credentials.chmod(0o600)
    listen = f"unix://{folder}/index.sock,tcp://127.0.0.1:0"
    command = [sys.executable, "-m", "kvcache", "index", "--json", "--http", "127.0.0.1:0"]
    command += ["--listen", listen, "--credentials", str(credentials)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    try:
        assert process.stdout is not None
        web, unix, tcp = json.loads(process.stdout.readline())["places"]
        yield unix, tcp, int(web.rpartition(":")[2])
    finally:
        process.terminate()
        process.wait(20)


@contextmanager
def dynamo(interpreter: str) -> Iterator[int | None]:
    """Its port; None where it is not installed."""
    check = (
        subprocess.run([interpreter, "-c", "import dynamo.indexer"], capture_output=True)
        if (Path(interpreter).exists())
        else None
    )
    if check is None or check.returncode:
        yield None
        return
    command = [interpreter, "-m", "dynamo.indexer", "--port", str(DYNAMO_PORT)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield DYNAMO_PORT
    finally:
        process.terminate()
        process.wait(20)


def patiently(ask: Callable[[], bool]) -> None:
    until = time.monotonic() + READY_S
    while True:
        try:
            if ask():
                return
        except (OSError, AssertionError, http.client.HTTPException):
            pass
        assert time.monotonic() < until, "it never came to that"
        time.sleep(0.1)


def register(port: int, ports: list[int]) -> None:
    patiently(lambda: Http(port).ask("GET", "/health") is None)
    client = Http(port)
    for number, events in enumerate(ports):
        body = {"instance_id": number, "endpoint": f"tcp://127.0.0.1:{events}", "model_name": "m"}
        client.ask("POST", "/register", json.dumps({**body, "block_size": BLOCK_TOKENS}).encode())
    patiently(lambda: all(each["status"] == "active" for each in Http(port).ask("GET", "/workers")))  # type: ignore[attr-defined]  # It is JSON.


def by_http(port: int, tokens: array[int], blocks: int) -> tuple[Ask, bytes]:
    """By the hashes that Dynamo's interface takes: signed, each block by itself."""
    hashes = local_hashes(tokens[: blocks * BLOCK_TOKENS], BLOCK_TOKENS).cast("B").cast("q").tolist()
    body = json.dumps({"block_hashes": hashes, "model_name": "m"}).encode()
    client = Http(port)
    return (lambda: client.ask("POST", "/query_by_hash", body)), body


def by_frames(address: str, tokens: array[int], blocks: int) -> Ask:
    locator = Locator(address, TOKEN, timeout_ms=5_000)
    hints = sequence_hashes(tokens[: blocks * BLOCK_TOKENS], BLOCK_TOKENS)
    return lambda: locator.match(hints)


def scores(answer: object) -> dict[str, int]:
    assert isinstance(answer, dict)
    return {worker: ranks["0"] for worker, ranks in answer["scores"].items()}


def agreed(clients: dict[str, Ask], blocks: int) -> bool:
    """All of them give the same answer, about every worker."""
    expected = {str(number): blocks * BLOCK_TOKENS for number in range(WORKERS)}
    for name, ask in clients.items():
        answer = ask()
        if answer is None:
            return False
        if name in ("unix", "tcp"):
            found = {
                answer.source(row).removeprefix("engine:"): answer.blocks[row] * BLOCK_TOKENS  # type: ignore[attr-defined]  # Matches.
                for row in range(answer.rows)  # type: ignore[attr-defined]
            }
        else:
            found = scores(answer)
        if found != expected:
            return False
    return True


def turns(clients: dict[str, Ask], rounds: int) -> dict[str, list[list[float]]]:
    """Microseconds of each question, by client and round."""
    taken: dict[str, list[list[float]]] = {name: [] for name in clients}
    order = list(clients)
    for number in range(rounds):
        for name in order[number % len(order) :] + order[: number % len(order)]:
            ask, clock, times = clients[name], time.perf_counter_ns, []
            for _ in range(TURN):
                began = clock()
                ask()
                times.append((clock() - began) / 1_000)
            taken[name].append(times)
    return taken


def figures(taken: dict[str, list[list[float]]], blocks: int) -> Iterator[Figure]:
    machine = harness.machine()
    for name, rounds in taken.items():
        medians = [median(times) for times in rounds]
        every = sorted(value for times in rounds for value in times)
        p99 = every[len(every) * 99 // 100]
        ratio, against = None, ""
        if "dynamo" in taken and name != "dynamo":
            theirs = [median(times) for times in taken["dynamo"]]
            ratio = median(their / our for their, our in zip(theirs, medians, strict=True))
            against = "Dynamo 1.6.1 over HTTP"
        elif name in GOAL_US:
            ratio, against = GOAL_US[name] / median(medians), "goal"
        count = len(every)
        yield Figure(f"{name} {blocks} p50", median(medians), "us", ratio, against, count, machine)
        yield Figure(f"{name} {blocks} p99", p99, "us", None, "", count, machine)


def main() -> None:
    parser = harness.parser(__doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--dynamo", default=str(ROOT / ".venv-peers/bin/python"), help="interpreter that has it"
    )
    parsed = parser.parse_args()
    options = harness.choose(parsed)
    tokens = array("I", range(LENGTHS[-1] * BLOCK_TOKENS))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        unix, tcp, port = stack.enter_context(ours(folder))
        rival = stack.enter_context(dynamo(parsed.dynamo))
        publishers = Publishers(tokens)
        stack.callback(publishers.close)
        for each in (port, rival):
            if each is not None:
                register(each, publishers.ports)
        publishers.tell()
        gc.disable()
        told: list[Figure] = []
        for blocks in LENGTHS:
            clients = {
                "unix": by_frames(unix, tokens, blocks),
                "tcp": by_frames(tcp, tokens, blocks),
                "http": by_http(port, tokens, blocks)[0],
            }
            if rival is not None:
                clients["dynamo"] = by_http(rival, tokens, blocks)[0]
            patiently(lambda: agreed(clients, blocks))  # noqa: B023
            told += figures(turns(clients, options.rounds(30, 5)), blocks)
        harness.report(told, options)


if __name__ == "__main__":
    main()
