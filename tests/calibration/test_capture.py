"""Recording real calls: what is kept, the same again, taken up again, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest

from edgesd.calibration.capture import GENERAL, calibrate, load_prompts, prompt_sets, spread
from edgesd.calibration.sets import COMPONENTS, INDEX, open_set, shard_name
from edgesd.errors import DataError, RequestError, SetupError
from edgesd.models.load import load
from edgesd.sources import torch_pipeline


@pytest.fixture(scope="module")
def model():
    return load("shapes")


@pytest.fixture(scope="module")
def recorded(model, tmp_path_factory):
    return calibrate(model, tmp_path_factory.mktemp("sets") / "set", calls=12, steps=(4, 3), seed=3)


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_calls_are_what_sampling_made(model, recorded):
    calls = open_set(recorded.folder).calls("unet")
    assert len(calls) == 6  # pairs: twelve rows of the UNet
    session = torch_pipeline(model).session
    for call in calls:
        assert call.guidance == model.spec.defaults.guidance
        assert {k: v.shape for k, v in call.inputs.items()} == {
            "sample": (2, 4, 16, 16), "timestep": (1,), "encoder_hidden_states": (2, 24, 128),
        }  # fmt: skip
        assert np.array_equal(call.inputs["sample"][0], call.inputs["sample"][1])
        assert 0 < call.weight < 1
        assert np.isfinite(session.run("unet", call.inputs)["model_output"]).all()
    assert {call.row for call in calls} <= set(range(4))
    assert calls[0].weight > calls[1].weight  # less noise later in a run
    empty = torch_pipeline(model).tokenizers[0].encode("").ids
    states = session.run("text_encoder", {"input_ids": empty})["encoder_hidden_states"]
    assert np.allclose(calls[0].inputs["encoder_hidden_states"][0], states[0], atol=1e-5)


def test_every_component_is_recorded(recorded):
    for component in COMPONENTS:
        assert recorded.calls(component)
    assert len(recorded.calls("unet", limit=2)) == len(recorded.calls("unet", rows=4)) == 2  # guided: two rows a call
    with pytest.raises(RequestError, match="no calls"):
        recorded.calls("text_encoder_2")


def test_a_limit_meets_every_row_and_many_runs(recorded, monkeypatch):
    from edgesd.calibration import sets

    shard = {"unet.sample": np.zeros((10, 1, 1, 1, 1), np.float32), "unet.row": np.arange(10)}
    monkeypatch.setattr(sets, "read_shard", lambda folder, run: shard)
    many = sets.CalibrationSet(recorded.folder, recorded.info.model_copy(update={"runs": 24}))
    chosen = many.calls("unet", limit=96)
    assert {call.row for call in chosen} == set(range(10))
    assert len({call.run for call in chosen}) > 20
    assert [(c.run, c.row) for c in chosen] == sorted((c.run, c.row) for c in chosen)
    assert len(chosen) == 96


def test_targets_lead_to_the_finished_latents(model, recorded):
    table = torch_pipeline(model).table(model.spec.defaults.sampler, 4)
    first = [call for call in recorded.calls("unet") if call.run == 0]
    latents = recorded.calls("vae_decoder")[0].inputs["latents"] * model.spec.latent.scaling_factor
    for call in first:
        skip, out = table.x0_coefficients(call.row)
        assert np.allclose(skip * call.inputs["sample"][0] + out * call.target, latents[0], atol=1e-3)


def test_the_same_again_and_taken_up_again(model, recorded, tmp_path):
    whole = bytes_of(recorded.folder)
    again = tmp_path / "again"
    calibrate(model, again, calls=12, steps=(4, 3), seed=3)
    assert bytes_of(again) == whole
    (again / shard_name(1)).unlink()
    kept = (again / shard_name(0)).stat().st_mtime_ns
    with pytest.raises(DataError, match="unfinished"):
        open_set(again)
    seen = []
    calibrate(model, again, calls=12, steps=(4, 3), seed=3, progress=lambda done, total: seen.append((done, total)))
    assert bytes_of(again) == whole
    assert (again / shard_name(0)).stat().st_mtime_ns == kept  # not recorded anew
    assert seen[-1] == (recorded.info.runs, recorded.info.runs)


def test_another_request_does_not_mix_in(model, recorded, tmp_path):
    with pytest.raises(RequestError, match="other settings"):
        calibrate(model, recorded.folder, calls=12, steps=(4, 3), seed=4)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RequestError, match="no calibration set"):
        calibrate(model, tmp_path, calls=2, steps=(2,))
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_set_of_another_model_or_size_is_refused(model, recorded):
    recorded.require(model)
    with pytest.raises(RequestError, match="calibration set of shapes"):
        recorded.require(dataclasses.replace(model, sha256="0" * 64))
    other = model.spec.model_copy(update={"defaults": model.spec.defaults.model_copy(update={"size_px": (64, 64)})})
    with pytest.raises(RequestError, match="128x128"):
        recorded.require(dataclasses.replace(model, spec=other))


@pytest.mark.parametrize("harm", ["cut", "index", "text"])
def test_broken_sets_are_told(recorded, tmp_path, harm):
    for name, data in bytes_of(recorded.folder).items():
        (tmp_path / name).write_bytes(data)
    if harm == "cut":
        (tmp_path / shard_name(0)).write_bytes((tmp_path / shard_name(0)).read_bytes()[:500])
    elif harm == "index":
        data = json.loads((tmp_path / INDEX).read_text()) | {"runs": 10**9}
        (tmp_path / INDEX).write_text(json.dumps(data))
    else:
        (tmp_path / INDEX).write_text("[" * 5000)
    with pytest.raises(DataError):
        open_set(tmp_path).calls("unet")


@pytest.mark.parametrize(
    "wrong",
    [
        {"calls": 0},
        {"steps": ()},
        {"steps": (0,)},
        {"prompts": "nonsense"},
        {"prompts": "missing.txt"},
        {"sampler": "no"},
    ],
)
def test_bad_requests_write_nothing(model, tmp_path, wrong):
    with pytest.raises(RequestError):
        calibrate(model, tmp_path / "set", **{"calls": 4, "steps": (2,)} | wrong)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_before_anything_runs(model, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda place: type("Usage", (), {"free": 1000})())
    with pytest.raises(SetupError, match="MiB free"):
        calibrate(model, tmp_path / "set", calls=4, steps=(2,))
    assert not list(tmp_path.iterdir())


def test_rows_spread_over_every_noise_level():
    seen = np.bincount([row for run in range(40) for row in spread(20, 5, run)], minlength=20)
    assert seen.min() >= 9
    assert seen.max() <= 12
    assert spread(3, 10, 7) == [0, 1, 2]


def test_prompt_sets_say_where_they_come_from():
    from importlib import resources

    assert set(GENERAL) | {"shapes"} == set(prompt_sets())
    for name in prompt_sets():
        head = (resources.files("edgesd.calibration") / "prompts" / f"{name}.txt").read_text().splitlines()[:2]
        assert "Licence" in head[1]
        prompts = load_prompts([name])
        assert len(set(prompts)) == len(prompts) >= 6
    mixed = load_prompts(["short", "art"])
    assert mixed[0] in load_prompts(["short"])
    assert mixed[1] in load_prompts(["art"])
