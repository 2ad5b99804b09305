"""Textual inversion against diffusers' own loader; long prompts against text encoded piece by piece."""

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import save_file

from edgesd import sources
from edgesd.errors import DataError, RequestError
from edgesd.models import embedding
from edgesd.models.load import load, open_checkpoint
from edgesd.runtime.cache import PromptCache
from edgesd.runtime.generate import generate
from edgesd.runtime.text import encode_prompt

PROMPT = "a red circle above a blue square"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {f: tiny.folder(f, tmp_path_factory.mktemp(f)) for f in ("sd1", "sdxl")}


def vectors(count, width=tiny.TEXT, seed=0):
    return torch.randn((count, width), generator=torch.Generator().manual_seed(seed))


def opened(folder, **added):
    return sources.torch_pipeline(load(folder, **added))


def states(pipeline, prompt):
    return encode_prompt(pipeline, prompt, PromptCache()).states


@pytest.mark.parametrize("count", [1, 3])
def test_a_word_draws_as_diffusers_draws_it(count, folders, tmp_path):
    save_file({"<toy>": vectors(count)}, tmp_path / "toy.safetensors")
    theirs = tiny.pipeline("sd1")
    theirs.load_textual_inversion(str(tmp_path / "toy.safetensors"))
    ours = opened(folders["sd1"], embedding=[str(tmp_path / "toy.safetensors")])
    prompt = "a red <toy> above a blue square"
    expected = theirs(
        prompt, num_inference_steps=3, guidance_scale=3.0, height=64, width=64,
        generator=torch.Generator().manual_seed(3),
    ).images[0]  # fmt: skip
    drawn = generate(ours, prompt, num_inference_steps=3, guidance_scale=3.0, seed=3, rng="torch", sampler="ddim")[0]
    assert np.abs(drawn.image.astype(int) - np.asarray(expected).astype(int)).mean() <= 1
    plain = states(opened(folders["sd1"]), prompt)
    assert np.abs(plain - states(ours, prompt)).max() > 0.1  # the word does something


def test_ids_are_the_words_in_their_order(folders, tmp_path):
    save_file({"emb_params": vectors(2)}, tmp_path / "EasyWord.safetensors")
    save_file({"<one>": vectors(1, seed=1)[0]}, tmp_path / "one.safetensors")
    files = [str(tmp_path / name) for name in ("EasyWord.safetensors", "one.safetensors")]
    pipeline = opened(folders["sd1"], embedding=files)
    spec = pipeline.tokenizers[0].spec
    first = spec.eos_id + 1
    assert spec.expand == ((first, 2),)
    ids = pipeline.tokenizers[0].encode("easyword red <one>").ids[0].tolist()
    assert ids[1:3] == [first, first + 1]
    assert ids[ids.index(spec.eos_id) - 1] == first + 2
    inside = pipeline.tokenizers[0].encode("easywordly red").ids
    assert first not in inside  # a word, not a part of one
    rows = pipeline.session._modules["text_encoder"].get_input_embeddings().weight[first:]
    torch.testing.assert_close(rows, torch.cat([vectors(2), vectors(1, seed=1)]))


def test_weights_reach_every_vector_of_a_word(folders, tmp_path):
    save_file({"<toy>": vectors(3)}, tmp_path / "toy.safetensors")
    tokens = opened(folders["sd1"], embedding=[str(tmp_path / "toy.safetensors")]).tokenizers[0].encode("a (<toy>:1.5)")
    assert (tokens.weights == 1.5).sum() == 3


def test_sdxl_takes_a_word_for_both_encoders(folders, tmp_path):
    both = {"clip_l": vectors(2), "clip_g": vectors(2, tiny.POOLED)}
    save_file(both, tmp_path / "mine.safetensors")
    pipeline = opened(folders["sdxl"], embedding=[f"{tmp_path / 'mine.safetensors'}:zork"])
    assert [t.spec.expand for t in pipeline.tokenizers] == [((pipeline.tokenizers[0].spec.eos_id + 1, 2),)] * 2
    encoded = encode_prompt(pipeline, "a zork", PromptCache())
    assert np.isfinite(encoded.states).all()
    # The pooled text is still taken at the end token, though the word's ids are higher.
    ids = torch.from_numpy(pipeline.tokenizers[1].encode("a zork").ids)
    model = pipeline.session._modules["text_encoder_2"]
    end = ids[0].tolist().index(pipeline.tokenizers[1].spec.eos_id)
    with torch.no_grad():
        at_end = model.text_projection(model(ids).last_hidden_state[:, end])
    np.testing.assert_allclose(encoded.pooled, at_end.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("tensors", "text", "message"),
    [
        ({"<toy>": (3, 5)}, "", "vectors of 5 numbers"),
        ({"red": (1, 16)}, "", "in the vocabulary already"),
        ({"a": (1, 16), "b": (1, 16)}, "", "no embedding"),
        ({"emb_params": (200, 16)}, "", "no embedding"),
        ({"emb_params": (1, 16)}, ":two words", "one word"),
        ({"clip_l": (2, 16), "clip_g": (1, 24)}, "", "no embedding"),
    ],
)
def test_what_does_not_fit_is_refused(tensors, text, message, folders, tmp_path):
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, tmp_path / "e.safetensors")
    with pytest.raises(RequestError, match=message):
        open_checkpoint(folders["sd1"], embedding=[f"{tmp_path / 'e.safetensors'}{text}"])


def test_pickles_and_broken_files_are_refused(tmp_path):
    (tmp_path / "e.pt").write_bytes(b"\x80\x04")
    (tmp_path / "e.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(RequestError, match="pickle"):
        embedding.read(str(tmp_path / "e.pt"))
    with pytest.raises(DataError):
        embedding.read(str(tmp_path / "e.safetensors"))


# ---- long prompts -----------------------------------------------------------------------------------------------

LONG = " and ".join([PROMPT] * 8)  # 24 tokens a call: this takes two calls and more


def test_a_long_prompt_is_encoded_in_calls_and_attended_to_whole(folders):
    long = opened(folders["sd1"], long_prompt=48)
    plain = opened(folders["sd1"])
    assert [t.spec.chunks for t in long.tokenizers] == [2]
    tokens = long.tokenizers[0].encode(LONG)
    assert tokens.ids.shape == (2, 24)
    expected = [
        plain.session.run("text_encoder", {"input_ids": ids[None]})["encoder_hidden_states"] for ids in tokens.ids
    ]
    np.testing.assert_array_equal(states(long, LONG), np.concatenate(expected, axis=1))
    # Nothing is lost between the calls: their words, end to end, are the prompt's own.
    words = [i for row in tokens.ids for i in row.tolist() if i < long.tokenizers[0].spec.bos_id]
    all_words = [p.id for p in long.tokenizers[0]._pieces([(LONG, 1.0)])]
    assert words == all_words[: len(words)]
    assert tokens.truncated


def test_a_long_prompt_draws_as_diffusers_given_its_states(folders):
    long, theirs = opened(folders["sd1"], long_prompt=48), tiny.pipeline("sd1")
    given = {"prompt_embeds": states(long, LONG), "negative_prompt_embeds": states(long, "")}
    expected = theirs(
        **{k: torch.tensor(v) for k, v in given.items()}, num_inference_steps=3, guidance_scale=3.0, height=64,
        width=64, generator=torch.Generator().manual_seed(3),
    ).images[0]  # fmt: skip
    drawn = generate(long, LONG, num_inference_steps=3, guidance_scale=3.0, seed=3, rng="torch", sampler="ddim")[0]
    assert np.abs(drawn.image.astype(int) - np.asarray(expected).astype(int)).mean() <= 1


def test_a_short_prompt_leaves_the_other_calls_empty(folders):
    long, plain = opened(folders["sd1"], long_prompt=30), opened(folders["sd1"])
    got = states(long, PROMPT)
    np.testing.assert_array_equal(got, np.concatenate([states(plain, PROMPT), states(plain, "")], axis=1))


def test_weights_hold_within_each_call(folders):
    long = opened(folders["sd1"], long_prompt=48)
    plain, weighted = states(long, LONG), states(long, LONG.replace("red", "(red:1.4)", 1))
    assert not np.allclose(plain[:, :24], weighted[:, :24])
    np.testing.assert_array_equal(plain[:, 24:], weighted[:, 24:])


def test_prompts_of_any_length_are_refused(folders):
    with pytest.raises(RequestError, match="--long-prompt"):
        open_checkpoint(folders["sd1"], long_prompt=10_000)
