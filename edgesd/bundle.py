"""Bundles on disk: read with nothing taken on trust, written so that they appear whole or not at all.

A bundle is a folder `<model>-<target>.edgesd/` that manifest.json describes to the last file (docs/bundle.md).
Reading checks names, kinds and sizes every time. Every sha256 is computed at the first read; a receipt in the
user's cache (never inside the bundle, which would vouch for itself) then makes later reads a matter of `stat`.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from edgesd.errors import DataError, RequestError
from edgesd.files import (
    cache_folder,
    disk_errors,
    locked,
    open_regular,
    recover,
    replacing,
    settle,
    sha256_file,
    write_whole,
)
from edgesd.manifest import MAX_MANIFEST_BYTES, FileEntry, Manifest, dump, parse

MANIFEST = "manifest.json"
SUFFIX = ".edgesd"
# What desktops drop into any folder they show. Nothing opens them; a bundle is not broken by them.
_DROPPINGS = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})
_AGAIN = "Get the bundle again from where it came, or package the model again"


@dataclass(frozen=True)
class Bundle:
    """A checked bundle. hashed: this read computed every sha256 (False: a receipt vouches for an earlier read)."""

    folder: Path
    manifest: Manifest
    hashed: bool

    def path(self, relpath: str) -> Path:
        """Where a listed file lies, as a runtime may open it now.

        Raises RequestError for a name the manifest does not list, DataError if the file is no longer what was read.
        """
        for entry in self.manifest.files:
            if entry.path == relpath:
                path = self.folder / relpath
                _check_file(relpath, entry, _stat(path))
                if os.path.realpath(path) != str(path):
                    raise DataError(f"{relpath} leads out of {self.folder}", "files inside the bundle", _AGAIN)
                return path
        raise RequestError(f"{relpath!r} is no file of {self.folder.name}", "files its manifest lists", "Name one")


def read(folder: Path | str, verify: bool | None = None) -> Bundle:
    """Opens a bundle. verify=True computes every sha256 again, whatever the receipt says.

    Files the manifest does not list are an error (a runtime could be talked into loading one), except what desktops
    leave behind. Links, also hard ones, are errors: what is in a bundle is nowhere else.
    Raises RequestError if `folder` is missing or a file, DataError for anything broken, unfinished, hostile or too new.
    """
    place = Path(os.path.realpath(folder))
    try:
        with disk_errors(place, "Check who may read it"):
            settle(place)
            data = _manifest_bytes(place)
            manifest = parse(data)
            seen = _walk(place, {entry.path for entry in manifest.files})
            for entry in manifest.files:
                _check_file(entry.path, entry, seen.get(entry.path))
            receipt = _Receipt.of(place, data, seen)
            hashed = verify is True or not receipt.kept()
            if hashed:
                for entry in manifest.files:
                    _check_hash(place / entry.path, entry)
                receipt.keep()
    except OSError as error:
        raise DataError(f"{place} cannot be read ({error})", "a bundle that stays as it is", _AGAIN) from error
    return Bundle(place, manifest, hashed)


@contextmanager
def writing(destination: Path | str, force: bool = False) -> Iterator[Path]:
    """A fresh folder beside `destination` to fill and `seal`; it becomes `destination` when the body ends.

    What stands at `destination` is kept unless force, and then replaced only when the new one is whole. An error or
    Ctrl-C in the body leaves nothing new behind; after a kill the next read or write of `destination` puts things
    right. `read` works on the folder once sealed, so a bundle can be validated before anybody sees it.
    Raises RequestError if something is there (force replaces bundles only) or another process writes it, SetupError
    on a full or read-only disk, DataError if the body did not seal.
    """
    place = Path(os.path.realpath(destination))
    with disk_errors(place, "Free some space, or name another folder with -o"):
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise RequestError(f"{place.parent} is a file", "a folder to write into", "Name another folder") from None
        with locked(place):
            _check_free(place, force)
            with replacing(place) as folder:
                yield folder
                if not (folder / MANIFEST).is_file():
                    raise DataError(f"{place.name} was not finished", "a folder with manifest.json", "Seal it first")


def entries(folder: Path | str) -> tuple[FileEntry, ...]:
    """Path, size and sha256 of every file under `folder` (manifest.json left out), for `Manifest.files`."""
    root = Path(folder)
    seen = _walk(root, None)
    return tuple(
        FileEntry(path=path, bytes=seen[path].st_size, sha256=sha256_file(root / path, follow_links=False))
        for path in sorted(seen)
    )


def seal(folder: Path | str, manifest: Manifest) -> None:
    """Writes manifest.json into a filled folder, last and whole, after checking that it lists what is there.

    May be called again with a better manifest (quality, status). Raises DataError where the two differ.
    """
    root, data = Path(folder), dump(manifest)
    listed = parse(data).files  # what this edgesd would refuse to read, it does not write
    seen = _walk(root, {entry.path for entry in listed})
    for entry in listed:
        _check_file(entry.path, entry, seen.get(entry.path))
    write_whole(root / MANIFEST, data)


# ---- what is there ---------------------------------------------------------------------------------------------


def _manifest_bytes(place: Path) -> bytes:
    if not place.exists():
        raise RequestError(f"{place} does not exist", "the folder of a bundle", "Check the path, or package a model")
    if not place.is_dir():
        do = "Unpack it, and name the folder" if place.suffix in {".zip", ".gz", ".tar"} else "Name the bundle's folder"
        raise RequestError(f"{place} is a file", f"a bundle, which is a folder like model-target{SUFFIX}/", do)
    found = _stat(place / MANIFEST)
    if found is None and (place / "model_index.json").exists():
        raise DataError(f"{place} is a checkpoint", "a bundle made of one", f"Run: edgesd package {place}")
    if found is None:
        came = f"{place} has no {MANIFEST}: an unfinished bundle, or no bundle at all"
        raise DataError(came, "a folder that edgesd package finished", "Package the model again")
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        raise DataError(f"{MANIFEST} in {place} is a link or no regular file", "a plain file", _AGAIN)
    with open_regular(place / MANIFEST) as file:
        return file.read(MAX_MANIFEST_BYTES + 1)


def _stat(path: Path) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _walk(root: Path, listed: set[str] | None) -> dict[str, os.stat_result]:
    """Everything under `root` by relative path, manifest.json left out; links and devices come back as they are.

    listed: what may be there (None: anything). The walk ends at the first thing that may not, so that neither a
    million files nor a folder a mile deep costs anything.
    """
    folders = None if listed is None else {str(up) for path in listed for up in Path(path).parents}
    found: dict[str, os.stat_result] = {}
    todo = [""]
    while todo:
        inside = todo.pop()
        for name in os.listdir(root / inside):
            path = inside + name
            is_folder = stat.S_ISDIR((status := os.lstat(root / path)).st_mode)
            if name in _DROPPINGS or name.startswith("._") or path == MANIFEST:
                continue
            if is_folder and (folders is None or path in folders):
                todo.append(path + "/")
            elif listed is None or path in listed:
                found[path] = status
            else:
                raise DataError(f"{path!a} is in {root} and not in its manifest", "listed files only", _AGAIN)
    return found


def _check_file(path: str, entry: FileEntry, found: os.stat_result | None) -> None:
    if found is None:
        raise DataError(f"{path} is missing", "every file the manifest lists", _AGAIN)
    if stat.S_ISLNK(found.st_mode) or (stat.S_ISREG(found.st_mode) and found.st_nlink > 1):
        do = "Copy the bundle with its links followed (cp -rL), and use the copy"
        raise DataError(f"{path} is a link", "files that are nowhere else", do)
    if not stat.S_ISREG(found.st_mode):
        raise DataError(f"{path} is not a regular file", "regular files only", _AGAIN)
    if found.st_size != entry.bytes:
        raise DataError(f"{path} has {found.st_size} bytes", f"{entry.bytes}, as its manifest says", _AGAIN)


def _check_hash(path: Path, entry: FileEntry) -> None:
    if sha256_file(path, follow_links=False) != entry.sha256:
        came = f"{entry.path} does not have the sha256 of its manifest"
        raise DataError(came, "the bytes that were packaged", _AGAIN)


def _check_free(place: Path, force: bool) -> None:
    """Refuses a destination that is taken, or that force would lose something other than a bundle from."""
    recover(place)
    if not os.path.lexists(place):
        return
    if not force:
        raise RequestError(f"{place} exists", "a new folder", "Add --force to replace it when the new one is whole")
    ours = place.is_dir() and (place.suffix == SUFFIX or _looks_like_ours(place) or not any(place.iterdir()))
    if not ours:
        raise RequestError(f"{place} is no bundle", "--force replaces bundles only", "Name another folder")


def _looks_like_ours(place: Path) -> bool:
    with suppress(DataError, OSError):
        return bool(parse(_manifest_bytes(place)).files)
    return False


# ---- receipts --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Receipt:
    """What a read found when every hash was right. The change time is there because nobody can set it back."""

    place: Path
    text: str

    @classmethod
    def of(cls, place: Path, manifest: bytes, seen: dict[str, os.stat_result]) -> _Receipt:
        name = hashlib.sha256(os.fsencode(place)).hexdigest()
        files = {path: [s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for path, s in sorted(seen.items())}
        facts = {"folder": ascii(place), "manifest": hashlib.sha256(manifest).hexdigest(), "files": files}
        return cls(cache_folder() / "receipts" / f"{name}.json", json.dumps(facts))

    def kept(self) -> bool:
        try:
            return self.place.read_text(encoding="utf-8") == self.text
        except (OSError, UnicodeDecodeError):
            return False

    def keep(self) -> None:
        with suppress(OSError):  # a cache that cannot be written costs the next read its time, and nothing else
            self.place.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.place, self.text.encode())
