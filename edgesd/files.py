"""Files that are never half there: hashes, locks, folders that appear whole or not at all, and where caches live.

A folder X is made as `.X.new` beside it and renamed in when whole; the one it replaces waits as `.X.old`
meanwhile; `.X.lock` says that somebody is at it. All three are siblings of X, so every move is a rename inside
one file system, and whatever a killed process leaves behind is known by name and put right by the next one.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import IO

from edgesd.errors import RequestError, SetupError

_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}


def cache_folder() -> Path:
    """Where caches live: $EDGESD_CACHE, else the platform's place for a user's caches. Not created here.

    Raises SetupError where this user has no home folder.
    """
    if own := os.environ.get("EDGESD_CACHE"):
        return Path(own).absolute()
    try:
        if sys.platform == "win32":
            return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local") / "edgesd" / "cache"
        if sys.platform == "darwin":
            return Path.home() / "Library" / "Caches" / "edgesd"
        xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
        return (xdg if xdg.is_absolute() else Path.home() / ".cache") / "edgesd"  # the XDG text: relative = ignored
    except RuntimeError:
        raise SetupError("this user has no home folder", "a place for caches", "Set EDGESD_CACHE to a folder") from None


def open_regular(path: Path) -> BufferedReader:
    """Opens a regular file for reading; never follows a link, never waits on a pipe. OSError for anything else."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    file = os.fdopen(os.open(path, flags), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return file


def sha256_file(path: Path | str, *, follow_links: bool = True) -> str:
    """SHA-256 of a file's bytes, as 64 hex digits. Links are followed unless told: a hub cache is made of them."""
    with open(path, "rb") if follow_links else open_regular(Path(path)) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_tree(path: Path | str, suffixes: tuple[str, ...] = ()) -> str:
    """SHA-256 over the names and contents of all files under `path` (or of that one file), wherever it lies.

    Hidden files and folders and `__pycache__` do not count; links are followed, each folder once. suffixes: only
    files that end so. Raises RequestError if there is no such file or folder.
    """
    root = Path(path)
    if not root.exists():
        raise RequestError(f"{path} does not exist", "a file or folder that can be read", "Check the path")
    files = [root] if root.is_file() else sorted(_files_under(root))
    total = hashlib.sha256()
    for file in files:
        if not suffixes or file.name.endswith(suffixes):
            name = file.name if file == root else file.relative_to(root).as_posix()
            total.update(f"{name}\0{sha256_file(file)}\n".encode("utf-8", "surrogateescape"))
    return total.hexdigest()


def _files_under(root: Path) -> Iterator[Path]:
    seen = {os.path.realpath(root)}  # a link to a folder above would otherwise never end
    for folder, folders, names in os.walk(root, followlinks=True):
        kept = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        folders[:] = []
        for name in sorted(kept):
            real = os.path.realpath(os.path.join(folder, name))
            if real not in seen:
                seen.add(real)
                folders.append(name)
        yield from (Path(folder, name) for name in names if not name.startswith(".") and Path(folder, name).is_file())


@contextmanager
def disk_errors(place: Path | str, do: str) -> Iterator[None]:
    """Turns a full disk, and a file or folder closed to this user, into a SetupError; `do` says what helps."""
    try:
        yield
    except Exception as error:
        # Libraries written in Rust tell the system's error in words alone.
        told = re.search(r"\(os error (\d+)\)", str(error))
        number = error.errno if isinstance(error, OSError) else int(told[1]) if told is not None else None
        if number in _FULL:
            raise SetupError(f"no space left on the disk while writing {place}", "room for all of it", do) from error
        if number in _DENIED:
            where = getattr(error, "filename", None)
            where, why = place if where is None else where, os.strerror(number)
            raise SetupError(f"{where} is closed to this user ({why})", "open access", do) from error
        raise


def write_whole(path: Path, data: bytes) -> None:
    """Writes a small file so that a reader sees the old bytes or all of the new ones."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def remove(path: Path) -> None:
    """Deletes a file, a link (not what it points to) or a folder; nothing there is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def copy_tree(source: Path, folder: Path, skip: tuple[str, ...] = ()) -> None:
    """Copies a folder's files into another but those whose name ends so; the first failure is its own OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.rglob("*")):  # folders before what is in them
        place = folder / path.relative_to(source)
        if path.is_dir():
            place.mkdir(exist_ok=True)
        elif not path.name.endswith(skip):
            shutil.copyfile(path, place)


# ---- locks -----------------------------------------------------------------------------------------------------


def lock(path: Path, *, shared: bool = False, wait: bool = False) -> IO[str] | None:
    """Locks `path` for this process: an open file that gives it back when closed (or when the process dies).

    shared: many may hold it so, while nobody holds it alone. None if it is taken and wait is False.
    """
    name = _beside(path, "lock")
    while True:
        file = open(name, "a+")  # noqa: SIM115  the caller keeps it open
        try:
            if not _flock(file, shared, wait):
                file.close()
                return None
            if os.path.samestat(os.fstat(file.fileno()), os.stat(name)):
                return file
        except FileNotFoundError:
            pass  # the holder before us deleted it as it left; what we locked has no name any more
        except BaseException:
            file.close()
            raise
        file.close()


@contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Holds `path` alone. Raises RequestError if another process does and wait is False."""
    held = lock(path, wait=wait)
    if held is None:
        raise RequestError(f"another edgesd is writing {path}", "one at a time", "Wait for it, or name another folder")
    try:
        yield
    finally:
        with suppress(OSError):  # deleted before it is released, so that nobody can lock a name about to go
            os.unlink(held.name)
        held.close()


def _beside(path: Path, what: str) -> Path:
    return path.with_name(f".{path.name}.{what}")


if sys.platform == "win32":
    import msvcrt

    def _flock(file: IO[str], shared: bool, wait: bool) -> bool:  # Windows has no shared lock here: alone, always
        while True:
            try:
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
                return True
            except OSError:
                if not wait:
                    return False
                time.sleep(0.1)
else:
    import fcntl

    def _flock(file: IO[str], shared: bool, wait: bool) -> bool:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        return True


# ---- folders that move in whole --------------------------------------------------------------------------------


@contextmanager
def replacing(destination: Path) -> Iterator[Path]:
    """A fresh folder that becomes `destination` when the body ends, whatever was there deleted after.

    The caller holds the lock. An exception in the body, Ctrl-C included, leaves the old one and nothing else; a
    kill leaves what `recover` puts right.
    """
    new, old = _beside(destination, "new"), _beside(destination, "old")
    recover(destination)
    remove(new)
    try:
        new.mkdir()
        yield new
        _sync(new)
        if os.path.lexists(destination):
            os.rename(destination, old)
        os.rename(new, destination)
    except BaseException:
        recover(destination)
        with suppress(OSError):
            remove(new)
        raise
    _sync_folder(destination.parent)
    remove(old)


def recover(destination: Path) -> None:
    """Puts right what a writer killed between two renames left. The caller holds the lock."""
    old = _beside(destination, "old")
    if not os.path.lexists(old):
        return
    if os.path.lexists(destination):
        remove(old)
    else:
        os.rename(old, destination)


def settle(destination: Path, patience_s: float = 5.0) -> None:
    """For readers: where a writer stands (or died) between its two renames, waits or recovers."""
    end = time.monotonic() + patience_s
    while not destination.exists() and os.path.lexists(_beside(destination, "old")) and time.monotonic() < end:
        try:
            with locked(destination):
                recover(destination)
        except RequestError:
            time.sleep(0.02)  # a living writer: its second rename follows at once


def discard(destination: Path) -> None:
    """Deletes `destination` as one step for whoever looks, and leftovers of its makers. The caller holds the lock."""
    old = _beside(destination, "old")
    remove(old)
    if os.path.lexists(destination):
        os.rename(destination, old)
        remove(old)
    remove(_beside(destination, "new"))


def _sync(folder: Path) -> None:
    """Brings every file of a folder to the disk, so that a power cut after the rename finds them whole."""
    for inside, _, names in os.walk(folder):
        for name in names:
            # opened for writing because Windows syncs no other way; read-only files are left to the system
            with suppress(PermissionError), open(os.path.join(inside, name), "r+b") as file:
                os.fsync(file.fileno())
        _sync_folder(Path(inside))


def _sync_folder(folder: Path) -> None:
    if os.name != "nt":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
