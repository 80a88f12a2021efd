"""What an engine's blocks are called in the index, so that a router can call them the same.

    namespace   model, adapter, tokens a block, and what else is told apart (``Space``)
    name        kvcache.sequence: XXH3-64 of a block's tokens and its *extra bytes*, chained

The extra bytes of a block are what it depends on besides the tokens before its end, in the order in
which the engine tells it, as ``block.extra_keys`` encodes parts, each its tag and its value:

    salt     UTF-8 of the request's cache salt; in the first block only
    mm       8 bytes, little-endian, signed: where the item begins, counted from the block's first token;
             then UTF-8 of the item's identifier
    embeds   the digest of given embeddings
    key      the number of any other key, 8 bytes, little-endian, signed

The adapter is in the namespace and not among them. Nothing besides tokens: no bytes. Whoever asks for a
prompt with a salt passes ``salted(salt)`` to ``kvcache.sequence.sequence_hashes``.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvcache.block import extra_keys
from kvcache.errors import BadInput
from kvcache.namespace import Namespace
from kvcache.sequence import PUBLIC

ANY = "any"
"""What a public namespace says of dtype, shape and unknown weights: names do not depend on them."""

Key = str | bytes | int | Sequence[object]


@dataclass(frozen=True, slots=True)
class Space:
    """What an event says of its blocks' namespace. Empty: it did not say."""

    block_tokens: int
    adapter: str = ""
    model: str = ""
    salt: str = ""
    """Of a deployment, as RFC 1527 has it (``additional_salt``): weights, a way of quantising."""
    tenant: str = ""


Namespaces = Callable[[Space], Namespace]
"""Which namespace that is. RAISES BadInput when it cannot be said."""


def public_namespaces(
    model: str, weights: str = "", adapter: str = "", salt: str = "", tenant: str = ""
) -> Namespaces:
    """The namespaces of an engine that serves ``model``. What its events say stands before what is given
    here, but for the tenant, which only the one who runs the engine can know."""

    def namespace(space: Space) -> Namespace:
        return public_namespace(
            model=space.model or model,
            weights=weights,
            adapter=space.adapter or adapter,
            salt=space.salt or salt,
            tenant=tenant or space.tenant,
            block_tokens=space.block_tokens,
        )

    return namespace


def public_namespace(
    model: str, block_tokens: int, weights: str = "", adapter: str = "", salt: str = "", tenant: str = ""
) -> Namespace:
    """Where blocks have public names. A deployment's salt is part of ``weights``. RAISES BadInput."""
    return Namespace(
        model=model,
        weights="+".join(part for part in (weights, salt) if part) or ANY,
        dtype=ANY,
        layout=PUBLIC,
        block_tokens=block_tokens,
        shape=ANY,
        adapter=adapter,
        tenant=tenant,
    )


def salted(salt: str) -> tuple[bytes, ...]:
    """The extra bytes of the blocks of a prompt of tokens only, under this cache salt (empty: none)."""
    return (extra_keys([("salt", salt.encode())]),) if salt else ()


def extra_bytes(keys: Sequence[Key]) -> bytes:
    """Of a block's keys, as an engine tells them: a string is the salt, a pair an item and its beginning.
    RAISES BadInput for a key of another form."""
    return extra_keys([_part(key) for key in keys])


def shown(value: object) -> str:
    """The beginning of what was told, for a message; of a million lists in one another, too."""
    return reprlib.repr(value)[:60]


def _part(key: Key) -> tuple[str, bytes]:
    if isinstance(key, str):
        return "salt", _utf8(key)
    if isinstance(key, bytes):
        return "embeds", key
    if isinstance(key, int):
        return "key", _signed(key)
    if len(key) == 2 and isinstance(key[0], str) and isinstance(key[1], int):
        return "mm", _signed(key[1]) + _utf8(key[0])
    raise _bad(f"an extra key {shown(key)}")


def _signed(number: int) -> bytes:
    try:
        return number.to_bytes(8, "little", signed=True)
    except OverflowError as error:
        raise _bad(f"an extra key of {number}") from error


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise _bad("an extra key that is no valid text") from error


def _bad(what: str) -> BadInput:
    return BadInput("bad_message", what, "no engine known here tells such a one", "see docs/engine-events.md")
