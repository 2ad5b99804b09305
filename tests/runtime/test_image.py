"""Pictures against diffusers' image processor and a brute-force SSIM; files that are broken, foreign or huge."""

import json
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.numpy import load, save

from edgesd.errors import DataError, RequestError, SetupError
from edgesd.manifest import LatentSpec
from edgesd.runtime import image as images

SETTINGS = {"prompt": "ein Stern – 星 \U0001f31f", "seed": 0, "guidance_scale": 4.5}


def picture(height: int = 24, width: int = 40, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def processors():
    module = pytest.importorskip("diffusers.image_processor")
    mask = module.VaeImageProcessor(do_normalize=False, do_binarize=True, do_convert_grayscale=True)
    return module.VaeImageProcessor(), mask


def test_conversion_equals_diffusers(processors):
    torch = pytest.importorskip("torch")
    floats = np.random.RandomState(1).randn(1, 3, 20, 28).astype(np.float32)
    theirs = processors[0].postprocess(torch.from_numpy(floats), output_type="pil")[0]
    assert (images.to_uint8(floats) == np.asarray(theirs)).all()
    image = picture()
    theirs = processors[0].preprocess(Image.fromarray(image)).numpy()
    assert images.to_float(image).shape == (1, 3, 24, 40)
    assert (images.to_float(image) == theirs).all()


def test_bytes_survive_the_round_trip():
    every = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    assert (images.to_uint8(images.to_float(every)) == every).all()


def test_a_picture_lies_in_memory_row_by_row_as_files_of_arrays_take_it():
    drawn = images.to_uint8(np.random.RandomState(1).randn(1, 3, 20, 28).astype(np.float32))
    assert drawn.flags.c_contiguous
    assert (load(save({"picture": drawn}))["picture"] == drawn).all()


def test_a_picture_that_is_not_finite_is_refused():
    with pytest.raises(DataError, match="finite"):
        images.to_uint8(np.full((1, 3, 8, 8), np.nan, np.float32))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_start_images_and_masks_equal_diffusers(tmp_path, processors, mode):
    from diffusers.utils import load_image

    path = tmp_path / "start.png"
    Image.fromarray(picture(50, 70)).convert(mode).save(path)
    theirs = load_image(str(path))
    assert (
        images.to_float(images.load_image(path, (32, 48))) == processors[0].preprocess(theirs, 32, 48).numpy()
    ).all()
    mask = images.load_mask(path, (32, 48))
    assert mask.shape == (32, 48)
    assert (mask == processors[1].preprocess(theirs, 32, 48).numpy()[0, 0]).all()


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter
    Image.fromarray(np.repeat(np.arange(0, 240, 5, dtype=np.uint8)[None, :, None], 3, 2).repeat(20, 0)).save(
        tmp_path / "turned.png", exif=exif
    )
    turned = images.load_image(tmp_path / "turned.png", (48, 20))
    assert turned[0].mean() < 10
    assert turned[-1].mean() > 220


def test_latent_mask_equals_torch():
    torch = pytest.importorskip("torch")
    mask = (np.random.RandomState(2).rand(40, 64) > 0.5).astype(np.float32)
    theirs = torch.nn.functional.interpolate(torch.from_numpy(mask)[None, None], size=(5, 8)).numpy()
    assert (images.latent_mask(mask, (5, 8)) == theirs).all()


def test_settings_travel_in_the_png(tmp_path):
    path = tmp_path / "out.png"
    images.save_png(path, picture(), SETTINGS)
    assert images.read_settings(path) == SETTINGS
    assert (np.asarray(Image.open(path)) == picture()).all()
    assert os.listdir(tmp_path) == ["out.png"]


def test_a_failed_write_leaves_the_old_picture_alone(tmp_path, monkeypatch):
    path = tmp_path / "out.png"
    images.save_png(path, picture(), SETTINGS)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(SetupError):
        images.save_png(path, picture(seed=1), SETTINGS)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["out.png"]


def test_places_that_cannot_be_written_are_bad_requests(tmp_path):
    for path in (tmp_path / "missing" / "out.png", tmp_path):
        with pytest.raises(RequestError):
            images.save_png(path, picture())


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *between: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    rows = zlib.compress(b"\0" * (1 + 3 * 4) * 4)
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(between) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def whole() -> bytes:
    return png(4, 4, chunk(b"tEXt", b"edgesd\0" + json.dumps(SETTINGS).encode()))


BROKEN = {
    "empty": b"",
    "no png": b"GIF89a" + b"\0" * 100,
    "header only": whole()[:40],
    "cut": whole()[:-30],
    "flipped bit": whole()[:60] + bytes([whole()[60] ^ 1]) + whole()[61:],
    "foreign": png(4, 4),
    "not json": png(4, 4, chunk(b"tEXt", b"edgesd\0{nope")),
    "no object": png(4, 4, chunk(b"tEXt", b"edgesd\0[1]")),
    "deep": png(4, 4, chunk(b"tEXt", b"edgesd\0" + b"[" * 200_000)),
    "bomb of pixels": png(60_000, 60_000, chunk(b"tEXt", b"edgesd\0{}")),
    "large": png(9_000, 9_000, chunk(b"tEXt", b"edgesd\0{}")),
    "bomb of text": png(4, 4, chunk(b"zTXt", b"edgesd\0\0" + zlib.compress(b" " * 50_000_000))),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_and_foreign_pictures_are_data_errors(tmp_path, name):
    (tmp_path / "in.png").write_bytes(BROKEN[name])
    with pytest.raises(DataError):
        images.read_settings(tmp_path / "in.png")


@pytest.mark.parametrize("name", ["empty", "cut", "header only", "large"])
def test_broken_start_images_are_data_errors(tmp_path, name):
    (tmp_path / "in.png").write_bytes(BROKEN[name])
    with pytest.raises(DataError):
        images.load_image(tmp_path / "in.png", (8, 8))


def test_the_hand_made_png_is_sound(tmp_path):
    (tmp_path / "in.png").write_bytes(whole())
    assert images.read_settings(tmp_path / "in.png") == SETTINGS


def test_missing_pictures_are_bad_requests(tmp_path):
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(RequestError):
            images.read_settings(path)


def test_settings_of_another_program_in_the_same_key_are_no_crash(tmp_path):
    info = PngInfo()
    info.add_itxt("edgesd", "ü", lang="de", tkey="edgesd")
    Image.fromarray(picture()).save(tmp_path / "in.png", pnginfo=info)
    with pytest.raises(DataError):
        images.read_settings(tmp_path / "in.png")


def test_preview_is_linear_and_upscaled():
    spec = LatentSpec(
        channels=4, downscale=8, scaling_factor=1.0, rgb_bias=(0.5, 0.5, 0.5),
        rgb_factors=((0.5, 0, 0, 0), (0, 0.5, 0, 0), (0, 0, 0, -0.5)),
    )  # fmt: skip
    x0 = np.zeros((1, 4, 2, 3), np.float32)
    x0[0, 0], x0[0, 1], x0[0, 3] = 1, -1, 9
    out = images.preview(x0, spec)
    assert out.shape == (16, 24, 3)
    assert out.dtype == np.uint8
    assert (out == [255, 0, 0]).all()
    with pytest.raises(RequestError):
        images.preview(x0, spec.model_copy(update={"rgb_factors": None}))


def test_psnr_of_known_differences():
    a = np.full((8, 8, 3), 100, np.uint8)
    assert images.psnr_db(a, a) == 100.0
    assert images.psnr_db(a, a + 5) == pytest.approx(20 * np.log10(255 / 5))
    assert images.psnr_db(a, np.full_like(a, 98)) == pytest.approx(20 * np.log10(255 / 2))


def brute_force_ssim(a: np.ndarray, b: np.ndarray) -> float:
    grid = np.arange(-5, 6)
    window = np.exp(-(grid[:, None] ** 2 + grid[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for channel in range(3):
        for y in range(a.shape[0] - 10):
            for x in range(a.shape[1] - 10):
                p = a[y : y + 11, x : x + 11, channel].astype(float)
                q = b[y : y + 11, x : x + 11, channel].astype(float)
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                cov = (window * (p - mp) * (q - mq)).sum()
                top = (2 * mp * mq + 6.5025) * (2 * cov + 58.5225)
                values.append(top / ((mp**2 + mq**2 + 6.5025) * (vp + vq + 58.5225)))
    return float(np.mean(values))


def test_ssim_equals_brute_force():
    a = picture(18, 22)
    b = (a * 0.7 + picture(18, 22, seed=3) * 0.3).astype(np.uint8)
    assert images.ssim(a, b) == pytest.approx(brute_force_ssim(a, b), abs=1e-9)
    assert images.ssim(a, a) == 1.0
    with pytest.raises(RequestError):
        images.ssim(a[:10], b[:10])
    for compare in (images.ssim, images.psnr_db):
        with pytest.raises(RequestError):
            compare(a, b[:12])


def test_contact_sheet_holds_every_picture_and_its_words():
    cells = [np.full((32, 32, 3), shade, np.uint8) for shade in (10, 60, 120)]
    lines = [("a long caption that has to be wrapped into several lines", "black"), ("ok", "green")]
    sheet = images.contact_sheet(cells, [lines] * 3, columns=2)
    for shade in (10, 60, 120):
        assert (sheet == shade).all(axis=2).sum() >= 32 * 32
    assert sheet.shape[1] < 2 * 200
    assert ((sheet[..., 1] > sheet[..., 0]) & (sheet[..., 1] > sheet[..., 2])).any()
