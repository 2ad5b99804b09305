"""The embedded model's training, whole, in a minute; and the parts of its recipe that a short run cannot show."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from edgesd.compress.widths import trained_widths
from edgesd.errors import RequestError
from edgesd.models.load import load
from edgesd.runtime.generate import generate
from edgesd.shapes.autoencoder import _edges
from edgesd.shapes.consistency import Consistency
from edgesd.shapes.denoiser import Denoiser, make_data
from edgesd.shapes.reading import token_ids
from edgesd.shapes.train import Config, train_shapes
from edgesd.shapes.world import parse
from edgesd.sources import open_pipeline, torch_pipeline
from edgesd.training.finetune import levels
from edgesd.training.pool import encode_pictures, world_captions, world_scenes

SHORT = Config(
    vae_steps=4,
    text_steps=2,
    steps=3,
    student_steps=2,
    pictures=16,
    batch=4,
    vae_batch=4,
    measures=0,
    precision="fp32",
    decoder=16,
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training") / "run"
    return folder, train_shapes(folder, SHORT)


def test_a_run_ends_with_two_checkpoints_that_draw(trained):
    folder, reached = trained
    assert reached["done"]
    assert {name: stage["step"] for name, stage in reached["stages"].items()} == {
        "vae": 4,
        "text": 2,
        "denoiser": 3,
        "student": 2,
    }
    for name, steps in (("shapes", 2), ("shapes-lcm", 4)):
        pipeline = torch_pipeline(load(str(folder / name)))
        pictures = generate(pipeline, "a red circle on a white background", seed=1, num_inference_steps=steps)
        assert pictures[0].image.shape == (128, 128, 3)
    for config in folder.glob("shapes*/*/config.json"):
        assert str(folder.parent) not in config.read_text()
    assert load(str(folder / "shapes-lcm")).spec.defaults.sampler == "lcm"
    assert json.loads((folder / "shapes/edgesd.json").read_text())["nested_widths"] == [1.0, 0.75, 0.5]
    assert (folder / "denoiser.png").is_file()


def test_diffusers_opens_what_was_trained(trained):
    from diffusers import StableDiffusionPipeline

    folder, _ = trained
    for name in ("shapes", "shapes-lcm"):
        pipeline = StableDiffusionPipeline.from_pretrained(
            folder / name, safety_checker=None, torch_dtype=torch.float32
        )
        assert pipeline("a red circle on a white background", num_inference_steps=1).images[0].size == (128, 128)


def test_a_run_goes_on_from_another_checkpoint(trained, tmp_path):
    """Stages that are left out keep the start's weights, and the sidecar tells every stage since the first."""
    folder, _ = trained
    start = load(str(folder / "shapes"))
    reached = train_shapes(
        tmp_path / "more", replace(SHORT, vae_steps=0, text_steps=0, student_steps=0, start=str(folder / "shapes"))
    )
    made = load(str(tmp_path / "more/shapes"))
    assert set(reached["stages"]) == {"denoiser"}
    for part, same in (("vae", True), ("unet", False), ("text_encoder", False)):
        pairs = zip(start.modules[part].parameters(), made.modules[part].parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs) == same
    told = json.loads((tmp_path / "more/shapes/edgesd.json").read_text())["training"]
    assert [(run["stage"], run["steps"]) for run in told] == [("vae", 4), ("text", 2), ("denoiser", 3), ("denoiser", 3)]


def test_a_decoder_alone_leaves_the_latents(trained, tmp_path):
    start = load(str(trained[0] / "shapes"))
    alone = replace(SHORT, text_steps=0, steps=0, student_steps=0, start=str(trained[0] / "shapes"), decoder_only=True)
    train_shapes(tmp_path / "vae", alone)
    made = load(str(tmp_path / "vae/shapes"))
    assert made.spec.latent.scaling_factor == start.spec.latent.scaling_factor
    for part, same in (("encoder", True), ("decoder", False)):
        pairs = zip(getattr(start.modules["vae"], part).parameters(), getattr(made.modules["vae"], part).parameters(),
                    strict=True)  # fmt: skip
        assert all(torch.equal(a, b) for a, b in pairs) == same
    assert trained_widths(made) == (1.0, 0.75, 0.5)
    with pytest.raises(RequestError, match="from nothing"):
        replace(SHORT, decoder_only=True)


def test_a_checkpoint_draws_at_the_widths_it_was_trained_at(trained):
    folder, _ = trained
    pipeline = open_pipeline(str(folder / "shapes"))
    assert pipeline.session.widths("unet") == (1.0, 0.75, 0.5)
    given = {"seed": 1, "num_inference_steps": 2}
    wide, narrow = (
        generate(pipeline, "a red circle on a white background", width=width, **given)[0].image for width in (1, 0.5)
    )
    assert not np.array_equal(wide, narrow)
    assert open_pipeline(str(folder / "shapes-lcm")).session.widths("unet") == (1.0,)


def test_the_lora_of_a_run_makes_its_student(trained):
    folder, _ = trained
    made = load(str(folder / "shapes"), lora=[str(folder / "shapes-lcm.safetensors")])
    student = load(str(folder / "shapes-lcm"))
    for ours, theirs in zip(made.modules["unet"].parameters(), student.modules["unet"].parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=2e-3)  # float16 of the checkpoint


def test_the_shipped_model_was_trained_at_its_widths_and_a_lora_at_none(trained):
    folder, _ = trained
    assert trained_widths(load()) == (1.0, 0.75, 0.5)
    assert trained_widths(load("shapes", lora=[str(folder / "shapes-lcm.safetensors")])) == ()


def test_captions_of_two_objects_are_drawn_more_often():
    drawn = data(load(), 64)
    pairs = int((drawn.share == 3).sum())
    assert 16 < pairs < 48
    assert int((drawn.share == 1).sum()) == 64 - pairs
    _, ids, _ = drawn.draw(torch.Generator().manual_seed(0), 2000, 0.0)
    seen = torch.tensor([bool((drawn.ids[drawn.share == 3] == row).all(1).any()) for row in ids])
    assert seen.float().mean().item() == pytest.approx(3 * pairs / (3 * pairs + 64 - pairs), abs=0.04)


def test_a_run_that_is_cut_leaves_what_it_has_and_units_that_were_nested_once_keep_their_places(
    trained, tmp_path, monkeypatch
):
    widest = replace(SHORT, vae_steps=0, text_steps=0, student_steps=0, widths=(1.0,), start=str(trained[0] / "shapes"))
    cut = replace(widest, steps=50, stop_after=1e-9)
    assert not train_shapes(tmp_path / "cut", cut)["done"]
    told = json.loads((tmp_path / "cut/shapes/edgesd.json").read_text())
    assert (told["training"][-1]["stage"], told["training"][-1]["steps"]) == ("denoiser", 1)
    assert told["nested_widths"] == [1.0]
    assert load(str(tmp_path / "cut/shapes")).spec.latent.channels == 4

    def sorted_again(*_):
        raise AssertionError("units were put in order a second time")

    monkeypatch.setattr("edgesd.training.finetune.important_first", sorted_again)
    nested = replace(widest, widths=SHORT.widths, start=str(tmp_path / "cut/shapes"))
    assert train_shapes(tmp_path / "nested", nested)["done"]
    assert json.loads((tmp_path / "nested/shapes/edgesd.json").read_text())["nested_widths"] == [1.0, 0.75, 0.5]


def test_edges_are_where_colours_change():
    picture = torch.full((1, 3, 16, 16), -1.0)
    picture[:, 0, :, 8:] = 0.5
    assert _edges(picture)[0, 0, 5].tolist() == [0] * 6 + [1] * 4 + [0] * 6


def test_another_configuration_in_the_same_folder_is_refused(trained):
    with pytest.raises(RequestError, match="another configuration"):
        train_shapes(trained[0], Config(steps=7))


def test_the_world_gives_the_same_pictures_by_number():
    one, two = list(world_scenes(3, start=5)), list(world_scenes(1, start=6))
    assert one[1][0] == two[0][0]
    assert np.array_equal(one[1][1], two[0][1])


def test_the_shipped_model_knows_the_noise_of_its_world():
    """Latents and captions reach the UNet as in training: its error is far below that of no knowledge."""
    model = load()
    job = Denoiser(model, data(model, 64), batch=32)
    with torch.no_grad():
        loss = float(job.loss(torch.Generator().manual_seed(0), torch.device("cpu")))
    assert loss < 0.02  # the card's training ended at 0.008; noise alone would give 0.4


def test_the_shipped_model_reads_which_object_goes_where():
    """A caption with its relation turned round leads the UNet astray, where noise is all that it sees."""
    model, opposite = load(), dict(left="right", right="left", above="below", below="above")
    told = [text for text in world_captions(64) if parse(text).relation is not None]
    turned = [" ".join(opposite.get(word, word) for word in text.split()) for text in told]
    tokenizer = torch_pipeline(model).tokenizers[0]
    pool = data(model, 64)
    latents = pool.latents[pool.share == 3]
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    timestep = torch.full((len(told),), 999)
    noisy = levels(model.spec).noisy(latents, noise, timestep)
    with torch.no_grad():
        right, wrong = (
            float((model.modules["unet"](noisy, timestep, states).sample - noise).square().mean())
            for states in (
                model.modules["text_encoder"](token_ids(tokenizer, texts)).last_hidden_state for texts in (told, turned)
            )
        )
    assert wrong > 1.5 * right  # 2.1 times; where the order is not read, 1.00


def test_a_teacher_is_already_consistent_where_its_path_is_straight():
    """The consistency function of diffusers: at the lowest noise level it hands its sample on unchanged."""
    model = load()
    job = Consistency(model, data(model, 8), 4)
    sample = torch.randn(2, 4, 16, 16)
    told = torch.zeros(2, 24, 128)
    with torch.no_grad():
        same = job._clean(model.modules["unet"], sample, torch.tensor([0, 0]), told)
    assert torch.allclose(same, sample, atol=1e-6)
    with torch.no_grad():
        assert float(job.loss(torch.Generator().manual_seed(0), torch.device("cpu"))) < 0.3


def data(model, count):
    pipeline = torch_pipeline(model)
    return make_data(pipeline, *encode_pictures(pipeline, world_scenes(count), count, lambda *_: None), 3)
