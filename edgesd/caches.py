"""What edgesd keeps between runs: how much, how much at most, and how often it was of use."""

from __future__ import annotations

import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

from edgesd import files
from edgesd.runtime import cache as prompts
from edgesd.runtime import pictures
from edgesd.sheet import Section, Sheet, size
from edgesd.stages import MAX_BYTES, Stages

CACHES = {
    "stages": "finished packaging stages",
    "prompts": "prompt embeddings",
    "pictures": "pictures, with --reuse",
    "receipts": "bundles already verified",
}


def cache(clear: bool = False) -> Sheet:
    """What edgesd keeps between runs, by kind; clear: deletes all of it (figures are those before).

    Nothing is lost but time. Raises SetupError where the cache is closed to this user.
    """
    limits = {"stages": MAX_BYTES, "prompts": prompts.DISK_BYTES, "pictures": pictures.MAX_BYTES}
    root = files.cache_folder()
    kept: dict[str, dict[str, Any]] = {}
    for name in CACHES:
        sizes = _kept(root / name)
        kept[name] = {"entries": len(sizes), "bytes": sum(sizes), "max_bytes": limits.get(name)}
        if name in ("prompts", "pictures"):
            hits, misses = prompts.tally(root / name)
            kept[name] |= {"hits": hits, "misses": misses, "hit_rate": prompts.hit_rate(hits, misses)}
        if clear:
            with files.disk_errors(root / name, "Delete it by hand"):
                _clear(root / name)
    data = {"folder": str(root), "cleared": clear, "caches": kept}
    rows = tuple(
        (name, CACHES[name], str(one["entries"]), size(one["bytes"]),
         size(one["max_bytes"]) if one["max_bytes"] is not None else "", _hits(one))
        for name, one in kept.items()
    )  # fmt: skip
    note = "deleted" if clear else "edgesd cache --clear deletes all of it; what was used longest ago goes by itself"
    return Sheet(data, (Section(str(root), ("cache", "what", "files", "size", "at most", "hits"), rows, note),))


def _hits(one: dict[str, Any]) -> str:
    """Of all runs so far; nothing where nobody asked."""
    rate = one.get("hit_rate")
    return "" if rate is None else f"{one['hits']} of {one['hits'] + one['misses']} ({rate:.0%})"


def _kept(folder: Path) -> list[int]:
    """Sizes of what is kept: finished stages, or files."""
    if folder.name == "stages":
        return [entry.bytes for entry in Stages(folder).entries()]
    found = []
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # another process is tidying up
            status = path.lstat()
            found += [status.st_size] if stat.S_ISREG(status.st_mode) and path.name != prompts.TALLY else []
    return found


def _clear(folder: Path) -> None:
    if folder.name == "stages":
        Stages(folder).clear()  # leaves alone what another process is using
    else:
        files.remove(folder)
