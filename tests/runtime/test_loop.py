"""The loop, the states it leaves behind, and the bridge. No scheduler here: tables come from the golden file."""

from itertools import pairwise

import numpy as np
import pytest
from samplers import relative
from test_table import GOLDEN, TABLES

from edgesd.errors import DataError, RequestError
from edgesd.runtime.loop import run
from edgesd.runtime.noise import Philox, Purpose, TorchNoise, step_noise
from edgesd.runtime.state import State, add_noise, bridge, init_latents, load_state, save_state

SHAPE = tuple(GOLDEN["shape"])
SOURCE = Philox(GOLDEN["seed"])
Z = SOURCE.normal(SHAPE, 0, 0, Purpose.START)
X0 = np.array(GOLDEN["x0"], np.float32).reshape(SHAPE)
NAMED = {(t.name, t.steps): t for t in TABLES}


def model(u, timestep):
    u = u.astype(np.float64)
    return ((1.2 * u + 0.0001 * timestep) / (1.0 + 0.5 * u * u)).astype(np.float32)


def steps_of(table, begin=None, start=0, state=None, noise=None, **options):
    begin = init_latents(table, Z) if begin is None else begin
    noise = (lambda row: SOURCE.normal(SHAPE, 0, row, Purpose.STEP)) if noise is None else noise
    return list(run(table, lambda u, row: model(u, float(table.timestep[row])), begin, noise, start, state, **options))


def golden(values):
    return np.array(values, np.float32).reshape(SHAPE)


@pytest.mark.parametrize("case", GOLDEN["runs"], ids=lambda c: f"{GOLDEN['tables'][c['table']]['name']}-{c['start']}")
def test_golden_runs(case):
    table = TABLES[case["table"]]
    steps = steps_of(table, golden(case["begin"]), case["start"])
    assert relative(steps[0].denoised, golden(case["first_x0"])) < 1e-5
    assert relative(steps[-1].latents, golden(case["final"])) < 1e-5
    if "resume" in case:
        saved = case["resume"]
        parts = (tuple(golden(a) for a in saved[key]) for key in ("inputs", "outputs"))
        resumed = steps_of(table, state=State(saved["row"], saved["start"], *parts))
        assert relative(resumed[-1].latents, golden(case["final"])) < 1e-5


@pytest.mark.parametrize("case", GOLDEN["bridges"], ids=lambda c: f"{c['from']}-{c['to']}")
def test_golden_bridges(case):
    leave, enter = TABLES[case["from"]], TABLES[case["to"]]
    state = bridge(leave, case["row"], golden(case["sample"]), golden(case["model_output"]), enter)
    assert state.row == case["entry_row"]
    assert relative(state.inputs[0], golden(case["entry"])) < 1e-5
    steps = steps_of(enter, state=state)
    assert relative(steps[-1].latents if steps else state.inputs[0], golden(case["final"])) < 1e-5


@pytest.mark.parametrize("table", TABLES, ids=lambda t: f"{t.name}-{t.steps}")
def test_a_resumed_run_equals_the_uninterrupted_one_to_the_bit(table, tmp_path):
    for start in (0, *list(table.starts)[-1:]):
        begin = add_noise(table, start, X0, Z) if start else None
        whole = steps_of(table, begin, start)
        for step in whole:
            save_state(tmp_path / "run", table, step.state)
            state = load_state(tmp_path / "run", table)
            assert len(state.inputs) + len(state.outputs) <= 9  # ten tensors with the row
            rest = steps_of(table, state=state)
            assert len(rest) == table.rows - 1 - step.row
            np.testing.assert_array_equal(rest[-1].latents if rest else state.inputs[0], whole[-1].latents)


def test_a_run_on_torch_noise_resumes_when_it_draws_again_what_was_drawn():
    table = NAMED["sa", 7]  # draws in rows where it adds nothing
    source = TorchNoise(3)
    whole = steps_of(table, noise=step_noise(source, SHAPE[1:], [0]))
    again = step_noise(TorchNoise(3), SHAPE[1:], [0])
    state = whole[3].state
    for row in np.flatnonzero(table.draws[: state.row]):
        again(int(row))
    np.testing.assert_array_equal(steps_of(table, state=state, noise=again)[-1].latents, whole[-1].latents)


def test_steps_tell_what_happened_and_own_their_arrays():
    table = NAMED["dpmpp_2m_karras", 6]
    steps = steps_of(table)
    assert [s.row for s in steps] == list(range(6))
    assert [s.timestep for s in steps] == table.timestep.tolist()
    assert [s.last for s in steps] == [False] * 5 + [True]
    for before, after in pairwise(steps):
        np.testing.assert_array_equal(before.latents, after.sample)
    assert all(s.latents.dtype == np.float32 == s.denoised.dtype for s in steps)
    kept = Z.copy()
    steps_of(table, Z)
    np.testing.assert_array_equal(kept, Z)


def test_nothing_runs_before_it_is_asked_for():
    calls = []
    table = NAMED["ddim", 4]
    steps = run(table, lambda u, row: calls.append(row) or u, Z, lambda row: Z)
    assert calls == []
    next(steps)
    assert calls == [0]
    steps.close()
    assert calls == [0]


def test_one_step_runs():
    table = NAMED["dpmpp_2m_karras", 1]
    (step,) = steps_of(table)
    assert step.last
    assert relative(step.latents, step.denoised) < 1e-5  # one step to sigma 0 is x0 itself


def test_a_batch_is_its_pictures():
    table = NAMED["unipc_3", 8]
    both = np.concatenate([Z, -0.5 * Z])
    together = list(run(table, lambda u, row: model(u, 5.0), both, lambda row: both))[-1].latents
    for i in (0, 1):
        alone = list(run(table, lambda u, row: model(u, 5.0), both[i : i + 1], lambda row: both))[-1].latents
        np.testing.assert_array_equal(together[i : i + 1], alone)


def test_adjust_replaces_what_the_next_row_gets_and_the_result():
    table, mask = NAMED["dpmpp_2m_karras", 6], np.arange(4) < 2
    rows = []

    def blend(latents, row):
        rows.append(row)
        return np.where(mask, add_noise(table, row, X0, Z), latents)

    steps = steps_of(table, adjust=blend)
    assert rows == [1, 2, 3, 4, 5, 6]
    np.testing.assert_array_equal(steps[-1].latents[..., :2], X0[..., :2])
    np.testing.assert_array_equal(steps[2].sample[..., :2], add_noise(table, 2, X0, Z)[..., :2])


def line(table, row):
    return add_noise(table, row, X0, Z)


@pytest.mark.parametrize(("leave", "enter"), [
    (("ddim", 4), ("unipc_3", 8)), (("unipc_3", 8), ("heun", 3)), (("euler_a", 5), ("pndm", 5)),
    (("heun", 3), ("dpmpp_2m_karras", 6)), (("ddpm", 4), ("dpmpp_3m", 8)),
])  # fmt: skip
def test_a_bridge_stays_on_the_line_from_x0_to_noise(leave, enter):
    """With a model that knows x0 and eps, every entry is alpha x0 + sigma eps at the next lower level."""
    leave, enter = NAMED[leave], NAMED[enter]
    for row in range(leave.rows):
        skip, out = (float(c) for c in leave.x0_coefficients(row))
        u = line(leave, row)
        state = bridge(leave, row, u, ((X0 - skip * u) / out).astype(np.float32), enter)
        level = leave.sigma[row] / leave.alpha[row]
        lower = [s for s in (0, *enter.starts) if enter.sigma[s] / enter.alpha[s] < level * (1 - 1e-6)]
        if lower:
            assert state.row == lower[0] == state.start
            np.testing.assert_allclose(state.inputs[0], line(enter, state.row), atol=2e-4)
        else:
            assert state.row == enter.rows
            np.testing.assert_allclose(state.inputs[0], X0, atol=2e-4)


def test_a_bridge_from_ddim_to_itself_is_its_own_next_step():
    table = NAMED["ddim", 4]
    steps = steps_of(table)
    for step in steps[:-1]:
        state = bridge(table, step.row, step.sample, step.model_output, table)
        assert state.row == step.row + 1
        assert relative(state.inputs[0], step.latents) < 1e-5


def test_a_state_of_another_run_is_refused(tmp_path):
    ddim, unipc = NAMED["ddim", 4], NAMED["unipc_3", 8]
    state = steps_of(unipc)[4].state
    save_state(tmp_path / "run", unipc, state)
    with pytest.raises(RequestError, match="unipc_3"):
        load_state(tmp_path / "run", ddim)
    data = (tmp_path / "run").read_bytes()
    fewer = State(state.row, state.start, state.inputs[:1], state.outputs)
    broken = State(state.row, state.start, (np.full(SHAPE, np.nan, np.float32), *state.inputs[1:]), state.outputs)
    odd = State(state.row, state.start, (Z[..., :2], *state.inputs[1:]), state.outputs)
    for bad in (
        fewer,
        broken,
        odd,
        State(99, 0, state.inputs, state.outputs),
        State(4, 9, state.inputs, state.outputs),
    ):
        save_state(tmp_path / "run", unipc, bad)
        with pytest.raises(DataError):
            load_state(tmp_path / "run", unipc)
    for bytes_ in (b"", data[:50], data[:-8], b"\xff" * 40):
        (tmp_path / "run").write_bytes(bytes_)
        with pytest.raises(DataError):
            load_state(tmp_path / "run", unipc)
    with pytest.raises(DataError):
        load_state(tmp_path / "missing", unipc)
