"""The peers of a node, as its settings name them, put together with what brings blocks from them."""

from __future__ import annotations

from collections.abc import Sequence

from kvcache.block import HASH_BYTES, BlockSpec, NamespaceId, StorageKey
from kvcache.clock import NS_PER_MS
from kvcache.credentials import read_private
from kvcache.errors import BadInput
from kvcache.namespace import Namespace
from kvcache.peers.cut import Cuts
from kvcache.peers.directory import Directory
from kvcache.peers.fetch import Fetcher, Rules
from kvcache.peers.heat import Heat
from kvcache.peers.peer import Here
from kvcache.peers.push import Pusher, Pushing
from kvcache.peers.receive import Around, Receiver
from kvcache.peers.replicate import Budget, Replicator
from kvcache.server.core import Core


def join(core: Core, here: Here) -> None:
    """Let the node bring blocks from the peers of its settings. RAISES BadInput for what is no address."""
    config, bringing = core.config, core.bringing
    directory = Directory(config.peer_addresses, here, core.plane, core.sum_chunks, core.clock)
    bringing.directory = directory

    def namespace(namespace_id: NamespaceId) -> Namespace | None:
        known = core.namespaces.spec_of(namespace_id)
        return None if known is None else Namespace.from_map(known[1])

    def known(namespace_id: NamespaceId) -> tuple[Namespace, BlockSpec] | None:
        found = core.namespaces.spec_of(namespace_id)
        return None if found is None else (Namespace.from_map(found[1]), found[0])

    fetcher = bringing.fetcher = Fetcher(
        core.ledger,
        core.host,
        Cuts(directory, namespace, core.sum_chunks, core.clock, core.counters),
        Rules(config.peer_wait_ms * NS_PER_MS, config.peer_keep == "keep"),
        core.clock,
        core.counters,
        core.settle,
        bringing.committed,
    )
    bringing.receiver = Receiver(
        Around(
            core.ledger,
            core.host,
            core.clock,
            core.counters,
            core.settle,
            bringing.committed,
            core.sum_chunks,
            directory.named,
            namespace,
            fetcher,
            config.peer_keep == "keep",
        )
    )
    pusher = bringing.pusher = Pusher(
        Pushing(core.ledger, core.host, core.clock, core.counters, core.settle, directory.named, known)
    )
    if config.replicate_bytes_s:
        bringing.replicator = _replicator(core, directory, pusher)


def _replicator(core: Core, directory: Directory, pusher: Pusher) -> Replicator:
    def path_to(key: StorageKey) -> list[StorageKey]:
        return list(core.ledger.ancestors(key))[::-1]

    def size_of(path: Sequence[StorageKey]) -> tuple[int, int]:
        found = core.namespaces.spec_of(NamespaceId(path[0][:HASH_BYTES]))
        assert found is not None, "a block of a namespace that nobody opened"
        return core.ledger.match(path), found[0].block_bytes

    return Replicator(
        Heat(core.config.replicate_hits),
        Budget(core.config.replicate_bytes_s),
        directory.lacking,
        path_to,
        size_of,
        pusher.copy,
        core.clock,
        core.counters,
    )


def peer_token(path: str) -> str:
    """What this node shows its peers: the one line of a file that only its user can read; empty without one.

    RAISES BadInput."""
    if not path:
        return ""
    try:
        token = read_private(path).decode("ascii").strip()
    except UnicodeDecodeError:
        token = ""
    if not token or len(token.split()) > 1:
        todo = "write the token alone into it"
        raise BadInput("bad_credentials", f"{path} holds no token", "it is one line of ASCII", todo)
    return token
