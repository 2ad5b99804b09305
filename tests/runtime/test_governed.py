"""A policy in charge of a run: what it may change, that it says so, and that the picture repeats without it."""

from dataclasses import asdict, replace

import numpy as np
import pytest

from edgesd import sources
from edgesd.errors import DataError, RequestError
from edgesd.runtime.canvas import Start
from edgesd.runtime.device import DeviceState
from edgesd.runtime.generate import sample
from edgesd.runtime.governed import Change, PolicyRun
from edgesd.runtime.policy import Limits, Outcome, Policy, Row, When, load_policy
from edgesd.runtime.settings import Settings, resolve

PROMPT = "a red circle above a blue square on a white background"


def policy(**outcomes):
    """A table from thermal words, the worst first."""
    words = {"serious": ("serious",), "critical": ("critical",), "fair": ("fair",)}
    rows = [
        Row(name=heat, level=level, when=When(thermal=words[heat]), then=outcomes[heat], reason=f"It is {heat}.")
        for level, heat in ((3, "critical"), (2, "serious"), (1, "fair"))
        if heat in outcomes
    ]
    return Policy(name="own", about="x", rows=(*rows, Row(name="well", level=0, then=Outcome(steps=20), reason="x")))


HEAT = policy(critical=Outcome(steps=10, guidance_until=0.5, cool_down_s=20.0), serious=Outcome(steps=12))


@pytest.fixture(scope="module")
def pipeline():
    return sources.open_pipeline(None)


class Device:
    """A clock that a sleep moves, and a sensor that says what it is told: thermal words, one per question."""

    def __init__(self, *thermal, seconds=1.0, **fields):
        self.thermal, self.fields, self.now, self.slept, self.seconds = list(thermal), fields, 0.0, [], seconds

    def sense(self):
        self.now += self.seconds
        thermal = self.thermal.pop(0) if len(self.thermal) > 1 else self.thermal[0]
        return DeviceState(thermal=thermal, time_s=self.now, **self.fields)

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds

    def run(self, table=HEAT, deadline_s=None, **limits):
        limits = Limits(**limits)
        return PolicyRun(table, self.sense, limits, deadline_s, clock=lambda: self.now, sleep=self.sleep)


def drawn(pipeline, governor, given, start=None, **settings):
    chosen = resolve(pipeline.spec, PROMPT, num_inference_steps=given.steps, guidance_until=given.guidance_until,
                     guidance_scale=4.0, **settings)  # fmt: skip
    *steps, picture = sample(pipeline, chosen, start, governor=governor)
    return steps, picture


@pytest.mark.parametrize("sampler", ["dpmpp_2m_karras", "euler_a"])
def test_heat_within_a_picture_shortens_it_and_the_log_repeats_it_to_the_pixel(pipeline, sampler):
    governor = Device("nominal", "nominal", "nominal", "nominal", "serious").run(max_steps=16)
    given = governor.begin()
    steps, picture = drawn(pipeline, governor, given, sampler=sampler)
    (change,) = picture.settings.changes
    assert (given.steps, change.kind, change.rows_run, change.steps) == (16, "shorten", 4, 12)
    assert len(steps) < 16
    assert picture.notes == (change.describe(),)
    again = Settings.from_json(asdict(picture.settings))
    *_, repeated = sample(pipeline, again)
    assert np.array_equal(repeated.image, picture.image)
    assert (repeated.settings, repeated.calls) == (picture.settings, picture.calls)


def test_an_even_device_changes_nothing(pipeline):
    governor = Device("nominal", battery=0.9, charging=False).run(max_steps=6)
    _, picture = drawn(pipeline, governor, governor.begin(), seed=3)
    *_, plain = sample(pipeline, picture.settings)
    assert picture.settings.changes == ()
    assert np.array_equal(plain.image, picture.image)


def test_a_kept_part_stays_kept_when_the_run_changes_tables(pipeline):
    picture = np.full((128, 128, 3), 245, np.uint8)
    picture[40:90, 30:80] = (45, 80, 210)
    mask = np.zeros((128, 128), np.float32)
    mask[:, 64:] = 1
    governor = Device("nominal", "nominal", "serious").run(max_steps=16)
    _, made = drawn(pipeline, governor, governor.begin(), Start(picture, mask), strength=1.0)
    *_, unchanged = sample(pipeline, replace(made.settings, changes=()), Start(picture, mask))
    assert made.settings.changes
    kept = np.s_[:, :48]
    assert np.abs(made.image[kept].astype(int) - unchanged.image[kept]).mean() < 3


def test_cooling_down_is_waited_and_logged(pipeline):
    device = Device("nominal", "nominal", "critical", "nominal")
    governor = device.run(max_steps=8, min_steps=8)
    _, picture = drawn(pipeline, governor, governor.begin())
    assert device.slept == [20.0]
    assert [(c.kind, c.rows_run, c.seconds) for c in picture.settings.changes] == [("unguide", 2, 0), ("pause", 2, 20)]
    assert picture.steps_run == 8


def test_a_rest_before_the_picture_is_logged_too(pipeline):
    device = Device("critical", "nominal")
    governor = device.run(max_steps=2)
    _, picture = drawn(pipeline, governor, governor.begin())
    assert device.slept == [20.0]
    assert [(c.kind, c.rows_run) for c in picture.settings.changes] == [("pause", 0)]


def test_width_falls_once_and_never_rises_within_a_picture():
    device = Device("nominal", "fair", "serious", "nominal")
    narrowing = policy(serious=Outcome(steps=20, width=0.5), fair=Outcome(steps=20, width=0.75))
    governor = device.run(narrowing, widths=(0.5, 0.75, 1.0))
    governor.begin()
    kinds = [[(c.kind, c.width) for c in governor.ask(row, 2 * row)] for row in range(6)]
    assert kinds == [[], [("narrow", 0.75)], [], [], [], []]


def test_a_deadline_shortens_by_what_calls_are_found_to_cost():
    device = Device("nominal", seconds=0.0)
    governor = device.run(load_policy("deadline"), deadline_s=20.0)
    given = governor.begin()
    assert given.steps == 20  # nothing is known of this device's calls yet
    assert "affordable_calls" in given.assumed
    made = []
    for row in range(4):
        made += governor.ask(row, 2 * row)
        device.now += 1.0
    assert [(c.kind, c.rows_run, c.steps) for c in made] == [("shorten", 2, 12)]  # 0.5 s a call: 40 calls


def test_a_shortening_that_saves_no_step_is_left_out(pipeline):
    governor = Device(*["nominal"] * 7, "serious").run(max_steps=8)
    _, picture = drawn(pipeline, governor, governor.begin())
    assert "shorten" not in [c.kind for c in picture.settings.changes]


def test_a_foreign_log_is_checked():
    change = Change(3, "shorten", 10, 1.0, 1.0, 0.0, "because")
    assert Change.from_json(asdict(change)) == change
    for wrong in ({"steps": 0}, {"steps": True}, {"kind": "explode"}, {"width": 2.0}, {"seconds": -1.0},
                  {"rows_run": -1}, {"guidance_until": float("nan")}, {"reason": 3}, {"more": 1}):  # fmt: skip
        with pytest.raises(DataError):
            Change.from_json(asdict(change) | wrong)
    for wrong in (None, [1], "shorten", {}):
        with pytest.raises(DataError):
            Change.from_json(wrong)
    with pytest.raises(DataError):
        Settings.from_json({"prompt": "x", "changes": 3})


def test_a_width_that_the_model_does_not_have_is_refused(pipeline):
    changes = (Change(1, "narrow", 4, 0.5, 1.0, 0.0, "x"),)
    settings = resolve(pipeline.spec, PROMPT, num_inference_steps=4, changes=changes)
    with pytest.raises(RequestError, match=r"width 0\.5"):
        list(sample(pipeline, settings))
