"""Tokens against transformers' CLIPTokenizer; prompt weights against the convention, worked out by hand."""

import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from token_cases import PIECES, SHAPES

from edgesd.errors import DataError, RequestError
from edgesd.manifest import TokenizerSpec
from edgesd.runtime.tokenizer import (
    MAX_PROMPT_CHARS,
    PromptTokenizer,
    apply_weights,
    clip_tokenizer_json,
    parse_weights,
)

FOLDER = SHAPES.parent


def spec(pad_id: int = 614, max_length: int = 24) -> TokenizerSpec:
    return TokenizerSpec(
        file="tokenizer.json", component="text_encoder", max_length=max_length, bos_id=613, eos_id=614, pad_id=pad_id
    )


def prompts(count: int) -> list[str]:
    rng = random.Random(5)
    return ["", " "] + [rng.choice(("", " ")).join(rng.choices(PIECES, k=rng.randint(1, 40))) for _ in range(count - 2)]


@pytest.fixture(scope="module")
def tokenizer() -> PromptTokenizer:
    return PromptTokenizer.from_file(FOLDER / "tokenizer.json", spec())


@pytest.fixture(scope="module")
def theirs():
    return pytest.importorskip("transformers").CLIPTokenizer.from_pretrained(FOLDER)


def reference(clip, prompt: str) -> list[int]:
    return clip(prompt, padding="max_length", max_length=24, truncation=True).input_ids


def test_plain_prompts_equal_transformers(tokenizer, theirs):
    for prompt in prompts(200):
        tokens = tokenizer.encode(prompt, weighted=False)
        assert tokens.ids.tolist() == [reference(theirs, prompt)], prompt
        assert tokens.ids.dtype == np.int64
        assert not tokens.weighted


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_a_folder_without_tokenizer_json_reads_like_transformers(tmp_path, pad):
    clip = pytest.importorskip("transformers").CLIPTokenizer
    model = json.loads((FOLDER / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    merges = "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]) + "\n"
    (tmp_path / "merges.txt").write_text(merges, encoding="utf-8")
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word"), False)
    bos = {"__type": "AddedToken", "content": "<|startoftext|>", "normalized": True, **flags}  # as SD 1.5 writes it
    config = {"pad_token": pad, "bos_token": bos, "tokenizer_class": "CLIPTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = clip.from_pretrained(tmp_path)
    ours = PromptTokenizer(clip_tokenizer_json(tmp_path), spec(pad_id=theirs.pad_token_id))
    for prompt in prompts(200):
        assert ours.encode(prompt, weighted=False).ids.tolist() == [reference(theirs, prompt)], prompt


def test_an_existing_tokenizer_json_is_taken_as_it_is():
    assert clip_tokenizer_json(FOLDER) == (FOLDER / "tokenizer.json").read_text(encoding="utf-8")


def test_what_does_not_fit_is_reported(tokenizer):
    words = "red circle left of blue star on green background and"
    tokens = tokenizer.encode(f"{words} {words} {words}")
    assert tokens.ids.shape == tokens.weights.shape == (1, 24)
    assert tokens.ids[0, -1] == 614
    assert tokens.truncated == f"left of{words.removeprefix('red circle left of')}"
    assert tokenizer.encode(f"{words} {words} red circle").truncated == ""
    assert tokenizer.encode(f"{words} {words} red (circle:1.2) [x]").truncated == "x"


@pytest.mark.parametrize(
    ("prompt", "fragments"),
    [
        ("plain, text: 1.5", [("plain, text: 1.5", 1.0)]),
        ("a (red) star", [("a ", 1.0), ("red", 1.1), (" star", 1.0)]),
        ("[red]", [("red", 1 / 1.1)]),
        ("((x)) (y:1.3)", [("x", 1.1 * 1.1), (" ", 1.0), ("y", 1.3)]),
        ("(a (b:2) c)", [("a ", 1.1), ("b", 2 * 1.1), (" c", 1.1)]),
        ("(a:0) b", [("a", 0.0), (" b", 1.0)]),
        ("(a: -0.5 )", [("a", -0.5)]),
        (r"\(a\) \[b\] c\\d e\f", [("(a) [b] c\\d ef", 1.0)]),
        ("a:1.5) b] (c", [("a:1.5) b] ", 1.0), ("c", 1.1)]),
        ("([a)]", [("a", 1.1 * (1 / 1.1))]),
        ("(a)(b)", [("ab", 1.1)]),
        ("()", []),
    ],
)
def test_weights_follow_the_convention(prompt, fragments):
    found = parse_weights(prompt)
    assert [text for text, _ in found] == [text for text, _ in fragments]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in fragments])


def test_weights_stand_on_their_tokens_alone(tokenizer):
    plain, weighted = tokenizer.encode("a red circle"), tokenizer.encode("a (red:1.5) circle")
    assert (plain.ids == weighted.ids).all()
    assert weighted.weights[0, :5].tolist() == [1.0, 1.0, 1.5, 1.0, 1.0]
    assert (weighted.weights[0, 5:] == 1).all()


@pytest.mark.parametrize(
    "prompt",
    ["a" * (MAX_PROMPT_CHARS + 1), "(" * 33, "(a:11)", "((a:9):9)", "(a:1.2.3)", "(a:" + "1" * 400 + ")", "bad \udcff"],
)
def test_prompts_out_of_bounds_are_refused(tokenizer, prompt):
    with pytest.raises(RequestError):
        tokenizer.encode(prompt)


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet=st.sampled_from("ab()[]:\\1.5 é中"), max_size=200))
def test_any_prompt_is_laid_out_or_refused(prompt):
    tokenizer = PromptTokenizer.from_file(FOLDER / "tokenizer.json", spec(max_length=8))
    try:
        tokens = tokenizer.encode(prompt)
    except RequestError:
        return
    read = "".join(text for text, _ in parse_weights(prompt))
    assert tokens.ids.shape == (1, 8)
    assert tokens.ids[0, 0] == 613
    assert 614 in tokens.ids[0]
    assert np.isfinite(tokens.weights).all()
    assert read.strip().endswith(tokens.truncated)


def test_weighting_keeps_the_mean():
    hidden = np.random.RandomState(0).randn(1, 6, 8).astype(np.float32) + 0.5
    weights = np.array([[1, 1.4, 1, 0.5, 1, 1]], np.float32)
    out = apply_weights(hidden, weights)
    assert out.dtype == np.float32
    assert out.mean() == pytest.approx(hidden.mean(), rel=1e-5)
    assert np.allclose(out[0, 1] / hidden[0, 1] * (hidden[0, 0] / out[0, 0]), 1.4, rtol=1e-5)
    assert (apply_weights(hidden, np.ones((1, 6), np.float32)) == hidden).all()


def test_weighting_a_mean_through_zero_stays_finite():
    hidden = np.array([[[1.0], [-1.0]]], np.float32)
    assert apply_weights(hidden, np.array([[1.0, 3.0]], np.float32)).ravel().tolist() == [1.0, -3.0]


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff\xfe", b'{"model": {"type": "BPE"}}', b"[" * 5000])
def test_a_broken_tokenizer_file_is_data_error(data):
    with pytest.raises(DataError):
        PromptTokenizer(data, spec())


def test_ids_beyond_the_vocabulary_and_missing_files_are_data_errors(tmp_path):
    with pytest.raises(DataError, match="9999"):
        PromptTokenizer.from_file(FOLDER / "tokenizer.json", spec(pad_id=9999))
    with pytest.raises(DataError):
        PromptTokenizer.from_file(tmp_path / "tokenizer.json", spec())
    with pytest.raises(DataError):
        clip_tokenizer_json(tmp_path)
