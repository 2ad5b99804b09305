"""edgesd beside the tools one would use instead, in one run: `make bench`, or by hand

    python benchmarks/bench.py peers WORK [--clear]        the peers' environment, about 1.5 GB from PyPI
    python benchmarks/bench.py measure WORK [--parts unet,picture,…] [--model sd15|small|tiny|shapes|FOLDER] [--hours 3]
    python benchmarks/bench.py report WORK [-o FOLDER]     tables (Markdown) and plots (PNG) of what is there

WORK keeps artefacts, the journal and bench.json. A run that is stopped goes on with the same command; other settings,
another machine or other versions want another WORK, since ratios hold within one run alone. Architectures have random
weights: figures of time and memory, never of quality.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import contenders as who
import measure as measuring
import psutil
import tables
from visits import PARTS, Journal, Visit, plan

from edgesd.errors import EdgesdError, RequestError, SetupError
from edgesd.files import locked, write_whole
from edgesd.recipe import parse_size

FORMAT = "edgesd-bench-1"
HERE = Path(__file__).resolve().parent
SIZES = {"small": (512, 512), "sd15": (512, 512), "tiny": (128, 128), "shapes": (128, 128)}
RANDOM = ("small", "sd15", "tiny")
LIBRARIES = (
    "torch", "diffusers", "transformers", "openvino", "openvino-genai", "optimum-intel", "nncf", "onnxruntime",
    "ai-edge-litert", "litert-torch", "numpy",
)  # fmt: skip
STOPPED = 75  # exit code of a run that has visits left
RESERVE_BYTES = 1 << 30  # of memory that stays for everything else


# ---- what is asked for -----------------------------------------------------------------------------------------


def model_folder(name: str, work: Path) -> Path:
    """The checkpoint in diffusers' layout: a published architecture (made once), the embedded one, or a folder."""
    if name == "shapes":
        from edgesd.models.load import embedded_folder

        return Path(embedded_folder())
    if name in RANDOM:
        folder = work / "models" / name
        if not (folder / "model_index.json").exists():
            script = str(HERE / "architectures.py")
            subprocess.run([sys.executable, script, name, str(folder)], check=True)
        return folder
    if not (Path(name) / "model_index.json").exists():
        raise RequestError(f"model {name!r}", f"{', '.join(SIZES)}, or a diffusers folder", "Change --model")
    return Path(name).resolve()


def settings_of(asked: argparse.Namespace, work: Path) -> dict[str, Any]:
    """All that figures depend on beside machine and versions: what WORK was begun with must stay."""
    folder = model_folder(asked.model, work)
    size_px = parse_size(asked.size_px) if asked.size_px is not None else SIZES.get(asked.model, (512, 512))
    height, width = size_px
    vae = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
    text = json.loads((folder / "text_encoder" / "config.json").read_text(encoding="utf-8"))
    blocks = vae.get("block_out_channels", vae.get("encoder_block_out_channels"))
    steps = [asked.steps, *who.CURVES["steps"]]
    return {
        "model": str(folder), "model_name": asked.model, "embedded": asked.model == "shapes",
        "weights": "random weights" if asked.model in RANDOM else "its own weights",
        "size_px": [width, height], "downscale": 2 ** (len(blocks) - 1), "tokens": text["max_position_embeddings"],
        "steps": asked.steps, "tables": f"{min(steps)}-{max(steps)}", "guidance": asked.guidance,
        "threads": cores() if asked.threads is None else asked.threads,
        "calls": asked.calls, "pictures": asked.pictures,
        "gate_db": asked.gate_db, "int8_seconds": asked.int8_seconds, "visit_hours": asked.visit_hours,
        "memory_bytes": psutil.virtual_memory().total - RESERVE_BYTES,
    }  # fmt: skip


def machine() -> dict[str, Any]:
    return {
        "processor": processor(), "cores": os.cpu_count(), "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.machine()}", "python": platform.python_version(),
    }  # fmt: skip


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else psutil.cpu_count()


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def versions(peers: str) -> dict[str, dict[str, str]]:
    """Libraries of both environments; an environment that is not there has none."""
    own = {name: found for name in LIBRARIES if (found := _version(name)) is not None}
    code = (
        "import json, importlib.metadata as m; names = {d.metadata['Name'].lower(): d.version for d in "
        f"m.distributions()}}; print(json.dumps({{n: names[n] for n in {LIBRARIES!r} if n in names}}))"
    )
    if not Path(peers).exists():
        return {"own": own, "peers": {}}
    told = subprocess.run([peers, "-c", code], capture_output=True, text=True, check=True).stdout
    return {"own": own, "peers": json.loads(told)}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def peers_python(work: Path) -> str:
    given = os.environ.get("EDGESD_BENCH_PEERS")  # an environment that is there already
    return str(Path(given if given is not None else work / "peers") / "bin" / "python")


def same_run(work: Path, facts: dict[str, Any]) -> None:
    """Writes down what WORK was begun with, or holds it against now; RequestError names what differs."""
    path = work / "facts.json"
    facts = json.loads(json.dumps(facts))
    if not path.exists():
        write_whole(path, json.dumps(facts, indent=1).encode())
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    if "peers" not in before["versions"] or not before["versions"]["peers"]:  # they came later
        before["versions"]["peers"] = facts["versions"]["peers"]
        write_whole(path, json.dumps(before, indent=1).encode())
    other = [f"{part}.{key}" for part in ("settings", "machine", "versions") for key in facts[part]
             if before[part].get(key) != facts[part][key] and key not in ("visit_hours", "memory_bytes")]  # fmt: skip
    if other:
        raise RequestError(f"{work} with another {', '.join(other)}", "what its run was begun with",
                           "Choose another WORK: ratios hold within one run alone")  # fmt: skip


# ---- the verbs -------------------------------------------------------------------------------------------------


def make_peers(work: Path) -> None:
    """A virtual environment in WORK/peers. torch first and by version, or pip may bring a CUDA build; see peers.txt."""
    folder = work / "peers"
    ready = folder / ".ready"
    wanted = (HERE / "peers.txt").read_text(encoding="utf-8")
    if ready.exists() and ready.read_text(encoding="utf-8") == wanted:
        return
    work.mkdir(parents=True, exist_ok=True)
    lines = [line for line in wanted.splitlines() if line and not line.startswith("#")]
    torch = next(line for line in lines if line.startswith("torch=="))
    python = str(folder / "bin" / "python")
    for command in (
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        [python, "-m", "pip", "install", "--quiet", torch],
        [python, "-m", "pip", "install", "--quiet", *lines[:-1]],
        [python, "-m", "pip", "install", "--quiet", "--no-deps", lines[-1]],
    ):
        if subprocess.run(command, check=False).returncode != 0:
            raise SetupError(
                f"the peers' environment: {' '.join(command[1:])} failed", "an install that finishes",
                "See pip's lines above; measure works without it, and the peers' rows say why they are empty",
            )  # fmt: skip
    ready.write_text(wanted, encoding="utf-8")


def measure(asked: argparse.Namespace) -> int:
    """Makes the visits that are left, and bench.json anew after each. STOPPED where time was up first."""
    work = asked.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    with locked(work / "journal"):
        pythons = {False: sys.executable, True: peers_python(work)}
        facts = {"settings": settings_of(asked, work), "machine": machine(), "versions": versions(pythons[True])}
        same_run(work, facts)
        journal = Journal(work / "visits.jsonl")
        visits = plan(asked.parts, asked.contenders, asked.rounds, facts["settings"])
        left, until = journal.left(visits, asked.retry), time.monotonic() + 3600 * asked.hours
        for count, visit in enumerate(left):
            if time.monotonic() > until:
                say(f"{len(left) - count} of {len(visits)} visits left: the same command goes on")
                return STOPPED
            say(f"{len(visits) - len(left) + count + 1}/{len(visits)} {visit.key}")
            result = measuring.run_visit(visit, facts["settings"], work, pythons)
            journal.add(visit, result | {"ended": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())})
            say("  " + outcome(visit, result))
            write(work, journal)
        write(work, journal)
    return 0


def write(work: Path, journal: Journal) -> None:
    """WORK/bench.json: the facts of the run, every visit, and what comes of them."""
    facts = json.loads((work / "facts.json").read_text(encoding="utf-8"))
    facts["settings"] = {key: value for key, value in facts["settings"].items() if key != "model"}  # where it lies here
    data = {"format": FORMAT, **facts, "visits": list(journal.lines.values())}
    data["rows"] = {part: tables.compared(data, part) for part in ("unet", "picture")}
    data |= {"packaged": tables.packaged(data), "curves": tables.curves(data), "goals": tables.goals(data)}
    write_whole(work / "bench.json", json.dumps(data, indent=1, allow_nan=False).encode())


def outcome(visit: Visit, result: dict[str, Any]) -> str:
    if "failed" in result:
        return f"did not run: {result['failed']}"
    taken = sorted(result.get("seconds", []))
    median = f"median {taken[len(taken) // 2]:.3f} s, " if taken else ""
    return f"{median}{result.get('wall_s', 0):.0f} s in all, peak {result.get('peak_bytes', 0) / 1e9:.2f} GB"


def report(asked: argparse.Namespace) -> int:
    """FOLDER/bench.md and its plots, from bench.json (a file, or WORK's)."""
    source = asked.work if asked.work.is_file() else asked.work / "bench.json"
    if not source.is_file():
        raise RequestError(f"no figures at {source}", "a bench.json", "Run benchmarks/bench.py measure first")
    data = json.loads(source.read_text(encoding="utf-8"))
    if data.get("format") != FORMAT:
        raise RequestError(f"format {data.get('format')!r}", FORMAT, "Measure anew with this version")
    import plots

    folder = asked.output if asked.output is not None else source.parent
    folder.mkdir(parents=True, exist_ok=True)
    made = plots.draw(data, folder)
    if asked.sustained:
        runs = [json.loads(path.read_text(encoding="utf-8")) for path in asked.sustained]
        made.append(plots.draw_sustained(runs, folder))
    pictures = "\n".join(f"![{path.stem}]({path.name})" for path in made)
    write_whole(folder / "bench.md", f"{tables.markdown(data)}\n{pictures}\n".encode())
    for path in (folder / "bench.md", *made):
        print(path)
    return 0


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _listed(allowed: Sequence[str]) -> Any:
    def parse(text: str) -> list[str]:
        names = [name for name in text.split(",") if name]
        for name in names:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(allowed)}")
        return names

    return parse


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = {name: verbs.add_parser(name) for name in ("peers", "measure", "report")}
    for each in verb.values():
        each.add_argument("work", type=Path)
    verb["report"].add_argument("-o", "--output", type=Path, help="folder for tables and plots; WORK if left out")
    told = "JSON of edgesd bench --sustained, to plot as well; repeatable"
    verb["report"].add_argument("--sustained", type=Path, action="append", default=[], help=told)
    add = verb["measure"].add_argument
    add("--parts", type=_listed(PARTS), default=list(PARTS), help=f"of {', '.join(PARTS)}; all if left out")
    add("--contenders", type=_listed(list(who.CONTENDERS)), default=list(who.CONTENDERS), help="all if left out")
    add("--model", default="sd15", help="sd15, small, tiny (random weights), shapes (embedded) or a diffusers folder")
    add("--size-px", help="such as 256 or 512x768 (width x height)")
    add("--steps", type=int, default=8, help="of a picture")
    add("--guidance", type=float, default=7.5)
    add("--rounds", type=int, default=3, help="turns of each contender")
    add("--calls", type=int, default=5, help="UNet calls of a turn, after one that warms up")
    add("--pictures", type=int, default=1, help="warm pictures of a turn")
    add("--threads", type=int, help="of every contender; all cores that this process may use if left out")
    add("--gate-db", type=float, help="gate of int8 bundles, where random weights miss the usual one")
    add("--int8-seconds", type=float, default=40.0, help="of the part int8, per target")
    add("--hours", type=float, default=1e6, help="begin no visit after so long")
    add("--visit-hours", type=float, default=8.0, help="a visit that takes longer has failed")
    add("--retry", action="store_true", help="make failed visits again")
    return parser


def main() -> int:
    asked = arguments().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the visit under way ends too
    try:
        if asked.verb == "peers":
            make_peers(asked.work.resolve())
            return 0
        return measure(asked) if asked.verb == "measure" else report(asked)
    except EdgesdError as error:
        say(f"bench: {error}")
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
