"""What a user adds to a checkpoint before anything else is done with it: LoRAs, words, skipped layers, longer prompts.

`add` checks all of it against the checkpoint's configs, before a weight is read; `apply` does it to loaded modules.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgesd.errors import RequestError
from edgesd.manifest import Ingredient, TokenizerSpec
from edgesd.models import embedding as embeddings
from edgesd.models import lora as loras
from edgesd.models.facts import read_json, source_hash
from edgesd.models.weights import empty_module
from edgesd.runtime.tokenizer import clip_tokenizer_json

if TYPE_CHECKING:
    import torch

    from edgesd.models.load import Checkpoint

MAX_CHUNKS = 8


def add(
    checkpoint: Checkpoint,
    lora: Iterable[str] = (),
    embedding: Iterable[str] = (),
    clip_skip: int = 0,
    long_prompt: int = 0,
) -> Checkpoint:
    """The checkpoint with these to be applied when it is loaded, its facts and identity changed accordingly.

    lora: "FILE" or "FILE:scale" each. embedding: "FILE" or "FILE:word" each. clip_skip: text layers left out at the
    end, counted as diffusers does. long_prompt: tokens a prompt may have, rounded up to whole text encoder calls whose
    states the UNet attends to end to end; 0 = one call. Raises RequestError for what does not fit this model, DataError
    for broken files.
    """
    read_loras = [loras.read(text) for text in lora]
    words = [embeddings.read(text) for text in embedding]
    if not (read_loras or words or clip_skip or long_prompt):
        return checkpoint
    _check_layers(checkpoint, clip_skip)
    call = checkpoint.spec.tokenizers[0].max_length
    chunks = max(1, math.ceil(long_prompt / call))
    if long_prompt < 0 or chunks > MAX_CHUNKS:
        raise RequestError(f"prompts of {long_prompt} tokens", f"up to {MAX_CHUNKS * call}", "Change --long-prompt")
    if read_loras:
        parts = [part for part in loras.PARTS if part in checkpoint.parts]
        empty = {part: empty_module(checkpoint.parts[part], part) for part in parts}
        read_loras = [loras.plan(one, empty) for one in read_loras]
    specs = []
    for index, spec in enumerate(checkpoint.spec.tokenizers):
        changed = _with_words(checkpoint, index, words)[1] if words else spec
        specs.append(changed.model_copy(update={"chunks": chunks}))
    made = (
        *checkpoint.ingredients,
        *(Ingredient(kind="lora", name=one.path.name, sha256=one.sha256, scale=one.scale) for one in read_loras),
        *(Ingredient(kind="embedding", name=one.word, sha256=one.sha256) for one in words),
    )
    facts = [checkpoint.sha256, [one.model_dump() for one in made], clip_skip, chunks]
    return replace(
        checkpoint,
        spec=checkpoint.spec.model_copy(update={"tokenizers": tuple(specs), "clip_skip": clip_skip}),
        loras=tuple(read_loras),
        embeddings=tuple(words),
        ingredients=made,
        sha256=hashlib.sha256(json.dumps(facts).encode()).hexdigest(),
    )


def _check_layers(checkpoint: Checkpoint, clip_skip: int) -> None:
    for part in (t.component for t in checkpoint.spec.tokenizers):
        layers = read_json(checkpoint.parts[part] / "config.json").get("num_hidden_layers", 12)
        most = layers - 1 - checkpoint.spec.family.startswith("sdxl")
        if not 0 <= clip_skip <= most:
            raise RequestError(f"clip skip {clip_skip}", f"0 to {most} for {part}", "Change --clip-skip")


def swapped(part: str, folder: Path) -> Ingredient:
    """The record of a part that replaces the checkpoint's own."""
    own = folder.name == part
    return Ingredient(kind=part, name=folder.parent.name if own else folder.name, sha256=source_hash(folder))


def tokenizer_json(checkpoint: Checkpoint, index: int) -> str:
    """The tokenizer.json of `spec.tokenizers[index]`, the added words in it."""
    if not checkpoint.embeddings:
        return clip_tokenizer_json(checkpoint.tokenizers[index])
    return _with_words(checkpoint, index, checkpoint.embeddings)[0]


def _with_words(checkpoint: Checkpoint, index: int, words: Sequence[embeddings.Embedding]) -> tuple[str, TokenizerSpec]:
    spec = checkpoint.spec.tokenizers[index].model_copy(update={"expand": ()})
    width = read_json(checkpoint.parts[spec.component] / "config.json").get("hidden_size", 0)
    return embeddings.add_words(clip_tokenizer_json(checkpoint.tokenizers[index]), spec, words, width)


def apply(checkpoint: Checkpoint, modules: dict[str, Any]) -> dict[str, torch.nn.Module]:
    """The loaded modules of some parts with LoRAs fused and words added."""
    for one in checkpoint.loras:
        loras.fuse(one, modules)
    for index, spec in enumerate(checkpoint.spec.tokenizers if checkpoint.embeddings else ()):
        if spec.component in modules:
            first = embeddings.first_id(clip_tokenizer_json(checkpoint.tokenizers[index]))
            module = modules[spec.component]
            modules[spec.component] = embeddings.add_rows(module, spec, checkpoint.embeddings, first)
    return modules
