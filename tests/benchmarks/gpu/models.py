"""Pipelines of real size with random weights, built from the configurations below: no files and no hub.

Real: the denoisers and VAEs (published configurations; a test compares their numbers of parameters), the schedulers,
and CLIP's text encoders except for their vocabulary. Smaller than real: FLUX's T5 and Qwen-Image's language model have
the real width but 2 layers, so the time to encode a prompt is not theirs. Tokenizers know bytes only: a token is one
letter. Random weights take the same time as trained ones, but they say nothing about quality.

A toy has the same classes in tiny sizes, so that tests can run every part of the benchmark on a CPU.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import diffusers
import torch
import transformers

from calotype_server.engine import loading

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["FAMILIES", "build", "modules"]

_VOCABULARY = 514
_STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

_QUIETER = 0.3
"""Factor of the VAE's last weights. Images of low contrast compress like photographs; white noise would not, and its
PNG would take longer than that of any real image."""

_TOY_SAMPLE = 8
"""Width and height of a toy's default latents: an image of 64 pixels."""

Modules = dict[str, Any]
"""Modules with weights, by the name of the pipeline's component."""


@dataclass(frozen=True, slots=True)
class Family:
    """How to build a kind of pipeline.

    Attributes:
        modules: Builds the modules with weights; its argument selects the toy.
        pipeline: Builds the pipeline around them.
    """

    modules: Callable[[bool], Modules]
    pipeline: Callable[[Modules], Any]


def modules(family: str, *, toy: bool, device: str, dtype: torch.dtype) -> Modules:
    """Builds a family's modules on a device, with random weights; `meta` builds them without weights."""
    with _built_on(device, dtype):
        built = FAMILIES[family].modules(toy)
    for module in built.values():
        module.eval().requires_grad_(False)
    return built


def build(family: str, *, toy: bool, device: str, dtype: torch.dtype) -> Any:
    """Returns the pipeline of a family. The same arguments give the same weights.

    Args:
        family: A key of `FAMILIES`, or "bundled" for the bundled model with its trained weights.
        toy: Whether its modules are tiny.
        device: Such as cuda:0.
        dtype: Number format of the weights.
    """
    if family == "bundled":
        return loading.load_pipeline(loading.LoadOptions(model="bundled", device=torch.device(device), dtype=dtype))
    torch.manual_seed(0)
    built = modules(family, toy=toy, device=device, dtype=dtype)
    with torch.no_grad():
        built["vae"].decoder.conv_out.weight.mul_(_QUIETER)
    # Outside of the device's context: schedulers keep their tables on the CPU.
    pipeline = FAMILIES[family].pipeline(built)
    if toy and hasattr(pipeline, "default_sample_size"):
        pipeline.default_sample_size = _TOY_SAMPLE
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextlib.contextmanager
def _built_on(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Modules that are built in this block have their weights on `device` in `dtype`; there is no copy elsewhere."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def _tokenizer(length: int = 77) -> transformers.CLIPTokenizer:
    """Returns a tokenizer with every byte and no merges."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    # Byte-level BPE maps the other bytes to characters from 256 on.
    characters = [chr(code) for code in (*printable, *range(256, 512 - len(printable)))]
    tokens = [*characters, *(f"{each}</w>" for each in characters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=length)


def _clip(hidden: int, layers: int, heads: int, projection: int | None = None) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=_VOCABULARY,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        projection_dim=projection or hidden,
        hidden_act="quick_gelu" if projection is None else "gelu",
    )
    return (transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel)(config)


def _clip_l(toy: bool) -> Any:
    return _clip(32, 2, 4) if toy else _clip(768, 12, 12)


def _t5(toy: bool) -> Any:
    hidden, layers, heads, key, inner = (32, 1, 4, 8, 64) if toy else (4096, 2, 64, 64, 10240)
    config = transformers.T5Config(
        vocab_size=_VOCABULARY,
        d_model=hidden,
        d_kv=key,
        d_ff=inner,
        num_layers=layers,
        num_heads=heads,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
        use_cache=False,
        is_encoder_decoder=False,
    )
    return transformers.T5EncoderModel(config)


def _qwen2(toy: bool) -> Any:
    hidden, layers, heads, shared, inner = (32, 1, 4, 2, 64) if toy else (3584, 2, 28, 4, 18944)
    config = transformers.Qwen2Config(
        vocab_size=_VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=shared,
        intermediate_size=inner,
        use_cache=False,
    )
    return transformers.Qwen2Model(config)


def _vae(toy: bool, channels: int = 4, **config: Any) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 16, 16) if toy else (128, 256, 512, 512),
        layers_per_block=1 if toy else 2,
        latent_channels=channels,
        norm_num_groups=4 if toy else 32,
        **config,
    )


def _sd15(toy: bool) -> Modules:
    unet: dict[str, Any] = {
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        "layers_per_block": 2,
        "cross_attention_dim": 768,
    }
    if toy:
        unet = _toy_unet()
    return {
        "unet": diffusers.UNet2DConditionModel(in_channels=4, out_channels=4, attention_head_dim=8, **unet),
        "vae": _vae(toy, sample_size=64 if toy else 512, scaling_factor=0.18215),
        "text_encoder": _clip_l(toy),
    }


def _toy_unet(cross_attention_dim: int = 32) -> dict[str, Any]:
    return {
        "sample_size": _TOY_SAMPLE,
        "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": cross_attention_dim,
        "norm_num_groups": 8,
    }


def _sd15_pipeline(built: Modules) -> Any:
    return diffusers.StableDiffusionPipeline(
        **built,
        tokenizer=_tokenizer(),
        scheduler=diffusers.PNDMScheduler(
            **_STABLE_DIFFUSION, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl(toy: bool) -> Modules:
    unet: dict[str, Any] = {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 2,
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "transformer_layers_per_block": (1, 2, 10),
    }
    if toy:
        unet = _toy_unet(cross_attention_dim=64) | {
            "attention_head_dim": 8,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 32,
            "transformer_layers_per_block": (1, 1),
        }
    return {
        "unet": diffusers.UNet2DConditionModel(
            in_channels=4, out_channels=4, addition_embed_type="text_time", use_linear_projection=True, **unet
        ),
        "vae": _vae(toy, sample_size=64 if toy else 1024, scaling_factor=0.13025),
        "text_encoder": _clip_l(toy),
        "text_encoder_2": _clip(32, 2, 4, 32) if toy else _clip(1280, 32, 20, 1280),
    }


def _sdxl_pipeline(built: Modules) -> Any:
    return diffusers.StableDiffusionXLPipeline(
        **built,
        tokenizer=_tokenizer(),
        tokenizer_2=_tokenizer(),
        scheduler=diffusers.EulerDiscreteScheduler(**_STABLE_DIFFUSION, timestep_spacing="leading", steps_offset=1),
        add_watermarker=False,
    )


def _flux(toy: bool) -> Modules:
    transformer: dict[str, Any] = {
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "axes_dims_rope": (16, 56, 56),
    }
    if toy:
        transformer = {
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 32,
            "axes_dims_rope": (4, 4, 8),
        }
    vae = {"scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False}
    return {
        "transformer": diffusers.FluxTransformer2DModel(patch_size=1, guidance_embeds=True, **transformer),
        "vae": _vae(toy, 4 if toy else 16, sample_size=64 if toy else 1024, **vae),
        "text_encoder": _clip_l(toy),
        "text_encoder_2": _t5(toy),
    }


def _flux_pipeline(built: Modules) -> Any:
    return diffusers.FluxPipeline(
        **built,
        tokenizer=_tokenizer(),
        tokenizer_2=_tokenizer(512),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            shift=3.0,
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=256,
            max_image_seq_len=4096,
        ),
    )


def _qwen(toy: bool) -> Modules:
    transformer: dict[str, Any] = {}  # The defaults of the class are the published configuration.
    vae: dict[str, Any] = {}
    if toy:
        transformer = {
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 3,
            "joint_attention_dim": 32,
            "axes_dims_rope": (8, 4, 4),
        }
        vae = {
            "base_dim": 8,
            "z_dim": 4,
            "dim_mult": [1, 2, 2, 2],
            "num_res_blocks": 1,
            "latents_mean": [0.1, -0.2, 0.3, 0.0],
            "latents_std": [1.0, 2.0, 1.5, 0.7],
        }
    return {
        "transformer": diffusers.QwenImageTransformer2DModel(**transformer),
        "vae": diffusers.AutoencoderKLQwenImage(**vae),
        "text_encoder": _qwen2(toy),
    }


def _qwen_pipeline(built: Modules) -> Any:
    return diffusers.QwenImagePipeline(
        **built,
        tokenizer=_tokenizer(1058),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=0.9,
            base_image_seq_len=256,
            max_image_seq_len=8192,
            shift_terminal=0.02,
        ),
    )


FAMILIES = {
    "sd15": Family(_sd15, _sd15_pipeline),
    "sdxl": Family(_sdxl, _sdxl_pipeline),
    "flux": Family(_flux, _flux_pipeline),
    "qwen": Family(_qwen, _qwen_pipeline),
}
