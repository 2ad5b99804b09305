"""A diffusers folder as a model site would give it: one .safetensors file, and a LoRA for it with kohya's keys.

python benchmarks/single_file.py FOLDER OUT

Writes OUT/model.safetensors (float16, the original key layout) and OUT/style.safetensors (rank 8, random, on the
attention of the UNet and the text encoder), for figures of time and memory with `edgesd package OUT/model.safetensors`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

RANK = 8
LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the inverse of the key mapping lies with the tests


def style(pipeline) -> dict[str, torch.Tensor]:
    """A small random LoRA on every attention layer, with the keys of kohya's trainer."""
    tensors: dict[str, torch.Tensor] = {}
    for prefix, module in (("lora_unet", pipeline.unet), ("lora_te_text_model", pipeline.text_encoder)):
        for name, layer in module.named_modules():
            if name.endswith(LAYERS) and isinstance(layer, torch.nn.Linear):
                base = f"{prefix}_{name.removeprefix('text_model.').replace('.', '_')}"
                tensors[f"{base}.lora_down.weight"] = 0.05 * torch.randn(RANK, layer.in_features).half()
                tensors[f"{base}.lora_up.weight"] = 0.05 * torch.randn(layer.out_features, RANK).half()
                tensors[f"{base}.alpha"] = torch.tensor(float(RANK))
    return tensors


def main(source: Path, folder: Path) -> None:
    import original
    from diffusers import DiffusionPipeline

    torch.manual_seed(0)
    pipeline = DiffusionPipeline.from_pretrained(source, torch_dtype=torch.float16)
    folder.mkdir(parents=True, exist_ok=True)
    original.save(pipeline, folder / "model.safetensors", torch.float16)
    save_file(style(pipeline), folder / "style.safetensors")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: single_file.py FOLDER OUT")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
