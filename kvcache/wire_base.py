"""What every message of the wire is built from: the common base, and the kinds of numbers in it."""

from __future__ import annotations

from typing import Annotated

import msgspec

Unsigned = Annotated[int, msgspec.Meta(ge=0)]
OrNone = Annotated[int, msgspec.Meta(ge=-1)]


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type"):
    """Base of all messages."""
