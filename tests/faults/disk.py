"""A disk that can lose its power: a file system in an image file, mounted through a loop device.

What was written to the loop device is in the image at once; what the file system holds back in its page
cache, because nobody asked for it to be synced, is not. So a copy of the image, taken while the writers
are stopped, is the disk as a power cut would leave it. Mounting the copy replays its journal, as a reboot
does. A disk's own cache is not played: with direct I/O nothing that was written is ever lost here.

The sum: 32 MiB in memory are read twice and written once in 30 ms; unmounting, attaching and mounting
take another 40 ms.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

IMAGE_BYTES = 32 << 20
RUN_S = 30.0


class Disk:
    """Mounted at ``path``. Each copy is an image of its own: who has mounts of his own, as a host of
    ``kvcache.testing.netns`` has, may keep mounted what is unmounted here, and go on writing to it."""

    def __init__(self, folder: Path, image_bytes: int) -> None:
        self.path = folder / "mnt"
        self._folder = folder
        self._image = self._kept = folder / "disk-0.img"
        self._copies = 0
        self._contents = [bytearray(image_bytes), bytearray(image_bytes)]
        self._device = ""

    def make(self) -> None:
        """Empty. RAISES AssertionError with what the system says."""
        self.path.mkdir()
        with self._image.open("wb") as file:
            file.truncate(len(self._contents[0]))
        # All of its tables at once: a file system that is still being made would be busy by itself.
        options = ("-J", "size=4", "-E", "lazy_itable_init=0,lazy_journal_init=0")
        command("mkfs.ext4", "-q", "-F", "-b", "4096", *options, str(self._image))
        self._mount()

    def copy(self) -> None:
        """Keep the disk as it is now. REQUIRES: its writers are stopped.

        The kernel may be writing back at this moment: a copy counts when the image did not change."""
        content, again = self._contents
        self._read(content)
        while self._read(again) != content:
            content, again = again, content
        self._copies += 1
        self._kept = self._folder / f"disk-{self._copies}.img"
        self._kept.write_bytes(content)

    def lose_power(self) -> None:
        """Be what the copy is. REQUIRES: there is one, and nobody has a file of the disk open."""
        self.remove()
        self._image.unlink()
        self._image = self._kept
        self._mount()

    def remove(self) -> None:
        """Unmount. May be called twice."""
        if self._device:
            command("umount", str(self.path))
            self._detach()

    def _read(self, content: bytearray) -> bytearray:
        with self._image.open("rb", buffering=0) as file:
            assert file.readinto(content) == len(content)
        return content

    def _mount(self) -> None:
        self._device = command("losetup", "--find", "--show", "--direct-io=off", str(self._image))
        try:
            command("mount", "-t", "ext4", self._device, str(self.path))
        except BaseException:
            self._detach()
            raise

    def _detach(self) -> None:
        device, self._device = self._device, ""
        command("losetup", "--detach", device)


def command(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=RUN_S)
    assert not done.returncode, f"{' '.join(words)}: {done.stderr}"
    return done.stdout.strip()


@contextlib.contextmanager
def mounted(folder: Path, image_bytes: int = IMAGE_BYTES) -> Iterator[Disk]:
    """A fresh disk. Skips where this machine lets nobody mount one."""
    if os.geteuid():
        pytest.skip("not on this machine: only root can mount a disk image")
    if not Path("/dev/loop-control").exists():
        pytest.skip("not on this machine: no loop devices")
    if missing := [name for name in ("mkfs.ext4", "losetup", "mount") if shutil.which(name) is None]:
        pytest.skip(f"{missing[0]} is missing: install e2fsprogs and mount")
    disk = Disk(folder, image_bytes)
    try:
        disk.make()
        yield disk
    finally:
        disk.remove()
