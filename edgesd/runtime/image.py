"""Pictures at the border: arrays to and from files, settings inside a PNG, start images and masks, previews, sheets.

In memory a picture is `[H,W,3] u8`; models see `[1,3,H,W] f32` in -1..1. Conversion, resizing and masks match
diffusers' VaeImageProcessor, value for value.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

from edgesd.errors import DataError, RequestError
from edgesd.files import disk_errors, write_whole
from edgesd.manifest import LatentSpec

SETTINGS_KEY = "edgesd"  # the PNG text chunk that holds a picture's settings as JSON
MAX_PIXELS = 1 << 26
MAX_SETTINGS_CHARS = 1 << 20
LANCZOS = Image.Resampling.LANCZOS
READABLE = ("PNG", "JPEG", "WEBP", "BMP")
PSNR_CEILING_DB = 100.0  # of equal pictures; one level in one value of a 256x256 picture gives 101 dB
_MARGIN, _LINE, _CELL_WIDTH = 8, 15, 168


# ---- arrays ----------------------------------------------------------------------------------------------------


def to_uint8(image: np.ndarray) -> np.ndarray:
    """Model output [1,3,H,W] f32, about -1..1 -> picture [H,W,3] u8. Raises DataError if a value is not finite.

    Rows lie in memory as they are read: safetensors writes the bytes of any other layout without a word.
    """
    if not np.isfinite(image).all():
        fix = "Use a bundle of higher precision, or check the weights"
        raise DataError("the model drew numbers that are not finite", "finite values", fix)
    unit = np.clip(image[0].astype(np.float32) * np.float32(0.5) + np.float32(0.5), 0, 1)
    return (unit.transpose(1, 2, 0) * np.float32(255)).round().astype(np.uint8, order="C")


def to_float(image: np.ndarray) -> np.ndarray:
    """Picture [H,W,3] u8 -> model input [1,3,H,W] f32 in -1..1."""
    unit = image.astype(np.float32) / np.float32(255)
    return np.ascontiguousarray((2 * unit - 1).transpose(2, 0, 1)[None])


def latent_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Mask [H,W] -> [1,1,h,w] f32 for latents of `size` (h, w): nearest, as torch.nn.functional.interpolate does."""
    rows, columns = (np.arange(new) * old // new for new, old in zip(size, mask.shape, strict=True))
    return mask[np.ix_(rows, columns)][None, None].astype(np.float32)


def preview(x0: np.ndarray, latent: LatentSpec) -> np.ndarray:
    """Predicted latents [1,C,h,w] in the UNet's scale -> rough picture [H,W,3] u8, linear per pixel, bilinear upscale.

    Raises RequestError for a model without `rgb_factors`.
    """
    if latent.rgb_factors is None:
        raise RequestError("a cheap preview", "models with rgb_factors", "Decode the latents instead")
    bias = np.zeros(3) if latent.rgb_bias is None else np.asarray(latent.rgb_bias)
    rgb = np.einsum("rc,chw->hwr", np.asarray(latent.rgb_factors), x0[0].astype(np.float64)) + bias
    small = Image.fromarray((np.nan_to_num(rgb).clip(0, 1) * 255).round().astype(np.uint8))
    scaled = (small.width * latent.downscale, small.height * latent.downscale)
    return np.asarray(small.resize(scaled, Image.Resampling.BILINEAR))


# ---- files -----------------------------------------------------------------------------------------------------


def save_png(path: Path, image: np.ndarray, settings: dict[str, Any] | None = None) -> None:
    """Writes [H,W,3] u8 as PNG, whole or not at all; settings go into a text chunk as JSON.

    Raises RequestError (no such folder, not a file), SetupError (disk full, folder closed to this user).
    """
    info = PngInfo()
    if settings is not None:
        info.add_text(SETTINGS_KEY, json.dumps(settings, allow_nan=False))
    data = io.BytesIO()
    Image.fromarray(image).save(data, format="PNG", pnginfo=info)
    try:
        with disk_errors(path, "Free some space or name another place"):
            write_whole(path, data.getvalue())
    except OSError as error:
        allowed = "a file in an existing folder"
        raise RequestError(f"{path} cannot be written ({error.strerror})", allowed, "Name another file") from None


def read_settings(path: Path) -> dict[str, Any]:
    """The settings `save_png` put into a picture, not yet checked. The file's checksums are verified first.

    Raises RequestError for a missing file, DataError for one that is broken, too large, no PNG, or not edgesd's.
    """
    fix = "Give a PNG that edgesd made, as it was written: many programs drop a picture's settings when they save it"
    with _opened(path, ("PNG",)) as image:
        text = image.info.get(SETTINGS_KEY)
        try:
            image.verify()
        except Exception as error:  # pillow's readers raise many kinds on broken data
            raise DataError(f"{path.name} is broken ({error!s:.100})", "a whole PNG", fix) from None
    if not isinstance(text, str) or len(text) > MAX_SETTINGS_CHARS:
        raise DataError(f"{path.name} carries no settings of edgesd", "a PNG with them", fix)
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise DataError(f"the settings in {path.name} do not parse", "a JSON object", fix)
    return settings


def load_image(path: Path, size_px: tuple[int, int], *, crop: bool = False) -> np.ndarray:
    """A picture file as [H,W,3] u8 of size_px (H, W): turned as its EXIF says, alpha dropped, resized with Lanczos.

    Like diffusers' default the whole picture is fitted, so another aspect ratio is stretched; crop cuts what is too
    wide or too high off both ends instead.
    Raises RequestError for a missing file, DataError for one that is broken, too large or of another kind.
    """
    return np.asarray(_loaded(path, size_px, crop))


def load_mask(path: Path, size_px: tuple[int, int]) -> np.ndarray:
    """A mask file as [H,W] f32, 1 (half grey and lighter) where the picture is drawn anew, else 0."""
    grey = np.asarray(_loaded(path, size_px).convert("L"), np.float32) / np.float32(255)
    return (grey >= 0.5).astype(np.float32)


def _loaded(path: Path, size_px: tuple[int, int], crop: bool = False) -> Image.Image:
    with _opened(path, READABLE) as image:
        try:
            turned = ImageOps.exif_transpose(image).convert("RGB")
        except Exception as error:  # pillow's readers raise many kinds on broken data
            fix = "Save the picture again"
            raise DataError(f"{path.name} is broken ({error!s:.100})", "a whole picture", fix) from None
    size = (size_px[1], size_px[0])
    return ImageOps.fit(turned, size, LANCZOS) if crop else turned.resize(size, LANCZOS)


def _opened(path: Path, formats: tuple[str, ...]) -> Image.Image:
    """The file's header, pixels not yet read; refuses what would unfold to too many of them."""
    if not path.is_file():
        raise RequestError(f"no picture at {path}", "a file", "Check the path")
    allowed = f"{', '.join(formats)} of up to {MAX_PIXELS} pixels"
    try:
        image = Image.open(path, formats=formats)
    except Exception as error:  # pillow's readers raise many kinds on broken data
        what = f"{path.name} is not readable as a picture ({type(error).__name__})"
        raise DataError(what, allowed, "Give another file") from None
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise DataError(f"{path.name} has {image.width}x{image.height} pixels", allowed, "Make it smaller")
    return image


# ---- comparison ------------------------------------------------------------------------------------------------


def psnr_db(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two u8 pictures of one size, in dB; 100 for equal ones: means stay finite."""
    _same_size(a, b)
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return PSNR_CEILING_DB if error == 0 else min(PSNR_CEILING_DB, float(10 * np.log10(255**2 / error)))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity of two [H,W,3] u8 pictures, at most 1 (Wang et al. 2004, equation 13).

    11x11 Gaussian window of sigma 1.5, K1 = 0.01, K2 = 0.03, windows wholly inside; the mean over the colour channels.
    """
    _same_size(a, b)
    if min(a.shape[:2]) < 11:
        raise RequestError(f"SSIM of {a.shape[1]}x{a.shape[0]} px", "at least 11x11 px", "Compare larger pictures")
    x, y = a.astype(np.float64), b.astype(np.float64)
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    top = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float(np.mean(top / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))))


def _same_size(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape != b.shape:
        came = f"pictures of {a.shape[1]}x{a.shape[0]} and {b.shape[1]}x{b.shape[0]} px"
        raise RequestError(came, "two of one size", "Compare models of one picture size")


def _blur(x: np.ndarray) -> np.ndarray:
    """[H,W,C] -> [H-10,W-10,C]: the Gaussian window of SSIM, one axis after the other."""
    window = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window /= window.sum()
    return sliding_window_view(sliding_window_view(x, 11, axis=0) @ window, 11, axis=1) @ window


# ---- contact sheet ---------------------------------------------------------------------------------------------


def contact_sheet(
    images: Sequence[np.ndarray], captions: Sequence[Sequence[tuple[str, str]]], columns: int = 8
) -> np.ndarray:
    """Pictures of one size in a grid [H,W,3] u8, under each its lines of text as (text, colour), wrapped."""
    height, width = images[0].shape[:2]
    cell = max(width, _CELL_WIDTH)
    font = ImageFont.load_default(12)
    wrapped = [[(part, ink) for text, ink in lines for part in _wrap(text, font, cell)] for lines in captions]
    columns = min(columns, len(images))
    tall = height + 4 + _LINE * max(len(lines) for lines in wrapped)
    size = (_MARGIN + columns * (cell + _MARGIN), _MARGIN + -(-len(images) // columns) * (tall + _MARGIN))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for index, (image, lines) in enumerate(zip(images, wrapped, strict=True)):
        x = _MARGIN + index % columns * (cell + _MARGIN)
        y = _MARGIN + index // columns * (tall + _MARGIN)
        sheet.paste(Image.fromarray(image), (x, y))
        draw.rectangle((x - 1, y - 1, x + width, y + height), outline="#bbbbbb")  # a white picture still has an edge
        for number, (text, ink) in enumerate(lines):
            draw.text((x, y + height + 3 + number * _LINE), text, fill=ink, font=font)
    return np.asarray(sheet)


def _wrap(text: str, font: Any, width: int) -> list[str]:
    """Words into lines of at most `width` pixels; a word longer than a line stands alone."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
