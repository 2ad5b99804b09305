"""A phone without a phone: a first-order thermal model of three device classes, and the traces it is put through.

    C dT/dt = P speed^2 + idle + sun - (T - ambient) / R,   speed = 1 below the throttling point, falling linearly above

Energy per operation falls with speed (voltage falls with clock), hence the square. What a device class is made of
carries its source, or the word "assumed": results compare settings with each other and predict no phone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edgesd.errors import DataError, RequestError
from edgesd.files import open_regular
from edgesd.runtime.device import DeviceState

PIECE_S = 1.0  # longest stretch that is played at one speed
SESSION_S = 24 * 3600.0
SLOWEST = 0.3  # of full speed, however hot; assumed, as are the next three
THROTTLE_SPAN_K = 8.0  # kelvin from full speed to the slowest
FAIR_BELOW_K, CRITICAL_ABOVE_K = 3.0, 6.0  # around the throttling point
HEADROOM_K = 30.0
MAX_TRACE_BYTES = 1 << 20


@dataclass(frozen=True)
class DeviceClass:
    """A kind of device. macs_per_s: UNet work at full speed; power_w, idle_w: drawn while computing, while not.

    resistance_k_per_w and capacity_j_per_k: skin to air; throttle_c: skin temperature where it slows down. sources:
    by field, where the figure comes from, or "assumed".
    """

    name: str
    macs_per_s: float
    power_w: float
    idle_w: float
    resistance_k_per_w: float
    capacity_j_per_k: float
    throttle_c: float
    battery_wh: float
    sources: dict[str, str] = field(default_factory=dict)

    def speed(self, skin_c: float) -> float:
        """Share of full speed at a skin temperature."""
        return min(1.0, max(SLOWEST, 1 - (1 - SLOWEST) * (skin_c - self.throttle_c) / THROTTLE_SPAN_K))

    def thermal(self, skin_c: float) -> Any:
        over = skin_c - self.throttle_c
        return ("critical" if over >= CRITICAL_ABOVE_K else "serious" if over >= 0
                else "fair" if over >= -FAIR_BELOW_K else "nominal")  # fmt: skip


def _class(name: str, macs_per_s: float, measured: str, power_w: float, r: float, c: float, wh: float) -> DeviceClass:
    assumed = dict.fromkeys(("power_w", "idle_w", "resistance_k_per_w", "throttle_c", "battery_wh"), "assumed")
    sources = assumed | {"macs_per_s": measured, "capacity_j_per_k": "assumed: mass times 0.8 J/(g K)"}
    return DeviceClass(name, macs_per_s, power_w, 0.8, r, c, 40.0, wh, sources)


_APPLE = "ml-stable-diffusion README, SD 2.1 at 512 px, 20 steps, 6 bit, on {}: {} s, taken as 40 calls of 401.6 GMACs"
CLASSES: dict[str, DeviceClass] = {
    c.name: c
    for c in (
        _class("recent-npu", 401.6e9 * 40 / 8.6, _APPLE.format("iPhone 14", 8.6), 5.0, 3.5, 140.0, 12.7),
        _class("older-npu", 401.6e9 * 40 / 18.5, _APPLE.format("iPhone 12 mini", 18.5), 4.5, 4.2, 110.0, 8.6),
        _class("gpu-only", 401.6e9 * 2 / 13.4,
               "stable-diffusion.cpp issue 747, SD 1.x at 512 px on an Adreno 830: 13.4 s a step, taken as 2 calls",
               6.0, 3.0, 175.0, 19.0),
    )
}  # fmt: skip


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)


Celsius = Annotated[float, Field(ge=-40, le=100)]


class Event(_Frozen):
    """From at_s on: air temperature, heat from outside (sun, charger losses), charging, power saver."""

    at_s: Annotated[float, Field(ge=0, le=SESSION_S)]
    ambient_c: Celsius
    sun_w: Annotated[float, Field(ge=0, le=50)] = 0.0
    charging: bool = False
    saver: bool = False


class Begin(_Frozen):
    skin_c: Celsius
    battery: Annotated[float, Field(ge=0, le=1)]


class Trace(_Frozen):
    """What happens around the device while pictures are drawn one after another."""

    format: Literal["edgesd-trace-1"]
    name: Annotated[str, Field(max_length=40)]
    about: Annotated[str, Field(max_length=400)]
    origin: Annotated[str, Field(max_length=400)]
    macs_per_call: Annotated[int, Field(ge=1, le=1 << 50)]
    start: Begin
    events: Annotated[tuple[Event, ...], Field(min_length=1, max_length=10_000)]

    def at(self, time_s: float) -> Event:
        return [e for e in self.events if e.at_s <= time_s][-1] if time_s >= self.events[0].at_s else self.events[0]


class World:
    """The device in the trace: time passes only here. load: 1 while computing, 0 while not."""

    def __init__(self, device: DeviceClass, trace: Trace) -> None:
        self.device, self.trace = device, trace
        self.time_s, self.skin_c = 0.0, trace.start.skin_c
        self.stored_j = trace.start.battery * device.battery_wh * 3600
        self.energy_j = self.throttled_s = 0.0

    @property
    def battery(self) -> float:
        return self.stored_j / (self.device.battery_wh * 3600)

    @property
    def speed(self) -> float:
        return self.device.speed(self.skin_c)

    def sense(self) -> DeviceState:
        around, skin = self.trace.at(self.time_s), self.skin_c
        headroom = max(0.0, 1 - (self.device.throttle_c - skin) / HEADROOM_K)
        return DeviceState(
            battery=self.battery, charging=around.charging, saver=around.saver, thermal=self.device.thermal(skin),
            headroom=headroom, time_s=self.time_s,
        )  # fmt: skip

    def compute(self, macs: float) -> None:
        while macs > 0:
            rate = self.device.macs_per_s * self.speed
            piece = min(macs / rate, PIECE_S)
            macs = 0.0 if piece < PIECE_S else macs - rate * piece
            self._pass(piece, self.device.power_w * self.speed**2 + self.device.idle_w)

    def rest(self, seconds: float) -> None:
        while seconds > 0:
            self._pass(min(seconds, PIECE_S), self.device.idle_w)
            seconds -= PIECE_S

    def _pass(self, seconds: float, power_w: float) -> None:
        """The linear equation solved over a stretch of constant power."""
        d, around = self.device, self.trace.at(self.time_s)
        settled = around.ambient_c + d.resistance_k_per_w * (power_w + around.sun_w)
        self.throttled_s += seconds if self.speed < 1 else 0.0
        self.skin_c = settled + (self.skin_c - settled) * math.exp(
            -seconds / (d.resistance_k_per_w * d.capacity_j_per_k)
        )
        self.energy_j += power_w * seconds
        if not around.charging:
            self.stored_j = max(0.0, self.stored_j - power_w * seconds)
        self.time_s += seconds


def load_trace(source: str) -> Trace:
    """A shipped trace by name, or a JSON file. RequestError where there is none, DataError where it does not parse."""
    folder = Path(str(files("edgesd.calibration"))) / "traces"
    names = sorted(path.stem for path in folder.glob("*.json"))
    path = folder / f"{source}.json" if source in names else Path(source)
    if path.suffix != ".json" or not path.is_file():
        raise RequestError(f"trace {source[:80]!r}", f"{', '.join(names)} or a .json file", "Choose one of these")
    with open_regular(path) as file:
        data = file.read(MAX_TRACE_BYTES)
    try:
        trace = Trace.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "trace"
        raise DataError(f"trace {path.name}: {where[:80]}: {first['msg'][:120]}", "format edgesd-trace-1",
                        "Correct the file") from None  # fmt: skip
    if [e.at_s for e in trace.events] != sorted(e.at_s for e in trace.events):
        raise DataError(f"trace {path.name}: events out of order", "rising at_s", "Sort the events")
    return trace
