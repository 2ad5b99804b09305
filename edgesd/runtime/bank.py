"""Prepared prompts: an app with fixed prompts ships what the text encoder made of them, and no text encoder.

The file is safetensors: `states` [N,L,D] f32 and, for SDXL, `pooled` [N,P] f32, row i of prompt i; the prompts are a
JSON list in the metadata, under the format's name. A prompt is found by its exact text, spaces at the ends apart; ""
(no negative prompt) is one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as dump_tensors

from edgesd.errors import DataError, RequestError
from edgesd.files import open_regular
from edgesd.runtime.cache import PromptCache
from edgesd.runtime.pipeline import Pipeline
from edgesd.runtime.text import Encoded, encode_prompt
from edgesd.runtime.tokenizer import check_prompt

FORMAT = "edgesd-prompts-1"
MAX_PROMPTS = 4096
MAX_BYTES = 1 << 30
_SHOWN = 6


class PromptBank:
    """Prompts and their states, in order. states [N,L,D] f32; pooled [N,P] f32 or None."""

    def __init__(self, prompts: Sequence[str], states: np.ndarray, pooled: np.ndarray | None = None) -> None:
        self.prompts, self.states, self.pooled = tuple(prompts), states, pooled
        self._rows = {prompt: row for row, prompt in enumerate(self.prompts)}

    def find(self, prompt: str) -> Encoded:
        """The prepared states of a prompt. Raises RequestError, naming what there is, for one that was not prepared."""
        row = self._rows.get(prompt.strip())
        if row is None:
            known = [repr(p) for p in self.prompts if p]
            more = f" and {len(known) - _SHOWN} more" if len(known) > _SHOWN else ""
            raise RequestError(
                f"the prompt {prompt.strip()[:80]!r} was not prepared in this bundle",
                ", ".join(known[:_SHOWN]) + more, "Choose one of these, or package without --prompt-bank",
            )  # fmt: skip
        pooled = None if self.pooled is None else self.pooled[row : row + 1]
        return Encoded(self.states[row : row + 1], pooled)

    def dump(self) -> bytes:
        """The bytes of the file; the same bank, the same bytes."""
        tensors = {"states": self.states} | ({} if self.pooled is None else {"pooled": self.pooled})
        # One key alone: safetensors writes several in any order.
        head = {FORMAT: json.dumps(list(self.prompts), ensure_ascii=False)}
        return dump_tensors({name: np.ascontiguousarray(value) for name, value in tensors.items()}, head)


def prepare(pipeline: Pipeline, prompts: Sequence[str]) -> PromptBank:
    """Encodes prompts with a pipeline that has its text encoders."""
    cache = PromptCache(max_bytes=0)
    encoded = [encode_prompt(pipeline, prompt, cache) for prompt in prompts]
    if cut := next((e.truncated for e in encoded if e.truncated), ""):
        raise RequestError(f"a prepared prompt is too long; cut off: {cut[:80]!r}", "prompts that fit",
                           "Shorten it, or add --long-prompt")  # fmt: skip
    pooled = [e.pooled for e in encoded if e.pooled is not None]
    return PromptBank(prompts, np.concatenate([e.states for e in encoded]), np.concatenate(pooled) if pooled else None)


def read_prompts(path: Path) -> tuple[str, ...]:
    """The prompts of a file, a JSON list of texts or one a line, each once; "" is added at the end.

    Raises RequestError for a file that is not there, is neither, or holds none or too many.
    """
    try:
        text = path.read_text(encoding="utf-8")
        listed = json.loads(text) if text.lstrip().startswith("[") else text.splitlines()
    except (OSError, ValueError, RecursionError) as error:
        came = f"--prompt-bank {path.name!r} does not read ({str(error)[:120]})"
        raise RequestError(came, "a JSON list of texts, or one prompt a line, in UTF-8", "Check the file") from None
    if not all(isinstance(prompt, str) for prompt in listed):
        raise RequestError(f"{path.name} holds more than texts", "a JSON list of texts", "Check the file")
    prompts = [prompt for prompt in dict.fromkeys(p.strip() for p in listed) if prompt]
    if not 0 < len(prompts) < MAX_PROMPTS:
        raise RequestError(f"{path.name} holds {len(prompts)} prompts", f"1 to {MAX_PROMPTS - 1}", "Change the file")
    for prompt in prompts:
        check_prompt(prompt)
    return (*prompts, "")


def load_bank(path: Path) -> PromptBank:
    """Reads a bank. Raises DataError for a broken one."""
    try:
        with open_regular(path) as file:
            data = file.read(MAX_BYTES + 1)
        tensors = load_tensors(data)
        head = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        prompts = json.loads(head[FORMAT])
        if len(data) > MAX_BYTES or not isinstance(prompts, list):
            raise ValueError("too large, or no bank of prompts")
        if not 0 < len(prompts) <= MAX_PROMPTS or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError("prompts that are none")
        states, pooled = tensors.pop("states"), tensors.pop("pooled", None)
        for array, axes in ((states, 3), (pooled, 2)):
            if array is not None and not (
                array.dtype == np.float32 and array.ndim == axes and len(array) == len(prompts)
            ):
                raise ValueError("states that do not fit the prompts")
            if array is not None and not np.isfinite(array).all():
                raise ValueError("numbers that are not finite")
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        came = f"the prepared prompts do not read ({str(error)[:120]})"
        raise DataError(came, "what edgesd wrote", "Package the model again") from None
    return PromptBank(prompts, states, pooled)
