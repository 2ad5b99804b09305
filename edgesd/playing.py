"""Pictures drawn one after another on a simulated phone, row by row, a policy in charge as the runtime obeys one.

What it leaves out: text encoding, and the exact row of a coarser table that a shortened run enters (its share of what
is left is taken). Everything else is the runtime's own: `PolicyRun` decides, `governing.switched` plans.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from edgesd.governing import switched
from edgesd.manifest import Manifest
from edgesd.runtime.governed import PolicyRun
from edgesd.runtime.plan import switch_row
from edgesd.runtime.policy import Limits, Policy, width_cost
from edgesd.runtime.widths import Widths, read_widths
from edgesd.thermal import SESSION_S, DeviceClass, Trace, World


@dataclass(frozen=True)
class Ran:
    """What a picture came to. steps: rows run. width: it began with; switch (share of the rows, width): what it went on
    with from there, by plan or narrowed by the policy, None where it kept the one. plain: no change of table or
    guidance under way and no third width, so that settings alone draw the same.
    """

    steps: int
    width: float
    switch: tuple[float, float] | None
    guidance_until: float
    changes: int
    plain: bool

    @property
    def mean_width(self) -> float:
        """Over its rows."""
        return self.width if self.switch is None else (
            self.switch[0] * self.width + (1 - self.switch[0]) * self.switch[1])  # fmt: skip


@dataclass(frozen=True)
class Drawn:
    """One picture of a session: when it was ready, what it took, and the device right after it."""

    ready_s: float
    seconds: float
    ran: Ran
    skin_c: float
    battery: float
    energy_j: float


@dataclass(frozen=True)
class Work:
    """What a picture costs: MACs of a UNet call at width 1, of the decoder; share of a call by width. widths: the
    bundle's own figures, None where it has one width.
    """

    call: float
    decoder: float
    share: Callable[[float], float] = width_cost
    widths: Widths | None = None

    def load(self, width: float) -> float:
        """MACs' worth of time that loading a width takes, 0 where the bundle does not say."""
        return 0.0 if self.widths is None else self.call * self.widths.load_calls.get(width, 0.0)


def work_of(manifest: Manifest, macs_per_call: float) -> Work:
    """The trace's cost of a call; decoder and widths in the bundle's proportion, widths it lacks by `width_cost`."""
    decoder = manifest.component("vae_decoder").variants[0].macs
    whole = next((v.macs for v in manifest.component("unet").variants if v.axes.width == 1), 0)
    if not whole:
        return Work(macs_per_call, 0.0)
    widths = read_widths(manifest)
    share = width_cost if widths is None else widths.share
    return Work(macs_per_call, macs_per_call * decoder / whole, share, widths)


def play(
    policy: Policy, limits: Limits, device: DeviceClass, trace: Trace, work: Work, *,
    pictures: int, seconds: float = SESSION_S,
) -> tuple[list[Drawn], World]:  # fmt: skip
    """Pictures one after another, at most `pictures` and none that is not ready within `seconds` or the battery."""
    world = World(device, trace)
    run = PolicyRun(policy, world.sense, limits, clock=lambda: world.time_s, sleep=world.rest, share=work.share)
    drawn: list[Drawn] = []
    session = _Session(run, world, work)
    while len(drawn) < pictures and world.time_s < seconds and world.stored_j > 0:
        began, energy = world.time_s, world.energy_j
        ran = session.picture()
        if world.time_s > seconds or world.stored_j <= 0:
            break
        drawn.append(Drawn(world.time_s, world.time_s - began, ran, world.skin_c, world.battery,
                           world.energy_j - energy))  # fmt: skip
    return drawn, world


class _Session:
    """The model on the phone: which width of it is loaded, picture after picture. The first load is nobody's cost."""

    def __init__(self, run: PolicyRun, world: World, work: Work) -> None:
        self._run, self._world, self._work = run, world, work
        self._loaded: float | None = None

    def picture(self) -> Ran:
        """Draws one, as edgesd/runtime/stage.py does: changes take hold before the row that they were asked for."""
        given = self._run.begin()
        planned = None if self._work.widths is None else switched(given, self._run, self._work.widths)
        first, share, second = (given.width, 1.0, given.width) if planned is None else planned
        steps, until, left, narrowed = given.steps, given.guidance_until, given.steps, None
        done, calls, changes, plain = 0.0, 0, 0, True
        widths: list[float] = []
        while left > 0:
            for change in self._run.ask(len(widths), calls):
                changes += 1
                shorter = max(1, math.ceil(left * change.steps / steps))  # the coarser table's share of what is left
                if change.kind == "shorten" and shorter == left and change.steps < steps:
                    continue  # it would save nothing
                if change.steps < steps and shorter < left:
                    steps, left, plain = change.steps, shorter, False
                plain, until = plain and change.guidance_until == until, change.guidance_until
                narrowed = change.width if change.kind in ("narrow", "shorten") else narrowed
            by_plan = first if len(widths) < switch_row(given.steps, share) else second
            widths.append(by_plan if narrowed is None else narrowed)
            calls += self._row(widths[-1], 2 if done < until else 1)
            done, left = done + (1 - done) / left, left - 1
        self._world.compute(self._work.decoder)
        later = next((i for i, width in enumerate(widths) if width != widths[0]), None)
        switch = None if later is None else (later / len(widths), widths[later])
        plain = plain and (later is None or len(set(widths[later:])) == 1)
        return Ran(len(widths), widths[0], switch, until, changes, plain)

    def _row(self, width: float, count: int) -> int:
        """One step in so many UNet calls at a width, which is loaded first where another one was."""
        if width != self._loaded:
            self._world.compute(0.0 if self._loaded is None else self._work.load(width))
            self._loaded = width
        self._world.compute(count * self._work.call * self._work.share(width))
        return count
