"""The front door of traces: what a file is, is read off its first bytes, whatever it is called.

    what                         looks like                               read by
    kvtrace-v1                   a zip archive (.npz)                     trace
    Mooncake                     JSON lines with hash_ids, timestamp      mooncake
    Qwen-Bailian                 JSON lines with hash_ids, chat_id        qwen
    kv-cache-tester              one JSON object with requests, a folder  tester
    recorder                     .kvrec files, a folder of them           recorded

What is none of these is refused with what it looks like instead.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kvcache.errors import BadInput, plainly
from kvcache.eviction.traces.edit import with_plain_words, with_used_blocks, with_whole_lengths
from kvcache.eviction.traces.mooncake import mooncake_lines, read_mooncake
from kvcache.eviction.traces.qwen import qwen_lines, read_qwen
from kvcache.eviction.traces.record_format import MAGIC, SUFFIX
from kvcache.eviction.traces.recorded import read_recorded
from kvcache.eviction.traces.rows import LINE_BYTES_MAX, Progress, bad
from kvcache.eviction.traces.tester import SPREAD_S, read_tester, tester_sessions
from kvcache.eviction.traces.trace import BLOCK_TOKENS_MAX, Trace, read_trace, write_trace

KVTRACE, MOONCAKE, QWEN, TESTER, RECORDED = "kvtrace-v1", "mooncake", "qwen", "kv-cache-tester", "recorder"
WRITABLE = (KVTRACE, MOONCAKE, QWEN, TESTER)
_TODO = "give a kvtrace-v1 .npz, JSON lines of Mooncake or Qwen-Bailian, JSON of kv-cache-tester, recordings"


@dataclass(frozen=True, slots=True)
class Reading:
    """How to read what a file does not say itself. ``block_tokens`` 0: what its format has."""

    block_tokens: int = 0
    sort: bool = False
    spread_s: float = SPREAD_S
    seed: int = 1


def open_trace(path: Path | str, reading: Reading | None = None, progress: Progress | None = None) -> Trace:
    """The trace in ``path``, in whichever format. ``progress`` hears how many of its ``bytes_of`` are read.

    RAISES BadInput (bad_trace) that names line or field."""
    path = Path(path)
    how = reading or Reading()
    if how.block_tokens and not 1 <= how.block_tokens <= BLOCK_TOKENS_MAX:
        raise BadInput(
            "bad_config", f"blocks of {how.block_tokens} tokens", f"1 to {BLOCK_TOKENS_MAX} are possible"
        )
    trace = _READERS[format_of(path)](path, how, progress)
    for step in (with_used_blocks, with_whole_lengths, with_plain_words):
        trace = step(trace)
    if not trace.request_count:
        raise bad(f"{path} has no requests", f"there is nothing else: {trace.note}", _TODO)
    return trace


_READERS: dict[str, Callable[[Path, Reading, Progress | None], Trace]] = {
    KVTRACE: lambda path, how, progress: read_trace(path, sort=how.sort),
    MOONCAKE: lambda path, how, progress: read_mooncake(
        path, how.block_tokens, sort=how.sort, progress=progress
    ),
    QWEN: lambda path, how, progress: read_qwen(path, how.block_tokens, sort=how.sort, progress=progress),
    RECORDED: lambda path, how, progress: read_recorded(path, progress),
    TESTER: lambda path, how, progress: read_tester(
        path, spread_s=how.spread_s, seed=how.seed, progress=progress
    ),
}


def bytes_of(path: Path) -> int:
    """Of the file, or of all in the folder; 0 of what is not there."""
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def format_of(path: Path) -> str:
    """One of the names above. RAISES BadInput (bad_trace) for what is none, with what it looks like."""
    if path.is_dir():
        return RECORDED if next(path.glob(f"*{SUFFIX}"), None) else TESTER
    if path.exists() and not path.is_file():
        raise bad(f"{path} cannot be read", "it is neither a file nor a folder")
    try:
        with path.open("rb") as stream:
            first = stream.readline(LINE_BYTES_MAX)
            while first and not first.strip():
                first = stream.readline(LINE_BYTES_MAX)
            more = bool(stream.read(1))
    except FileNotFoundError as error:
        raise bad(f"{path} is not there", "no file has this name", "check the path") from error
    except OSError as error:
        raise bad(f"{path} cannot be read", plainly(error)) from error
    if first.startswith(b"PK\x03\x04"):
        return KVTRACE
    if first.startswith(MAGIC):
        return RECORDED
    if first.lstrip().startswith(b"{"):
        return _json_format(path, first, more)
    raise bad(f"{path} is no trace that can be read", _looks_like(first), _TODO)


def _json_format(path: Path, first: bytes, more: bool) -> str:
    try:
        fields = json.loads(first)
    except (ValueError, RecursionError) as error:
        if path.suffix == ".jsonl" and more and len(first) == LINE_BYTES_MAX:
            raise bad(f"line 1 of {path} is too long", f"the limit is {LINE_BYTES_MAX} bytes") from error
        if path.suffix == ".jsonl":
            raise bad(f"line 1 of {path} is no JSON", str(error)[:200], "is the file whole?") from error
        if more:
            return TESTER  # One object over several lines; what is wrong with it, its reader says.
        raise bad(f"{path} is no JSON", str(error)[:200], "is the file whole?") from error
    keys = fields.keys() if isinstance(fields, dict) else set()
    if "requests" in keys:
        return TESTER
    if keys & {"chat_id", "parent_chat_id"}:
        return QWEN
    if keys & {"hash_ids", "timestamp", "input_length"}:
        return MOONCAKE
    said = ", ".join(sorted(map(str, keys))[:8])[:120] or "none"
    raise bad(f"{path} is no trace that can be read", f"its first line has the fields {said}", _TODO)


def _looks_like(first: bytes) -> str:
    if not first:
        return "it is empty"
    if first.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS, not the file itself: git lfs pull fetches that"
    if first.startswith(b"\x1f\x8b"):
        return "it is packed with gzip: gunzip it first"
    if first.startswith(b"\x93NUMPY"):
        return "it is one .npy array: a trace is an .npz archive of several"
    return f"it begins with {first[:16]!r}"


# --- writing ------------------------------------------------------------------------------------


def save_trace(path: Path, trace: Trace, form: str = "") -> str:
    """Write ``trace`` in the format ``form`` (empty: by the name of ``path``). The format's name.

    RAISES BadInput (bad_config) when it cannot be written there."""
    form = form or ("" if path.is_dir() else KVTRACE if path.suffix == ".npz" else "")
    if form not in WRITABLE:
        raise BadInput(
            "bad_config",
            f"the format {form!r}" if form else f"no format for {path}",
            f"there are {', '.join(WRITABLE)}",
            "give one with --format, or a name that ends in .npz",
        )
    try:
        if form == TESTER:
            _write_folder(path, tester_sessions(trace))
            return form
        with _whole_or_nothing(path) as part:
            if form == KVTRACE:
                write_trace(part, trace)
            else:
                _write_lines(part, mooncake_lines(trace) if form == MOONCAKE else qwen_lines(trace))
    except OSError as error:
        error.filename = path  # Its folder or a name beside it, which nobody asked for, else.
        raise BadInput(
            "bad_config", f"{path} cannot be written", plainly(error), "give another name"
        ) from error
    return form


@contextmanager
def _whole_or_nothing(path: Path) -> Iterator[Path]:
    """Where to write what is ``path`` once it is whole: what was there before stays until then."""
    path = path.resolve()
    if path.exists() and not path.is_file():
        yield path  # A pipe, or a terminal.
        return
    part = path.with_name(f".kvtrace-{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    with path.open("w") as stream:
        stream.writelines(f"{line}\n" for line in lines)


def _write_folder(path: Path, files: Iterable[tuple[str, str]]) -> None:
    path.mkdir(parents=True, exist_ok=True)
    if other := next((each for each in path.iterdir() if each.suffix in (".json", SUFFIX)), None):
        what = f"{path} has {other.name}"
        raise BadInput("bad_config", what, "all of a folder is read as one trace", "name an empty folder")
    for name, text in files:
        (path / name).write_text(text)
