"""The text encoder's lesson: what the places hold, and that an encoder learns it without forgetting the rest."""

import torch

from edgesd.models.load import load
from edgesd.shapes.reading import PLACES, Reader, placed
from edgesd.shapes.world import COLORS, SHAPES
from edgesd.sources import torch_pipeline
from edgesd.training.loop import Schedule, train


def number(color, shape):
    return list(COLORS).index(color), SHAPES.index(shape)


def test_what_a_caption_puts_where():
    nothing = (len(COLORS), len(SHAPES))
    first = dict(zip(PLACES, placed("a red circle right of a blue square on a white background"), strict=True))
    assert first == {"left of": number("blue", "square"), "right of": number("red", "circle"), "above": nothing,
                     "below": nothing}  # fmt: skip
    other = placed("a blue square left of a red circle on a white background")
    assert other == list(first.values())  # the same picture
    assert placed("a small red circle on a white background") == [nothing] * 4


def test_an_encoder_learns_its_places_and_keeps_its_words(tmp_path):
    model = load()
    encoder, tokenizer = model.modules["text_encoder"], torch_pipeline(load()).tokenizers[0]
    ids = torch.from_numpy(tokenizer.encode("a red circle above a blue ring on a white background").ids[0])[None]
    before = encoder(ids).last_hidden_state.clone()
    job = Reader(encoder, tokenizer)
    generator, cpu = torch.Generator(), torch.device("cpu")
    with torch.no_grad():
        first = float(job.loss(generator.manual_seed(5), cpu))
    train(job, tmp_path / "text", Schedule(1e-3, steps=8, warmup=1, ema=0.0))
    with torch.no_grad():
        last = float(job.loss(generator.manual_seed(5), cpu))
    after = encoder(ids).last_hidden_state
    words, places = slice(0, -len(PLACES)), slice(-len(PLACES), None)
    assert last < first - 0.3
    changed = [(after - before)[:, part].square().mean().item() for part in (words, places)]
    assert changed[0] < 0.2 * changed[1]
    assert 0 <= job.measure()["pairs placed right"] <= 1
