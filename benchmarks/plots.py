"""The PNG plots of a bench.json (matplotlib): bars with their spread, curves, and sustained runs over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import contenders as who
import matplotlib
import tables

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OURS, THEIRS = "#2b6cb0", "#b7791f"
LABELS = {"size_px": "side of the picture, px", "steps": "steps", "count": "pictures of one prompt", "width": "width"}


def draw(data: dict[str, Any], folder: Path) -> list[Path]:
    """Draws what the JSON has figures for; the files, in the order of the report."""
    made = []
    for part in ("unet", "picture"):
        rows = [row for row in tables.compared(data, part) if "failed" not in row]
        if rows:
            made.append(_save(folder / f"bench_{part}.png", _bars(rows, part)))
    points = [row for row in tables.curves(data) if "failed" not in row]
    if points:
        made.append(_save(folder / "bench_scaling.png", _curves(points)))
    pairs = [row for row in tables.packaged(data) if row["time_ratio"] is not None]
    if pairs:
        made.append(_save(folder / "bench_package.png", _pairs(pairs)))
    return made


def _save(path: Path, figure: Any) -> Path:
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return path


def _horizontal(axis: Any, rows: Sequence[dict[str, Any]], figure: str, scale: float, label: str) -> None:
    """A bar a row, the median, with a line from least to most."""
    for y, row in enumerate(rows):
        found = {key: row[figure][key] * scale for key in ("median", "min", "max")}
        axis.barh(y, found["median"], color=OURS if row["ours"] else THEIRS)
        axis.plot([found["min"], found["max"]], [y, y], color="black", linewidth=1.5)
        axis.text(found["max"], y, f"  {found['median']:.3g}", va="center", fontsize=8)
    axis.set_yticks(range(len(rows)), [row["about"] for row in rows], fontsize=8)
    if not axis.yaxis_inverted():  # shared: once for all
        axis.invert_yaxis()
    axis.set_xlabel(label)
    axis.margins(x=0.15)
    axis.spines[["top", "right"]].set_visible(False)


def _bars(rows: Sequence[dict[str, Any]], part: str) -> Any:
    columns = [("seconds", 1.0, "seconds a UNet call" if part == "unet" else "seconds a picture, warm")]
    columns += [("cold_s", 1.0, "seconds from start to the first picture")] if part == "picture" else []
    columns += [("peak_bytes", 1e-9, "peak memory of the process, GB")]
    size = (1 + 5 * len(columns), 1.2 + 0.32 * len(rows))
    figure, axes = plt.subplots(1, len(columns), figsize=size, layout="constrained", sharey=True)
    for axis, column in zip(axes, columns, strict=True):
        _horizontal(axis, rows, *column)
    figure.suptitle("least to most as a line; blue: edgesd", fontsize=9)
    return figure


def _curves(points: Sequence[dict[str, Any]]) -> Any:
    axes_of = list(dict.fromkeys(p["axis"] for p in points))
    names = list(dict.fromkeys(p["name"] for p in points))
    figure, grid = plt.subplots(2, len(axes_of), figsize=(1 + 4 * len(axes_of), 6), layout="constrained", squeeze=False)
    for column, name in enumerate(axes_of):
        for figure_of, scale, label, axis in (
            ("seconds", 1.0, "seconds", grid[0][column]), ("peak_bytes", 1e-9, "peak memory, GB", grid[1][column]),
        ):  # fmt: skip
            for contender in dict.fromkeys(p["name"] for p in points if p["axis"] == name):
                line = [p for p in points if (p["axis"], p["name"]) == (name, contender)]
                line.sort(key=lambda p: _position(p["value"]))
                x = [_position(p["value"]) for p in line]
                y = [[p[figure_of][key] * scale for p in line] for key in ("median", "min", "max")]
                color = f"C{names.index(contender)}"
                axis.plot(x, y[0], marker="o", color=color, label=who.find(contender).about)
                axis.fill_between(x, y[1], y[2], color=color, alpha=0.2)
            axis.set_xlabel(LABELS[name])
            axis.set_ylabel(label)
            axis.set_ylim(bottom=0)
            axis.margins(y=0.15)
        grid[1][column].legend(fontsize=7, loc="lower right")
    return figure


def _position(value: Any) -> float:
    """Where a point stands on its axis; a size by its longer side."""
    return float(max(value)) if isinstance(value, list) else float(value)


def _pairs(pairs: Sequence[dict[str, Any]]) -> Any:
    figure, axes = plt.subplots(1, 2, figsize=(11, 1.4 + 0.7 * len(pairs)), layout="constrained", sharey=True)
    for axis, figure_of, scale, label in (
        (axes[0], "s", 1 / 60, "minutes"), (axes[1], "bytes", 1e-9, "peak memory, GB"),
    ):  # fmt: skip
        rows = [
            {"ours": side == "ours", "about": pair[side], "value": pair[f"{side}_{figure_of}"]}
            for pair in pairs for side in ("theirs", "ours")
        ]  # fmt: skip
        _horizontal(axis, rows, "value", scale, label)
    return figure


def draw_sustained(runs: Sequence[dict[str, Any]], folder: Path) -> Path:
    """Seconds a step over time of runs by `edgesd bench --sustained` (or an app), and below it what gauges told."""
    figure, axes = plt.subplots(3, 1, figsize=(8, 8), layout="constrained", sharex=True)
    gauges = (("seconds_per_step", 1.0, "seconds a step"), ("celsius", 1.0, "hottest zone, °C"),
              ("battery", 100.0, "battery, %"))  # fmt: skip
    for axis, (name, scale, label) in zip(axes, gauges, strict=True):
        for run in runs:
            told = [(s["at_s"] / 60, s[name] * scale) for s in run["samples"] if s[name] is not None]
            axis.plot([x for x, _ in told], [y for _, y in told], label=f"{run['bundle']}, {run['device']}")
        axis.set_ylabel(label)
    axes[0].set_ylim(bottom=0)
    axes[0].legend(fontsize=8)
    axes[-1].set_xlabel("minutes")
    return _save(folder / "bench_sustained.png", figure)
