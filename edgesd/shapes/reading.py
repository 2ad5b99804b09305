"""A first lesson for the text encoder: to say which object a caption puts where.

A denoiser learns colours and shapes long before it learns which of two objects goes left: until then `left of` and
`right of` draw alike, and so tell it nothing. Here the last four tokens, which every caption leaves empty, learn from
the grammar what stands left, right, above and below, so that attention can find it at a fixed place. The other tokens
are held to what they said, so that a UNet that knows the encoder goes on from where it is. docs/training.md says how
far this went.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from edgesd.runtime.tokenizer import PromptTokenizer
from edgesd.shapes.world import COLORS, RELATIONS, SHAPES, parse
from edgesd.training.pool import world_captions

PLACES = tuple(RELATIONS)  # one each of the last tokens
KEPT = 10.0  # what a difference from the old states counts, beside the answers
BATCH = 256
_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


class Reader:
    """A job of `training.loop`: a text encoder and, for the lesson alone, a linear answer on its last tokens."""

    name = "text"

    def __init__(self, encoder: Any, tokenizer: PromptTokenizer) -> None:
        self._old, self._tokenizer = copy.deepcopy(encoder).eval().requires_grad_(False), tokenizer
        width = encoder.config.hidden_size
        answer = nn.Linear(width, len(COLORS) + len(SHAPES) + 2)
        nn.init.zeros_(answer.weight)
        self.modules: dict[str, nn.Module] = {
            "text_encoder": encoder.train().requires_grad_(True), "answer": answer, "old": self._old,
        }  # fmt: skip

    def loss(self, rng: torch.Generator, device: torch.device) -> torch.Tensor:
        captions = world_captions(BATCH, int(torch.randint(0, 1 << 30, (), generator=rng)))
        ids, wanted = (x.to(device) for x in self._lesson(captions))
        states = self.modules["text_encoder"](ids).last_hidden_state
        with torch.no_grad():
            old = self._old(ids).last_hidden_state
        kept = (states - old)[:, : -len(PLACES)].float().square().mean()
        color, shape = self._answers(states)
        cross_entropy = nn.functional.cross_entropy
        told = cross_entropy(color.flatten(0, 1), wanted[0].flatten()) + cross_entropy(
            shape.flatten(0, 1), wanted[1].flatten()
        )
        return told + KEPT * kept

    def measure(self) -> Mapping[str, float]:
        """The share of held-out captions of which every place is answered right."""
        device = next(self.modules["answer"].parameters()).device
        captions = [text for text in world_captions(512, 1 << 31) if parse(text).relation is not None]
        ids, wanted = (x.to(device) for x in self._lesson(captions))
        with torch.no_grad():
            color, shape = self._answers(self.modules["text_encoder"](ids).last_hidden_state)
        right = (color.argmax(-1) == wanted[0]) & (shape.argmax(-1) == wanted[1])
        return {"pairs placed right": float(right.all(1).float().mean())}

    def _answers(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores [B,4,colours + 1] and [B,4,shapes + 1]; the last of each says that nothing stands there."""
        made = self.modules["answer"](states[:, -len(PLACES) :]).float()
        return made[..., : len(COLORS) + 1], made[..., len(COLORS) + 1 :]

    def _lesson(self, captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [B,24] and what the places hold [2,B,4]: colour, shape."""
        return token_ids(self._tokenizer, captions), torch.tensor([placed(text) for text in captions]).permute(2, 0, 1)


def token_ids(tokenizer: PromptTokenizer, captions: Sequence[str]) -> torch.Tensor:
    """[N,24] i64, as the text encoder takes them."""
    return torch.from_numpy(np.stack([tokenizer.encode(text).ids[0] for text in captions]).astype(np.int64))


def stands(caption: str) -> tuple[str, ...]:
    """The places of a caption's two objects, in the order it names them; () for a single object."""
    said = parse(caption).relation
    return () if said is None else (said, _OPPOSITE[said])


def placed(caption: str) -> list[tuple[int, int]]:
    """(colour, shape) by number at each of PLACES; past the last of them where nothing stands."""
    found = dict.fromkeys(PLACES, (len(COLORS), len(SHAPES)))
    for place, (color, shape) in zip(stands(caption), parse(caption).objects, strict=False):
        found[place] = list(COLORS).index(color), SHAPES.index(shape)
    return list(found.values())
