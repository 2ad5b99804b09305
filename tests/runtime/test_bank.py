"""Prepared prompts: found by their text, read back bit by bit, broken files refused."""

import json

import numpy as np
import pytest
from safetensors.numpy import save

from edgesd.errors import DataError, RequestError
from edgesd.runtime.bank import FORMAT, PromptBank, load_bank, read_prompts

RNG = np.random.default_rng(0)


def bank(pooled=True):
    states = RNG.standard_normal((3, 4, 5), np.float32)
    return PromptBank(("a cat", "a dog", ""), states, RNG.standard_normal((3, 6), np.float32) if pooled else None)


@pytest.mark.parametrize("pooled", [True, False])
def test_a_bank_reads_back_as_it_was_written(pooled, tmp_path):
    made = bank(pooled)
    (tmp_path / "bank.safetensors").write_bytes(made.dump())
    read = load_bank(tmp_path / "bank.safetensors")
    assert read.prompts == made.prompts
    found = read.find("  a dog ")
    np.testing.assert_array_equal(found.states, made.states[1:2])
    assert (found.pooled is not None) == pooled
    assert made.dump() == read.dump()


def test_an_unknown_prompt_is_refused_with_those_there_are():
    with pytest.raises(RequestError, match="'a cat', 'a dog'"):
        bank().find("a bird")


@pytest.mark.parametrize(
    "text", ["a cat\n\n a dog \na cat\n", json.dumps(["a cat", " a dog", "a cat", ""])], ids=["lines", "json"]
)
def test_prompts_are_read_once_each_with_the_empty_one(text, tmp_path):
    (tmp_path / "p").write_text(text)
    assert read_prompts(tmp_path / "p") == ("a cat", "a dog", "")


@pytest.mark.parametrize("content", [b"", b"[1, 2]", b'["a"', b"\xff\xfe", b"a\n" + b"x" * 30_000])
def test_files_that_hold_no_prompts_are_refused(content, tmp_path):
    (tmp_path / "p").write_bytes(content)
    with pytest.raises(RequestError):
        read_prompts(tmp_path / "p")
    with pytest.raises(RequestError):
        read_prompts(tmp_path / "nowhere")


def broken():
    good = {"states": np.zeros((2, 3, 4), np.float32)}
    head = {FORMAT: json.dumps(["a", ""])}
    yield b""
    yield b"\xff" * 40
    yield save(good)
    yield save(good, {"other": "[]"})
    yield save(good, {FORMAT: "[" * 9000})
    yield save(good, {FORMAT: json.dumps(["a"])})
    yield save(good, {FORMAT: json.dumps([1, 2])})
    yield save(good, {FORMAT: "{}"})
    yield save({"states": np.full((2, 3, 4), np.nan, np.float32)}, head)
    yield save({"states": np.zeros((2, 3), np.float32)}, head)
    yield save(good | {"pooled": np.zeros((1, 3), np.float32)}, head)


@pytest.mark.parametrize("data", list(broken()), ids=range(11))
def test_broken_banks_are_broken_data(data, tmp_path):
    (tmp_path / "bank").write_bytes(data)
    with pytest.raises(DataError):
        load_bank(tmp_path / "bank")
