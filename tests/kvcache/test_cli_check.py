"""``kvcache check``: what it says of a directory and of a node, and with which status it leaves."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from kvcache import cli, cli_check
from kvcache.tiers import nvme_check
from kvcache.tiers.nvme import Device, DeviceFault
from kvcache.wire import Done, Failure, Message, Scrub, Stats, StatsReply
from tests.kvcache.peer import Bench, Peer, Script
from tests.kvcache.tiers.nvme_blocks import BLOCK, blocks, flip, offset_of, open_device


@pytest.fixture
def tier(tmp_path: Path) -> Path:
    path = tmp_path / "tier"
    device = open_device(path)
    device.write(blocks(range(5)), (), durable=True)
    device.close()
    return path


def damage(tier: Path) -> None:
    flip(tier / "segments" / "000000.seg", (offset_of(0, 2) + 4_096) * 8)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.commands, ["check", *map(str, arguments)])


def lines(result: Result) -> list[str]:
    return [line.strip() for line in result.output.splitlines()]


# --- offline ------------------------------------------------------------------------------------


def test_all_is_well(tier: Path) -> None:
    result = run(tier)
    assert result.exit_code == 0
    assert lines(result)[0].startswith(f"{tier}: 5 blocks looked at in ")
    assert lines(result)[1:] == ["5  fine, 80.0 KiB", "all is well; nothing was changed"]


def test_what_is_wrong_is_told_then_repaired_then_well(tier: Path) -> None:
    damage(tier)
    looked = run(tier)
    assert looked.exit_code == 1
    assert lines(looked)[1:] == [
        "4  fine, 64.0 KiB",
        "1  other bytes than were written",
        "nothing was changed; a node serves none of what is wrong; --repair drops it",
    ]
    repaired = run("--repair", tier)
    assert repaired.exit_code == 1
    assert lines(repaired)[-1] == (
        "repaired: 1 dropped, the index written anew; run it again to see all well"
    )
    again = run(tier)
    assert again.exit_code == 0
    assert lines(again)[1:] == ["4  fine, 64.0 KiB", "all is well; nothing was changed"]


def test_a_directory_s_own_damage_is_told(tier: Path) -> None:
    (tier / "tier.json").unlink()
    result = run(tier)
    assert result.exit_code == 1
    assert "tier.json: it is missing" in result.output
    assert "5  fine" in result.output


def test_for_a_script(tier: Path) -> None:
    damage(tier)
    result = run("--json", tier)
    assert result.exit_code == 1
    told = json.loads(result.output)
    assert told["ok"] is False
    (directory,) = told["directories"]
    assert directory.pop("seconds") > 0
    assert directory == {
        "path": str(tier),
        "ok": False,
        "blocks": 5,
        "fine_blocks": 4,
        "apart_blocks": 0,
        "fine_bytes": 4 * BLOCK,
        "bad": {"checksum": 1},
        "findings": [],
        "stopped": "",
        "repaired": False,
    }


def test_a_node_runs_on_one_and_the_other_is_looked_at(tier: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    device = open_device(other)
    result = run(other, tier)
    assert result.exit_code == 1
    assert "a node runs on it" in result.output
    assert "to do: stop it, or ask the node: kvcache check --node ADDRESS" in result.output
    assert "all is well" in result.output
    told = json.loads(run("--json", other, tier).output)
    assert [each["ok"] for each in told["directories"]] == [False, True]
    assert told["directories"][0]["refused"]["code"] == "address_in_use"
    device.close()


def test_a_path_without_a_tier(tmp_path: Path) -> None:
    result = run(tmp_path)
    assert result.exit_code == 1
    assert "holds no NVMe tier" in result.output


def test_a_device_that_cannot_be_opened(tier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise DeviceFault(5, "reading: Input/output error")

    monkeypatch.setattr(nvme_check, "check", fail)
    result = run(tier)
    assert result.exit_code == 1
    assert "cannot be read" in result.output
    assert "the system's log" in result.output


def test_a_device_that_fails_on_the_way(tier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bytes:
        raise DeviceFault(5, "reading: Input/output error")

    monkeypatch.setattr(Device, "read", fail)
    monkeypatch.setattr(nvme_check, "UNREADABLE_MAX", 5)
    result = run("--repair", tier)
    assert result.exit_code == 1
    assert "stopped: the device could not read 5 blocks in a row" in result.output
    assert "nothing was dropped" in result.output


@pytest.mark.parametrize(
    "arguments", [(), ("--node", "unix:///s", "/d"), ("--repair",), ("--node", "unix:///s", "--repair")]
)
def test_usage(arguments: tuple[str, ...]) -> None:
    assert run(*arguments).exit_code == 2


# --- online -------------------------------------------------------------------------------------


class Node:
    """Answers from a list; the last answer is given for ever."""

    def __init__(self, *replies: StatsReply) -> None:
        self.replies = list(replies)
        self.asked: list[str] = []

    def scrub(self) -> None:
        self.asked.append("scrub")

    def stats(self) -> StatsReply:
        self.asked.append("stats")
        return self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]


def stats(passes: int, scrubbed: int, bad: int, left: int, *troubles: str) -> StatsReply:
    values = {"scrub_passes": passes, "scrubbed_blocks": scrubbed, "scrub_bad_blocks": bad}
    return StatsReply({**values, "scrub_left_blocks": left}, list(troubles))


def follow(node: Node) -> tuple[cli_check.Scrubbed, list[tuple[int, int]], int]:
    shown: list[tuple[int, int]] = []
    slept: list[float] = []
    done = cli_check.follow(node, lambda what, here, total: shown.append((here, total)), slept.append)
    return done, shown, len(slept)


def test_follows_until_its_own_pass_is_over() -> None:
    node = Node(
        stats(3, 100, 1, 40),  # Another pass is on.
        stats(3, 100, 1, 60),
        stats(3, 120, 1, 40),
        stats(3, 159, 2, 1),
        stats(4, 160, 3, 0, "the NVMe directory /d is not used"),
    )
    done, shown, slept = follow(node)
    assert node.asked == ["stats", "scrub", "stats", "stats", "stats", "stats"]
    assert done == cli_check.Scrubbed(60, 2, ("the NVMe directory /d is not used",))
    assert shown == [(0, 60), (20, 60), (59, 60)]
    assert slept == 3


def test_a_pass_that_was_over_at_once() -> None:
    done, shown, _ = follow(Node(stats(3, 100, 0, 0), stats(4, 102, 0, 0)))
    assert done == cli_check.Scrubbed(2, 0, ())
    assert shown == []


def test_a_pass_that_ended_just_before_is_not_ours() -> None:
    done, shown, _ = follow(Node(stats(3, 100, 0, 2), stats(4, 102, 0, 50), stats(5, 152, 0, 0)))
    assert done.blocks == 52
    assert shown == [(0, 50)]


def test_a_pass_of_the_node_s_own_follows_at_once() -> None:
    done, _, _ = follow(Node(stats(3, 0, 0, 0), stats(3, 0, 0, 9), stats(4, 12, 0, 6)))
    assert done.blocks == 12


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench("blocking", tmp_path / "node.sock")
    yield bench
    bench.close()


def script(*replies: Message) -> tuple[list[type], Script]:
    asked: list[type] = []

    def play(peer: Peer) -> None:
        peer.greet()
        for reply in replies:
            call, request, _ = peer.take()
            asked.append(type(request))
            peer.give(call, reply)
        peer.wait_for_end()

    return asked, play


def online(bench: Bench, *replies: Message, arguments: tuple[str, ...] = ()) -> tuple[Result, list[type]]:
    asked, play = script(*replies)
    bench.play(play)
    return run("--node", bench.address, *arguments), asked


def test_a_node_in_which_all_is_well(bench: Bench) -> None:
    result, asked = online(bench, stats(0, 0, 0, 0), Done(), stats(1, 70, 0, 0))
    assert asked == [Stats, Scrub, Stats]
    assert result.exit_code == 0
    assert lines(result)[0].startswith(f"{bench.address}: 70 blocks verified in ")
    assert lines(result)[1] == "all is well"


def test_a_node_that_found_something(bench: Bench) -> None:
    result, _ = online(
        bench, stats(0, 0, 0, 0), Done(), stats(1, 70, 2, 0, "the disk is full"), arguments=("--json",)
    )
    assert result.exit_code == 1
    told = json.loads(result.output)
    assert told.pop("seconds") >= 0
    assert told == {
        "ok": False,
        "node": bench.address,
        "blocks": 70,
        "bad_blocks": 2,
        "troubles": ["the disk is full"],
    }


def test_a_node_in_trouble_is_not_all_well(bench: Bench) -> None:
    result, _ = online(bench, stats(0, 0, 0, 0), Done(), stats(1, 0, 0, 0, "/d is not used"))
    assert result.exit_code == 1
    assert lines(result)[1:] == ["/d is not used"]


def left(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int | str | None, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(["check", *arguments])
    return ended.value.code, capsys.readouterr().err


def test_a_node_that_refuses(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    refusal = Failure("not_allowed", "Scrub is not allowed", "it needs the role operator", "ask for it")
    _, play = script(stats(0, 0, 0, 0), refusal)
    bench.play(play)
    status, err = left(capsys, "--node", bench.address)
    assert status == 1
    assert "needs the role operator" in err


def test_no_node(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, err = left(capsys, "--node", f"unix://{tmp_path}/none.sock")
    assert status == 1
    assert "kvcache check PATH" in err


# --- the bar ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "done", "total", "moved", "seconds", "expected"),
    [
        ("reading blocks", 0, 0, 0, 0.0, "reading blocks [------------------------]   0%"),
        (
            "reading blocks",
            1 << 30,
            4 << 30,
            1 << 30,
            2.0,
            "reading blocks [######------------------]  25%  512.0 MiB/s  6 s left",
        ),
        (
            "reading slot headers",
            50,
            100,
            50,
            5.0,
            "reading slot headers [############------------]  50%  10/s  5 s left",
        ),
    ],
)
def test_the_bar(what: str, done: int, total: int, moved: int, seconds: float, expected: str) -> None:
    assert cli_check.bar_text(what, done, total, moved, seconds) == expected


def test_the_bar_is_for_those_who_watch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with cli_check.Bar(True) as bar:
        bar.show("reading blocks", 1, 2)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with cli_check.Bar(True) as bar:
        bar.show("reading blocks", 1, 2)
    assert "50%" in capsys.readouterr().err
    with cli_check.Bar(False) as bar:
        bar.show("reading blocks", 1, 2)
    assert capsys.readouterr().err == ""


def test_a_node_and_a_directory_are_not_one_question(tmp_path: Path) -> None:
    told = run(str(tmp_path), "--node", "unix:///node.sock")
    assert told.exit_code == 2
    assert "not both" in told.output
