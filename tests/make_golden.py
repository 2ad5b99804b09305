"""Writes tests/golden/*.json, which the runtimes of every language read. Needs edgesd[package].

    python tests/make_golden.py

Numbers are float32 values written in full. `model` in samplers.py is the fixed function in place of the UNet: float64
+, *, / rounded to float32 once, so other languages can repeat it bit for bit; sums of a row are float32.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
from manifest_cases import manifests_json
from PIL import Image
from policy_cases import policy_json
from samplers import SD, model
from token_cases import tokens_json, words_json

from edgesd.runtime import image as images
from edgesd.runtime.loop import run
from edgesd.runtime.noise import MAX_SEED, Philox, Purpose, TorchNoise
from edgesd.runtime.state import add_noise, bridge, init_latents
from edgesd.runtime.table import SamplerTable, dump_tables
from edgesd.sampling.compile import compile_table

FOLDER = Path(__file__).parent / "golden"
COMMAND = "python tests/make_golden.py"
SHAPE, SEED = (1, 2, 3, 4), 2024
TABLES = [
    ("ddim", 4, {}), ("euler_a", 5, {}), ("heun", 3, {}), ("pndm", 5, {}), ("lcm", 4, {}), ("sa", 7, {}),
    ("dpmpp_2m_karras", 1, {}), ("dpmpp_2m_karras", 6, {}), ("unipc_3", 8, {}),
    ("ddpm", 4, {"prediction_type": "v_prediction"}), ("dpmpp_3m", 8, {"prediction_type": "sample"}),
    ("flow_euler", 4, {"_class_name": "FlowMatchEulerDiscreteScheduler"}),
    ("edm_dpmpp_2m", 5, {"_class_name": "EDMDPMSolverMultistepScheduler"}),
]  # fmt: skip

GRID = (
    "ddim",
    "ddpm",
    "euler",
    "euler_a",
    "heun",
    "dpmpp_2m_karras",
    "dpmpp_3m",
    "dpmpp_2m_sde",
    "unipc",
    "pndm",
    "lcm",
    "deis",
)
GRID_STEPS = (1, 4, 7, 20)


def numbers(array) -> list:
    """Nested lists; float32 as the shortest decimal that reads back as the same float32."""
    if isinstance(array, np.ndarray) and array.ndim:
        return [numbers(a) for a in array]
    return float(str(np.float32(array))) if np.asarray(array).dtype.kind == "f" else np.asarray(array).item()


def table_json(table: SamplerTable) -> dict:
    plain = {f.name: getattr(table, f.name) for f in fields(table) if f.name != "starts"}
    plain = {k: numbers(v) if isinstance(v, np.ndarray) else v for k, v in plain.items()}
    plain["init_scale"] = numbers(np.float32(table.init_scale))
    plain["starts"] = {
        str(start): {f.name: numbers(getattr(rows, f.name)) for f in fields(rows)}
        for start, rows in table.starts.items()
    }
    return plain


def noise_json() -> dict:
    philox = [
        {"seed": seed, "image": image, "row": row, "purpose": int(purpose), "shape": list(shape),
         "normal": numbers(Philox(seed).normal(shape, image, row, purpose).ravel())}
        for seed, image, row, purpose, shape in (
            (0, 0, 0, Purpose.START, (1, 2, 3, 3)), (1, 0, 0, Purpose.START, (7,)),
            (2**32 + 1, 3, 0, Purpose.RENOISE, (9,)),
            (MAX_SEED, 2**32 - 1, 49, Purpose.STEP, (12,)), (42, 1, 7, Purpose.POSTERIOR, (5,)),
        )
    ]  # fmt: skip
    torch_like = []
    for seed in (0, 42, 2**32 + 7):
        source, shapes = TorchNoise(seed), [[1, 2, 3, 4], [5], [17], [3], [16], [33]]
        drawn = [numbers(source.normal(shape, 0, 0, Purpose.START).ravel()) for shape in shapes]
        torch_like.append({"seed": seed, "shapes": shapes, "normal": drawn})
    return {"command": COMMAND, "tolerance": "1 ulp of float32 (philox), 2e-6 (torch)", "philox": philox,
            "torch": torch_like}  # fmt: skip


class Case:
    """A table's run on the fixed function and keyed noise."""

    def __init__(self, table: SamplerTable) -> None:
        self.table, self.source = table, Philox(SEED)
        self.z = self.source.normal(SHAPE, 0, 0, Purpose.START)

    def denoise(self, u, row):
        return model(u, float(self.table.timestep[row]))

    def run(self, latents, start=0, state=None):
        noise = lambda row: self.source.normal(SHAPE, 0, row, Purpose.STEP)  # noqa: E731
        return list(run(self.table, self.denoise, latents, noise, start, state))


def run_json(number: int, table: SamplerTable, x0: np.ndarray) -> list[dict]:
    """The whole run, one from each of two starts, and one resumed half-way from its state."""
    case, out = Case(table), []
    for start in (0, *list(table.starts)[1:4:2]):
        begin = init_latents(table, case.z) if start == 0 else add_noise(table, start, x0, case.z)
        steps = case.run(begin, start)
        made = {"begin": begin, "first_x0": steps[0].denoised, "final": steps[-1].latents}
        out.append({"table": number, "start": start} | {key: numbers(array.ravel()) for key, array in made.items()})
        if start == 0 and len(steps) > 2:
            state = steps[len(steps) // 2].state
            out[-1]["resume"] = {"row": state.row, "start": state.start,
                                 "inputs": [numbers(a.ravel()) for a in state.inputs],
                                 "outputs": [numbers(a.ravel()) for a in state.outputs]}  # fmt: skip
    return out


def bridge_json(tables: list[SamplerTable], pairs) -> list[dict]:
    out = []
    for leave, row, enter in pairs:
        step = Case(tables[leave]).run(init_latents(tables[leave], Case(tables[leave]).z))[row]
        state = bridge(tables[leave], row, step.sample, step.model_output, tables[enter])
        steps = Case(tables[enter]).run(state.inputs[0], state=state)
        final = steps[-1].latents if steps else state.inputs[0]
        out.append({"from": leave, "row": row, "to": enter, "sample": numbers(step.sample.ravel()),
                    "model_output": numbers(step.model_output.ravel()), "entry_row": state.row,
                    "entry": numbers(state.inputs[0].ravel()), "final": numbers(final.ravel())})  # fmt: skip
    return out


def sampling_json() -> dict:
    tables = [compile_table(name, {**({} if "_class_name" in c else SD), **c}, steps) for name, steps, c in TABLES]
    x0 = Philox(SEED).normal(SHAPE, 0, 0, Purpose.RENOISE)
    return {
        "command": COMMAND,
        "tolerance": "1e-5 of the largest value; noise as in noise.json: seed, image 0, STEP per row",
        "function": "f32((1.2*u + 0.0001*timestep) / (1 + 0.5*u*u)) in float64",
        "seed": SEED, "shape": list(SHAPE), "x0": numbers(x0.ravel()),
        "tables": [table_json(table) for table in tables],
        "file_base64": base64.b64encode(dump_tables(tables)).decode(),
        "runs": [entry for i, table in enumerate(tables) for entry in run_json(i, table, x0)],
        "bridges": bridge_json(tables, [(7, 1, 8), (1, 2, 0), (8, 3, 2), (0, 3, 1)]),
    }  # fmt: skip


def grid_json() -> dict:
    """12 samplers at 4 step counts: the tables as a bundle holds them, and their runs as in sampling.json."""
    tables = [compile_table(name, SD, steps) for name in GRID for steps in GRID_STEPS]
    x0 = Philox(SEED).normal(SHAPE, 0, 0, Purpose.RENOISE)
    runs = [{"sampler": t.name, "steps": t.steps} | entry for i, t in enumerate(tables) for entry in run_json(i, t, x0)]
    return {
        "command": COMMAND, "about": "as sampling.json: the same function, seed, shape, x0 and tolerance",
        "seed": SEED, "shape": list(SHAPE), "x0": numbers(x0.ravel()),
        "file_base64": base64.b64encode(dump_tables(tables)).decode(), "runs": runs,
    }  # fmt: skip


def images_json() -> dict:
    """A small picture through what every runtime does to pictures: resizing, floats, masks."""
    pixels = np.random.RandomState(7).randint(0, 256, (9, 13, 3)).astype(np.uint8)
    filters = {"lanczos": Image.Resampling.LANCZOS, "bilinear": Image.Resampling.BILINEAR}
    sizes = [(4, 3, "lanczos"), (13, 5, "lanczos"), (30, 40, "lanczos"), (6, 9, "lanczos"), (26, 18, "bilinear")]
    resized = [
        {"width": width, "height": height, "filter": name,
         "data": list(Image.fromarray(pixels).resize((width, height), filters[name]).tobytes())}
        for width, height, name in sizes
    ]  # fmt: skip
    floats = images.to_float(pixels)
    grey = np.asarray(Image.fromarray(pixels).convert("L"), np.float32) / np.float32(255)
    rounded = images.to_uint8((1.3 * floats.astype(np.float64) + 0.01).astype(np.float32))
    return {"command": COMMAND, "picture": {"width": 13, "height": 9, "data": list(pixels.tobytes())},
            "resized": resized, "floats": numbers(floats.ravel()), "rounded": list(rounded.tobytes()),
            "mask": [int(value >= 0.5) for value in grey.ravel()]}  # fmt: skip


# Every file of FOLDER, by its name without .json.
FILES: dict[str, Callable[[], dict]] = {
    "noise": noise_json, "sampling": sampling_json, "grid": grid_json, "policy": lambda: policy_json(COMMAND),
    "tokens": lambda: tokens_json(COMMAND), "words": lambda: words_json(COMMAND),
    "manifests": lambda: manifests_json(COMMAND), "images": images_json,
}  # fmt: skip


def text(name: str) -> str:
    return json.dumps(FILES[name](), allow_nan=False) + "\n"


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name in FILES:
        (FOLDER / f"{name}.json").write_text(text(name))


if __name__ == "__main__":
    main()
