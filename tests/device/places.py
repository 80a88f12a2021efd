"""What is tested where: torch on every device, the Triton kernels on a GPU or else in Triton's
interpreter."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import TypeVar

import pytest
import torch

from kvcache.device import gather_twin, kernels

Test = TypeVar("Test")


@dataclass(frozen=True, slots=True)
class Place:
    """An implementation of ``kvcache.device.gather``, and a device on which it runs here."""

    name: str
    made: ModuleType
    device: str


CUDA = torch.cuda.is_available()
DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.cuda)] if CUDA else [])]
PLACES = [Place("torch", gather_twin, "cpu"), Place("triton", kernels, "cpu")]
if CUDA:
    PLACES = [PLACES[0], Place("torch-cuda", gather_twin, "cuda"), Place("triton", kernels, "cuda")]


def of_kernels(test: Test) -> Test:
    """They run on a GPU where there is one: ``-m cuda`` takes these tests along."""
    return pytest.mark.cuda(test) if CUDA else test


on_all = pytest.mark.parametrize("device", DEVICES)
by_all = pytest.mark.parametrize(
    "place",
    [pytest.param(place, marks=pytest.mark.cuda) if place.device == "cuda" else place for place in PLACES],
    ids=lambda place: place.name,
)
