"""Cost weight, around any policy: deep blocks took more FLOPs a byte to compute, so they may be worth more.

Attention makes the n-th token of a prompt cost in proportion to ``1 + n / P0`` (P0: where attention costs as
much as all else; about 30,000 tokens for models of today). With ``cost_weight`` 0 the base's order stands.
With more, of the branches that the base would let go first the shallow ones go before the deep ones, the
further, the more it weighs: at 1, the deepest of them stands as well as the last that was asked for.

This pays where nobody knows what comes back, and costs hits where the base knows: measure before you set
it (``kvcache tune replay``).

As in Marconi (MLSys 25), whose utility adds normed recency and FLOPs a byte; GDSF multiplies them.

The sum: four times the base's choice, and 1 us a block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from kvcache.eviction.wrapper import Going, Wrapper, ask_more
from kvcache.policy import Param, RequestContext


class Cost(Wrapper):
    OWN: ClassVar[Mapping[str, Param]] = {
        "cost_weight": Param(0.0, 0.0, 10.0, "how much more a deep block is worth; 0: as any other")
    }

    def _choose(self, context: RequestContext, count: int, device: int | None) -> Sequence[int]:
        weight = self._own["cost_weight"]
        if not weight:
            return self._of_base(context, count, device)
        branches = self._branches(self._of_base(context, ask_more(count), device))
        depth = self._tree.depth
        deepest = max((depth[branch[0]] for branch in branches), default=1)
        scored = sorted(
            range(len(branches)),
            key=lambda at: at / len(branches) + weight * depth[branches[at][0]] / deepest,
        )
        going = Going(self._tree)
        taken = True
        while taken and len(going.blocks) < count:
            taken = False
            for at in scored:
                for block in branches[at]:
                    if len(going.blocks) < count and going.take(block):
                        taken = True
        return going.blocks

    def _branches(self, named: Sequence[int]) -> list[list[int]]:
        """Runs of blocks each of which is the parent of the one before."""
        parents = self._tree.parent
        branches: list[list[int]] = []
        for block in named:
            if branches and parents[branches[-1][-1]] == block:
                branches[-1].append(block)
            else:
                branches.append([block])
        return branches
