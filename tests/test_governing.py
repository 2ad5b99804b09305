"""`edgesd generate --policy`, `edgesd policy`: what is decided, told, written into the PNG, and repeated."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgesd import bundle, cli, drawing, governing, sources
from edgesd.errors import DataError, RequestError
from edgesd.governing import Governing
from edgesd.models.load import load
from edgesd.runtime.device import DeviceState
from edgesd.runtime.image import read_settings
from edgesd.runtime.policy import load_policy, policy_names

PROMPT = "a red circle above a blue square on a white background"


@pytest.fixture(scope="module")
def pipeline():
    """The embedded model at its widest alone."""
    return sources.torch_pipeline(load())


@pytest.fixture
def drawn(pipeline, monkeypatch, tmp_path):
    """draw(file name, policy, …) -> the first picture's record, on the embedded model opened once."""
    monkeypatch.setattr(drawing, "open_pipeline", lambda *_, **__: pipeline)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDGESD_CACHE", str(tmp_path / "cache"))

    def draw(name, policy=None, repeat=None, reuse=False, **request):
        said = drawing.Request(prompt=None if repeat else PROMPT, **({} if repeat else {"seed": 1}), **request)
        return drawing.draw(said, None, Path(name), policy=policy, repeat=repeat, reuse=reuse)["pictures"]

    return draw


def test_a_said_state_decides_and_the_picture_tells_why(drawn):
    (made,) = drawn("a.png", Governing("balanced", battery=0.05, thermal="nominal"), num_inference_steps=6)
    decision = made["decision"]
    assert {k: decision[k] for k in ("steps", "width", "guidance_until", "tile", "row", "policy")} == {
        "steps": 6, "width": 1.0, "guidance_until": 1.0, "tile": False, "row": "nearly-empty", "policy": "balanced",
    }  # fmt: skip
    assert list(made["changes"]) == []
    assert made["settings"]["num_inference_steps"] == made["steps_run"] == 6
    assert any("width 0.75 wanted, 1.0 given" in note for note in made["notes"])
    assert any("not known here" in note and "headroom" in note for note in made["notes"])
    assert read_settings(Path("a.png"))["decision"] == decision


def test_a_picture_that_got_hot_repeats_from_its_file_without_sensors(drawn, monkeypatch):
    words = iter(["nominal", "nominal", "nominal", "serious"])
    now = iter(range(0, 10_000, 2))
    monkeypatch.setattr(
        Governing, "sense", lambda _: lambda: DeviceState(thermal=next(words, "serious"), time_s=next(now))
    )
    (hot,) = drawn("hot.png", Governing("battery"), num_inference_steps=14)
    assert [(c["kind"], c["rows_run"], c["steps"]) for c in hot["changes"]] == [("shorten", 3, 10)]
    assert any("shortened to 10 steps after row 3" in note for note in hot["notes"])
    monkeypatch.setattr(Governing, "sense", lambda _: pytest.fail("sensors were read"))
    (again,) = drawn("again.png", repeat=Path("hot.png"))
    assert np.array_equal(Image.open("hot.png"), Image.open("again.png"))
    assert again["changes"] == hot["changes"]


def test_pictures_of_one_request_are_decided_one_by_one(drawn, tmp_path):
    (tmp_path / "state.json").write_text('{"thermal": "fair"}')
    made = drawn("p.png", Governing("balanced", sensors=tmp_path / "state.json"), num_inference_steps=2, num_images=2)
    assert [p["decision"]["row"] for p in made] == ["warm", "warm"]


def test_a_policy_is_kept_to_the_steps_a_bundle_has(fake_target, tmp_path):
    small = sources.open_bundle(fake_target.make(tmp_path / "small.edgesd"))
    assert small.steps("dpmpp_2m_karras") == (2, 3)
    settings = drawing.resolve(small.spec, PROMPT, num_inference_steps=3)
    decision = Governing("balanced", battery=0.9).run(small, settings, None).begin()
    assert (decision.steps, decision.capped) == (3, ("steps", "upscaler", "refiner"))
    with pytest.raises(RequestError, match="steps from 4"):
        Governing("balanced", min_steps=4).run(small, settings, None)


def with_policy(folder: Path, name: str, table: bytes) -> Path:
    """The bundle with another table in a policy's file."""
    (folder / f"policies/{name}.json").write_bytes(table)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = [entry.model_dump() for entry in bundle.entries(folder)]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_a_bundle_brings_every_policy_and_its_own_wins(fake_target, tmp_path):
    folder = fake_target.make(tmp_path / "own.edgesd")
    assert {p.name for p in bundle.read(folder).manifest.policies} == set(policy_names())
    assert sources.open_bundle(folder).policy("balanced") == load_policy("balanced")
    table = json.loads((folder / "policies/balanced.json").read_text()) | {"about": "This bundle's own."}
    own = sources.open_bundle(with_policy(folder, "balanced", json.dumps(table).encode())).policy
    assert own("balanced").about == "This bundle's own."
    assert own("seed") == load_policy("seed")


def test_a_bundles_hostile_policies_are_refused(fake_target, tmp_path):
    folder = fake_target.make(tmp_path / "bad.edgesd")
    other = (folder / "policies/seed.json").read_bytes()
    for table, phrase in ((b"{", "no JSON"), (b"[" * 10_000, "no JSON"), (b" " * (1 << 19), "more than"),
                          (other, "holds the policy seed"), (b'{"rows": []}', "policy")):  # fmt: skip
        pipeline = sources.open_bundle(with_policy(folder, "balanced", table))
        with pytest.raises(DataError, match=phrase):
            pipeline.policy("balanced")


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (Governing("turbo"), RequestError),
        (Governing("balanced", battery=1.5), RequestError),
        (Governing("balanced", thermal="toasty"), RequestError),
        (Governing("balanced", battery=0.5, sensors=Path("x.json")), RequestError),
        (Governing("balanced", sensors=Path("broken.json")), DataError),
        (Governing("balanced", deadline_s=-1.0), RequestError),
        (Governing("balanced", min_steps=9), RequestError),
    ],
)
def test_what_cannot_be_is_refused_and_writes_nothing(drawn, tmp_path, wrong, error):
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(error):
        drawn("x.png", wrong, num_inference_steps=2)
    assert not (tmp_path / "x.png").exists()


def test_a_policy_beside_a_repeat_is_refused(drawn, tmp_path):
    with pytest.raises(RequestError, match="--policy beside"):
        drawn("x.png", Governing("balanced"), repeat=tmp_path / "p.png")


def test_a_request_is_drawn_once_with_reuse_and_others_are_only_offered(drawn, pipeline, monkeypatch):
    (first,) = drawn("a.png", reuse=True, num_inference_steps=2)
    (other,) = drawn("b.png", reuse=True, num_inference_steps=3)
    assert (first["reused"], first["similar"], other["reused"], len(other["similar"])) == (False, [], False, 1)
    with monkeypatch.context() as patch:
        patch.setattr(drawing, "sample", lambda *_: pytest.fail("it was drawn again"))
        (again,) = drawn("c.png", reuse=True, num_inference_steps=2)
    assert again["reused"]
    assert Path("c.png").read_bytes() == Path("a.png").read_bytes()
    assert not np.array_equal(Image.open("b.png"), Image.open("a.png"))
    with pytest.raises(RequestError, match="--reuse beside"):
        drawn("d.png", Governing("balanced"), reuse=True)


@pytest.mark.parametrize("name", policy_names())
def test_policies_are_shown_and_charted(name, tmp_path):
    sheet = governing.show(name, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    assert len(sheet.sections[0].rows) == len(sheet.to_json()["rows"])
    assert name in json.dumps(governing.policies().to_json())


def test_a_chart_that_cannot_lie_there_is_refused(tmp_path):
    for wrong in (tmp_path / "chart.jpg", tmp_path / "none" / "chart.png"):
        with pytest.raises(RequestError, match="chart"):
            governing.show("seed", wrong)


@pytest.mark.parametrize(
    ("words", "phrase"),
    [
        (["generate", "x", "--battery", "0.1"], "without a policy"),
        (["policy", "show", "turbo"], "turbo"),
        (["simulate", "nothing-here"], "nothing-here"),
        (["simulate", "nothing-here", "--trace", "volcano"], "volcano"),
    ],
)
def test_bad_words_exit_2_with_one_line(monkeypatch, capsys, tmp_path, words, phrase):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["edgesd", *words])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    said = capsys.readouterr()
    assert (stopped.value.code, said.out) == (2, "")
    assert phrase in said.err
    assert len(said.err.strip().splitlines()) == 1
