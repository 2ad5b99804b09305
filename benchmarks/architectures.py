"""Published architectures with random weights, as diffusers folders: for speed and memory, never for quality.

python benchmarks/architectures.py sd15|small|tiny FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch


def save_sd15(folder: Path) -> None:
    """Stable Diffusion 1.5's shapes (859.5 M parameters in the UNet), about 2 GB on disk."""
    _save(folder, (320, 640, 1280, 1280))


def save_small(folder: Path) -> None:
    """The same with half the channels (215 M parameters in the UNet): what fits phones and browsers, about 0.7 GB."""
    _save(folder, (160, 320, 640, 640))


def save_tiny(folder: Path) -> None:
    """The same with all widths cut to where every tool runs in seconds: to try a benchmark, never for a figure."""
    _save(folder, (32, 64, 64, 64), (32, 32, 64, 64), width=64, layers=2)


def _save(
    folder: Path, channels: tuple[int, ...], vae_channels: tuple[int, ...] = (128, 256, 512, 512), width: int = 768,
    layers: int = 12,
) -> None:  # fmt: skip
    """A whole pipeline in float16; width, layers: of the text encoder.

    The tokenizer is the embedded model's: CLIP's own vocabulary is not ours to ship.
    """
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from edgesd.models.load import embedded_folder

    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    unet = UNet2DConditionModel(
        sample_size=64, cross_attention_dim=width, attention_head_dim=8, block_out_channels=channels
    )
    vae = AutoencoderKL(
        block_out_channels=vae_channels, layers_per_block=2, latent_channels=4, sample_size=512,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    tokenizer = CLIPTokenizer.from_pretrained(embedded_folder() / "tokenizer", model_max_length=77)
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=width // 64,
            projection_dim=width,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip


ARCHITECTURES = {"sd15": save_sd15, "small": save_small, "tiny": save_tiny}

if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ARCHITECTURES:
        sys.exit(f"usage: architectures.py {'|'.join(ARCHITECTURES)} FOLDER")
    ARCHITECTURES[sys.argv[1]](Path(sys.argv[2]))
