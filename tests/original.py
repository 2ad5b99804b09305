"""diffusers' weights back in the original key layout, as model sites give them: the inverse of what edgesd reads."""

import re

import torch
from safetensors.torch import save_file

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
UNET = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
             "self_attn.out_proj": "attn.out_proj"}  # fmt: skip


def save(pipeline, path, dtype=torch.float32):
    """Writes a whole pipeline (SD 1.x, 2.x or SDXL, tiny ones too) as one file in the original layout."""
    tensors = unet(pipeline.unet) | vae(pipeline.vae)
    second = getattr(pipeline, "text_encoder_2", None)
    first = "conditioner.embedders.0" if second is not None else "cond_stage_model"
    if pipeline.unet.config.use_linear_projection and second is None:
        tensors |= {f"{first}.model.{k}": v for k, v in open_clip(pipeline.text_encoder).items()}
    else:
        tensors |= {f"{first}.transformer.text_model.{k}": v for k, v in tower(pipeline.text_encoder).items()}
    if second is not None:
        tensors |= {f"conditioner.embedders.1.model.{k}": v for k, v in open_clip(second).items()}
    save_file({k: v.to(dtype).contiguous() for k, v in tensors.items()}, path)
    return path


def tower(model):
    return {k.removeprefix("text_model."): v for k, v in model.state_dict().items() if "position_ids" not in k}


def unet(model):
    per = model.config.layers_per_block + 1
    return {f"model.diffusion_model.{_unet_key(k, per, model)}": v for k, v in model.state_dict().items()}


def _unet_key(key, per, model):
    for new, old in UNET.items():
        if key.startswith(f"{new}."):
            return old + key[len(new) :]
    found = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", key)
    if found is None:
        kind, index, rest = re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", key).groups()
        place = 1 if kind == "attentions" else 2 * int(index)
        return f"middle_block.{place}.{_inner(kind, rest)}"
    side, block, kind, layer, rest = found.groups()
    block, layer = int(block), int(layer)
    if side == "down":
        if kind == "downsamplers":
            return f"input_blocks.{(block + 1) * per}.0.op.{rest.removeprefix('conv.')}"
        return f"input_blocks.{1 + block * per + layer}.{int(kind == 'attentions')}.{_inner(kind, rest)}"
    if kind == "upsamplers":
        attends = hasattr(model.up_blocks[block], "attentions")
        return f"output_blocks.{block * per + per - 1}.{1 + attends}.{rest}"
    return f"output_blocks.{block * per + layer}.{int(kind == 'attentions')}.{_inner(kind, rest)}"


def _inner(kind, rest):
    if kind == "attentions":
        return rest
    name, _, last = rest.rpartition(".")
    return f"{RESNET[name]}.{last}"


def vae(model):
    blocks, made = len(model.config.block_out_channels), {}
    for key, value in model.state_dict().items():
        key = re.sub(r"encoder\.down_blocks\.(\d+)\.resnets\.", r"encoder.down.\1.block.", key)
        key = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample.", key)
        key = re.sub(r"up_blocks\.(\d+)\.resnets\.", lambda m: f"up.{blocks - 1 - int(m[1])}.block.", key)
        key = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0\.", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample.", key)
        key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
        key = key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        if "mid_block.attentions.0" in key:
            name, _, last = key.split("mid_block.attentions.0.")[1].rpartition(".")
            key = f"{key.split('.')[0]}.mid.attn_1.{ATTENTION[name]}.{last}"
            value = value[:, :, None, None] if value.ndim == 2 else value
        made[f"first_stage_model.{key}"] = value
    return made


def open_clip(model):
    """A text tower with joined query, key and value, its projection transposed."""
    made, width = {}, tower(model)
    for key, value in width.items():
        found = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", key)
        if found is None:
            renamed = {
                "embeddings.token_embedding.weight": "token_embedding.weight",
                "embeddings.position_embedding.weight": "positional_embedding",
                "final_layer_norm.weight": "ln_final.weight", "final_layer_norm.bias": "ln_final.bias",
                "text_projection.weight": "text_projection",
            }[key]  # fmt: skip
            made[renamed] = value.T if renamed == "text_projection" else value
            continue
        layer, name, last = found.groups()
        place = f"transformer.resblocks.{layer}"
        if name in OPEN_CLIP:
            made[f"{place}.{OPEN_CLIP[name]}.{last}"] = value
        elif name == "self_attn.q_proj":
            each = [width[f"encoder.layers.{layer}.self_attn.{p}_proj.{last}"] for p in "qkv"]
            made[f"{place}.attn.in_proj_{last}"] = torch.cat(each)
    return made
