r"""Leases as operations: taken batch by batch, waited for, given back.

    ask --> all there, or no more to come, or no time left --> held
     ^ \--> more to come --> give back --> wait --'

What is leased is given back before it is asked for again, because whoever names a request gets the
same lease for it until all have released it. A batch is taken only behind a whole one: the first that is
not, held or coming, is the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from kvcache.block import BlockHash
from kvcache.client.checks import batches, check_lease, check_reply, check_wait, joined_hashes
from kvcache.client.link import Context
from kvcache.client.steps import Operation, ask, post
from kvcache.client.store import Grant, Handle, Lease
from kvcache.client.waiting import Patience
from kvcache.clock import NS_PER_MS
from kvcache.errors import BadInput, KVCacheError, Unavailable
from kvcache.request_hints import UNKNOWN, RequestHints
from kvcache.wire import BATCH_BLOCKS_MAX, HBM, HOST, Leased, Release, Released, TakeLease

CHECKSUM_BYTES: Final = 16


@dataclass(frozen=True, slots=True)
class _Terms:
    """What is the same in every call for one lease."""

    request: str
    duration_ms: int
    source: str
    pushed: bool
    hints: RequestHints
    hbm: bool


@dataclass(frozen=True, slots=True)
class _Behind:
    """A batch stands behind ``count`` blocks, the last of which is ``parent`` (empty: none)."""

    count: int
    parent: bytes


def lease(
    context: Context,
    handle: Handle,
    prefix: Sequence[BlockHash],
    request: str,
    duration_ms: int,
    wait_ms: int,
    source: str = "",
    pushed: bool = False,
    hints: RequestHints = UNKNOWN,
    hbm: bool = False,
) -> Operation[Lease]:
    """``hbm``: of the connection's slab of HBM first, if there is one, or of that for which it plans."""
    check_lease(request, duration_ms, source)
    check_wait(wait_ms)
    joined_hashes(prefix)
    terms = _Terms(request, duration_ms, source, pushed, hints, hbm and context.link.leases_hbm)
    patience = Patience(context, wait_ms)
    grants: list[Grant] = []
    held = coming = 0
    try:
        for batch in batches(prefix, BATCH_BLOCKS_MAX) if context.reaches(handle) else ():
            behind = _Behind(held, prefix[held - 1] if held else b"")
            given, coming = yield from _granted(context, handle, behind, batch, terms, patience)
            for grant in given:
                grants.append(grant)
                context.link.hold(grant.name)
                held += grant.count
            if held < behind.count + len(batch):
                break
    except BadInput as error:
        context.missed(error)
    except Unavailable as error:
        context.missed(error)
        held, coming, grants = 0, 0, []  # They went with the connection.
    except GeneratorExit:
        raise  # The driver gave up the connection, and with it all that it held.
    except BaseException:
        yield from _release_grants(context, grants)
        raise
    context.tally.add("leased_blocks", held)
    context.tally.add("coming_blocks", coming)
    return Lease(handle, tuple(prefix[:held]), tuple(grants), context.link.number, coming)


def release(context: Context, held: Lease) -> Operation[None]:
    if context.link.owns(held):
        yield from _release_grants(context, held.grants)


def _granted(
    context: Context,
    handle: Handle,
    behind: _Behind,
    batch: Sequence[BlockHash],
    terms: _Terms,
    patience: Patience,
) -> Operation[tuple[list[Grant], int]]:
    """What the node grants of a batch, and how many blocks behind it are still coming when patience ends."""
    joined, rate = b"".join(batch), context.tokens_s
    while True:
        # A lease is counted from when it was asked for, so a wait must leave it most of its time.
        wait_ms = patience.next_ms(terms.duration_ms // 2)
        sent_ns = context.clock.now_ns()
        wanted = TakeLease(
            handle.namespace_id,
            joined,
            terms.request,
            terms.duration_ms,
            wait_ms,
            rate,
            terms.source,
            terms.pushed,
            behind.parent,
            terms.hints.hint,
            terms.hints.priority,
            terms.hints.session,
            terms.hints.gap_ms,
            terms.hints.keep_ms,
            terms.hbm,
        )
        reply = yield from ask(Leased, wanted)
        _check(reply, len(batch), terms.hbm)
        if not reply.coming or patience.over():
            break
        both = ((reply.lease, HOST), (reply.hbm.lease, HBM))
        yield from _give_back([Release(lease_id, tier=tier) for lease_id, tier in both if lease_id])
        context.tally.add("lease_waits")
        yield from patience.rest()
    # Counted from when we asked, on our own clock: never later than the node means it.
    expires_ns = sent_ns + reply.remaining_ms * NS_PER_MS
    hot, start = reply.hbm, behind.count + reply.hbm.count
    grants = [
        Grant(
            hot.lease,
            behind.count,
            hot.count,
            tuple(hot.offsets),
            hot.checksums,
            expires_ns,
            HBM,
            hot.incarnation,
        ),
        Grant(reply.lease, start, reply.count, tuple(reply.offsets), reply.checksums, expires_ns),
    ]
    return [grant for grant in grants if grant.count], reply.coming


def _check(reply: Leased, block_count: int, hbm: bool) -> None:
    count, hot = reply.count, reply.hbm
    check_reply(hbm or not hot.count, "it leased in HBM what was not asked for there")
    check_reply(len(hot.checksums) == hot.count * CHECKSUM_BYTES, "not one checksum a block")
    check_reply(len(hot.offsets) == hot.count, "not one offset a block")
    check_reply(bool(hot.lease) == bool(hot.count), "a lease without blocks, or blocks without a lease")
    check_reply(hot.count + count + reply.coming <= block_count, "it leased more blocks than were asked for")
    check_reply(len(reply.checksums) == count * CHECKSUM_BYTES, "not one checksum a block")
    check_reply(len(reply.offsets) in (0, count), "not one offset a block")
    check_reply(bool(reply.lease) == bool(count), "a lease without blocks, or blocks without a lease")


def _give_back(releases: Sequence[Release]) -> Operation[None]:
    """Release what nobody was told of. A cancellation comes in place of a step, which is then made up, with
    those behind it."""
    for at, release in enumerate(releases):
        try:
            yield from post(release)
        except (GeneratorExit, KVCacheError):
            raise
        except BaseException:
            for left in releases[at:]:
                yield from post(left)
            raise


def _release_grants(context: Context, grants: Sequence[Grant]) -> Operation[None]:
    for grant in grants:
        wrong = context.link.let_go(grant.name)
        if wrong is None:
            continue
        try:
            if wrong:
                yield from ask(Released, Release(grant.lease_id, wrong, grant.tier))
            else:
                yield from post(Release(grant.lease_id, tier=grant.tier))
        except Unavailable as error:
            context.missed(error)
            return  # It ended with the connection.
        except BadInput:
            context.tally.add("lost_leases")
