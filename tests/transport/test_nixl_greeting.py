"""The greeting of ``nixl://``: who does not prove that he knows the key hears nothing of this process."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from kvcache.transport.base import PeerLost
from kvcache.transport.keys import CONNECTS, LISTENS, NONCE_BYTES, proof
from kvcache.transport.nixl_wire import (
    GREETING_BYTES_MAX,
    VERSION,
    AnyMessage,
    Beat,
    Challenge,
    Control,
    Note,
    Opening,
    Proof,
)

PATIENCE_S = 20
KEY = bytes(range(32))
OTHER = bytes(range(1, 33))

Side = Callable[[Control], Awaitable[None]]
Outcome = BaseException | None


def meet(connects: Side, listens: Side) -> tuple[Outcome, Outcome]:
    """What became of both sides; each cuts the connection when it ends, well or not."""

    async def run(side: Side, control: Control) -> Outcome:
        try:
            async with asyncio.timeout(PATIENCE_S):
                await side(control)
        except PeerLost as error:
            control.cut()
            return error
        finally:
            control.close()
        return None

    async def main() -> tuple[Outcome, Outcome]:
        came: asyncio.Queue[Control] = asyncio.Queue()
        server = await asyncio.start_server(lambda *ends: came.put_nowait(Control(*ends)), "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()[:2]
        near = Control(*await asyncio.open_connection(host, port))
        far = await came.get()
        try:
            first, second = await asyncio.gather(run(connects, near), run(listens, far))
        finally:
            server.close()
            await asyncio.gather(near.closed(1), far.closed(1))
        return first, second

    return asyncio.run(main())


def knows(key: bytes) -> Side:
    return lambda control: control.introduce(key)


def asks(key: bytes) -> Side:
    return lambda control: control.let_in(key)


@pytest.mark.parametrize("key", [KEY, b""], ids=["a key", "none"])
def test_who_knows_the_key_is_let_in(key: bytes) -> None:
    assert meet(knows(key), asks(key)) == (None, None)


@pytest.mark.parametrize("key", [OTHER, b""], ids=["another", "none"])
def test_who_does_not_is_not_and_hears_no_proof(key: bytes) -> None:
    stranger, listener = meet(knows(key), asks(KEY))
    assert "closed" in str(stranger)
    assert "does not know the key" in str(listener)


def test_our_own_proof_sent_back_is_no_proof() -> None:
    async def mirror(control: Control) -> None:
        opening = await control.receive()
        assert isinstance(opening, Opening)
        control.send(Challenge(opening.nonce))
        control.send(await control.receive())
        await control.drained()

    near, _ = meet(knows(KEY), mirror)
    assert "does not know the key" in str(near)


def test_a_proof_of_another_connection_or_role_is_none() -> None:
    heard: list[bytes] = []

    def prover(role: bytes, challenged: bytes | None) -> Side:
        async def connect(control: Control) -> None:
            opening = Opening(VERSION, bytes(NONCE_BYTES))
            control.send(opening)
            challenge = await control.receive()
            assert isinstance(challenge, Challenge)
            heard.append(challenge.nonce)
            said = b"kvcache nixl" + VERSION.to_bytes(4, "little") + opening.nonce
            control.send(Proof(proof(KEY, role, said + (challenged or challenge.nonce))))
            assert isinstance(await control.receive(), Proof)

        return connect

    assert meet(prover(CONNECTS, None), asks(KEY)) == (None, None)
    for role, challenged in ((LISTENS, None), (CONNECTS, heard[0])):
        _, listener = meet(prover(role, challenged), asks(KEY))
        assert "does not know the key" in str(listener)


@pytest.mark.parametrize(
    "first", [Beat(), Opening(VERSION + 1, bytes(NONCE_BYTES)), Proof(bytes(32)), Note(b"let me in")]
)
def test_nothing_else_is_heard_first(first: AnyMessage) -> None:
    async def speak(control: Control) -> None:
        control.send(first)
        await control.receive()

    stranger, listener = meet(speak, asks(KEY))
    assert "closed" in str(stranger)
    assert "version" in str(listener)


def test_a_stranger_may_say_little() -> None:
    async def shout(control: Control) -> None:
        control.send(Note(bytes(GREETING_BYTES_MAX + 1)))
        await control.receive()

    _, listener = meet(shout, asks(KEY))
    assert "frame of" in str(listener)
