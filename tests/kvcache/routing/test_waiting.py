"""What waits is told again in time, once more at its end, and never for ever."""

from __future__ import annotations

from kvcache.clock import NS_PER_S
from kvcache.locality import PLACE_NS
from kvcache.routing.telemetry import REQUEST_NS_MAX, REQUESTS_MAX
from kvcache.routing.waiting import AGAIN_NS, DUE_MAX, Waiting


def test_it_is_told_again_before_it_ends_and_once_more_with_its_first_token() -> None:
    assert AGAIN_NS < PLACE_NS
    waiting: Waiting[str] = Waiting()
    waiting.begin(1, ["a", "b"], 0)
    waiting.begin(2, ["c"], NS_PER_S)
    waiting.begin(3, [], NS_PER_S)
    assert waiting.due(AGAIN_NS - 1) == []
    assert waiting.due(AGAIN_NS) == ["a", "b"]
    assert waiting.due(AGAIN_NS) == []
    assert waiting.due(AGAIN_NS + NS_PER_S) == ["c"]
    assert waiting.due(2 * AGAIN_NS) == ["a", "b"]
    assert waiting.first_token(1) == ["a", "b"] and waiting.first_token(1) == ()
    waiting.end(2)
    waiting.end(2)
    assert waiting.due(9 * AGAIN_NS) == [] and len(waiting) == 0


def test_there_are_limits() -> None:
    waiting: Waiting[int] = Waiting()
    for number in range(REQUESTS_MAX + 10):
        waiting.begin(number, [number], 0)
    assert len(waiting) == REQUESTS_MAX
    assert len(waiting.due(AGAIN_NS)) == DUE_MAX
    while waiting.due(REQUEST_NS_MAX - 1):
        pass
    assert len(waiting) == REQUESTS_MAX
    for _ in range(-(-REQUESTS_MAX // DUE_MAX)):
        assert waiting.due(REQUEST_NS_MAX - 1 + AGAIN_NS) == []
    assert len(waiting) == 0
