"""What may be written to NVMe: which blocks have earned it, and how many bytes a day the drives may take.

Flash wears out by being written, and most blocks are never asked for twice. So a block must be *seen*
more than once before it is written (``Seen``), and whatever is written stays within a daily budget
(``WriteBudget``), which operators derive from the drive's rating in drive-writes per day, and an even rate
(``WriteRate``). Which rule asks what of a block is in ``earned``.

All decide only: no I/O, no clock but the one handed in. One owner each.

The sum: ``Seen`` takes about 90 bytes an entry and 1 us a touch; asking the budget takes 0.4 us.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from kvcache.block import StorageKey
from kvcache.clock import NS_PER_S, Clock

SEEN_MAX = 255
WINDOW_HOURS = 24
UNLIMITED_BYTES = (1 << 63) - 1

_BURST_S = 60.0
_SECONDS_PER_HOUR = 3_600
# A window of 24 hours that begins within a clock hour touches 25 of them.
_COUNTERS = WINDOW_HOURS + 1


class Seen:
    """How often a key was touched lately, in bounded memory.

    Two sets take turns: touches go into the young one; when that is full it becomes the old one, and
    what was in the old one only is forgotten. So a key is remembered for at least ``entries_max // 2``
    touches of other keys, and never more than ``entries_max`` are held. A key is held as 64 bits of its
    hashes: two keys of a million share them with a chance of 1 in 30 million, and then one block is
    written that need not have been.
    """

    def __init__(self, entries_max: int) -> None:
        """REQUIRES: ``entries_max`` is at least 2."""
        assert entries_max >= 2
        self._half = entries_max // 2
        self._young: dict[int, int] = {}
        self._old: dict[int, int] = {}

    def __len__(self) -> int:
        """Entries held; a key that is in both sets counts twice."""
        return len(self._young) + len(self._old)

    def touch(self, keys: Iterable[StorageKey]) -> None:
        """Somebody asked for these blocks, or saved them."""
        young, old = self._young, self._old
        for key in keys:
            mark = mark_of(key)
            count = young.get(mark)
            if count is None:
                if len(young) >= self._half:
                    old, young = young, {}
                    self._young, self._old = young, old
                count = old.get(mark, 0)
            young[mark] = min(count + 1, SEEN_MAX)

    def count(self, key: StorageKey) -> int:
        """Touches that are remembered, at most ``SEEN_MAX``."""
        mark = mark_of(key)
        return self._young.get(mark) or self._old.get(mark, 0)


class WriteBudget:
    """At most ``bytes_a_day`` in any 24 hours, whenever they begin.

    Bytes are counted by clock hour. All that was spent in the current hour and the 24 before it counts,
    so that no 24 hours hold more than the budget; bytes are free again 24 to 25 hours after they
    were spent.

        hour      h-24 | h-23 | ... | h-1 | h            left = budget - the sum of these 25
        bytes        0 |  5 G | ... | 2 G | 1 G

    The wall clock may be wrong. Set back, it gives nothing back: the budget stays at the latest hour
    it knows and goes on with each hour that is then seen to pass. Set forward, it cannot be told from a node
    that was off: hand in ``hours_since``, which a clock that is set does not move.
    """

    def __init__(self, bytes_a_day: int | None, wall_hour: Callable[[], int]) -> None:
        """None: no limit, only counted. ``wall_hour`` gives whole hours since any fixed time, the same
        over restarts."""
        assert bytes_a_day is None or bytes_a_day >= 0
        self.bytes_a_day = bytes_a_day
        self._wall_hour = wall_hour
        self._read = self._hour = wall_hour()
        self._spent = [0] * _COUNTERS  # this hour first, then the hours before it

    def allow(self, byte_count: int) -> bool:
        """May so many bytes be written now? When yes, they are spent."""
        assert byte_count >= 0
        if byte_count > self.left():
            return False
        self._spent[0] += byte_count
        return True

    def left(self) -> int:
        """Bytes that may be written now; ``UNLIMITED_BYTES`` without a limit."""
        spent = self.spent()
        return UNLIMITED_BYTES if self.bytes_a_day is None else max(0, self.bytes_a_day - spent)

    def spent(self) -> int:
        """Bytes spent that still count."""
        self._follow(self._wall_hour())
        return sum(self._spent)

    def state(self) -> dict[str, int | list[int]]:
        """What ``restore`` takes; plain JSON of 25 counters. Save it after spending, or a restart forgets."""
        self._follow(self._wall_hour())
        return {"hour": self._hour, "spent": list(self._spent)}

    def restore(self, state: Mapping[str, object]) -> bool:
        """Go on from a saved state: what was spent then still counts, beside what was spent here.

        False when it is no such state; nothing was changed then."""
        hour, spent = state.get("hour"), state.get("spent")
        if not _is_count(hour) or not isinstance(spent, list) or len(spent) != _COUNTERS:
            return False
        if not all(_is_count(each) for each in spent):
            return False
        assert isinstance(hour, int)
        self._follow(self._wall_hour())
        saved = spent
        if hour > self._hour:
            self._pass(hour - self._hour)
        else:
            saved = _later(spent, self._hour - hour)
        self._spent = [here + then for here, then in zip(self._spent, saved, strict=True)]
        return True

    def _follow(self, now: int) -> None:
        if now > self._hour:
            self._pass(now - self._hour)
        elif now == self._read + 1:  # The clock was set back, and goes on: hours pass all the same.
            self._pass(1)
        self._read = now

    def _pass(self, hours: int) -> None:
        self._hour += hours
        self._spent = _later(self._spent, hours)


class WriteRate:
    """How much may be written by now, at an even rate, in any unit; what a minute brings is saved up.

    What must be written may be spent beyond that, and then nothing is left until it is paid."""

    def __init__(self, a_second: float, start_ns: int) -> None:
        """0: any amount."""
        self._rate = a_second
        self._most = max(1.0, a_second * _BURST_S)
        self._left = self._most
        self._now_ns = start_ns

    def left(self, now_ns: int, unit: int = 1) -> int:
        """So many pieces of ``unit`` may be written now: one, however large, once a minute was saved up."""
        if not self._rate:
            return UNLIMITED_BYTES
        self._left = min(self._most, self._left + (now_ns - self._now_ns) * self._rate / NS_PER_S)
        self._now_ns = now_ns
        if self._left == self._most < unit:
            return 1
        return max(0, int(self._left) // unit)

    def spend(self, amount: int) -> None:
        self._left -= amount


def hours_since(wall_s: float, clock: Clock) -> Callable[[], int]:
    """The hour of the wall clock as it was just now, ``wall_s``, gone on by ``clock``, which nobody sets."""
    zero_s = wall_s - clock.now_ns() / NS_PER_S

    def wall_hour() -> int:
        return int((zero_s + clock.now_ns() / NS_PER_S) // _SECONDS_PER_HOUR)

    return wall_hour


def mark_of(key: StorageKey) -> int:
    """64 bits of the namespace and the prefix hash together: ranks of one model share the latter."""
    return int.from_bytes(key[:8], "little") ^ int.from_bytes(key[-8:], "little")


def _later(spent: Sequence[int], hours: int) -> list[int]:
    """The counters as they stand ``hours`` later."""
    gone = min(hours, _COUNTERS)
    return [0] * gone + list(spent[: _COUNTERS - gone])


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
