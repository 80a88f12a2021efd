"""How fast something goes, measured while it runs; and whether loading blocks beats computing them anew.

A load from NVMe saves prefill only if it is done first. Both times are estimates from what was seen
lately: the reads of this device, and the prefill tokens a second that the engine's connector reports.
Where one of them is not known yet, the load is tried: that is how it becomes known.

Decides only: no clock, no I/O. One owner. The sum: a sample costs under 1 us.
"""

from __future__ import annotations

from kvcache.clock import NS_PER_S

SAMPLES_MIN = 8
HALF_LIFE_SAMPLES = 32


class Rate:
    """Amount per second, the recent past weighing most: a sample counts half after ``half_life`` more.

    Amounts and times are summed apart and divided at the end, so that many small samples weigh
    as much as one large one of the same length, and none can give a rate that no span of time had.
    """

    def __init__(self, samples_min: int = SAMPLES_MIN, half_life: int = HALF_LIFE_SAMPLES) -> None:
        assert samples_min >= 1
        assert half_life >= 1
        self._samples_min = samples_min
        self._keep = 0.5 ** (1 / half_life)
        self._samples = 0
        self._amount = 0.0
        self._ns = 0.0

    def add(self, amount: int, duration_ns: int) -> None:
        """``amount`` (bytes, tokens) took ``duration_ns``. One of them 0 tells nothing."""
        if amount <= 0 or duration_ns <= 0:
            return
        self._samples = min(self._samples + 1, self._samples_min)
        self._amount = self._amount * self._keep + amount
        self._ns = self._ns * self._keep + duration_ns

    def value(self) -> float | None:
        """Amount a second; None until there were samples enough."""
        return self._amount * NS_PER_S / self._ns if self._samples >= self._samples_min else None

    def forget(self) -> None:
        """What was measured is no longer so, for instance because the device was away."""
        self._samples = 0
        self._amount = self._ns = 0.0


def load_ns(load_bytes: int, rate_bytes_s: float | None, queue_ns: int) -> float | None:
    """Until so many bytes are loaded, behind ``queue_ns`` of others' loads. None: not known."""
    return queue_ns + load_bytes * NS_PER_S / rate_bytes_s if rate_bytes_s else None


def worth_loading(
    load_bytes: int,
    rate_bytes_s: float | None,
    queue_ns: int,
    tokens: int,
    prefill_tokens_s: float | None,
) -> bool:
    """Is loading the blocks no slower than computing their ``tokens`` anew? Yes while a rate is not known
    (None or 0)."""
    loading_ns = load_ns(load_bytes, rate_bytes_s, queue_ns)
    if loading_ns is None or not prefill_tokens_s:
        return True
    return loading_ns <= tokens * NS_PER_S / prefill_tokens_s
