"""The protocol every runtime behind a model follows, and the names its components speak.

text_encoder: input_ids [1,L] i64 (i32 on LiteRT and Core ML) -> encoder_hidden_states [1,L,D] f32; the second one of
    SDXL also gives text_embeds [1,P] f32.
unet: sample [B,C,h,w] f32, timestep [1] f32, encoder_hidden_states [B,L,D] f32 -> model_output [B,C,h,w] f32; SDXL also
    takes text_embeds [B,P] and time_ids [B,6], consistency models timestep_cond [B,K].
vae_decoder: latents [1,C,h,w] f32, already divided by the scaling factor -> image [1,3,H,W] f32, about -1..1.
vae_encoder: image [1,3,H,W] f32 in -1..1 -> mean [1,C,h,w] f32, not yet scaled; a full VAE also gives std [1,C,h,w].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import numpy as np

from edgesd.errors import RequestError

Arrays = Mapping[str, np.ndarray]


@runtime_checkable
class Session(Protocol):
    """Runs components by name. Components load on first use; `load` and `unload` only move that moment.

    run: inputs and outputs are keyed by the names above; a wrong name or shape raises RequestError; the outputs are
    arrays that the caller owns (never views that the next call overwrites).
    unload: gives the component's memory back; a later run loads it again.
    batches: rows a call may have, e.g. (1,) or (1, 2); None = any number.
    widths: those the component comes in, the widest first. use_width: what later runs compute with; the old one is let
    go, the new one loads as `load` does; RequestError where there is none.
    """

    def run(self, component: str, inputs: Arrays) -> dict[str, np.ndarray]: ...

    def load(self, component: str) -> None: ...

    def unload(self, component: str) -> None: ...

    def has(self, component: str) -> bool: ...

    def batches(self, component: str) -> tuple[int, ...] | None: ...

    def widths(self, component: str) -> tuple[float, ...]: ...

    def use_width(self, component: str, width: float) -> None: ...


def no_width(component: str, width: float, have: tuple[float, ...]) -> RequestError:
    """What `use_width` raises for a width that is not there."""
    shown = ", ".join(f"{w:g}" for w in have)
    return RequestError(f"width {width:g} of {component}", f"this model has {shown}",
                        "Choose one of these, or package with --widths")  # fmt: skip


class Watched:
    """A session that passes everything on: what recorders override `run` of."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def run(self, component: str, inputs: Arrays) -> dict[str, np.ndarray]:
        return self._session.run(component, inputs)

    def load(self, component: str) -> None:
        self._session.load(component)

    def unload(self, component: str) -> None:
        self._session.unload(component)

    def has(self, component: str) -> bool:
        return self._session.has(component)

    def batches(self, component: str) -> tuple[int, ...] | None:
        return self._session.batches(component)

    def widths(self, component: str) -> tuple[float, ...]:
        return self._session.widths(component)

    def use_width(self, component: str, width: float) -> None:
        self._session.use_width(component, width)
