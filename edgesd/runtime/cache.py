"""Prompt embeddings kept for the next picture: in memory up to a byte limit, and in a folder if one is given.

On disk an entry is one safetensors file, named by its key and sealed with a checksum; a file that does not fit its
seal is deleted and computed anew. The cache never fails a picture: an entry that cannot be stored is only counted.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from edgesd.files import write_whole

MEMORY_BYTES = 64 << 20
DISK_BYTES = 256 << 20
_SUFFIX = ".safetensors"
TALLY = "tally.json"  # beside the entries: hits and misses of all runs


def prompt_key(model: str, component: str, text: str) -> str:
    """64 hex digits for a text as one component of one model (its `Pipeline.identity`) reads it."""
    return hashlib.sha256(json.dumps([model, component, text]).encode()).hexdigest()


class PromptCache:
    """Least recently used entries go first, in memory and on disk alike. Safe to share between threads.

    max_bytes: of the arrays in memory; an entry larger than that is not kept there. folder: made when needed; None =
    memory alone. max_disk_bytes: of the files in it.
    """

    def __init__(
        self, max_bytes: int = MEMORY_BYTES, folder: Path | None = None, max_disk_bytes: int = DISK_BYTES
    ) -> None:
        self.max_bytes, self.folder, self.max_disk_bytes = max_bytes, folder, max_disk_bytes
        self._entries: OrderedDict[str, np.ndarray] = OrderedDict()
        self._counts = dict.fromkeys(("hits", "misses", "dropped", "unsaved"), 0)
        self._lock = threading.RLock()

    def get(self, key: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """The entry of a `prompt_key`, computed and stored where there is none. The array is read-only."""
        with self._lock:
            found = self._find(key)
            self._counts["misses" if found is None else "hits"] += 1
            if found is None:
                found = compute().copy()
                self._store(key, found)
            self._remember(key, found)
            return found

    def stats(self) -> dict[str, Any]:
        """hits, misses, hit_rate; dropped: broken files deleted; unsaved: what the disk did not take; entries, bytes:
        held in memory."""
        with self._lock:
            rate = hit_rate(self._counts["hits"], self._counts["misses"])
            return {**self._counts, "hit_rate": rate, "entries": len(self._entries), "bytes": self._held()}

    def close(self) -> None:
        """Adds this run's hits and misses to the folder's."""
        if self.folder is not None:
            add_tally(self.folder, self._counts)

    def _held(self) -> int:
        return sum(array.nbytes for array in self._entries.values())

    def _find(self, key: str) -> np.ndarray | None:
        return self._entries[key] if key in self._entries else self._read(key)

    def _remember(self, key: str, array: np.ndarray) -> None:
        array.flags.writeable = False  # shared by all who ask; a caller that wrote to it would change their pictures
        self._entries[key] = array
        self._entries.move_to_end(key)
        while self._held() > self.max_bytes:
            self._entries.popitem(last=False)

    def _path(self, key: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{key}{_SUFFIX}"

    def _read(self, key: str) -> np.ndarray | None:
        path = self._path(key)
        if path is None:
            return None
        try:
            data = path.read_bytes()
        except OSError:  # not there, or not to be read: as good as not there
            return None
        try:
            arrays = load(data)
            if bytes(arrays["seal"]) != _seal(key, arrays["states"]):
                raise ValueError("the checksum does not fit")
        except Exception:  # whatever is wrong with it, the entry can be computed anew
            self._counts["dropped"] += 1
            with suppress(OSError):
                path.unlink()
            return None
        with suppress(OSError):
            path.touch()  # its age is what eviction goes by
        return arrays["states"]

    def _store(self, key: str, array: np.ndarray) -> None:
        path = self._path(key)
        if path is None:
            return
        data = save({"states": array, "seal": np.frombuffer(_seal(key, array), np.uint8)})
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, data)
            evict(path.parent, _SUFFIX, self.max_disk_bytes)
        except OSError:
            self._counts["unsaved"] += 1


def evict(folder: Path, suffix: str, max_bytes: int) -> None:
    """Deletes a folder's files of one kind, those unused for longest first, until it is within its limit."""
    files = sorted((p.stat().st_mtime_ns, p.stat().st_size, p) for p in folder.glob(f"*{suffix}"))
    total = sum(size for _, size, _ in files)
    for _, size, path in files:
        if total <= max_bytes:
            return
        path.unlink(missing_ok=True)
        total -= size


def hit_rate(hits: int, misses: int) -> float | None:
    """Hits per question, rounded; None where nothing was asked."""
    return round(hits / (hits + misses), 4) if hits + misses else None


def tally(folder: Path) -> tuple[int, int]:
    """(hits, misses) of all runs on a cache's folder; (0, 0) where nobody counted."""
    try:
        told = json.loads((folder / TALLY).read_bytes()[:1024])
        hits, misses = told["hits"], told["misses"]
    except (OSError, ValueError, KeyError, TypeError):
        return 0, 0
    whole = all(type(n) is int and 0 <= n < 1 << 53 for n in (hits, misses))
    return (hits, misses) if whole else (0, 0)


def add_tally(folder: Path, counts: Mapping[str, int]) -> None:
    """Adds a run's hits and misses to a folder's. For people alone: of two runs that end at once one may be lost."""
    if counts["hits"] + counts["misses"] == 0:
        return
    hits, misses = tally(folder)
    told = {"hits": hits + counts["hits"], "misses": misses + counts["misses"]}
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / TALLY, json.dumps(told).encode())


def _seal(key: str, array: np.ndarray) -> bytes:
    head = json.dumps([key, str(array.dtype), list(array.shape)]).encode()
    return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).digest()
