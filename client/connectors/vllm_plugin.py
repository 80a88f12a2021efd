"""Entry point ``vllm.general_plugins``: makes ``KVCacheConnector`` a name that vLLM knows.

vLLM calls it in every process, some more than once; the connector's own module is imported only when
a configuration names it.
"""

from __future__ import annotations

NAME = "KVCacheConnector"
MODULE = "kvcache.client.connectors.vllm"


def register() -> None:
    """Idempotent."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if NAME not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(NAME, MODULE, NAME)
