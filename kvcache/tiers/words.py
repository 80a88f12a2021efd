"""What operators are told of a drive: errors in plain words, and bad blocks without a flood of lines.

A drive that rots may have thousands of bad blocks. The counters have each; the log has the first, and
from then on a line a minute at most, with how many there were.
"""

from __future__ import annotations

import errno
import logging
from pathlib import Path

from kvcache.clock import NS_PER_S, Clock
from kvcache.errors import BadInput
from kvcache.tiers.nvme_files import BlockFault, DeviceFault
from kvcache.tiers.nvme_format import Entry

log = logging.getLogger("kvcache.nvme")

BAD_BLOCKS_PAUSE_NS = 60 * NS_PER_S
PROGRESS_PAUSE_NS = 5 * NS_PER_S

READ_ONLY = {
    errno.ENOSPC: "the file system is full; make room, or restart with less capacity",
    errno.EDQUOT: "the quota is used up",
    errno.EROFS: "it is mounted read-only",
}
"""What only writes fail with."""

_HINTS = {
    errno.EACCES: "; give the node's user this directory",
    errno.EPERM: "; give the node's user this directory",
    errno.ENOENT: "; see that the device is mounted and its directory there",
    errno.ENODEV: "; mount the one that it was, or restart the node to use this one",
    errno.ENOTDIR: "; a part of the path is a file",
    errno.EIO: "; look at the system's log",
}


def words(error: BadInput | DeviceFault) -> str:
    """What is wrong and, where that is known, what helps."""
    return str(error) + (_HINTS.get(error.errno, "") if isinstance(error, DeviceFault) else "")


class Teller:
    """Of one drive. Tells the log what happens too often, or takes too long, for a line each."""

    def __init__(self, path: Path, segment_bytes: int, clock: Clock) -> None:
        self._path = path
        self._segment_bytes = segment_bytes
        self._clock = clock
        self._bad_blocks = 0
        self._bad_due_ns = 0
        self._progress_due_ns = 0

    def bad_block(self, entry: Entry, fault: BlockFault) -> None:
        self._bad_blocks += 1
        now_ns = self._clock.now_ns()
        if now_ns < self._bad_due_ns:
            return
        self._bad_due_ns = now_ns + BAD_BLOCKS_PAUSE_NS
        number, inside = divmod(entry.offset, self._segment_bytes)
        log.warning(
            "%s: a block is not as it was written (%s, segment %d, byte %d): dropped; %d since the start",
            self._path,
            fault.reason,
            number,
            inside,
            self._bad_blocks,
        )

    def opening(self) -> None:
        """It begins to be read: progress is worth a line only if that takes long."""
        self._progress_due_ns = self._clock.now_ns() + PROGRESS_PAUSE_NS

    def progress(self, what: str, done: int, total: int) -> None:
        """Any thread, one at a time."""
        now_ns = self._clock.now_ns()
        if now_ns >= self._progress_due_ns:
            self._progress_due_ns = now_ns + PROGRESS_PAUSE_NS
            log.info("%s: %s: %d of %d", self._path, what, done, total)
