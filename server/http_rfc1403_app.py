"""The paths of RFC 1403 over HTTP: who is registered, and answers in the dialect of the request.

Errors on these paths are ``{"error": "what happened"}``, as clients of the other indexers expect; only who
may not ask at all is told so as anywhere else. Registering makes this process connect to an address, so it
takes the role operator.

With a credentials file a tenant may only be named by its own credential, and for others there is nothing
here. Without one there is nobody to keep apart, and a tenant is a label.

The sum: 0.3 ms a query of 1,024 hashes, nearly all of it HTTP and JSON.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from http import HTTPStatus
from typing import TypeVar

import msgspec
from aiohttp import web

from kvcache.credentials import DEFAULT_TENANT, Credential, Credentials
from kvcache.errors import BadInput
from kvcache.fleet import Engine, Stream, Worker
from kvcache.locality import TIERS
from kvcache.sequence import PUBLIC
from kvcache.server import http_api as api
from kvcache.server import http_rfc1403 as rfc
from kvcache.server.fleet_index import FleetIndex

Handler = Callable[[web.Request, Credential], Awaitable[web.StreamResponse]]
T = TypeVar("T", bound=rfc.Asked)

NEXT = "X-Kvcache-Next"
DUMP_BLOCKS = 262_144
"""Blocks in a page of ``/dump``, but that a page ends between two instances."""
EVENT_BLOCKS = 1_024
_ENGINES: dict[str, Engine] = {
    "vllm": "vllm",
    "sglang": "sglang",
    "mooncake": "rfc1527",
    "rfc1527": "rfc1527",
}
_TIERS = dict(zip(TIERS, ("device", "host_pinned", "disk"), strict=True))


class Rfc1403:
    """Answers from a fleet's index, and registers with it."""

    def __init__(self, fleet: FleetIndex, credentials: Credentials) -> None:
        self._fleet = fleet
        self._is_open = credentials.anonymous is not None
        self._instances: dict[str, rfc.Instance] = {}
        """As they were registered, by the worker's name."""
        self._known: list[rfc.Member] = []
        self._version = -1

    def handlers(self) -> dict[str, Handler]:
        """By the names of the routes."""
        handlers: dict[str, Handler] = {
            "register": self._register,
            "unregister": self._unregister,
            "query": self._query,
            "query_by_hash": self._query_by_hash,
            "rfc_workers": self._workers,
            "dump": self._dump,
            "health": self._health,
        }
        return {name: _spoken(handler) for name, handler in handlers.items()}

    async def _register(self, request: web.Request, credential: Credential) -> web.Response:
        asked = await _body(request, rfc.RegisterRequest)
        tenant = self._tenant(asked, credential)
        if tenant is None:
            raise _Refused("no such tenant", HTTPStatus.NOT_FOUND)
        rank = asked.dp_rank or 0
        worker = _worker(asked, tenant, rank)
        if worker.name in self._fleet.workers:
            said = f"instance {asked.instance_id} dp_rank {rank} already registered"
            raise _Refused(said, HTTPStatus.CONFLICT)
        self._instances[worker.name] = asked.instance_id
        try:
            self._fleet.add(worker)
        except BadInput:
            del self._instances[worker.name]
            raise
        if asked.model_name:
            return _json({"status": "ok"}, HTTPStatus.CREATED)
        return _json({"status": "registered successfully", "instance_id": asked.instance_id})

    async def _unregister(self, request: web.Request, credential: Credential) -> web.Response:
        asked = await _body(request, rfc.UnregisterRequest)
        tenant = self._tenant(asked, credential)
        gone = [
            each.worker
            for each in self._members()
            if str(each.instance) == str(asked.instance_id) and each.worker.tenant == tenant
            if asked.dp_rank is None or (each.worker.rank, each.worker.ranks) == (asked.dp_rank, 1)
            if each.worker.model == (asked.model_name or asked.modelname)
        ]
        if not gone:
            raise _Refused(f"instance {asked.instance_id} not found", HTTPStatus.NOT_FOUND)
        for worker in gone:
            self._instances.pop(worker.name, None)
            await self._fleet.remove(worker.name)
        if asked.model_name:
            return _json({"status": "ok"})
        removed = [f"{asked.instance_id}|{worker.tenant}|{worker.rank}" for worker in gone]
        return _json({"status": "unregistered successfully", "removed_instances": removed})

    async def _query(self, request: web.Request, credential: Credential) -> web.Response:
        return self._answer(await _body(request, rfc.QueryRequest), credential)

    async def _query_by_hash(self, request: web.Request, credential: Credential) -> web.Response:
        return self._answer(await _body(request, rfc.HashRequest), credential)

    def _answer(self, asked: rfc.QueryRequest | rfc.HashRequest, credential: Credential) -> web.Response:
        tenant = self._tenant(asked, credential)
        members = rfc.chosen(self._members(), asked, tenant) if tenant is not None else []
        if asked.model_name and not members:
            group = asked.tenant or DEFAULT_TENANT
            said = f"no indexer for model={asked.model_name} routing_group={group}"
            raise _Refused(said, HTTPStatus.NOT_FOUND)
        found = rfc.hits(self._fleet.index, members, asked, tenant or "", rfc.prefixes(asked))
        if asked.model_name:
            return _json(rfc.as_dynamo(found))
        return _json(rfc.as_mooncake(found, asked.tenant or tenant or DEFAULT_TENANT))

    async def _workers(self, request: web.Request, credential: Credential) -> web.Response:
        connected = {each.source: each.connected for each in self._fleet.followed()}
        listed: dict[tuple[str, str, str], dict[str, object]] = {}
        for member in self._members(credential):
            worker = member.worker
            ranks = {
                str(stream.rank): {
                    "endpoint": stream.events,
                    "status": "active" if connected[stream.source] else "pending",
                }
                for stream in worker.streams()
            }
            key = str(member.instance), worker.model, worker.tenant
            listed[key] = _joined(listed.get(key), member, ranks)
        return _json(list(listed.values()))

    async def _dump(self, request: web.Request, credential: Credential) -> web.StreamResponse:
        """Page by page: the next begins ``?after=`` what the header ``X-Kvcache-Next`` says."""
        members = sorted(self._members(credential), key=lambda each: each.worker.name)
        after = request.query.get("after", "")
        page: list[rfc.Member] = []
        blocks = 0
        for member in members:
            if member.worker.name > after and blocks < DUMP_BLOCKS:
                page.append(member)
                blocks += sum(
                    self._fleet.index.entries_of(stream.source) for stream in member.worker.streams()
                )
        response = web.StreamResponse(headers={**api.HEADERS, "Content-Type": "application/json"})
        if page and page[-1] is not members[-1]:
            response.headers[NEXT] = page[-1].worker.name
        await response.prepare(request)
        try:
            async for piece in self._told(page):
                await response.write(piece)
        except (
            BaseException
        ):  # What has begun cannot become another answer; nor may a part pass for the whole.
            if request.transport is not None:
                request.transport.abort()
            raise
        return response

    async def _health(self, request: web.Request, _: Credential) -> web.Response:
        return web.Response()

    async def _told(self, page: list[rfc.Member]) -> AsyncIterator[bytes]:
        """``{"model:tenant": {"block_size": ..., "events": [...]}}``, in pieces."""
        groups: dict[str, list[rfc.Member]] = {}
        for member in page:
            groups.setdefault(f"{member.worker.model}:{member.worker.tenant}", []).append(member)
        before = b"{"
        for name, members in groups.items():
            size = max(each.worker.block_tokens for each in members)
            yield before + msgspec.json.encode(name) + b':{"block_size":%d,"events":[' % size
            comma = b""
            for member in members:
                for stream in member.worker.streams():
                    for event in self._events(member.instance, stream):
                        yield comma + msgspec.json.encode(event)
                        comma = b","
            yield b"]}"
            before = b","
        yield b"}" if groups else b"{}"

    def _events(self, instance: rfc.Instance, stream: Stream) -> Iterable[dict[str, object]]:
        index, number = self._fleet.index, 0
        for each in index.known_namespaces():
            namespace = index.namespace(each)
            if namespace is None or namespace.layout != PUBLIC:
                continue
            for tier in TIERS:
                held = index.held(stream.source, each, tier)
                for at in range(0, len(held), EVENT_BLOCKS):
                    blocks = [{"block_hash": name} for name in held[at : at + EVENT_BLOCKS]]
                    stored = {"parent_hash": None, "start_position": None, "blocks": blocks}
                    yield {
                        "worker_id": instance,
                        "storage_tier": _TIERS[tier],
                        "residency_domain": "worker",
                        "event": {"event_id": number, "data": {"stored": stored}},
                        "dp_rank": stream.rank,
                    }
                    number += 1

    def _members(self, credential: Credential | None = None) -> list[rfc.Member]:
        """Workers whose engines' events are followed, of the credential's tenant where there are several."""
        if self._version != self._fleet.version:
            self._version = self._fleet.version
            self._known = [
                rfc.Member(
                    self._instances.get(name, name),
                    worker,
                    tuple((stream.rank, stream.source) for stream in worker.streams()),
                )
                for name, worker in self._fleet.workers.items()
                if worker.events
            ]
        if credential is None or self._is_open:
            return self._known
        return [each for each in self._known if each.worker.tenant == credential.tenant]

    def _tenant(self, asked: rfc.Asked, credential: Credential) -> str | None:
        """Whom the request is for; None: for somebody else."""
        if self._is_open:
            return asked.tenant or DEFAULT_TENANT
        return credential.tenant if asked.tenant in ("", credential.tenant) else None


def _worker(asked: rfc.RegisterRequest, tenant: str, rank: int) -> Worker:
    """RAISES _Refused for an engine that is not known here."""
    engine = _ENGINES.get(asked.type.lower())
    if engine is None:
        raise _Refused(f"type: {asked.type[:40]!r} is none of {', '.join(_ENGINES)}")
    if not (asked.model_name or asked.modelname):
        raise _Refused("missing field `model_name`")
    instance = str(asked.instance_id)
    # What follows the last @ is the tenant, so that nobody takes a name that another's instance would have.
    whose = "" if tenant == DEFAULT_TENANT and "@" not in instance else f"@{tenant}"
    fields = {
        "name": f"{instance}{whose}" + (f"/{rank}" if rank else ""),
        "model": asked.model_name or asked.modelname,
        "events": asked.endpoint,
        "replay": asked.replay_endpoint or "",
        "engine": engine,
        "block_tokens": asked.block_size,
        "adapter": asked.lora_name or "",
        "salt": asked.additionalsalt,
        "tenant": tenant,
        "rank": rank,
    }
    try:
        return msgspec.convert(fields, Worker)
    except msgspec.ValidationError as error:
        raise _Refused(str(error)) from error


class _Refused(Exception):
    """To be answered in the words of the other indexers."""

    def __init__(self, said: str, status: HTTPStatus = HTTPStatus.UNPROCESSABLE_ENTITY) -> None:
        super().__init__(said)
        self.said, self.status = said, status


def _spoken(handler: Handler) -> Handler:
    async def spoken(request: web.Request, credential: Credential) -> web.StreamResponse:
        try:
            return await handler(request, credential)
        except _Refused as error:
            return _json({"error": error.said}, error.status)
        except BadInput as error:
            return _json({"error": str(error)}, HTTPStatus.UNPROCESSABLE_ENTITY)

    return spoken


async def _body(request: web.Request, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(await request.read(), type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _Refused(f"Failed to read the JSON body: {error!s:.200}") from error


def _joined(
    former: Mapping[str, object] | None, member: rfc.Member, ranks: Mapping[str, Mapping[str, str]]
) -> dict[str, object]:
    """An instance is told once, with the ranks of all workers that were registered for it."""
    told = former["listeners"] if former is not None else {}
    assert isinstance(told, dict)
    listeners = {**told, **ranks}
    return {
        "instance_id": member.instance,
        "source": "zmq",
        "status": "active" if all(each["status"] == "active" for each in listeners.values()) else "pending",
        "model_name": member.worker.model,
        "routing_group": member.worker.tenant,
        "block_size": member.worker.block_tokens,
        "endpoints": {rank: each["endpoint"] for rank, each in listeners.items()},
        "listeners": listeners,
    }


def _json(answer: object, status: HTTPStatus = HTTPStatus.OK) -> web.Response:
    return web.Response(body=msgspec.json.encode(answer), status=status, content_type="application/json")
