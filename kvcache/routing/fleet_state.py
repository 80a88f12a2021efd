"""All that a router knows of its fleet, and the steps of one choice. Decides; whoever has it does.

    request ──ask──► Asked ──view.find (may take time)──► Found ──choose──► Routed
                                                                              │ begin, first_token, end
                                                                              └ failed: again, without it

What goes wrong is said in the choice's notes and never raised: without an index, or with one that knows
nothing of these workers, the choice is *blind* (``kvcache.routing.choose``): the session's worker, else the
least loaded, else in turn. A suspect or old source counts for less; a worker that does not answer is passed
over, unless all are.

The sum: for 64 workers 0.1 ms for the choice and 0.2 ms around it, and the names of the prompt's blocks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from kvcache.block import NamespaceId, pack_tokens
from kvcache.errors import BadInput
from kvcache.fleet import ENGINE_SOURCE, Fleet, Role, Worker
from kvcache.locality import Located
from kvcache.namespace import Namespace
from kvcache.routing.choose import Choice, Chooser, Explained
from kvcache.routing.cost import Candidate
from kvcache.routing.health import Health
from kvcache.routing.holdings import Ranks, Usable, usable
from kvcache.routing.names import Query, Scheme, TenantKey, counts_for, is_model_of, queries, scheme_of
from kvcache.routing.telemetry import Loads
from kvcache.routing.view import Found, SourceState, View
from kvcache.routing.weights import Weights
from kvcache.sequence import PUBLIC

NOTES_MAX = 8
MODELS_MAX = 1_024


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, and what to ask the index about it. ``role``: what the worker is wanted for. ``tenant``:
    whose workers may serve it; empty: any."""

    model: str
    prompt_tokens: int
    queries: tuple[Query, ...]
    session: str
    role: Role
    tenant: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Placement:
    """What to tell the index of a choice: these blocks will be there soon."""

    source: str
    namespace: NamespaceId
    hints: bytes


@dataclass(frozen=True, slots=True)
class Routed:
    """Where a request goes, and why. ``notes``: what was not as it should be, in plain words."""

    worker: Worker
    asked: Asked
    choice: Choice
    notes: tuple[str, ...]
    placements: tuple[Placement, ...]

    @property
    def why(self) -> str:
        """The choice in one sentence, then the notes."""
        return "; ".join((self.choice.why, *self.notes))

    def explanation(self) -> tuple[Explained, ...]:
        """Every candidate with its terms, the cheapest first."""
        return self.choice.explanation()


class NoWorker(BadInput):
    """No worker of the fleet serves this, or none is left that was not tried."""


class FleetState:
    """One owner; every call returns at once; reads no clock."""

    def __init__(self, fleet: Fleet, weights: Weights, tenant_key: TenantKey, seed: int = 0) -> None:
        self.loads = Loads()
        self.health = Health()
        self.chooser = Chooser(weights, seed)
        self._tenant_key = tenant_key
        self._ranks = Ranks()
        self._workers: tuple[Worker, ...] = ()
        self._namespaces: Mapping[NamespaceId, Namespace] = {}
        self._schemes: OrderedDict[str, dict[Scheme, frozenset[NamespaceId]]] = OrderedDict()
        self.replace(fleet)

    @property
    def workers(self) -> tuple[Worker, ...]:
        return self._workers

    def replace(self, fleet: Fleet) -> None:
        """Other workers from now on. What is known of those that stay is kept."""
        self._workers = fleet.worker
        self._schemes.clear()
        names = [each.name for each in fleet.worker]
        self.loads.keep(names)
        self.health.keep(names)

    def ask(
        self,
        view: View,
        model: str,
        tokens: Sequence[int] | bytes | None,
        *,
        prompt_tokens: int = 0,
        session: str = "",
        role: Role = "any",
        tenant: str = "",
    ) -> Asked:
        """What to ask the index. ``tokens`` None: they are not known, only about how many they are.
        RAISES BadInput for what are no tokens."""
        if tokens is None:
            note = "the prompt's tokens are not known, so the index was not asked"
            return Asked(model, max(0, prompt_tokens), (), session, role, tenant, (note,))
        packed = tokens if isinstance(tokens, bytes) else pack_tokens(tokens)
        asked = queries(packed, self._of_model(view, model), self._tenant_key)
        return Asked(model, len(packed) // 4, asked, session, role, tenant)

    def ask_hints(
        self, model: str, queries: Sequence[Query], prompt_tokens: int, session: str = "", role: Role = "any"
    ) -> Asked:
        """The same for who has named the blocks already."""
        return Asked(model, prompt_tokens, tuple(queries), session, role)

    def choose(
        self,
        asked: Asked,
        found: Found,
        view: View,
        now_ns: int,
        *,
        avoid: Collection[str] = (),
        url_needed: bool = False,
    ) -> Routed:
        """RAISES NoWorker when the fleet has none for this model and role, or only ones to ``avoid``."""
        serving = self._serving(asked, avoid, url_needed)
        workers, notes = self._alive(serving, now_ns)
        sources = {each.name: view.sources_of(each) for each in workers}
        self._hear(workers, sources, found.sources)
        blind, why_blind = self._blind(asked, found, sources)
        notes = [*asked.notes, *why_blind, *notes]
        by_source = [_by_source(rows) for rows in found.rows] if not blind else []
        candidates = []
        for worker in workers:
            names = sources[worker.name]
            has = Usable()
            if not blind:
                has = usable(worker, names, asked.queries, by_source, view.namespaces(), self._ranks)
            candidates.append(self._candidate(worker, names, has, found.sources, now_ns))
        choice = self.chooser.choose(asked.prompt_tokens, candidates, asked.session, blind=blind)
        chosen = next(each for each in workers if each.name == choice.worker)
        if not blind and choice.candidate.suspect:
            notes.append(f"what {chosen.name} holds is suspect: the stream of its events broke")
        placements = self._placements(chosen, sources[chosen.name], asked, view)
        return Routed(chosen, asked, choice, tuple(notes[:NOTES_MAX]), placements)

    def begin(self, routed: Routed, now_ns: int) -> int:
        """The request goes there now. Returns its number for ``loads.first_token`` and ``loads.end``."""
        has = routed.choice.candidate
        tokens = routed.asked.prompt_tokens
        uncached = max(0, tokens - sum(has.cached) - has.placed)
        return self.loads.begin(routed.worker.name, uncached, tokens, now_ns)

    # --- who may serve it -----------------------------------------------------------------------

    def serving(self, model: str, role: Role | None = "any", tenant: str = "") -> list[Worker]:
        """The workers that a request for this model may go to."""
        found = [each for each in self._workers if serves(each, model, role)]
        return [each for each in found if each.tenant == tenant] if tenant else found

    def _serving(self, asked: Asked, avoid: Collection[str], url_needed: bool) -> list[Worker]:
        serving = self.serving(asked.model, asked.role, asked.tenant)
        if url_needed:
            serving = [each for each in serving if each.url]
        left = [each for each in serving if each.name not in avoid] if avoid else serving
        if not left:
            why = "all that do were tried" if serving else f"the fleet has {len(self._workers)} workers"
            raise NoWorker(
                "unknown_model",
                f"no worker serves the model {asked.model[:120]!r} in the role {asked.role}",
                why,
                "see the file of workers",
            )
        return left

    def _alive(self, serving: list[Worker], now_ns: int) -> tuple[list[Worker], list[str]]:
        down = {each.name: why for each in serving if (why := self.health.why_down(each.name, now_ns))}
        if not down:
            return serving, []
        if len(down) == len(serving):
            return serving, ["no worker answered lately, so all are tried"]
        names = ", ".join(list(down)[:3]) + (", ..." if len(down) > 3 else "")
        return [each for each in serving if each.name not in down], [f"passed over, not answering: {names}"]

    # --- what is known of them ------------------------------------------------------------------

    def _hear(
        self,
        workers: Sequence[Worker],
        sources: Mapping[str, Sequence[str]],
        states: Mapping[str, SourceState],
    ) -> None:
        """What a node tells that several workers share is not of them: only a worker's own sources count."""
        shared = _shared(sources)
        for worker in workers:
            heard = None
            for source in sources[worker.name]:
                state = states.get(source)
                if state is not None and state.told is not None and source not in shared:
                    heard = state.told if heard is None else heard.and_of(state.told)
            if heard is not None:
                self.loads.told(worker.name, heard)

    def _blind(
        self, asked: Asked, found: Found, sources: Mapping[str, Sequence[str]]
    ) -> tuple[bool, list[str]]:
        if not asked.queries and asked.notes:
            return True, []  # Its own note says so.
        if found.trouble:
            return True, [f"without an index: {found.trouble}"]
        unknown = [
            name
            for name, names in sources.items()
            if not any(found.sources.get(each, _UNKNOWN).known for each in names)
        ]
        if len(unknown) == len(sources):
            return True, ["the index knows nothing of these workers"]
        if unknown:
            text = ", ".join(unknown[:3]) + (", ..." if len(unknown) > 3 else "")
            return False, [f"the index knows nothing of {text}"]
        return False, []

    def _candidate(
        self,
        worker: Worker,
        sources: Sequence[str],
        has: Usable,
        states: Mapping[str, SourceState],
        now_ns: int,
    ) -> Candidate:
        load = self.loads.estimate(worker.name, now_ns)
        known = [state for each in sources if (state := states.get(each)) is not None and state.known]
        return Candidate(
            worker=worker.name,
            cached=has.cached,
            placed=has.placed,
            suspect=any(state.suspect for state in known),
            age_ms=max((state.age_ms for state in known), default=0.0),
            waiting_prefill_tokens=load.waiting_prefill_tokens,
            backlog_tokens=load.backlog_tokens,
            running=load.running,
            waiting=load.waiting,
            decode_tokens=load.decode_tokens,
            free_share=load.free_share,
        )

    # --- names and placements -------------------------------------------------------------------

    def _of_model(self, view: View, model: str) -> dict[Scheme, frozenset[NamespaceId]]:
        """The schemes that workers of this model need, remembered until namespaces or workers change."""
        namespaces = view.namespaces()
        if namespaces is not self._namespaces:
            self._namespaces = namespaces
            self._schemes.clear()
        known = self._schemes.get(model)
        if known is None:
            known = self._schemes[model] = self._grouped(namespaces, model)
            if len(self._schemes) > MODELS_MAX:
                self._schemes.popitem(last=False)
        return known

    def _grouped(
        self, namespaces: Mapping[NamespaceId, Namespace], model: str
    ) -> dict[Scheme, frozenset[NamespaceId]]:
        workers = [each for each in self._workers if serves(each, model, None)]
        kinds = list(
            {(each.tenant, each.adapter, each.weights, each.model): each for each in workers}.values()
        )
        found: dict[Scheme, set[NamespaceId]] = {}
        for namespace_id, namespace in namespaces.items():
            if any(counts_for(each, namespace) for each in kinds):
                found.setdefault(scheme_of(namespace, self._tenant_key), set()).add(namespace_id)
        return {scheme: frozenset(ids) for scheme, ids in found.items()}

    def _placements(
        self, worker: Worker, sources: Sequence[str], asked: Asked, view: View
    ) -> tuple[Placement, ...]:
        """In the namespaces of the worker's own engine; without its events, in those that its first source
        was seen to have blocks in."""
        if not sources:
            return ()
        source = next((each for each in sources if each.startswith(ENGINE_SOURCE)), sources[0])
        namespaces = view.namespaces()
        placements = []
        for query in asked.queries:
            for namespace_id in query.namespaces:
                namespace = namespaces.get(namespace_id)
                if namespace is not None and self._stores(worker, source, namespace_id, namespace):
                    placements.append(Placement(source, namespace_id, query.hints))
        return tuple(placements)

    def _stores(self, worker: Worker, source: str, namespace_id: NamespaceId, namespace: Namespace) -> bool:
        if not counts_for(worker, namespace):
            return False
        if namespace.layout == PUBLIC:
            return source.startswith(ENGINE_SOURCE) and is_model_of(worker, namespace)
        return self._ranks.has(source, self._ranks.shape(namespace_id, namespace), namespace_id)


_UNKNOWN = SourceState(known=False)


def serves(worker: Worker, model: str, role: Role | None) -> bool:
    """A worker without a model serves any; a request in the role any goes where answers come from."""
    if worker.model and model and worker.model != model:
        return False
    if role is None or worker.role == "any" or worker.role == role:
        return True
    return role == "any" and worker.role == "decode"


def _shared(sources: Mapping[str, Sequence[str]]) -> frozenset[str]:
    seen: set[str] = set()
    twice: set[str] = set()
    for names in sources.values():
        for name in set(names):
            (twice if name in seen else seen).add(name)
    return frozenset(twice)


def _by_source(rows: Sequence[Located]) -> dict[str, list[Located]]:
    found: dict[str, list[Located]] = {}
    for held in rows:
        found.setdefault(held.source, []).append(held)
    return found
