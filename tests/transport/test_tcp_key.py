"""A tcp listener with a key lets in who proves that he knows it, nobody else; a crowd keeps no peer out."""

from __future__ import annotations

import asyncio
import contextlib
import logging

import pytest

from kvcache.errors import BadInput
from kvcache.testing.transport_pair import CALM, Notes, soon
from kvcache.transport import tcp_listener
from kvcache.transport.base import Limits, PeerLost
from kvcache.transport.doorstep import WAITING_OF_A_HOST_MAX
from kvcache.transport.keys import CONNECTS, LISTENS, NONCE_BYTES, PROOF_BYTES, proof, shown, with_key
from kvcache.transport.tcp import DEFAULT_ADDRESS, TcpTransport
from kvcache.transport.tcp_frames import HELLO, Hello, Kind, frame, pack_challenge
from tests.transport.tcp_place import HELLO_ALONE, PATIENCE_S, WARY, Place, soon_over, visit
from tests.transport.test_tcp import TestTcp as Contract

KEY = bytes(range(32))
OTHER = bytes(range(1, 33))


class TestTcpWithAKey(Contract):
    def make(self, limits: Limits) -> TcpTransport:
        return TcpTransport(limits, key=KEY)


async def is_sent_away(reader: asyncio.StreamReader) -> bool:
    """And nothing more is said to him."""
    async with asyncio.timeout(PATIENCE_S):
        with contextlib.suppress(ConnectionResetError):
            return await reader.read() == b""
    return True


async def refusals(found: Place, count: int) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while found.listener.refused_count < count:
            await asyncio.sleep(0)


@pytest.mark.parametrize("key", [b"", OTHER], ids=["no key", "another key"])
def test_who_does_not_know_the_key_is_not_let_in(key: bytes) -> None:
    async def scenario(found: Place) -> None:
        stranger = TcpTransport(CALM, key=key)
        with pytest.raises(PeerLost, match="another key"):
            await stranger.connect(with_key(shown(found.listener.address), key), soon(), Notes().hear)
        await refusals(found, 1)
        assert found.accepted == []
        await stranger.close()

    visit(scenario, key=KEY)


@pytest.mark.parametrize("role", [LISTENS, b"x"], ids=["the other side's", "nobody's"])
def test_a_proof_of_another_role_opens_nothing(role: bytes) -> None:
    async def scenario(found: Place) -> None:
        (reader, writer), said = await found.challenged()
        writer.write(proof(KEY, role, said))
        assert await is_sent_away(reader)
        assert found.accepted == []

    visit(scenario, key=KEY)


def test_a_proof_is_good_for_its_own_connection_only() -> None:
    async def scenario(found: Place) -> None:
        _, said = await found.challenged()
        (reader, writer), other = await found.challenged()
        assert said != other, "the challenge is another each time"
        writer.write(proof(KEY, CONNECTS, said))  # What somebody heard of the first.
        assert await is_sent_away(reader)
        assert found.accepted == []

    visit(scenario, key=KEY)


def test_a_proof_for_another_session_opens_nothing() -> None:
    async def scenario(found: Place) -> None:
        for other in (
            Hello(b"x" * 16, 0, 1, HELLO_ALONE.nonce),
            Hello(HELLO_ALONE.session, 0, 2, HELLO_ALONE.nonce),
            Hello(HELLO_ALONE.session, 0, 1, b"x" * NONCE_BYTES),
        ):
            (reader, writer), said = await found.challenged()
            writer.write(proof(KEY, CONNECTS, other.pack() + said[HELLO.size :]))
            assert await is_sent_away(reader)
        assert found.accepted == []

    visit(scenario, key=KEY)


def test_nothing_is_heard_before_the_proof() -> None:
    async def scenario(found: Place) -> None:
        (reader, writer), _ = await found.challenged()
        writer.write(frame(Kind.NOTE, 0, b"let me in, let me in, let me in, let me in"))
        assert await is_sent_away(reader)
        assert found.notes.heard == []

    visit(scenario, key=KEY)


@pytest.mark.slow
@pytest.mark.timed
def test_who_does_not_answer_the_challenge_is_sent_away_in_time() -> None:
    async def scenario(found: Place) -> None:
        (reader, writer), said = await found.challenged()
        writer.write(proof(KEY, CONNECTS, said)[:-1])
        async with soon_over(WARY.silence_ns):
            assert await is_sent_away(reader)

    visit(scenario, WARY, KEY)


def pretend(answer: bytes | None) -> str | None:
    """Connect with ``KEY`` to who listens and does not know it: he sends ``answer``, or what he was sent.
    Why this side does not believe him, None when it does."""

    gone = asyncio.Event()

    async def came(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        opening = await reader.readexactly(HELLO.size)
        writer.write(pack_challenge(opening[-NONCE_BYTES:]))
        heard = await reader.readexactly(PROOF_BYTES)
        writer.write(heard if answer is None else answer)
        await reader.read()
        writer.close()
        await writer.wait_closed()
        gone.set()

    async def main() -> str | None:
        transport = TcpTransport(CALM)
        server = await asyncio.start_server(came, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        try:
            await transport.connect(with_key(f"tcp://127.0.0.1:{port}", KEY), soon(), Notes().hear)
        except PeerLost as error:
            return str(error)
        finally:
            await transport.close()
            await gone.wait()
            server.close()
        return None

    return asyncio.run(main())


def test_who_listens_proves_it_too() -> None:
    assert "does not know the key" in (pretend(bytes(PROOF_BYTES)) or "")


def test_our_own_proof_and_nonce_sent_back_are_no_proof() -> None:
    assert "does not know the key" in (pretend(None) or "")


def test_the_key_is_in_no_error_and_no_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    said: list[str] = []

    async def scenario(found: Place) -> None:
        assert KEY.hex() in found.listener.address
        stranger = TcpTransport(CALM)
        for address, key in (
            (shown(found.listener.address), OTHER),
            ("tcp://127.0.0.1:1", KEY),
            ("tcp://127.0.0.1", KEY),
            ("nixl://127.0.0.1:1", KEY),
            ("tcp://127.0.0.1:1#zz", KEY),
        ):
            try:
                await stranger.connect(with_key(address, key), soon(), Notes().hear)
            except (PeerLost, BadInput) as error:
                said.extend((str(error), repr(error)))
        end = await stranger.connect(found.listener.address, soon(), Notes().hear)
        said.extend((end.peer, repr(end), repr(found.listener), repr(stranger)))
        await stranger.close()
        await refusals(found, 1)

    visit(scenario, key=KEY)
    assert len(said) == 14
    assert "let 1 in no further" in caplog.text
    for text in (*said, caplog.text):
        assert KEY.hex() not in text
        assert OTHER.hex() not in text


def test_a_crowd_of_one_host_keeps_no_peer_out() -> None:
    async def scenario(found: Place) -> None:
        crowd = [await found.stranger("127.0.0.2") for _ in range(5 * WAITING_OF_A_HOST_MAX)]
        await refusals(found, 4 * WAITING_OF_A_HOST_MAX)
        for at, (reader, _) in enumerate(crowd[: 4 * WAITING_OF_A_HOST_MAX]):
            assert await is_sent_away(reader), at
        await found.proven(key=KEY)  # From another host, and, in ``visit``, from a transport.
        async with asyncio.timeout(PATIENCE_S):
            while not found.accepted:
                await asyncio.sleep(0)
        for reader, _ in crowd[4 * WAITING_OF_A_HOST_MAX :]:
            assert not reader.at_eof(), "who has come last still waits"

    visit(scenario, key=KEY)


def test_a_crowd_of_the_peers_own_host_does_not_either() -> None:
    async def scenario(found: Place) -> None:
        for _ in range(2 * WAITING_OF_A_HOST_MAX):
            await found.stranger()
        await found.proven(key=KEY)

    visit(scenario, key=KEY)


def test_seats_are_bounded_and_free_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp_listener, "SEATS_MAX", 3)

    async def scenario(found: Place) -> None:
        peer = TcpTransport(CALM)
        ends = [await peer.connect(found.listener.address, soon(), Notes().hear) for _ in range(3)]
        with pytest.raises(PeerLost, match="no room"):
            await peer.connect(found.listener.address, soon(), Notes().hear)
        await ends[0].close()
        async with asyncio.timeout(PATIENCE_S):
            while not any(end.is_lost for end in found.accepted):
                await asyncio.sleep(0)
        await peer.connect(found.listener.address, soon(), Notes().hear)
        await peer.close()
        async with asyncio.timeout(PATIENCE_S):
            while not all(end.is_lost for end in found.accepted):
                await asyncio.sleep(0)

    visit(scenario, key=KEY)


def test_streams_of_two_counts_do_not_join() -> None:
    async def scenario(found: Place) -> None:
        await found.proven(Hello(bytes(16), 2, 3, bytes(NONCE_BYTES)), KEY)
        (reader, writer), said = await found.challenged(Hello(bytes(16), 0, 2, bytes(NONCE_BYTES)))
        writer.write(proof(KEY, CONNECTS, said))
        assert await is_sent_away(reader)
        assert found.accepted == []

    visit(scenario, key=KEY)


def test_an_address_to_listen_at_brings_no_key() -> None:
    async def main() -> None:
        transport = TcpTransport(CALM)
        with pytest.raises(BadInput):
            await transport.listen(with_key(DEFAULT_ADDRESS, KEY), lambda _: None, Notes().hear)
        await transport.close()

    asyncio.run(main())


def test_an_endpoint_of_many_streams_is_no_crowd() -> None:
    async def scenario(found: Place) -> None:
        peer = TcpTransport(CALM, stream_count=2 * WAITING_OF_A_HOST_MAX)
        await peer.connect(found.listener.address, soon(), Notes().hear)
        assert found.listener.refused_count == 0
        await peer.close()

    visit(scenario, key=KEY)
