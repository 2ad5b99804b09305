"""Textual inversion (Gal et al. 2022): words of one's own, as rows added to text encoders and tokens to tokenizers.

One word may stand for several vectors. It is one added token of tokenizer.json, and `TokenizerSpec.expand` says which
ids it is read as, so that a prompt stays a prompt on every runtime.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgesd.errors import DataError, RequestError
from edgesd.manifest import TokenizerSpec
from edgesd.models.facts import hash_file, safetensors_header
from edgesd.models.lora import check_file

if TYPE_CHECKING:
    import torch

MAX_VECTORS = 128
# Tensor names that model sites use -> the text encoder they are for; any other single name is the word itself.
_PARTS = {"emb_params": "text_encoder", "clip_l": "text_encoder", "clip_g": "text_encoder_2"}
_ALLOWED = "diffusers', AUTOMATIC1111's (emb_params) or SDXL's (clip_l, clip_g) embedding"


@dataclass(frozen=True)
class Embedding:
    """A word and where its vectors lie. keys: text encoder -> tensor name; shapes: text encoder -> (count, width)."""

    path: Path
    word: str
    sha256: str
    keys: Mapping[str, str]
    shapes: Mapping[str, tuple[int, int]]


def read(text: str) -> Embedding:
    """ "FILE" or "FILE:word"; the word is the file's own name for it otherwise, or the file's name.

    Raises RequestError (no file, a pickle, another kind of file), DataError (broken).
    """
    path, word = Path(text).expanduser(), ""
    if not path.exists() and ":" in text:
        name, _, word = text.rpartition(":")
        path = Path(name).expanduser()
    check_file(path, "embedding")
    header = safetensors_header(path)
    known = {key: part for key, part in _PARTS.items() if key in header}
    keys = {part: key for key, part in known.items()}
    if not known and len(header) == 1:
        keys = {"text_encoder": next(iter(header))}
        word = word if word else keys["text_encoder"]
    shapes = {part: _shape(header[key]["shape"]) for part, key in keys.items()}
    word = (word if word else path.stem).strip()
    good = bool(shapes) and len({count for count, _ in shapes.values()}) == 1
    if not good or not all(0 < count <= MAX_VECTORS for count, _ in shapes.values()):
        raise RequestError(
            f"{path.name} is no embedding", f"{_ALLOWED} of 1 to {MAX_VECTORS} vectors", "Check the file"
        )
    if not word or len(word) > 100 or any(c.isspace() or not c.isprintable() for c in word):
        raise RequestError(f"the word {word[:40]!r} of {path.name}", "one word", "Name it: --embedding FILE:word")
    return Embedding(path, word, hash_file(path), keys, shapes)


def _shape(shape: Sequence[int]) -> tuple[int, int]:
    return (shape[0], shape[1]) if len(shape) == 2 else (1, shape[0]) if len(shape) == 1 else (0, 0)


def add_words(
    tokenizer: str, spec: TokenizerSpec, embeddings: Sequence[Embedding], width: int
) -> tuple[str, TokenizerSpec]:
    """A tokenizer.json and its spec with the embeddings' words; ids follow the vocabulary in their order.

    width: of the text encoder. Raises RequestError for a word that is there already or vectors of another width.
    """
    from tokenizers import Tokenizer

    data, expand = json.loads(tokenizer), list(spec.expand)
    loaded = Tokenizer.from_str(tokenizer)
    for embedding in embeddings:
        count, wide = embedding.shapes.get(spec.component, (0, 0))
        if wide != width:
            came = f"{embedding.path.name} has vectors of {wide} numbers for {spec.component}"
            raise RequestError(came, f"{width}, as this model's", "Choose an embedding of the same family")
        first = loaded.get_vocab_size()
        words = [embedding.word, *(f"{embedding.word}_{index}" for index in range(1, count))]
        if any(loaded.token_to_id(word) is not None or loaded.token_to_id(f"{word}</w>") is not None for word in words):
            raise RequestError(
                f"the word {embedding.word!r} of {embedding.path.name} is in the vocabulary already",
                "a word of its own", "Name it: --embedding FILE:word",
            )  # fmt: skip
        alone = re.fullmatch(r"\w+", embedding.word) is not None  # else "cat" would be found within "catalogue"
        made = [
            {"id": first + index, "content": word, "single_word": alone, "lstrip": False, "rstrip": False,
             "normalized": True, "special": False}
            for index, word in enumerate(words)
        ]  # fmt: skip
        data["added_tokens"] = [*data.get("added_tokens", []), *made]
        loaded = Tokenizer.from_str(json.dumps(data))
        expand += [(first, count)] if count > 1 else []
    return json.dumps(data, ensure_ascii=False), spec.model_copy(update={"expand": tuple(expand)})


def first_id(tokenizer: str) -> int:
    """The id that the first added word gets in a tokenizer.json."""
    from tokenizers import Tokenizer

    return Tokenizer.from_str(tokenizer).get_vocab_size()


def add_rows(module: Any, tokenizer: TokenizerSpec, embeddings: Sequence[Embedding], first: int) -> torch.nn.Module:
    """The text encoder with the embeddings' vectors as rows from id `first` on. Raises DataError for a broken file."""
    import torch
    from safetensors import SafetensorError, safe_open

    rows, part = [], tokenizer.component
    for embedding in embeddings:
        try:
            with safe_open(embedding.path, framework="pt") as file:
                rows.append(file.get_tensor(embedding.keys[part]).float().reshape(embedding.shapes[part]))
        except (SafetensorError, OSError, RuntimeError) as error:
            came = f"{embedding.path.name} does not read ({str(error).splitlines()[0][:160]})"
            raise DataError(came, _ALLOWED, "Download it again") from None
    core = getattr(module, "text_model", module)
    old = core.embeddings.token_embedding.weight
    added = torch.cat(rows).to(old.dtype)
    whole = torch.cat([old[:first], added, old[first + len(added) :]])
    core.embeddings.token_embedding = torch.nn.Embedding.from_pretrained(whole)
    module.config.vocab_size = core.config.vocab_size = len(whole)
    if module.config.eos_token_id == 2:  # transformers' old mark for "the highest id is the end", which no longer holds
        for config in (module.config, core.config):
            config.eos_token_id = tokenizer.eos_id
        core.eos_token_id = tokenizer.eos_id
    return module.requires_grad_(False)
