"""What runs a build's steps: stages from the cache or made in child processes, a line on stderr for each.

with Workers(plan) as workers:
    folder = workers.stage("unet fp32", weight_bytes, key, work, *args)     cached by its key
    value = workers.alone("validate", work, *args)                          never cached
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgesd.child import Child, Ran, in_child
from edgesd.sheet import size
from edgesd.stages import MAX_BYTES, Stages

if TYPE_CHECKING:
    from edgesd.buildplan import BuildPlan

OWN_CHILD_BYTES = 256 << 20  # float32 weights beyond which a stage gets a process of its own


class Workers:
    """Runs steps in children: small stages share one (imports cost seconds), a big one has its own and gives back.

    peak_bytes: of the largest child so far.
    """

    def __init__(self, plan: BuildPlan) -> None:
        self.peak_bytes, self._one_each = 0, plan.one_at_a_time
        self._target, self._stages = plan.recipe.target, Stages(limit_bytes=MAX_BYTES)
        self._shared: Child | None = None
        self._limit_bytes = child_limit(plan.recipe.max_ram_bytes)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the shared child; its memory is free when this returns."""
        if self._shared is not None:
            self._shared.close()
            self._shared = None

    def stage(self, what: str, weight_bytes: int, key: str, work: Callable[..., None], *args: Any) -> Path:
        """The folder of a stage, from the cache or made now by `work(*args, folder)` in a child."""
        label, made = f"{self._target}: {what}", list[Ran]()

        def make(folder: Path) -> None:
            if self._one_each or weight_bytes > OWN_CHILD_BYTES:
                self.close()
                made.append(self._alone(label, work, *args, folder))
            else:
                if self._shared is None:
                    self._shared = Child(memory_limit_bytes=self._limit_bytes)
                made.append(self._noted(self._shared.run(work, *args, folder, label=label)))

        with _line(label) as notes:
            place = self._stages.run(key, make)
            notes += [f"peak {size(made[0].peak_bytes)}"] if made else ["cached"]
        return place

    def alone(self, what: str, work: Callable[..., Any], *args: Any) -> Any:
        """What `work(*args)` returns in a child of its own."""
        label = f"{self._target}: {what}"
        with _line(label) as notes:
            ran = self._alone(label, work, *args)
            notes.append(f"peak {size(ran.peak_bytes)}")
        return ran.value

    def _alone(self, label: str, work: Callable[..., Any], *args: Any) -> Ran:
        return self._noted(in_child(work, *args, label=label, memory_limit_bytes=self._limit_bytes))

    def _noted(self, ran: Ran) -> Ran:
        self.peak_bytes = max(self.peak_bytes, ran.peak_bytes)
        return ran


def child_limit(max_ram_bytes: int | None) -> int | None:
    """What a child may hold so that it and this process stay within a limit together; None without one."""
    if max_ram_bytes is None:
        return None
    import psutil

    return max(1, max_ram_bytes - psutil.Process().memory_info().rss)


@contextmanager
def _line(label: str) -> Iterator[list[str]]:
    """A spinner while a step runs and one line when it is done, on stderr: "cached", or time and notes."""
    from rich.console import Console

    console, began, notes = Console(stderr=True, highlight=False), time.perf_counter(), list[str]()
    with console.status(f"{label} …") if sys.stderr.isatty() else nullcontext():
        yield notes
    took = f"{time.perf_counter() - began:.1f} s"
    console.print(f"{label}  {', '.join(notes) if 'cached' in notes else ', '.join([took, *notes])}")
