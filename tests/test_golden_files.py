"""The files that other languages test against say what Python does today."""

import json
import math
import re

import pytest
from make_golden import FILES, FOLDER, text
from manifest_cases import KINDS, whole
from token_cases import SHAPES

from edgesd.errors import DataError, RequestError
from edgesd.manifest import TokenizerSpec, parse
from edgesd.runtime.tokenizer import PromptTokenizer

MANIFESTS = json.loads((FOLDER / "manifests.json").read_text())


@pytest.mark.parametrize("name", FILES)
def test_a_golden_file_is_what_its_command_writes(name):
    pytest.importorskip("diffusers")
    assert same(json.loads((FOLDER / f"{name}.json").read_text()), json.loads(text(name)))


def same(a, b) -> bool:
    """Equal, but for the last digits of numbers: those of cos and ln differ between processors."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(key == "file_base64" or same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-6)
    return type(a) is type(b) and a == b


def test_golden_files_stay_small_and_known():
    assert {path.stem for path in FOLDER.glob("*")} == set(FILES)
    assert sum(path.stat().st_size for path in FOLDER.glob("*")) < 3 << 20


@pytest.mark.parametrize("case", MANIFESTS["refused"], ids=lambda case: case["name"])
def test_a_hostile_manifest_is_refused_for_its_reason(case):
    with pytest.raises(DataError) as caught:
        parse(whole(case["parts"]))
    assert re.search(KINDS[case["kind"]], str(caught.value)), str(caught.value)


@pytest.mark.parametrize("case", MANIFESTS["taken"], ids=lambda case: case["name"])
def test_a_sound_manifest_is_taken(case):
    assert parse(whole(case["parts"])).target == "tflite"


def test_prompts_beyond_the_limits_are_refused():
    golden = json.loads((FOLDER / "tokens.json").read_text())
    fields = {key: value for key, value in golden["specs"][0].items() if key != "tokenizer"}
    tokenizer = PromptTokenizer(SHAPES.read_bytes(), TokenizerSpec(**fields))
    for case in golden["refused"]:
        with pytest.raises(RequestError):
            tokenizer.encode(case["text"] * case["times"])
    for case in golden["accepted"]:
        assert tokenizer.encode(case["text"] * case["times"]).ids.shape == (1, 24)
    assert len({case["prompt"] for case in golden["cases"]}) == 200
