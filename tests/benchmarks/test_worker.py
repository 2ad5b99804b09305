"""What a worker times, with a clock of our own."""

import pytest
import worker
from arithmetic import limits


class Clock:
    def __init__(self):
        self.now = 50.0

    def __call__(self):
        return self.now


def job(**given):
    return {"part": "unet", "repeats": 2, "started": 40.0, **given}


def test_cold_counts_from_the_start_of_the_process_and_is_no_part_of_the_rest():
    clock, takes = Clock(), iter([30.0, 2.0, 3.0])

    def make(asked):
        clock.now += 5.0

        def call():
            clock.now += next(takes)

        return call

    told = worker.run(job(), make, clock)
    assert told == {"load_s": 15.0, "cold_s": 45.0, "first_s": 30.0, "seconds": [2.0, 3.0]}


def test_a_contender_that_times_itself_is_believed_and_pictures_get_their_seed():
    clock, seeds = Clock(), []
    assert worker.run(job(), lambda asked: lambda: 0.25, clock)["seconds"] == [0.25, 0.25]
    worker.run(job(part="picture"), lambda asked: seeds.append, clock)
    assert seeds == [0, 1, 2]


def test_only_kernels_of_the_type_that_was_asked_for_are_a_limit():
    def row(kind, gops, **more):
        return {"type": kind, "gops": gops, **more}

    rows = [row("int8", 900.0, kernel="f32"), row("int8", 500.0, kernel="u8"), row("int8", 400.0), row("f32", 100.0)]
    assert limits(rows) == {"int8": 500.0, "f32": 100.0}
    assert worker.peak_bytes() == 0 or worker.peak_bytes() > 1 << 20


def test_settings_name_every_word_that_a_job_is_read_by(settings):
    import contenders as who

    flags = who.ARTEFACTS["edgesd-openvino-int8-p25"].how["flags"]
    assert flags[flags.index("--prune") + 1] == "0.25"
    with pytest.raises(KeyError):
        worker._asked(settings)  # count is the visit's, never a default of the worker's
