"""Prompts for the tokenizers of every language: two byte-level BPEs, 200 prompts, chunks, expanded tokens, refusals."""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path
from typing import Any

import edgesd
from edgesd.errors import RequestError
from edgesd.manifest import TokenizerSpec
from edgesd.runtime.tokenizer import MAX_PROMPT_CHARS, PromptTokenizer, clip_tokenizer_json

SHAPES = Path(edgesd.__file__).parent / "models" / "shapes" / "tokenizer" / "tokenizer.json"
PIECES = [
    "a",
    "red",
    "Circle",
    "left of",
    "42",
    "don't",
    "it'll",
    "we've",
    "I'm",
    "THEY'RE",
    "é",
    "e\u0301",
    "naïve",
    "Ελλάδα",
    "ΟΔΟΣ",
    "中文",
    "日本語の絵",
    "한국어",
    "\u1112\u1161\u11ab",
    "😀",
    "👩\u200d🚀",
    "👍🏽",
    "🇫🇷",
    "x!?",
    "!",
    "  ",
    "\n\t",
    "...",
    "ÀÉ",
    "ß",
    "ẞ",
    "İ",
    "ı",
    "_",
    "<|endoftext|>",
    "<|ENDOFTEXT|>",
    "<|startoftext|>x",
    "<|end",
    "3.14",
    "½",
    "Ⅷ",
    "²",
    "٣",
    "\u200b",
    "\u00a0",
    "\u2003",
    "\u2028",
    "\u0085",
    "\x1c",
    "\x00",
    "عربي",
    "हिन्दी",
    "ไทย",
    "ﬁ",
    "Ａ",
    "Ω",
    "Å",
    "\ufeff",
    "\ufffd",
    "\U0001d400",
    "क\u093c",
    "\u0340",
    "a\u0323\u0307",
    "a\u0307\u0323",
    "photograph",
    "watercolour",
    "naïveté",
    "red.",
    "'s",
    "''",
    "«oui»",
    "a/b",
    "#1",
    "$5",
    "\U00010400",
    "\u0130stanbul",
    "\u212a",
    "ǅ",
    "\u0345",
    "ΑΣ.",
    "(red)",
    "((blue",
    "[dim]",
    "(warm:1.3)",
    "(x:0.5",
    "\\(plain\\)",
    "a\\b",
    ":1.2)",
    "(a (b:1.5) c)",
    "(neg:-0.5)",
    "]",
    ")",
    "(:)",
    "(é:1.25)",
]
WORDS = [
    "red",
    "the",
    "photograph",
    "water",
    "colour",
    "naïve",
    "café",
    "中文",
    "日本",
    "😀",
    "circle",
    "ing",
    "'s",
    "한국",
    "Ελλάδα".lower(),
    "ß",
]
LONG = "a red circle above a blue square on a white background, "
REFUSED = [
    {"text": "a", "times": MAX_PROMPT_CHARS + 1},
    {"text": "😀", "times": MAX_PROMPT_CHARS + 1},
    {"text": "(", "times": 33},
    {"text": "(x:11)", "times": 1},
    {"text": "(x:-10.5)", "times": 1},
    {"text": "(x:1.2.3)", "times": 1},
    {"text": "(x:.)", "times": 1},
    {"text": "(" * 26 + "x", "times": 1},
    {"text": "((x:9):9)", "times": 1},
]
ACCEPTED = [
    {"text": "a", "times": MAX_PROMPT_CHARS},
    {"text": "😀", "times": MAX_PROMPT_CHARS},
    {"text": "[", "times": 32},
    {"text": "(x:+)", "times": 1},
]


def _bytes_to_letters() -> dict[int, str]:
    """GPT-2's printable stand-ins for bytes (Radford et al. 2019)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}


def clip_like() -> str:
    """A tokenizer.json as OpenAI's CLIP lays it out: bytes, bytes that end a word, merges that build WORDS; pad "!"."""
    letters = _bytes_to_letters()
    symbols = list(letters.values())
    vocab = {symbol: n for n, symbol in enumerate([*symbols, *(f"{s}</w>" for s in symbols)])}
    merges: dict[str, None] = {}
    for word in WORDS:
        parts = [letters[byte] for byte in word.encode()]
        parts[-1] += "</w>"
        made = parts[0]
        for part in parts[1:]:
            merges[f"{made} {part}"] = None
            made += part
            vocab.setdefault(made, len(vocab))
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "!"}))
        return clip_tokenizer_json(folder)


def prompts() -> list[str]:
    """200 of them: nothing, every piece alone, random mixtures, and some that do not fit."""
    rng = random.Random(7)
    mixed = [rng.choice(("", " ", ", ")).join(rng.choices(PIECES, k=rng.randint(2, 14))) for _ in range(200)]
    long = [LONG * 3, LONG * 9, "(" + LONG * 2 + ":1.2)" + LONG * 2, "😀" * 60, "中文" * 40, "a " * 200]
    fitting = [prompt for prompt in ["", " ", *PIECES, *long, *mixed] if readable(prompt)]
    return fitting[:200]


def readable(prompt: str) -> bool:
    try:
        PromptTokenizer(SHAPES.read_bytes(), specs()[0]).encode(prompt)
    except RequestError:
        return False
    return True


def specs() -> list[TokenizerSpec]:
    """The embedded model's, the same in two calls with two expanded tokens, and CLIP's length with another pad."""
    vocab = json.loads(clip_like())["model"]["vocab"]
    common = {"file": "tokenizer.json", "component": "text_encoder"}
    shapes = TokenizerSpec(**common, max_length=24, bos_id=613, eos_id=614, pad_id=614)
    clip = TokenizerSpec(
        **common, max_length=77, bos_id=vocab["<|startoftext|>"], eos_id=vocab["<|endoftext|>"], pad_id=vocab["!"]
    )
    return [shapes, shapes.model_copy(update={"chunks": 2, "expand": ((64, 3), (100, 2))}), clip]


def tokens_json(command: str) -> dict[str, Any]:
    jsons = [SHAPES.read_text(encoding="utf-8"), clip_like()]
    which = [0, 0, 1]
    chosen = specs()
    made = [PromptTokenizer(jsons[w], spec) for w, spec in zip(which, chosen, strict=True)]
    cases = [
        _case(tokenizer, index, prompt, weighted)
        for prompt in prompts()
        for index, tokenizer in enumerate(made)
        for weighted in ((True, False) if index == 0 else (True,))
    ]
    return {
        "command": command,
        "about": "ids: a list per call, without padding (pad_id up to max_length). weights: float32, 1 where left out. "
        "refused, accepted: text repeated so many times, for the first spec",
        "tokenizers": [json.loads(text) for text in jsons],
        "specs": [{"tokenizer": w} | spec.model_dump(mode="json") for w, spec in zip(which, chosen, strict=True)],
        "cases": cases,
        "refused": REFUSED,
        "accepted": ACCEPTED,
    }


def _case(tokenizer: PromptTokenizer, index: int, prompt: str, weighted: bool) -> dict[str, Any]:
    tokens = tokenizer.encode(prompt, weighted=weighted)
    ids = [_without_padding(row.tolist(), tokenizer.spec) for row in tokens.ids]
    case: dict[str, Any] = {"spec": index, "prompt": prompt, "weighted": weighted, "ids": ids}
    if tokens.weighted:
        rows = zip(tokens.weights, ids, strict=True)
        case["weights"] = [[float(str(w)) for w in row[: len(kept)]] for row, kept in rows]
    return case | ({"truncated": tokens.truncated} if tokens.truncated else {})


def words_json(command: str) -> dict[str, Any]:
    """Added words (textual inversion), as edgesd/models/embedding.py adds them: whole words, and one found anywhere."""
    data = json.loads(SHAPES.read_text(encoding="utf-8"))
    first, flags = max(data["model"]["vocab"].values()) + 1, {"lstrip": False, "rstrip": False, "special": False}
    for content, alone in (("zorb", True), ("zorb_1", True), ("<star>", False), ("Émile", True)):
        entry = {"id": first, "content": content, "single_word": alone, "normalized": True}
        data["added_tokens"].append(entry | flags)
        first += 1
    spec = specs()[0].model_copy(update={"expand": ((first - 4, 2),)})
    tokenizer = PromptTokenizer(json.dumps(data), spec)
    prompts = [
        "zorb",
        "a Zorb, red",
        "zorbs",
        "azorb",
        "zorb_1 zorb",
        "zorb_",
        "zorb-like",
        "中zorb",
        "zorb中",
        "(zorb:1.3)",
        "a<star>b",
        "<STAR>",
        "< star>",
        "<star><star>",
        "zorb<star>",
        "émile",
        "E\u0301mile",
        "ÉMILE émilex",
        "zorb " * 15,
        "red " * 21 + "zorb",
        "zorb\u0301",
        "zorb\u200dx",
        "zorb!zorb",
    ]
    return {
        "command": command,
        "about": "as tokens.json: a tokenizer with added words, one of them expanded",
        "tokenizers": [data],
        "specs": [{"tokenizer": 0} | spec.model_dump(mode="json")],
        "cases": [_case(tokenizer, 0, prompt, True) for prompt in prompts],
        "refused": [],
        "accepted": [],
    }


def _without_padding(ids: list[int], spec: TokenizerSpec) -> list[int]:
    end = len(ids)
    while end > 2 and ids[end - 1] == spec.pad_id and ids[end - 2] in (spec.pad_id, spec.eos_id):
        end -= 1
    return ids[:end]
