"""The choice: which candidate, with which bounds, and that the explanation is the truth."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache.routing.choose import Chooser
from kvcache.routing.cost import Candidate
from kvcache.routing.weights import Weights
from tests.kvcache.routing.test_cost import CANDIDATES, TOKENS, all_weights

FLEETS = st.lists(CANDIDATES, min_size=1, max_size=8).map(
    lambda found: [replace(each, worker=f"w{number}") for number, each in enumerate(found)]
)
SESSIONS = st.sampled_from(["", "a", "b"])


def idle(*names: str) -> list[Candidate]:
    return [Candidate(name) for name in names]


@settings(deadline=None)
@given(w=all_weights(), prompt=TOKENS, fleet=FLEETS, session=SESSIONS, blind=st.booleans())
def test_the_explanation_adds_up_to_the_cost(
    w: Weights, prompt: int, fleet: list[Candidate], session: str, blind: bool
) -> None:
    chooser = Chooser(w)
    for _ in range(2):
        choice = chooser.choose(prompt, fleet, session, blind=blind)
        told = choice.explanation()
        assert {each.worker for each in told} == {each.worker for each in fleet}
        assert [each.cost for each in told] == sorted(each.cost for each in told)
        for each in told:
            total = sum(term.weighted for term in each.terms)
            size = sum(abs(term.weighted) for term in each.terms)
            assert math.isclose(total, each.cost, rel_tol=1e-9, abs_tol=1e-9 * max(1.0, size))
        [mine] = [each for each in told if each.worker == choice.worker]
        assert (mine.cost, mine.terms) == (choice.cost, choice.terms)
        assert choice.why.startswith(choice.worker) and "\n" not in choice.why


@settings(deadline=None)
@given(w=all_weights(), prompt=TOKENS, fleet=FLEETS)
def test_without_temperature_it_is_the_cheapest(w: Weights, prompt: int, fleet: list[Candidate]) -> None:
    choice = Chooser(w).choose(prompt, fleet)
    assert choice.cost <= min(choice.costs) + w.tie_tokens


@pytest.mark.parametrize("others", [0.0, 300_000.0])
def test_who_is_far_behind_the_others_is_left_for_them(others: float) -> None:
    """Up to ``patience_tokens`` above the mean a long queue changes little; beyond, it soon decides."""
    w, fleet = Weights(), [Candidate(f"w{number}", backlog_tokens=others) for number in range(15)]
    seen = []
    for above in (0.9, 1.2, 1.7):
        backlog = others + above * w.patience_tokens * 16 / 15
        holder = Candidate("holder", (10_000, 0, 0), backlog_tokens=backlog)
        seen.append(Chooser(w).choose(10_100, [holder, *fleet]).worker == "holder")
    assert seen == [True, True, False]


@settings(deadline=None)
@given(
    w=all_weights(),
    fleet=FLEETS,
    asked=st.lists(st.tuples(TOKENS, SESSIONS), max_size=6),
    temperature=st.sampled_from([0.0, 0.5]),
    choices=st.sampled_from([0, 2]),
)
def test_the_same_seed_and_calls_make_the_same_choices(
    w: Weights, fleet: list[Candidate], asked: list[tuple[int, str]], temperature: float, choices: int
) -> None:
    w = replace(w, temperature=temperature, choices=choices)
    runs = []
    for _ in range(2):
        chooser = Chooser(w, seed=7)
        runs.append([chooser.choose(prompt, fleet, session).worker for prompt, session in asked])
    assert runs[0] == runs[1]


def test_equal_ones_are_taken_in_turn() -> None:
    chooser = Chooser(Weights())
    seen = Counter(chooser.choose(100, idle("a", "b", "c")).worker for _ in range(9))
    assert seen == {"a": 3, "b": 3, "c": 3}


def test_of_those_that_cost_the_same_the_less_loaded_goes_first() -> None:
    w = Weights(tie_tokens=10_000)
    fleet = [Candidate("holder", (90, 0, 0), running=2), Candidate("idle", running=1)]
    choice = Chooser(w).choose(100, fleet)
    assert (choice.worker, choice.how) == ("idle", "tie")


def test_a_session_stays_where_it_is_as_long_as_that_costs_little_more() -> None:
    w = Weights(session_tokens=256, running=100)
    chooser = Chooser(w)
    first = chooser.choose(100, idle("a", "b"), "chat")
    assert first.session == "new" and chooser.home("chat") == first.worker
    busy = [replace(each, running=2 if each.worker == first.worker else 0) for each in idle("a", "b")]
    second = chooser.choose(100, busy, "chat")
    assert (second.worker, second.session) == (first.worker, "kept")
    busier = [replace(each, running=3 if each.worker == first.worker else 0) for each in idle("a", "b")]
    third = chooser.choose(100, busier, "chat")
    assert third.worker != first.worker and third.session == "moved"
    assert chooser.home("chat") == third.worker


@settings(deadline=None)
@given(slack=st.integers(0, 5_000), running=st.integers(0, 100), blind=st.booleans())
def test_a_session_never_sticks_to_an_overloaded_worker(slack: int, running: int, blind: bool) -> None:
    w = Weights(running=100, decode=0, session_slack=slack, session_tokens=1e6)
    chooser = Chooser(w)
    home = chooser.choose(1_000, idle("a", "b"), "chat", blind=blind).worker
    fleet = [replace(each, running=running if each.worker == home else 0) for each in idle("a", "b")]
    choice = chooser.choose(1_000, fleet, "chat", blind=blind)
    if running * 100 > slack:
        assert (choice.worker != home, choice.session) == (True, "overloaded")
    else:
        assert (choice.worker, choice.session) == (home, "kept")


def test_a_session_whose_worker_is_gone_goes_elsewhere() -> None:
    chooser = Chooser(Weights())
    home = chooser.choose(100, idle("a", "b"), "chat").worker
    other = "b" if home == "a" else "a"
    assert (chooser.choose(100, idle(other), "chat").session, chooser.home("chat")) == ("gone", other)


def test_sessions_are_bounded_the_oldest_goes_first() -> None:
    chooser = Chooser(Weights(), sessions_max=2)
    for session in ("a", "b", "a", "c"):
        chooser.choose(100, idle("w"), session)
    assert [chooser.home(session) for session in "abc"] == ["w", "", "w"]


def test_blind_routers_that_share_nothing_send_a_session_to_the_same_worker() -> None:
    names = [f"w{number}" for number in range(8)]
    for session in map(str, range(50)):
        one = Chooser(Weights(), seed=1).choose(1_000, idle(*names), session, blind=True)
        two = Chooser(Weights(), seed=2).choose(1_000, idle(*reversed(names)), session, blind=True)
        assert one.worker == two.worker
        fewer = [name for name in names if name != "w3"]
        if one.worker != "w3":  # When one goes, only its own sessions move.
            again = Chooser(Weights()).choose(1_000, idle(*fewer), session, blind=True)
            assert again.worker == one.worker


def test_blind_sessions_spread() -> None:
    fleet = idle(*(f"w{number}" for number in range(4)))
    chooser = Chooser(Weights())
    seen = Counter(chooser.choose(1_000, fleet, str(number), blind=True).worker for number in range(400))
    assert len(seen) == 4 and min(seen.values()) > 60


def test_temperature_draws_the_cheaper_more_often() -> None:
    fleet = [Candidate("near", (900, 0, 0)), Candidate("half", (500, 0, 0)), Candidate("far")]
    seen = {}
    for temperature in (0.1, 1.0):
        chooser = Chooser(Weights(temperature=temperature), seed=3)
        seen[temperature] = Counter(chooser.choose(1_000, fleet).worker for _ in range(2_000))
        assert seen[temperature]["near"] > seen[temperature]["half"] > seen[temperature]["far"]
    assert seen[0.1]["near"] > 1_900
    assert seen[1.0]["far"] / seen[1.0]["near"] == pytest.approx(math.exp(-1), abs=0.1)


def test_power_of_choices_looks_at_some_and_never_loses_who_holds_most() -> None:
    fleet = [Candidate(f"w{number}", running=number % 7) for number in range(64)]
    chooser = Chooser(Weights(choices=2), seed=5)
    seen = Counter(chooser.choose(100, fleet).worker for _ in range(300))
    assert len(seen) > 20
    fleet[40] = replace(fleet[40], cached=(10_000, 0, 0))
    assert {chooser.choose(20_000, fleet).worker for _ in range(50)} == {"w40"}


def test_the_sentence_says_what_an_operator_wants_to_know() -> None:
    fleet = [Candidate("near", (3_072, 1_024, 0), placed=16), Candidate("far", running=2)]
    w = Weights(prefill=1, request_tokens=16, load_host=0.1, placed_credit=0.8, running=64, decode=0)
    choice = Chooser(w).choose(5_000, fleet)
    assert choice.why == (
        "near is the cheapest of 2 at 1010 tokens; it has 4112 of 5000 (3072 hbm, 1024 host, 16 only routed "
        "there); the best other is far at 5144, most of it by uncached (+4112)"
    )
    blind = Chooser(Weights()).choose(5_000, fleet[:1], blind=True)
    assert "nothing is known of what holds its 5000" in blind.why and blind.how == "only"
