"""A model that is ready to draw, whatever runs it: what `generate` and `evaluate` take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgesd.manifest import ModelSpec
from edgesd.runtime.policy import Policy, load_policy
from edgesd.runtime.session import Session
from edgesd.runtime.widths import Widths

if TYPE_CHECKING:
    from edgesd.runtime.bank import PromptBank
    from edgesd.runtime.table import SamplerTable
    from edgesd.runtime.tokenizer import PromptTokenizer


@dataclass(frozen=True)
class Pipeline:
    """spec: the model's facts. session: runs its components. tokenizers: in the order of spec.tokenizers.

    table: (sampler name, steps) -> SamplerTable; raises RequestError for a sampler or step count it lacks.
    steps: sampler name -> the step counts it has tables for; None = any.
    identity: a hash of the weights, the key under which prompt embeddings may be cached. bank: the prompts that were
    prepared, of a model without text encoders (tokenizers is then empty). policy: name or .json file -> the checked
    table, a bundle's own before edgesd's; raises as `load_policy`. widths: what the UNet's widths cost and lose, where
    it has several.
    """

    spec: ModelSpec
    session: Session
    tokenizers: tuple[PromptTokenizer, ...]
    table: Callable[[str, int], SamplerTable]
    identity: str
    steps: Callable[[str], tuple[int, ...]] | None = None
    bank: PromptBank | None = None
    widths: Widths | None = None
    policy: Callable[[str], Policy] = load_policy
