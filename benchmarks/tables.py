"""Tables, plots and verdicts from the one JSON that `bench.py measure` writes. Nothing is measured here.

A figure is the median of all calls of all rounds, with the smallest and the largest; a ratio is made within a round, of
that round's medians, and its spread is that of the rounds. A contender that did not run keeps its row, with the reason.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import contenders as who

from edgesd.sheet import size
from edgesd.timing import spread

Row = dict[str, Any]
Spread = dict[str, Any]


def entries(data: Row, part: str, name: str, **options: Any) -> list[Row]:
    """The visits of one contender, by round. options: exactly those, as JSON has them."""
    found = [v for v in data["visits"] if (v["part"], v["name"], v["options"]) == (part, name, options)]
    return sorted(found, key=lambda v: v["round"])


def done(visits: Sequence[Row]) -> list[Row]:
    return [v for v in visits if "failed" not in v]


def timed(visit: Row) -> list[float]:
    """Seconds of its calls or pictures; of the first one where no more were asked for."""
    return visit["seconds"] if visit["seconds"] else [visit["first_s"]]


def spread_of(values: Sequence[float]) -> Spread | None:
    return spread(values).to_json() if values else None


def compared(data: Row, part: str) -> list[Row]:
    """One row a contender of `unet` or `picture`, the slowest first; behind them what did not run."""
    names = dict.fromkeys(v["name"] for v in data["visits"] if v["part"] == part)
    rows = [_row(data, part, name) for name in names]
    return sorted(rows, key=lambda row: -row["seconds"]["median"] if "seconds" in row else 0.0)


def _row(data: Row, part: str, name: str) -> Row:
    visits = entries(data, part, name)
    ran = done(visits)
    row: Row = {"name": name, "about": who.find(name).about, "ours": who.find(name).ours, "rounds": len(ran)}
    if not ran:
        return row | {"failed": _reason(data, name, visits)}
    return row | {
        "seconds": spread_of([s for v in ran for s in timed(v)]),
        "cold_s": spread_of([v["cold_s"] for v in ran]),
        "load_s": spread_of([v["load_s"] for v in ran]),
        "peak_bytes": spread_of([v["peak_bytes"] for v in ran]),
        "bytes": ran[-1]["bytes"],
        "ratio": ratio(entries(data, part, who.BASE), visits),
        "macs": ran[-1].get("macs"),
    }


def _reason(data: Row, name: str, visits: Sequence[Row]) -> str:
    """Why it did not run; where its artefact was not made, why not."""
    artefact = who.find(name).artefact
    made = entries(data, "make", artefact)
    if made and "failed" in made[-1]:
        return f"{artefact} was not made: {made[-1]['failed']}"
    return visits[-1]["failed"] if visits else "not reached yet"


def ratio(base: Sequence[Row], other: Sequence[Row], figure: Callable[[Row], float] | None = None) -> Spread | None:
    """How many times less `other` takes than `base`, of rounds that both were in. figure: of a visit; its median call
    if None."""

    of = (lambda visit: statistics.median(timed(visit))) if figure is None else figure
    by_round = {v["round"]: of(v) for v in done(base)}
    found = [by_round[v["round"]] / of(v) for v in done(other) if v["round"] in by_round]
    return spread_of(found)


def packaged(data: Row) -> list[Row]:
    """One row a pair of `package`: seconds and peak memory of both, and how many times less edgesd takes."""
    rows = []
    for theirs, ours in who.PACKAGED:
        both = [entries(data, "package", name) for name in (theirs, ours)]
        if not any(both):
            continue
        row: Row = {"theirs": theirs, "ours": ours}
        for side, visits in zip(("theirs", "ours"), both, strict=True):
            ran = done(visits)
            row[f"{side}_s"] = spread_of([v["wall_s"] for v in ran])
            row[f"{side}_bytes"] = spread_of([v["peak_bytes"] for v in ran])
            if not ran:
                row[f"{side}_failed"] = visits[-1]["failed"] if visits else "not reached yet"
        row["time_ratio"] = ratio(*both, figure=lambda v: v["wall_s"])
        row["memory_ratio"] = ratio(*both, figure=lambda v: v["peak_bytes"])
        rows.append(row)
    return rows


def curves(data: Row) -> list[Row]:
    """Points of `scaling`: axis, value, contender, seconds of a warm picture (all its pictures), peak memory."""
    rows = []
    seen = dict.fromkeys((v["name"], _frozen(v["options"])) for v in data["visits"] if v["part"] == "scaling")
    for name, options in seen:
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in options}
        ran = done(entries(data, "scaling", name, **plain))
        # A visit without options is the point of every curve that the settings themselves are on.
        for axis, value in (plain if plain else {"size_px": data["settings"]["size_px"]}).items():
            row: Row = {"axis": axis, "value": value, "name": name, "rounds": len(ran)}
            if ran:
                row["seconds"] = spread_of([s for v in ran for s in timed(v)])
                row["peak_bytes"] = spread_of([v["peak_bytes"] for v in ran])
            else:
                row["failed"] = entries(data, "scaling", name, **plain)[-1]["failed"]
            rows.append(row)
    return rows


def _frozen(options: Row) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted((k, tuple(v) if isinstance(v, list) else v) for k, v in options.items()))


# ---- the goals -------------------------------------------------------------------------------------------------


def goals(data: Row) -> list[Row]:
    """What edgesd set out for: wanted, figure (None = not measured), verdict. Goals are for SD 1.5's shapes: a run of
    another model has none. The one of a picture's memory is for 512 px alone."""
    if data["settings"]["model_name"] != "sd15":
        return []
    pruned, hybrid = entries(data, "unet", "edgesd-openvino-int8-p25"), entries(data, "unet", "optimum-hybrid")
    said = [
        _goal("int8 + 25 % pruned against diffusers float32, per UNet call", 8.0, "x",
              ratio(entries(data, "unet", who.BASE), pruned)),
        _goal("int8 + 25 % pruned against optimum-intel hybrid, per UNet call", 1.3, "x", ratio(hybrid, pruned)),
        _goal("share of the machine's int8 arithmetic, UNet call", 0.7, "share", _int8_share(data)),
    ]  # fmt: skip
    if data["settings"]["size_px"] == [512, 512]:
        frugal = done(entries(data, "picture", "edgesd-openvino-frugal"))
        peak = spread_of([v["peak_bytes"] / 1e9 for v in frugal])
        said.append(_goal("GB at most for a picture, components loaded one at a time", 1.2, "GB", peak, most=True))
    for row in packaged(data):
        label = f"packaging, {row['ours']} against {row['theirs']}"
        said.append(_goal(f"{label}: time", 2.0, "x", row["time_ratio"]))
        said.append(_goal(f"{label}: peak memory", 2.0, "x", row["memory_ratio"]))
    return said


def _int8_share(data: Row) -> Spread | None:
    """Operations of the int8 UNet a second, all its MACs, over the machine's int8 limit of the same run."""
    limits = [v["told"]["limit_gops"].get("int8") for v in done(entries(data, "arithmetic", "arithmetic"))]
    known = [x for x in limits if x]
    ran = [v for v in done(entries(data, "unet", "edgesd-openvino-int8-native")) if v.get("macs")]
    if not known or not ran:
        return None
    top = statistics.median(known) * 1e9
    return spread_of([2 * v["macs"] / s / top for v in ran for s in v["seconds"]])


def _goal(what: str, wanted: float, unit: str, figure: Spread | None, most: bool = False) -> Row:
    met = None if figure is None else (figure["median"] <= wanted if most else figure["median"] >= wanted)
    verdict = {None: "not measured", True: "met", False: "not met"}[met]
    return {"what": what, "wanted": wanted, "unit": unit, "at_most": most, "figure": figure, "verdict": verdict}


# ---- Markdown --------------------------------------------------------------------------------------------------


def markdown(data: Row) -> str:
    """The whole report, one table a part that has visits."""
    machine, settings = data["machine"], data["settings"]
    shown = "x".join(map(str, settings["size_px"]))
    lines = [
        f"Model {settings['model_name']} ({settings['weights']}), {shown} px, {settings['steps']} steps of Euler with "
        f"guidance {settings['guidance']:g}, {settings['threads']} threads.",
        f"{machine['processor']}, {machine['cores']} cores, {size(machine['memory_bytes'])}, {machine['system']}.",
        "Median (least to most). Every contender in a process of its own, taking turns; ratios within a round.", "",
    ]  # fmt: skip
    for part, title, what in (("unet", "A UNet call, batch 1", "a call"), ("picture", "A picture", "a picture")):
        rows = compared(data, part)
        if rows:
            lines += [f"## {title}", "", *_compared(rows, what), ""]
    for title, made in (("Packaging", _packaged(data)), ("Curves", _curves(data)), ("Arithmetic", _limits(data)),
                        ("Where a UNet call's time goes", _profiles(data)),
                        ("Scripts", _scripts(data)), ("Goals", _goals(data))):  # fmt: skip
        if made:
            lines += [f"## {title}", "", *made, ""]
    return "\n".join(lines)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table; a bar inside a cell would end it."""
    lines = [columns, ["---"] * len(columns), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines]


def shown(figure: Spread | None, how: Callable[[float], str] = "{:.3g}".format) -> str:
    if figure is None:
        return ""
    low, high = how(figure["min"]), how(figure["max"])
    return how(figure["median"]) + ("" if low == high else f" ({low} to {high})")


def _seconds(x: float) -> str:
    return f"{x * 1000:.1f} ms" if x < 1 else f"{x:.2f} s"


def _bytes(x: float) -> str:
    return size(int(x))


def _compared(rows: Sequence[Row], what: str) -> list[str]:
    cells = []
    for r in rows:
        if "failed" in r:
            cells.append([r["about"], f"did not run: {r['failed']}", "", "", "", "", "0"])
            continue
        cells.append([
            r["about"], shown(r["seconds"], _seconds), shown(r["ratio"], "{:.2f} x".format),
            shown(r["cold_s"], _seconds), shown(r["peak_bytes"], _bytes), size(r["bytes"]), str(r["rounds"]),
        ])  # fmt: skip
    head = ("", what, f"times faster than {who.CONTENDERS[who.BASE].about}", "cold start to the first", "peak memory",
            "on disk", "rounds")  # fmt: skip
    return table(head, cells)


def _packaged(data: Row) -> list[str]:
    def side(row: Row, which: str) -> str:
        if f"{which}_failed" in row:
            return f"did not run: {row[f'{which}_failed']}"
        return f"{shown(row[f'{which}_s'], _seconds)}; {shown(row[f'{which}_bytes'], _bytes)}"

    rows = [
        [r["theirs"], side(r, "theirs"), r["ours"], side(r, "ours"),
         shown(r["time_ratio"], "{:.2f} x".format), shown(r["memory_ratio"], "{:.2f} x".format)]
        for r in packaged(data)
    ]  # fmt: skip
    head = ("theirs", "time; peak memory", "edgesd's", "time; peak memory", "less time", "less memory")
    note = ["", "edgesd's time holds what the others leave out: tables, the float32 truth, every artefact run against "
            "it, a picture."]  # fmt: skip
    return table(head, rows) + note if rows else []


def _curves(data: Row) -> list[str]:
    rows = [
        [r["axis"], "x".join(map(str, r["value"])) if isinstance(r["value"], list) else f"{r['value']:g}",
         who.find(r["name"]).about,
         f"did not run: {r['failed']}" if "failed" in r else shown(r["seconds"], _seconds),
         "" if "failed" in r else shown(r["peak_bytes"], _bytes)]
        for r in curves(data)
    ]  # fmt: skip
    return table(("axis", "value", "", "time", "peak memory"), rows) if rows else []


def _limits(data: Row) -> list[str]:
    visits = entries(data, "arithmetic", "arithmetic")
    ran = done(visits)
    if not visits:
        return []
    kinds = ("f32", "bf16", "int8")
    rows = []
    for kind in kinds:
        known = [v["told"]["limit_gops"][kind] for v in ran if kind in v["told"]["limit_gops"]]
        rows.append([kind, shown(spread_of(known), "{:.0f}".format) if known else "no kernel of that type here"])
    return table(("type", "best, 10⁹ operations/s"), rows) if ran else [f"did not run: {visits[-1]['failed']}"]


def _profiles(data: Row) -> list[str]:
    """The ten dearest kinds of layer of each contender that was profiled."""
    names = dict.fromkeys(v["name"] for v in data["visits"] if v["part"] == "profile")
    rows = []
    for name in names:
        about, visits = who.find(name).about, entries(data, "profile", name)
        ran = done(visits)
        if not ran:
            rows.append([about, f"did not run: {visits[-1]['failed']}", "", "", ""])
            continue
        for kind in ran[0]["told"]["kinds"][:10]:
            rows.append([about, kind["kind"], kind["type"], str(kind["layers"]), f"{kind['share']:.1%}"])
    return table(("", "layer", "type", "layers", "share of the time"), rows) if rows else []


def _scripts(data: Row) -> list[str]:
    rows = []
    for v in data["visits"]:
        if v["part"] == "int8":
            told = v.get("told", [{}])[0]
            said = (
                v["failed"]
                if "failed" in v
                else (f"{told['fp32_seconds']:.3f} s fp32, {told['int8_seconds']:.3f} s int8: {told['ratio']:.2f} x")
            )
            rows.append([f"int8_speed, {v['name']}, round {v['round']}", said])
        elif v["part"] == "loop":
            said = v["failed"] if "failed" in v else f"{v['told']['step_ms']} ms a step outside the UNet"
            rows.append([f"loop_overhead, round {v['round']}", said])
    return table(("script", "said"), rows) if rows else []


def _goals(data: Row) -> list[str]:
    rows = [
        [g["what"], f"{'≤' if g['at_most'] else '≥'} {g['wanted']:g} {g['unit']}",
         shown(g["figure"], "{:.2f}".format), g["verdict"]]
        for g in goals(data)
    ]  # fmt: skip
    return table(("goal", "wanted", "measured", "verdict"), rows) if rows else []
