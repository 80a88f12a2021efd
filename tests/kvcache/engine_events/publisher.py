"""A publisher of an engine's events, with the sockets and frames of vLLM 0.32's (``ZmqEventPublisher``):
PUB [topic, number, payload], and a ROUTER that answers a number with what its buffer still has."""

from __future__ import annotations

import threading
from collections import deque
from types import TracebackType

import zmq

END = (-1).to_bytes(8, "big", signed=True)
SLICE_MS = 20


class Publisher:
    """``send`` from one thread; replays are answered in another. Use as a context manager."""

    def __init__(self, endpoint: str, replay: str = "", topic: bytes = b"", buffered: int = 10_000) -> None:
        self.buffer: deque[tuple[int, bytes]] = deque(maxlen=buffered)
        self.mute = threading.Event()
        """Replays are not answered while it is set."""
        self.replays: list[int] = []
        self.topic = topic
        self.old_frames = False
        """Replays without a topic, as engines of before send them."""
        self._context = zmq.Context()
        self._live = self._context.socket(zmq.XPUB)  # It is a PUB that can say who subscribed.
        self._live.linger = 0
        self._live.bind(endpoint)
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None
        if replay:
            answering = self._context.socket(zmq.ROUTER)
            answering.bind(replay)
            self._thread = threading.Thread(target=self._serve, args=(answering,), daemon=True)
            self._thread.start()

    def __enter__(self) -> Publisher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def subscribed(self, deadline_ms: int = 30_000) -> None:
        """Somebody subscribed: what is sent from now on arrives there."""
        assert self._live.poll(deadline_ms), "nobody subscribes"
        assert self._live.recv()[:1] == b"\x01"

    def send(self, seq: int, payload: bytes, lose: bool = False, frames: list[bytes] | None = None) -> None:
        """``lose``: it is kept for replays, and never sent."""
        if not lose:
            whole = [self.topic, seq.to_bytes(8, "big"), payload]
            self._live.send_multipart(whole if frames is None else frames)
        self.buffer.append((seq, payload))

    def close(self) -> None:
        self._ending.set()
        if self._thread is not None:
            self._thread.join()
        self._context.destroy(linger=0)

    def _serve(self, answering: zmq.Socket[bytes]) -> None:
        while not self._ending.is_set():
            asked = answering.poll(SLICE_MS)
            if self.mute.is_set():
                self._ending.wait(SLICE_MS / 1000)
                continue
            if not asked:
                continue
            who, _, start = answering.recv_multipart()
            first = int.from_bytes(start, "big")
            self.replays.append(first)
            topic = [] if self.old_frames else [self.topic]
            for seq, payload in list(self.buffer):
                if seq >= first:
                    answering.send_multipart([who, b"", *topic, seq.to_bytes(8, "big"), payload])
            answering.send_multipart([who, b"", *([] if self.old_frames else [b""]), END, b""])
        answering.close(linger=0)
