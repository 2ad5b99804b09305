"""UNets in a browser: fp32 against int8 with one thread and two, in one run. JSON on stdout, a table on stderr.

    python benchmarks/web.py FOLDER... [--seconds 30] [--threads 2]

FOLDER: an onnx-web bundle that holds both precisions, or a pair FP32,INT8 of folders with a UNet and a manifest.json
each (`benchmarks/int8_speed.py make` writes such for a UNet of 215 M parameters). Per model and thread count both are
opened in one page and called in turn, so both see the same machine; `open` is bytes at hand to a session that is ready,
`first` its first call, `call` the median of the rest. Needs Node.js, Debian's chromium (or CHROMIUM=…) and the built
page (`make web`). One precision alone, where a bundle has no other, is timed all the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from edgesd import serve
from edgesd.manifest import parse

WEB = Path(__file__).resolve().parent.parent / "web_demo"
PRECISIONS = ("fp32", "int8")
THREADS = (1, 2)


def models(spec: str) -> list[tuple[str, Path]]:
    """(precision, folder) of what is to be compared."""
    if "," in spec:
        return list(zip(PRECISIONS, map(Path, spec.split(",")), strict=True))
    folder = Path(spec)
    variants = parse((folder / "manifest.json").read_bytes()).component("unet").variants
    return [(p, folder) for p in PRECISIONS if any(v.axes.precision == p for v in variants)]


class Folders(serve.Site):
    """The page and several folders, at bundle/0/, bundle/1/ …; nothing is checked: folders for speed lack hashes."""

    def __init__(self, page: Path, folders: list[Path]) -> None:
        super().__init__(page, page, frozenset())
        object.__setattr__(self, "folders", [folder.resolve() for folder in folders])

    def find(self, target: str) -> Path | None:
        parts = target.split("?")[0].strip("/").split("/")
        if parts[0] != serve.PAGE:
            return super().find(target)
        return self.folders[int(parts[1])].joinpath(*parts[2:])  # type: ignore[attr-defined]


def measure(spec: str, seconds: float, threads: tuple[int, ...] = THREADS) -> list[dict[str, Any]]:
    """One row per thread count."""
    compared = models(spec)
    running = serve.server(Folders(serve.page_folder(), [folder for _, folder in compared]), port=0)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    page = serve.address(running)
    listed = [
        {"name": precision, "address": f"{page}{serve.PAGE}/{number}/", "precision": precision}
        for number, (precision, _) in enumerate(compared)
    ]
    jobs = [{"models": listed, "form": "wasm", "threads": count, "seconds": seconds} for count in threads]
    asked = json.dumps({"page": page, "jobs": jobs})
    made = subprocess.run(
        ["node", "scripts/bench.mjs"], cwd=WEB, input=asked, capture_output=True, text=True, check=False
    )
    running.shutdown()
    if made.returncode != 0:
        raise SystemExit(made.stderr)
    found = json.loads(made.stdout)
    return [row(spec, found["browser"], result) for result in found["results"]]


def row(spec: str, browser: str, result: dict[str, Any]) -> dict[str, Any]:
    """Medians, and the ratio of calls made one after the other."""
    calls = result["calls"]
    told = {"model": spec, "browser": browser, "threads": result["threads"], "calls": len(next(iter(calls.values())))}
    for name, times in calls.items():
        told[name] = {"open": round(result["open"][name], 3), "first": round(result["first"][name], 3),
                      "call": round(statistics.median(times), 4)}  # fmt: skip
    if len(calls) == 2:
        ratios = [a / b for a, b in zip(calls["fp32"], calls["int8"], strict=True)]
        told |= {
            "ratio": round(statistics.median(ratios), 3),
            "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        }
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="+")
    parser.add_argument("--seconds", type=float, default=30.0, help="per model and thread count")
    parser.add_argument("--threads", type=int, action="append", help="repeatable; 1 and 2 if left out")
    asked = parser.parse_args()
    threads = THREADS if asked.threads is None else tuple(asked.threads)
    rows = [one for spec in asked.folder for one in measure(spec, asked.seconds, threads)]
    for one in rows:
        timed = "  ".join(
            f"{p} {one[p]['call'] * 1000:8.1f} ms (open {one[p]['open']:.2f} s)" for p in PRECISIONS if p in one
        )
        name = Path(one["model"].split(",")[0]).name
        print(f"{name:28} {one['threads']} threads  {timed}  ratio {one.get('ratio', '-')}", file=sys.stderr)
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
