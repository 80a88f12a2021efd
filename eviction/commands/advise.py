"""``kvcache tune advise``: which setting to run, sought and confirmed on a trace.

    kvcache tune advise TRACE --capacity 40GiB --model llama-3.1-70b
    kvcache tune advise TRACE --capacity 1% --nvme 10% --dwpd 1 --admit all

How it is found: ``kvcache.eviction.advise.advice``.
"""

from __future__ import annotations

import json
from pathlib import Path

import click

from kvcache.errors import BadInput
from kvcache.eviction.admission import parse_admission
from kvcache.eviction.advise.advice import RULES, Advice, Adviser
from kvcache.eviction.advise.words import Situation, finalist_dict, situation, words
from kvcache.eviction.amounts import number_text
from kvcache.eviction.commands.below import DWPD_MAX
from kvcache.eviction.commands.mrc import parse_rate
from kvcache.eviction.commands.progress import bar
from kvcache.eviction.commands.replay import heading, opened, parse_settings
from kvcache.eviction.registry import policy_names
from kvcache.eviction.simulate.capacity import parse_capacity
from kvcache.eviction.simulate.models import MODELS, model_named
from kvcache.eviction.simulate.replay import REPLAY_ONLY
from kvcache.eviction.simulate.tree import Forest
from kvcache.eviction.simulate.trial import Machine, Setting
from kvcache.eviction.traces.files import Reading

_SHOWN = 8


@click.command("advise")
@click.argument("path", type=click.Path(path_type=Path), metavar="TRACE")
@click.option("--capacity", required=True, help="of memory: 3% of the trace's blocks; or blocks; or 40GiB")
@click.option("--model", "model_name", default="", help=f"{', '.join(MODELS)}, or bytes of KV a token")
@click.option("--policy", default="leaf-lru", show_default=True, help="what runs now")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="its settings, as they are now")
@click.option("--nvme", default="", metavar="SIZE", help="the NVMe below, if there is any")
@click.option("--admit", default="all", show_default=True, help="what it takes now")
@click.option("--dwpd", default=0.0, help="drive writes a day that it bears (0: not asked)")
@click.option("--among", default="", metavar="NAME,...", help="the policies to try (default: all there are)")
@click.option("--rules", default=",".join(RULES), show_default=True, help="of what NVMe takes, to try")
@click.option("--split", default=50.0, show_default=True, help="per cent of the requests to seek on")
@click.option("--sample", "rate", default="auto", show_default=True, help="of the blocks, or 100% for all")
@click.option("--hints/--no-hints", default=True, help="tell policies how requests ended")
@click.option("--block-tokens", default=0, help="tokens a block, where the file does not say it")
@click.option("--json", "as_json", is_flag=True, help="one JSON object")
def advise_command(
    path: Path,
    capacity: str,
    model_name: str,
    policy: str,
    settings: tuple[str, ...],
    nvme: str,
    admit: str,
    dwpd: float,
    among: str,
    rules: str,
    split: float,
    rate: str,
    hints: bool,
    block_tokens: int,
    as_json: bool,
) -> None:
    """Say what to change, what it buys, and how sure that is.

    Settings are sought on a sample of the first part of the trace, and confirmed on the whole.
    """
    model = model_named(model_name) if model_name else None
    trace = opened(path, Reading(block_tokens=block_tokens))
    lower = parse_capacity(nvme, trace, model).blocks if nvme else 0
    if not 0 <= dwpd <= DWPD_MAX or (dwpd and not lower):
        raise BadInput(
            "bad_config",
            f"--dwpd {dwpd:g}",
            f"that is of NVMe, more than 0, and at most {DWPD_MAX:g}",
            "give --nvme as well",
        )
    machine = Machine(parse_capacity(capacity, trace, model).blocks, lower, dwpd, hints)
    now = Setting(policy, tuple(sorted(parse_settings(settings).items())), parse_admission(admit))
    forest = Forest(trace)
    names = runnable(among or ",".join(policy_names()))
    runnable(policy)
    adviser = Adviser(
        forest,
        machine,
        share=split / 100,
        rate=parse_rate(rate),
        policies=names,
        rules=[rule.strip() for rule in rules.split(",") if rule.strip()],
        watch=bar,
    )
    advice = adviser.advise(now)
    at = situation(forest, machine, model, bar)
    if as_json:
        click.echo(json.dumps(as_dict(str(path), advice, at)))
    else:
        click.echo(heading(path.name, trace))
        click.echo(f"{words(advice, at)}\n")
        click.echo(table(advice))


def runnable(text: str) -> list[str]:
    """Policies that a node can run. RAISES BadInput for others."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name in REPLAY_ONLY:
            raise BadInput("bad_config", f"policy {name}", "no node runs it: it is there for comparison")
    if not names:
        raise BadInput("bad_config", "no policy to try", f"there are {', '.join(policy_names())}")
    return list(dict.fromkeys(names))


def as_dict(name: str, advice: Advice, at: Situation) -> dict[str, object]:
    said = words(advice, at)
    return {
        "trace": name,
        "capacity_blocks": at.machine.memory_blocks,
        "nvme_blocks": at.machine.nvme_blocks,
        "change": advice.change,
        "policy": advice.named.setting.policy,
        "settings": dict(advice.named.setting.settings),
        "admit": advice.named.setting.admission.name,
        "gain": advice.difference.gain,
        "doubt": advice.difference.doubt,
        "optimum": at.optimum,
        "now": finalist_dict(advice.now),
        "named": finalist_dict(advice.named),
        "finalists": [finalist_dict(each) for each in advice.finalists],
        "first_requests": advice.first_requests,
        "requests": advice.requests,
        "sample_rate": advice.sample_rate,
        "tried": len(advice.tried),
        "said": [said.headline, *(f"{about}: {text}" for about, text in said.notes)],
    }


def table(advice: Advice) -> str:
    """What was confirmed, on the whole trace."""
    head = ["confirmed on all blocks", "NVMe takes", "first part", "second part", "writes a day", ""]
    below = any(each.writes_a_day for each in advice.finalists)
    lines = []
    for each in sorted(advice.finalists, key=lambda each: -each.trial.ratio())[:_SHOWN]:
        mark = " ".join(
            text
            for text, holds in (
                ("now", each is advice.now),
                ("advised", each is advice.named and advice.change),
            )
            if holds
        )
        lines.append(
            [
                str(each.setting),
                each.setting.admission.name,
                f"{each.first_ratio:.2%}",
                f"{each.rest_ratio:.2%}",
                number_text(each.writes_a_day),
                mark,
            ]
        )
    kept = [at for at in range(len(head)) if below or at not in (1, 4)]
    text = [[line[at] for at in kept] for line in [head, *lines]]
    widths = [max(map(len, column)) for column in zip(*text, strict=True)]
    shown = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in text]
    return "\n".join(
        [*shown, "", f"{len(advice.tried)} settings were tried on {advice.sample_rate:.1%} of the blocks."]
    )
