"""The file of workers and nodes: whom a router sends requests to, and whose events an index follows.

TOML (or JSON, where the file ends so), a table a worker, and one a node that no worker names:

    [[worker]]
    name = "decode-0"                      # unlike that of any other
    url = "http://10.0.0.2:8000"           # of its OpenAI interface: only a router needs it
    model = "qwen3"                        # as requests call it
    node = "tcp://10.0.0.2:8211"           # the node on its host: control address
    events = "tcp://10.0.0.2:5557"         # the engine's own events (ZeroMQ), and where it replays them
    replay = "tcp://10.0.0.2:5558"
    engine = "vllm"                        # or sglang, rfc1527: how its events are written
    block_tokens = 16

    [[node]]
    address = "tcp://10.0.0.9:8211"        # followed as well: it may hold what engines do not
    token_file = "router.token"            # beside this file, readable by its owner alone

A worker's *sources* are those it can load blocks from: its node, what its engine holds itself, and whatever
``sources`` names. An engine's own source is called ``engine:NAME``, with ``/RANK`` behind for a rank but the
first, and so is no node's. With ``ranks``, rank r publishes r ports above ``events`` and ``replay``.

Whoever registers at run time says the same fields. Nothing here reads a token: ``token`` does, when asked.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from kvcache.address import parse
from kvcache.credentials import (
    DEFAULT_TENANT,
    TENANT_PATTERN,
    TOKEN_CHARS_MIN,
    TOKEN_PATTERN,
    read_private,
)
from kvcache.errors import BadInput, plainly

ENGINE_SOURCE = "engine:"
WORKERS_MAX = 65_536
RANKS_MAX = 1_024
FILE_BYTES_MAX = 64 << 20

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256, pattern=r"^[!-~]+\Z")]
Text = Annotated[str, msgspec.Meta(max_length=512)]
Engine = Literal["vllm", "sglang", "rfc1527"]
Role = Literal["any", "prefill", "decode"]


class Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An unknown field is refused, by its name."""


class Stream(msgspec.Struct, frozen=True, kw_only=True):
    """One rank's stream of an engine's events, and the source that it is in the index."""

    source: str
    rank: int
    events: str
    replay: str


class Worker(Strict, frozen=True, kw_only=True):
    """An engine process. Validated by ``check``, which ``Fleet`` calls."""

    name: Name
    url: Text = ""
    model: Text = ""
    """As requests call it; empty: it serves any."""
    sources: tuple[Name, ...] = ()
    """Names of sources it can load from, besides its node's and its own."""
    node: Text = ""
    events: Text = ""
    replay: Text = ""
    engine: Engine = "vllm"
    block_tokens: Annotated[int, msgspec.Meta(ge=0, le=1 << 20)] = 0
    """0: as its events say."""
    weights: Text = ""
    adapter: Text = ""
    salt: Text = ""
    """Keeps its blocks apart from others of that model: for instance a way of quantising."""
    tenant: Text = DEFAULT_TENANT
    role: Role = "any"
    rank: Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)] = 0
    """The data-parallel rank of its first stream."""
    ranks: Annotated[int, msgspec.Meta(ge=1, le=RANKS_MAX)] = 1
    token_file: Text = ""
    """Of the token for its node."""

    def check(self) -> None:
        """RAISES BadInput (bad_config) that names the worker and the field."""
        where = f"worker {self.name!r}"
        if self.url and not _is_url(self.url):
            raise _bad(
                where, "url", self.url, "it begins with http:// or https:// and names a host, and no user"
            )
        if self.node:
            _check_node(where, "node", self.node)
        for name in ("events", "replay"):
            if value := getattr(self, name):
                _check_stream(where, name, value, self.ranks)
        if self.replay and not self.events:
            raise _bad(where, "replay", self.replay, "there is nothing to replay without events")
        if self.ranks > 1 and not self.events:
            raise _bad(
                where, "ranks", str(self.ranks), "they count streams, and there is none without events"
            )
        if not TENANT_PATTERN.fullmatch(self.tenant):
            raise _bad(where, "tenant", self.tenant, f"it matches {TENANT_PATTERN.pattern}")

    def streams(self) -> list[Stream]:
        """What its engine publishes, a stream a rank; none without ``events``."""
        if not self.events:
            return []
        return [
            Stream(
                source=engine_source(self.name, self.rank + at),
                rank=self.rank + at,
                events=_behind(self.events, at),
                replay=_behind(self.replay, at) if self.replay else "",
            )
            for at in range(self.ranks)
        ]

    def own_sources(self) -> list[str]:
        """What is known of its sources before its node was reached."""
        return [*self.sources, *(stream.source for stream in self.streams())]


class Node(Strict, frozen=True, kw_only=True):
    """A node to follow, whether or not a worker names it."""

    address: Text
    token_file: Text = ""

    def check(self) -> None:
        """RAISES BadInput (bad_config)."""
        _check_node("node", "address", self.address)


class Fleet(Strict, frozen=True, kw_only=True):
    """All of them. Build with ``from_file`` or ``of``."""

    worker: tuple[Worker, ...] = ()
    node: tuple[Node, ...] = ()

    @classmethod
    def of(cls, workers: Iterable[Worker] = (), nodes: Iterable[Node] = ()) -> Fleet:
        """RAISES BadInput (bad_config) that names the worker and the field."""
        fleet = cls(worker=tuple(workers), node=tuple(nodes))
        fleet.check()
        return fleet

    @classmethod
    def from_file(cls, path: str | Path) -> Fleet:
        """RAISES BadInput (bad_config) that names the file and the line, or the entry and its field. Files
        of tokens are found beside it."""
        path = Path(path)
        raw = _read(path)
        try:
            parsed = msgspec.json.decode(raw) if path.suffix == ".json" else tomllib.loads(raw.decode())
            fleet = msgspec.convert(parsed, cls)
            fleet.check()
        except msgspec.ValidationError as error:
            raise _refused(path, str(error)) from error
        except (msgspec.DecodeError, tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise _unusable(path, str(error)) from error
        except BadInput as error:
            raise BadInput(error.code, f"{path}: {error.what}", error.why, error.todo) from error
        return fleet._beside(path.parent)

    def check(self) -> None:
        """RAISES BadInput (bad_config)."""
        if len(self.worker) + len(self.node) > WORKERS_MAX:
            raise BadInput(
                "bad_config", "more workers and nodes than fit", f"at most {WORKERS_MAX:,}", "split them"
            )
        for worker in self.worker:
            worker.check()
        for node in self.node:
            node.check()
        name, count = next(iter(Counter(worker.name for worker in self.worker).most_common(1)), ("", 0))
        if count > 1:
            raise _bad(f"worker {name!r}", "name", name, "another worker has it")
        self._check_sources()
        for address, files in self._token_files().items():
            if len(files) > 1:
                raise BadInput(
                    "bad_config",
                    f"the node at {address} has two files of tokens: {' and '.join(sorted(files))}",
                    "it is followed once, with one token",
                    "give the same token_file wherever it is named, or only once",
                )

    def _check_sources(self) -> None:
        """The streams of two workers are two sources."""
        owners: dict[str, str] = {}
        for worker in self.worker:
            for stream in worker.streams():
                other = owners.setdefault(stream.source, worker.name)
                if other != worker.name:
                    why = f"its events would be the source {stream.source}, as those of {other!r} are"
                    raise _bad(f"worker {worker.name!r}", "name", worker.name, why)

    def followed(self) -> dict[str, str]:
        """The control address of each node, and the file of its token (empty: none)."""
        return {
            address: next(iter(files), "")
            for address, files in sorted(self._token_files().items(), key=lambda item: item[0])
        }

    def _token_files(self) -> dict[str, set[str]]:
        named = [(each.node, each.token_file) for each in self.worker if each.node]
        named += [(each.address, each.token_file) for each in self.node]
        found: dict[str, set[str]] = {}
        for address, file in named:
            found.setdefault(address, set()).update([file] if file else [])
        return found

    def _beside(self, folder: Path) -> Fleet:
        def placed(file: str) -> str:
            return str(folder / file) if file else ""

        return Fleet(
            worker=tuple(
                msgspec.structs.replace(each, token_file=placed(each.token_file)) for each in self.worker
            ),
            node=tuple(
                msgspec.structs.replace(each, token_file=placed(each.token_file)) for each in self.node
            ),
        )


def engine_source(worker: str, rank: int = 0) -> str:
    """What the index calls the events of a worker's engine."""
    return f"{ENGINE_SOURCE}{worker}/{rank}" if rank else f"{ENGINE_SOURCE}{worker}"


def token(file: str) -> str:
    """The token in ``file``: one line; empty for no file. RAISES BadInput, and never repeats it."""
    if not file:
        return ""
    found = read_private(file).strip().decode(errors="replace")
    if not TOKEN_PATTERN.fullmatch(found):
        raise BadInput(
            "bad_credentials",
            f"{file} holds no token",
            f"it is one line of {TOKEN_CHARS_MIN} visible ASCII characters at least",
            "write the token alone into it",
        )
    return found


def token_of(value: str, setting: str) -> str:
    """A token that was given itself, or none. RAISES BadInput, and never repeats it."""
    if value and not TOKEN_PATTERN.fullmatch(value):
        raise BadInput("bad_credentials", f"{setting} holds no token", "it is one line of visible ASCII")
    return value


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            raw = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise _unusable(path, plainly(error)) from error
    if len(raw) > FILE_BYTES_MAX:
        raise _unusable(path, f"it is over {FILE_BYTES_MAX:,} bytes")
    return raw


def _is_url(value: str) -> bool:
    """Of a host, of which no part is left for whoever connects to refuse."""
    match = re.fullmatch(
        r"https?://(?:\[[0-9a-fA-F:.]+\]|[^\s/?#@:\[\]\\]+)(?::(\d{1,5}))?(/[^\s?#]*)?", value
    )
    return match is not None and 0 < int(match[1] or 1) < 65_536


def _check_node(where: str, field: str, value: str) -> None:
    try:
        parse(value)
    except BadInput as error:
        raise _bad(where, field, value, error.why or error.what, error.todo) from error


def _check_stream(where: str, field: str, value: str, ranks: int) -> None:
    """As ZeroMQ writes addresses."""
    if re.fullmatch(r"ipc:///\S+", value) and ranks == 1:
        return
    match = re.fullmatch(r"tcp://(\[[0-9a-fA-F:.]+\]|[^\s:/\[\]*]+):(\d{1,5})", value)
    if match is None or not 0 < int(match[2]) <= 65_536 - ranks:
        raise _bad(
            where, field, value, "that is no address of a publisher", "write for instance tcp://10.0.0.2:5557"
        )


def _behind(endpoint: str, ports: int) -> str:
    if not ports:
        return endpoint
    head, _, port = endpoint.rpartition(":")
    return f"{head}:{int(port) + ports}"


def _bad(where: str, field: str, value: str, why: str, todo: str = "see docs/index.md") -> BadInput:
    return BadInput("bad_config", f"{field} of {where} is {value[:120]!r}", why, todo)


_FIELDS = sorted({*Worker.__struct_fields__, *Node.__struct_fields__, *Fleet.__struct_fields__})


def _refused(path: Path, said: str) -> BadInput:
    """In our words, what the schema refused: it counts entries from 0."""
    at = re.search(r"`\$\.(\w+)\[(\d+)\](?:\.(\w+))?", said)
    where = f"{at[1]} {int(at[2]) + 1}" + (f", {at[3]}" if at[3] else "") if at else "the whole"
    unknown = re.search(r"unknown field `(.*?)`", said)
    near = difflib.get_close_matches(unknown[1], _FIELDS, 1) if unknown else []
    return BadInput(
        "bad_config",
        f"{path}: {where}",
        re.sub(r" - at `.*`$", "", said),
        f"did you mean {near[0]!r}?" if near else "see docs/index.md",
    )


def _unusable(path: Path, why: str) -> BadInput:
    return BadInput("bad_config", f"{path} is no file of workers and nodes", why, "see docs/index.md")
