"""The training loop: a run cut and taken up equals the run that was not, and nothing broken is kept."""

import pytest
import torch
from torch import nn

from edgesd.errors import DataError, RequestError
from edgesd.training.loop import STATE, Schedule, draw_curve, train


class Line:
    """Fits y = 3 x - 1 from noisy draws."""

    name = "line"

    def __init__(self, width=1):
        torch.manual_seed(5)
        self.modules = {"line": nn.Linear(1, width), "frozen": nn.Linear(1, 1).requires_grad_(False)}
        self.seen, self.stop_at = [], None

    def loss(self, rng, device):
        x = torch.randn(8, 1, generator=rng)
        self.seen.append(float(x[0]))
        if self.stop_at is not None and len(self.seen) == self.stop_at:
            raise KeyboardInterrupt
        return (self.modules["line"](x) - (3 * x - 1)).square().mean()

    def measure(self):
        return {"slope": float(self.modules["line"].weight.detach()[0, 0])}


def weights(job):
    return torch.cat([p.detach().flatten() for p in job.modules["line"].parameters()])


def test_a_run_learns_and_leaves_the_averaged_weights(tmp_path):
    job = Line()
    curve = train(job, tmp_path, Schedule(0.05, steps=300, warmup=5, ema=0.9, measures=3))
    assert curve.done
    assert weights(job) == pytest.approx([3, -1], abs=0.02)
    assert [step for step, _ in curve.figures] == [100, 200, 300]
    assert curve.loss[-1][1] < 1e-2 * curve.loss[0][1]
    draw_curve(curve, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 5000


@pytest.mark.parametrize("cut", [1, 7, 29])
def test_a_run_cut_and_taken_up_equals_the_one_that_was_not(tmp_path, cut):
    schedule = Schedule(0.05, steps=40, warmup=5)
    whole, parts = Line(), Line()
    train(whole, tmp_path / "whole", schedule)
    parts.stop_at = cut + 1
    with pytest.raises(KeyboardInterrupt):
        train(parts, tmp_path / "parts", schedule)
    again = Line()
    curve = train(again, tmp_path / "parts", schedule)
    assert curve.step == 40
    assert again.seen == whole.seen[cut:]
    assert torch.equal(weights(again), weights(whole))


def test_stop_after_ends_a_call_and_the_next_goes_on(tmp_path):
    schedule = Schedule(0.05, steps=6, stop_after=0.0)
    steps = [train(Line(), tmp_path, schedule).step for _ in range(6)]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_minutes_become_steps_that_later_calls_keep(tmp_path):
    first = train(Line(), tmp_path, Schedule(0.05, minutes=0.01))
    assert first.done
    assert first.total >= 12
    again = train(Line(), tmp_path, Schedule(0.05, minutes=5))
    assert again.total == first.total


def test_a_loss_that_is_no_number_names_its_step_and_keeps_the_last_state(tmp_path):
    class Broken(Line):
        def loss(self, rng, device):
            return super().loss(rng, device) * (float("nan") if len(self.seen) > 3 else 1.0)

    with pytest.raises(DataError, match="step 3"):
        train(Broken(), tmp_path, Schedule(0.05, steps=10))


def test_a_state_of_other_modules_or_seed_is_refused(tmp_path):
    train(Line(), tmp_path, Schedule(0.05, steps=2))
    with pytest.raises(DataError, match="does not fit"):
        train(Line(width=2), tmp_path, Schedule(0.05, steps=2))
    with pytest.raises(DataError, match="seed 0"):
        train(Line(), tmp_path, Schedule(0.05, steps=2, seed=1))
    (tmp_path / STATE).write_bytes(b"not a state")
    with pytest.raises(DataError, match="does not fit"):
        train(Line(), tmp_path, Schedule(0.05, steps=2))


@pytest.mark.parametrize("bad", [{}, {"steps": 5, "minutes": 1.0}, {"steps": 0}, {"minutes": -1.0}])
def test_a_run_has_one_length(bad):
    with pytest.raises(RequestError):
        Schedule(0.1, **bad)
