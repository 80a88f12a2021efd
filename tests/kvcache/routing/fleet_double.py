"""A fleet whose index is filled by hand: workers with engines of their own events, and with nodes."""

from __future__ import annotations

from array import array

from kvcache.block import NamespaceId, chain, hints, pack_tokens
from kvcache.credentials import Credentials
from kvcache.fleet import Fleet, Worker, engine_source
from kvcache.locality import LocalityIndex
from kvcache.namespace import Namespace
from kvcache.sequence import PUBLIC, sequence_hashes
from kvcache.wire import BlockEvent, EventBatch

TOKENS = list(range(1_000, 1_320))
"""20 blocks of 16."""
BLOCK = 16
S = 1_000_000_000

ENGINE = Namespace(
    model="m", weights="any", dtype="any", layout=PUBLIC, block_tokens=BLOCK, shape="any", tenant="default"
)


def node_space(**fields: str | int) -> Namespace:
    values: dict[str, str | int] = {
        "model": "org/m",
        "weights": "w1",
        "dtype": "bf16",
        "layout": "canonical",
        "block_tokens": BLOCK,
        "shape": "2x2x64",
        "tenant": "default",
    }
    return Namespace(**{**values, **fields})  # type: ignore[arg-type]


NODE = node_space()


def names(space: Namespace, tokens: list[int] = TOKENS) -> bytes:
    """The hints of all full blocks, as this namespace names them."""
    if space.layout == PUBLIC:
        return bytes(sequence_hashes(array("I", tokens), space.block_tokens))
    key = Credentials.default().tenant_key(space.tenant)
    return hints(chain(space.root(key), key, pack_tokens(tokens), space.block_tokens))


class Told:
    """An index, and what sources tell it."""

    def __init__(self) -> None:
        self.index = LocalityIndex(1 << 22)
        self._seqs: dict[str, int] = {}

    def starts(self, source: str, *spaces: Namespace, now_ns: int = 0) -> None:
        """It tells that it holds nothing yet, and in which namespaces."""
        self._seqs[source] = 1
        told = [each.to_map() for each in spaces]
        self.index.apply(EventBatch(source, 1, 1, True, [], namespaces=told), now_ns)

    def holds(
        self,
        source: str,
        space: Namespace,
        blocks: int,
        tier: str = "hbm",
        tokens: list[int] = TOKENS,
        now_ns: int = 0,
        load: dict[str, float] | None = None,
    ) -> None:
        """It stored the first so many blocks of the prompt in this tier."""
        if source not in self._seqs:
            self.starts(source, space, now_ns=now_ns)
        self._seqs[source] += 1
        event = BlockEvent("stored", space.namespace_id(), tier, hashes=names(space, tokens)[: 8 * blocks])
        batch = EventBatch(source, 1, self._seqs[source], False, [event], load=load or {})
        self.index.apply(batch, now_ns)


def fleet(*names: str, node: bool = False) -> Fleet:
    """Workers with engines of their own events; with ``node``, each also with a node of its own."""
    return Fleet.of(
        [
            Worker(
                name=name,
                url=f"http://127.0.0.1:{8000 + number}",
                model="m",
                weights="w1",
                events=f"tcp://127.0.0.1:{5000 + number}",
                sources=(f"node-{name}",) if node else (),
            )
            for number, name in enumerate(names)
        ]
    )


def engine(name: str) -> str:
    return engine_source(name)


def ids(*spaces: Namespace) -> list[NamespaceId]:
    return [each.namespace_id() for each in spaces]
