"""ARC over single blocks: recent and frequent ones share the room, and ghosts of both say who needs more.

N. Megiddo and D. S. Modha, "ARC: A Self-Tuning, Low Overhead Replacement Cache", FAST 2003.
"""

from __future__ import annotations

from collections import OrderedDict

_Queue = OrderedDict[int, None]


class Arc:
    """A ``BlockPolicy``. ``t1``, ``t2``: used once, more often; ``b1``, ``b2``: what left them; the paper's
    names. ``_share`` is how many of ``t1`` are wanted."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._share = 0.0
        self._t1: _Queue = OrderedDict()
        self._t2: _Queue = OrderedDict()
        self._b1: _Queue = OrderedDict()
        self._b2: _Queue = OrderedDict()

    def __contains__(self, block: int) -> bool:
        return block in self._t1 or block in self._t2

    def __len__(self) -> int:
        return len(self._t1) + len(self._t2)

    def use(self, block: int) -> bool:
        t1, t2, b1, b2 = self._t1, self._t2, self._b1, self._b2
        if block in t2:
            t2.move_to_end(block)
            return True
        if block in t1:
            del t1[block]
            t2[block] = None
            return True
        if block in b1:
            self._share = min(self._capacity, self._share + max(1.0, len(b2) / len(b1)))
            self._replace(False)
            del b1[block]
            t2[block] = None
        elif block in b2:
            self._share = max(0.0, self._share - max(1.0, len(b1) / len(b2)))
            self._replace(True)
            del b2[block]
            t2[block] = None
        else:
            self._make_room()
            t1[block] = None
        return False

    def _make_room(self) -> None:
        """For one that nothing is known of."""
        t1, b1 = self._t1, self._b1
        known = len(t1) + len(b1)
        if known == self._capacity:
            if len(t1) < self._capacity:
                b1.popitem(last=False)
                self._replace(False)
            else:
                t1.popitem(last=False)
        elif (total := known + len(self._t2) + len(self._b2)) >= self._capacity:
            if total == 2 * self._capacity:
                self._b2.popitem(last=False)
            self._replace(False)

    def _replace(self, for_b2: bool) -> None:
        t1, t2 = self._t1, self._t2
        if len(self) < self._capacity:
            return
        share = int(self._share)
        if t1 and (len(t1) > share or (for_b2 and len(t1) == share) or not t2):
            self._b1[t1.popitem(last=False)[0]] = None
        else:
            self._b2[t2.popitem(last=False)[0]] = None
