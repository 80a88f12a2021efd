"""The namespaces that clients opened at a node, and what is said of one that is new here.

One owner, the event loop's thread; every call returns at once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kvcache.block import BlockSpec, NamespaceId
from kvcache.config import NodeConfig
from kvcache.errors import BadInput
from kvcache.namespace import Namespace, spec_of_shape
from kvcache.wire import TEXT_CHARS_MAX

log = logging.getLogger("kvcache.server")

VERDICT_MATCHES = "stored blocks of this namespace are found and used"
VERDICT_CHARS_MAX = TEXT_CHARS_MAX // 4  # Four bytes a character at most, and the limit counts bytes.
VERDICT_FIRST = "nothing is stored for this model yet"


@dataclass(frozen=True, slots=True)
class Opened:
    """A namespace some client opened here."""

    namespace_id: NamespaceId
    namespace: Namespace
    spec: BlockSpec

    @property
    def tenant(self) -> str:
        return self.namespace.tenant


class Namespaces:
    """Those that blocks here may be of. At most ``namespaces_max``."""

    def __init__(self, config: NodeConfig, announce: Callable[[Namespace], None]) -> None:
        """``announce`` is told each that is new."""
        self._config = config
        self._announce = announce
        self._known: dict[NamespaceId, Opened] = {}

    def __len__(self) -> int:
        return len(self._known)

    def open(self, namespace: Namespace, spec: BlockSpec) -> tuple[Opened, str]:
        """Remember a namespace; idempotent. Returns it with a verdict in plain words.

        RAISES BadInput when there are too many, or when one block exceeds the tier."""
        opened = Opened(namespace.namespace_id(), namespace, spec)
        known = opened.namespace_id in self._known
        if not known:
            self._check_room(spec)
        verdict = self._verdict(opened)
        if not known:
            self._announce(namespace)
        self._known.setdefault(opened.namespace_id, opened)
        return self._known[opened.namespace_id], verdict

    def of(self, namespace_id: bytes, tenant: str) -> Opened:
        """RAISES BadInput in the same words for one that is missing and one that is another's."""
        opened = self._known.get(NamespaceId(namespace_id))
        if opened is None or opened.tenant != tenant:
            raise BadInput(
                "unknown_namespace",
                f"no namespace {namespace_id.hex() or '(empty)'} was opened here",
                "the node restarted, or it was never opened with this credential",
                "send Open first; the clients in kvcache.client do so by themselves",
            )
        return opened

    def remember(self, fields: Mapping[str, str | int]) -> None:
        """A namespace of blocks that were found on NVMe. One that is none, or too many, is not entered:
        its blocks are then not found before somebody opens it."""
        try:
            namespace = Namespace.from_map(fields)
            opened = Opened(namespace.namespace_id(), namespace, spec_of_shape(namespace))
        except BadInput as error:
            log.warning("a namespace on NVMe cannot be used: %s", error)
            return
        if opened.namespace_id not in self._known and len(self._known) < self._config.namespaces_max:
            self._announce(namespace)
            self._known[opened.namespace_id] = opened

    def spec_of(self, namespace_id: NamespaceId) -> tuple[BlockSpec, Mapping[str, str | int]] | None:
        """What blocks of this namespace are, None for one that nobody opened."""
        opened = self._known.get(namespace_id)
        return None if opened is None else (opened.spec, opened.namespace.to_map())

    def tenant_of(self, namespace_id: bytes) -> str:
        return self._known[NamespaceId(namespace_id)].tenant

    def _check_room(self, spec: BlockSpec) -> None:
        if len(self._known) >= self._config.namespaces_max:
            raise BadInput(
                "too_large",
                f"{len(self._known)} namespaces are open",
                "namespaces_max is reached",
                "raise namespaces_max, or restart the node to forget old ones",
            )
        if spec.block_bytes > self._config.capacity_bytes:
            raise BadInput(
                "too_small",
                f"the host tier has {self._config.capacity_bytes} bytes",
                f"one block of this namespace has {spec.block_bytes}",
                "start the node with a larger --capacity",
            )

    def _verdict(self, opened: Opened) -> str:
        if opened.namespace_id in self._known:
            return VERDICT_MATCHES
        near: list[list[str]] = [
            opened.namespace.differences(other.namespace)
            for other in self._known.values()
            if other.tenant == opened.tenant and other.namespace.model == opened.namespace.model
        ]
        if not near:
            return VERDICT_FIRST
        nearest: list[str] = min(near, key=len)
        return ("stored blocks of this model do not fit: " + "; ".join(nearest))[:VERDICT_CHARS_MAX]
