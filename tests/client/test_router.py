"""The router library: whom it sends a prompt to, what it says of it, and what it does without an index."""

from __future__ import annotations

import re
import runpy
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from kvcache.client.router import NoWorker, Query, Routed, Router
from kvcache.errors import BadInput
from kvcache.fleet import Fleet, Worker
from kvcache.locator import Locator
from kvcache.namespace import Namespace
from kvcache.routing.telemetry import REQUEST_NS_MAX
from kvcache.routing.weights import RANGES, Weights
from tests.kvcache.routing.fleet_double import (
    BLOCK,
    ENGINE,
    NODE,
    TOKENS,
    S,
    Told,
    engine,
    fleet,
    names,
    node_space,
)

DOCS = Path(__file__).parent.parent.parent / "docs"


@dataclass
class Clock:
    ns: int = 0

    def now_ns(self) -> int:
        return self.ns


def router(told: Told | None, workers: Fleet, clock: Clock | None = None, **weights: float) -> Router:
    return Router(
        workers,
        told.index if told is not None else None,
        Weights(**weights),  # type: ignore[arg-type]  # Plain numbers.
        clock=clock or Clock(),
    )


def cached(routed: Routed, worker: str) -> tuple[int, int, int]:
    return next(each.cached for each in routed.choice.candidates if each.worker == worker)


def placed(routed: Routed, worker: str) -> int:
    return next(each.placed for each in routed.choice.candidates if each.worker == worker)


def test_the_worker_that_holds_most_is_chosen_and_it_is_said_why() -> None:
    told = Told()
    told.holds(engine("a"), ENGINE, 5)
    told.holds(engine("b"), ENGINE, 15)
    told.starts(engine("c"), ENGINE)
    routed = router(told, fleet("a", "b", "c")).choose("m", TOKENS)
    assert routed.worker.name == "b" and routed.worker.url.startswith("http://")
    assert [cached(routed, name) for name in "abc"] == [(80, 0, 0), (240, 0, 0), (0, 0, 0)]
    assert routed.notes == () and "it has 240 of 320" in routed.why
    [first, *_] = routed.explanation()
    assert first.worker == "b" and first.cost == routed.choice.cost


def test_engine_and_node_are_put_together_in_tokens_and_by_tier() -> None:
    told = Told()
    told.holds(engine("a"), ENGINE, 8)
    told.holds("node-a", NODE, 10, "host")
    told.holds("node-a", NODE, 12, "nvme")
    told.starts(engine("b"), ENGINE)
    told.starts("node-b", NODE)
    routed = router(told, fleet("a", "b", node=True)).choose("m", TOKENS)
    assert cached(routed, "a") == (8 * BLOCK, 2 * BLOCK, 2 * BLOCK)


def test_blocks_of_another_length_count_in_tokens() -> None:
    told = Told()
    longer = node_space(block_tokens=64)
    told.holds(engine("a"), ENGINE, 3)
    told.holds("node-a", longer, 2, "host")
    routed = router(told, fleet("a", node=True)).choose("m", TOKENS)
    assert cached(routed, "a") == (48, 80, 0)


@pytest.mark.parametrize(
    "other",
    [node_space(model="org/other", weights="w2"), node_space(adapter="lora"), node_space(tenant="b")],
    ids=["model", "adapter", "tenant"],
)
def test_blocks_of_another_model_adapter_or_tenant_are_not_credited(other: Namespace) -> None:
    told = Told()
    told.starts(engine("a"), ENGINE)
    told.holds("node-a", other, 20, "host")
    # The same names in the other namespace: even then it is another's.
    told.holds("node-b", NODE, 20, "host")
    routed = router(told, fleet("a", node=True)).choose("m", TOKENS)
    assert cached(routed, "a") == (0, 0, 0)


def test_a_block_counts_when_every_rank_has_it() -> None:
    told = Told()
    ranks = [node_space(tp_rank=rank, tp_size=2) for rank in range(2)]
    told.starts("node-a", *ranks)
    told.holds("node-a", ranks[0], 9, "host")
    told.holds("node-a", ranks[1], 7, "host")
    here = router(told, fleet("a", node=True))
    assert cached(here.choose("m", TOKENS), "a") == (0, 7 * BLOCK, 0)
    other = [7, *TOKENS]
    told.holds("node-a", ranks[0], 5, "host", tokens=other)
    assert cached(here.choose("m", other), "a") == (0, 0, 0)  # Its other rank has none of it.


def test_a_choice_is_placed_so_that_the_next_one_knows_of_it() -> None:
    told = Told()
    for name in "ab":
        told.starts(engine(name), ENGINE)
    here = router(told, fleet("a", "b"))
    first = here.choose("m", TOKENS)
    second = here.choose("m", TOKENS)
    assert placed(first, first.worker.name) == 0
    assert second.worker == first.worker and placed(second, second.worker.name) == len(TOKENS)
    assert "only routed there" in second.why


def test_a_placement_lasts_as_long_as_the_request_waits() -> None:
    told, clock = Told(), Clock()
    for name in "ab":
        told.starts(engine(name), ENGINE)
    here = router(told, fleet("a", "b"), clock)
    first = here.choose("m", TOKENS)
    number = here.begin(first)

    def others(seconds: int) -> None:
        for at in range(0, seconds, 4):
            clock.ns += 4 * S
            here.choose("m", [at] * len(TOKENS))

    others(40)
    again = here.choose("m", TOKENS)
    assert again.worker == first.worker and placed(again, first.worker.name) == len(TOKENS)
    here.first_token(first, number)
    here.end(number)
    others(20)
    assert not any(each.placed for each in here.choose("m", TOKENS).choice.candidates)


def test_requests_in_flight_count_until_their_end_and_never_for_ever() -> None:
    told, clock = Told(), Clock()
    for name in "ab":
        told.starts(engine(name), ENGINE)
    here = router(told, fleet("a", "b"), clock, placed_credit=0)
    first = here.choose("m", TOKENS)
    with here.sending(first) as sent:
        second = here.choose("m", TOKENS)
        assert second.worker != first.worker  # It has a prompt to compute first.
        sent.first_token()
        busy = next(
            each for each in here.choose("m", TOKENS).choice.candidates if each.worker == first.worker.name
        )
        assert (busy.running, busy.waiting_prefill_tokens, busy.decode_tokens) == (1, 0, 320)
    number = here.begin(first)
    clock.ns += REQUEST_NS_MAX
    here.begin(second)
    idle = here.choose("m", TOKENS, avoid=[second.worker.name]).choice.candidate
    assert (idle.running, idle.waiting_prefill_tokens) == (0, 0)
    here.end(number)


def test_what_a_worker_tells_of_its_load_counts() -> None:
    told = Told()
    told.holds(engine("a"), ENGINE, 2, load={"requests_waiting": 50.0, "free_share": 0.01})
    told.starts(engine("b"), ENGINE)
    routed = router(told, fleet("a", "b")).choose("m", TOKENS)
    assert routed.worker.name == "b"
    a = next(each for each in routed.choice.candidates if each.worker == "a")
    assert (a.waiting, a.free_share) == (50, 0.01)


def test_what_a_node_tells_that_two_workers_share_is_of_neither() -> None:
    told = Told()
    told.holds("shared", NODE, 5, "host", load={"requests_waiting": 50.0})
    both = Fleet.of([Worker(name=name, model="m", sources=("shared",)) for name in "ab"])
    routed = router(told, both).choose("m", TOKENS)
    assert [each.waiting for each in routed.choice.candidates] == [0, 0]
    assert cached(routed, "a") == cached(routed, "b") == (0, 80, 0)


# --- what goes wrong ----------------------------------------------------------------------------


def test_without_an_index_a_session_stays_and_the_rest_goes_in_turn() -> None:
    here = router(None, fleet("a", "b"))
    first = here.choose("m", TOKENS, session="chat")
    assert first.choice.blind and "without an index: there is no index" in first.why
    assert {here.choose("m", TOKENS, session="chat").worker for _ in range(4)} == {first.worker}
    assert {here.choose("m", TOKENS).worker.name for _ in range(4)} == {"a", "b"}


def test_without_an_index_the_least_loaded_goes_first() -> None:
    here = router(None, fleet("a", "b"))
    routed = here.choose("m", TOKENS)
    with here.sending(routed):
        assert {here.choose("m", TOKENS).worker for _ in range(3)}.isdisjoint({routed.worker})


def test_an_index_that_is_away_costs_a_note_and_nothing_else(tmp_path: object) -> None:
    here = Router(fleet("a", "b"), Locator(f"unix://{tmp_path}/none.sock", timeout_ms=5), clock=Clock())
    for _ in range(3):
        routed = here.choose("m", TOKENS)
        assert routed.choice.blind and "without an index: " in routed.why


def test_an_index_that_knows_nobody_is_as_none() -> None:
    told = Told()
    told.holds("somebody else", ENGINE, 5)
    routed = router(told, fleet("a", "b")).choose("m", TOKENS)
    assert routed.choice.blind and routed.notes == ("the index knows nothing of these workers",)


def test_a_worker_that_the_index_does_not_know_is_named() -> None:
    told = Told()
    told.holds(engine("a"), ENGINE, 5)
    routed = router(told, fleet("a", "b")).choose("m", TOKENS)
    assert routed.worker.name == "a" and not routed.choice.blind
    assert routed.notes == ("the index knows nothing of b",)


def test_a_suspect_or_old_source_counts_for_less_and_it_is_said() -> None:
    told, clock = Told(), Clock()
    told.holds(engine("a"), ENGINE, 20)
    told.holds(engine("b"), ENGINE, 18)
    here = router(told, fleet("a", "b"), clock)
    assert here.choose("m", TOKENS).worker.name == "a"
    told.index.suspect(engine("a"))
    fresher = here.choose("m", TOKENS)
    assert fresher.worker.name == "b" and fresher.notes == ()
    told.index.suspect(engine("b"))
    assert "b holds is suspect" in here.choose("m", TOKENS, avoid=["a"]).why
    clock.ns += 200 * S
    old = here.choose("m", TOKENS, avoid=["a"])
    [freshness] = [term for term in old.choice.terms if term.name == "freshness"]
    assert freshness.raw == 1 and freshness.weighted == 18 * BLOCK


def test_a_worker_that_failed_is_passed_over_for_a_while() -> None:
    told, clock = Told(), Clock()
    told.holds(engine("a"), ENGINE, 20)
    told.starts(engine("b"), ENGINE)
    here = router(told, fleet("a", "b"), clock)
    first = here.choose("m", TOKENS)
    here.failed(first, "connection refused")
    again = here.choose("m", TOKENS)
    assert again.worker.name == "b" and "passed over, not answering: a" in again.why
    clock.ns += 1 * S
    assert here.choose("m", TOKENS).worker.name == "a"


def test_when_all_failed_all_are_tried() -> None:
    here = router(None, fleet("a", "b"))
    for name in "ab":
        here.failed(here.choose("m", TOKENS, avoid=[{"a": "b", "b": "a"}[name]]), "refused")
    assert "no worker answered lately" in here.choose("m", TOKENS).why


def test_a_prompt_of_unknown_tokens_is_routed_without_the_index() -> None:
    told = Told()
    told.holds(engine("a"), ENGINE, 20)
    routed = router(told, fleet("a")).choose("m", prompt_tokens=500)
    assert routed.choice.blind and routed.choice.prompt_tokens == 500 and "tokens are not known" in routed.why


def test_models_and_roles_are_kept_apart() -> None:
    workers = Fleet.of(
        [
            Worker(name="p", model="m", role="prefill"),
            Worker(name="d", model="m", role="decode"),
            Worker(name="other", model="n"),
        ]
    )
    here = router(None, workers)
    assert [here.choose("m", TOKENS, role=role).worker.name for role in ("any", "prefill", "decode")] == [
        "d",
        "p",
        "d",
    ]
    assert here.choose("n", TOKENS).worker.name == "other"
    for model, avoid in (("unknown", ()), ("n", ("other",))):
        with pytest.raises(NoWorker):
            here.choose(model, TOKENS, avoid=avoid)
    with pytest.raises(BadInput):
        here.choose("m", [-1])


def test_who_has_names_already_asks_by_them() -> None:
    told = Told()
    told.holds(engine("a"), ENGINE, 7)
    told.starts(engine("b"), ENGINE)
    query = Query(names(ENGINE), BLOCK, frozenset({ENGINE.namespace_id()}))
    routed = router(told, fleet("a", "b")).choose_hints("m", [query], len(TOKENS))
    assert routed.worker.name == "a" and cached(routed, "a") == (112, 0, 0)


def test_other_workers_from_now_on() -> None:
    told = Told()
    told.holds(engine("a"), ENGINE, 7)
    told.holds(engine("z"), ENGINE, 7)
    here = router(told, fleet("a", "b"))
    assert here.choose("m", TOKENS).worker.name == "a"
    here.replace(fleet("z"))
    routed = here.choose("m", TOKENS)
    assert [each.worker for each in routed.choice.candidates] == ["z"]


def test_the_example_in_the_docs_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without an index, as nobody listens there: it says so, and chooses all the same."""
    [example] = re.findall(r"```python\n(.*?)```", (DOCS / "routing.md").read_text(), re.DOTALL)
    file = tmp_path / "example.py"
    file.write_text(example)
    runpy.run_path(str(file))
    said = capsys.readouterr().out
    assert "without an index: " in said and said.splitlines()[-1] in ("w0", "w1")


def test_the_docs_say_what_each_weight_is_without_a_file() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| (\S+) \| (.+), (.+) \|$", (DOCS / "routing.md").read_text(), re.MULTILINE
    )
    told = {name: default for name, default, _, _ in rows}
    ranges = {name: (low, high) for name, _, low, high in rows if name != "form"}
    values = {each.name: getattr(Weights(), each.name) for each in fields(Weights)}
    assert told == {
        name: value if isinstance(value, str) else f"{value:g}" for name, value in values.items()
    }, "docs/routing.md: the table of weights"
    assert ranges == {name: (f"{low:g}", f"{high:g}") for name, (low, high) in RANGES.items()}
