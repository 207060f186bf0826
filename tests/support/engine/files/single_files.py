"""Writes tiny pipelines as single files with the names of the original implementations, and as GGUF files."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["sd3_transformer", "stable_diffusion", "vae", "write", "write_gguf"]

Weights = dict[str, torch.Tensor]

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE_NAMES = {
    "conv_shortcut": "nin_shortcut",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "conv_norm_out": "norm_out",
}
_OPEN_CLIP = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "final_layer_norm": "ln_final",
    "encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn": "attn",
}
_SD3 = {
    "pos_embed.proj": "x_embedder.proj",
    "pos_embed.pos_embed": "pos_embed",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "transformer_blocks": "joint_blocks",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}


def write(file: Path, weights: Weights) -> Path:
    """Writes weights as .safetensors, and returns the file."""
    save_file({name: value.contiguous() for name, value in weights.items()}, file)
    return file


def write_gguf(file: Path, weights: Weights, kind: str) -> Path:
    """Writes weights as .gguf: matrices in the format `kind`, such as "Q8_0", the rest as float32."""
    import gguf

    writer = gguf.GGUFWriter(str(file), "diffusion")
    quantized = gguf.GGMLQuantizationType[kind]
    for name, value in weights.items():
        numbers = value.contiguous().numpy()
        # One row of a format holds blocks of 32 numbers.
        as_kind = quantized if value.ndim == 2 and value.shape[-1] % 32 == 0 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(numbers, as_kind), raw_dtype=as_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def stable_diffusion(pipeline: Any) -> Weights:
    """Returns the weights of a Stable Diffusion 1.5 or XL under the names of the original implementation."""
    weights = {f"model.diffusion_model.{name}": value for name, value in _unet(pipeline.unet).items()}
    weights |= {f"first_stage_model.{name}": value for name, value in vae(pipeline.vae).items()}
    xl = hasattr(pipeline, "text_encoder_2")
    clip = "conditioner.embedders.0.transformer." if xl else "cond_stage_model.transformer."
    weights |= {f"{clip}text_model.{name}": value for name, value in _clip(pipeline.text_encoder).items()}
    if xl:
        prefix = "conditioner.embedders.1.model."
        weights |= {f"{prefix}{name}": value for name, value in _open_clip(pipeline.text_encoder_2).items()}
    return weights


def vae(module: Any) -> Weights:
    """Returns the weights of an `AutoencoderKL` under the names of the original implementation."""
    count = len(module.config.block_out_channels)
    weights = {}
    for name, value in module.state_dict().items():
        name = _renamed(name, _VAE_NAMES)
        name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda found: f"up.{count - 1 - int(found[1])}.block", name)
        name = re.sub(
            r"up_blocks\.(\d+)\.upsamplers\.0", lambda found: f"up.{count - 1 - int(found[1])}.upsample", name
        )
        if ".attn_1." in name and name.endswith("weight") and value.ndim == 2:
            value = value[:, :, None, None]  # The original computes attention with convolutions.
        weights[name] = value
    return weights


def sd3_transformer(module: Any) -> Weights:
    """Returns the weights of a Stable Diffusion 3 transformer under the names of the original implementation."""
    state = dict(module.state_dict())
    weights = {}
    for block in range(module.config.num_layers):
        own, other = f"transformer_blocks.{block}.attn.", f"joint_blocks.{block}."
        for kind in ("weight", "bias"):
            for part, names in (
                ("x_block", ("to_q", "to_k", "to_v")),
                ("context_block", ("add_q_proj", "add_k_proj", "add_v_proj")),
            ):
                rows = [state.pop(f"{own}{name}.{kind}") for name in names]
                weights[f"{other}{part}.attn.qkv.{kind}"] = torch.cat(rows)
    last = f"transformer_blocks.{module.config.num_layers - 1}.norm1_context"
    for name, value in state.items():
        if name.startswith(("norm_out", last)):
            value = torch.cat(value.chunk(2)[::-1])  # diffusers stores scale and shift in the other order.
        weights[_renamed(name, _SD3)] = value
    return weights


def _unet(module: Any) -> Weights:
    layers = module.config.layers_per_block
    weights = {}
    for name, value in module.state_dict().items():
        name = _renamed(name, _UNET_ENDS) if not re.match(r"(down|up|mid)_block", name) else name
        name = re.sub(r"(resnets\.\d+\.)(\w+)", lambda found: found[1] + _RESNET[found[2]], name)
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"middle_block.{2 * int(found[1])}", name)
        name = name.replace("mid_block.attentions.0", "middle_block.1")
        name = re.sub(r"down_blocks\.(\d+)\.(resnets|attentions)\.(\d+)", _numbered("input", layers + 1, 1), name)
        name = re.sub(
            r"down_blocks\.(\d+)\.downsamplers\.0\.conv",
            lambda found: f"input_blocks.{(int(found[1]) + 1) * (layers + 1)}.0.op",
            name,
        )
        name = re.sub(r"up_blocks\.(\d+)\.(resnets|attentions)\.(\d+)", _numbered("output", layers + 1, 0), name)
        upsampler = re.match(r"up_blocks\.(\d+)\.upsamplers\.0", name)
        if upsampler:
            block = int(upsampler[1])
            place = 2 if hasattr(module.up_blocks[block], "attentions") else 1
            name = name.replace(upsampler[0], f"output_blocks.{block * (layers + 1) + layers}.{place}")
        weights[name] = value
    return weights


def _numbered(kind: str, per_block: int, first: int) -> Any:
    def replace(found: re.Match[str]) -> str:
        number = first + int(found[1]) * per_block + int(found[3])
        return f"{kind}_blocks.{number}.{int(found[2] == 'attentions')}"

    return replace


def _clip(module: Any) -> Weights:
    return {name.removeprefix("text_model."): value for name, value in module.state_dict().items()}


def _open_clip(module: Any) -> Weights:
    state = _clip(module)
    weights = {"text_projection": state.pop("text_projection.weight").T}
    for name in [name for name in state if ".q_proj." in name]:
        rows = [state.pop(name.replace("q_proj", each)) for each in ("q_proj", "k_proj", "v_proj")]
        weights[_renamed(name, _OPEN_CLIP).replace(".q_proj.", ".in_proj_")] = torch.cat(rows)
    return weights | {_renamed(name, _OPEN_CLIP): value for name, value in state.items()}


def _renamed(name: str, names: dict[str, str]) -> str:
    for ours, original in names.items():
        name = re.sub(rf"(^|\.){re.escape(ours)}(?=\.|$)", rf"\g<1>{original}", name)
    return name
