"""`edgesd bench --sustained MINUTES`: pictures one after the other, and what a step costs as the device grows warm.

A phone that draws its first picture in four seconds may need seven for the tenth. The data is one JSON object that an
app on any device can write as well (docs/benchmarks.md); what a device does not tell is null there.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgesd.errors import RequestError
from edgesd.runtime.device import DeviceState, attribute, default_sensors, integer, read_celsius
from edgesd.sheet import Section, Sheet, duration
from edgesd.timing import spread

if TYPE_CHECKING:
    from edgesd.manifest import Manifest
    from edgesd.runtime.pipeline import Pipeline
    from edgesd.runtime.settings import Settings

FORMAT = "edgesd-sustained-1"
EVERY_S = 10.0  # seconds that one sample stands for
ENDS_S = 60.0  # what the first and the last minute are, for the slowdown
MAX_MINUTES = 24 * 60
MAX_ROWS = 12  # of the table; the JSON holds every sample

Sense = Callable[[], DeviceState]
Gauge = Callable[[], float | None]
Progress = Callable[[str, int, int], None]


def sustained(
    folder: Path | str, minutes: float, *, threads: int | None = None, device: str | None = None,
    every_s: float = EVERY_S, progress: Progress = lambda *_: None,
) -> Sheet:  # fmt: skip
    """Draws the bundle's default picture over and over for so long, at least one step.

    Raises RequestError (minutes), SetupError where speed means nothing (Core ML off a Mac), DataError (broken bundle).
    """
    if not 0 < minutes <= MAX_MINUTES:
        raise RequestError(f"{minutes:g} minutes", f"above 0, at most {MAX_MINUTES}", "Change --sustained")
    from edgesd import targets
    from edgesd.benchmark import meaningful
    from edgesd.sources import open_bundle

    opened = meaningful(folder)
    given: dict[str, Any] = {"threads": threads, "device": device}
    options = {key: value for key, value in given.items() if value is not None}
    pipeline = open_bundle(opened.folder, **options)
    settings = settings_of(opened.manifest, pipeline)
    found = watch(events(pipeline, settings), 60 * minutes, every_s=every_s, joules=Rapl(), progress=progress)
    data = {
        "format": FORMAT,
        "bundle": opened.folder.name,
        "target": opened.manifest.target,
        "runtime": targets.load(opened.manifest.target).runtime_version(),
        "device": f"{platform.system()} {platform.machine()}",
        "options": options,
        "picture": {
            "size_px": list(opened.manifest.model.defaults.size_px),
            "sampler": settings.sampler,
            "steps": settings.num_inference_steps,
            "guidance": settings.guidance_scale,
        },
        "minutes": minutes,
        **found,
    }
    return Sheet(data, (section(data),))


def settings_of(manifest: Manifest, pipeline: Pipeline) -> Settings:
    """The model's default picture, or what of the bundle's tables is nearest to it."""
    from edgesd.runtime.settings import resolve

    defaults = pipeline.spec.defaults
    shipped = {entry.name: entry.steps for entry in manifest.samplers}
    sampler = defaults.sampler if defaults.sampler in shipped else manifest.samplers[0].name
    fewer = [steps for steps in shipped[sampler] if steps <= defaults.steps]
    steps = max(fewer) if fewer else min(shipped[sampler])
    prompt = "a red circle" if pipeline.bank is None else next(p for p in pipeline.bank.prompts if p.strip())
    return resolve(pipeline.spec, prompt, sampler=sampler, num_inference_steps=steps)


def events(pipeline: Pipeline, settings: Settings) -> Iterator[bool]:
    """Without end: False for each step of a picture, True when the picture is there. The text is encoded once."""
    from edgesd.runtime.cache import PromptCache
    from edgesd.runtime.generate import Picture, sample

    cache = PromptCache()
    for seed in count():
        for event in sample(pipeline, replace(settings, seed=seed), cache=cache):
            yield isinstance(event, Picture)


def watch(
    drawing: Iterator[bool], seconds: float, *, every_s: float = EVERY_S,
    clock: Callable[[], float] = time.monotonic, sense: Sense | None = None, celsius: Gauge | None = None,
    joules: Gauge | None = None, progress: Progress = lambda *_: None,
) -> dict[str, Any]:  # fmt: skip
    """Follows `drawing` (see `events`) for so long and says, window by window, what a step took and how warm it got.

    sense: battery and heat (this machine's sensors if None). celsius, joules: the hottest zone, energy since the start.
    """
    sense = default_sensors() if sense is None else sense
    celsius = hottest_celsius if celsius is None else celsius
    joules = (lambda: None) if joules is None else joules
    steps: list[tuple[float, float]] = []  # (seconds since the start, seconds it took)
    samples: list[dict[str, Any]] = []
    pictures, fresh, last_read = 0, 0, 0.0
    joules()  # the first reading is where it counts from
    begin = before = clock()
    for finished in drawing:
        now = clock()
        if finished:
            pictures += 1
        else:
            steps.append((now - begin, now - before))
        over = now - begin >= seconds and bool(steps)
        if over or now - begin - last_read >= every_s:
            samples.append(_sample(now - begin, [took for _, took in steps[fresh:]], sense(), celsius(), joules()))
            fresh, last_read = len(steps), clock() - begin
            progress("sustained", round(min(now - begin, seconds)), round(seconds))
        if over:
            break
        before = clock()  # reading sensors is no step's time
    return _summary(steps, samples, pictures)


def _sample(
    at_s: float, took: list[float], state: DeviceState, celsius: float | None, joules: float | None
) -> dict[str, Any]:
    return {
        "at_s": round(at_s, 3),
        "steps": len(took),
        "seconds_per_step": round(statistics.median(took), 6) if took else None,
        "celsius": celsius,
        "thermal": state.thermal,
        "headroom": state.headroom,
        "battery": state.battery,
        "charging": state.charging,
        "energy_j": None if joules is None else round(joules, 3),
    }


def _summary(steps: list[tuple[float, float]], samples: list[dict[str, Any]], pictures: int) -> dict[str, Any]:
    whole = samples[-1]["at_s"]
    # In a run below two minutes the ends would overlap: then each is a half.
    end = min(ENDS_S, whole / 2)
    first = [took for at, took in steps if at <= end]
    last = [took for at, took in steps if at > whole - end]
    ends = [round(statistics.median(each if each else [took for _, took in steps]), 6) for each in (first, last)]
    energy = samples[-1]["energy_j"]
    charges = [s["battery"] for s in samples if s["battery"] is not None]
    return {
        "seconds": whole,
        "pictures": pictures,
        "seconds_per_step": {key: round(x, 6) for key, x in spread(took for _, took in steps).to_json().items()},
        "first_minute": ends[0],
        "last_minute": ends[1],
        "slowdown": round(ends[1] / ends[0], 4) if ends[0] > 0 else None,
        "energy_j": energy,
        "joules_per_step": None if energy is None else round(energy / len(steps), 4),
        "battery_used": round(charges[0] - charges[-1], 4) if charges else None,
        "samples": samples,
    }


def section(data: dict[str, Any]) -> Section:
    """The table of one run, from its JSON."""
    samples = data["samples"]
    every = max(1, -(-len(samples) // MAX_ROWS))
    rows = tuple(
        (
            f"{s['at_s'] / 60:.1f} min", str(s["steps"]), duration(s["seconds_per_step"]),
            "" if s["celsius"] is None else f"{s['celsius']:.0f} °C",
            s["thermal"], "" if s["battery"] is None else f"{s['battery']:.0%}",
            "" if s["energy_j"] is None else f"{s['energy_j']:.0f} J",
        )
        for s in samples[every - 1 :: every]
    )  # fmt: skip
    note = f"{data['pictures']} pictures in {data['seconds'] / 60:.1f} min"
    if data["slowdown"] is not None:
        note += f" · the last minute's steps take {data['slowdown']:.2f} times the first's"
    if data["joules_per_step"] is not None:
        note += f" · {data['joules_per_step']:.2f} J a step"
    if data["battery_used"] is not None:
        note += f" · {data['battery_used']:.1%} of the battery"
    columns = ("until", "steps", "a step", "hottest", "thermal", "battery", "energy")
    return Section(f"{data['bundle']} on {data['target']}, {data['minutes']:g} minutes", columns, rows, note)


# ---- gauges ----------------------------------------------------------------------------------------------------


def hottest_celsius(root: Path = Path("/sys")) -> float | None:
    """The hottest thermal zone of a Linux or Android kernel; None without a plausible one."""
    found = [read_celsius(path) for path in root.glob("class/thermal/thermal_zone*/temp")]
    return max((x for x in found if x is not None), default=None)


class Rapl:
    """Joules that all processor packages took since the first call; None where the kernel does not tell.

    The counters start again at `max_energy_range_uj`, every hour or so: read more often than that.
    """

    def __init__(self, root: Path = Path("/sys")) -> None:
        # Only packages: a zone below one is part of it, and psys holds them all once more.
        names = {path.parent: path for path in sorted(root.glob("class/powercap/intel-rapl:*/name"))}
        self._zones = [zone for zone, name in names.items() if zone.name.count(":") == 1 and _is_package(name)]
        self._last: dict[Path, int] = {}
        self._joules = 0.0

    def __call__(self) -> float | None:
        told = False
        for zone in self._zones:
            now = integer(zone / "energy_uj")
            if now is None:
                continue
            told, before = True, self._last.get(zone, now)
            gone = now - before
            if gone < 0:
                most = integer(zone / "max_energy_range_uj")
                gone = 0 if most is None else gone + most
            self._joules += gone / 1e6
            self._last[zone] = now
        return self._joules if told else None


def _is_package(name: Path) -> bool:
    text = attribute(name)
    return text is not None and text.startswith("package")
