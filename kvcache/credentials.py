"""Who may do what: tokens and users of a node, each with its tenant and roles.

The file is TOML, readable by its owner alone:

    master_key_file = "/etc/kvcache/master.key"      # 32 bytes or more; or master_key = "64 hex digits"

    [[credential]]
    token = "at least 16 characters"                 # or uid = 1000, for unix sockets
    tenant = "team-a"
    roles = ["reader", "writer"]                     # of reader, writer, router, operator, peer

The tenant comes from the credential, never from a message: its key is derived from the master key, and
names every block, so that tenants cannot meet even by guessing. ``peer`` is for other nodes, which move
blocks for everybody: only with it may a message say for which tenant, and it is told where bytes are moved
and the key to there. Nodes that are each other's peers have the same master key, or find nothing.

Without a file there is one tenant, ``default``, for the user that runs the node and, but for an operator's
work, for loopback; its key is derived from a master key that everybody can read below, which is right
because there is nobody to keep apart.
"""

from __future__ import annotations

import difflib
import hmac
import os
import re
import stat
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Annotated

import msgspec

from kvcache.block import TENANT_KEY_BYTES
from kvcache.errors import BadInput, plainly

ROLES = ("reader", "writer", "router", "operator", "peer")
DEFAULT_TENANT = "default"
TENANT_PATTERN = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
TOKEN_CHARS_MIN = 16
TOKEN_CHARS_MAX = 512
MASTER_KEY_BYTES_MIN = 32
FILE_BYTES_MAX = 1 << 20
TOKEN_PATTERN = re.compile(rf"[!-~]{{{TOKEN_CHARS_MIN},{TOKEN_CHARS_MAX}}}")

_DEFAULT_MASTER_KEY = b"kvcache: one user, one tenant, nobody to keep apart"
_PERSON = b"kvcache.tenant.1"


@dataclass(frozen=True, slots=True)
class Credential:
    """A tenant and what may be done for it."""

    tenant: str
    roles: frozenset[str]


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    tenant: str
    roles: list[str]
    token: str = ""
    uid: Annotated[int, msgspec.Meta(ge=0)] | None = None


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    credential: list[_Entry]
    master_key: str = ""
    master_key_file: str = ""


class Credentials:
    """The credentials of one node. Build with ``from_file`` or ``default``."""

    def __init__(
        self,
        tokens: Mapping[str, Credential],
        users: Mapping[int, Credential],
        anonymous: Credential | None,
        master_key: bytes,
    ) -> None:
        """``anonymous`` is for TCP from loopback without a token; None refuses it."""
        # Digests, so that comparing takes the same time whatever the tokens' lengths.
        self._tokens = [(_digest(token), credential) for token, credential in tokens.items()]
        self._users = dict(users)
        self._master_key = master_key
        self.anonymous = anonymous

    @classmethod
    def default(cls) -> Credentials:
        """No file: the user that runs the node may do everything, and loopback all but an operator's work,
        as one tenant: whoever comes over TCP without a token may be any user of this host."""
        everything = Credential(DEFAULT_TENANT, frozenset(ROLES))
        anybody = Credential(DEFAULT_TENANT, everything.roles - {"operator"})
        return cls({}, {os.getuid(): everything}, anybody, _DEFAULT_MASTER_KEY)

    @classmethod
    def named(cls, path: str) -> Credentials:
        """Those of the file that a setting names; the default if it names none. RAISES as ``from_file``."""
        return cls.from_file(path) if path else cls.default()

    @classmethod
    def from_file(cls, path: str | Path) -> Credentials:
        """RAISES BadInput (bad_credentials) that names the entry; never repeats a token."""
        parsed = _parse(Path(path))
        tokens: dict[str, Credential] = {}
        users: dict[int, Credential] = {}
        for number, entry in enumerate(parsed.credential, 1):
            credential = _credential(number, entry)
            if (entry.token != "") == (entry.uid is not None):
                raise _bad(f"credential {number} needs a token or a uid, and only one of them")
            if entry.token in tokens or entry.uid in users:
                raise _bad(f"credential {number} repeats the token or uid of another")
            if entry.uid is not None:
                users[entry.uid] = credential
            elif not TOKEN_PATTERN.fullmatch(entry.token):
                raise _bad(
                    f"the token of credential {number} is not {TOKEN_CHARS_MIN} to {TOKEN_CHARS_MAX} "
                    "visible ASCII characters",
                    "make one with: openssl rand -hex 32",
                )
            else:
                tokens[entry.token] = credential
        if not parsed.credential:
            raise _bad(f"{path} lists no credential: nobody could use this node")
        return cls(tokens, users, None, _master_key(parsed, Path(path)))

    @property
    def has_tokens(self) -> bool:
        return bool(self._tokens)

    def by_token(self, token: str) -> Credential | None:
        """Compares with every token, in constant time."""
        digest = _digest(token)
        found: Credential | None = None
        for known, credential in self._tokens:
            if hmac.compare_digest(known, digest):
                found = credential
        return found

    def by_uid(self, uid: int) -> Credential | None:
        return self._users.get(uid)

    def acting_for(self, credential: Credential, tenant: str) -> Credential | None:
        """The same rights for the tenant that a message names (empty: its own); None when they do not reach
        so far: without the role ``peer``, without a file (there is one tenant), or for what is no tenant."""
        if tenant in ("", credential.tenant):
            return credential
        may = "peer" in credential.roles and self.anonymous is None
        return Credential(tenant, credential.roles) if may and TENANT_PATTERN.fullmatch(tenant) else None

    def lists_other_users(self, uid: int) -> bool:
        return any(other != uid for other in self._users)

    def default_tenant(self, uid: int) -> str:
        """The tenant whose memory a node of this user takes at start."""
        known = self._users.get(uid)
        if known is not None:
            return known.tenant
        return self._tokens[0][1].tenant if self._tokens else DEFAULT_TENANT

    def tenant_key(self, tenant: str) -> bytes:
        """The key of the tenant's block names. Whoever has it can name the tenant's blocks."""
        key = blake2b(self._master_key, digest_size=TENANT_KEY_BYTES).digest()
        return blake2b(tenant.encode(), digest_size=TENANT_KEY_BYTES, key=key, person=_PERSON).digest()


def _parse(path: Path) -> _File:
    try:
        return msgspec.convert(tomllib.loads(read_private(path).decode()), _File)
    except msgspec.ValidationError as error:
        unknown = re.search(r"unknown field `(.*?)`", str(error))
        near = difflib.get_close_matches(unknown[1], _NAMES, 1) if unknown else []
        raise _bad(f"{path}: {error}", f"did you mean {near[0]!r}?" if near else _TODO) from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise _bad(f"{path} cannot be read: {error}") from error


_NAMES = sorted({*_File.__struct_fields__, *_Entry.__struct_fields__})


def read_private(path: str | Path) -> bytes:
    """The content of a file that nobody but us (and root) can read or write.

    What is checked is the file that was opened, not whatever bears its name a moment later.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # A FIFO must not hang us.
        try:
            _check_private(Path(path), os.fstat(descriptor))
            content = os.read(descriptor, FILE_BYTES_MAX + 1)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise _unread(f"{path} cannot be read", plainly(error)) from error
    if len(content) > FILE_BYTES_MAX:
        raise _unread(f"{path} is over {FILE_BYTES_MAX:,} bytes", "no file of tokens or keys is so long")
    return content


def _check_private(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise _unread(f"{path} is not a regular file", "secrets are kept in one")
    if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        mode = stat.S_IMODE(status.st_mode)
        raise _unread(
            f"others can read or write {path} (mode {mode:o})", "it holds secrets", f"run: chmod 600 {path}"
        )
    if status.st_uid not in (os.geteuid(), 0):
        why = f"this process runs as user {os.geteuid()}"
        raise _unread(f"{path} belongs to user {status.st_uid}", why, f"run: chown {os.geteuid()} {path}")


def _credential(number: int, entry: _Entry) -> Credential:
    if not TENANT_PATTERN.fullmatch(entry.tenant):
        raise _bad(f"the tenant of credential {number} does not match {TENANT_PATTERN.pattern}")
    wrong = sorted(set(entry.roles) - set(ROLES))
    if wrong or not entry.roles:
        raise _bad(
            f"credential {number} has the roles {wrong or 'of nobody'}", f"roles are {', '.join(ROLES)}"
        )
    return Credential(entry.tenant, frozenset(entry.roles))


def _master_key(parsed: _File, path: Path) -> bytes:
    if bool(parsed.master_key) == bool(parsed.master_key_file):
        raise _bad(f"{path} needs master_key or master_key_file, and only one of them", _TODO_KEY)
    try:
        if parsed.master_key_file:
            file = path.parent / parsed.master_key_file
            key = read_private(file)
        else:
            key = bytes.fromhex(parsed.master_key)
    except ValueError as error:
        raise _bad(f"the master key cannot be read: {error}", _TODO_KEY) from error
    if len(key) < MASTER_KEY_BYTES_MIN:
        raise _bad(f"the master key has {len(key)} bytes, under {MASTER_KEY_BYTES_MIN}", _TODO_KEY)
    return key


_TODO_KEY = "make one with: head -c 32 /dev/urandom > master.key; chmod 600 master.key"


def _digest(token: str) -> bytes:
    return blake2b(token.encode(errors="surrogatepass"), digest_size=32).digest()


_TODO = "see SECURITY.md for what the file holds"


def _bad(what: str, todo: str = _TODO) -> BadInput:
    return BadInput("bad_credentials", what, "the credentials file is used whole or not at all", todo)


def _unread(what: str, why: str, todo: str = "check its path and whose it is") -> BadInput:
    return BadInput("bad_credentials", what, why, todo)
