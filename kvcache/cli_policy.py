"""``kvcache policy``: which eviction policies there are, and whether one of anybody's keeps the contract.

    kvcache policy list                       every name, and what it is
    kvcache policy show NAME                  its settings
    kvcache policy check NAME|module:Class    the contract, a long replay, the same twice, its speed

``check`` runs the class in this process, as a node would: try only what you would run. It takes a few
seconds. Exit status: 0 all is well, 1 something is not, 2 usage.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import click

from kvcache.errors import BadInput
from kvcache.eviction.registry import WRAPPERS, load_class, params_of, policy_class, policy_names
from kvcache.eviction.simulate.replay import replay
from kvcache.eviction.simulate.tree import Forest
from kvcache.eviction.traces.generate import Workload, generate
from kvcache.guard import said
from kvcache.policy import DevicePolicy, EvictionPolicy, KeyedPolicy
from kvcache.testing.policies import Grove, PolicyContract

REQUEST_US_MAX = 200.0
_WORKLOAD = Workload(
    request_count=4_000,
    block_tokens=64,
    turns=8,
    answer_tokens=400,
    question_tokens=200,
    one_shot_tokens=1_500,
)
_SHARES = (0.02, 0.1)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was tried. ``fault`` is empty when it was right."""

    name: str
    fault: str = ""
    figure: str = ""


@click.group()
def policy() -> None:
    """Look at eviction policies, and try yours."""


@policy.command("list")
@click.option("--json", "as_json", is_flag=True, help="one JSON object")
def list_policies(as_json: bool) -> None:
    """Every policy by name."""
    said: dict[str, str] = {}
    for name in policy_names():
        try:
            said[name] = _sentence(policy_class(name))
        except BadInput as error:
            said[name] = f"cannot be loaded: {error.why}"
    if as_json:
        click.echo(json.dumps({"policies": said, "around": list(WRAPPERS)}))
        return
    for name, text in said.items():
        click.echo(f"{name:20} {text}")
    click.echo(f"\naround any of them, as in leaf-hazard+keep: {', '.join(WRAPPERS)}")


@policy.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="one JSON object")
def show(name: str, as_json: bool) -> None:
    """The settings of a policy."""
    found = find(name)
    settings = params_of(name, found)
    if as_json:
        told = {setting: asdict(param) for setting, param in settings.items()}
        click.echo(json.dumps({"name": name, "is": _sentence(found), "settings": told}))
        return
    click.echo(_sentence(found))
    for setting, param in settings.items():
        click.echo(f"  {setting:16} {param.default:g} ({param.low:g} to {param.high:g}): {param.doc}")
    if not settings:
        click.echo("  it has no settings")


@policy.command()
@click.argument("name", metavar="NAME|module:Class")
@click.option("--json", "as_json", is_flag=True, help="one object a line")
@click.option("--request-us", default=REQUEST_US_MAX, show_default=True, help="the most a request may take")
def check(name: str, as_json: bool, request_us: float) -> None:
    """Run the contract suite and a speed test on a policy."""
    wrong = 0
    for finding in findings(find(name), request_us):
        wrong += bool(finding.fault)
        if as_json:
            click.echo(json.dumps(asdict(finding)))
        else:
            state = f"WRONG  {finding.fault}" if finding.fault else f"right  {finding.figure}".rstrip()
            click.echo(f"{finding.name:60} {state}")
    if wrong:
        click.echo(f"{name}: {wrong} of its answers are wrong; a node would fall back to leaf-lru", err=True)
        sys.exit(1)


def find(name: str) -> type[EvictionPolicy]:
    """A name of the registry, or ``module:Class``. RAISES BadInput."""
    return load_class(name) if ":" in name else policy_class(name)


def findings(made: type[EvictionPolicy], request_us: float) -> Iterator[Finding]:
    """Everything that is tried, one after the other."""
    yield Finding("what more it can answer", figure=", ".join(_abilities(made)) or "nothing more")
    suite = type("Suite", (PolicyContract,), {"make": made})
    for name in [name for name in dir(suite) if name.startswith("test_")]:
        yield Finding(_words(name), _fault(getattr(suite(), name)))
    yield from _replayed(made, request_us)


def _replayed(made: type[EvictionPolicy], request_us: float) -> Iterator[Finding]:
    forest = Forest(generate(_WORKLOAD))
    requests = forest.trace.request_count
    for share in _SHARES:
        capacity = int(len(forest.parent) * share)
        at = f"at {share:.0%} of the blocks"
        try:
            start_s = time.process_time()
            first, second = replay(forest, made, capacity), replay(forest, made, capacity)
            took = (time.process_time() - start_s) / 2 * 1e6 / requests
        except BaseException as error:
            yield Finding(f"{at}: a replay", _said(error))
            continue
        usual = replay(forest, "leaf-lru", capacity)
        yield Finding(f"{at}: it is never replaced", first.policy_fault)
        hit, other = first.prefix_token_hit_ratio, second.prefix_token_hit_ratio
        fault = "" if hit == other else f"prefix-token hits {hit:.4f}, then {other:.4f}"
        figure = f"prefix-token hits {hit:.4f}; leaf-lru {usual.prefix_token_hit_ratio:.4f}"
        yield Finding(f"{at}: the same requests, the same answers", fault, figure)
        fault = f"{took:.0f} us a request, at most {request_us:.0f} is allowed" if took > request_us else ""
        figure = f"{took:.0f} us of the processor a request of {first.blocks / requests:.0f} blocks"
        yield Finding(f"{at}: its speed", fault, figure)


def _fault(test: Callable[[], None]) -> str:
    """Others' code: whatever it raises is its answer."""
    try:
        test()
    except BaseException as error:  # ``SystemExit``, too: it would end the check with nothing said.
        return _said(error)
    return ""


def _said(error: BaseException) -> str:
    at = traceback.extract_tb(error.__traceback__)[-1]
    text = said(error) if not isinstance(error, AssertionError) else str(error) or at.line or ""
    return f"{text.splitlines()[0] if text else ''} ({at.name}, line {at.lineno})"


def _abilities(made: type[EvictionPolicy]) -> Iterator[str]:
    try:
        policy = Grove(made).policy
    except BaseException as error:
        said(error)
        return  # The contract says what is wrong.
    if isinstance(policy, KeyedPolicy):
        yield "decides by name what is stored"
    if isinstance(policy, DevicePolicy):
        yield "names victims of one device"


def _words(name: str) -> str:
    return name.removeprefix("test_").replace("_", " ")


def _sentence(made: type[EvictionPolicy]) -> str:
    """What it says of itself first, on one line."""
    module = sys.modules.get(made.__module__)
    text = (module.__doc__ if module else None) or made.__doc__ or ""
    paragraph = " ".join(text.strip().partition("\n\n")[0].split()).replace("``", "")
    sentence, stop, _ = paragraph.partition(". ")
    return sentence + stop.strip()
