"""The key of a data address: how an address carries it, and how two sides prove that they know it.

A node makes a random key when it starts. Its data address bears it, ``tcp://host:port#hex``, and the
control channel tells that address only to whom it has authenticated: so who is to come has the key, and a
stranger has not. The key itself is never sent over what it opens, and never logged (``shown``).

    who connects                                  who listens
    opening: what he wants, and a nonce   ─►
                                          ◄─      challenge: a nonce
    proof as who connects                 ─►      wrong: it is closed, and nothing more is said
    wrong: it is closed                   ◄─      proof as who listens

A proof is a keyed BLAKE2b of all that both have said, which holds both nonces: nothing of another connection
fits. The role is in it: nobody's proof is good for the other direction. Who comes proves first, so a stranger
gets nothing made with the key. What follows is as safe as the path: who can change packets on it can wait for
the proofs and go on in their place.

An empty key proves nothing, to anybody who has an empty one too. The sum: 2 us a proof, two round trips.
"""

from __future__ import annotations

import hmac
import secrets
from hashlib import blake2b

from kvcache.errors import BadInput

KEY_BYTES = 32
KEY_BYTES_MIN = 16
KEY_BYTES_MAX = 64
NONCE_BYTES = 32
PROOF_BYTES = 32

CONNECTS = b"kvcache connects"
LISTENS = b"kvcache listens "

_MARK = "#"


def new_key() -> bytes:
    return secrets.token_bytes(KEY_BYTES)


def new_nonce() -> bytes:
    return secrets.token_bytes(NONCE_BYTES)


def is_key(key: bytes) -> bool:
    """Empty, or long enough that nobody guesses it."""
    return not key or KEY_BYTES_MIN <= len(key) <= KEY_BYTES_MAX


def with_key(address: str, key: bytes) -> str:
    """REQUIRES: ``address`` has no key yet."""
    return f"{address}{_MARK}{key.hex()}" if key else address


def split_key(address: str) -> tuple[str, bytes]:
    """The address for the system, and the key (empty: none). RAISES BadInput, without the key in it."""
    where, mark, text = address.partition(_MARK)
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if mark and not (key and is_key(key)):
        raise BadInput(
            "bad_config",
            f"the key behind {where} cannot be one",
            f"it is {2 * KEY_BYTES_MIN} to {2 * KEY_BYTES_MAX} hex digits",
            "give the address as the node told it",
        )
    return where, key


def shown(address: str) -> str:
    """For logs and errors."""
    return address.partition(_MARK)[0]


def proof(key: bytes, role: bytes, said: bytes) -> bytes:
    """``role``: ``CONNECTS`` or ``LISTENS``, whose proof it is. ``said``: opening and challenge, whole.

    REQUIRES: both have a fixed length."""
    return blake2b(said, digest_size=PROOF_BYTES, key=key, person=role).digest()


def is_proof(given: bytes | bytearray, key: bytes, role: bytes, said: bytes) -> bool:
    return hmac.compare_digest(bytes(given), proof(key, role, said))
