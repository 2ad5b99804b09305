"""Evaluation with drawers whose score is known beforehand: the truth, lies, and a mixture."""

import json
import random

import numpy as np
import pytest

from edgesd.errors import RequestError
from edgesd.evaluate import bootstrap_interval, evaluate
from edgesd.runtime.image import psnr_db, ssim
from edgesd.shapes.world import held_out_captions, parse, render, sample


def truth(captions: list[str], seeds: list[int]) -> list[np.ndarray]:
    """Draws the held-out scenes themselves (the captions of evaluation seed 0)."""
    rng = random.Random(77)
    scenes = [sample(rng) for _ in captions]
    assert [caption for caption, _ in scenes] == captions
    return [render(scene) for _, scene in scenes]


def upside_down(captions: list[str], seeds: list[int]) -> list[np.ndarray]:
    """The truth, but above is below and back: every fourth kind of caption's relation fails, and some shapes."""
    return [picture[::-1].copy() for picture in truth(captions, seeds)]


def grey(captions: list[str], seeds: list[int]) -> list[np.ndarray]:
    return [np.full((128, 128, 3), 128, np.uint8) for _ in captions]


def test_the_truth_scores_one_and_the_json_is_as_promised():
    report = evaluate(truth, prompts=24)
    told = report.to_json()
    assert told["alignment"] == dict.fromkeys(("all", "background", "color", "shape", "relation", "mean"), 1.0)
    assert told["interval"] == {"all": [1.0, 1.0]}
    assert (told["prompts"], told["seed"]) == (24, 0)
    assert set(told) == {"alignment", "interval", "prompts", "seed", "seconds"}
    assert json.loads(json.dumps(told, allow_nan=False)) == told


def test_a_caption_without_a_relation_counts_as_right_in_it():
    report = evaluate(grey, prompts=40)
    without = np.mean([parse(caption).relation is None for caption in held_out_captions(40)])
    assert report.alignment["relation"] == pytest.approx(without)
    assert report.alignment["all"] == 0
    parts = [report.alignment[key] for key in ("background", "color", "shape", "relation")]
    assert report.alignment["mean"] == pytest.approx(np.mean(parts))


def test_a_pair_is_compared_on_the_same_captions_and_noise():
    seen = []

    def noted(captions, seeds):
        seen.append((captions, seeds))
        return upside_down(captions, seeds)

    report = evaluate(noted, prompts=30, against=lambda c, s: seen.append((c, s)) or truth(c, s))
    paired = report.to_json()["paired"]
    assert seen[0] == seen[1]
    assert seen[0][1] == list(range(30))
    assert paired["difference"] == pytest.approx(report.alignment["all"] - 1, abs=1e-4)
    assert paired["interval"][0] <= paired["difference"] <= paired["interval"][1] < 0
    pairs = list(zip(upside_down(*seen[0]), truth(*seen[0]), strict=True))
    assert paired["psnr_db"] == pytest.approx(np.mean([psnr_db(a, b) for a, b in pairs]), abs=1e-3)
    assert paired["ssim"] == pytest.approx(np.mean([ssim(a, b) for a, b in pairs]), abs=1e-3)
    assert "against the other" in report.describe()


def test_a_model_against_itself_differs_in_nothing():
    paired = evaluate(truth, prompts=12, against=truth).to_json()["paired"]
    assert paired == {"difference": 0.0, "interval": [0.0, 0.0], "psnr_db": 100.0, "ssim": 1.0}


def test_seeds_draw_other_captions_and_noise():
    seen = []

    def note(captions, seeds):
        seen.append((captions, seeds))
        return grey(captions, seeds)

    for seed in (0, 1):
        evaluate(note, prompts=5, seed=seed)
    assert seen[0][0] != seen[1][0]
    assert seen[1] == (held_out_captions(5, 1), [100_000 + index for index in range(5)])


def test_the_interval_is_deterministic_and_about_right():
    values = np.repeat([1.0, 0.0], [75, 25])
    low, high = bootstrap_interval(values)
    assert (low, high) == bootstrap_interval(values)
    half = 1.96 * np.sqrt(0.75 * 0.25 / 100)
    assert low == pytest.approx(0.75 - half, abs=0.012)
    assert high == pytest.approx(0.75 + half, abs=0.012)
    assert bootstrap_interval(np.ones(1)) == (1.0, 1.0)


def test_the_sheet_is_a_picture(tmp_path):
    image = pytest.importorskip("PIL.Image")
    report = evaluate(upside_down, prompts=10, sheet=tmp_path / "sheet.png")
    sheet = np.asarray(image.open(tmp_path / "sheet.png"))
    assert sheet.shape[2] == 3
    assert min(sheet.shape[:2]) > 256
    assert len(report.images) == 10


@pytest.mark.parametrize("bad", [{"prompts": 0}, {"prompts": 10_001}, {"seed": -1}, {"seed": 2**32}])
def test_numbers_out_of_range_are_refused(bad):
    with pytest.raises(RequestError):
        evaluate(grey, **bad)


def test_a_sheet_without_a_folder_is_refused_before_drawing(tmp_path):
    def never(captions, seeds):
        raise AssertionError("drawn in vain")

    with pytest.raises(RequestError, match="sheet"):
        evaluate(never, sheet=tmp_path / "none" / "sheet.png")


def test_pictures_of_another_size_are_refused():
    with pytest.raises(RequestError, match="64x64"):
        evaluate(lambda captions, seeds: [np.zeros((64, 64, 3), np.uint8)], prompts=1)
