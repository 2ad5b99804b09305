"""Prompts to token ids and weights, as CLIP text encoders take them.

Prompt weights follow AUTOMATIC1111's web UI: `(word)` multiplies a weight by 1.1, `[word]` by 1/1.1, `(word:1.3)` by
1.3; they nest and multiply; `\\(`, `\\)`, `\\[`, `\\]` and `\\\\` stand for the characters themselves, any other
backslash is dropped. A bracket that nobody closes reaches to the end; a closing bracket without an opening one is text.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from edgesd.errors import DataError, RequestError
from edgesd.manifest import TokenizerSpec

MAX_PROMPT_CHARS = 20_000
MAX_NESTING = 32
MAX_WEIGHT = 10.0
MAX_TOKENIZER_BYTES = 64 << 20
OPEN_FACTOR = {"(": 1.1, "[": 1 / 1.1}
CLOSES = {")": "(", "]": "["}
_ROLES = ("bos", "eos", "pad")
# An escape, a bracket, `:number)`, or text that holds none of these.
_MARKUP = re.compile(r"\\[()\[\]\\]?|[(\[\])]|:\s*(?P<weight>[+-]?[\d.]+)\s*\)|:|[^\\()\[\]:]+")


@dataclass(frozen=True)
class Tokens:
    """One prompt laid out for its text encoder, a row a call.

    ids: [n, L] i64, start and end token and padding included. weights: [n, L] f32, 1 on every special token.
    truncated: the text that did not fit, "" when all did.
    """

    ids: np.ndarray
    weights: np.ndarray
    truncated: str = ""

    @property
    def weighted(self) -> bool:
        """Whether any weight differs from 1, so that `apply_weights` would change something."""
        return bool((self.weights != 1).any())


@dataclass(frozen=True)
class _Piece:
    """One token of the prompt, and where its text begins: (index of the fragment, character within it)."""

    id: int
    weight: float
    start: tuple[int, int]


class PromptTokenizer:
    """A tokenizer.json with the layout its text encoder wants. Equals transformers' CLIPTokenizer on plain text."""

    def __init__(self, data: bytes | str, spec: TokenizerSpec) -> None:
        """data: the contents of a tokenizer.json. Raises DataError if it does not load or lacks the spec's ids."""
        fix = "Get the bundle again from where it came, or package the model again"
        if len(data) > MAX_TOKENIZER_BYTES:
            raise DataError(f"a tokenizer of {len(data)} bytes", f"up to {MAX_TOKENIZER_BYTES}", fix)
        try:
            self._tokenizer = Tokenizer.from_str(data if isinstance(data, str) else data.decode("utf-8"))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library's own panics are no Exception
            raise DataError(f"{spec.file} does not load ({str(error)[:200]})", "a tokenizer.json", fix) from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.spec = spec
        self._expand = dict(spec.expand)
        special = max(spec.bos_id, spec.eos_id, spec.pad_id, *(first + count - 1 for first, count in spec.expand))
        if special >= self._tokenizer.get_vocab_size():
            raise DataError(f"token id {special}", f"below {self._tokenizer.get_vocab_size()} in {spec.file}", fix)

    @classmethod
    def from_file(cls, path: Path, spec: TokenizerSpec) -> PromptTokenizer:
        """The tokenizer.json at path. Raises DataError where it cannot be read."""
        try:
            data = path.read_bytes()
        except OSError as error:
            fix = "Check the path, or package the model again"
            raise DataError(f"{path.name} cannot be read ({error.strerror})", "a tokenizer.json", fix) from None
        return cls(data, spec)

    def encode(self, prompt: str, *, weighted: bool = True) -> Tokens:
        """The prompt's ids and weights in `chunks` calls of max_length; what does not fit is cut off and reported.

        weighted=False takes brackets and backslashes as plain text, as diffusers does. Raises RequestError for a
        prompt that is too long, nests too deep or asks for a weight out of range.
        """
        check_prompt(prompt)
        fragments = parse_weights(prompt) if weighted else [(prompt, 1.0)]
        pieces = self._pieces(fragments)
        room = self.spec.max_length - 2
        calls = [self._lay_out(pieces[at : at + room]) for at in range(0, room * self.spec.chunks, room)]
        ids, weights = (np.concatenate(rows) for rows in zip(*calls, strict=True))
        room *= self.spec.chunks
        return Tokens(ids, weights, _text_from(fragments, pieces[room].start) if len(pieces) > room else "")

    def _pieces(self, fragments: list[tuple[str, float]]) -> list[_Piece]:
        """All tokens of a prompt, however many: fragments are tokenized one by one, as their weights differ."""
        pieces = []
        for index, (text, weight) in enumerate(fragments):
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
            for first, (start, _) in zip(encoding.ids, encoding.offsets, strict=True):
                ids = range(first, first + self._expand.get(first, 1))
                pieces += [_Piece(i, weight, (index, start)) for i in ids]
        return pieces

    def _lay_out(self, pieces: list[_Piece]) -> tuple[np.ndarray, np.ndarray]:
        """At most max_length - 2 tokens as one call's ids and weights, both [1, L]: start, tokens, end, padding."""
        ids = np.full((1, self.spec.max_length), self.spec.pad_id, np.int64)
        weights = np.ones((1, self.spec.max_length), np.float32)
        end = len(pieces) + 1
        ids[0, 0], ids[0, end] = self.spec.bos_id, self.spec.eos_id
        ids[0, 1:end] = [piece.id for piece in pieces]
        weights[0, 1:end] = [piece.weight for piece in pieces]
        return ids, weights


def check_prompt(prompt: str) -> None:
    """Raises RequestError for a prompt that no tokenizer should be given: too long, or not valid text."""
    if len(prompt) > MAX_PROMPT_CHARS:
        raise RequestError(f"a prompt of {len(prompt)} characters", f"up to {MAX_PROMPT_CHARS}", "Shorten it")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        fix = "Check the encoding of the terminal or file it came from"
        raise RequestError("a prompt with broken characters", "valid Unicode text", fix) from None


def parse_weights(prompt: str) -> list[tuple[str, float]]:
    """The prompt as fragments (text, weight), neighbours of equal weight joined; their texts make up what is read.

    Raises RequestError for brackets nested deeper than 32, a number that is none, or a weight beyond +-10.
    """
    parts: list[tuple[str, float]] = []
    opened: list[tuple[str, int]] = []  # (bracket, index of the first part inside)

    def close(bracket: str, factor: float) -> bool:
        at = next((i for i in reversed(range(len(opened))) if opened[i][0] == bracket), None)
        if at is None:
            return False
        first = opened.pop(at)[1]
        parts[first:] = [(text, weight * factor) for text, weight in parts[first:]]
        return True

    for match in _MARKUP.finditer(prompt):
        mark = match[0]
        if mark in OPEN_FACTOR:
            opened.append((mark, len(parts)))
            if len(opened) > MAX_NESTING:
                allowed = f"{MAX_NESTING} open at a time; \\( and \\[ for the characters"
                raise RequestError("a prompt with brackets nested too deep", allowed, "Close them or escape them")
        elif mark in CLOSES and close(CLOSES[mark], OPEN_FACTOR[CLOSES[mark]]):
            continue
        elif match["weight"] is not None and any(bracket == "(" for bracket, _ in opened):
            close("(", _weight(match["weight"]))
        else:
            parts.append((mark.removeprefix("\\"), 1.0))
    for bracket, _ in list(opened):
        close(bracket, OPEN_FACTOR[bracket])
    return _joined(parts)


def _weight(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        fix = "Write it like (word:1.3), or escape the brackets with a backslash"
        raise RequestError(f"prompt weight {text[:40]!r}", f"a number within +-{MAX_WEIGHT:g}", fix) from None


def _joined(parts: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Neighbours of equal weight as one fragment, so that plain text is tokenized as a whole."""
    joined: list[tuple[str, float]] = []
    texts: list[str] = []
    for index, (text, weight) in enumerate(parts):
        if not abs(weight) <= MAX_WEIGHT:
            fix = "Use a smaller weight or fewer brackets"
            raise RequestError(f"a prompt weight of {weight:g}", f"-{MAX_WEIGHT:g} to {MAX_WEIGHT:g}", fix)
        texts.append(text)
        if index + 1 == len(parts) or parts[index + 1][1] != weight:
            joined.append(("".join(texts), weight))
            texts = []
    return joined


def _text_from(fragments: list[tuple[str, float]], start: tuple[int, int]) -> str:
    index, character = start
    return "".join([fragments[index][0][character:], *(text for text, _ in fragments[index + 1 :])]).strip()


def apply_weights(hidden: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Text states [1, L, D] f32 multiplied by the tokens' weights [1, L], then scaled back to their former mean.

    The convention of AUTOMATIC1111's web UI (compel blends with the encoding of the prompt without the word
    instead). Where weighting moves the mean through zero no scale restores it, and the product stands.
    """
    weighted = hidden.astype(np.float64) * weights[..., None]
    before, after = hidden.mean(dtype=np.float64), weighted.mean()
    scale = before / after if before * after > 0 else 1.0
    return (weighted * scale).astype(np.float32)


def clip_tokenizer_json(folder: Path) -> str:
    """The tokenizer.json of a CLIP tokenizer's folder, built from vocab.json and merges.txt where it has none.

    Special tokens come from tokenizer_config.json or special_tokens_map.json. A padding token other than the end
    token (SD 2's and SDXL's second tokenizer: "!") becomes a special token, which changes how it is read in a prompt:
    so does transformers, and so were those models trained. Raises DataError for missing or broken files.
    """
    try:
        if (folder / "tokenizer.json").is_file():
            return (folder / "tokenizer.json").read_text(encoding="utf-8")
        vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [(left, right) for left, _, right in (line.partition(" ") for line in lines[1:]) if right]
        bos, eos, pad = _special_tokens(folder)
        bpe = models.BPE(vocab, merges, end_of_word_suffix="</w>", unk_token=eos)
        return _clip_tokenizer(bpe, (bos, vocab[bos]), (eos, vocab[eos]), pad).to_str()
    except Exception as error:  # the tokenizers library raises plain Exception
        fix = "Download the checkpoint again"
        allowed = "a folder with tokenizer.json, or vocab.json and merges.txt"
        raise DataError(f"the tokenizer in {folder.name} cannot be read ({error!s:.200})", allowed, fix) from None


def _special_tokens(folder: Path) -> tuple[str, str, str]:
    """Start, end and padding token of a transformers tokenizer folder; CLIP's own where it names none."""
    bos, eos, pad = "<|startoftext|>", "<|endoftext|>", "<|endoftext|>"
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            config = json.loads((folder / name).read_text(encoding="utf-8"))
            bos, eos, pad = (
                _content(config.get(f"{key}_token"), old) for key, old in zip(_ROLES, (bos, eos, pad), strict=True)
            )
    return bos, eos, pad


def _content(value: Any, fallback: str) -> str:
    """A special token as transformers writes it: a string, an object with `content`, or nothing."""
    if value is None:
        return fallback
    return value["content"] if isinstance(value, dict) else str(value)


def _clip_tokenizer(bpe: models.BPE, bos: tuple[str, int], eos: tuple[str, int], pad: str) -> Tokenizer:
    """CLIP's text pipeline (Radford et al. 2021): NFC, lower case, words, single digits, byte-level BPE."""
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = Regex(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(eos, bos, trim_offsets=False, add_prefix_space=False)
    tokenizer.add_special_tokens(list(dict.fromkeys((bos[0], eos[0], pad))))
    return tokenizer
