"""What the UNet is told besides the latents: text states, the pooled text and sizes of SDXL, LCM's guidance.

`conditions` gives them by the UNet's own input names, so that what calls the UNet need not know a family.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgesd.manifest import ModelSpec
from edgesd.runtime.cache import PromptCache, prompt_key
from edgesd.runtime.pipeline import Pipeline
from edgesd.runtime.settings import Settings
from edgesd.runtime.tokenizer import PromptTokenizer, Tokens, apply_weights

Conditions = dict[str, np.ndarray]  # UNet input -> [B, ...] f32
POOLED = "text_encoder_2"  # the component that also gives the whole prompt as one vector


@dataclass(frozen=True, eq=False)
class Encoded:
    """One prompt: states [1,L,D] f32, its weights applied; pooled [1,P] f32 (SDXL); truncated: what did not fit."""

    states: np.ndarray
    pooled: np.ndarray | None = None
    truncated: str = ""


def encode_prompt(pipeline: Pipeline, prompt: str, cache: PromptCache) -> Encoded:
    """The prompt through every text encoder of the model, their states side by side (SDXL's order), or as prepared."""
    if pipeline.bank is not None:
        return pipeline.bank.find(prompt)
    towers = [_tower(pipeline, tokenizer, prompt, cache) for tokenizer in pipeline.tokenizers]
    states = towers[0].states if len(towers) == 1 else np.concatenate([t.states for t in towers], axis=-1)
    pooled = next((t.pooled for t in towers if t.pooled is not None), None)
    return Encoded(states, pooled, next((t.truncated for t in towers if t.truncated), ""))


def _tower(pipeline: Pipeline, tokenizer: PromptTokenizer, prompt: str, cache: PromptCache) -> Encoded:
    tokens, component = tokenizer.encode(prompt), tokenizer.spec.component
    made: list[dict[str, np.ndarray]] = []

    def outputs() -> list[dict[str, np.ndarray]]:
        if not made:
            made.extend(pipeline.session.run(component, {"input_ids": ids[None]}) for ids in tokens.ids)
        return made

    def states() -> np.ndarray:
        return np.concatenate([one["encoder_hidden_states"] for one in outputs()], axis=1)

    hidden = cache.get(prompt_key(pipeline.identity, component, prompt), states)
    pooled = None
    if component == POOLED:
        key = prompt_key(pipeline.identity, f"{component}/pooled", prompt)
        pooled = cache.get(key, lambda: outputs()[0]["text_embeds"])
    return Encoded(_weighted(hidden, tokens) if tokens.weighted else hidden, pooled, tokens.truncated)


def _weighted(hidden: np.ndarray, tokens: Tokens) -> np.ndarray:
    """The weights of each call's tokens on its own states, as AUTOMATIC1111's web UI has it."""
    parts = np.split(hidden, len(tokens.ids), axis=1)
    return np.concatenate([apply_weights(p, w[None]) for p, w in zip(parts, tokens.weights, strict=True)], axis=1)


def conditions(
    pipeline: Pipeline, several: Sequence[Settings], size_px: tuple[int, int], cache: PromptCache, *, negative: bool
) -> tuple[Conditions, list[str]]:
    """What the UNet is told of the prompts (or the negative prompts) of a batch, and what of each did not fit."""
    spec = pipeline.spec
    encoded = [_side(pipeline, s, cache, negative) for s in several]
    told = {"encoder_hidden_states": np.concatenate([e.states for e in encoded])}
    if encoded[0].pooled is not None:
        told["text_embeds"] = np.concatenate([e.pooled for e in encoded if e.pooled is not None])
    if spec.time_ids:
        told["time_ids"] = np.array([time_ids(spec, s, size_px, negative=negative) for s in several], np.float32)
    if spec.guidance_embedding_dim > 0:
        embedded = [guidance_embedding(s.guidance_scale, spec.guidance_embedding_dim) for s in several]
        told["timestep_cond"] = np.stack(embedded)
    return told, [e.truncated for e in encoded]


def _side(pipeline: Pipeline, settings: Settings, cache: PromptCache, negative: bool) -> Encoded:
    if not negative:
        return encode_prompt(pipeline, settings.prompt, cache)
    if not pipeline.spec.zero_empty_negative or settings.negative_prompt.strip():
        return encode_prompt(pipeline, settings.negative_prompt, cache)
    like = encode_prompt(pipeline, settings.prompt, cache)
    return Encoded(np.zeros_like(like.states), None if like.pooled is None else np.zeros_like(like.pooled))


def time_ids(
    spec: ModelSpec, settings: Settings, size_px: tuple[int, int], *, negative: bool = False
) -> tuple[float, ...]:
    """SDXL's size conditioning: original size, crop, then target size, or the refiner's aesthetic score."""
    s = settings
    original = s.original_size if s.original_size is not None else size_px
    if spec.family == "sdxl_refiner":
        score = s.negative_aesthetic_score if negative else s.aesthetic_score
        return (*original, *s.crops_coords_top_left, score)
    return (*original, *s.crops_coords_top_left, *(s.target_size if s.target_size is not None else size_px))


def guidance_embedding(guidance: float, dim: int) -> np.ndarray:
    """Sinusoids of guidance - 1 for consistency models, [dim] f32 (diffusers' get_guidance_scale_embedding)."""
    half = dim // 2
    frequencies = np.exp(np.arange(half, dtype=np.float32) * np.float32(-np.log(10000.0) / (half - 1)))
    angles = np.float32((guidance - 1) * 1000.0) * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles), np.zeros(dim % 2, np.float32)]).astype(np.float32)
