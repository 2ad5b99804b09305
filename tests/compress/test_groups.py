"""Every block type: taking a group's units out equals silencing them in the dense model."""

import pytest
import tiny
import torch

from edgesd.compress.groups import cut, find_groups
from edgesd.errors import RequestError
from edgesd.models.count import count
from edgesd.models.modules import share

GENERATOR = torch.Generator().manual_seed(0)


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=GENERATOR)


def resnet_scale_shift():
    from diffusers.models.resnet import ResnetBlock2D

    torch.manual_seed(5)
    return ResnetBlock2D(
        in_channels=8, out_channels=16, temb_channels=12, groups=4, time_embedding_norm="scale_shift"
    ).eval()


def unet(family):
    made, spec = tiny.unet(family), tiny.spec(family)
    extra = {}
    if family.startswith("sdxl"):
        ids = 5 if family == "sdxl_refiner" else 6
        extra = {"added_cond_kwargs": {"text_embeds": rand(1, tiny.POOLED), "time_ids": rand(1, ids)}}
    if family == "lcm":
        extra = {"timestep_cond": rand(1, 10)}
    inputs = (rand(1, spec.unet_in_channels, 8, 8), torch.tensor([500.0]), rand(1, tiny.TOKENS, tiny.context(family)))
    return made, lambda m: m(*inputs, **extra).sample


def made(name):
    """(module, a call of it)."""
    ids = torch.randint(0, 90, (1, tiny.TOKENS), generator=GENERATOR)
    picture, latents = rand(1, 3, 32, 32), rand(1, 4, 4, 4)
    if name.startswith("clip"):
        module = tiny.text_encoder(projection=name == "clip2")
        return module, lambda m: m(ids).last_hidden_state
    if name == "resnet":
        x, time = rand(1, 8, 4, 4), rand(1, 12)
        return torch.nn.ModuleDict({"block": resnet_scale_shift()}), lambda m: m["block"](x, time)
    if name.startswith("vae"):
        module = tiny.vae("tiny" if name == "vae_tiny" else "full")
        return module, lambda m: torch.cat(
            [m.decode(latents).sample.flatten(), m.decoder(latents).flatten(), encoded(m, picture)]
        )
    return unet(name)


def encoded(vae, picture):
    out = vae.encode(picture)
    return (out.latents if hasattr(out, "latents") else out.latent_dist.mean).flatten()


def silenced(module, gone):
    """A copy of the dense module whose consumers do not hear these units."""
    copy = share(module)
    for group, units in gone:
        consumer = copy.get_submodule(group.consumer)
        consumer.weight = torch.nn.Parameter(consumer.weight.index_fill(1, group.channels(units), 0.0))
    return copy


@pytest.mark.parametrize("name", [*tiny.FAMILIES, "clip", "clip2", "vae_tiny", "vae_full", "resnet"])
def test_cutting_equals_silencing(name):
    module, call = made(name)
    with torch.no_grad():
        whole = call(module)
        for seed in range(2):
            smaller, gone = share(module), []
            for group in find_groups(module):
                order = torch.randperm(group.units, generator=torch.Generator().manual_seed(seed)).tolist()
                stay = 1 + seed * (group.units - 2)  # all but one unit, then a single unit
                gone.append((group, order[stay:]))
                cut(smaller, group, sorted(order[:stay]))
            wanted = call(silenced(module, gone))
            assert torch.allclose(call(smaller), wanted, atol=1e-5)
            assert not torch.equal(wanted, whole)
        assert torch.equal(call(module), whole)  # the dense module is as it was


def test_each_group_of_a_unet_alone():
    module, call = made("sd1")
    with torch.no_grad():
        for group in find_groups(module)[::3]:
            smaller = share(module)
            cut(smaller, group, [0])
            wanted = call(silenced(module, [(group, range(1, group.units))]))
            assert torch.allclose(call(smaller), wanted, atol=1e-5), group


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_all_groups_at_once_and_what_they_cost(name):
    module, call = made(name)

    class Call(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self):
            return call(self.inner)

    def cost(m):
        counted = count(Call(m), [])
        by_module = {k.removeprefix("inner").removeprefix("."): v for k, v in counted.by_module.items()}
        return type(counted)(counted.params, counted.bytes, counted.macs, by_module)

    before = cost(module)
    groups = find_groups(module, before)
    smaller = share(module)
    removed = 0
    for group in groups:
        cut(smaller, group, range(group.units // 2))
        removed += group.units - group.units // 2
        assert group.params > 0
        assert group.macs > 0
    assert torch.isfinite(call(smaller)).all()
    after = cost(smaller)
    gone = [(g.units - g.units // 2) for g in groups]
    assert before.params - after.params == sum(n * g.params for n, g in zip(gone, groups, strict=True))
    assert before.macs - after.macs == sum(n * g.macs for n, g in zip(gone, groups, strict=True))


def test_kinds_and_printing():
    groups = find_groups(tiny.unet("sd1"))
    assert {g.kind for g in groups} == {"resnet", "self_attention", "cross_attention", "feed_forward"}
    first = str(groups[0])
    assert groups[0].consumer in first
    assert "units" in first
    assert {g.kind for g in find_groups(tiny.vae())} == {"conv"}
    assert all(0 < g.step < g.units for g in groups)


def test_nothing_to_prune():
    with pytest.raises(RequestError, match="nothing to prune"):
        find_groups(torch.nn.Linear(2, 2))
