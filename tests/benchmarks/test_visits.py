"""Order and resumption of side-by-side measurements; nothing is measured."""

import json

import contenders as who
import measure
import pytest
import visits
from visits import Journal, Visit, interleaved, plan

TWO = ["diffusers-fp32", "edgesd-openvino-fp16"]


def test_peers_and_edgesd_take_turns():
    assert interleaved(["a", "b", "c"], ["x", "y"]) == ["a", "x", "b", "y", "c"]
    assert interleaved([], ["x", "y"]) == ["x", "y"]
    order = [v.name for v in plan(["unet"], TWO, 3, {"size_px": [512, 512]}) if v.part == "unet"]
    assert order == TWO * 3


def test_artefacts_are_made_once_and_before_anything_is_measured(settings):
    planned = plan(visits.PARTS, list(who.CONTENDERS), 2, settings)
    keys = [v.key for v in planned]
    assert len(keys) == len(set(keys))
    made = [v for v in planned if v.part == "make"]
    assert planned[: len(made)] == made
    at_512 = [v.name for v in made if not v.options]
    needed = {one.artefact for one in who.CONTENDERS.values() if one.artefact} | {who.WIDE}
    assert sorted(at_512) == sorted(needed)
    small = {tuple(v.options["size_px"]) for v in made if v.options}
    assert small == {(256, 256), (384, 384)}


def test_every_contender_and_artefact_can_be_found():
    import worker

    for name, one in (who.CONTENDERS | {who.WIDE: who.find(who.WIDE)}).items():
        assert one.artefact in ("", *who.ARTEFACTS), name
        assert all(hasattr(worker, f"{one.kind}_{part}") for part in one.parts), name
        assert ("picture" in one.parts) or one.without, name
    assert all(hasattr(worker, f"{a.kind}_make") for a in who.ARTEFACTS.values())
    assert {name for pair in who.PACKAGED for name in pair} <= set(who.ARTEFACTS)


def test_curves_end_at_the_size_that_was_asked_for(settings):
    planned = plan(["scaling"], TWO, 1, settings | {"size_px": [256, 512]})
    sizes = [v.options["size_px"] for v in planned if "size_px" in v.options and v.name == TWO[0]]
    assert sizes == [[128, 256], [192, 384]]  # and the size itself, without an option
    wide = [v.options["width"] for v in planned if "width" in v.options]
    assert wide == list(who.WIDTHS)
    assert {v.name for v in planned if "steps" in v.options} == set(TWO)


def test_only_what_was_asked_for_is_packaged_anew(settings):
    assert {v.name for v in plan(["package"], TWO, 1, settings)} == set()
    both = plan(["package"], ["optimum-native", "genai-native", "edgesd-openvino-fp16"], 2, settings)
    assert [v.name for v in both] == ["optimum-fp16", "edgesd-openvino-fp16"] * 2


def test_a_run_goes_on_behind_the_last_visit_that_was_written(tmp_path):
    planned = plan(["unet"], ["diffusers-fp32"], 3, {"size_px": [512, 512]})
    journal = Journal(tmp_path / "visits.jsonl")
    journal.add(planned[0], {"seconds": [1.0]})
    journal.add(planned[1], {"failed": "no memory"})
    with (tmp_path / "visits.jsonl").open("a") as file:
        file.write('{"key": "unet/diffusers-fp')  # killed while it wrote
    again = Journal(tmp_path / "visits.jsonl")
    assert again.left(planned) == planned[2:]
    assert again.left(planned, retry=True) == planned[1:]
    again.add(planned[2], {"seconds": [2.0]})
    again.add(planned[1], {"seconds": [3.0]})
    third = Journal(tmp_path / "visits.jsonl")
    assert third.left(planned, retry=True) == []
    assert third.lines[planned[1].key]["seconds"] == [3.0]


def test_a_line_is_json_that_anybody_reads(tmp_path):
    journal = Journal(tmp_path / "visits.jsonl")
    journal.add(Visit("scaling", "diffusers-fp32", 1, {"size_px": (256, 256)}), {"seconds": [1.0]})
    line = json.loads((tmp_path / "visits.jsonl").read_text())
    assert line["options"] == {"size_px": [256, 256]}
    with pytest.raises(ValueError, match="JSON"):
        journal.add(Visit("unet", "diffusers-fp32"), {"seconds": [float("nan")]})


def test_a_job_holds_settings_then_the_contenders_then_the_visits(settings, tmp_path):
    job = measure.make_job(Visit("scaling", who.WIDE, 0, {"width": 0.5, "steps": 4}), settings, tmp_path)
    assert (job["width"], job["steps"], job["part"], job["repeats"]) == (0.5, 4, "picture", 1)
    assert job["artefact"].endswith("edgesd-openvino-widths-512x512")
    small = measure.make_job(Visit("make", "onnx-plain", 0, {"size_px": (256, 256)}), settings, tmp_path)
    assert (small["kind"], small["part"]) == ("onnxruntime", "make")
    assert small["artefact"].endswith("onnx-plain-256x256")
    assert measure.make_job(Visit("unet", "diffusers-fp32"), settings, tmp_path)["artefact"] == settings["model"]


def test_what_cannot_run_says_why_and_starts_nothing(settings, tmp_path):
    pythons = {False: "/nowhere/python", True: "/nowhere/python"}
    told = [
        measure.run_visit(Visit(part, name), settings, tmp_path, pythons)["failed"]
        for part, name in (("picture", "onnxruntime"), ("unet", "optimum-native"))
    ]
    assert "UNet alone" in told[0]
    assert "environment is not there" in told[1]


WORKER = """
import json, sys, pathlib
path = pathlib.Path(sys.argv[1]); job = json.loads(path.read_text())
{body}
path.with_suffix(".answer").write_text(json.dumps({{"seconds": [1.0], "peak_bytes": 1}}))
"""


@pytest.mark.parametrize(
    ("body", "limit", "said"),
    [
        ("import time; time.sleep(0.5)", 1 << 40, None),
        ("raise ValueError('a UNet of another shape')", 1 << 40, "ValueError: a UNet of another shape"),
        ("sys.exit(7)", 1 << 40, "exit code 7"),
        ("import time; time.sleep(60)", 1, "its memory went beyond"),
    ],
)
def test_a_process_of_its_own_answers_or_says_why_not(tmp_path, settings, body, limit, said):
    import sys

    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(body=body))
    told = measure._process(
        [sys.executable, str(script)], {}, tmp_path, settings | {"memory_bytes": limit}, tmp_path / "cache"
    )
    if said is None:
        assert told["peak_bytes"] > 1 << 20
        assert told["seconds"] == [1.0]
    else:
        assert said in told["failed"]


def test_the_reason_is_the_last_errors_own_line():
    log = (
        "Loading\nTraceback (most recent call last):\n  File 'x'\nedgesd: int8 misses its gate. Allowed: 32 dB.\n"
        "subprocess.CalledProcessError: Command '[...]' returned non-zero exit status 3.\n"
    )
    assert measure.why(log, 1) == "edgesd: int8 misses its gate. Allowed: 32 dB."
    assert measure.why("", -9) == "ended with exit code -9 and said nothing"
