"""How much faster int8 is than float32, per target, in one run: JSON on stdout, a table on stderr.

python benchmarks/architectures.py small FOLDER
python benchmarks/int8_speed.py make FOLDER WORK TARGET...   lowers the UNet in fp32 and int8
python benchmarks/int8_speed.py time WORK TARGET... [--seconds 40] [--threads 2]   calls both in turn

Weights are random and the ranges those of one call: speed depends on shapes alone. The layers that edgesd's own plans
leave out of int8 arithmetic are left out here.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from edgesd import manifest as schema
from edgesd import targets

FORMS = {"onnx-web": "wasm"}
LEFT_OUT = ("*conv_in", "*conv_out", "*time_emb*", "*conv_shortcut", "*attn2.to_k", "*attn2.to_v")
SIZE_PX = (512, 512)


def make(source: str, work: Path, names: list[str]) -> None:
    """Lowers each in a process of its own, so that it gives its memory back; prints what each took."""
    for name in names:
        for precision in ("fp32", "int8"):
            folder = work / f"{name}-{precision}"
            if not (folder / "manifest.json").exists():
                began = time.perf_counter()
                subprocess.run([sys.executable, __file__, "lower", source, name, precision, str(folder)], check=True)
                peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
                print(f"{folder.name}  {time.perf_counter() - began:.0f} s, peak so far {peak:.1f} GB", file=sys.stderr)


def lower(source: str, name: str, precision: str, folder: Path) -> None:
    from edgesd.models.load import load_parts, open_checkpoint
    from edgesd.models.modules import build

    axes = schema.Axes(size_px=SIZE_PX, precision=precision, form=FORMS.get(name, ""))  # type: ignore[arg-type]
    model = load_parts(open_checkpoint(source), ["unet"])
    component = build("unet", model.modules, model.spec, axes)
    del model.modules["unet"]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    plan = None if precision == "fp32" else one_call_plan(component)
    lowered = targets.load(name, lowering=True).lower(component, axes, folder, plan=plan)
    files = tuple(path.as_posix() for path in lowered.files)
    variant = schema.Variant(axes=axes, files=files, inputs=lowered.inputs, outputs=lowered.outputs)
    listed = {*files, "tables", *(t.file for t in model.spec.tokenizers)}
    manifest = schema.Manifest(
        target=name, model=model.spec, components=(schema.Component(name="unet", variants=(variant,)),),
        samplers=(schema.SamplerFile(name="ddim", file="tables", steps=(1,)),),
        provenance=schema.Provenance(source="random", sha256="0" * 64),
        files=tuple(schema.FileEntry(path=path, bytes=0, sha256="0" * 64) for path in sorted(listed)),
    )  # fmt: skip
    (folder / "manifest.json").write_bytes(schema.dump(manifest))


def one_call_plan(component: Any) -> Any:
    """Int8 by the ranges of the component's example."""
    import torch

    from edgesd.compress.quantize import quantizable
    from edgesd.compress.quantplan import LayerPlan, QuantPlan, Scale
    from edgesd.models.count import count

    macs, kinds = count(component.module, component.example).by_module, quantizable(component.module)
    layers: list[LayerPlan] = []

    def grid(x: torch.Tensor) -> Scale:
        low, high = min(float(x.min()), 0.0), max(float(x.max()), 1e-6)
        scale = (high - low) / 255
        return Scale(scale=scale, zero_point=max(-128, min(127, round(-128 - low / scale))))

    def note(layer: torch.nn.Module, given: tuple[torch.Tensor, ...], made: torch.Tensor, name: str) -> None:
        out = any(fnmatchcase(name, pattern) for pattern in LEFT_OUT)
        layers.append(
            LayerPlan(name=name, kind=kinds[name], mode="w8" if out else "int8", why="benchmark", input=grid(given[0]),
                      output=grid(made), macs=macs[name], params=sum(p.numel() for p in layer.parameters()))
        )  # fmt: skip

    hooks = [
        component.module.get_submodule(name).register_forward_hook(
            lambda layer, given, made, name=name: note(layer, given, made, name)
        )
        for name in kinds
    ]
    with torch.no_grad():
        component.module(*component.example)
    for hook in hooks:
        hook.remove()
    return QuantPlan(
        component="unet", precision="int8", source_sha256="0" * 64, calibration="one call", layers=tuple(layers)
    )


def measure(work: Path, name: str, seconds: float, threads: int) -> dict[str, Any]:
    """Median seconds of a call in each precision, called in turn so that both see the same machine."""
    import numpy as np

    target, calls = targets.load(name), {}
    for precision in ("fp32", "int8"):
        folder = work / f"{name}-{precision}"
        manifest = schema.parse((folder / "manifest.json").read_bytes())
        session = target.open(folder, manifest, threads=threads)
        specs = manifest.component("unet").variants[0].inputs
        x = {spec.name: np.random.RandomState(0).randn(*spec.shape).astype(spec.dtype) for spec in specs}
        session.run("unet", x)
        calls[precision] = (session, x)
    times: dict[str, list[float]] = {precision: [] for precision in calls}
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(times["int8"]) < 5:
        for precision, (session, x) in calls.items():
            began = time.perf_counter()
            session.run("unet", x)
            times[precision].append(time.perf_counter() - began)
    medians = {precision: statistics.median(each) for precision, each in times.items()}
    ratios = [a / b for a, b in zip(times["fp32"], times["int8"], strict=True)]
    return {"target": name, "threads": threads, "calls": len(ratios), "runtime": target.runtime_version(),
            "fp32_seconds": round(medians["fp32"], 4), "int8_seconds": round(medians["int8"], 4),
            "ratio": round(statistics.median(ratios), 3),
            "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    making, timing = verbs.add_parser("make"), verbs.add_parser("time")
    making.add_argument("source")
    for verb in (making, timing):
        verb.add_argument("work", type=Path)
        verb.add_argument("targets", nargs="+")
    lowering = verbs.add_parser("lower")
    for each in ("source", "name", "precision"):
        lowering.add_argument(each)
    lowering.add_argument("folder", type=Path)
    timing.add_argument("--seconds", type=float, default=40)
    timing.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    if asked.verb == "make":
        make(asked.source, asked.work, asked.targets)
        return
    if asked.verb == "lower":
        lower(asked.source, asked.name, asked.precision, asked.folder)
        return
    rows = [measure(asked.work, name, asked.seconds, asked.threads) for name in asked.targets]
    for row in rows:
        shown = f"{row['fp32_seconds']:.3f} s fp32, {row['int8_seconds']:.3f} s int8: {row['ratio']:.2f} x"
        print(f"{row['target']:10} {shown} ({row['calls']} calls, {row['threads']} threads)", file=sys.stderr)
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
