"""A real browser for tests: headless Chromium, which takes pictures of a page and says what it asked for."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
TIMEOUT_S = 120


def chromium() -> str:
    """Where it is. Without one, CI fails and anybody else's tests are skipped, loudly."""
    for name in NAMES:
        if (found := shutil.which(name)) is not None:
            return found
    what = f"NO BROWSER IS INSTALLED ({', '.join(NAMES)}): apt-get install chromium"
    if os.environ.get("CI"):
        pytest.fail(what)
    pytest.skip(what)


def picture(page: str, folder: Path, *, dark: bool, width: int = 1_000, height: int = 1_600) -> Path:
    """A screenshot of ``page``, an address, as a PNG. Nothing but the page itself can be reached."""
    target = folder / f"{'dark' if dark else 'light'}-{width}.png"
    run(
        page,
        folder,
        f"--window-size={width},{height}",
        f"--screenshot={target}",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
    )
    return target


def run(page: str, folder: Path, *arguments: str) -> str:
    """What it prints."""
    done = subprocess.run(
        [
            chromium(),
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
            "--no-first-run",
            "--disable-background-networking",
            f"--user-data-dir={folder / 'profile'}",
            *arguments,
            page,
        ],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2_000:]
    return done.stdout


def pixels(path: Path) -> list[bytes]:
    """The lines of a PNG of 8 bits a colour, three or four bytes a pixel."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, packed = 8, b""
    width = height = channels = 0
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + length]
        if kind == b"IHDR":
            width, height, depth, colour = struct.unpack(">IIBB", body[:10])
            assert depth == 8 and colour in (2, 6)
            channels = 3 if colour == 2 else 4
        elif kind == b"IDAT":
            packed += body
        at += length + 12
    return _unfiltered(zlib.decompress(packed), height, width * channels, channels)


def _unfiltered(raw: bytes, height: int, stride: int, step: int) -> list[bytes]:
    lines: list[bytes] = []
    before = bytearray(stride)
    for row in range(height):
        start = row * (stride + 1)
        kind, line = raw[start], bytearray(raw[start + 1 : start + 1 + stride])
        for at in range(stride if kind else 0):
            left = line[at - step] if at >= step else 0
            up, corner = before[at], before[at - step] if at >= step else 0
            line[at] = (line[at] + _guess(kind, left, up, corner)) & 255
        lines.append(bytes(line))
        before = line
    return lines


def _guess(kind: int, left: int, up: int, corner: int) -> int:
    if kind == 1:
        return left
    if kind == 2:
        return up
    if kind == 3:
        return (left + up) // 2
    near = left + up - corner
    distances = ((abs(near - left), left), (abs(near - up), up), (abs(near - corner), corner))
    return min(distances, key=lambda each: each[0])[1]
