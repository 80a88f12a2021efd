"""``kv_transfer_params``: how a prompt is handed from the engine that prefills it to the one that decodes.

    router ── {"kvcache": {"v": 1, "do": "prefill", "push_to": "node-b"}} ──────────► engine at node-a
    router ◄─ {"kvcache": {"v": 1, "do": "decode", "source": "node-a", "blocks": 40, "tokens": 1280,
                           "pushed": true}} ────────────────────────────────────────── its response
    router ── the same, as it is ───────────────────────────────────────────────────► engine at node-b

Nodes are named, never addressed: where a node is its peers know. ``do_remote_decode`` and
``do_remote_prefill``, the words of vLLM's own proxies, are understood, and answered in kind.

Beside that, or alone, the part says what is known of the request: ``hint``, ``session``, ``priority``,
``gap_ms``, ``keep_ms`` (``kvcache.request_hints``), for the node's eviction policy.

What cannot be understood is ignored, counted, and costs the head start: an ordinary look-up follows. No
engine import, and nothing here raises: the params come from outside. The page is docs/prefill-decode.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

from kvcache.errors import BadInput
from kvcache.request_hints import UNKNOWN, RequestHints, session_number

KEY: Final = "kvcache"
VERSION: Final = 1
NAME_CHARS_MAX: Final = 255
WAIT_MS_MAX: Final = 600_000

Plain: TypeAlias = str | int | bool
Params: TypeAlias = dict[str, bool | dict[str, Plain]]


@dataclass(frozen=True, slots=True)
class Handoff:
    """What the params of one request ask for.

    ``do``: ``prefill`` (answer where the blocks are), ``decode`` (``block_count`` leading blocks are at the
    node ``source``, or soon will be; -1 and empty: not said), or empty. ``wait_ms`` is how long they are
    worth waiting for; -1: as the engine is set. ``hints`` are for the eviction policy. ``flagged``: it was
    asked in vLLM's words. ``ignored`` is why our part was left out, if it was.
    """

    do: str = ""
    push_to: str = ""
    source: str = ""
    block_count: int = -1
    pushed: bool = False
    wait_ms: int = -1
    flagged: bool = False
    ignored: str = ""
    hints: RequestHints = UNKNOWN

    @property
    def promised(self) -> int:
        """So many leading blocks will be there, as far as is known; a number beyond any prompt: all."""
        if not self.source:
            return 0
        return self.block_count if self.block_count >= 0 else 1 << 31

    def covers(self, block_count: int) -> bool:
        """So many are all that the source has, for certain: more of them will not come."""
        return bool(self.source) and 0 <= self.block_count <= block_count


def read(params: object) -> Handoff:
    """The params as a router sent them; None: none."""
    if params is None:
        return Handoff()
    if not isinstance(params, Mapping):
        return Handoff(ignored="garbage")
    flags = tuple(params.get(name) is True for name in ("do_remote_decode", "do_remote_prefill"))
    ours, ignored = _part(params.get(KEY))
    hints = _hints(ours)
    if hints is None:
        ours, ignored, hints = {}, "garbage", UNKNOWN
    flagged = flags[0]
    do = str(ours.get("do", "")) or ("prefill" if flags[0] else "decode" if flags[1] else "")
    if do == "prefill":
        push_to = str(ours.get("push_to", ""))
        return Handoff(do, push_to=push_to, flagged=flagged, ignored=ignored, hints=hints)
    if do == "decode":
        blocks = int(ours.get("blocks", -1))
        source = str(ours.get("source", "")) if blocks else ""  # 0: nothing was saved there.
        pushed = bool(source) and bool(ours.get("pushed"))
        wait_ms = int(ours.get("wait_ms", -1))
        return Handoff(
            do,
            source=source,
            block_count=blocks,
            pushed=pushed,
            wait_ms=wait_ms,
            ignored=ignored,
            hints=hints,
        )
    return Handoff(ignored=ignored, hints=hints)


def answer(asked: Handoff, node: str, block_count: int, block_tokens: int) -> Params | None:
    """What the engine that prefilled says: ``block_count`` leading blocks of the prompt are at ``node``, or
    soon will be. None: nothing was asked, or there is nothing to say."""
    if asked.do != "prefill":
        return None
    params: Params = {"do_remote_prefill": True, "do_remote_decode": False} if asked.flagged else {}
    if node and block_count:
        params[KEY] = {
            "v": VERSION,
            "do": "decode",
            "source": node,
            "blocks": block_count,
            "tokens": block_count * block_tokens,
            "pushed": asked.push_to not in ("", node),
        }
    return params or None


_KINDS: Final[Mapping[str, type[Plain]]] = {
    "push_to": str,
    "source": str,
    "pushed": bool,
    "blocks": int,
    "wait_ms": int,
}
"""The fields that are read, beside the hints. Others are left alone: a later release may send more."""

_HINTS: Final = ("hint", "priority", "session", "gap_ms", "keep_ms")


def _part(ours: object) -> tuple[Mapping[str, Plain], str]:
    """(our part when it can be relied on, else nothing; why it was ignored)."""
    if ours is None:
        return {}, ""
    if not isinstance(ours, Mapping):
        return {}, "garbage"
    version = ours.get("v")
    if type(version) is int and version != VERSION:
        return {}, "version"
    does = ours.get("do") in ("prefill", "decode")
    right = type(version) is int and (does or ("do" not in ours and any(name in ours for name in _HINTS)))
    return (
        (ours, "")
        if right and all(_fits(name, ours[name]) for name in _KINDS if name in ours)
        else ({}, "garbage")
    )


def _fits(name: str, value: object) -> bool:
    if type(value) is not _KINDS[name]:
        return False
    if isinstance(value, str):
        return len(value) <= NAME_CHARS_MAX and value.isprintable()
    return 0 <= int(value) <= (WAIT_MS_MAX if name == "wait_ms" else 1 << 31)


def _hints(ours: Mapping[str, object]) -> RequestHints | None:
    """What the part says of the request; None: something that cannot be."""
    said = {name: ours[name] for name in _HINTS if name in ours}
    session = said.get("session")
    if isinstance(session, str):
        if len(session) > NAME_CHARS_MAX:
            return None
        said["session"] = session_number(session)
    try:
        return RequestHints(**said)  # type: ignore[arg-type]  # It checks each by itself.
    except (BadInput, TypeError):
        return None
