"""Calibration sets on disk: what they hold, how they are read, and which model they are of.

A folder with `calibration.json` and one safetensors shard per sampling run. Sets are checked when opened and read shard
by shard; `edgesd.calibration.capture` makes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors

from edgesd.errors import DataError, RequestError
from edgesd.files import open_regular
from edgesd.models.load import LoadedModel

FORMAT = "edgesd-calibration-1"
INDEX = "calibration.json"
COMPONENTS = ("text_encoder", "unet", "vae_decoder", "vae_encoder")
MAX_CALLS, MAX_INDEX_BYTES, MAX_SHARD_BYTES = 100_000, 16 << 20, 4 << 30
FIX = "Run edgesd calibrate with this folder as -o"


@dataclass(frozen=True, eq=False)
class Call:
    """One recorded call. inputs: by the names of `edgesd.runtime.session`, [1 or 2, ...] each.

    weight: how much an error of this call moves the picture, the share of noise in its input, sigma^2 / (alpha^2 +
    sigma^2): 1 at pure noise, 0 at the end; 1 for other components. guidance: what the two rows are combined with.
    run, row: where it comes from. target [C,h,w]: what a model that knows the run's finished latents would answer.
    """

    component: str
    inputs: Mapping[str, np.ndarray]
    weight: float = 1.0
    guidance: float = 1.0
    run: int = 0
    row: int = 0
    target: np.ndarray | None = None


class CaptureInfo(BaseModel):
    """What a set was recorded from and how: written first, so that an interrupted capture knows what it was doing.

    model, sha256: the checkpoint. size_px: (height, width). runs: shards in a whole set; rows: kept per run. steps:
    step counts, taken in turn. prompts: one per run, in turn.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format: Literal["edgesd-calibration-1"] = "edgesd-calibration-1"
    model: str
    sha256: str
    size_px: tuple[int, int]
    sampler: str
    steps: tuple[Annotated[int, Field(ge=1, le=1000)], ...]
    guidance: float
    seed: int
    runs: Annotated[int, Field(ge=1, le=MAX_CALLS)]
    rows: Annotated[int, Field(ge=1, le=1000)]
    prompts: tuple[str, ...]


@dataclass(frozen=True)
class CalibrationSet:
    """A recorded set on disk. Shards are read when asked for, one at a time."""

    folder: Path
    info: CaptureInfo

    def calls(self, component: str = "unet", limit: int | None = None, rows: int | None = None) -> list[Call]:
        """The calls of a component in the order of recording; limit: that many, evenly from all rows and then runs.

        rows: the limit in rows, of which a UNet's call under guidance has two.
        Raises RequestError for a component that was not recorded, DataError for a broken shard.
        """
        found = [
            call for run in range(self.info.runs) for call in _unpack(read_shard(self.folder, run), component, run)
        ]
        if not found:
            raise RequestError(
                f"no calls of {component!r} in {self.folder.name}", ", ".join(COMPONENTS), "Choose another"
            )
        if rows is not None:
            limit = max(1, rows // (len(found[0].inputs["sample"]) if component == "unet" else 1))
        if limit is None or limit >= len(found):
            return found
        # By row first: an even stride over runs of equal length would meet the same few rows again and again.
        by_row = sorted(range(len(found)), key=lambda i: (found[i].row, found[i].run))
        return [found[i] for i in sorted(by_row[j * len(found) // limit] for j in range(limit))]

    def require(self, model: LoadedModel) -> None:
        """Raises RequestError unless the set was recorded with these very weights, at this size."""
        if self.info.sha256 != model.sha256 or self.info.size_px != model.spec.defaults.size_px:
            mine = f"{model.spec.name} ({model.sha256[:8]}) at {_size(model.spec.defaults.size_px)}"
            raise RequestError(
                f"a calibration set of {self.info.model} ({self.info.sha256[:8]}) at {_size(self.info.size_px)}",
                f"one of {mine}; pruning changes a model, so its calls are recorded again",
                "Run edgesd calibrate on this model",
            )


def open_set(folder: Path) -> CalibrationSet:
    """A finished set. Raises DataError when there is none, or when it is broken or unfinished."""
    try:
        with open_regular(folder / INDEX) as file:
            info = CaptureInfo.model_validate_json(file.read(MAX_INDEX_BYTES))
    except OSError:
        raise DataError(f"{folder} holds no {INDEX}", "a folder that edgesd calibrate made", FIX) from None
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise DataError(f"{folder.name}/{INDEX} does not parse ({reason})", f"format {FORMAT}", FIX) from None
    missing = [run for run in range(info.runs) if not (folder / shard_name(run)).is_file()]
    if missing:
        raise DataError(f"{folder.name} is unfinished: run {missing[0]} of {info.runs} is missing", "a whole set", FIX)
    return CalibrationSet(folder, info)


def shard_name(run: int) -> str:
    return f"run-{run:05d}.safetensors"


def read_shard(folder: Path, run: int) -> dict[str, np.ndarray]:
    """The tensors of one run. Raises DataError where the file is missing, broken or not of this format."""
    fix = "Delete that file and run edgesd calibrate again with the same request"
    try:
        with open_regular(folder / shard_name(run)) as file:
            tensors = load_tensors(file.read(MAX_SHARD_BYTES))
    except (OSError, SafetensorError, ValueError) as error:
        reason = f"{type(error).__name__}: {str(error)[:120]}"
        raise DataError(f"{folder.name}/{shard_name(run)} does not read ({reason})", "a whole shard", fix) from None
    if "unet.sample" not in tensors or not all(np.isfinite(t).all() for t in tensors.values()):
        raise DataError(f"{folder.name}/{shard_name(run)} holds no finite calls", "a shard edgesd wrote", fix)
    return tensors


_FACTS = ("row", "weight", "guidance", "target")


def _unpack(tensors: Mapping[str, np.ndarray], component: str, run: int) -> Iterator[Call]:
    parts = {name.split(".", 1)[1]: t for name, t in tensors.items() if name.split(".", 1)[0] == component}
    inputs = {name: t for name, t in parts.items() if name not in _FACTS}
    for i, row in enumerate(parts.get("row", ())):
        yield Call(
            component, {name: t[i if len(t) > 1 else 0] for name, t in inputs.items()},
            weight=float(parts["weight"][i]) if "weight" in parts else 1.0,
            guidance=float(parts["guidance"][i]) if "guidance" in parts else 1.0, run=run, row=int(row),
            target=parts["target"][i] if "target" in parts else None,
        )  # fmt: skip


def _size(size_px: tuple[int, int]) -> str:
    return f"{size_px[1]}x{size_px[0]} px"
