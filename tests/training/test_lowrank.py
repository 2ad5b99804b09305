"""What is learnt at low rank: little, all of it in the file, and read back by the room that fuses anybody's LoRA."""

import tiny
import torch

from edgesd.models import lora
from edgesd.training.lowrank import fused, low_rank, save_lora


def inputs():
    torch.manual_seed(3)
    return torch.randn(2, 4, 8, 8), torch.tensor([10, 700]), torch.randn(2, tiny.TOKENS, tiny.TEXT)


def trained(base):
    made = low_rank(base, 2)
    optimizer = torch.optim.SGD([p for p in made.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        made(*inputs()).sample.square().mean().backward()
        optimizer.step()
    return made


def test_it_starts_as_its_base_and_leaves_it_alone():
    base = tiny.unet(heads=4)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    assert torch.equal(low_rank(base, 4)(*inputs()).sample, base(*inputs()).sample)
    made = trained(base)
    assert not torch.allclose(made(*inputs()).sample, base(*inputs()).sample)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    learns = sum(p.numel() for p in made.parameters() if p.requires_grad)
    assert learns < 0.6 * sum(p.numel() for p in base.parameters())


def test_the_file_holds_all_that_was_learnt(tmp_path):
    base = tiny.unet(heads=4)
    made = trained(base)
    plain = fused(made, base)
    assert plain.state_dict().keys() == base.state_dict().keys()
    assert torch.allclose(plain(*inputs()).sample, made(*inputs()).sample, atol=1e-5)
    save_lora(made, tmp_path / "few.safetensors")
    one = lora.plan(lora.read(str(tmp_path / "few.safetensors")), {"unet": base})
    lora.fuse(one, {"unet": base})
    for name, value in plain.state_dict().items():
        assert torch.allclose(base.state_dict()[name], value, atol=1e-4), name
