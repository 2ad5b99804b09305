"""Recovery of a pruned UNet: it comes nearer to its teacher, takes pictures from three sources, refuses strangers."""

import json

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from edgesd.compress.widths import trained_widths
from edgesd.errors import DataError, RequestError
from edgesd.models.load import load
from edgesd.models.saving import sidecar_of
from edgesd.sources import torch_pipeline
from edgesd.training.finetune import Recovery, finetune, levels, ready_for
from edgesd.training.loop import Schedule
from edgesd.training.pool import folder_pictures, make_pool

SHORT = Schedule(1e-3, steps=3, warmup=1, measures=1)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """The embedded model cut in half without restoration: cheap, and bad enough to recover."""
    from edgesd.calibration.capture import calibrate
    from edgesd.compress.prune import prune

    folder = tmp_path_factory.mktemp("pruned")
    model = load()
    calls = calibrate(model, folder / "set", calls=8, steps=(2,)).calls("unet")
    prune(model, 0.3, calls * 8, folder / "half", importance="l1", restoration="none", allocation="uniform")
    return str(folder / "half")


def test_a_cut_unet_comes_nearer_to_its_teacher(pruned, tmp_path):
    out = tmp_path / "recovered"
    curve = finetune(pruned, "shapes", out, Schedule(3e-4, steps=12, warmup=2, ema=0.5, measures=4), data="shapes",
                     pictures=64, batch=4)  # fmt: skip
    decibels = [figures["one-step SNR, dB"] for _, figures in curve.figures]
    assert decibels[-1] > decibels[0] + 0.5
    recovered = load(str(out))
    assert sidecar_of(recovered)["finetuned"]["steps"] == 12
    assert sidecar_of(recovered)["pruned"]["unet"] == sidecar_of(load(pruned))["pruned"]["unet"]
    assert (out / "training.png").is_file()
    assert not (tmp_path / "recovered.training").exists()


def test_an_unfinished_run_writes_nothing_and_goes_on(pruned, tmp_path):
    out = tmp_path / "recovered"
    cut = Schedule(1e-3, steps=2, warmup=1, stop_after=0.0)
    first = finetune(pruned, "shapes", out, cut, data="shapes", pictures=40, batch=2)
    assert (first.step, out.exists()) == (1, False)
    assert finetune(pruned, "shapes", out, cut, data="shapes", pictures=40, batch=2).done
    assert out.exists()
    with pytest.raises(RequestError, match="exists"):
        finetune(pruned, "shapes", out, SHORT)


def test_nested_widths_are_noted_so_that_packaging_takes_plain_slices(pruned, tmp_path):
    out = tmp_path / "nested"
    finetune(pruned, "shapes", out, SHORT, data="shapes", pictures=40, batch=2, widths=(0.5, 1))
    nested, dense = load(str(out)), load(pruned)
    assert trained_widths(dense) == ()
    assert trained_widths(nested) == (1.0, 0.5)
    first = "down_blocks.0.resnets.0.conv1.weight"
    ours, theirs = (m.modules["unet"].get_parameter(first).flatten(1) for m in (nested, dense))
    nearest = torch.cdist(ours, theirs).argmin(1)
    channels = list(range(len(theirs)))
    assert sorted(nearest.tolist()) == channels != nearest.tolist()  # the same ones, in another order
    assert "ordered" not in sidecar_of(dense)  # though the model that it was cut from had it
    assert ready_for((1, 0.25), nested, tmp_path, lambda *_: None) is nested  # no second order, whatever the widths


def test_training_on_int8_grids_brings_them_nearer_to_the_float_teacher(tmp_path):
    out = tmp_path / "rounded"
    curve = finetune("shapes", "shapes", out, Schedule(1e-4, steps=16, warmup=2, ema=0.5, measures=4), data="shapes",
                     pictures=64, batch=4, int8=True)  # fmt: skip
    decibels = [figures["one-step SNR, dB"] for _, figures in curve.figures]
    assert 15 < decibels[0] < decibels[-1] < 45  # a float student of its own teacher would stand above 80
    assert sidecar_of(load(str(out)))["finetuned"]["int8"] is True


def test_a_teacher_that_is_not_the_original_is_refused(pruned, tmp_path):
    with pytest.raises(RequestError, match="is not what"):
        finetune(pruned, pruned, tmp_path / "out", SHORT)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "lcm"])
def test_every_family_trains(family, tmp_path):
    pipeline = torch_pipeline(load(tiny.folder(family, tmp_path / family)))
    rng = np.random.RandomState(0)
    height, width = (side // pipeline.spec.latent.downscale for side in pipeline.spec.defaults.size_px)
    latents = rng.randn(40, 4, height, width).astype(np.float32)
    pool = make_pool(pipeline, latents, ["one", "two"] * 20)
    teacher, student = tiny.unet(family, heads=4), tiny.unet(family, heads=4)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(0.9)
    job = Recovery(student, teacher, pool, pipeline.spec, batch=3, guidance=5.0, widths=(1, 0.5))
    loss = job.loss(torch.Generator().manual_seed(0), torch.device("cpu"))
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in student.parameters())
    assert loss.item() > 0
    student.load_state_dict(teacher.state_dict())
    alone = Recovery(student, teacher, pool, pipeline.spec, batch=3, guidance=5.0)
    assert float(alone.loss(torch.Generator().manual_seed(0), torch.device("cpu"))) < 1e-8
    assert alone.measure()["one-step SNR, dB"] > 80


def test_noise_levels_are_the_schedulers(tmp_path):
    made = levels(load().spec)
    assert torch.allclose(made.alpha**2 + made.sigma**2, torch.ones(1000))
    assert float(made.sigma[0]) < 0.05 < 0.99 < float(made.sigma[-1])
    assert float(made.weight[999]) == pytest.approx(1.0)
    assert float(made.weight[0]) < 0.01
    layout = levels(load().spec, least=0.1)
    snr = float((made.alpha[999] / made.sigma[999]) ** 2)
    assert float(layout.weight[999]) == pytest.approx(1 + 0.1 / snr, rel=1e-4)


def test_a_folder_of_captioned_pictures(tmp_path):
    for name, size in (("a.png", (40, 20)), ("b.jpg", (16, 16))):
        Image.new("RGB", size, (255, 0, 0)).save(tmp_path / name)
    (tmp_path / "a.txt").write_text("a red field\n")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "b.jpg", "text": "a red square"}))
    found = list(folder_pictures(tmp_path, (8, 8), 10))
    assert [caption for caption, _ in found] == ["a red field", "a red square"]
    assert all(image.shape == (8, 8, 3) for _, image in found)
    assert len(list(folder_pictures(tmp_path, (8, 8), 1))) == 1
    (tmp_path / "a.txt").unlink()
    with pytest.raises(DataError, match="no caption"):
        list(folder_pictures(tmp_path, (8, 8), 10))


def test_a_folder_without_pictures_or_with_a_broken_table(tmp_path):
    with pytest.raises(RequestError, match="no pictures"):
        list(folder_pictures(tmp_path, (8, 8), 10))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text("{")
    with pytest.raises(DataError, match="does not parse"):
        list(folder_pictures(tmp_path, (8, 8), 10))
