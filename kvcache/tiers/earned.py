"""Which blocks of host memory have earned a place on NVMe, by one of these rules:

    all             every block
    touched>=2      a block that two requests had (``second-touch`` is the same)
    branch-reused   the same, and all that comes behind such a block without a fork between: a conversation
                    that came back once is written whole, its newest part too
    hazard          the 30 % that are wanted again most often, by what was learned of others like them
                    (``admission_learned``)

    committed ──► made                    looked up ──► asked (what memory lacks is wanted)
    committed, touched, cold ──► leading: how many of these? ──► written ──► wrote

A leading part of a path is written or nothing is, so no rule leaves a hole. The rules are those of
``kvcache tune replay --admit``, which tries them before they are set. There a fork is what was ever seen to
be one; here, what the host tier holds of it just now.

Decides only. One owner. The sum: a rule but ``all`` takes 1 us a block at each use, ``hazard`` another 1 to
2 us; they remember a million blocks' touches in 90 MB at most, and what a quarter of that many were in 60 MB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Literal

from kvcache.block import StorageKey
from kvcache.ledger import Ledger
from kvcache.tiers.admission import Seen, mark_of
from kvcache.tiers.admission_learned import LearnedAdmission

Admission = Literal["all", "second-touch", "touched>=2", "branch-reused", "hazard"]
SEEN_MAX = 1 << 20
LEARNED_MAX = 1 << 18
HAZARD_SHARE = 0.3
TOUCHES = 2
_DEPTH_MAX = 512  # Deeper is as deep.


class Earned:
    def __init__(self, admission: Admission, host: Ledger, nvme_bytes: int) -> None:
        self._host = host
        self.is_choosy = admission != "all"
        """May it say no, so that uses must be told?"""
        self._by_branch = admission == "branch-reused"
        self._seen = Seen(SEEN_MAX)
        self._learned = (
            LearnedAdmission(LEARNED_MAX, HAZARD_SHARE, nvme_bytes) if admission == "hazard" else None
        )

    # --- what happens -----------------------------------------------------------------------------

    def made(self, path: Sequence[StorageKey]) -> None:
        """These were computed, and are held now: a path."""
        if self._learned is not None and path:
            before = sum(1 for _ in islice(self._host.ancestors(path[0]), 1, _DEPTH_MAX))
            self._learned.computed(list(map(mark_of, path)), before)

    def asked(self, keys: Sequence[StorageKey]) -> None:
        """A request asks for this path."""
        if self._learned is not None:
            self._learned.wanted(list(map(mark_of, keys[self._host.match(keys) :])))

    def used(self, path: Sequence[StorageKey]) -> None:
        """These were stored, or given to a request."""
        if self.is_choosy:
            self._seen.touch(path)

    def wrote(self, byte_count: int) -> None:
        if self._learned is not None:
            self._learned.wrote(byte_count)

    # --- what it says -----------------------------------------------------------------------------

    def leading(self, new: Sequence[StorageKey]) -> int:
        """How many leading blocks of this path, none of which is on NVMe, are worth writing."""
        if not self.is_choosy or not new:
            return len(new)
        if self._learned is not None:
            touches = {mark_of(key): self._seen.count(key) for key in new}
            return self._learned.fell(list(touches), touches.__getitem__)
        count = next((at for at, key in enumerate(new) if self._seen.count(key) < TOUCHES), len(new))
        return len(new) if self._by_branch and self._is_reused(new[count:]) else count

    def tips(
        self, cold: Sequence[StorageKey], is_known: Callable[[StorageKey], bool]
    ) -> Iterator[StorageKey]:
        """Of what would go next, in this order, the last of each run that is worth writing. ``is_known``: it
        is on NVMe."""
        for run in self._runs(cold):
            new = [key for key in reversed(run) if not is_known(key)]
            if count := self.leading(new):
                yield new[count - 1]

    def _runs(self, cold: Sequence[StorageKey]) -> Iterator[list[StorageKey]]:
        """Each key but the first of a run comes before the one that it follows here."""
        run: list[StorageKey] = []
        for key in cold:
            if run and next(islice(self._host.ancestors(run[-1]), 1, 2), None) != key:
                yield run
                run = []
            run.append(key)
        if run:
            yield run

    def _is_reused(self, rest: Sequence[StorageKey]) -> bool:
        """Was some block touched twice before these, on the way up to the last fork?"""
        for before in islice(self._host.ancestors(rest[0]), 1, None) if rest else ():
            if self._host.continued(before) > 1:
                return False
            if self._seen.count(before) >= TOUCHES:
                return True
        return False
