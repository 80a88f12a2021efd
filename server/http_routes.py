"""The table of routes: of a node's HTTP address, and of an index's. docs/http.md explains them."""

from __future__ import annotations

from kvcache.server import http_api as api
from kvcache.server import http_rfc1403 as rfc
from kvcache.server.http_api import READERS_OF_PLACES, Route

_EVERYBODY: frozenset[str] = frozenset()
_OPERATOR = frozenset({"operator"})
_LOCATE = "Which source holds how many leading blocks of a prompt?"
_BY_TOKENS = "RFC 1403: how much of these tokens has each instance?"
_BY_HASHES = "RFC 1403: how much of the blocks with these hashes has each instance?"

ROUTES: tuple[Route, ...] = (
    Route("GET", "/healthz", "healthz", "Is this process alive?", _EVERYBODY, None, api.Health),
    Route("GET", "/readyz", "readyz", "Can it answer?", _EVERYBODY, None, api.Readiness),
    Route("GET", "/metrics", "metrics", "Metrics for Prometheus.", READERS_OF_PLACES, None, None),
    Route("GET", "/openapi.json", "openapi", "This document.", READERS_OF_PLACES, None, None),
    Route("GET", "/v1/stats", "stats", "The node's numbers.", READERS_OF_PLACES, None, api.StatsReply),
    Route(
        "GET",
        "/v1/tuning",
        "tuning",
        "What evicts, and what would.",
        READERS_OF_PLACES,
        None,
        api.TuningReply,
    ),
    Route(
        "POST",
        "/v1/tuning",
        "tune",
        "Have another eviction policy decide.",
        _OPERATOR,
        api.TuningRequest,
        api.TuningReply,
    ),
    Route("POST", "/v1/locate", "locate", _LOCATE, READERS_OF_PLACES, api.LocateRequest, api.LocateReply),
    Route(
        "GET",
        "/v1/workers",
        "workers",
        "Who is followed, and how.",
        READERS_OF_PLACES,
        None,
        api.WorkersReply,
    ),
    Route(
        "POST",
        "/v1/placements",
        "placements",
        "A request was sent there: predict its blocks.",
        READERS_OF_PLACES,
        api.PlacementRequest,
        api.PlacementReply,
    ),
    Route("GET", "/health", "health", "RFC 1403: 200, and nothing else.", _EVERYBODY, None, None),
    Route(
        "POST",
        "/register",
        "register",
        "RFC 1403: follow an engine's events.",
        _OPERATOR,
        rfc.RegisterRequest,
        rfc.Registered,
    ),
    Route(
        "POST",
        "/unregister",
        "unregister",
        "RFC 1403: follow them no more.",
        _OPERATOR,
        rfc.UnregisterRequest,
        rfc.Registered,
    ),
    Route("POST", "/query", "query", _BY_TOKENS, READERS_OF_PLACES, rfc.QueryRequest, rfc.ByTenant),
    Route(
        "POST",
        "/query_by_hash",
        "query_by_hash",
        _BY_HASHES,
        READERS_OF_PLACES,
        rfc.HashRequest,
        rfc.ByTenant,
    ),
    Route(
        "GET", "/workers", "rfc_workers", "RFC 1403: who is registered.", READERS_OF_PLACES, None, rfc.Listed
    ),
    Route("GET", "/dump", "dump", "RFC 1403: what they hold, in pages.", READERS_OF_PLACES, None, rfc.Listed),
)
