"""Builds the C++ module. Everything else is in pyproject.toml.

``optional=True``: where it cannot be compiled the package installs without it and the pure-Python
twin serves (kvcache/sums.py).
"""

from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

native = Path("kvcache/_native")

setup(
    ext_modules=[
        Pybind11Extension(
            "kvcache._native.core",
            [str(native / name) for name in ("core.cpp", "copy.cpp")],
            depends=[str(native / name) for name in ("copy.h", "xxh3.h")],
            cxx_std=17,
            extra_compile_args=["-O3", "-Wall", "-Wextra"],
            optional=True,
        )
    ]
)
