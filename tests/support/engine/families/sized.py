"""Tiny pipelines that choose the size of an image themselves, unless they are called in the right way."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import torch

from support.engine import tiny, tiny_inputs
from support.engine.tiny_unets import shifted_vae, vae

__all__ = ["OWN_SIZES", "build", "embeddings", "prompted", "with_embeddings"]


def _kontext() -> Any:
    flux = tiny.build("flux")
    pipeline = diffusers.FluxKontextPipeline(**flux.components)
    # Real ones have 128, a megapixel.
    pipeline.default_sample_size = 8
    return pipeline


def _hidream() -> Any:
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=[8, 8],
        text_emb_dim=16,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(16, 16),
        llama_layers=[0, 1],
        force_inference_output=True,
    )
    parts = {f"{kind}{number}": None for kind in ("text_encoder", "tokenizer") for number in ("", "_2", "_3", "_4")}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline = diffusers.HiDreamImagePipeline(transformer=transformer, vae=shifted_vae(), scheduler=scheduler, **parts)
    pipeline.default_sample_size = 16
    return pipeline


def _kandinsky5() -> Any:
    transformer = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=8,
        in_text_dim2=8,
        time_dim=16,
        model_dim=8,
        ff_dim=16,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(2, 2, 4),
    )
    parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
    pipeline = diffusers.Kandinsky5T2IPipeline(transformer=transformer, vae=vae(), scheduler=scheduler, **parts)
    # Real ones have seven sizes of about a megapixel.
    pipeline.resolutions = [(64, 64), (48, 96), (96, 48)]
    return pipeline


def _hunyuan_dit() -> Any:
    transformer = diffusers.HunyuanDiT2DModel(
        sample_size=16,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        in_channels=4,
        cross_attention_dim=32,
        cross_attention_dim_t5=32,
        pooled_projection_dim=16,
        hidden_size=24,
        activation_fn="gelu-approximate",
        use_style_cond_and_image_meta_size=False,
    )
    parts = dict.fromkeys(
        ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "safety_checker", "feature_extractor")
    )
    return diffusers.HunyuanDiTPipeline(
        transformer=transformer,
        vae=vae(),
        scheduler=diffusers.DDPMScheduler(),
        requires_safety_checker=False,
        **parts,
    )


def _prx() -> Any:
    transformer = diffusers.PRXTransformer2DModel(
        in_channels=4,
        patch_size=2,
        context_in_dim=8,
        hidden_size=8,
        mlp_ratio=2.0,
        num_heads=2,
        depth=1,
        axes_dim=[2, 2],
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.PRXPipeline(
        transformer=transformer,
        vae=shifted_vae(),
        scheduler=scheduler,
        text_encoder=None,
        tokenizer=None,
        default_sample_size=64,
    )


_BUILDERS = {
    "hidream": _hidream,
    "hunyuan_dit": _hunyuan_dit,
    "kandinsky5": _kandinsky5,
    "kontext": _kontext,
    "pixart_sigma": lambda: tiny.build("pixart_sigma"),
    "prx": _prx,
    "sana": lambda: tiny.build("sana"),
    "sana_sprint": lambda: tiny.build("sana_sprint"),
}

OWN_SIZES = tuple(_BUILDERS)
"""Names for `build`."""


def build(name: str) -> Any:
    """Builds a new pipeline, whose native size is at most 256 pixels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = _BUILDERS[name]()
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
            with torch.no_grad():
                for parameter in component.parameters():
                    # Some are left uninitialised, because only a checkpoint sets them.
                    parameter.nan_to_num_(0.0, 0.0, 0.0)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def prompted(name: str) -> Any:
    """Builds a pipeline that uses the same embeddings for every prompt."""
    return with_embeddings(build(name), name)


def with_embeddings(pipeline: Any, name: str) -> Any:
    """Makes the pipeline of that name use the same embeddings for every prompt, and returns it."""
    encode_prompt = pipeline.encode_prompt
    signature = inspect.signature(encode_prompt)
    known = {each: value for each, value in embeddings(name).items() if each in signature.parameters}

    def encode(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.arguments.update(known)
        return encode_prompt(*bound.args, **bound.kwargs)

    pipeline.encode_prompt = encode
    return pipeline


def embeddings(name: str) -> dict[str, Any]:
    """Returns a prompt, as embeddings, and the arguments that avoid guidance."""
    tokens = 12
    if name == "hidream":
        prompt = {
            "prompt_embeds_t5": _random(1, tokens, 8),
            "prompt_embeds_llama3": _random(2, 1, tokens, 8),
            "pooled_prompt_embeds": _random(1, 16),
        }
        return {"guidance_scale": 1.0, **prompt, **_negative(prompt)}
    if name == "kandinsky5":
        lengths = torch.tensor([0, tokens], dtype=torch.int32)
        return {
            "guidance_scale": 1.0,
            "prompt_embeds_qwen": _random(1, tokens, 8),
            "prompt_embeds_clip": _random(1, 8),
            "prompt_cu_seqlens": lengths,
        }
    if name == "hunyuan_dit":
        return {
            "guidance_scale": 1.0,
            "prompt_embeds": _random(1, 77, 32),
            "prompt_attention_mask": torch.ones(1, 77),
            "prompt_embeds_2": _random(1, 256, 32),
            "prompt_attention_mask_2": torch.ones(1, 256),
        }
    if name == "prx":
        prompt = {
            "prompt_embeds": _random(1, tokens, 8),
            "prompt_attention_mask": torch.ones(1, tokens, dtype=torch.bool),
        }
        return {"guidance_scale": 1.0, **prompt, **_negative(prompt)}
    if name == "kontext":
        return tiny_inputs.embeddings("flux")
    return {**tiny_inputs.embeddings(name), **({} if name == "sana_sprint" else {"negative_prompt": None})}


def _negative(prompt: dict[str, Any]) -> dict[str, Any]:
    return {f"negative_{name}": value for name, value in prompt.items()}


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))
