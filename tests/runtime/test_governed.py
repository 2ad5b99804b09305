"""A policy in charge of a run: what it may change, that it says so, and that the picture repeats without it."""

import json
from dataclasses import asdict, replace
from functools import partial

import numpy as np
import pytest

from edgesd import sources
from edgesd.errors import DataError, RequestError
from edgesd.models.load import load
from edgesd.runtime.canvas import Start
from edgesd.runtime.device import DeviceState
from edgesd.runtime.generate import sample
from edgesd.runtime.governed import Change, PolicyRun
from edgesd.runtime.policy import Limits, Outcome, Policy, Row, When, load_policy
from edgesd.runtime.settings import Settings, resolve
from edgesd.runtime.stage import RunLog

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
    """The embedded model at its widest alone."""
    return sources.torch_pipeline(load())


@pytest.fixture(scope="module")
def nested(pipeline):
    """The embedded model with UNets of widths 0.75 and 0.5 beside it, cut and not restored."""
    from edgesd.compress.groups import find_groups
    from edgesd.compress.widths import narrowed
    from edgesd.models.session import TorchSession

    model = load()
    unet = model.modules["unet"]
    narrow = {width: partial(narrowed, unet, find_groups(unet), width) for width in (0.75, 0.5)}
    return replace(pipeline, session=TorchSession(model, narrow=narrow))


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


def test_heat_narrows_the_rest_of_a_picture_and_the_log_repeats_it(nested):
    table = policy(serious=Outcome(steps=20, width=0.5))
    governor = Device("nominal", "nominal", "serious").run(table, max_steps=6, widths=(0.5, 0.75, 1.0))
    steps, picture = drawn(nested, governor, governor.begin())
    assert [(c.kind, c.rows_run, c.width) for c in picture.settings.changes] == [("narrow", 2, 0.5)]
    *wide, _ = sample(nested, replace(picture.settings, changes=()))
    same = [np.array_equal(a.model_output, b.model_output) for a, b in zip(steps, wide, strict=True)]
    assert same == [True, True, False, False, False, False]
    *_, repeated = sample(nested, Settings.from_json(json.loads(json.dumps(asdict(picture.settings)))))
    assert np.array_equal(repeated.image, picture.image)


def test_a_switch_of_width_is_part_of_the_settings(nested):
    settings = resolve(nested.spec, PROMPT, num_inference_steps=4, width=0.5, switch=(0.5, 1.0))
    narrow, whole = (resolve(nested.spec, PROMPT, num_inference_steps=4, width=w) for w in (0.5, 1.0))
    switched = [step.model_output for step in list(sample(nested, settings))[:-1]]
    first = [step.model_output for step in list(sample(nested, narrow))[:-1]]
    assert [np.array_equal(a, b) for a, b in zip(switched, first, strict=True)] == [True, True, False, False]
    *_, picture = sample(nested, whole)  # a picture's width does not stay behind in the session
    *_, again = sample(nested, Settings.from_json(json.loads(json.dumps(asdict(picture.settings)))))
    assert np.array_equal(again.image, picture.image)


@pytest.mark.parametrize(("sampler", "rng"), [("dpmpp_2m_karras", "philox"), ("euler_a", "torch")])
@pytest.mark.parametrize(
    "thermal", [("nominal", "nominal", "serious"), ("fair", "fair", "fair", "serious", "critical")]
)
def test_a_policys_run_that_was_stopped_goes_on_as_if_it_had_not_been(nested, sampler, rng, thermal):
    table = policy(fair=Outcome(steps=8), serious=Outcome(steps=6, width=0.75),
                   critical=Outcome(steps=5, width=0.5, guidance_until=0.5))  # fmt: skip
    offered = {"max_steps": 8, "widths": (0.5, 0.75, 1.0)}
    governor = Device(*thermal).run(table, **offered)
    given = governor.begin()
    settings = resolve(nested.spec, PROMPT, num_inference_steps=given.steps, sampler=sampler, rng=rng, seed=3)
    log, kept = RunLog(), []
    for event in sample(nested, settings, governor=governor, log=log):
        if hasattr(event, "state"):
            kept.append((event.state, json.dumps([log.to_json(), governor.to_json()]), log.last))
    assert {c.kind for c in event.settings.changes} >= {"narrow", "shorten"}
    for rows, (state, told, last) in enumerate(kept[:-1], 1):
        again, run = RunLog.from_json(json.loads(told)[0]), Device(*thermal[min(rows, len(thermal) - 1) :])
        other = run.run(table, **offered)
        other.resume(json.loads(told)[1])
        again.last = last
        *_, resumed = sample(nested, settings, resume=state, governor=other, log=again)
        assert np.array_equal(resumed.image, event.image), rows
        assert (resumed.settings, resumed.calls, resumed.steps_run) == (event.settings, event.calls, event.steps_run)


def test_a_foreign_log_of_a_run_is_checked():
    good = RunLog(3, 6, changes=[Change(3, "shorten", 10, 1.0, 1.0, 0.0, "because")]).to_json()
    assert RunLog.from_json(good).to_json() == good
    for wrong in ({"rows_run": -1}, {"calls": True}, {"steps": 0}, {"width": 2.0}, {"guidance_until": float("nan")},
                  {"changes": [1]}, {"changes": None}, {"last": 3}, {"more": 1}):  # fmt: skip
        with pytest.raises(DataError):
            RunLog.from_json(good | wrong)
    for wrong in (None, {}, {"given": 1, "now": 2, "narrowed": False, "seconds_per_call": {}}):
        with pytest.raises(DataError):
            Device("nominal").run().resume(wrong)
