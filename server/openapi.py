"""The OpenAPI 3.1 document of a node's HTTP address, made from the routes and their structs."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from kvcache import __version__
from kvcache.server.http_api import Problem, Route

_REFERENCE = "#/components/schemas/{name}"


def document(routes: Sequence[Route]) -> bytes:
    """The document as JSON, the same for the same routes."""
    used = [kind for route in routes for kind in (route.request, route.reply) if kind is not None]
    schemas = msgspec.json.schema_components([*used, Problem], ref_template=_REFERENCE)[1]
    paths: dict[str, dict[str, object]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {
                "title": "kvcache node",
                "version": __version__,
                "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            },
            "paths": paths,
            "components": {
                "schemas": schemas,
                "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            },
        },
        order="deterministic",
    )


def _operation(route: Route) -> dict[str, object]:
    operation: dict[str, object] = {
        "operationId": route.name,
        "summary": route.summary,
        "responses": {"200": _success(route), "default": _content("application/problem+json", Problem)},
        # A token is needed only where the node has a credentials file.
        "security": [{}, {"token": []}] if route.roles else [],
    }
    if route.name == "readyz":
        operation["responses"] = {"200": _success(route), "503": _success(route)}
    if route.request is not None:
        operation["requestBody"] = {"required": True, **_content("application/json", route.request)}
    return operation


def _success(route: Route) -> dict[str, object]:
    if route.reply is not None:
        return _content("application/json", route.reply)
    kind = "application/json" if route.path.endswith(".json") else "text/plain"
    return {"description": route.summary, "content": {kind: {}}}


def _content(kind: str, struct: type[msgspec.Struct]) -> dict[str, object]:
    schema = {"$ref": _REFERENCE.format(name=struct.__name__)}
    return {"description": struct.__name__, "content": {kind: {"schema": schema}}}
