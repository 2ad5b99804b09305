"""What int8 costs in quality: the embedded model's alignment, pictures and single steps, by way of quantizing.

python benchmarks/quantization.py draw WORK [--captions N] [--only NAME …]   quantizes, then draws N captions with each
python benchmarks/quantization.py report WORK                                docs/quantization.json, a sheet, a table

WORK keeps what was made, and may be that of `pruning.py`, whose float pictures then serve both: a stopped run goes on
(`paired.py`). All variants run in OpenVINO's integer kernels but dynamic int8, which is onnxruntime's; the rest is
float32. nncf is the opponent, on the same calls: `nncf.quantize` for transformers, and Intel's hybrid recipe (weights
of linears, then convolutions).
"""

from __future__ import annotations

import json
import time
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import paired
from paired import FLOAT

from edgesd.files import write_whole
from edgesd.runtime.image import contact_sheet, save_png
from edgesd.runtime.session import Watched
from edgesd.shapes.world import held_out_captions

ROWS, CALLS, LEVELS = 2 * paired.TOGETHER, 96, 10
GATE_DB, PRUNED = 32.0, 0.25
VARIANTS: dict[str, dict[str, Any]] = {
    "float": {},
    "int8": {"precision": "int8"},
    "int8, outputs too": {"precision": "int8", "outputs": ("conv", "linear")},
    "nncf": {"engine": "nncf"},
    "pruned 25%": {"prune": PRUNED},
    "pruned 25% + int8": {"prune": PRUNED, "precision": "int8"},
    "hybrid": {"precision": "hybrid"},
    "nncf hybrid": {"engine": "nncf hybrid"},
    "w8": {"precision": "w8"},
    "dynamic int8": {"engine": "onnxruntime dynamic"},
}
SHEET = ("float", "int8", "pruned 25%", "pruned 25% + int8")


@lru_cache(maxsize=2)
def modules(work: Path, prune: float | None) -> dict[str, Any]:
    """The model's parts; with the UNet pruned once and kept."""
    model = paired.embedded()
    if prune is None:
        return model.modules
    from edgesd.compress.prune import prune as cut
    from edgesd.models.load import load

    folder = work / f"pruned-{prune:g}"
    if not folder.exists():
        cut(model, prune, paired.calibration(work).calls("unet"), folder)
    return load(str(folder)).modules


def component(work: Path, prune: float | None, batch: int = ROWS) -> Any:
    from edgesd.manifest import Axes
    from edgesd.models.modules import build

    spec = paired.embedded().spec
    return build("unet", modules(work, prune), spec, Axes(size_px=spec.defaults.size_px, batch=batch))


def calls(work: Path, seen: bool = True) -> list[Any]:
    """Calibration calls, or held-out ones."""
    from edgesd.compress.calls import batches

    recorded = paired.calibration(work).calls("unet", CALLS) if seen else None
    return batches("unet", recorded, paired.embedded().spec) if recorded is not None else paired.held_out(work)


def planned(work: Path, how: dict[str, Any]) -> tuple[Any, Any]:
    """(component with the plan's weights, plan) of a variant that edgesd quantizes; the plan is kept."""
    import torch

    from edgesd.compress.quantize import QuantPlan, adjusted
    from edgesd.compress.quantizing import quantize

    prune = how.get("prune")
    file = work / f"plan-{how['precision']}-{prune}.pt"
    whole = component(work, prune)
    if not file.is_file():
        made = quantize(
            whole, calls(work), how["precision"], source_sha256=paired.embedded().sha256, calibration=f"{CALLS} calls",
            gate_db=GATE_DB,
        )  # fmt: skip
        torch.save({"plan": made.plan.model_dump_json(), "tensors": made.tensors}, file)
    kept = torch.load(file, weights_only=True)
    return adjusted(whole, kept["tensors"]), QuantPlan.parse(kept["plan"])


def convert(whole: Any) -> Any:
    """An OpenVINO model of a component, static shapes, inputs by name."""
    from edgesd.targets import openvino

    return openvino._convert(whole)


def made(work: Path, name: str) -> Path:
    """The folder of a variant: its graph and facts, made now if they are not there."""
    return paired.made(work, name, partial(_make, work, name))


def _make(work: Path, name: str, folder: Path) -> dict[str, Any]:
    import openvino as ov

    how, began = VARIANTS[name], time.perf_counter()
    facts: dict[str, Any] = {"how": how}
    if how.get("engine") == "onnxruntime dynamic":
        graph = _dynamic(component(work, None), folder)
    elif "precision" in how:
        from edgesd.compress.quantize import quantized

        whole, plan = planned(work, how)
        graph = convert(quantized(whole, plan, "unfolded", how.get("outputs", ())))
        facts |= {"int8_macs": round(plan.share_int8(), 4), "simulated_db": plan.snr_db}
    else:
        graph = convert(component(work, how.get("prune")))
        if "engine" in how:
            graph = _nncf(graph, calls(work), how["engine"])
    if graph is not None:
        ov.save_model(graph, folder / "unet.xml", compress_to_fp16=False)
    facts["bytes"] = sum(p.stat().st_size for p in folder.glob("unet.*"))
    facts["seconds"] = round(time.perf_counter() - began, 1)
    return facts | {"levels_db": one_step(work, folder) if how else None}


def _nncf(graph: Any, lots: list[Any], engine: str) -> Any:
    """nncf's own quantization of the float graph on the same calls, as rows enough for its static batch."""
    import nncf

    rows = {name: np.concatenate([lot.inputs[name].numpy() for lot in lots]) for name in lots[0].inputs}
    count = len(rows["sample"]) // ROWS
    feeds = [
        {name: x[i::count][:ROWS] if name != "timestep" else x[i : i + 1] for name, x in rows.items()}
        for i in range(count)
    ]
    # The graph takes one timestep a call: rows of that timestep, repeated where they are too few.
    for feed in feeds:
        same = np.flatnonzero(np.isclose(rows["timestep"], feed["timestep"][0]))
        chosen = same[np.arange(ROWS) % len(same)]
        feed |= {name: x[chosen] for name, x in rows.items() if name != "timestep"}
    dataset = nncf.Dataset(feeds)
    if engine == "nncf":
        return nncf.quantize(
            graph, dataset, subset_size=len(feeds), model_type=nncf.ModelType.TRANSFORMER,
            preset=nncf.QuantizationPreset.MIXED,
        )  # fmt: skip
    convolutions = [n.get_friendly_name() for n in graph.get_ops() if n.get_type_name() == "Convolution"]
    graph = nncf.compress_weights(
        graph, mode=nncf.CompressWeightsMode.INT8_SYM, ignored_scope=nncf.IgnoredScope(names=convolutions)
    )
    others = [n.get_friendly_name() for n in graph.get_ops() if n.get_type_name() in ("MatMul", "Multiply")]
    return nncf.quantize(
        graph, dataset, subset_size=len(feeds), ignored_scope=nncf.IgnoredScope(names=others),
        advanced_parameters=nncf.AdvancedQuantizationParameters(smooth_quant_alpha=-1),
    )  # fmt: skip


def _dynamic(whole: Any, folder: Path) -> None:
    """onnxruntime's dynamic quantization: ranges taken anew in each call."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    from edgesd.manifest import Axes
    from edgesd.targets import onnx_web

    axes = Axes(size_px=paired.embedded().spec.defaults.size_px, batch=ROWS)
    scratch = folder / "float"
    scratch.mkdir(exist_ok=True)
    onnx_web.lower(whole, axes, scratch)
    graph = onnx.load(scratch / "unet.onnx")
    del graph.graph.value_info[:]  # its Gemm become MatMul with other shapes, which the quantizer does not mend
    quantize_dynamic(graph, folder / "unet.onnx", per_channel=True, weight_type=QuantType.QInt8)


class Dynamic(Watched):
    """The torch session with the UNet on onnxruntime."""

    def __init__(self, session: Any, graph: Path, threads: int) -> None:
        super().__init__(session)
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        self._run = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"]).run

    def run(self, component: str, inputs: Any) -> dict[str, np.ndarray]:
        if component != "unet":
            return self._session.run(component, inputs)
        return {"model_output": self._run(None, dict(inputs))[0]}

    def batches(self, component: str) -> tuple[int, ...] | None:
        return (ROWS,) if component == "unet" else self._session.batches(component)


def opened(folder: Path, threads: int) -> Any:
    if (folder / "unet.onnx").is_file():
        return paired.opened(folder / "unet.onnx", threads, Dynamic)
    return paired.opened(folder / "unet.xml", threads)


def one_step(work: Path, folder: Path) -> dict[str, float]:
    """Decibels of the UNet's output on held-out calls by noise level (tenths of the timesteps), and of all."""
    run, truth = (opened(one, 1).session.run for one in (folder, made(work, FLOAT)))
    sums: dict[str, tuple[float, float]] = {}
    for lot in calls(work, seen=False):
        rows = {key: x.numpy() for key, x in lot.inputs.items()}
        for time_of in np.unique(rows["timestep"]):
            same = np.flatnonzero(rows["timestep"] == time_of)
            feed = {key: x[same[np.arange(ROWS) % len(same)]] for key, x in rows.items() if key != "timestep"}
            feed["timestep"] = np.array([time_of], np.float32)
            wanted, got = (one("unet", feed)["model_output"] for one in (truth, run))
            kept = min(len(same), ROWS)
            level = str(min(int(time_of * LEVELS / 1000), LEVELS - 1))
            for key in (level, "all"):
                noise, signal = sums.get(key, (0.0, 0.0))
                error = float(np.square(got[:kept] - wanted[:kept]).sum())
                sums[key] = noise + error, signal + float(np.square(wanted[:kept]).sum())
    return {key: round(float(10 * np.log10(signal / noise)), 2) for key, (noise, signal) in sorted(sums.items())}


# ---- the report ------------------------------------------------------------------------------------------------


def rows(work: Path) -> list[dict[str, Any]]:
    """Per variant: figures, and the paired difference to the float model over the captions it drew."""
    found = []
    for name, row, facts in paired.rows(work, VARIANTS):
        if name != FLOAT:
            levels = facts["levels_db"]
            row |= {"one_step_db": levels["all"], "worst_level_db": min(levels.values()), "levels_db": levels}
            row |= {"int8_macs": facts.get("int8_macs"), "bytes": facts["bytes"]}
        found.append(row)
    return found


def table(found: list[dict[str, Any]]) -> str:
    lines = [
        "| UNet | MACs in int8 | captions | alignment | paired difference (95 %) | one step | worst noise level "
        "| pictures |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in found:
        if r["name"] == FLOAT:
            lines.append(f"| float | | {r['captions']:,} | {r['alignment']:.3f} | | | | |")
            continue
        low, high = r["interval"]
        share = "" if r["int8_macs"] is None else f"{r['int8_macs']:.0%}"
        lines.append(
            f"| {r['name']} | {share} | {r['captions']:,} | {r['alignment']:.3f} "
            f"| {r['difference']:+.3f} ({low:+.3f} to {high:+.3f}) | {r['one_step_db']:.1f} dB "
            f"| {r['worst_level_db']:.1f} dB | {r['psnr_db']:.1f} dB |"
        )
    return "\n".join(lines)


def sheet(work: Path, path: Path, count: int = 6) -> None:
    """The first captions' pictures side by side, one row a variant."""
    captions, images, lines = held_out_captions(count), [], []
    for name in SHEET:
        file = paired.block_file(work, name, 0)
        if file.is_file() and "pictures" in np.load(file):
            images += list(np.load(file)["pictures"][:count])
            lines += [[(f"{name}: {caption}", "#222222")] for caption in captions]
    if images:
        save_png(path, contact_sheet(images, lines, columns=count))


def report(work: Path) -> None:
    found = rows(work)
    whole = {
        "what": "alignment of the embedded model with its UNet quantized, on held-out captions (seed 0)",
        "command": "python benchmarks/quantization.py draw WORK; python benchmarks/quantization.py report WORK",
        "settings": {**paired.SETTINGS, "calibration_calls": CALLS, "gate_db": GATE_DB},
        "variants": found,
    }
    write_whole(paired.DOCS / "quantization.json", json.dumps(whole, indent=1).encode())
    sheet(work, paired.DOCS / "quantization.png")
    print(table(found))


def main() -> None:
    given = paired.asked(__doc__, ("draw", "report"), list(VARIANTS), list(VARIANTS))
    work = given.work
    if given.verb == "draw":
        make, opener = partial(made, work), lambda name: opened(made(work, name), given.threads)
        paired.draw(work, given.names, given.captions, given.minutes, make, opener, shown=SHEET)
    else:
        report(work)


if __name__ == "__main__":
    main()
