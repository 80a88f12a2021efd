"""Sessions as kv-cache-tester publishes them: a JSON file a session, or a folder of such files.

    {"id": "trace_0001", "block_size": 64, "hash_id_scope": "local", "tool_tokens": 12524,
     "system_tokens": 3189, "requests": [
       {"t": 0.0, "type": "s", "in": 20064, "out": 797, "hash_ids": [1, 2, 3, ...], "stop": "tool_use"},
       {"t": 79.2, "type": "subagent", "requests": [...]}]}

Seconds from the start of the session (of the subagent, inside one), tokens, and a number a full block of 64
tokens. Numbers are of one file, unless its ``hash_id_scope`` is "global".

What a folder of sessions does not say is made up, and the trace's note says so:

* when a session starts: drawn evenly over ``spread_s`` seconds, the same for the same seed; a file with the
  field ``start`` (seconds), as ``tester_sessions`` writes it, starts then;
* that sessions share their beginning: the whole blocks within ``tool_tokens + system_tokens`` are one, for
  sessions in which both counts are equal;
* a session that begins like one before it (the same lengths of its first 10 requests) is left out.

The sum: 20 us a request and 0.2 us a block of its prompt; a session's file may have 64 MiB.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from kvcache.eviction.traces.rows import (
    LENGTH_MAX,
    NAME_MAX,
    Progress,
    Rows,
    bad,
    names,
    parsed,
    seconds,
    text,
    whole,
)
from kvcache.eviction.traces.trace import BLOCK_TOKENS_MAX, REQUESTS_MAX, Trace

SPREAD_S = 4 * 3_600
FILES_MAX = 1 << 17
FILE_BYTES_MAX = 64 << 20
DEPTH_MAX = 8
SHARED_MAX = 1 << 16
_LIKE_REQUESTS = 10


@dataclass(frozen=True, slots=True)
class _Asked:
    """One request of a session. ``at_ms`` is from the session's start."""

    where: str
    at_ms: int
    names: list[int]
    input_tokens: int
    output_tokens: int
    kind: str


@dataclass(frozen=True, slots=True)
class _Session:
    where: str
    file_bytes: int
    start_ms: int
    """-1: not said."""
    block_tokens: int
    is_global: bool
    shared: tuple[int, int]
    """Tokens of tools and of the system prompt."""
    requests: list[_Asked]

    @property
    def beginning(self) -> tuple[tuple[int, int], ...]:
        return tuple((each.input_tokens, each.output_tokens) for each in self.requests[:_LIKE_REQUESTS])


def read_tester(
    path: Path, *, spread_s: float = SPREAD_S, seed: int = 1, progress: Progress | None = None
) -> Trace:
    """The session in the file ``path``, or those in the folder. RAISES BadInput (bad_trace)."""
    if not 0 <= spread_s <= 1e8:
        raise bad(f"a spread of {spread_s} seconds", "0 to 1e8 is possible")
    random = Random(seed)
    merged, left_out = _Merged(), 0
    seen: set[tuple[object, ...]] = set()
    done = 0
    for file in _files(path):
        session = _session(file)
        done += session.file_bytes
        if progress is not None:
            progress(done)
        start_ms = session.start_ms if session.start_ms >= 0 else int(random.uniform(0, spread_s) * 1_000)
        if session.start_ms < 0 and session.beginning in seen:
            left_out += 1
            continue
        seen.add(session.beginning)
        merged.add(session, start_ms)
    made_up = f"starts made up over {spread_s:.0f} s; " if merged.made_up else ""
    return merged.trace(f"{path.name}: {merged.count} sessions, {made_up}{left_out} like others left out")


class _Merged:
    """Sessions become one trace: their names kept apart, or shared, as the files say."""

    def __init__(self) -> None:
        self.count = 0
        self.made_up = False
        self._rows: Rows | None = None
        self._block_tokens = 0
        self._scopes: dict[object, int] = {}

    def add(self, session: _Session, start_ms: int) -> None:
        """RAISES BadInput when its blocks are of another length than those before."""
        if self._rows is None:
            self._rows = Rows(session.block_tokens, prefix_names=False, sort=True)
            self._block_tokens = session.block_tokens
        if session.block_tokens != self._block_tokens:
            raise bad(
                f"block_size in {session.where} is {session.block_tokens}",
                f"in the sessions before it is {self._block_tokens}",
            )
        self.made_up |= session.start_ms < 0
        own = 0 if session.is_global else self._scope((session.where, "own"))
        shared = [] if session.is_global else self._shared(session)
        for each in session.requests:
            self._rows.add(
                each.where,
                start_ms + each.at_ms,
                shared[: len(each.names)] + [own | name for name in each.names[len(shared) :]],
                each.input_tokens,
                each.output_tokens,
                self.count,
                each.kind,
            )
        self.count += 1

    def _shared(self, session: _Session) -> list[int]:
        """The names of the blocks at the beginning that sessions like this one share."""
        scope = self._scope((session.shared, "shared"))
        return [scope | place for place in range(min(sum(session.shared) // self._block_tokens, SHARED_MAX))]

    def _scope(self, scope: object) -> int:
        """High bits that no other scope has. 0 is the one of all files."""
        return self._scopes.setdefault(scope, len(self._scopes) + 1) * NAME_MAX

    def trace(self, note: str) -> Trace:
        assert self._rows is not None
        return self._rows.trace(note)


def _files(path: Path) -> Sequence[Path]:
    if not path.is_dir():
        return [path]
    found = sorted(path.glob("*.json"))
    if not found:
        raise bad(f"{path} has no .json file", "a folder of sessions has one a session")
    if len(found) > FILES_MAX:
        raise bad(f"{path} has {len(found)} files", f"the limit is {FILES_MAX}")
    return found


def _session(path: Path) -> _Session:
    try:
        size = path.stat().st_size
        if size > FILE_BYTES_MAX:
            raise bad(f"{path} has {size} bytes", f"the limit is {FILE_BYTES_MAX}")
        fields = parsed(str(path), path.read_bytes())
    except OSError as error:
        raise bad(f"{path} cannot be read", str(error)) from error
    where = str(path)
    requests: list[_Asked] = []
    _collect(where, fields, 0, 0, requests)
    requests.sort(key=lambda each: each.at_ms)
    return _Session(
        where,
        size,
        seconds(where, fields, "start") if "start" in fields else -1,
        whole(where, fields, "block_size", BLOCK_TOKENS_MAX + 1, low=1),
        text(where, fields, "hash_id_scope", "local") == "global",
        (
            whole(where, {"tool_tokens": 0, **fields}, "tool_tokens"),
            whole(where, {"system_tokens": 0, **fields}, "system_tokens"),
        ),
        requests,
    )


def _collect(
    where: str, fields: Mapping[str, object], start_ms: int, depth: int, requests: list[_Asked]
) -> None:
    """The requests in ``fields``, and in the subagents among them."""
    listed = fields.get("requests")
    if not isinstance(listed, list):
        raise bad(f"{where} has no list of requests", "a session of kv-cache-tester has one")
    if depth > DEPTH_MAX:
        raise bad(f"{where}: subagents of subagents, {depth} deep", f"the limit is {DEPTH_MAX}")
    before_ms = 0
    for number, each in enumerate(listed):
        here = f"requests[{number}] in {where}"
        if not isinstance(each, dict):
            raise bad(f"{here} is no object", "each describes a request")
        if len(requests) >= REQUESTS_MAX:
            raise bad(f"{here}: too many requests", f"the limit is {REQUESTS_MAX}")
        at_ms = seconds(here, each, "t")
        if "requests" in each:
            _collect(here, each, start_ms + at_ms, depth + 1, requests)
            continue
        if at_ms < before_ms:
            raise bad(f"t in {here} is {at_ms} ms, before it {before_ms} ms", "time never runs back")
        before_ms = at_ms
        requests.append(_asked(here, each, start_ms + at_ms, depth))


def _asked(where: str, fields: Mapping[str, object], at_ms: int, depth: int) -> _Asked:
    found = names(where, fields)
    if len(set(found)) < len(found):
        raise bad(f"hash_ids in {where} name a block twice", "a prompt does not come back to a block")
    stop = text(where, fields, "stop", "other")
    return _Asked(
        where,
        at_ms,
        found,
        whole(where, fields, "in", LENGTH_MAX),
        whole(where, fields, "out", LENGTH_MAX),
        "subagent" if depth else stop,
    )


def tester_sessions(trace: Trace) -> Iterator[tuple[str, str]]:
    """Name and text of a file a session; requests of no session have one each. Numbers are of all files, and
    ``start`` says when it starts."""
    sessions: dict[int, list[int]] = {}
    for index, session in enumerate(trace.sessions):
        sessions.setdefault(session if session >= 0 else -1 - index, []).append(index)
    first_ms = trace.arrivals_ms[0] if trace.request_count else 0
    for number, indexes in enumerate(sessions.values()):
        start_ms = trace.arrivals_ms[indexes[0]]
        asked = [
            {
                "t": (request.arrival_ms - start_ms) / 1_000,
                "type": "n",
                "in": max(request.input_tokens, request.prompt_tokens),
                "out": request.output_tokens,
                "hash_ids": list(request.blocks),
                "stop": request.kind,
            }
            for request in map(trace.request, indexes)
        ]
        fields = {
            "id": f"trace_{number:05}",
            "block_size": trace.block_tokens,
            "hash_id_scope": "global",
            "start": (start_ms - first_ms) / 1_000,
            "requests": asked,
        }
        yield f"trace_{number:05}.json", json.dumps(fields)
