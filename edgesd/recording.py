"""The stage that pruning, widths and int8 begin with: real calls of the float model, recorded once and cached.

key, folder = recorded(plan, workers, calls)
open_set(folder).calls("unet")
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgesd.stages import LIBRARIES
from edgesd.stages import key as stage_key

if TYPE_CHECKING:
    from edgesd.buildplan import BuildPlan
    from edgesd.models.load import Checkpoint
    from edgesd.workers import Workers


def recorded(plan: BuildPlan, workers: Workers, calls: int, seed: int = 0) -> tuple[str, Path]:
    """(key, folder) of a calibration set of the plan's checkpoint with about `calls` UNet rows."""
    checkpoint = plan.checkpoint
    key = stage_key("calibration", checkpoint.sha256, checkpoint.spec, calls, seed, libraries=LIBRARIES)
    return key, workers.stage("calibration", plan.fp32_bytes, key, _record, checkpoint, calls, seed)


def _record(checkpoint: Checkpoint, calls: int, seed: int, folder: Path) -> None:
    """In a child: samples the float model and keeps what every component was asked."""
    from edgesd.calibration.capture import calibrate
    from edgesd.models.load import load_parts, quiet

    with quiet():
        calibrate(load_parts(checkpoint), folder, calls=calls, seed=seed)
