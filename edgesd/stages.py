"""The packager's memory between runs: finished stages, found again by all that went into them.

A stage is a folder of files made once per key. A key is a digest of the request's part, the source's hash, edgesd's
own code and the versions of the libraries at work, so a killed run continues where it was and a changed flag
redoes only what depends on it. Stages live in the user's cache folder; `edgesd cache` shows and clears them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

from pydantic import BaseModel

from edgesd import files
from edgesd.errors import RequestError

MAX_BYTES = 20 << 30  # of the finished stages that a build leaves behind
LIBRARIES = ("torch", "diffusers", "transformers", "numpy")  # that compute with a checkpoint, whatever the target
_LISTING, _CONTENT = "stage.json", "files"


@dataclass(frozen=True)
class Entry:
    """One finished stage in the cache. used: seconds since the epoch, by this machine's clock."""

    key: str
    bytes: int
    used: float


def key(name: str, *parts: Any, libraries: Iterable[str] = ()) -> str:
    """The key of a stage: `name`, for people, and a digest of everything its files depend on.

    parts: what the stage is made of: values JSON can hold, pydantic models, paths' hashes, keys of earlier stages.
    libraries: distributions whose version matters ("torch"). edgesd's own code counts always.
    """
    if re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,99}", name) is None:
        raise RequestError(f"stage name {name!r}", "lower-case letters, digits, '-' and '_'", "Name it so")
    facts = [name, code_version(), {library: _version(library) for library in sorted(libraries)}, parts]
    text = json.dumps(facts, sort_keys=True, allow_nan=False, default=_plain)
    return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"


@cache
def code_version() -> str:
    """SHA-256 over edgesd's Python files, targets and calibration included; computed once per process."""
    digests = []
    for package in ("edgesd", "edgesd.targets", "edgesd.calibration"):
        spec = importlib.util.find_spec(package)
        places = spec.submodule_search_locations if spec is not None else None
        digests += [files.hash_tree(place, suffixes=(".py",)) for place in places or ()]
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return ""


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    raise TypeError(f"{type(value).__name__} has no stable form for a stage's key")


class Stages:
    """A folder of finished stages. limit_bytes: what it may hold; the longest unused go first (None: no limit).

    A stage that was handed out stays locked in place as long as this object lives: no other process evicts it.
    """

    def __init__(self, folder: Path | None = None, limit_bytes: int | None = None) -> None:
        self.folder = folder if folder is not None else files.cache_folder() / "stages"
        self.limit_bytes = limit_bytes
        self._pins: dict[str, IO[str]] = {}

    def run(self, key: str, build: Callable[[Path], None]) -> Path:
        """The folder of a finished stage, from the cache or made by `build(empty folder)`.

        It appears whole or not at all, and is not to be changed. Another process building the same stage is waited
        for. Raises what build raises, and SetupError on a full or read-only disk.
        """
        place = self.folder / key
        with files.disk_errors(place, "Free some space, run edgesd cache --clear, or set EDGESD_CACHE"):
            self.folder.mkdir(parents=True, exist_ok=True)
            while not self._pin(place):
                with files.locked(place, wait=True):
                    if not _is_whole(place):
                        _build(place, build)
            with suppress(OSError):
                os.utime(place)
            self._evict()
        return place / _CONTENT

    def entries(self) -> list[Entry]:
        """All finished stages, the last used first."""
        found = []
        for place in self._places():
            with suppress(OSError, ValueError, KeyError, TypeError):  # another process is deleting it
                sizes = json.loads((place / _LISTING).read_text())
                found.append(Entry(place.name, sum(sizes.values()), place.stat().st_mtime))
        return sorted(found, key=lambda entry: (-entry.used, entry.key))

    def clear(self) -> int:
        """Deletes every stage that nobody is using, and what killed builds left. Returns the bytes given back."""
        before = sum(entry.bytes for entry in self.entries())
        self._pins.clear()
        for place in self._places():
            _discard(place)
        self._sweep()
        return before - sum(entry.bytes for entry in self.entries())

    def _pin(self, place: Path) -> bool:
        """Locks a whole stage against eviction; False if it is not there."""
        if place.name in self._pins:
            if _is_whole(place):
                return True
            self._pins.pop(place.name).close()
        pin = files.lock(place, shared=True, wait=True)
        if pin is not None and _is_whole(place):
            self._pins[place.name] = pin
            return True
        if pin is not None:
            pin.close()
        return False

    def _places(self) -> list[Path]:
        with suppress(FileNotFoundError):
            return [path for path in sorted(self.folder.iterdir()) if not path.name.startswith(".") and path.is_dir()]
        return []

    def _evict(self) -> None:
        self._sweep()
        if self.limit_bytes is None:
            return
        kept = self.entries()
        held = sum(entry.bytes for entry in kept)
        for entry in reversed(kept):
            if held > self.limit_bytes and entry.key not in self._pins and _discard(self.folder / entry.key):
                held -= entry.bytes

    def _sweep(self) -> None:
        """Deletes half-made stages of dead processes, and their locks; the living hold theirs."""
        for half in [path for mark in ("new", "old", "lock") for path in self.folder.glob(f".*.{mark}")]:
            place = self.folder / half.name[1:].rsplit(".", 1)[0]
            if not place.exists():
                _discard(place)


def _build(place: Path, build: Callable[[Path], None]) -> None:
    files.discard(place)  # damaged, if it is there at all
    with files.replacing(place) as folder:
        content = folder / _CONTENT
        content.mkdir()
        build(content)
        made = {path.relative_to(content).as_posix(): path.stat().st_size for path in _files(content)}
        files.write_whole(folder / _LISTING, json.dumps(made).encode())


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _is_whole(place: Path) -> bool:
    """Whether all that was made is still there: caches live where cleaners clean."""
    try:
        made = json.loads((place / _LISTING).read_text())
        return all((place / _CONTENT / path).stat().st_size == size for path, size in made.items())
    except (OSError, ValueError, AttributeError):
        return False


def _discard(place: Path) -> bool:
    """Deletes a stage unless somebody is at it."""
    try:
        with files.locked(place):
            files.discard(place)
            return True
    except (RequestError, OSError):
        return False
