"""What the device feels like right now: battery, heat, memory, and what a call costs here. Clocks come in from outside.

A provider is a function without arguments that returns a `DeviceState` with None (or "unknown") where it cannot tell;
`merge` takes each figure from the first that knows it. What nobody knows counts as nominal, and a decision says so.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from edgesd.errors import DataError, RequestError
from edgesd.files import open_regular

Thermal = Literal["nominal", "fair", "serious", "critical", "unknown"]
THERMAL: tuple[str, ...] = get_args(Thermal)[:-1]  # coolest first
SAMPLE_S = 1.0  # Android answers NaN to whoever asks for headroom more often
DEGREES_PER_HEADROOM = 30.0  # below the throttling point, as Android's thermal service scales it
FAIR_BELOW, CRITICAL_BELOW = 10.0, 5.0  # kelvin below the trip where it is not nominal, or already critical
MAX_JSON_BYTES = 1 << 16
PREFIX = "EDGESD_DEVICE_"


@dataclass(frozen=True)
class DeviceState:
    """One reading; None = not known.

    battery: charge 0..1. charging: on the mains or filling. saver: the system saves power. thermal: Apple's four
    words. headroom: 0 cool, 1 where the system throttles, above 1 throttled (Android's scale). deadline_s: time the
    whole picture may take. seconds_per_call: of the UNet by width, learned here. time_s: a monotonic clock.
    """

    battery: float | None = None
    charging: bool | None = None
    saver: bool | None = None
    thermal: Thermal = "unknown"
    headroom: float | None = None
    free_memory_bytes: int | None = None
    deadline_s: float | None = None
    seconds_per_call: Mapping[float, float] = field(default_factory=dict)
    time_s: float = 0.0

    def __post_init__(self) -> None:
        rules: list[tuple[bool, str, str]] = [
            (self.battery is None or (_number(self.battery) and 0 <= self.battery <= 1), "battery", "0 to 1"),
            (all(x is None or isinstance(x, bool) for x in (self.charging, self.saver)), "charging or saver",
             "true, false or null"),
            (self.thermal in get_args(Thermal), "thermal", ", ".join(get_args(Thermal))),
            *((x is None or (_number(x) and x >= 0), name, "a number from 0 up")
              for name in ("headroom", "free_memory_bytes", "deadline_s", "time_s") for x in (getattr(self, name),)),
            (isinstance(self.seconds_per_call, Mapping)
             and all(_number(w) and 0 < w <= 1 and _number(s) and s > 0 for w, s in self.seconds_per_call.items()),
             "seconds_per_call", "seconds above 0 by width, e.g. {1.0: 0.4}"),
        ]  # fmt: skip
        for good, name, allowed in rules:
            if not good:
                came = f"device state with {name} {str(getattr(self, name, ''))[:40]}".rstrip()
                raise RequestError(came, allowed, "Correct the reading")

    @classmethod
    def from_json(cls, data: Any) -> DeviceState:
        """A reading as JSON: the fields above, any left out; widths are strings there. DataError for anything else."""
        try:
            given = dict(data)
            if "seconds_per_call" in given:
                given["seconds_per_call"] = {float(w): s for w, s in given["seconds_per_call"].items()}
            return cls(**given)
        except (TypeError, ValueError, AttributeError, RequestError) as error:
            raise DataError(f"a device state that does not read ({str(error)[:160]})",
                            ", ".join(f.name for f in fields(cls)), "Correct the JSON") from None  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"seconds_per_call": {f"{w:g}": s for w, s in self.seconds_per_call.items()}}


Provider = Callable[[], DeviceState]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def merge(*states: DeviceState) -> DeviceState:
    """Each figure from the first state that knows it; seconds_per_call by width; time_s: the latest."""
    found: dict[str, Any] = {}
    for name in ("battery", "charging", "saver", "headroom", "free_memory_bytes", "deadline_s"):
        found[name] = next((value for s in states if (value := getattr(s, name)) is not None), None)
    found["thermal"] = next((s.thermal for s in states if s.thermal != "unknown"), "unknown")
    found["seconds_per_call"] = {w: x for s in reversed(states) for w, x in s.seconds_per_call.items()}
    return DeviceState(**found, time_s=max((s.time_s for s in states), default=0.0))


class Sensors:
    """Providers merged, the first one first, read at most once in `every_s` seconds; time_s is the reading's."""

    def __init__(self, *providers: Provider, every_s: float = SAMPLE_S, clock: Callable[[], float] = time.monotonic):
        self._providers, self._every_s, self._clock = providers, every_s, clock
        self._last: DeviceState | None = None

    def __call__(self) -> DeviceState:
        now = self._clock()
        if self._last is None or not 0 <= now - self._last.time_s < self._every_s:
            self._last = replace(merge(*(provider() for provider in self._providers)), time_s=now)
        return self._last


def constant(state: DeviceState) -> Provider:
    """A provider that always says the same."""
    return lambda: state


def from_environment(environment: Mapping[str, str] | None = None) -> DeviceState:
    """EDGESD_DEVICE_BATTERY=0.12, …_THERMAL=serious, …_CHARGING=false and so on, by the names of the fields.

    Values are JSON, words may stand without quotes. RequestError for a name or value that is none.
    """
    environment = os.environ if environment is None else environment
    given: dict[str, Any] = {}
    for name, text in environment.items():
        if name.startswith(PREFIX):
            try:
                given[name.removeprefix(PREFIX).lower()] = json.loads(text)
            except ValueError:
                given[name.removeprefix(PREFIX).lower()] = text
    try:
        return DeviceState.from_json(given)
    except DataError as error:
        raise RequestError(error.came, error.allowed, f"Correct the {PREFIX}… variables") from None


def from_file(path: Path) -> Provider:
    """Reads a JSON file at every sample: what a phone's bridge, or a test, writes there."""

    def read() -> DeviceState:
        with open_regular(path) as file:
            text = file.read(MAX_JSON_BYTES + 1)
        try:
            data = json.loads(text) if len(text) <= MAX_JSON_BYTES else None
        except (ValueError, RecursionError):
            data = None
        return DeviceState.from_json(data)

    return read


def from_psutil() -> DeviceState:
    """Battery, mains and free memory by psutil; it has no thermal limits that are worth trusting."""
    import psutil

    battery = getattr(psutil, "sensors_battery", lambda: None)()
    memory = int(psutil.virtual_memory().available)
    if battery is None:
        return DeviceState(free_memory_bytes=memory)
    charge = min(max(battery.percent / 100, 0.0), 1.0)
    return DeviceState(battery=charge, charging=battery.power_plugged, free_memory_bytes=memory)


def from_sysfs(root: Path = Path("/sys")) -> DeviceState:
    """Linux and Android kernels: thermal zones held against their own trip points, power supplies, power profile.

    Passive trip reached = serious, within 10 K of it = fair; within 5 K of the hot or critical trip = critical. The
    hottest zone counts; zones without trips say nothing. headroom: 1 at the passive trip, 0 at 30 K below.
    """
    levels, headrooms = [], []
    for zone in sorted(root.glob("class/thermal/thermal_zone*")):
        read = _zone(zone)
        if read is not None:
            levels.append(read[0])
            headrooms += [] if read[1] is None else [read[1]]
    thermal: Any = THERMAL[max(levels)] if levels else "unknown"
    battery, charging = _supplies(root)
    profile = attribute(root / "firmware/acpi/platform_profile")
    saver = None if profile is None else profile in ("low-power", "quiet")
    return DeviceState(battery, charging, saver, thermal, max(headrooms, default=None))


def attribute(path: Path) -> str | None:
    """A sysfs attribute; None where the kernel has none or does not give it out (energy is root's on most systems)."""
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None


def integer(path: Path) -> int | None:
    """A sysfs attribute that is a whole number; None for any other, or none."""
    text = attribute(path)
    try:
        return None if text is None else int(text)
    except ValueError:
        return None


def read_celsius(path: Path) -> float | None:
    """Milli-degrees as a file holds them; None for a sensor that is absent or broken (some report -274 °C)."""
    value = integer(path)
    return value / 1000 if value is not None and 0 < value < 200_000 else None


def _zone(zone: Path) -> tuple[int, float | None] | None:
    """(index in THERMAL, headroom) of one zone; None where it has no temperature or no trip to hold it against."""
    heat = read_celsius(zone / "temp")
    trips: dict[str, float] = {}
    for kind in zone.glob("trip_point_*_type"):
        limit = read_celsius(kind.with_name(kind.name.replace("_type", "_temp")))
        name = attribute(kind)
        if limit is not None and name in ("passive", "hot", "critical"):
            trips[name] = min(limit, trips.get(name, limit))
    if heat is None or not trips:
        return None
    passive, limits = trips.get("passive"), [trips[name] for name in ("hot", "critical") if name in trips]
    headroom = None if passive is None else max(0.0, 1 - (passive - heat) / DEGREES_PER_HEADROOM)
    if limits and heat >= min(limits) - CRITICAL_BELOW:
        return 3, headroom
    if passive is None:
        return 0, None
    return (2 if heat >= passive else 1 if heat >= passive - FAIR_BELOW else 0), headroom


def _supplies(root: Path) -> tuple[float | None, bool | None]:
    """(battery 0..1, charging) of the system's own batteries; those of mice and pens have scope Device."""
    charges, charging = [], []
    for supply in sorted(root.glob("class/power_supply/*")):
        if attribute(supply / "type") != "Battery" or attribute(supply / "scope") == "Device":
            continue
        capacity, status = attribute(supply / "capacity"), attribute(supply / "status")
        charges += [min(int(capacity), 100) / 100] if capacity is not None and capacity.isdigit() else []
        charging += [] if status in (None, "Unknown") else [status != "Discharging"]
    return (min(charges) if charges else None), (any(charging) if charging else None)


def default_sensors(*first: Provider, clock: Callable[[], float] = time.monotonic) -> Sensors:
    """What this machine has, after `first`: the environment, Linux sysfs, psutil."""
    return Sensors(*first, from_environment, from_sysfs, from_psutil, clock=clock)
