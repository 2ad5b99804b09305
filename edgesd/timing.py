"""Seconds, honestly: warm-up calls apart, and the median never without its spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from edgesd.errors import RequestError


@dataclass(frozen=True)
class Spread:
    """What several timed runs took, in seconds."""

    median: float
    min: float
    max: float
    runs: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def spread(seconds: Iterable[float]) -> Spread:
    """Median, smallest and largest of some timings. Raises RequestError for none."""
    values = list(seconds)
    if not values:
        raise RequestError("no timed run", "at least one", "Raise the number of runs")
    return Spread(statistics.median(values), min(values), max(values), len(values))


def timed(call: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> tuple[Any, float]:
    """What `call` returned, and the seconds it took."""
    start = clock()
    result = call()
    return result, clock() - start


def measure(
    call: Callable[[], Any], runs: int, warmup: int = 1, clock: Callable[[], float] = time.perf_counter
) -> Spread:
    """Times `call` `runs` times after `warmup` untimed ones (first calls allocate, compile and page in)."""
    for _ in range(warmup):
        call()
    return spread(timed(call, clock)[1] for _ in range(runs))
