"""The disk of the power cuts is what was copied, whoever else has it mounted."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.faults.disk import Disk, mounted

CUTS = 3
FILE_BYTES = 1 << 20

pytestmark = pytest.mark.slow


def content(number: int) -> bytes:
    return bytes([number]) * FILE_BYTES


def use(disk: Disk, number: int) -> None:
    """One file is there for good, another may be lost."""
    with (disk.path / f"kept {number}").open("wb") as file:
        file.write(content(number))
        os.fsync(file.fileno())
    (disk.path / f"lost {number}").write_bytes(content(number))


def test_who_keeps_an_old_disk_mounted_does_not_change_the_new(scratch: Path) -> None:
    keepers = []
    try:
        with mounted(scratch) as disk:
            for number in range(CUTS):
                words = (
                    "unshare",
                    "--mount",
                    "--propagation",
                    "private",
                    "sh",
                    "-c",
                    "echo && exec sleep 600",
                )
                keepers.append(subprocess.Popen(words, stdout=subprocess.PIPE))
                assert keepers[-1].stdout is not None
                keepers[-1].stdout.readline()  # From now on it has what is mounted now.
                use(disk, number)
                disk.copy()
                if number:
                    os.sync()  # What the disk before would have lost is written, where it is mounted.
                disk.lose_power()
                found = [(disk.path / f"kept {each}").read_bytes() for each in range(number + 1)]
                assert found == [content(each) for each in range(number + 1)]
                assert not (disk.path / f"lost {number}").exists()
    finally:
        for keeper in keepers:
            keeper.kill()
            keeper.communicate()
