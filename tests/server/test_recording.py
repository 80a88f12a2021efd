"""A node that records what it is asked: one record a request, off when told, and never in the way."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvcache import wire
from kvcache.channel import BlockingChannel
from kvcache.clock import NS_PER_S
from kvcache.config import NodeConfig
from kvcache.errors import BadInput
from kvcache.eviction.traces import record_files
from kvcache.eviction.traces.record_files import RecordFiles
from kvcache.eviction.traces.recorded import read_recorded
from kvcache.eviction.traces.trace import Trace
from kvcache.server.recording import Plan, Recording, asked_plan
from tests.server.conftest import EmbeddedNode, Serve
from tests.server.talk import (
    HASHES,
    connected,
    deadline,
    lease,
    opened,
    refused,
    reserve,
    save,
    stats,
)

PATIENCE_S = 60.0


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the disk is just now: what was recorded is there once it was closed."""
    monkeypatch.setattr(record_files, "CLOSE_S", PATIENCE_S)


def record(channel: BlockingChannel, action: str, folder: Path | str = "", **more: int) -> wire.StatsReply:
    reply = channel.call(wire.Record(action, str(folder), **more), deadline())
    assert isinstance(reply, wire.StatsReply)
    return reply


def read(node: EmbeddedNode, folder: Path) -> Trace:
    """What has been recorded, which ends with this."""
    node.call(node.node.core.recording.close)
    return read_recorded(folder)


def test_nothing_is_recorded_by_default(serve: Serve, tmp_path: Path) -> None:
    node = serve()
    with connected(node.node.address) as channel:
        namespace = opened(channel)
        lease(channel, namespace, HASHES[:4])
        assert stats(channel)["recording"] == 0
        assert record(channel, "tell").troubles == ["not recording"]
        assert node.node.core.recording._recorder is None


def test_a_node_records_from_its_start(serve: Serve, tmp_path: Path) -> None:
    node = serve(record=str(tmp_path / "rec"))
    with connected(node.node.address) as channel:
        namespace = opened(channel)
        lease(channel, namespace, HASHES[:20])
        reserve(channel, namespace, HASHES[:24])
        lease(channel, namespace, HASHES[:17], request="a")
        lease(channel, namespace, HASHES[:17], request="a")
        told = stats(channel)
        assert (told["recording"], told["recorded_requests"]) == (1, 2)
    trace = read(node, tmp_path / "rec")
    assert [request.prompt_tokens for request in trace.requests()] == [20 * 16, 17 * 16]
    assert trace.output_tokens.tolist() == [4 * 16, 0]
    first, second = (list(request.blocks) for request in trace.requests())
    assert first[:2] == second[:2]


def test_what_a_look_up_says_of_its_request_is_recorded_too(serve: Serve, tmp_path: Path) -> None:
    """Who finds all of it saves nothing."""
    node = serve(record=str(tmp_path / "rec"))
    with connected(node.node.address) as channel:
        namespace = opened(channel)
        save(channel, namespace, HASHES[:9])
        whole, longer = b"".join(HASHES[:9]), b"".join(HASHES[:12])
        for asked in (
            wire.TakeLease(namespace, whole, "a", session=7, hint="tool_call"),
            wire.TakeLease(namespace, whole, "b", hint="final"),
            wire.TakeLease(namespace, whole, "c"),
            wire.TakeLease(namespace, longer, "d", session=7),
        ):
            channel.call(asked, deadline())
        save(channel, namespace, HASHES[:12])  # It says nothing, and takes back nothing.
    trace = read(node, tmp_path / "rec")
    assert [each.kind for each in trace.requests()] == ["tool_call", "final", "unknown", "unknown"]
    assert trace.sessions.tolist() == [0, -1, -1, 0]


def test_an_operator_turns_it_on_and_off(serve: Serve, tmp_path: Path) -> None:
    node = serve()
    folder = tmp_path / "rec"
    with connected(node.node.address) as channel:
        namespace = opened(channel)
        begun = record(channel, "begin", folder, sample=1_000_000)
        assert begun.troubles == [f"recording into {folder}"]
        lease(channel, namespace, HASHES[:9])
        assert record(channel, "tell").values["recorded_requests"] == 1
        assert record(channel, "end").troubles == ["not recording"]
        lease(channel, namespace, HASHES[:9])
        assert record(channel, "tell").values["recorded_requests"] == 1
        record(channel, "begin", folder)
        lease(channel, namespace, HASHES[:5])
        assert record(channel, "end").values["recorded_requests"] == 2
    trace = read_recorded(folder)
    assert trace.request_count == 2
    assert "2 files of 2 recordings" in trace.note


def test_a_folder_that_cannot_be_is_said_at_once(serve: Serve, tmp_path: Path) -> None:
    node = serve()
    (tmp_path / "file").touch()
    with connected(node.node.address) as channel:
        for number, folder in enumerate([tmp_path / "file", "/proc/none", "/a\0b"], 1):
            told = record(channel, "begin", folder)
            assert told.values["recording"] == 0 and told.values["record_failures"] == number
            assert told.troubles[0].startswith("not recording: the recording ended: ")
        assert record(channel, "begin", tmp_path / "rec").values["recording"] == 1


def test_what_is_asked_wrongly_is_refused(serve: Serve, tmp_path: Path) -> None:
    node = serve()
    with connected(node.node.address) as channel:
        refused("bad_config", channel, wire.Record("begin"))
        refused("bad_config", channel, wire.Record("begin", str(tmp_path), bytes_max=5))
        refused("bad_config", channel, wire.Record("begin", str(tmp_path), sample=2_000_000))
        refused("bad_message", channel, wire.Record("pause"))


def test_only_the_nodes_own_user_names_a_folder() -> None:
    config = NodeConfig(record="/var/rec", record_bytes="2MiB", record_sample=0.5)
    assert asked_plan(config, wire.Record("begin"), False) == Plan(Path("/var/rec"), 2 << 20, 0.5)
    asked = wire.Record("begin", "/elsewhere", 3 << 20, 250_000)
    assert asked_plan(config, asked, True) == Plan(Path("/elsewhere"), 3 << 20, 0.25)
    with pytest.raises(Exception, match="may not choose where"):
        asked_plan(config, asked, False)


@pytest.mark.parametrize("settings", [{"record_bytes": "5"}, {"record_bytes": "many"}])
def test_settings_that_are_none(settings: dict[str, str]) -> None:
    with pytest.raises(BadInput, match="record_bytes"):
        Plan.of(NodeConfig(record="/var/rec", **settings))


def test_a_disk_that_fails_is_said_once_and_the_node_goes_on(
    serve: Serve, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "rec"
    folder.write_text("in the way")
    node = serve(record=str(folder))
    recording = node.node.core.recording
    assert recording._files is not None
    recording._files._thread.join(PATIENCE_S)
    with connected(node.node.address) as channel:
        namespace = opened(channel)
        for count in range(1, 9):
            lease(channel, namespace, HASHES[:count])
            node.call(recording.tick)
        assert save(channel, namespace, HASHES[:4]) == 4
        told = stats(channel)
        assert (told["recording"], told["record_failures"]) == (0, 1)
        reply = record(channel, "tell")
        assert "the recording ended" in reply.troubles[0]
        assert str(folder) in reply.troubles[0]
        assert recording.trouble in node.node.core.troubles()
    assert len([each for each in caplog.messages if "the recording ended" in each]) == 1
    folder.unlink()
    with connected(node.node.address) as channel:
        assert record(channel, "begin").values["recording"] == 1
        assert node.node.core.troubles() == []


def test_clients_that_send_nonsense_do_no_harm(serve: Serve, tmp_path: Path) -> None:
    node = serve(record=str(tmp_path))
    with connected(node.node.address) as channel:
        namespace = opened(channel)
        for parent in (b"", b"x", b"y" * 15, b"z" * 64):
            for prefix in (b"", HASHES[3] * 5, b"".join(HASHES[::-1])):
                channel.call(wire.TakeLease(namespace, prefix, "n" * 900, parent=parent), deadline())
    assert read(node, tmp_path).request_count >= 2


def test_it_is_written_while_the_node_lives(serve: Serve, tmp_path: Path) -> None:
    node = serve(record=str(tmp_path))
    with connected(node.node.address) as channel:
        lease(channel, opened(channel), HASHES[:9])
    node.call(node.node.core.recording._flush)
    while not list(tmp_path.glob("*.kvrec")) or not read_recorded(tmp_path).request_count:
        os.sched_yield()


def test_a_disk_that_fails_at_the_very_end_is_said_too(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, data: memoryview) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kvcache.eviction.traces.record_files.os.write", full)
    node = serve(record=str(tmp_path / "rec"))
    with connected(node.node.address) as channel:
        lease(channel, opened(channel), HASHES[:9])
        assert "No space left on device" in record(channel, "end").troubles[0]
        assert "No space left on device" in record(channel, "tell").troubles[0]
        assert stats(channel)["record_failures"] == 1


class Stopped:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.at_ns = 0

    def now_ns(self) -> int:
        return self.at_ns


def asked_often(recording: Recording, clock: Stopped, count: int) -> None:
    for number in range(count):
        clock.at_ns += NS_PER_S
        hashes = b"".join(HASHES[:24]) + number.to_bytes(16, "little")
        recording.asked(wire.TakeLease(b"", hashes), 16, "t")
        recording.tick()


def test_files_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RecordFiles, "is_full", property(lambda files: True))
    clock = Stopped()
    recording = Recording(clock)
    recording.begin(Plan(tmp_path, 1 << 20, 1.0), 0)
    asked_often(recording, clock, 5)
    recording.close()
    assert len(list(tmp_path.glob("*.kvrec"))) == 5
    trace = read_recorded(tmp_path)
    assert trace.arrivals_ms.tolist() == [0, 1_000, 2_000, 3_000, 4_000]
    assert len({request.blocks[2] for request in trace.requests()}) == 1


def test_what_follows_lost_records_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([True, False, True, True, False, False, True, True])
    put = RecordFiles.put
    monkeypatch.setattr(RecordFiles, "put", lambda files, records: next(answers) and put(files, records))
    clock = Stopped()
    recording = Recording(clock)
    recording.begin(Plan(tmp_path, 1 << 20, 1.0), 0)
    asked_often(recording, clock, 8)
    assert recording.stats()["record_lost_batches"] == 3
    recording.close()
    trace = read_recorded(tmp_path)
    assert trace.arrivals_ms.tolist() == [0, 2_000, 3_000, 6_000, 7_000]
    # The batch that gave known blocks their numbers in the last file was lost: there they are new.
    assert len({request.blocks[2] for request in trace.requests()}) == 2
