"""Tiny pipelines with a transformer that takes packed latents: FLUX and its relatives."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from support.engine import tiny_transformers
from support.engine.families.hunyuan_image import hunyuan_image
from support.engine.families.prompts import TOKENS, mask, pair, speaking
from support.engine.tiny_inputs import words
from support.engine.tiny_unets import shifted_vae, vae

__all__ = ["PACKED"]


def _flow(**config: Any) -> diffusers.FlowMatchEulerDiscreteScheduler:
    return diffusers.FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
        **config,
    )


def _flux(pipeline: Any) -> Any:
    """Gives prompts to a FLUX.1."""

    def encode(call: Any) -> Any:
        return words(call.prompt, 1, TOKENS, 32), words(call.prompt, 1, 32), torch.zeros(TOKENS, 3)

    return speaking(pipeline, encode)


def _flux_schnell() -> Any:
    return _flux(tiny_transformers.flux(guidance_embeds=False))


def _flux_kontext() -> Any:
    pipeline = diffusers.FluxKontextPipeline(**tiny_transformers.flux().components)
    # Real ones have 128, a megapixel.
    pipeline.default_sample_size = 8
    return _flux(pipeline)


def _flux2(kind: Any, *, guidance_embeds: bool = False, **others: Any) -> Any:
    parts = tiny_transformers.flux2(guidance_embeds=guidance_embeds).components
    return speaking(
        kind(**parts, **others), lambda call: (words(call.prompt, 1, TOKENS, 16), torch.zeros(1, TOKENS, 4))
    )


def _bria() -> Any:
    transformer = diffusers.BriaTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=[0, 4, 4],
    )
    pipeline = diffusers.BriaPipeline(
        transformer=transformer, vae=shifted_vae(), text_encoder=None, tokenizer=None, scheduler=_flow()
    )
    return speaking(pipeline, lambda call: (*pair(call, 1, TOKENS, 32), torch.zeros(1, TOKENS, 3)))


def _bria_fibo() -> Any:
    transformer = diffusers.BriaFiboTransformer2DModel(
        patch_size=1,
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        text_encoder_dim=8,
        axes_dims_rope=[0, 4, 4],
    )
    vae = diffusers.AutoencoderKLWan(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=8,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1] * 8,
        latents_std=[1.5] * 8,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
    )
    pipeline = diffusers.BriaFiboPipeline(
        transformer=transformer, vae=vae, text_encoder=None, tokenizer=None, scheduler=_flow()
    )

    def encode(call: Any) -> Any:
        guided = call.guidance_scale > 1
        layers = [words(call.prompt, 1, TOKENS, 8)] * 2
        others = [words(call.negative_prompt, 1, TOKENS, 8)] * 2
        return (
            words(call.prompt, 1, TOKENS, 16),
            words(call.negative_prompt, 1, TOKENS, 16) if guided else None,
            torch.zeros(1, TOKENS, 3),
            mask(torch.float32),
            mask(torch.float32) if guided else None,
            layers,
            others if guided else None,
        )

    return speaking(pipeline, encode)


def _ovis() -> Any:
    transformer = diffusers.OvisImageTransformer2DModel(
        in_channels=16,
        out_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    pipeline = diffusers.OvisImagePipeline(
        transformer=transformer, vae=shifted_vae(), text_encoder=None, tokenizer=None, scheduler=_flow()
    )

    def encode(call: Any) -> Any:
        ids = torch.zeros(TOKENS, 3)
        return *pair(call, 1, TOKENS, 32), ids, ids

    return speaking(pipeline, encode)


def _longcat() -> Any:
    transformer = diffusers.LongCatImageTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=[4, 4, 8],
    )
    pipeline = diffusers.LongCatImagePipeline(
        transformer=transformer,
        vae=vae(16, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=None,
        tokenizer=None,
        text_processor=None,
        scheduler=_flow(),
    )
    speaking(pipeline, lambda call: call.prompt, "rewire_prompt")
    return speaking(pipeline, lambda call: words(call.prompt, 1, TOKENS, 16), "_encode_prompt")


def _ernie() -> Any:
    transformer = diffusers.ErnieImageTransformer2DModel(
        hidden_size=16,
        num_attention_heads=2,
        num_layers=1,
        ffn_hidden_size=16,
        in_channels=16,
        out_channels=16,
        text_in_dim=8,
        rope_axes_dim=(4, 2, 2),
    )
    pipeline = diffusers.ErnieImagePipeline(
        transformer=transformer,
        vae=tiny_transformers.flux2_vae(),
        text_encoder=None,
        tokenizer=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    return speaking(pipeline, lambda call: [words(call.prompt, TOKENS, 8)])


def _ideogram4() -> Any:
    transformers = [
        diffusers.Ideogram4Transformer2DModel(
            in_channels=16,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            intermediate_size=32,
            adaln_dim=16,
            llm_features_dim=16,
            mrope_section=(4, 2, 2),
        )
        for _ in range(2)
    ]
    pipeline = diffusers.Ideogram4Pipeline(
        transformer=transformers[0],
        unconditional_transformer=transformers[1],
        vae=tiny_transformers.flux2_vae(),
        text_encoder=None,
        tokenizer=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )

    def encode(call: Any) -> Any:
        length, grid = call.max_sequence_length, (call.grid_h, call.grid_w)
        text = torch.cat([torch.zeros(1, length - TOKENS, 16), words(call.prompt, 1, TOKENS, 16)], dim=1)
        embeddings = torch.cat([text, torch.zeros(1, grid[0] * grid[1], 16)], dim=1)
        return embeddings, *pipeline._prepare_ids([TOKENS], *grid, length, torch.device("cpu"))

    return speaking(pipeline, encode)


def _krea2() -> Any:
    transformer = diffusers.Krea2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        timestep_embed_dim=16,
        text_hidden_dim=16,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=32,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )
    pipeline = diffusers.Krea2Pipeline(
        transformer=transformer,
        vae=tiny_transformers.qwen_image_vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_select_layers=(0, 1),
        scheduler=_flow(),
    )
    return speaking(
        pipeline, lambda call: (words(call.prompt, 1, TOKENS, 2, 16), mask(torch.bool)), "get_text_hidden_states"
    )


def _hunyuan_image(*, distilled: bool = False) -> Any:
    guiders = {} if distilled else {name: diffusers.AdaptiveProjectedMixGuidance() for name in ("guider", "ocr_guider")}

    def encode(call: Any) -> Any:
        return words(call.prompt, 1, TOKENS, 16), mask(), torch.zeros(1, TOKENS, 16), mask()

    return speaking(hunyuan_image(distilled=distilled, **guiders), encode)


PACKED = {
    "bria": _bria,
    "bria_fibo": _bria_fibo,
    "ernie_image": _ernie,
    "flux2": lambda: _flux2(diffusers.Flux2Pipeline, guidance_embeds=True),
    "flux2_klein_distilled": lambda: _flux2(diffusers.Flux2KleinPipeline, is_distilled=True),
    "flux_kontext": _flux_kontext,
    "flux_schnell": _flux_schnell,
    "hunyuan_image": _hunyuan_image,
    "hunyuan_image_distilled": lambda: _hunyuan_image(distilled=True),
    "ideogram4": _ideogram4,
    "krea2": _krea2,
    "longcat": _longcat,
    "ovis": _ovis,
}
