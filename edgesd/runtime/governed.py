"""A picture under a policy: asked before every step, it may shorten the run, end guidance, narrow once, or wait.

Nothing happens silently: each `Change` is kept with the picture, and `Replay` of the changes repeats it to the pixel
without any sensor. `sample_batch` takes either as its governor.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Protocol, get_args

from edgesd.errors import DataError, RequestError
from edgesd.runtime.device import DeviceState, merge
from edgesd.runtime.policy import Decision, Limits, Policy, decide, width_cost

Kind = Literal["shorten", "unguide", "narrow", "pause"]
MAX_CHANGES = 4096
MAX_REASON = 400
LEARNING = 0.3  # weight of the newest call in the running mean of seconds per call


@dataclass(frozen=True)
class Change:
    """What a policy changed before the step that follows `rows_run` finished rows; kind names the first thing of it.

    steps, width, guidance_until: in force from there on. seconds: waited (pause). reason: the table's, for people.
    """

    rows_run: int
    kind: Kind
    steps: int
    width: float
    guidance_until: float
    seconds: float
    reason: str

    @classmethod
    def from_json(cls, data: Any) -> Change:
        """A change as a picture carries it; DataError for anything else."""
        try:
            change = cls(**data)
            numbers = (change.width, change.guidance_until, change.seconds)
            good = (
                all(type(n) is int for n in (change.rows_run, change.steps))
                and all(isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n) for n in numbers)
                and 0 <= change.rows_run <= 1 << 16 and 1 <= change.steps <= 1000 and 0 < change.width <= 1
                and 0 <= change.guidance_until <= 1 and change.seconds >= 0 and change.kind in get_args(Kind)
                and isinstance(change.reason, str) and len(change.reason) <= MAX_REASON
            )  # fmt: skip
        except TypeError:
            good = False
        if not good:
            raise DataError("the picture's log of changes does not parse", "what edgesd writes", "Draw it anew")
        return change

    def describe(self) -> str:
        """One line for people."""
        what = {
            "shorten": f"shortened to {self.steps} steps", "narrow": f"narrowed to width {self.width:g}",
            "unguide": f"guidance ends at {self.guidance_until:.0%} of the run", "pause": f"waited {self.seconds:g} s",
        }[self.kind]  # fmt: skip
        return f"{what} after row {self.rows_run}: {self.reason}"


class Governor(Protocol):
    """ask: what changes before the step that follows `rows_run` rows and `calls` UNet rows; a pause is already over."""

    def ask(self, rows_run: int, calls: int) -> Sequence[Change]: ...


class Replay:
    """The recorded changes again, each at its row. Pauses are told and not waited."""

    def __init__(self, changes: Sequence[Change]) -> None:
        self._changes = tuple(changes)

    def ask(self, rows_run: int, calls: int) -> Sequence[Change]:
        return [change for change in self._changes if change.rows_run == rows_run]


class PolicyRun:
    """A policy in charge of pictures drawn one after another, on sensors that `sense` reads.

    `begin` decides a picture, `ask` is called before each of its later steps. Within a picture steps, width and
    guidance only fall, and width at most once; hysteresis spans pictures. deadline_s: time a whole picture may take.
    Seconds per call are learned as they pass, at other widths by `share`, what a call at a width costs of one at 1.
    clock and sleep: seconds, from outside for tests and replays. state: what was last sensed.
    """

    def __init__(
        self, policy: Policy, sense: Callable[[], DeviceState], limits: Limits, deadline_s: float | None = None, *,
        clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep,
        share: Callable[[float], float] | None = None,
    ) -> None:  # fmt: skip
        self.policy, self.limits = policy, limits
        self._sense, self._clock, self._sleep = sense, clock, sleep
        self._known = self.state = DeviceState(deadline_s=deadline_s)
        self._share = width_cost if share is None else share
        self._now: Decision | None = None
        self._given: Decision | None = None
        self._waited: list[Change] = []
        self._mark: tuple[float, int] | None = None
        self._narrowed = False

    def begin(self) -> Decision:
        """What the next picture gets, after the rest that the table asks for. Tell the picture's settings so."""
        given = self._decide()
        self._waited, self._mark, self._narrowed = [], None, False
        if given.cool_down_s > 0:
            self._waited.append(self._pause(0, given, given))
            given = self._decide()
        self._given = given
        return given

    def plan_switch(self) -> None:
        """Tells that the picture begun switches width by its plan: that was its one change of width."""
        self._narrowed = True

    def to_json(self) -> dict[str, Any]:
        """Where it stands in a picture, for `resume`."""
        given = None if self._given is None else self._given.to_json()
        now = None if self._now is None else self._now.to_json()
        learned = {f"{width:g}": seconds for width, seconds in self._known.seconds_per_call.items()}
        return {"given": given, "now": now, "narrowed": self._narrowed, "seconds_per_call": learned}

    def resume(self, data: Any) -> Decision:
        """Goes on within the picture that `to_json` told of; the decision in force there. DataError for no such."""
        try:
            given, now = Decision.from_json(data["given"]), Decision.from_json(data["now"])
            seconds = {float(width): float(value) for width, value in data["seconds_per_call"].items()}
            self._known = replace(self._known, seconds_per_call=seconds)
            self._narrowed = data["narrowed"] is True
        except (TypeError, KeyError, ValueError, AttributeError, RequestError):
            raise DataError(
                "the saved policy run does not parse", "what edgesd saved", "Draw the picture anew"
            ) from None
        self._given, self._now, self._waited, self._mark = given, now, [], None
        return given

    def ask(self, rows_run: int, calls: int) -> Sequence[Change]:
        """See `Governor`. The first row's time is not learned: it holds the loading of the model."""
        if rows_run == 0 or self._given is None:
            return self._waited
        self._learn(calls)
        before, wanted = self._given, self._decide()
        made: list[Change] = []
        entered = wanted.level > before.level
        self._given = self._fall(before, wanted, rows_run, made)
        if entered and wanted.cool_down_s > 0:
            made.append(self._pause(rows_run, before, wanted))
        self._mark = (self._clock(), calls)
        return made

    def _fall(self, before: Decision, wanted: Decision, rows_run: int, made: list[Change]) -> Decision:
        """The decision now in force: each part the lower of both; what fell goes into `made`."""
        width = before.width if self._narrowed else min(before.width, wanted.width)
        now = replace(
            before, steps=min(before.steps, wanted.steps), width=width,
            guidance_until=min(before.guidance_until, wanted.guidance_until), level=max(before.level, wanted.level),
        )  # fmt: skip
        parts: list[tuple[Kind, bool]] = [
            ("narrow", now.width < before.width), ("shorten", now.steps < before.steps),
            ("unguide", now.guidance_until < before.guidance_until and now.steps == before.steps),
        ]  # fmt: skip
        self._narrowed = self._narrowed or now.width < before.width
        for kind, fell in parts:
            if fell:
                made.append(Change(rows_run, kind, now.steps, now.width, now.guidance_until, 0.0, wanted.reason))
        return now

    def _decide(self) -> Decision:
        self.state = merge(self._known, self._sense())
        self._now = decide(self.policy, self.state, self._now, self.limits)
        return self._now

    def _pause(self, rows_run: int, given: Decision, why: Decision) -> Change:
        self._sleep(why.cool_down_s)
        return Change(rows_run, "pause", given.steps, given.width, given.guidance_until, why.cool_down_s, why.reason)

    def _learn(self, calls: int) -> None:
        """Running mean of seconds per call, from the time and calls since the last question."""
        if self._mark is None or calls <= self._mark[1]:
            return
        seconds = (self._clock() - self._mark[0]) / (calls - self._mark[1])
        if seconds > 0 and self._given is not None:
            whole = seconds / self._share(self._given.width)
            mean = self._known.seconds_per_call.get(1.0, whole)
            learned = {1.0: mean + LEARNING * (whole - mean)}
            self._known = replace(self._known, seconds_per_call=learned)


def to_json(changes: Sequence[Change]) -> list[dict[str, Any]]:
    return [asdict(change) for change in changes]
