"""What a user gets from ``pip install``: all modules, the native one among them, and nothing else.

The build runs on a copy of the tree, so that no stale folder of an earlier build leaks into it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path

import pytest

from kvcache import sums

ROOT = Path(__file__).parent.parent
INSTALL_BYTES_MAX = 25_000_000
"""With all it needs, without the bytecode that the installer makes of it."""
SISTERS = ("client", "server", "eviction")
NOT_COPIED = shutil.ignore_patterns(
    ".git",
    ".venv*",
    ".*_cache",
    ".hypothesis",
    ".reports",
    "__pycache__",
    "build",
    "dist",
    "*.egg-info",
    "*.so",
)
HEAVY = ("torch", "vllm", "transformers", "numpy", "nvidia", "triton")


@dataclass(frozen=True, slots=True)
class Built:
    """A wheel that was built from the sdist that was built from the tree."""

    wheel: Path
    sdist: Path

    def wheel_names(self) -> set[str]:
        with zipfile.ZipFile(self.wheel) as archive:
            return set(archive.namelist())

    def sdist_names(self) -> set[str]:
        with tarfile.open(self.sdist) as archive:
            return {name.partition("/")[2] for name in archive.getnames()}

    def requirements(self) -> list[str]:
        with zipfile.ZipFile(self.wheel) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
            metadata = Parser().parsestr(archive.read(name).decode())
        return metadata.get_all("Requires-Dist") or []


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    place = tmp_path_factory.mktemp("packaging")
    shutil.copytree(ROOT, place / "tree", symlinks=True, ignore=NOT_COPIED)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(place / "dist"), "tree"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (wheel,) = (place / "dist").glob("*.whl")
    (sdist,) = (place / "dist").glob("*.tar.gz")
    return Built(wheel, sdist)


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the wheel and all that it needs, as ``pip install`` lays it down."""
    place = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(place), str(built.wheel)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return place


def modules_of_the_tree() -> set[str]:
    """Every module, as the wheel should name it."""
    names: set[str] = set()
    for folder in ("kvcache", *SISTERS):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT).parts
            if "__pycache__" in parts or (parts[0] == "kvcache" and parts[1] in SISTERS):
                continue
            names.add("/".join(parts if parts[0] == "kvcache" else ("kvcache", *parts)))
    return names


def python_names(names: set[str]) -> set[str]:
    return {name for name in names if name.startswith("kvcache/") and name.endswith(".py")}


def test_the_native_module_is_in_use_here() -> None:
    assert sums.NATIVE, "the C++ module was not built: run pip install -v -e . and read why"


@pytest.mark.slow
def test_wheel_and_sdist_hold_the_modules_of_the_tree(built: Built) -> None:
    expected = modules_of_the_tree()
    assert len(expected) > 15
    assert python_names(built.wheel_names()) == expected
    assert python_names(built.sdist_names()) == expected


@pytest.mark.slow
def test_the_wheel_holds_only_kvcache(built: Built) -> None:
    top = {name.partition("/")[0] for name in built.wheel_names()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"kvcache"}
    assert "kvcache/py.typed" in built.wheel_names()
    assert any(name.endswith("/LICENSE") for name in built.wheel_names())


@pytest.mark.slow
def test_the_native_module_is_in_the_wheel(built: Built) -> None:
    assert [name for name in built.wheel_names() if name.endswith(".so")]
    sources = {name for name in built.sdist_names() if name.startswith("kvcache/_native/")}
    assert [name for name in sources if name.endswith(".cpp")], "the sdist cannot build it"


@pytest.mark.slow
def test_the_core_asks_for_nothing_heavy(built: Built) -> None:
    core = [line for line in built.requirements() if "extra ==" not in line]
    assert core
    assert not [line for line in core if line.lower().startswith(HEAVY)]


@pytest.mark.slow
def test_an_installation_is_small(installed: Path) -> None:
    names = {path.name.partition("-")[0].lower() for path in installed.glob("*.dist-info")}
    assert not names & set(HEAVY)
    files = [path for path in installed.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    total = sum(path.stat().st_size for path in files)
    assert total <= INSTALL_BYTES_MAX


@pytest.mark.slow
def test_an_installation_works_away_from_the_tree(installed: Path, tmp_path: Path) -> None:
    program = (
        "import kvcache, kvcache.client, kvcache.server, kvcache.eviction, kvcache.sums as sums\n"
        "assert sums.NATIVE\n"
        f"assert kvcache.__file__.startswith({str(installed)!r}), kvcache.__file__\n"
    )
    subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env={"PYTHONPATH": str(installed)}, check=True
    )
