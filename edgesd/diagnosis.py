"""`edgesd doctor`: what this machine has, what it lacks, and what each target can do here."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edgesd import files
from edgesd.errors import SetupError
from edgesd.parity import run_status
from edgesd.sheet import Section, Sheet, size

# What is not declared as a requirement and still explains a result.
ALSO = ("coremltools", "onnx", "onnxscript", "tensorflow", "nncf")


def doctor() -> Sheet:
    """Python, system, versions, extras (or the pip install that brings them), disk, memory, targets. Never raises for
    what is missing: that is what it is asked."""
    import psutil

    memory, place = psutil.virtual_memory(), _existing(files.cache_folder())
    data: dict[str, Any] = {
        "python": platform.python_version(),
        "executable": sys.executable,
        "system": platform.platform(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "memory": {"bytes": memory.total, "free_bytes": memory.available},
        "disk": {
            "working_folder_free_bytes": shutil.disk_usage(Path.cwd()).free,
            "cache": str(files.cache_folder()),
            "cache_free_bytes": shutil.disk_usage(place).free,
        },
        "packages": _versions(),
        "extras": _extras(),
        "targets": _targets(),
    }
    return Sheet(data, tuple(_sections(data)))


def _existing(path: Path) -> Path:
    """The path itself or the nearest folder above it that is there."""
    return next(place for place in (path, *path.parents) if place.exists())


def _requirements() -> list[tuple[str, str]]:
    """(package, extra or "") of everything edgesd's own metadata asks for on this platform."""
    found = []
    try:
        lines = requires("edgesd") or []
    except PackageNotFoundError:  # run from a source folder that nobody installed
        return []
    for line in lines:
        text, _, marker = line.partition(";")
        name = re.match(r"[A-Za-z0-9._-]+", text.strip())
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", marker)
        if name is not None and name[0] != "edgesd" and _applies(marker):
            found.append((name[0], extra[1] if extra is not None else ""))
    return found


def _applies(marker: str) -> bool:
    """Whether the platform part of a requirement's marker holds here (the only one that edgesd's metadata uses)."""
    wanted = re.search(r"sys_platform\s*(==|!=)\s*['\"]([^'\"]+)['\"]", marker)
    return wanted is None or (sys.platform == wanted[2]) == (wanted[1] == "==")


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _versions() -> dict[str, str | None]:
    names = dict.fromkeys([*(name for name, extra in _requirements() if extra != "dev"), *ALSO])
    return {name: _installed(name) for name in ("edgesd", *names)}


def _extras() -> dict[str, dict[str, Any]]:
    """Every extra that has packages of its own: what is missing, and the command that brings it."""
    by_extra: dict[str, list[str]] = {}
    for name, extra in _requirements():
        if extra:
            by_extra.setdefault(extra, []).append(name)
    found = {}
    for extra, names in by_extra.items():
        missing = [name for name in names if _installed(name) is None]
        found[extra] = {
            "installed": not missing,
            "missing": missing,
            "install": f'pip install "edgesd[{extra}]"' if missing else "",
        }
    return found


def _targets() -> dict[str, dict[str, Any]]:
    from edgesd import targets

    found = {}
    for name in targets.names():
        facts: dict[str, Any] = {"open": False, "lower": False, "status": "", "runtime": "", "needs": ""}
        try:
            target = targets.load(name)
            facts |= {"open": True, "status": run_status(target), "runtime": target.runtime_version()}
            targets.load(name, lowering=True)
            facts["lower"] = True
        except SetupError as error:
            facts["needs"] = error.allowed
        except Exception as error:  # a plug-in or an SDK that breaks on import: say so, and go on to the next
            facts["needs"] = f"does not load: {type(error).__name__}: {str(error)[:200]}"
        found[name] = facts
    return found


def _sections(data: dict[str, Any]) -> list[Section]:
    disk = data["disk"]
    facts = {
        "Python": f"{data['python']} ({data['executable']})",
        "system": f"{data['system']}, {data['cores']} cores",
        "memory": f"{size(data['memory']['free_bytes'])} free of {size(data['memory']['bytes'])}",
        "disk": f"{size(disk['working_folder_free_bytes'])} free here",
        "cache": f"{disk['cache']}, {size(disk['cache_free_bytes'])} free",
        "torch": _torch_build()
        if find_spec("torch") is not None
        else "not installed: bundles draw, nothing is packaged",
    }
    targets = tuple(
        (name, _verb(t["open"], t["status"]), "yes" if t["lower"] else "no", t["runtime"], t["needs"])
        for name, t in data["targets"].items()
    )
    extras = tuple(
        (name, "yes" if e["installed"] else "no", ", ".join(e["missing"]), e["install"])
        for name, e in data["extras"].items()
    )
    packages = tuple((name, found) for name, found in data["packages"].items() if found is not None)
    return [
        Section("Machine", ("", ""), tuple(facts.items())),
        Section("Targets", ("target", "opens", "packages", "runtime", "needs"), targets),
        Section("Extras", ("extra", "installed", "missing", "install"), extras),
        Section("Packages", ("package", "version"), packages),
    ]


def _verb(opens: bool, status: str) -> str:
    return {"executed": "executes", "interpreted": "interprets"}.get(status, status) if opens else "no"


def _torch_build() -> str:
    """The version with its build (cpu, cu126, …), read without importing torch."""
    return _installed("torch") or "installed, no metadata"
