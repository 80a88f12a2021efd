"""A device whose process is killed, one whose disk is full, and one that is sick or gone."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from kvcache.tiers.nvme import Device, DeviceFault
from kvcache.tiers.nvme_format import Entry
from tests.kvcache.tiers.nvme_blocks import (
    SEGMENT,
    block_of,
    blocks,
    content_of,
    failing,
    fetch,
    key_of,
    offset_of,
    offsets,
    open_device,
    reopened,
)
from tests.kvcache.tiers.nvme_writer import Step, steps

ROOT = Path(__file__).parents[3]
FACTOR = int(os.environ.get("KVCACHE_FAULT_FACTOR", "1"))


# --- killed -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8 * FACTOR))
def test_a_killed_writer_leaves_what_was_durable_and_nothing_wrong(seed: int, tmp_path: Path) -> None:
    path = tmp_path / "nvme"
    done = killed_after(path, seed, random.Random(seed).randrange(60))
    *past, last = islice(steps(seed), done + 1)
    device = open_device(path)
    found = {entry.offset: entry for entry in device.take_entries()}
    check_contents(device, found, past, last)
    for finding in device.findings:
        assert "superblock" not in finding
    device.write([block_of(1, offset_of(0, 0))], [], durable=True)
    device.close()


def killed_after(path: Path, seed: int, step_count: int) -> int:
    """Kill a writer somewhere behind that many steps: how many it said were durable."""
    command = [sys.executable, "-m", "tests.kvcache.tiers.nvme_writer", str(path), str(seed)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        told = b""
        while told.count(b"\n") < step_count:
            part = os.read(writer.stdout.fileno(), 4096)
            assert part, "the writer ended by itself"
            told += part
        writer.kill()
        told += writer.stdout.read()
    return told.count(b"\n")


def check_contents(device: Device, found: dict[int, Entry], past: list[Step], last: Step) -> None:
    """``past`` happened; ``last`` perhaps, or some of it. All that is found is what it says it is."""
    stored: dict[int, tuple[int, int]] = {}
    for step in past:
        for offset in step.gone:
            stored.pop(offset, None)
        stored |= {offset: (seed, step.block_bytes) for offset, seed in step.puts.items()}
    doubtful = last.gone | last.puts.keys()
    assert found.keys() - doubtful == stored.keys() - doubtful
    for offset, entry in found.items():
        seeds = [stored[offset]] if offset in stored else []
        if offset in last.puts:
            seeds.append((last.puts[offset], last.block_bytes))
        assert (entry.key, entry.block_bytes) in [(key_of(seed), size) for seed, size in seeds]
        assert fetch(device, entry) in [content_of(*seed) for seed in seeds]


# --- full -------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for two segments and an index, not for three."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"mode=700,size={2 * SEGMENT + SEGMENT // 2}", "none", str(path)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("not on this machine: there is no mount command")
    if mounted.returncode and os.geteuid():
        pytest.skip("not on this machine: mounting needs privileges")
    if "permission denied" in mounted.stderr:
        pytest.skip("not on this machine: root may not mount here")
    assert not mounted.returncode, mounted.stderr
    yield path
    subprocess.run(["umount", "--lazy", path], check=True)


def grow(disk: Path) -> None:
    subprocess.run(["mount", "-o", f"remount,size={8 * SEGMENT}", disk], check=True)


def test_a_full_disk_refuses_a_segment_and_keeps_the_rest(disk: Path) -> None:
    device = open_device(disk)
    kept = device.write(blocks([1]), [], durable=True) + device.write(blocks([2], 1), [], durable=True)
    before = sorted(disk.rglob("*"))
    with pytest.raises(DeviceFault) as caught:
        device.write(blocks([3], 2), [], durable=True)
    assert caught.value.errno == errno.ENOSPC
    assert "000002.seg" in str(caught.value)
    assert sorted(disk.rglob("*")) == before
    with pytest.raises(DeviceFault) as again:
        device.probe()  # A page would fit: that is not what it lacked.
    assert again.value.errno == errno.ENOSPC
    assert [fetch(device, entry) for entry in kept] == [content_of(1), content_of(2)]
    grow(disk)
    device.probe()
    kept += device.write(blocks([3], 2), [], durable=True)
    device = reopened(device)
    assert sorted(device.take_entries()) == sorted(kept)
    device.close()


def test_a_disk_that_others_filled_is_opened_and_read(disk: Path) -> None:
    device = open_device(disk)
    kept = device.write(blocks([1, 2]), [], durable=True)
    device.close()
    filler = disk / "others.tmp"
    fill(filler)
    device = open_device(disk)
    assert sorted(device.take_entries()) == kept
    assert [fetch(device, entry) for entry in kept] == [content_of(1), content_of(2)]
    with pytest.raises(DeviceFault) as caught:
        for seed in range(3, 12):  # Some commits may find room in the index.
            device.write([block_of(seed, offset_of(0, seed))], [], durable=True)
    assert caught.value.errno == errno.ENOSPC
    filler.unlink()
    new = device.write([block_of(20, offset_of(0, 3))], [], durable=True)
    device = reopened(device)
    found = device.take_entries()
    assert set(offsets([*kept, *new])) <= set(offsets(found))
    assert all(fetch(device, entry) for entry in found)
    device.close()


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12):
            try:
                while True:
                    file.write(bytes(size))
            except OSError as error:
                assert error.errno == errno.ENOSPC


# --- sick -------------------------------------------------------------------------------------------


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    device = open_device(tmp_path / "nvme")
    yield device
    device.close()


def test_a_healthy_device_says_nothing(device: Device) -> None:
    device.probe()
    assert not (device.path / "probe").exists()


@pytest.mark.parametrize("call", ["pwritev", "fdatasync", "preadv", "open"])
def test_a_sick_device_says_so(call: str, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, call, failing(errno.EIO))
    with pytest.raises(DeviceFault) as caught:
        device.probe()
    assert caught.value.errno == errno.EIO


def test_a_directory_that_vanished_is_not_made_again(device: Device) -> None:
    """What is under a mount point whose disk is gone is another disk."""
    device.path.rename(device.path.with_name("elsewhere"))
    with pytest.raises(DeviceFault) as caught:
        device.probe()
    assert caught.value.errno == errno.ENOENT
    open_device(device.path).close()
    with pytest.raises(DeviceFault, match="another directory"):
        device.probe()


def test_no_write_is_under_way_behind_a_failure(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """It could fall on the block that takes the slot next."""
    pwritev, failed, returned = os.pwritev, threading.Event(), threading.Event()
    late: list[bool] = []

    def write(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if offset == offset_of(0, 0):
            failed.set()
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        assert failed.wait(20)
        late.append(returned.wait(0.05))
        return pwritev(descriptor, buffers, offset)

    device.write([block_of(9, offset_of(0, 9))], [], durable=False)
    monkeypatch.setattr(os, "pwritev", write)
    with pytest.raises(DeviceFault):
        device.write([block_of(slot, offset_of(0, slot)) for slot in (0, 2, 4, 6)], [], durable=False)
    returned.set()
    assert late == [False, False]


@pytest.mark.parametrize("slot", [0, 2])
def test_a_failure_on_either_side_is_one(slot: int, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    pwritev = os.pwritev

    def write(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if offset == offset_of(0, slot):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pwritev(descriptor, buffers, offset)

    device.write([block_of(9, offset_of(0, 9))], [], durable=False)
    monkeypatch.setattr(os, "pwritev", write)
    with pytest.raises(DeviceFault):
        device.write([block_of(each, offset_of(0, each)) for each in (0, 2)], [], durable=False)
