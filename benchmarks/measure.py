"""One visit: a fresh process, its answer, and the most memory that it and all it started held at once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import contenders as who
from visits import SCRIPTS, Visit

from edgesd.child import Watch

HERE = Path(__file__).resolve().parent
TAIL = 400
OVERWRITTEN = {"steps", "count", "size_px", "width"}  # what a visit's options may change


def end(group: int) -> None:
    """Ends a process that leads a group, and what it started."""
    with suppress(OSError):
        os.killpg(group, signal.SIGKILL)


def artefact_folder(work: Path, name: str, size_px: Any) -> Path:
    width, height = size_px
    return work / "artefacts" / f"{name}-{width}x{height}"


def make_job(visit: Visit, settings: dict[str, Any], work: Path, artefact: Path | None = None) -> dict[str, Any]:
    """What the worker reads: the settings, the contender's own, the visit's options, in this order."""
    making = visit.part in ("make", "package")
    one = who.ARTEFACTS[visit.name] if making else who.find(visit.name)
    options = {key: value for key, value in visit.options.items() if key in OVERWRITTEN}
    job = {**settings, "count": 1, "width": 1.0, **one.how, **options}
    job["kind"] = one.kind
    job["part"] = "make" if making else "picture" if visit.part == "scaling" else visit.part
    job["repeats"] = settings["pictures"] if job["part"] == "picture" else settings["calls"]
    name = visit.name if making else getattr(one, "artefact", "")
    if artefact is None and name:
        artefact = artefact_folder(work, name, job["size_px"])
    job["artefact"] = str(artefact) if artefact is not None else job["model"]
    return job


def run_visit(visit: Visit, settings: dict[str, Any], work: Path, pythons: dict[bool, str]) -> dict[str, Any]:
    """Measures one visit. pythons: interpreters, by whether it is the peers'. Never raises for what a contender does:
    its failure is a row that says why."""
    if visit.part in SCRIPTS:
        return _script(visit, settings, work, pythons[False])
    making = visit.part in ("make", "package")
    one = who.ARTEFACTS[visit.name] if making else who.find(visit.name)
    if not making and visit.part in ("unet", "picture") and visit.part not in one.parts:
        return {"failed": one.without}
    if not Path(pythons[one.peers]).exists():
        return {"failed": "the peers' environment is not there: python benchmarks/bench.py peers WORK"}
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        fresh = Path(scratch) / "artefact" if visit.part == "package" else None
        job = make_job(visit, settings, work, fresh)
        target = Path(job["artefact"])
        if visit.part == "make" and target.exists():
            return {"bytes": folder_bytes(target), "found": "it was there"}
        if not making and not target.exists():
            return {"failed": f"its artefact {target.name} is not there: see the row that makes it"}
        final, cache = target, work / "cache" if fresh is None else Path(scratch) / "cache"
        if visit.part == "make":  # a half-made one must not pass for whole
            target = Path(scratch) / "artefact"
            job["artefact"] = str(target)
        told = _process([pythons[one.peers], str(HERE / "worker.py")], job, Path(scratch), settings, cache)
        if "failed" not in told:
            told["bytes"] = folder_bytes(target)
            if visit.part == "make":
                final.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(target, final)
        return told


def _process(
    command: list[str], job: dict[str, Any], scratch: Path, settings: dict[str, Any], cache: Path
) -> dict[str, Any]:
    """Runs the worker; its answer with seconds and peak_bytes, or {"failed": why}."""
    path, log = scratch / "job.json", scratch / "log.txt"
    environment = os.environ | {
        "EDGESD_CACHE": str(cache), "OMP_NUM_THREADS": str(settings["threads"]), "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": "",
    }  # fmt: skip
    with log.open("wb") as out:
        began = time.monotonic()
        path.write_text(json.dumps(job | {"started": began}), encoding="utf-8")
        process = subprocess.Popen(
            [*command, str(path)], stdout=out, stderr=out, stdin=subprocess.DEVNULL, env=environment,
            start_new_session=True,
        )  # fmt: skip
        try:
            with Watch(process.pid, settings["memory_bytes"], whole_tree=True) as watch:
                process.wait(timeout=3600 * settings["visit_hours"])
        except subprocess.TimeoutExpired:
            return {"failed": f"not finished after {settings['visit_hours']:g} hours", "peak_bytes": watch.peak_bytes}
        finally:
            end(process.pid)  # Ctrl-C too: nothing goes on alone
            process.wait()
        seconds = time.monotonic() - began
    spent = {"wall_s": round(seconds, 3), "peak_bytes": watch.peak_bytes}
    if watch.over_limit:
        return {"failed": f"its memory went beyond {settings['memory_bytes'] / 1e9:.1f} GB", **spent}
    answer = path.with_suffix(".answer")
    if process.returncode != 0 or not answer.exists():
        return {"failed": why(log.read_text(errors="replace"), process.returncode), **spent}
    told = json.loads(answer.read_text(encoding="utf-8"))
    return {**told, "wall_s": spent["wall_s"], "peak_bytes": max(told["peak_bytes"], spent["peak_bytes"])}


def why(log: str, code: int) -> str:
    """The line of a log that says what went wrong: the last error's, else the last one."""
    lines = [line.strip() for line in log.splitlines() if line.strip() and not line.startswith("  ")]
    errors = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception")) or "edgesd:" in line]
    causes = [line for line in errors if not line.startswith("subprocess.CalledProcessError")]
    said = next(
        (found for found in (causes, errors, lines) if found), [f"ended with exit code {code} and said nothing"]
    )
    return said[-1][:TAIL]


def folder_bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


# ---- parts that are scripts ------------------------------------------------------------------------------------


def _script(visit: Visit, settings: dict[str, Any], work: Path, python: str) -> dict[str, Any]:
    """A benchmark that prints JSON itself."""
    threads = str(settings["threads"])
    if visit.part == "arithmetic":
        commands = [[str(HERE / "arithmetic.py"), "--threads", threads]]
    elif visit.part == "loop":
        commands = [[str(HERE / "loop_overhead.py")]]
    else:
        tool, folder = str(HERE / "int8_speed.py"), str(work / "int8")
        seconds = ["--seconds", str(settings["int8_seconds"]), "--threads", threads]
        commands = [
            [tool, "make", settings["model"], folder, visit.name], [tool, "time", folder, visit.name, *seconds]
        ]  # fmt: skip
    began, said = time.monotonic(), ""
    for command in commands:
        ran = subprocess.run([python, *command], capture_output=True, text=True, check=False)
        if ran.returncode != 0:
            return {"failed": why(ran.stderr, ran.returncode)}
        said = ran.stdout
    return {"wall_s": round(time.monotonic() - began, 3), "told": json.loads(said)}
