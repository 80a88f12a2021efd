"""Bugs put into the kernels and the reading of layouts: each must turn a named test red."""

from __future__ import annotations

import pytest

from tests.planting import Garden, Plant
from tests.planting import garden as garden

KERNELS = "kvcache/device/kernels.py"
GATHER = "tests/device/test_gather.py"
SUMS = "tests/device/test_device_sums.py"
LAYOUT = f"{GATHER}::test_every_layout"
NUMBER = f"{GATHER}::test_every_kind_of_number"

PLANTS = (
    Plant(
        "what another process left in the GPU's memory is given to engines",
        "kvcache/device/slab.py",
        "            clear(memory)\n",
        "",
        "tests/device/test_slab.py::test_new_memory_of_a_gpu_has_nothing_of_who_had_it_before",
    ),
    Plant(
        "tokens and heads of a page taken for one another",
        "kvcache/device/pages.py",
        '"flashinfer_nhd": "NPTHD",',
        '"flashinfer_nhd": "NPHTD",',
        f"{LAYOUT}[flashinfer_nhd-1-torch]",
    ),
    Plant(
        "every page of a block is its first",
        KERNELS,
        "tl.load(pages + in_head // PAGE)",
        "tl.load(pages)",
        f"{LAYOUT}[single_hnd-2-triton]",
    ),
    Plant(
        "the last piece of a plane is left out",
        KERNELS,
        "    mask = (starts < plane_words)[:, None]\n",
        "    mask = (starts + PIECE < plane_words)[:, None]\n",
        f"{NUMBER}[3-12-torch.float16-triton]",
    ),
    Plant(
        "layers alone, from the first one on",
        KERNELS,
        "    plane = first + program // tiles % planes\n",
        "    plane = program // tiles % planes\n",
        f"{GATHER}::test_some_layers_alone[1-triton]",
    ),
    Plant(
        "words of eight bytes wherever a slab begins",
        "kvcache/device/checks.py",
        "    return gcd(WORD_BYTES_MAX, *positions)\n",
        "    return 8\n",
        f"{GATHER}::test_a_slab_that_begins_anywhere[triton]",
    ),
    Plant(
        "the last stripe summed with the key of its place",
        KERNELS,
        "    is_last = stripe == last\n",
        "    is_last = stripe < 0\n",
        f"{SUMS}::test_the_kernel_sums_every_chunk_of_some_planes[1024]",
    ),
    Plant(
        "the last stripe begins where the one before ends",
        KERNELS,
        "tl.where(is_last, chunk_words - 8, stripe * 8)",
        "stripe * 8",
        f"{SUMS}::test_the_kernel_sums_every_chunk_of_some_planes[1032]",
    ),
    Plant(
        "a round beyond the chunk is chained",
        KERNELS,
        "tl.range(ROUNDS - 1, loop_unroll_factor=8)",
        "tl.range(ROUNDS, loop_unroll_factor=8)",
        f"{SUMS}::test_the_kernel_sums_every_chunk_of_some_planes[2048]",
    ),
    Plant(
        "lanes are not crossed",
        KERNELS,
        "_product(even ^ even_key) + odd",
        "_product(even ^ even_key) + even",
        f"{SUMS}::test_the_kernel_sums_every_chunk_of_some_planes[256]",
    ),
    Plant(
        "what another wrote to the slab is summed",
        "kvcache/device/gather_twin.py",
        "    return sums.sum_blocks(list(contents), moves.spec.chunk_bytes)\n",
        "    return sums.sum_blocks(_in_slab(moves, slab, first, last), moves.spec.chunk_bytes)\n",
        f"{GATHER}::test_who_writes_to_the_slab_meanwhile_is_not_summed[gather_and_sum-64-torch]",
    ),
    Plant(
        "what was queued runs on behind an error",
        "kvcache/device/line.py",
        "            self._is_over = self._have_ended(*self._beside, current)\n",
        "            self._is_over = True\n",
        "tests/device/test_engine.py::TestTensors::test_nothing_runs_on_behind_an_error",
    ),
    Plant(
        "each wait of a request has a deadline of its own",
        "kvcache/device/waits.py",
        "                self._left_ns -= min(now_ns() - begun_ns, LOOK_NS_MAX)\n",
        "                pass\n",
        "tests/device/test_waits.py::test_all_waits_of_a_request_have_one_deadline",
    ),
    Plant(
        "time in which the process was stopped counts against a GPU",
        "kvcache/device/waits.py",
        "min(now_ns() - begun_ns, LOOK_NS_MAX)",
        "now_ns() - begun_ns",
        "tests/device/test_waits.py::test_time_in_which_this_process_is_stopped_is_not_counted",
    ),
    Plant(
        "a GPU that was given up is waited for on",
        "kvcache/device/waits.py",
        "            if self._owner.is_stuck:\n",
        "            if False:\n",
        "tests/device/test_waits.py::test_who_waits_already_waits_no_more",
    ),
    Plant(
        "an event is asked while another GPU is current",
        "kvcache/device/streams.py",
        "            with torch.cuda.device(self._device):\n                done",
        "            if True:\n                done",
        "tests/device/test_streams.py::test_a_thread_whose_current_gpu_is_another_asks_that_one_for_nothing",
    ),
    Plant(
        "kernels that sum wrongly are used",
        KERNELS,
        "    if not torch.equal(found, wanted):\n",
        "    if len(found) != len(wanted):\n",
        "tests/device/test_kernels.py::test_what_sums_wrongly_is_not_used",
    ),
    Plant(
        "a page written twice in no order",
        "kvcache/device/pages.py",
        "            len(set(used)) == len(used),\n",
        "            True,\n",
        f"{GATHER}::test_what_does_not_fit_is_refused_before_a_byte_moves",
    ),
)


@pytest.mark.slow
def test_without_a_plant_all_is_green(garden: Garden) -> None:
    garden.check_control()


@pytest.mark.slow
@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_it_is_caught(garden: Garden, plant: Plant) -> None:
    garden.check_caught(plant)
