"""One contender in a process of its own: `python benchmarks/worker.py JOB.json`, which writes its answer beside it.

Runs in edgesd's environment or in that of its peers (peers.txt), so at its top it imports nothing but the standard
library. What a job does: `make` an artefact, call the UNet (`unet`), or draw whole pictures (`picture`). Seconds of a
cold start count from the moment the parent started the process.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROMPT = "a red circle above a blue square on a white background"
HYBRID_CALLS = 4  # UNet calls that optimum-intel's hybrid is calibrated on: speed does not depend on them

Job = dict[str, Any]
Call = Callable[[], Any]


# ---- diffusers on torch ----------------------------------------------------------------------------------------


def diffusers_unet(job: Job) -> Call:
    import torch
    from diffusers import UNet2DConditionModel

    dtype = getattr(torch, job["dtype"])
    torch.set_num_threads(job["threads"])
    unet = UNet2DConditionModel.from_pretrained(Path(job["model"]) / "unet", torch_dtype=dtype).eval()
    unet = _formed(unet, job)
    sample, told = (x.to(dtype) for x in _inputs(unet.config, job))
    if job["channels_last"]:
        sample = sample.to(memory_format=torch.channels_last)

    def call() -> None:
        with torch.inference_mode():
            unet(sample, 500, told, return_dict=False)

    return call


def diffusers_picture(job: Job) -> Callable[[int], Any]:
    import torch
    from diffusers import DiffusionPipeline, EulerDiscreteScheduler

    torch.set_num_threads(job["threads"])
    pipeline = DiffusionPipeline.from_pretrained(job["model"], torch_dtype=getattr(torch, job["dtype"]))
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.unet = _formed(pipeline.unet, job)
    pipeline.set_progress_bar_config(disable=True)
    return lambda seed: pipeline(**_asked(job), generator=torch.Generator().manual_seed(seed)).images


def _formed(unet: Any, job: Job) -> Any:
    import torch

    unet = unet.to(memory_format=torch.channels_last) if job["channels_last"] else unet
    return torch.compile(unet) if job["compile"] else unet


def _inputs(config: Any, job: Job) -> tuple[Any, Any]:
    """A UNet's sample and text, of batch 1."""
    import torch

    width, height = job["size_px"]
    torch.manual_seed(0)
    latent = job["downscale"]
    sample = torch.randn(1, config.in_channels, height // latent, width // latent)
    return sample, torch.randn(1, job["tokens"], config.cross_attention_dim)


def _asked(job: Job) -> dict[str, Any]:
    """What a picture is asked with, in diffusers' words."""
    return {
        "prompt": PROMPT, "width": job["size_px"][0], "height": job["size_px"][1], "num_inference_steps": job["steps"],
        "guidance_scale": job["guidance"], "num_images_per_prompt": job["count"],
    }  # fmt: skip


# ---- OpenVINO as optimum-intel and openvino-genai use it -------------------------------------------------------


def _ov_config(job: Job) -> dict[str, Any]:
    config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": job["threads"]}
    return config if job["native"] else config | {"INFERENCE_PRECISION_HINT": "f32"}


def optimum_make(job: Job) -> None:
    """The export that its users make: the command line for float, the pipeline's class for hybrid."""
    folder = Path(job["artefact"])
    tool = Path(sys.executable).parent / "optimum-cli"
    if not job["hybrid"]:
        command = [
            tool, "export", "openvino", "--task", "text-to-image", "--model", job["model"], "--weight-format",
            job["weights"], folder,
        ]  # fmt: skip
        subprocess.run([str(word) for word in command], check=True)
        return
    from optimum.intel import OVStableDiffusionPipeline, OVWeightQuantizationConfig

    how = OVWeightQuantizationConfig(bits=8, dataset=[PROMPT], num_samples=HYBRID_CALLS)
    pipeline = OVStableDiffusionPipeline.from_pretrained(job["model"], export=True, quantization_config=how)
    pipeline.save_pretrained(folder)


def optimum_unet(job: Job) -> Call:
    """The exported UNet at the static shape that `reshape` gives it, batch 1 as the others."""
    import numpy as np
    import openvino as ov

    core = ov.Core()
    model = core.read_model(Path(job["artefact"]) / "unet" / "openvino_model.xml")
    width, height = job["size_px"]
    shapes: dict[Any, list[int]] = {}
    for port in model.inputs:
        name, rank = port.get_any_name(), port.get_partial_shape()
        if name == "sample":
            channels = rank[1].get_length()
            shapes[port] = [1, channels, height // job["downscale"], width // job["downscale"]]
        elif name == "timestep":
            shapes[port] = [1] if rank.rank.get_length() else []
        else:
            shapes[port] = [1, job["tokens"], rank[2].get_length()]
    model.reshape(shapes)
    request = core.compile_model(model, "CPU", _ov_config(job)).create_infer_request()
    random = np.random.RandomState(0)
    feeds = {}
    for port in model.inputs:
        dtype = port.get_element_type().to_dtype()
        x = random.randn(*port.get_shape()) if port.get_any_name() != "timestep" else np.full(port.get_shape(), 500)
        feeds[port.get_any_name()] = np.asarray(x, dtype)
    return lambda: request.infer(feeds, share_inputs=True)


def optimum_picture(job: Job) -> Callable[[int], Any]:
    import torch
    from diffusers import EulerDiscreteScheduler
    from optimum.intel import OVStableDiffusionPipeline

    torch.set_num_threads(job["threads"])
    pipeline = OVStableDiffusionPipeline.from_pretrained(job["artefact"], compile=False, ov_config=_ov_config(job))
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    width, height = job["size_px"]
    pipeline.reshape(batch_size=1, height=height, width=width, num_images_per_prompt=job["count"])
    pipeline.compile()
    pipeline.set_progress_bar_config(disable=True)
    return lambda seed: pipeline(**_asked(job), generator=torch.Generator().manual_seed(seed)).images


def genai_make(job: Job) -> None:
    """optimum's export, with the tokenizer as a graph, which hybrid's own way of saving leaves out."""
    optimum_make(job)
    folder = Path(job["artefact"])
    if not list(folder.glob("tokenizer/openvino_tokenizer.xml")):
        import openvino as ov
        from openvino_tokenizers import convert_tokenizer
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(Path(job["model"]) / "tokenizer")
        ov.save_model(convert_tokenizer(tokenizer), folder / "tokenizer" / "openvino_tokenizer.xml")


def _genai(job: Job, count: int, guidance: float) -> Any:
    import openvino_genai

    pipeline = openvino_genai.Text2ImagePipeline(job["artefact"])
    scheduler = Path(job["artefact"]) / "scheduler" / "scheduler_config.json"
    kind = openvino_genai.Scheduler.Type.EULER_DISCRETE
    pipeline.set_scheduler(openvino_genai.Scheduler.from_config(scheduler, kind))
    width, height = job["size_px"]
    pipeline.reshape(count, height, width, guidance)
    pipeline.compile("CPU", **_ov_config(job))
    return pipeline


def genai_unet(job: Job) -> Call:
    """Its pipeline has no UNet to call: pictures of one step without guidance, and its own figure for the UNet."""
    pipeline, asked = _genai(job, 1, 1.0), _asked(job) | {"num_inference_steps": 1, "guidance_scale": 1.0}
    del asked["prompt"]

    def call() -> float:
        pipeline.generate(PROMPT, rng_seed=0, **asked)
        return pipeline.get_performance_metrics().get_unet_infer_duration().mean / 1000  # of milliseconds

    return call


def genai_picture(job: Job) -> Callable[[int], Any]:
    pipeline, asked = _genai(job, job["count"], job["guidance"]), _asked(job)
    del asked["prompt"]
    return lambda seed: pipeline.generate(PROMPT, rng_seed=seed, **asked)


# ---- onnxruntime on a plain export -----------------------------------------------------------------------------


def onnxruntime_make(job: Job) -> None:
    """diffusers' UNet by torch's exporter, static shapes, nothing done to it."""
    import torch
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(Path(job["model"]) / "unet", torch_dtype=torch.float32).eval()
    sample, told = _inputs(unet.config, job)
    folder = Path(job["artefact"])
    folder.mkdir(parents=True)
    example = (sample, torch.tensor([500]), told)
    torch.onnx.export(unet, example, folder / "unet.onnx", dynamo=True, external_data=True, opset_version=21)


def onnxruntime_unet(job: Job) -> Call:
    import numpy as np
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = job["threads"]
    session = ort.InferenceSession(
        str(Path(job["artefact"]) / "unet.onnx"), options, providers=["CPUExecutionProvider"]
    )
    random, feeds = np.random.RandomState(0), {}
    for port in session.get_inputs():
        whole = port.type == "tensor(int64)"
        feeds[port.name] = np.full(port.shape, 500) if whole else random.randn(*port.shape).astype(np.float32)
    return lambda: session.run(None, feeds)


# ---- edgesd ----------------------------------------------------------------------------------------------------


def edgesd_make(job: Job) -> None:
    """`edgesd package`, with all it does: truth recorded, artefacts run and measured, bundle sealed."""
    folder = Path(job["artefact"])
    width, height = job["size_px"]
    model = [] if job["embedded"] else [job["model"]]
    vae = ["--vae", str(_tiny_vae(folder.with_name("tiny-vae")))] if job.get("tiny_vae") else []
    gate = ["--gate-db", str(job["gate_db"])] if job["gate_db"] is not None and "int8" in job["flags"] else []
    command = [
        sys.executable, "-m", "edgesd", "package", *model, "--target", job["target"], "--sampler", "euler",
        "--size-px", f"{width}x{height}", "--steps", job["tables"], "-o", str(folder), "--json",
        *job["flags"], *gate, *vae,
    ]  # fmt: skip
    subprocess.run(command, check=True)


def _tiny_vae(folder: Path) -> Path:
    """TAESD's shapes with random weights, in place of the model's own VAE."""
    from diffusers import AutoencoderTiny

    AutoencoderTiny().save_pretrained(folder)
    return folder


def _bundle(job: Job) -> Path:
    return next(Path(job["artefact"]).glob("*.edgesd"))


def _open_options(job: Job) -> dict[str, Any]:
    options: dict[str, Any] = {"threads": job["threads"]}
    if job["target"] == "openvino":
        options["hint"] = "native" if job["native"] else "f32"
    if job["one_at_a_time"]:
        options["one_at_a_time"] = True
    return options


def edgesd_unet(job: Job) -> Call:
    from edgesd.sources import open_bundle

    pipeline = open_bundle(_bundle(job), **_open_options(job))
    variant, feeds = _unet_call(job)
    job["found"] = {"macs": variant.macs, "params": variant.params}
    return lambda: pipeline.session.run("unet", feeds)


def _unet_call(job: Job) -> tuple[Any, dict[str, Any]]:
    """The bundle's UNet of batch 1, and a call of it."""
    import numpy as np

    from edgesd import bundle

    variants = bundle.read(_bundle(job)).manifest.component("unet").variants
    variant = next(v for v in variants if v.axes.batch == 1)
    random = np.random.RandomState(0)
    feeds = {spec.name: random.randn(*spec.shape).astype(spec.dtype) for spec in variant.inputs}
    feeds["timestep"][:] = 500
    return variant, feeds


def edgesd_profile(job: Job) -> dict[str, Any]:
    """Where a UNet call's time goes, by OpenVINO's own counters: shares by kind of layer and type of its kernel."""
    from collections import Counter
    from statistics import median

    import openvino as ov

    variant, feeds = _unet_call(job)
    core, config = ov.Core(), _ov_config(job) | {"PERF_COUNT": True}
    files = [_bundle(job) / name for name in variant.files]
    request = core.compile_model(core.read_model(*files), "CPU", config).create_infer_request()
    took: dict[tuple[str, str], list[float]] = {}
    totals, count = [], Counter()
    for index in range(1 + job["repeats"]):
        request.infer(feeds, share_inputs=True)
        spent = Counter()
        for node in request.profiling_info:
            # An exec_type ends in the type that its kernel computes in: brgconv_avx512_I8.
            kind = (node.node_type, node.exec_type.rsplit("_", 1)[-1])
            spent[kind] += node.real_time.total_seconds()
            count[kind] += index == 0 and node.real_time.total_seconds() > 0
        if index:  # the first one warms up
            totals.append(sum(spent.values()))
            for kind, seconds in spent.items():
                took.setdefault(kind, []).append(seconds)
    whole = median(totals)
    kinds = [{"kind": kind, "type": dtype, "layers": count[kind, dtype], "share": round(median(seconds) / whole, 4)}
             for (kind, dtype), seconds in took.items()]  # fmt: skip
    kinds.sort(key=lambda each: -each["share"])
    return {"seconds": totals, "told": {"kinds": [each for each in kinds if each["share"] >= 0.001]}}


def edgesd_picture(job: Job) -> Callable[[int], Any]:
    from edgesd.runtime.generate import generate
    from edgesd.sources import open_bundle

    pipeline = open_bundle(_bundle(job), **_open_options(job))
    settings = {"num_inference_steps": job["steps"], "guidance_scale": job["guidance"], "width": job["width"]}
    return lambda seed: generate(pipeline, PROMPT, seed=seed, sampler="euler", num_images=job["count"], **settings)


# ---- the process -----------------------------------------------------------------------------------------------


def run(job: Job, make: Callable[[Job], Any], clock: Callable[[], float] = time.monotonic) -> dict[str, Any]:
    """Opens by `make`, then times: cold is from the start of the process to the end of the first call or picture.

    A call that returns seconds of its own says what it took; others are timed.
    """
    act = make(job)
    ready = clock()
    taken: list[float] = []
    for index in range(1 + job["repeats"]):
        began = clock()
        said = act(index) if job["part"] == "picture" else act()
        taken.append(said if isinstance(said, float) else clock() - began)
        if index == 0:
            cold = clock() - job["started"]
    return {"load_s": ready - job["started"], "cold_s": cold, "first_s": taken[0], "seconds": taken[1:],
            **job.get("found", {})}  # fmt: skip


def peak_bytes() -> int:
    """The most resident memory of this process so far; 0 where nobody says."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return int(next(line for line in file if line.startswith("VmHWM:")).split()[1]) * 1024
    except (OSError, StopIteration):
        return 0


def main(path: Path) -> None:
    job = json.loads(path.read_text(encoding="utf-8"))
    act = globals()[f"{job['kind']}_{job['part']}"]
    if job["part"] == "make":
        act(job)
        answer: dict[str, Any] = {}
    else:
        answer = act(job) if job["part"] == "profile" else run(job, act)
    path.with_suffix(".answer").write_text(json.dumps(answer | {"peak_bytes": peak_bytes()}), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
