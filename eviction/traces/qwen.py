"""Traces as Qwen-Bailian publishes them (qwen-bailian-usagetraces-anon, ATC 25): a JSON object a line.

    {"chat_id": 159, "parent_chat_id": 55, "timestamp": 61.114, "input_length": 521, "output_length": 132,
     "type": "text", "turn": 2, "hash_ids": [1089, 1090, ..., 13148]}

Seconds, tokens, and a number a block of 16 tokens. The number names what the block says, so the same one may
stand behind different parents, and a block here is a number behind a parent. A chat whose parent is in the
file belongs to its parent's session; one whose parent was cut off begins a session. A chat that is its own
parent, or comes before it, is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from kvcache.eviction.traces.rows import (
    LENGTH_MAX,
    NAME_MAX,
    Fit,
    Progress,
    Rows,
    bad,
    names,
    objects,
    seconds,
    text,
    whole,
)
from kvcache.eviction.traces.trace import Trace

BLOCK_TOKENS = 16


def read_qwen(
    path: Path, block_tokens: int = 0, *, sort: bool = False, progress: Progress | None = None
) -> Trace:
    """The trace in ``path``; ``block_tokens`` 0: as published. RAISES BadInput (bad_trace)."""
    full = block_tokens or BLOCK_TOKENS
    rows = Rows(full, prefix_names=False, sort=sort, fit=Fit(full, is_assumed=not block_tokens))
    chats = _Chats(sort)
    for where, fields in objects(path, progress):
        chat = whole(where, fields, "chat_id", NAME_MAX)
        parent = whole(where, {"parent_chat_id": -1, **fields}, "parent_chat_id", NAME_MAX, low=-1)
        whole(where, {"turn": 1, **fields}, "turn")
        rows.add(
            where,
            seconds(where, fields, "timestamp"),
            names(where, fields),
            whole(where, fields, "input_length", LENGTH_MAX),
            whole(where, fields, "output_length", LENGTH_MAX),
            chats.session(where, chat, parent),
            text(where, fields, "type", "unknown"),
        )
    chats.check(path)
    return rows.trace(path.name)


class _Chats:
    """Which session a chat belongs to: that of its parent, else one of its own."""

    def __init__(self, any_order: bool) -> None:
        self._any_order = any_order
        self._sessions: dict[int, int] = {}
        self._orphans: dict[int, int] = {}  # By the parent that is not there: they are one session, too.
        self._cut: dict[int, str] = {}
        self._parents: dict[int, int] = {}  # In any order, where a circle can only be seen at the end.
        self._count = 0

    def session(self, where: str, chat: int, parent: int) -> int:
        if chat == parent:
            raise bad(f"parent_chat_id in {where} is {parent}", "that is this chat itself")
        if chat in self._sessions:
            raise bad(f"chat_id in {where} is {chat}", "an earlier line has it too")
        if chat in self._cut and not self._any_order:
            raise bad(
                f"parent_chat_id in {self._cut[chat]} is {chat}",
                f"that chat comes later, in {where}: a parent comes before its children",
                "if only the order is wrong, kvcache trace convert --sort mends it",
            )
        found = self._sessions.get(parent, self._orphans.get(parent, self._orphans.get(chat, -1)))
        if found < 0:
            found, self._count = self._count, self._count + 1
            if parent >= 0:
                self._orphans[parent] = found
                self._cut[parent] = where
        self._sessions[chat] = found
        if self._any_order and parent >= 0:
            self._parents[chat] = parent
        return found

    def check(self, path: Path) -> None:
        """RAISES BadInput for chats that go on from one another in a circle."""
        sound: set[int] = set()
        for chat in self._parents:
            seen: set[int] = set()
            while chat in self._parents and chat not in sound:
                if chat in seen:
                    raise bad(f"parent_chat_id of chat {chat} in {path}", "in the end it goes on from itself")
                seen.add(chat)
                chat = self._parents[chat]
            sound |= seen


def qwen_lines(trace: Trace) -> Iterator[str]:
    """``trace`` in this form, time from 0. Whoever reads it has to know the length of its blocks."""
    start = trace.arrivals_ms[0] if trace.request_count else 0
    newest: dict[int, tuple[int, int]] = {}
    for request in trace.requests():
        parent, turn = newest.get(request.session, (-1, 0)) if request.session >= 0 else (-1, 0)
        newest[request.session] = request.index, turn + 1
        yield json.dumps(
            {
                "chat_id": request.index,
                "parent_chat_id": parent,
                "timestamp": (request.arrival_ms - start) / 1_000,
                "input_length": max(request.input_tokens, request.prompt_tokens),
                "output_length": request.output_tokens,
                "type": request.kind or "unknown",
                "turn": turn + 1,
                "hash_ids": list(request.blocks),
            }
        )
