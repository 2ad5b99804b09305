"""Noise: published vectors for Philox, torch itself for its stream, statistics for the transform."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgesd.errors import RequestError
from edgesd.runtime.noise import (
    MAX_SEED,
    Philox,
    Purpose,
    TorchNoise,
    batch,
    make_source,
    philox4x32,
    step_noise,
)  # fmt: skip

GOLDEN = Path(__file__).parents[1] / "golden" / "noise.json"


@pytest.mark.parametrize(("counter", "key", "words"), [  # from the Random123 distribution's kat_vectors
    ([0, 0, 0, 0], (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], (0xA4093822, 0x299F31D0),
     [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
])  # fmt: skip
def test_philox_known_answers(counter, key, words):
    arrays = [np.array([word], np.uint64) for word in counter]
    assert [int(word[0]) for word in philox4x32(arrays, key)] == words


def test_golden_vectors():
    golden = json.loads(GOLDEN.read_text())
    for case in golden["philox"]:
        z = Philox(case["seed"]).normal(case["shape"], case["image"], case["row"], Purpose(case["purpose"]))
        want = np.array(case["normal"], np.float32)
        assert np.abs(z.ravel() - want).max() <= np.spacing(np.abs(want)).max()
    for case in golden["torch"]:
        source = TorchNoise(case["seed"])
        for shape, want in zip(case["shapes"], case["normal"], strict=True):
            np.testing.assert_allclose(source.normal(shape, 0, 0, Purpose.STEP).ravel(), want, atol=2e-6)


def test_every_part_of_the_key_matters_and_nothing_else():
    base = Philox(7).normal((4, 8, 8), 1, 2, Purpose.STEP)
    others = [
        Philox(8).normal((4, 8, 8), 1, 2, Purpose.STEP), Philox(7 + 2**32).normal((4, 8, 8), 1, 2, Purpose.STEP),
        Philox(7).normal((4, 8, 8), 2, 2, Purpose.STEP), Philox(7).normal((4, 8, 8), 1, 3, Purpose.STEP),
        Philox(7).normal((4, 8, 8), 1, 2, Purpose.START),
    ]  # fmt: skip
    assert all(abs(np.corrcoef(base.ravel(), other.ravel())[0, 1]) < 0.2 for other in others)
    source = Philox(7)
    source.normal((3,), 0, 0, Purpose.START)
    np.testing.assert_array_equal(source.normal((4, 8, 8), 1, 2, Purpose.STEP), base)


@given(st.integers(0, 60), st.integers(0, MAX_SEED))
@settings(max_examples=30, deadline=None)
def test_a_longer_array_begins_with_the_shorter(count, seed):
    long = Philox(seed).normal((64,), 0, 0, Purpose.START)
    np.testing.assert_array_equal(Philox(seed).normal((count,), 0, 0, Purpose.START), long[:count])
    assert np.isfinite(long).all()


def test_normals_are_normal():
    z = Philox(3).normal((1 << 18,), 0, 0, Purpose.START).astype(np.float64)
    assert abs(z.mean()) < 5 / 512  # five standard errors
    assert z.var() == pytest.approx(1, abs=5 * np.sqrt(2) / 512)
    assert (z**4).mean() == pytest.approx(3, abs=5 * np.sqrt(96) / 512)
    assert abs(np.corrcoef(z[::2], z[1::2])[0, 1]) < 5 / 362


@pytest.mark.parametrize("seed", [0, 1, 42, 2**32 - 1, 2**32 + 5, MAX_SEED])
def test_torch_noise_is_torchs_through_any_order_of_shapes(seed):
    torch = pytest.importorskip("torch")
    generator, source = torch.Generator().manual_seed(seed), TorchNoise(seed)
    shapes = [(1, 4, 8, 8), (3,), (4, 5, 5), (15,), (16,), (17,), (31,), (1,), (2,), (1, 4, 64, 64), (5,), (47,), (33,)]
    for shape in shapes:
        want = torch.randn(shape, generator=generator).numpy()
        np.testing.assert_allclose(source.normal(shape, 0, 9, Purpose.STEP), want, atol=2e-6)


@given(st.lists(st.integers(1, 70), min_size=1, max_size=6), st.integers(0, 2**40))
@settings(max_examples=40, deadline=None)
def test_torch_noise_is_torchs_for_any_sizes(sizes, seed):
    torch = pytest.importorskip("torch")
    generator, source = torch.Generator().manual_seed(seed), TorchNoise(seed)
    for size in sizes:
        want = torch.randn(size, generator=generator).numpy()
        np.testing.assert_allclose(source.normal((size,), 0, 0, Purpose.START), want, atol=2e-6)


def test_torch_images_have_generators_of_their_own():
    """As diffusers with a list of generators: image i of seed s is image 0 of seed s + i, whatever is drawn between."""
    first, third = TorchNoise(5), TorchNoise(7)
    together = batch(first, (4, 4, 4), [0, 2], 0, Purpose.START)
    np.testing.assert_array_equal(together[1], third.normal((4, 4, 4), 0, 0, Purpose.START))
    later = step_noise(first, (4, 4, 4), [2])(0)
    np.testing.assert_array_equal(later[0], third.normal((4, 4, 4), 0, 0, Purpose.STEP))


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1, 1.0, True, "7", None])
def test_seeds_out_of_range_are_refused(seed):
    for rng in ("philox", "torch"):
        with pytest.raises(RequestError, match="seed"):
            make_source(rng, seed)


def test_unknown_generators_are_refused():
    with pytest.raises(RequestError, match="mersenne"):
        make_source("mersenne", 0)
