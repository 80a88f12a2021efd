"""Opening a directory of the NVMe tier: its lock, its superblock, its files, and what they hold.

    LOCK  tier.json  segments/000000.seg ...  index/ (LMDB)  namespaces/<id>.json

Entries come from the index; when it is missing or damaged, from the slot headers, and a fresh index is
made of them. What of it can be taken, ``nvme_scan`` says.

A directory is refused (BadInput) before anything in it is changed: another holds its lock, it has things
of others in it, another format, another segment size. Opened read-only, nothing in it is changed at all.

The sum: opening takes what its index or its headers take to read; everything else is a few milliseconds.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from kvcache.errors import BadInput
from kvcache.tiers.nvme_files import (
    SegmentFiles,
    faults,
    lock_file,
    make_folder,
    reads_direct,
    replace_file,
    takes_direct,
)
from kvcache.tiers.nvme_format import (
    DIRECTORY_ID_BYTES,
    FORMAT_VERSION,
    PAGE_BYTES,
    BadRecord,
    Entry,
    SegmentHeader,
    Superblock,
    pack_superblock,
    parse_segment_header,
    parse_superblock,
)
from kvcache.tiers.nvme_index import Index, read_index
from kvcache.tiers.nvme_scan import Contents, Progress, scan, sift, survey

LOCK = "LOCK"
SUPERBLOCK = "tier.json"
BUDGET = "budget.json"
SEGMENTS = "segments"
INDEX = "index"
NAMESPACES = "namespaces"
PROBE = "probe"

_OURS = frozenset({LOCK, SUPERBLOCK, BUDGET, SEGMENTS, INDEX, NAMESPACES, PROBE, "lost+found"})


@dataclass(frozen=True, slots=True)
class Opened:
    """A directory in our hands. ``index`` is None where nothing may be written. ``findings`` says in plain
    words what was found wrong."""

    path: Path
    lock: int
    superblock: Superblock
    segment_count: int
    files: SegmentFiles
    index: Index | None
    contents: Contents
    findings: list[str]


def open_directory(
    path: Path, capacity_bytes: int, segment_bytes: int, direct: str, progress: Progress
) -> Opened:
    """To write and read it. ``capacity_bytes`` 0: no more and no less than there is.

    RAISES BadInput, DeviceFault; then nothing stays open."""
    if not 0 < segment_bytes <= (capacity_bytes or segment_bytes) or segment_bytes % PAGE_BYTES:
        raise BadInput(
            "too_small",
            f"{capacity_bytes:,} bytes for {path}",
            f"space is taken in segments of {segment_bytes:,} bytes, whole pages of {PAGE_BYTES}",
            "give it at least one segment",
        )
    findings: list[str] = []
    with ExitStack() as undo:
        lock = claim(path, read_only=False)
        undo.callback(os.close, lock)
        superblock = load_superblock(path, segment_bytes, findings, read_only=False)
        with faults(f"opening the directory {path}"):
            for name in (SEGMENTS, NAMESPACES, INDEX):
                make_folder(path / name)
            files = SegmentFiles(path / SEGMENTS, direct=_chosen(direct, path / SEGMENTS, findings))
            undo.callback(files.close)
            files.remove_half_made()
            count = capacity_bytes // segment_bytes or max(files.numbers(), default=-1) + 1
        _remove_beyond(files, count, findings)
        contents = survey(files, superblock, count, findings)
        index = _load(path, files, contents, superblock, count, findings, progress)
        undo.callback(index.close)
        missing_bytes = (count - len(contents.segments)) * segment_bytes
        findings += filter(None, [disk_finding(path, missing_bytes)])
        undo.pop_all()
    return Opened(path, lock, superblock, count, files, index, contents, findings)


def inspect_directory(path: Path, progress: Progress) -> Opened:
    """To look at it only: what is damaged stays as it is. RAISES BadInput, DeviceFault; then nothing
    stays open."""
    findings: list[str] = []
    with ExitStack() as undo:
        lock = claim(path, read_only=True)
        undo.callback(os.close, lock)
        superblock = load_superblock(path, 0, findings, read_only=True)
        with faults(f"reading {path}"):
            direct = reads_direct(path / SEGMENTS)
            files = SegmentFiles(path / SEGMENTS, direct=direct, read_only=True)
            undo.callback(files.close)
            count = max(files.numbers(), default=-1) + 1
        contents = survey(files, superblock, count, findings)
        entries = _listed(path, contents, findings)
        if entries is None:
            entries = _scan(files, contents, superblock, findings, progress)
        sift(contents, entries, superblock.segment_bytes)
        undo.pop_all()
    return Opened(path, lock, superblock, count, files, None, contents, findings)


def claim(path: Path, *, read_only: bool) -> int:
    """Make the directory where it is missing and take its lock: the descriptor that holds it.

    RAISES BadInput, DeviceFault; then nothing was changed, but for an empty directory made."""
    with faults(f"opening the directory {path}"):
        if path.exists() and not path.is_dir():
            raise _bad(f"{path} is not a directory", "the NVMe tier lives in one", "give another --nvme")
        if read_only and not (path / SUPERBLOCK).exists() and not (path / SEGMENTS).exists():
            raise _bad(f"{path} holds no NVMe tier", "it has no superblock and no segments", "check the path")
        make_folder(path)
        _check_strangers(path)
        descriptor = lock_file(path / LOCK)
    if descriptor is None:
        raise BadInput(
            "address_in_use",
            f"the NVMe directory {path} is in use",
            "another process holds its lock, and two writers would destroy each other's blocks",
            "stop the other node, or give this one a directory of its own",
        )
    return descriptor


def load_superblock(path: Path, segment_bytes: int, findings: list[str], *, read_only: bool) -> Superblock:
    """The directory's superblock; made for a new directory, made again from segment headers when it was
    lost. ``segment_bytes`` 0: whatever it says. RAISES BadInput, DeviceFault."""
    file = path / SUPERBLOCK
    with faults(f"reading {file}"):
        text = file.read_bytes() if file.exists() else b""
    try:
        superblock = parse_superblock(text)
    except BadRecord as error:
        if error.reason == "version":
            raise _bad(f"the NVMe directory {path} cannot be read", error.what) from error
        why = error.what if text else "it is missing"
        superblock = _superblock_again(path, segment_bytes, why if text else "", findings)
        if not read_only:
            with faults(f"writing {file}"):
                replace_file(file, pack_superblock(superblock))
    if segment_bytes not in (0, superblock.segment_bytes):
        raise _bad(
            f"the NVMe directory {path} has segments of {superblock.segment_bytes} bytes",
            f"the setting says {segment_bytes}, and blocks are found by the size of segments",
            f"set {superblock.segment_bytes}, or give an empty directory",
        )
    return superblock


def segment_bytes_of(path: Path) -> int | None:
    """What the segments of this directory have, as far as it says. None: it is new, damaged, or not there."""
    try:
        return parse_superblock((path / SUPERBLOCK).read_bytes()).segment_bytes
    except (OSError, BadRecord):
        return None


def disk_finding(path: Path, missing_bytes: int) -> str:
    """That the segments still to be made cannot fit; empty when they can. RAISES DeviceFault."""
    with faults(f"asking for the free space of {path}"):
        free_bytes = free_disk_bytes(path)
    if missing_bytes <= free_bytes:
        return ""
    return (
        f"{path}: {missing_bytes:,} bytes of segments are still to be made and the file system has "
        f"{free_bytes:,} free: it will be full before the tier is; lower its capacity"
    )


def free_disk_bytes(path: Path) -> int:
    """RAISES OSError."""
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


def _check_strangers(path: Path) -> None:
    """RAISES BadInput where others may write, or where a directory holds what is not ours."""
    if path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise _bad(f"others may write to {path}", "what it holds is trusted", f"chmod go-w {path}")
    if (path / SUPERBLOCK).exists():
        return
    strangers = sorted(
        each.name for each in path.iterdir() if each.name not in _OURS and each.suffix != ".tmp"
    )
    if strangers:
        raise _bad(
            f"{path} is not empty and holds no NVMe tier",
            f"it has {strangers[0]!r} in it",
            "give an empty directory, or one that does not exist yet",
        )


def _superblock_again(path: Path, segment_bytes: int, damage: str, findings: list[str]) -> Superblock:
    """The superblock that was lost, from the segments; a new one where there are none."""
    with faults(f"reading {path / SEGMENTS}"):
        headers = list(_headers(path / SEGMENTS))
    said = {(header.directory_id, header.segment_bytes) for header in headers}
    if len(said) > 1 or (not said and not segment_bytes):
        raise _bad(
            f"the superblock {path / SUPERBLOCK} cannot be used",
            damage or "it is missing, and the segments do not say one and the same thing",
            "give an empty directory, or remove what is in it",
        )
    if said:
        findings.append(f"{path / SUPERBLOCK}: {damage or 'it is missing'}; made again from segment headers")
        return Superblock(FORMAT_VERSION, *said.pop())
    if damage:
        findings.append(f"{path / SUPERBLOCK}: {damage}; there were no segments, so it was made anew")
    return Superblock(FORMAT_VERSION, os.urandom(DIRECTORY_ID_BYTES), segment_bytes)


def _headers(folder: Path) -> Iterator[SegmentHeader]:
    for path in sorted(folder.glob("*.seg")) if folder.exists() else ():
        with path.open("rb") as file:
            try:
                yield parse_segment_header(file.read(PAGE_BYTES))
            except BadRecord:
                continue


def _chosen(direct: str, folder: Path, findings: list[str]) -> bool:
    """Is direct I/O to be used? RAISES BadInput, OSError."""
    if direct == "off":
        return False
    if reads_direct(folder) or takes_direct(folder):  # The first also on a disk that is full.
        return True
    if direct == "on":
        raise BadInput(
            "bad_config",
            f"direct I/O does not work in {folder}",
            "the file system refuses it, and the setting asks for it",
            "give another directory, or let the setting be auto",
        )
    findings.append(f"{folder}: the file system takes no direct I/O; the page cache is used, which is slower")
    return False


def _remove_beyond(files: SegmentFiles, count: int, findings: list[str]) -> None:
    """Segments that a smaller capacity has no place for. Their entries are rejected like those of any
    segment that is not there."""
    with faults(f"removing segments from {files.folder}"):
        beyond = [number for number in files.numbers() if number >= count]
        for number in beyond:
            files.remove(number)
    if beyond:
        findings.append(f"{files.folder}: the capacity is lower now, {len(beyond)} segments were removed")


def _load(
    path: Path,
    files: SegmentFiles,
    contents: Contents,
    superblock: Superblock,
    count: int,
    findings: list[str],
    progress: Progress,
) -> Index:
    """Fill ``contents``; the index, ready to write. RAISES DeviceFault."""
    folder, segment_bytes = path / INDEX, superblock.segment_bytes
    entries_max = count * max(1, segment_bytes // (2 * PAGE_BYTES))
    known = len(findings)
    entries = _listed(path, contents, findings)
    is_damaged = len(findings) > known
    if entries is None:
        entries = _scan(files, contents, superblock, findings, progress)
        is_damaged = True
    sift(contents, entries, segment_bytes)
    if not is_damaged:
        with faults(f"opening the index of {path}"):
            return Index.open(folder, entries_max)
    contents.rejected.clear()  # The fresh index knows nothing of them.
    progress("writing the index", 0, len(contents.entries))
    with faults(f"making the index of {path} anew"):
        return Index.create(folder, entries_max, contents.entries)


def _listed(path: Path, contents: Contents, findings: list[str]) -> list[Entry] | None:
    """What the index says, or None. That a directory without segments has none is not worth a word."""
    said: list[str] = []
    with faults(f"reading the index of {path}"):
        entries = read_index(path / INDEX, said)
    if entries or contents.segments:
        findings += said
    return entries


def _scan(
    files: SegmentFiles, contents: Contents, superblock: Superblock, findings: list[str], progress: Progress
) -> list[Entry]:
    entries, damaged = scan(files, contents.segments, superblock.segment_bytes, progress)
    if contents.segments:
        findings.append(
            f"{files.folder}: {len(entries):,} blocks were found by their slot headers, "
            f"{damaged:,} headers are damaged"
        )
    return entries


def _bad(what: str, why: str, todo: str = "") -> BadInput:
    return BadInput("bad_tier", what, why, todo)
