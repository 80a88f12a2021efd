"""The small kernel of vLLM's offloading connector, rebuilt in Triton from what is published about it.

Facts (vllm-project/vllm, pull request 42212 and the documentation of ``kv_offload.cpu.swap_blocks_triton``):
a list of (source, target, bytes) whose host side is pinned memory, read and written by the GPU itself; 12
programs, each takes every 12th; words of 8 bytes; used for loads, of at least 16 pieces under 28 KiB
each. Larger pieces, and all saves, go to one ``cuMemcpyBatchAsync`` (``gpu_rivals.Batched``).
The width of a step is ours: 8 KiB.
"""

import torch
import triton
import triton.language as tl

PROGRAMS = 12
WIDTH = 1024


@triton.jit
def _swap(jobs, like, count, words, WIDTH: tl.constexpr):  # noqa: N803 (a constant of the kernel)
    for job in range(tl.program_id(0), count, tl.num_programs(0)):
        source = tl.load(jobs + 2 * job).to(like.dtype)
        target = tl.load(jobs + 2 * job + 1).to(like.dtype)
        for start in range(0, words, WIDTH):
            at = start + tl.arange(0, WIDTH)
            mask = at < words
            tl.store(target + at, tl.load(source + at, mask=mask), mask=mask)


def swap(jobs: torch.Tensor, piece_bytes: int) -> None:
    """Copy ``piece_bytes`` (a multiple of 8) from ``jobs[i, 0]`` to ``jobs[i, 1]``, addresses; one launch on
    the current stream. ``jobs``: int64 ``[count, 2]`` of the device."""
    width = min(WIDTH, triton.next_power_of_2(piece_bytes // 8))
    _swap[(min(PROGRAMS, len(jobs)),)](jobs, jobs, len(jobs), piece_bytes // 8, width)
