"""Streams and events, of every device; and what torch's calls for CUDA are made of where there is no GPU."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch

from kvcache.device import streams
from kvcache.device.streams import CpuStreams, CudaStreams, Streams, streams_of
from kvcache.errors import Unavailable
from tests.device.rigs import DEVICES, PATIENCE_S


@pytest.fixture(params=DEVICES)
def of(request: pytest.FixtureRequest) -> Iterator[Streams]:
    made = streams_of(torch.device(request.param))
    yield made
    made.close()
    made.close()


def zero(of: Streams) -> torch.Tensor:
    """It is there for every stream: the caller's own, which fills it, is not waited for by others."""
    made = torch.zeros(1, dtype=torch.int64, device=of.device)
    assert of.current().mark().wait(PATIENCE_S)
    return made


def adder(to: torch.Tensor, value: int) -> Callable[[], None]:
    """Order matters: the last of many is the low digit."""
    return lambda: streams_do(to.mul_(3).add_(value))


def streams_do(_: object) -> None:
    """Work gives nothing."""


def test_work_is_done_in_its_order(of: Streams) -> None:
    stream, total = of.new("one", urgent=False), zero(of)
    for value in (1, 2, 0, 1):
        stream.run(adder(total, value))
    event = stream.mark()
    assert event.wait(PATIENCE_S)
    assert event.is_done()
    assert int(total) == 1 * 27 + 2 * 9 + 0 * 3 + 1


def test_work_may_write_what_was_made_in_inference_mode(of: Streams) -> None:
    with torch.inference_mode():
        total = zero(of)
    for stream in (of.new("one", urgent=False), of.current()):
        stream.run(adder(total, 1))
        assert stream.mark().wait(PATIENCE_S)
    assert int(total) == 1 * 3 + 1


def test_a_stream_waits_for_another(of: Streams) -> None:
    one, two = of.new("one", urgent=True), of.new("two", urgent=False)
    total = zero(of)
    for value in range(30):
        stream, other = (one, two) if value % 2 else (two, one)
        stream.run(adder(total, value % 3))
        other.after(stream.mark())
    assert one.mark().wait(PATIENCE_S)
    assert two.mark().wait(PATIENCE_S)
    wanted = 0
    for value in range(30):
        wanted = 3 * wanted + value % 3
    assert int(total) == wanted


def test_the_callers_own_stream_is_in_order_with_the_caller(of: Streams) -> None:
    total = zero(of)
    own, stream = of.current(), of.new("one", urgent=False)
    own.run(adder(total, 1))
    stream.after(own.mark())
    stream.run(adder(total, 2))
    own.after(stream.mark())
    own.run(adder(total, 0))
    assert own.mark().wait(PATIENCE_S)
    assert int(total) == 1 * 9 + 2 * 3


def test_a_wait_ends_in_time() -> None:
    made, gate = CpuStreams(), threading.Event()
    stream = made.new("one", urgent=False)
    stream.run(lambda: streams_do(gate.wait(PATIENCE_S)))
    event = stream.mark()
    assert not event.is_done()
    assert not event.wait(0.001)
    gate.set()
    assert event.wait(PATIENCE_S)
    made.close()


def test_a_failure_passes_on_to_who_waits_for_it() -> None:
    made = CpuStreams()
    one, two = made.new("one", urgent=False), made.new("two", urgent=False)

    def fail() -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    one.run(fail)
    two.after(one.mark())
    with pytest.raises(Unavailable, match="unspecified launch failure"):
        two.mark().wait(PATIENCE_S)
    with pytest.raises(Unavailable, match="unspecified launch failure"):
        made.current().after(one.mark())
    with pytest.raises(Unavailable, match="unspecified launch failure"):
        made.current().run(fail)
    made.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_in_the_work_is_a_failure_and_no_hang() -> None:
    made = CpuStreams()
    stream, gate = made.new("one", urgent=False), threading.Event()

    def wrong() -> None:
        assert gate.wait(PATIENCE_S)
        raise AssertionError("a bug")

    stream.run(wrong)
    before = stream.mark()
    gate.set()
    for event in (before, stream.mark()):
        with pytest.raises(Unavailable, match="the stream has ended"):
            event.wait(PATIENCE_S)
    made.close()
    with pytest.raises(Unavailable, match="the stream has ended"):
        stream.mark().wait(PATIENCE_S)


# --- CUDA, of doubles -----------------------------------------------------------------------------


class Cuda:
    """``torch.cuda``, as far as streams use it. ``polls``: so often an event is not done yet."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.polls = 0
        self.broken = ""
        self.current = 0
        self.asked_on: set[int] = set()

    def said(self, what: str) -> None:
        if self.broken == what.partition(" ")[0]:
            raise RuntimeError("CUDA error: device lost\nCompile with TORCH_USE_CUDA_DSA")
        self.log.append(what)

    def Stream(self, device: torch.device, priority: int) -> SimpleNamespace:  # noqa: N802 - As torch has it.
        self.said(f"stream {priority}")
        return SimpleNamespace(wait_event=lambda event: self.said("wait_event"), device=device)

    def Event(self) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(record=lambda stream: self.said("record"), query=self.query)

    @contextlib.contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device.index
        yield
        self.current = before

    def query(self) -> bool:
        self.said("query")
        self.asked_on.add(self.current)
        self.polls -= 1
        return self.polls < 0

    def stream(self, stream: object) -> threading.Lock:
        self.said("enter")
        self.asked_on.add(self.current)
        return threading.Lock()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    double = Cuda()
    monkeypatch.setattr(streams.torch, "cuda", double)
    return double


def test_cuda_work_runs_on_its_stream_and_events_join_them(cuda: Cuda) -> None:
    made = CudaStreams(torch.device("cuda", 0))
    one, two = made.new("one", urgent=True), made.new("two", urgent=False)
    one.run(lambda: cuda.said("work"))
    two.after(one.mark())
    assert cuda.log == ["stream -1", "stream 0", "enter", "work", "record", "wait_event"]


def test_a_thread_whose_current_gpu_is_another_asks_that_one_for_nothing(cuda: Cuda) -> None:
    """It would be given memory of it that it never uses."""
    stream = CudaStreams(torch.device("cuda", 3)).new("one", urgent=False)
    stream.run(lambda: cuda.said(f"work on {cuda.current}"))
    assert stream.mark().wait(PATIENCE_S)
    assert "work on 3" in cuda.log
    assert (cuda.asked_on, cuda.current) == ({3}, 0)


def test_nothing_comes_before_an_event_that_does_not_come(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "_END_S", 0.0)
    stream = CudaStreams(torch.device("cuda", 0)).new("one", urgent=False)
    with pytest.raises(Unavailable, match="failed under a copy"):
        stream.after(streams.CpuEvent())


def test_a_cuda_event_is_asked_until_it_is_done_or_time_is_over(cuda: Cuda) -> None:
    event = CudaStreams(torch.device("cuda", 0)).new("one", urgent=False).mark()
    cuda.polls = 3
    assert event.wait(PATIENCE_S)
    assert cuda.log.count("query") == 4
    cuda.polls = 1 << 60
    assert not event.wait(0.002)
    assert not event.is_done()


@pytest.mark.parametrize("call", ["stream", "enter", "work", "record", "wait_event", "query"])
def test_whatever_cuda_call_fails_is_unavailable(cuda: Cuda, call: str) -> None:
    cuda.broken = call
    with pytest.raises(Unavailable) as caught:
        stream = CudaStreams(torch.device("cuda", 0)).new("one", urgent=False)
        stream.run(lambda: cuda.said("work"))
        stream.after(stream.mark())
        stream.mark().wait(PATIENCE_S)
    assert caught.value.why == "CUDA error: device lost"
    assert "Xid" in caught.value.todo
