"""A run kept on disk while it is under way, so that the same command goes on where it stopped, under a policy too."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgesd.errors import DataError
from edgesd.runtime.governed import PolicyRun
from edgesd.runtime.pipeline import Pipeline
from edgesd.runtime.policy import Decision
from edgesd.runtime.settings import Settings
from edgesd.runtime.stage import RunLog
from edgesd.runtime.state import State, fitting, read_state, save_state

if TYPE_CHECKING:
    from edgesd.runtime.loop import Step


@dataclass(frozen=True)
class Resumed:
    """What a run goes on with: its settings as decided, the loop's state, and what it had done."""

    settings: Settings
    state: State
    log: RunLog
    decision: Decision | None


class Kept:
    """The file of one picture's run. settings: as asked for, before any decision; run: the policy in charge of it."""

    def __init__(self, path: Path, pipeline: Pipeline, settings: Settings, run: PolicyRun | None) -> None:
        self.path, self._pipeline, self._run = path, pipeline, run
        policy = None if run is None else run.policy.name
        told = json.dumps([pipeline.identity, asdict(settings), policy], sort_keys=True)
        self._owner = hashlib.sha256(told.encode()).hexdigest()

    def load(self, settings: Settings) -> Resumed | None:
        """What was saved, None where nothing was. settings: those of a run without a policy."""
        if not self.path.exists():
            return None
        saved = read_state(self.path)
        state = fitting(saved, self._pipeline.table(settings.sampler, self._steps(saved.steps, settings)), self._owner)
        if self._run is None:
            return Resumed(settings, state, RunLog(), None)
        try:
            told = json.loads(saved.told)
            log, settings = RunLog.from_json(told["log"]), Settings.from_json(told["settings"])
            decision = self._run.resume(told["run"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise DataError("the saved run's log does not parse", "what edgesd saved", "Draw it anew") from None
        log.last = saved.last
        return Resumed(settings, state, log, decision)

    def save(self, step: Step, settings: Settings, log: RunLog) -> None:
        """After a step, before the policy is asked again."""
        if self._run is None:
            save_state(self.path, step.table, step.state, self._owner)
            return
        told = {"settings": asdict(settings), "log": log.to_json(), "run": self._run.to_json()}
        save_state(self.path, step.table, step.state, self._owner, json.dumps(told), log.last)

    def done(self) -> None:
        self.path.unlink(missing_ok=True)

    def _steps(self, saved: int, settings: Settings) -> int:
        """The step count that the file must be of: a policy may have chosen any."""
        return settings.num_inference_steps if self._run is None else saved
