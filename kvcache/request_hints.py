"""What an engine or a router knows of a request that helps to choose what to keep: all optional, all perhaps
wrong, none of it trusted for anything but that choice.

    engine, router ── RequestHints ──► TakeLease, Reserve ──► RequestContext ──► the eviction policy

They go with the look-up of a prompt and with the saves behind it. Numbers are bounded here, on both sides of
the wire, so that no policy meets one that it cannot reckon with.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import Final, Protocol

from kvcache.errors import BadInput
from kvcache.policy import HINTS, PRIORITY_MAX, RequestContext

AHEAD_MS_MAX: Final = 7 * 24 * 3_600_000
SESSION_MAX: Final = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class RequestHints:
    """``hint``: how the request ends, as far as is known (``policy.HINTS``); ``priority``: 0 to 100, 50 is
    ordinary; ``session``: requests of one conversation have one number (``session_number``);
    ``gap_ms``: when its blocks may be wanted again; ``keep_ms``: how long they are worth keeping. -1 says
    nothing.

    RAISES BadInput (bad_message) for what is none of these."""

    hint: str = "unknown"
    priority: int = 50
    session: int = -1
    gap_ms: int = -1
    keep_ms: int = -1

    def __post_init__(self) -> None:
        if self.hint not in HINTS:
            raise BadInput("bad_message", f"hint {self.hint!r:.40}", f"hints are {', '.join(HINTS)}")
        for name, value, low, high in (
            ("priority", self.priority, 0, PRIORITY_MAX),
            ("session", self.session, -1, SESSION_MAX),
            ("gap_ms", self.gap_ms, -1, AHEAD_MS_MAX),
            ("keep_ms", self.keep_ms, -1, AHEAD_MS_MAX),
        ):
            if type(value) is not int or not low <= value <= high:
                raise BadInput("bad_message", f"{name} is {value!r:.40}", f"it is from {low} to {high}")

    def context(self, now_ns: int, tenant: str, prompt_tokens: int = 0) -> RequestContext:
        """What the policy is told."""
        return RequestContext(
            now_ns=now_ns,
            tenant=tenant,
            session=self.session,
            prompt_tokens=prompt_tokens,
            hint=self.hint,
            priority=self.priority,
            expected_gap_ms=self.gap_ms if self.gap_ms >= 0 else None,
            keep_ms=self.keep_ms if self.keep_ms >= 0 else None,
        )


UNKNOWN: Final = RequestHints()


class Hinted(Protocol):
    """A message that carries them."""

    @property
    def hint(self) -> str: ...
    @property
    def priority(self) -> int: ...
    @property
    def session(self) -> int: ...
    @property
    def gap_ms(self) -> int: ...
    @property
    def keep_ms(self) -> int: ...


def hints_of(message: Hinted) -> RequestHints:
    """What came with a message. Times beyond ``AHEAD_MS_MAX`` are cut to it, as earlier clients did not bound
    them. RAISES BadInput (bad_message)."""
    gap_ms, keep_ms = min(message.gap_ms, AHEAD_MS_MAX), min(message.keep_ms, AHEAD_MS_MAX)
    session = message.session & SESSION_MAX if message.session > SESSION_MAX else message.session
    return RequestHints(message.hint, message.priority, session, gap_ms, keep_ms)


def session_number(name: str) -> int:
    """The number of a session that has a name."""
    digest = blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8, person=b"kvcache.session").digest()
    return int.from_bytes(digest, "little") & SESSION_MAX
