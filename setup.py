"""Builds the C++ modules. Everything else is in pyproject.toml.

``optional=True``: where one cannot be compiled the package installs without it and its pure-Python
twin serves (kvcache/sums.py, kvcache/index.py).
"""

from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

native = Path("kvcache/_native")
index_headers = sorted(native.glob("index_*.h"))

setup(
    ext_modules=[
        Pybind11Extension(
            "kvcache._native.core",
            [str(native / name) for name in ("core.cpp", "copy.cpp")],
            depends=[str(native / name) for name in ("copy.h", "xxh3.h")],
            cxx_std=17,
            extra_compile_args=["-O3", "-Wall", "-Wextra"],
            optional=True,
        ),
        Pybind11Extension(
            "kvcache._native.index",
            [str(native / name) for name in ("index.cpp", "index_reads.cpp", "index_runs.cpp")],
            depends=[str(path) for path in (*index_headers, native / "xxh3.h")],
            cxx_std=17,
            extra_compile_args=["-O3", "-Wall", "-Wextra"],
            optional=True,
        ),
    ]
)
