"""Tiny random models of each family, made in well under a second: plain functions, the same weights each time.

`modules(family)` and `spec(family)` fit together as `edgesd.models.load` would give them.
Families: sd1, sd2, sdxl, sdxl_refiner, inpaint (9 channels), lcm (guidance embedding).
"""

from __future__ import annotations

import torch

from edgesd.manifest import Defaults, LatentSpec, ModelSpec, TokenizerSpec

FAMILIES = ("sd1", "sd2", "sdxl", "sdxl_refiner", "inpaint", "lcm")
VOCABULARY, TOKENS, TEXT, POOLED = 99, 12, 16, 24
SIZE_PX = (64, 96)  # not square, so that a swap of height and width shows


def unet(family: str = "sd1", *, heads: int = 2) -> torch.nn.Module:
    """A UNet2DConditionModel of about 0.1 M parameters, with the structure that marks its family."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(1)
    sdxl, text = family.startswith("sdxl"), context(family)
    options = {}
    if sdxl:
        ids = 5 if family == "sdxl_refiner" else 6
        options = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": POOLED + ids * 8,
            "transformer_layers_per_block": (1, 2),
        }
    if family == "lcm":
        options = {"time_cond_proj_dim": 10}
    model = UNet2DConditionModel(
        sample_size=8,
        in_channels=9 if family == "inpaint" else 4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=4,
        down_block_types=("DownBlock2D" if sdxl else "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D" if sdxl else "CrossAttnUpBlock2D"),
        cross_attention_dim=text,
        attention_head_dim=heads,
        use_linear_projection=sdxl or family == "sd2",
        **options,
    )
    return model.eval().requires_grad_(False)


def text_encoder(
    *,
    width: int = TEXT,
    projection: bool = False,
    eos_id: int | None = None,
    words: int = VOCABULARY,
    length: int = TOKENS,
) -> torch.nn.Module:
    """A CLIP text tower of 3 layers; with `projection` the second one of SDXL. words: size of its vocabulary."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(2)
    config = CLIPTextConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=length,
        projection_dim=POOLED,
        hidden_act="gelu" if projection else "quick_gelu",
        bos_token_id=words - 2,
        eos_token_id=words - 1 if eos_id is None else eos_id,
        pad_token_id=words - 1,
    )
    kind = CLIPTextModelWithProjection if projection else CLIPTextModel
    return kind(config).eval().requires_grad_(False)


def vae(kind: str = "tiny") -> torch.nn.Module:
    """An AutoencoderTiny or, with kind "full", an AutoencoderKL with attention; both scale by 8."""
    from diffusers import AutoencoderKL, AutoencoderTiny

    torch.manual_seed(3)
    widths = (8, 8, 8, 8)
    if kind == "tiny":
        model = AutoencoderTiny(
            encoder_block_out_channels=widths, decoder_block_out_channels=widths,
            num_encoder_blocks=(1, 1, 1, 1), num_decoder_blocks=(1, 1, 1, 1), scaling_factor=1.01,
        )  # fmt: skip
    else:
        model = AutoencoderKL(
            block_out_channels=widths, norm_num_groups=4, layers_per_block=1, scaling_factor=0.18215,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
    return model.eval().requires_grad_(False)


def context(family: str) -> int:
    """Width of the text states that the family's UNet takes (SDXL: both towers side by side)."""
    return {"sdxl": TEXT + POOLED, "sdxl_refiner": POOLED}.get(family, TEXT)


def modules(family: str = "sd1", vae_kind: str = "tiny") -> dict[str, torch.nn.Module]:
    """All modules of a family, keyed as `LoadedModel.modules`."""
    made = {"unet": unet(family), "vae": vae(vae_kind)}
    if family != "sdxl_refiner":
        made["text_encoder"] = text_encoder()
    if family.startswith("sdxl"):
        made["text_encoder_2"] = text_encoder(width=POOLED, projection=True)
    return made


def spec(family: str = "sd1", vae_kind: str = "tiny") -> ModelSpec:
    """The facts that go with `modules(family, vae_kind)`."""
    sdxl = family.startswith("sdxl")
    encoders = {"sdxl": ("text_encoder", "text_encoder_2"), "sdxl_refiner": ("text_encoder_2",)}
    return ModelSpec(
        name=f"tiny-{family}",
        family={"inpaint": "sd1", "lcm": "sd1"}.get(family, family),
        prediction_type="v_prediction" if family == "sd2" else "epsilon",
        unet_in_channels=9 if family == "inpaint" else 4,
        latent=LatentSpec(channels=4, downscale=8, scaling_factor=1.01 if vae_kind == "tiny" else 0.18215),
        tokenizers=tuple(
            TokenizerSpec(
                file=f"{name.replace('text_encoder', 'tokenizer')}/tokenizer.json",
                component=name,
                max_length=TOKENS,
                bos_id=VOCABULARY - 2,
                eos_id=VOCABULARY - 1,
                pad_id=VOCABULARY - 1,
            )
            for name in encoders.get(family, ("text_encoder",))
        ),
        defaults=Defaults(sampler="euler", size_px=SIZE_PX),
        guidance_embedding_dim=10 if family == "lcm" else 0,
        time_ids=sdxl,
    )


def folder(family: str, path, vae_kind: str = "tiny") -> str:
    """Saves a whole diffusers pipeline of a family, its words those of the embedded model's tokenizer; its path."""
    pipeline(family, vae_kind).save_pretrained(path)
    return str(path)


def pipeline(family: str, vae_kind: str = "tiny"):
    """diffusers' own text-to-image pipeline of a family (inpainting: the inpainting one)."""
    from importlib import resources

    import diffusers
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(str(resources.files("edgesd.models") / "shapes" / "tokenizer"))
    tower = {"words": len(tokenizer), "length": tokenizer.model_max_length}
    options = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
    parts = {"unet": unet(family), "vae": vae(vae_kind)}
    if family.startswith("sdxl"):
        parts |= {"text_encoder_2": text_encoder(width=POOLED, projection=True, **tower), "tokenizer_2": tokenizer}
        parts |= {"scheduler": diffusers.EulerDiscreteScheduler(**options, timestep_spacing="leading")}
        if family == "sdxl":
            base = {"text_encoder": text_encoder(**tower), "tokenizer": tokenizer}
            made = diffusers.StableDiffusionXLPipeline(**parts, **base)
        else:
            made = diffusers.StableDiffusionXLImg2ImgPipeline(
                **parts, text_encoder=None, tokenizer=None, requires_aesthetics_score=True,
                force_zeros_for_empty_prompt=False,
            )  # fmt: skip
    else:
        rest = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        parts |= {"text_encoder": text_encoder(**tower), "tokenizer": tokenizer, **rest}
        kind = {"inpaint": "StableDiffusionInpaintPipeline", "lcm": "LatentConsistencyModelPipeline"}
        scheduler = diffusers.LCMScheduler if family == "lcm" else diffusers.DDIMScheduler
        prediction = "v_prediction" if family == "sd2" else "epsilon"
        parts["scheduler"] = scheduler(**options, prediction_type=prediction, clip_sample=False, set_alpha_to_one=False)
        made = getattr(diffusers, kind.get(family, "StableDiffusionPipeline"))(**parts)
    made.set_progress_bar_config(disable=True)
    return made


def embedded() -> tuple[dict[str, torch.nn.Module], ModelSpec]:
    """The embedded model's own weights in float32 and its facts, without `edgesd.models.load`."""
    from importlib import resources

    from diffusers import AutoencoderTiny, UNet2DConditionModel
    from transformers import CLIPTextModel

    folder = str(resources.files("edgesd.models") / "shapes")
    kinds = {"text_encoder": CLIPTextModel, "unet": UNet2DConditionModel, "vae": AutoencoderTiny}
    made = {
        part: kind.from_pretrained(f"{folder}/{part}", torch_dtype=torch.float32).eval().requires_grad_(False)
        for part, kind in kinds.items()
    }
    text = made["text_encoder"].config
    facts = ModelSpec(
        name="shapes",
        family="sd1",
        prediction_type="epsilon",
        unet_in_channels=4,
        latent=LatentSpec(channels=4, downscale=8, scaling_factor=made["vae"].config.scaling_factor),
        tokenizers=(
            TokenizerSpec(
                file="tokenizer/tokenizer.json",
                component="text_encoder",
                max_length=text.max_position_embeddings,
                bos_id=text.bos_token_id,
                eos_id=text.eos_token_id,
                pad_id=text.pad_token_id,
            ),
        ),
        defaults=Defaults(sampler="dpmpp_2m", size_px=(128, 128)),
    )
    return made, facts


def lower_all(target, folder, parts, facts, axes, names=("text_encoder", "unet", "vae_decoder", "vae_encoder")):
    """Lowers the components `names` into `folder`; returns (manifest, {name: Component}). No tables, no hashes."""
    from edgesd import manifest as schema
    from edgesd.models.modules import build

    made, listed, files = {}, [], {tokenizer.file for tokenizer in facts.tokenizers} | {"tables.safetensors"}
    for name in names:
        made[name] = build(name, parts, facts, axes)
        lowered = target.lower(made[name], axes, folder)
        paths = tuple(path.as_posix() for path in lowered.files)
        files |= set(paths)
        variant = schema.Variant(axes=axes, files=paths, inputs=lowered.inputs, outputs=lowered.outputs)
        listed.append(schema.Component(name=name, variants=(variant,)))
    manifest = schema.Manifest(
        target=target.name,
        model=facts,
        components=tuple(listed),
        samplers=(schema.SamplerFile(name="euler", file="tables.safetensors", steps=(1,)),),
        provenance=schema.Provenance(source=facts.name, sha256="0" * 64),
        files=tuple(schema.FileEntry(path=path, bytes=0, sha256="0" * 64) for path in sorted(files)),
    )
    return manifest, made


def real_calls(components: dict) -> dict[str, tuple[dict, dict]]:
    """{name: (inputs, float32 truth)} as arrays; the UNet attends to what the text encoder made of its ids."""
    calls, states = {}, None
    for name, component in components.items():
        x = dict(zip([spec.name for spec in component.inputs], component.example, strict=True))
        if name == "unet" and states is not None:
            x["encoder_hidden_states"] = states.expand_as(x["encoder_hidden_states"])
        with torch.no_grad():
            y = component.module(*x.values())
        y = dict(zip([spec.name for spec in component.outputs], y if isinstance(y, tuple) else (y,), strict=True))
        states = y.get("encoder_hidden_states", states)
        calls[name] = ({k: v.numpy() for k, v in x.items()}, {k: v.numpy() for k, v in y.items()})
    return calls


def snr_db(truth, got) -> float:
    """Signal to noise of `got` against `truth`, in dB."""
    import numpy as np

    signal, noise = truth.astype(np.float64), got.astype(np.float64) - truth
    return float(10 * np.log10((signal**2).sum() / max((noise**2).sum(), 1e-300)))
