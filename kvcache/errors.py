"""The error family. Few classes: a miss or a shortage is a value, not an error.

Each error says what happened, why, and what to do, and carries a code that is the same in logs,
replies, HTTP bodies and metric labels. ``CODES`` lists every code; docs/errors.md explains each.
"""

from __future__ import annotations

import os

CODES: dict[str, str] = {
    "bad_frame": "the bytes on the wire are not a frame of this protocol",
    "bad_version": "the peer speaks a protocol version that this side does not",
    "bad_message": "the frame is well formed, its content is not a known message",
    "bad_config": "a setting is unknown or out of range",
    "bad_credentials": "the credentials file cannot be used",
    "not_allowed": "the credential does not allow this (also said of what does not exist)",
    "unknown_namespace": "no such namespace was opened here",
    "namespace_differs": "a namespace field differs from what was expected",
    "bad_block": "a block has the wrong length or shape",
    "bad_slice": "a part of a block that does not exist, or cannot be had for certain",
    "bad_prefix": "a prefix is malformed or skips a parent",
    "bad_reservation": "the reservation is unknown, already ended, or another's",
    "bad_lease": "the lease is unknown, already ended, or another's",
    "bad_holder": "the index has no such holder, or not any more",
    "unknown_model": "no worker of the fleet serves this model",
    "bad_weights": "nothing identifies the model's weights",
    "bad_trace": "a trace file cannot be read",
    "bad_tier": "a directory of the NVMe tier cannot be used as it is",
    "too_small": "the capacity cannot hold one block",
    "too_large": "the request is over a written limit",
    "address_in_use": "another process already serves this address",
    "unsafe_slab": "the shared memory that was offered could be taken away under its user",
    "unsafe_bind": "a wider bind than loopback without a credential",
    "unsupported_engine": "the engine's configuration cannot be served correctly",
    "unavailable": "the store cannot be reached in time",
}


class KVCacheError(Exception):
    """Something the caller must know. ``what`` happened, ``why``, and what ``todo`` about it."""

    def __init__(self, code: str, what: str, why: str = "", todo: str = "") -> None:
        assert code in CODES, code
        self.code = code
        self.what = what
        self.why = why
        self.todo = todo
        super().__init__(code, what, why, todo)

    def __str__(self) -> str:
        parts = [f"{self.what} [{self.code}]"]
        if self.why:
            parts.append(f"why: {self.why}")
        if self.todo:
            parts.append(f"to do: {self.todo}")
        return "; ".join(parts)


class BadInput(KVCacheError):
    """What was asked cannot be done as asked. Nothing stored was changed by asking."""


class NotAllowed(KVCacheError):
    """The credential does not reach so far. Says the same for what is missing."""


class Unavailable(KVCacheError):
    """The store could not be reached, or did not answer in time. The engine recomputes."""


def plainly(error: Exception) -> str:
    """What a library said, for a person: ``Permission denied: /run/x``, without numbers of the system."""
    if not isinstance(error, OSError) or not error.errno:
        return str(error) or type(error).__name__
    # Errors of looking up names are negative; those of asyncio repeat in many words what was asked.
    words = os.strerror(error.errno) if error.errno > 0 else f"{error.strerror}"
    return f"{words}: {error.filename}" if error.filename else words
