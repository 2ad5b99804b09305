"""The benchmarks are scripts beside the package: put on the path for the tests of what in them measures nothing."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))


@pytest.fixture
def settings():
    return {
        "model": "/m", "model_name": "sd15", "embedded": False, "weights": "random weights", "size_px": [512, 512],
        "downscale": 8, "tokens": 77, "steps": 8, "tables": "4-16", "guidance": 7.5, "calls": 5, "pictures": 1,
        "threads": 2, "gate_db": None, "int8_seconds": 40.0, "visit_hours": 8.0, "memory_bytes": 1 << 40,
    }  # fmt: skip


def visit(part, name, round_=0, options=None, **result):
    """A line of the journal."""
    return {"part": part, "name": name, "round": round_, "options": options or {}, "key": str(round_), **result}


@pytest.fixture
def data(settings):
    """Two rounds, the second on a machine of half the speed; a contender that failed in both."""

    def turn(name, round_, call, **more):
        return visit("unet", name, round_, seconds=[call, call, 10 * call], first_s=call, cold_s=9.0, load_s=8.0,
                     peak_bytes=10**9, bytes=10**6, **more)  # fmt: skip

    visits = []
    for round_, slow in ((0, 1.0), (1, 2.0)):
        visits += [
            turn("diffusers-fp32", round_, 4.0 * slow),
            turn("edgesd-openvino-int8-p25", round_, 0.4 * slow),
            turn("optimum-hybrid", round_, 0.8 * slow),
            turn("edgesd-openvino-int8-native", round_, 0.5 * slow, macs=100 * 10**9),
            visit("unet", "genai-native", round_, failed="ImportError: no such | thing"),
            visit("arithmetic", "arithmetic", round_, told={"limit_gops": {"f32": 100.0, "int8": 1000.0 / slow}}),
        ]
    machine = {"processor": "one", "cores": 2, "memory_bytes": 8 * 10**9, "system": "Linux", "python": "3.11"}
    return {"format": "edgesd-bench-1", "settings": settings, "machine": machine, "versions": {}, "visits": visits}
