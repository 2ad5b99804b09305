import pytest

from edgesd.errors import RequestError
from edgesd.timing import measure, spread, timed


class Clock:
    """Seconds that pass only when told."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_warm_up_calls_are_made_and_not_counted():
    clock, takes = Clock(), iter([100.0, 50.0, 3.0, 1.0, 2.0])

    def call():
        clock.now += next(takes)

    found = measure(call, runs=3, warmup=2, clock=clock)
    assert (found.median, found.min, found.max, found.runs) == (2.0, 1.0, 3.0, 3)
    assert next(takes, None) is None


def test_the_median_of_an_even_number_lies_between():
    assert spread([4.0, 1.0, 2.0, 100.0]).median == 3.0


def test_one_run_is_its_own_spread():
    assert spread([0.5]).to_json() == {"median": 0.5, "min": 0.5, "max": 0.5, "runs": 1}


def test_no_run_is_refused():
    with pytest.raises(RequestError, match="at least one"):
        spread([])


def test_timed_gives_the_result_too():
    clock = Clock()
    assert timed(lambda: "made", clock) == ("made", 0.0)
