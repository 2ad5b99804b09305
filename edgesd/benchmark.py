"""`edgesd bench`: how long a bundle takes to load and to call, and how much memory, each in a process of its own.

A child process is what makes a load cold and a peak of memory that bundle's alone. The operating system's file cache
is not emptied: "cold" is a fresh process, "warm" the same process once more.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgesd.child import in_child
from edgesd.errors import DataError, RequestError, SetupError
from edgesd.sheet import Section, Sheet, duration, size
from edgesd.timing import Spread, measure, spread, timed

if TYPE_CHECKING:
    from edgesd.bundle import Bundle
    from edgesd.golden import Golden
    from edgesd.runtime.session import Session

COLD_LOADS = 3  # processes started for the cold load, at most


def bench(folder: Path | str, runs: int = 7, threads: int | None = None, device: str | None = None) -> Sheet:
    """Cold load, warm load, seconds per call by component, peak memory. Medians of `runs` with smallest and largest.

    Calls take the bundle's golden inputs, one row each. Raises SetupError where figures would mean nothing (Core ML off
    a Mac), DataError for a broken bundle.
    """
    from edgesd import targets

    if runs < 1:
        raise RequestError(f"{runs} runs", "1 or more", "Change --runs")
    opened = meaningful(folder)
    target = targets.load(opened.manifest.target)
    options = {key: value for key, value in (("threads", threads), ("device", device)) if value is not None}
    ran = in_child(observe, opened.folder, runs, options, label="the measurement")
    whole, cold = ran.value, [ran.value["cold_load"]]
    for _ in range(min(runs, COLD_LOADS) - 1):
        cold.append(in_child(observe, opened.folder, 0, options, label="a cold load").value["cold_load"])
    data = {
        "bundle": opened.folder.name,
        "target": opened.manifest.target,
        "runtime": target.runtime_version(),
        "runs": runs,
        "options": options,
        "cold_load": spread(cold).to_json(),
        "warm_load": whole["warm_load"],
        "components": whole["components"],
        "peak_memory_bytes": ran.peak_bytes,
    }
    return Sheet(data, (_section(data),))


def meaningful(folder: Path | str) -> Bundle:
    """The bundle, read with its hashes; SetupError where its runtime is interpreted and seconds would mean nothing."""
    from edgesd import bundle, targets

    opened = bundle.read(folder)
    if not getattr(targets.load(opened.manifest.target), "speed_is_meaningful", lambda: True)():
        raise SetupError(
            f"speed of target {opened.manifest.target} on {sys.platform}",
            "the platform its runtime is made for",
            "Run edgesd bench there; here the bundle is interpreted, which says nothing about its speed",
        )
    return opened


def _section(data: dict[str, Any]) -> Section:
    timings = {"cold load": data["cold_load"], "warm load": data["warm_load"]}
    timings |= {f"{name}, a call": figures for name, figures in data["components"].items()}
    rows = tuple(
        (what, duration(t["median"]), duration(t["min"]), duration(t["max"]), str(t["runs"]))
        for what, t in timings.items()
    )
    note = f"peak memory {size(data['peak_memory_bytes'])} · {data['runtime']}"
    return Section(f"{data['bundle']} on {data['target']}", ("what", "median", "least", "most", "runs"), rows, note)


# ---- in the child ----------------------------------------------------------------------------------------------


def observe(folder: Path, runs: int, options: dict[str, Any]) -> dict[str, Any]:
    """Figures of this process. runs 0: the cold load alone, which every process has but once."""
    from edgesd import bundle, golden, targets

    opened = bundle.read(folder)
    manifest = opened.manifest
    names = [component.name for component in manifest.components]

    def load() -> Session:
        session = targets.load(manifest.target).open(opened.folder, manifest, **options)
        for name in names:
            session.load(name)
        return session

    session, cold = timed(load)
    answer: dict[str, Any] = {"cold_load": cold}
    if runs:
        stored = golden.read(opened)
        answer["components"] = {name: _calls(session, stored, name, runs).to_json() for name in names}
        warm = []
        for _ in range(runs):
            for name in names:
                session.unload(name)  # never two at a time: the peak of memory is that of one
            del session
            session, seconds = timed(load)
            warm.append(seconds)
        answer["warm_load"] = spread(warm).to_json()
    return answer


def _calls(session: Session, stored: Golden, component: str, runs: int) -> Spread:
    """Seconds of a component's first recorded call, repeated."""
    batches = session.batches(component)
    calls = stored.calls(component, 1 if batches is None else min(batches))
    if not calls:
        raise DataError(
            f"the golden vectors hold no call of {component}", "calls of every component", "Package the model again"
        )
    return measure(partial(session.run, component, calls[0].inputs), runs)
