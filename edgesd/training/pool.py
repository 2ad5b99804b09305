"""What models are trained on: latents with what their captions tell the UNet, all in memory, drawn by number.

Sources: a folder of captioned pictures, the embedded model's world, or (no data at all) the teacher's own pictures.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save

from edgesd.errors import DataError, RequestError
from edgesd.files import write_whole
from edgesd.runtime.cache import PromptCache
from edgesd.runtime.generate import sample_batch
from edgesd.runtime.image import load_image
from edgesd.runtime.pipeline import Pipeline
from edgesd.runtime.settings import resolve
from edgesd.runtime.text import conditions
from edgesd.shapes.world import Scene, render
from edgesd.shapes.world import sample as sample_scene

WORLD = "shapes"
STREAM = 1 << 40  # training scenes: random.Random(STREAM + i), far from every held-out stream
ENCODED_AT_ONCE = 32
DRAWN_AT_ONCE = 8
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class Pool:
    """latents [N,C,h,w] f32, scaled as the UNet sees them; caption [N]: row of `told`; told: UNet input ->
    [captions, ...] f32; empty: the same for the negative prompt, [1, ...]."""

    latents: torch.Tensor
    caption: torch.Tensor
    told: dict[str, torch.Tensor]
    empty: dict[str, torch.Tensor]


def world_scenes(count: int, start: int = 0) -> Iterator[tuple[str, np.ndarray]]:
    """The pictures [128,128,3] u8 of `numbered_scenes`, with their captions."""
    for caption, scene in numbered_scenes(count, start):
        yield caption, render(scene)


def numbered_scenes(count: int, start: int = 0) -> Iterator[tuple[str, Scene]]:
    """Captions and scenes of the embedded model's world; number i is the same for ever."""
    for index in range(start, start + count):
        yield sample_scene(random.Random(STREAM + index))


def world_captions(count: int, start: int = 0) -> list[str]:
    """The captions of `world_scenes`."""
    return [caption for caption, _ in numbered_scenes(count, start)]


def folder_pictures(folder: Path, size_px: tuple[int, int], most: int) -> Iterator[tuple[str, np.ndarray]]:
    """Captions and pictures of a folder: `x.png` beside `x.txt`, or a metadata.jsonl of file_name and text.

    Pictures are cropped at the centre and resized. Raises DataError for a picture without a caption, RequestError for
    a folder without pictures.
    """
    names = sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURES)[:most]
    if not names:
        raise RequestError(f"no pictures in {folder}", ", ".join(PICTURES), "Check --data")
    table = _metadata(folder)
    for path in names:
        text = path.with_suffix(".txt")
        caption = table.get(path.relative_to(folder).as_posix())
        if caption is None and text.is_file():
            caption = text.read_text(encoding="utf-8").strip()
        if caption is None:
            raise DataError(
                f"{path.name} has no caption", "a .txt file beside it, or a line in metadata.jsonl", "Add one"
            )
        yield caption, load_image(path, size_px, crop=True)


def _metadata(folder: Path) -> dict[str, str]:
    path = folder / "metadata.jsonl"
    if not path.is_file():
        return {}
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return {row["file_name"]: str(row["text"]) for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"metadata.jsonl does not parse ({error})", "lines with file_name and text", "Mend it"
        ) from None


def encode_pictures(
    pipeline: Pipeline, pictures: Iterator[tuple[str, np.ndarray]], count: int, progress: Progress
) -> tuple[np.ndarray, list[str]]:
    """Latents [N,C,h,w] f32 by the model's own VAE encoder (its mean, scaled), and captions."""
    latents: list[np.ndarray] = []
    captions: list[str] = []
    waiting: list[np.ndarray] = []
    latent = pipeline.spec.latent

    def flush() -> None:
        batch = np.stack(waiting).transpose(0, 3, 1, 2).astype(np.float32) / np.float32(127.5) - 1
        mean = pipeline.session.run("vae_encoder", {"image": batch})["mean"]
        latents.append((mean - np.float32(latent.shift_factor)) * np.float32(latent.scaling_factor))
        waiting.clear()
        progress("encoding pictures", len(captions), count)

    for caption, picture in pictures:
        captions.append(caption)
        waiting.append(picture)
        if len(waiting) == ENCODED_AT_ONCE:
            flush()
    if waiting:
        flush()
    return np.concatenate(latents), captions


def draw_latents(
    pipeline: Pipeline, prompts: Sequence[str], count: int, seed: int, progress: Progress
) -> tuple[np.ndarray, list[str]]:
    """The teacher's own pictures of `prompts`, as its sampler leaves them: no data is needed to distil a model."""
    latents: list[np.ndarray] = []
    captions = [prompts[i % len(prompts)] for i in range(count)]
    cache = PromptCache()
    for at in range(0, count, DRAWN_AT_ONCE):
        part = captions[at : at + DRAWN_AT_ONCE]
        several = [resolve(pipeline.spec, prompt, seed=seed + at + i) for i, prompt in enumerate(part)]
        for event in sample_batch(pipeline, several, cache=cache):
            if isinstance(event, list):
                latents += [picture.latents for picture in event]
        progress("drawing with the teacher", len(latents), count)
    return np.concatenate(latents), captions


def make_pool(pipeline: Pipeline, latents: np.ndarray, captions: Sequence[str]) -> Pool:
    """Latents with what the pipeline's text encoders say of each caption."""
    unique = {caption: index for index, caption in enumerate(dict.fromkeys(captions))}
    spec, cache = pipeline.spec, PromptCache()
    size = spec.defaults.size_px
    told = [conditions(pipeline, [resolve(spec, text)], size, cache, negative=False)[0] for text in unique]
    empty = conditions(pipeline, [resolve(spec, captions[0])], size, cache, negative=True)[0]
    return Pool(
        torch.from_numpy(np.ascontiguousarray(latents, np.float32)),
        torch.tensor([unique[caption] for caption in captions]),
        {name: torch.from_numpy(np.concatenate([t[name] for t in told])) for name in told[0]},
        {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in empty.items()},
    )


def stored(path: Path, key: str, make: Callable[[], tuple[np.ndarray, list[str]]]) -> tuple[np.ndarray, list[str]]:
    """Latents and captions from a file that was made under the same key, or made now and written whole."""
    if path.is_file():
        with safe_open(path, "np") as file:
            told = file.metadata()
            if told["key"] == key:
                return file.get_tensor("latents"), json.loads(told["captions"])
    latents, captions = make()
    write_whole(path, save({"latents": latents}, {"key": key, "captions": json.dumps(captions)}))
    return latents, captions
