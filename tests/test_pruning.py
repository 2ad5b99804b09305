"""`package --prune`: the pruned model is what is lowered and held as truth; its cost against the original is told."""

import json

import inline
import pytest
import tiny
import torch
from safetensors.torch import save_file

from edgesd import inspection, packager, pruning, sources, targets
from edgesd.errors import DataError, RequestError
from edgesd.models.load import load
from edgesd.runtime.generate import generate

PROMPT = "a red circle above a blue square on a white background"
FIELDS = {"samplers": ("euler",), "steps": (3, 8), "precision": "fp32"}


@pytest.fixture(autouse=True)
def _no_children(monkeypatch):
    monkeypatch.setitem(targets.TARGETS, "torch", "torch_target")
    inline.install(monkeypatch.setattr)
    monkeypatch.setattr(pruning, "CALLS", 20)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.folder("sd1", tmp_path_factory.mktemp("source") / "tiny")


def package(source, output, **fields):
    return packager.package_all({"source": source, **FIELDS, **fields}, ["torch"], output, force=True)


def test_a_pruned_bundle_is_the_pruned_model_and_tells_what_it_cost(source, tmp_path):
    path = package(source, tmp_path, prune=0.2).made[0].path
    manifest = json.loads((path / "manifest.json").read_text())
    told = manifest["quality"]["pruned"]
    assert manifest["quality"]["passed"]  # parity: against the pruned torch model, at the gate of float32
    assert 0.2 <= 1 - told["after"]["macs"] / told["before"]["macs"] < 0.3
    unet = next(c for c in manifest["components"] if c["name"] == "unet")["variants"][0]
    assert (unet["macs"], unet["params"]) == (told["after"]["macs"], told["after"]["params"])
    cost = told["against_original"]
    assert 3 < cost["unet_snr_db"] < 80
    assert 5 < cost["picture_psnr_db"] < 80
    dense = load(source)
    assert told["source_sha256"] == dense.sha256 != manifest["provenance"]["sha256"]
    assert manifest["provenance"]["recipe"]["prune"] == 0.2

    section = inspection._pruned(told)
    assert f"{cost['unet_snr_db']:.1f} dB SNR" in section.note
    assert {row[0] for row in section.rows} >= {"resnet", "feed_forward", "macs", "params"}
    settings = {"num_inference_steps": 3, "sampler": "euler", "seed": 5}
    ours, whole = (generate(sources.open_pipeline(str(p)), PROMPT, **settings)[0].image for p in (path, source))
    assert (ours != whole).any()

    stages = [label.split(": ")[1] for label in inline.labels]
    assert stages[:3] == ["calibration", "prune 0.2", "reference"]
    inline.labels.clear()
    package(source, tmp_path, prune=0.1)  # another ratio: the recorded calls serve again
    assert "torch: calibration" not in inline.labels
    assert "torch: prune 0.1" in inline.labels
    inline.labels.clear()
    package(source, tmp_path, prune=0.2)  # what a killed run finished is not done again
    assert inline.labels == ["torch: validate"]


def test_a_lora_is_pruned_with_the_model_and_not_added_again(source, tmp_path):
    layer = tiny.unet("sd1").conv_in.weight
    down, up = torch.randn(2, *layer.shape[1:]), torch.randn(len(layer), 2, 1, 1)
    lora = tmp_path / "style.safetensors"
    save_file({"lora_unet_conv_in.lora_down.weight": down, "lora_unet_conv_in.lora_up.weight": up}, lora)
    path = package(source, tmp_path, prune=0.1, loras=(f"{lora}:0.5",)).made[0].path
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["quality"]["passed"]
    assert manifest["quality"]["pruned"]["against_original"]["unet_snr_db"] > 3  # twice the LoRA would be far off


def test_predictions_and_refusals(source, tmp_path):
    def unet_bytes(**fields):
        plan = packager.package_all({"source": source, **FIELDS, **fields}, ["torch"], tmp_path, dry_run=True).plans[0]
        return next(p for p in plan.artefacts if p.component == "unet").params

    assert unet_bytes(prune=0.5) == round(unet_bytes() * 0.5)
    for wrong in (0.0, 0.9, -1.0, float("nan")):
        with pytest.raises(RequestError, match="prune"):
            unet_bytes(prune=wrong)
    with pytest.raises(RequestError, match="--calibration"):
        unet_bytes(prune=0.2, calibration=str(tmp_path))
    with pytest.raises(RequestError, match="up to 0"):
        package(source, tmp_path, prune=0.85)
    assert not list(tmp_path.iterdir())


def test_a_pruned_checkpoint_is_not_pruned_again(source, tmp_path):
    from edgesd.calibration.capture import calibrate
    from edgesd.compress.prune import prune

    model = load(source)
    prune(model, 0.1, calibrate(model, tmp_path / "set", calls=20, steps=(4,)).calls("unet"), tmp_path / "smaller")
    with pytest.raises(RequestError, match="pruned already"):
        package(str(tmp_path / "smaller"), tmp_path, prune=0.1)


@pytest.mark.parametrize("broken", [{}, {"component": 3}, {"kinds": {"resnet": {"kept": 1, "whole": 0}}}, "x", []])
def test_inspect_refuses_what_edgesd_did_not_write(broken):
    with pytest.raises(DataError, match=r"quality\.pruned"):
        inspection._pruned(broken)


@pytest.mark.parametrize(
    ("params", "side_px", "rows"),
    [(12_000_000, 128, 20), (860_000_000, 256, 64), (860_000_000, 512, 16), (2_600_000_000, 1024, 16)],
)
def test_rows_to_prune_with_are_as_many_as_memory_holds_side_by_side(params, side_px, rows):
    spec = tiny.spec()
    defaults = spec.defaults.model_copy(update={"size_px": (side_px, side_px)})
    latent = spec.latent.model_copy(update={"downscale": 8})
    assert pruning.fitting_calls(params, spec.model_copy(update={"defaults": defaults, "latent": latent})) == rows
