"""Pictures of policies and simulations, by matplotlib, which is loaded here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgesd.errors import RequestError, SetupError
from edgesd.files import write_whole
from edgesd.runtime.device import THERMAL, DeviceState
from edgesd.runtime.policy import Policy, cost, point

if TYPE_CHECKING:
    from edgesd.playing import Drawn
    from edgesd.simulate import Outcomes

CHARGES = tuple((i + 0.5) / 200 for i in range(200))


def draw_policy(policy: Policy, path: Path) -> None:
    """What a policy gives, as a PNG: battery across, heat upwards, running down and charging; colour is UNet work."""
    plt = _pyplot(path)
    figure, panels = plt.subplots(1, 2, figsize=(11, 3.6), sharey=True, layout="constrained")
    worst = max(cost(row.then) for row in policy.rows)
    for axes, charging in zip(panels, (False, True), strict=True):
        states = [[DeviceState(b, charging, thermal=heat) for b in CHARGES] for heat in THERMAL]  # type: ignore[arg-type]
        rows = [[policy.match(point(state)[0]) for state in line] for line in states]
        work = [[cost(row.then) if row is not None else 0.0 for row in line] for line in rows]
        axes.imshow(work, origin="lower", aspect="auto", vmin=0, vmax=worst, extent=(0, 100, -0.5, len(rows) - 0.5))
        for level, line in enumerate(rows):
            for start, stop in _spans(line):
                then = line[start].then  # type: ignore[union-attr]
                words = f"{then.steps} steps\nwidth {then.width:g}" + (f"\nrest {then.cool_down_s:g} s"
                                                                      if then.cool_down_s else "")  # fmt: skip
                middle = 100 * (CHARGES[start] + CHARGES[stop]) / 2
                axes.text(middle, level, words, ha="center", va="center", fontsize=7,
                          color="black" if cost(then) > worst / 2 else "white")  # fmt: skip
        axes.set(title="charging" if charging else "running down", xlabel="battery, %")
        axes.set_yticks(range(len(THERMAL)), THERMAL)
    figure.suptitle(f"{policy.name}: {policy.about}", fontsize=9)
    _save(plt, figure, path)


def draw_simulation(results: Mapping[str, Sequence[Outcomes]], trace: str, path: Path) -> None:
    """Temperature, battery, seconds per picture, steps and width over time, as a PNG; one column a device class."""
    plt = _pyplot(path)
    parts: dict[str, Callable[[Drawn], float]] = {
        "skin, °C": lambda d: d.skin_c, "battery, %": lambda d: 100 * d.battery, "s per picture": lambda d: d.seconds,
        "steps run": lambda d: d.ran.steps, "width, mean": lambda d: d.ran.mean_width,
    }  # fmt: skip
    figure, panels = plt.subplots(
        len(parts), len(results), figsize=(4.6 * len(results), 9), sharex="col", squeeze=False, layout="constrained"
    )
    for column, (device, outcomes) in enumerate(results.items()):
        for line, (title, value) in enumerate(parts.items()):
            axes = panels[line][column]
            for o in outcomes:
                dashed = "--" if o.name.startswith("fixed") else "-"
                axes.plot([d.ready_s / 60 for d in o.drawn], [value(d) for d in o.drawn], dashed, marker=".",
                          markersize=3, label=o.name)  # fmt: skip
            axes.set_ylabel(title if column == 0 else "")
        panels[0][column].set_title(device)
        panels[-1][column].set_xlabel("minutes")
    handles, names = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncol=5, fontsize=8)
    figure.suptitle(f"trace {trace}")
    _save(plt, figure, path)


def _spans(line: Sequence[Any]) -> list[tuple[int, int]]:
    """(first, last) of runs of equal rows' outcomes."""
    spans, start = [], 0
    for i in range(1, len(line) + 1):
        if i == len(line) or line[i].then != line[start].then:
            spans.append((start, i - 1))
            start = i
    return spans


def _pyplot(path: Path) -> Any:
    """matplotlib without a window. SetupError where it is missing, RequestError for a path that cannot be written."""
    if path.suffix.lower() != ".png" or not path.parent.is_dir():
        raise RequestError(f"a chart at {path.name!r}", "a name that ends in .png in an existing folder", "Change -o")
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise SetupError("a chart needs matplotlib, not installed here", "tables and --json work without it",
                         'Run pip install "edgesd[plot]"') from None  # fmt: skip
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(plt: Any, figure: Any, path: Path) -> None:
    """In a palette, which is all that a chart needs: a third of the bytes."""
    from io import BytesIO

    from PIL import Image

    drawn, packed = BytesIO(), BytesIO()
    figure.savefig(drawn, format="png", dpi=110)
    plt.close(figure)
    Image.open(drawn).convert("RGB").quantize(256).save(packed, "PNG", optimize=True)
    write_whole(path, packed.getvalue())
