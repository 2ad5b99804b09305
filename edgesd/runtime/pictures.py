"""Finished pictures kept by what they were asked for: the same request gives the same picture, so it need not be drawn.

An entry is the PNG itself, with its settings, named by a hash of the request. What nearly fits (the same words with
another seed or other settings) is offered by path, one of each look, and never taken by itself.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from edgesd.errors import EdgesdError
from edgesd.files import write_whole
from edgesd.runtime.cache import add_tally, evict, hit_rate
from edgesd.runtime.canvas import Start
from edgesd.runtime.image import read_settings
from edgesd.runtime.settings import Settings

MAX_BYTES = 256 << 20
NEAR_BITS = 10  # of 64: pictures whose hashes differ in fewer look the same
OFFERED = 3


def picture_key(identity: str, settings: Settings, start: Start | None) -> str:
    """64 hex digits for a request: the weights, all settings, the start image and mask."""
    told = hashlib.sha256(json.dumps([identity, asdict(settings)], sort_keys=True).encode())
    if start is not None:
        for array in (start.image, start.mask):
            told.update(
                b"none" if array is None else repr(array.shape).encode() + np.ascontiguousarray(array).tobytes()
            )
    return told.hexdigest()


def look(path: Path) -> int:
    """64-bit difference hash of a picture: is each of 8x8 grey patches brighter than its right neighbour."""
    with Image.open(path) as image:
        grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
    return int("".join("1" if bit else "0" for bit in (grey[:, :-1] > grey[:, 1:]).ravel()), 2)


class PictureStore:
    """Least recently used pictures go first once their files are more than max_bytes. folder: made when needed.

    It never fails a picture: what cannot be read is deleted and drawn anew, what cannot be stored is only counted.
    """

    def __init__(self, folder: Path, max_bytes: int = MAX_BYTES) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self._counts = dict.fromkeys(("hits", "misses", "dropped", "unsaved"), 0)

    def take(self, key: str, destination: Path) -> dict[str, Any] | None:
        """Copies the stored picture to `destination` and returns its record, or None where there is none."""
        path = self.folder / f"{key}.png"
        record = self._record(path) if path.is_file() else None
        self._counts["misses" if record is None else "hits"] += 1
        if record is not None:
            write_whole(destination, path.read_bytes())
            with suppress(OSError):
                path.touch()  # its age is what eviction goes by
        return record

    def keep(self, key: str, picture: Path) -> None:
        """Stores a copy of a finished PNG."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self.folder / f"{key}.png", picture.read_bytes())
            evict(self.folder, ".png", self.max_bytes)
        except (OSError, EdgesdError):
            self._counts["unsaved"] += 1

    def similar(self, identity: str, settings: Settings) -> list[Path]:
        """Stored pictures of the same model and words, newest first, no two of one look, at most OFFERED."""
        found: list[tuple[int, Path]] = []
        for path in sorted(self.folder.glob("*.png"), key=_age):
            record = self._record(path)
            if (
                record is None
                or record.get("identity") != identity
                or _words(record.get("settings")) != _words(asdict(settings))
            ):
                continue
            mine = look(path)
            if all((mine ^ other).bit_count() >= NEAR_BITS for other, _ in found):
                found.append((mine, path))
            if len(found) == OFFERED:
                break
        return [path for _, path in found]

    def stats(self) -> dict[str, Any]:
        """hits, misses, hit_rate; dropped: broken files deleted; unsaved: what the disk did not take."""
        return {**self._counts, "hit_rate": hit_rate(self._counts["hits"], self._counts["misses"])}

    def close(self) -> None:
        """Adds this run's hits and misses to the folder's."""
        add_tally(self.folder, self._counts)

    def _record(self, path: Path) -> dict[str, Any] | None:
        """The record in a stored PNG, its checksums verified; a broken file is deleted."""
        try:
            return read_settings(path)
        except (EdgesdError, OSError):
            self._counts["dropped"] += 1
            with suppress(OSError):
                path.unlink()
            return None


def _age(path: Path) -> float:
    try:
        return -path.stat().st_mtime
    except OSError:  # another process evicted it
        return 0.0


def _words(settings: Any) -> tuple[str, ...]:
    """Prompt and negative prompt, as words without regard to case, spaces and commas."""
    if not isinstance(settings, dict):
        return ()
    texts = (settings.get("prompt"), settings.get("negative_prompt"))
    return tuple(" ".join(str(text).lower().replace(",", " ").split()) for text in texts)
