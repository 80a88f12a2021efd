"""Opening namespaces at a node, the first time and again after every reconnect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kvcache.block import BlockSpec, NamespaceId
from kvcache.client.link import Context
from kvcache.client.steps import Operation, ask
from kvcache.client.store import Handle
from kvcache.errors import BadInput, KVCacheError, Unavailable
from kvcache.namespace import Namespace
from kvcache.wire import Open, Opened


def open_namespace(context: Context, namespace: Namespace, spec: BlockSpec) -> Operation[Handle]:
    """RAISES BadInput, NotAllowed, Unavailable."""
    welcome = context.link.welcome
    mine = replace(namespace, tenant=namespace.tenant or welcome.tenant)
    reply = yield from ask(Opened, Open(mine.to_map(), spec.plane_count, spec.head_count, spec.head_bytes))
    handle = Handle(
        mine, spec, mine.namespace_id(), mine.root(welcome.tenant_key), welcome.tenant_key, reply.verdict
    )
    sizes = (reply.block_bytes, reply.chunk_bytes)
    if reply.namespace != handle.namespace_id or sizes != (spec.block_bytes, spec.chunk_bytes):
        raise BadInput(
            "namespace_differs",
            f"the node calls this namespace {reply.namespace.hex()}, with blocks of {sizes}",
            f"here it is {handle.namespace_id.hex()}, with {(spec.block_bytes, spec.chunk_bytes)}",
            "run the same release of kvcache on both sides",
        )
    return handle


def reopen(context: Context, handles: Sequence[Handle]) -> Operation[frozenset[NamespaceId]]:
    """Open again what was open on the connection before. Returns those that mean the same as before."""
    same: set[NamespaceId] = set()
    for handle in handles:
        try:
            now = yield from open_namespace(context, handle.namespace, handle.spec)
        except Unavailable:
            raise
        except KVCacheError:
            continue
        if (now.namespace_id, now.tenant_key) == (handle.namespace_id, handle.tenant_key):
            same.add(handle.namespace_id)
    return frozenset(same)
